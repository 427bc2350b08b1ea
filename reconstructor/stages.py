"""Stages of a training: what trains, how fast and on which losses, and for how long. The clock is images seen.

Parameters are in named groups (`parameter_groups`): those that an architecture names (Portrait4D: cross_attention, background), the rest
of it (architecture), decoder and superresolution. The optimiser holds one group of each, so a stage changes rates and never its layout.
A frozen group has no gradient: Adam passes it over, and begins its state (or goes on with it) when the group thaws.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import itertools
import math
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from head3d.run.config import NonNegativeFloat, PositiveFloat, PositiveInt
from head3d.run.errors import ConfigError
from reconstructor.losses import LossConfig

if TYPE_CHECKING:
    from reconstructor.model import Reconstructor


@dataclasses.dataclass(frozen=True)
class StageConfig:
    """One stage. Defaults are the published run's only one: everything trains, at one rate, to the end.

    A loss that it names has that weight during the stage; the images since and until which the term counts stay as they are.
    """

    name: str = "all"  # for messages and the log
    images: PositiveInt | None = None  # that it lasts; None = to the end, of the last stage only
    train: tuple[str, ...] = ("*",)  # groups that train, by name or pattern (*, ?)
    freeze: tuple[str, ...] = ()  # groups of those that do not
    rates: dict[str, PositiveFloat] = dataclasses.field(default_factory=dict)  # group or pattern -> factor of its rate
    losses: dict[str, NonNegativeFloat] = dataclasses.field(default_factory=dict)  # loss term -> its weight here; 0 turns it off


def stage_number(stages: Sequence[StageConfig], images_seen: int) -> int:
    """Which of them (from 0) the step that starts at `images_seen` is in."""
    ends = itertools.accumulate(math.inf if stage.images is None else stage.images for stage in stages)
    return next(number for number, end in enumerate(ends) if images_seen < end)


def stage_at(stages: Sequence[StageConfig], images_seen: int) -> StageConfig:
    """The stage of the step that starts at `images_seen`."""
    return stages[stage_number(stages, images_seen)]


def with_weights(losses: LossConfig, weights: Mapping[str, float]) -> LossConfig:
    """The losses with other weights of some terms; their ranges stay."""
    return dataclasses.replace(losses, **{term: dataclasses.replace(getattr(losses, term), weight=weights[term]) for term in weights})


def largest_weights(losses: LossConfig, stages: Sequence[StageConfig]) -> LossConfig:
    """The losses with the largest weight that each has in any stage: what labels and networks a run needs."""
    terms = {term for stage in stages for term in stage.losses}
    return with_weights(losses, {term: max(stage.losses.get(term, getattr(losses, term).weight) for stage in stages) for term in terms})


def parameter_groups(model: Reconstructor) -> dict[str, list[torch.nn.Parameter]]:
    """Every parameter of the model, by the group it is in."""
    groups: dict[str, list[torch.nn.Parameter]] = {name: [] for name in (*model.architecture.groups, "architecture")}
    for name, parameter in model.named_parameters():
        group, _, inside = name.partition(".")
        if group == "architecture":
            group = next((own for own, patterns in model.architecture.groups.items() if _matches(inside, patterns)), group)
        groups.setdefault(group, []).append(parameter)
    return {name: parameters for name, parameters in groups.items() if parameters}


def _matches(name: str, patterns: Collection[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def check_stages(stages: Sequence[StageConfig], losses: LossConfig) -> None:
    """Raise ConfigError naming the stage if its length or a loss that it names makes no sense."""
    terms = [field.name for field in dataclasses.fields(losses)]
    for index, stage in enumerate(stages):
        if (stage.images is None) != (index == len(stages) - 1):
            raise ConfigError(
                f"stages[{index}] ({stage.name}): images is {stage.images}; the last stage goes on to the end (null), each one before it "
                "lasts a number of images"
            )
        for term in stage.losses:
            if term not in terms:
                raise ConfigError(f"stages[{index}] ({stage.name}): there is no loss {term!r}; there are {', '.join(terms)}")


def check_groups(stages: Sequence[StageConfig], groups: Collection[str]) -> None:
    """Raise ConfigError naming the stage and the groups that there are, if a pattern matches none of them or nothing trains."""
    for index, stage in enumerate(stages):
        for pattern in (*stage.train, *stage.freeze, *stage.rates):
            if not any(_matches(group, [pattern]) for group in groups):
                raise ConfigError(
                    f"stages[{index}] ({stage.name}): {pattern!r} matches no group of parameters; there are {', '.join(groups)}"
                )
        if not any(_trains(stage, group) for group in groups):
            raise ConfigError(f"stages[{index}] ({stage.name}): trains none of the groups {', '.join(groups)}; change train or freeze")


def enter(stage: StageConfig, optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Set what trains and how fast, in an optimiser whose groups carry their names. Entering a stage again changes nothing."""
    for group in optimizer.param_groups:
        name = group["name"]
        group["lr"] = learning_rate * math.prod(factor for pattern, factor in stage.rates.items() if _matches(name, [pattern]))
        for parameter in group["params"]:
            parameter.requires_grad_(_trains(stage, name))


def _trains(stage: StageConfig, group: str) -> bool:
    return _matches(group, stage.train) and not _matches(group, stage.freeze)
