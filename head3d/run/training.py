"""What both training loops share: the clock, the stop at divergence, and the checks before a resume."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from head3d.run.checkpoint import Checkpoint, newest_checkpoint_folder
from head3d.run.errors import ConfigError, FoundryError


class Divergence(FoundryError):
    """A loss is not finite."""


def crossed(images_seen: int, batch: int, every: int) -> bool:
    """True when the last batch passed a multiple of `every`."""
    return images_seen // every != (images_seen - batch) // every


def check_finite(scalars: Mapping[str, float], images_seen: int, run_folder: Path, advice: str) -> None:
    """Raise Divergence naming each quantity that is not finite, the last good checkpoint and what to try."""
    bad = [name for name, value in scalars.items() if not math.isfinite(value)]
    if bad:
        good = newest_checkpoint_folder(run_folder) or "none yet"
        raise Divergence(f"{run_folder}: {', '.join(bad)} is not finite after {images_seen} images; last good checkpoint: {good}. {advice}")


def refuse_changes(saved: Checkpoint, settings: Mapping[str, Any], recorded: Mapping[str, Any], free: Collection[str]) -> None:
    """Raise ConfigError unless a run may go on from `saved`.

    `settings` are the run's, of which those in `free` may differ from `recorded`, the saved ones; a setting that one of the two lacks
    counts as different.
    """
    keys = (settings.keys() | recorded.keys()) - set(free)
    differing = sorted(key for key in keys if key not in settings or key not in recorded or settings[key] != recorded[key])
    if differing:
        raise ConfigError(
            f"{saved.folder}: the run was started with other settings of {', '.join(differing)}; "
            "give them as they were, or another --out for a new run"
        )


def refuse_other_circumstances(saved: Checkpoint, circumstances: Mapping[str, Any]) -> None:
    """Raise ConfigError unless what a run depends on besides its settings (its data, its processes) is as when it was started."""
    recorded = saved.state.get("circumstances", {})
    for name, value in circumstances.items():
        if recorded.get(name) != value:
            raise ConfigError(
                f"{saved.folder}: the run was started with {name} {recorded.get(name)!r}, now it is {value!r}, so it would not be the same "
                "run; bring that back, or give another --out for a new run"
            )


def part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin with `prefix`, without it."""
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
