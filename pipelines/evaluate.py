"""`headfoundry evaluate`: measure a reconstructor on held-out identities, or a generator against portraits and head meshes."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

import genhead.evaluate
import reconstructor.evaluate
from genhead.evaluate import GeneratorMeasures
from head3d.run.errors import ConfigError

OF_GENERATOR = ("portraits", "measures")  # settings that a reconstructor has no use for
OF_RECONSTRUCTOR = (
    "reconstructor",
    "shards",
    "motion_encoder",
    "perception",
    "lpips",
    "arcface",
    "tasks",
    "switch",
    "split",
    "identities",
    "samples",
    "sequence_frames",
    "mean_images",
    "sheet_rows",
    "resamples",
    "batch",
)


@dataclasses.dataclass(frozen=True)
class EvaluateRun(reconstructor.evaluate.EvaluateRun):
    """Measure a reconstructor on held-out identities, or a generator: tables, JSON, CSV, a page and picture sheets.

    Of what is not given above `what`, a generator takes out, generator and seed; the other settings there are a reconstructor's.
    """

    what: Literal["reconstructor", "generator"] = "reconstructor"  # which network is measured
    portraits: Path = Path("runs/portraits")  # of a generator: LMDB of the portraits that it was trained on
    measures: GeneratorMeasures = GeneratorMeasures()  # of a generator: how much is measured


def main(config: EvaluateRun) -> int:
    """Measure what `config.what` says. Raises ConfigError if a setting of the other network is given, or no generator to measure."""
    match config.what:
        case "reconstructor":
            _refuse_given(config, OF_GENERATOR)
            names = [field.name for field in dataclasses.fields(reconstructor.evaluate.EvaluateRun)]
            run = reconstructor.evaluate.EvaluateRun(**{name: getattr(config, name) for name in names})
            return reconstructor.evaluate.evaluate(run)
        case "generator":
            _refuse_given(config, OF_RECONSTRUCTOR)
            if config.generator is None:
                raise ConfigError("generator: expected the folder of the exported generator to measure, got none; add --generator DIR")
            run = genhead.evaluate.GeneratorEvaluation(config.out, config.generator, config.portraits, config.seed, config.measures)
            return genhead.evaluate.evaluate(run)
        case _:
            raise ValueError(f"nothing to measure: {config.what}")


def _refuse_given(config: EvaluateRun, names: tuple[str, ...]) -> None:
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    given = [name for name in names if getattr(config, name) != defaults[name]]
    if given:
        raise ConfigError(
            f"{', '.join(given)}: no setting of a {config.what}, which is what would be measured; leave it out, or change --what"
        )


CONFIG = EvaluateRun
