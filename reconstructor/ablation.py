"""Train variants of one run, measure all of them in the same way, and compare: the rows of the paper's table 3.

    ROWS/A.yaml, B.yaml, ...   what a row changes of the base; its comment says why (configs/ablation)
    base + row --train--> OUT/A --evaluate--> OUT/A/evaluation      row after row; what is done is not done again
    all evaluations            -> OUT/ablation.json, index.html; the table is printed

Every row is shown the same number of images and measured on the same samples. Beside its own mean stands its difference from the row
`reference`, sample by sample, with an interval over identities: rows share what makes one sample harder than another, so differences
are known better than the rows themselves.
"""

from __future__ import annotations

import csv
import dataclasses
import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import torch

from datagen.reading import open_dataset
from head3d.image_metrics import bootstrap_interval
from head3d.pages import figure, page, section, table
from head3d.run.config import NonNegativeInt, PositiveInt, from_dict, read_settings, to_dict
from head3d.run.errors import ConfigError
from head3d.run.files import write_atomic
from head3d.run.seeding import torch_generator
from reconstructor.evaluate import EvaluateRun, evaluate
from reconstructor.evaluation_cases import Task, draw_cases
from reconstructor.evaluation_page import SHEET_COLUMNS, own_error_html
from reconstructor.evaluation_tables import cell
from reconstructor.perception import load_perception
from reconstructor.settings import ReconstructorRun
from reconstructor.train import train

# Identity of reconstructed photographs by ArcFace after 5 million images (arXiv:2311.18729, table 3), as far as our digest gives it
PUBLISHED_IDENTITY = {"A": 0.239, "D": 0.441, "E": 0.703}


class Column(NamedTuple):
    """A number of the table, from the row `ours` of an evaluation."""

    title: str
    task: Task
    metric: str
    higher_is_better: bool


COLUMNS = (
    Column("identity, static lift", "static_lift", "identity_cosine", True),
    Column("identity, cross", "cross_reenactment", "identity_cosine", True),
    Column("PSNR, cross", "cross_reenactment", "psnr", True),
    Column("expression error, cross", "cross_reenactment", "expression", False),
    Column("jaw error, cross", "cross_reenactment", "jaw_deg", False),
)


@dataclasses.dataclass(frozen=True)
class AblationRun:
    """Train the rows of an ablation, measure each in the same way and print the table; what is done is not done again."""

    out: Path = Path("runs/ablation")  # a folder for each row, the table and a page
    base: Path | None = None  # YAML of the reconstructor's settings that all rows share; None = the published run
    rows: Path = Path("configs/ablation")  # folder with a YAML file for each row: what it changes of the base
    names: tuple[str, ...] = ("A", "B", "C", "D", "E")  # rows, in the order of the table; each a file NAME.yaml in `rows`
    reference: str = "E"  # the row that the others are compared with
    shards: str = "runs/datagen"  # data set (folder or URL) for training and, its held-out split, for measuring
    generator: Path | None = None  # exported generator of the data set; None = the one that the shards record
    perception: Path | None = None  # exported perception network of role evaluation; None = no identity, expression and jaw
    total_images: PositiveInt = 5_000_000  # shown to each row (the paper's ablation)
    identities: PositiveInt = 200  # at most this many source identities a task
    samples: PositiveInt = 4  # samples a source identity and task
    resamples: PositiveInt = 2000  # of the bootstrap
    seed: NonNegativeInt = 0  # of the training and of the choice of samples

    def __post_init__(self) -> None:
        if len(set(self.names)) < len(self.names) or self.reference not in self.names:
            raise ValueError(f"names: expected each row once and the reference {self.reference} among them, got {' '.join(self.names)}")


def run_ablation(config: AblationRun) -> int:
    """Train, measure, compare; returns the exit status. A stop signal ends it after the checkpoint; the same command goes on.

    Raises ConfigError, AssetError or DataError where a row's file or settings are wrong or it could not be measured, before anything is
    trained.
    """
    trainings = {name: row_settings(config, name) for name in config.names}
    check_measurable(config, evaluation_of(config, trainings[config.reference]))
    for name, training in trainings.items():
        print(f"row {name}: {changes_of(config, name)}", flush=True)
        status = train(training)
        if status or not (training.out / "export").exists():
            print(f"row {name} is not finished; call the same command again, it goes on from there")
            return status
        evaluate(evaluation_of(config, training))
    result = compare(config)
    write_atomic(config.out / "ablation.json", json.dumps(result, indent=1) + "\n")
    write_atomic(config.out / "index.html", ablation_page(config, result))
    print(text_table(result))
    return 0


def check_measurable(config: AblationRun, run: EvaluateRun) -> None:
    """Raise AssetError if the perception network cannot judge, DataError if the held-out identities allow none of the tasks."""
    if config.perception is not None:
        load_perception(config.perception, "evaluation")
    draw_cases(open_dataset(config.shards), run.split, run.seed, identities=1, samples=1, tasks=run.tasks)


def row_settings(config: AblationRun, name: str) -> ReconstructorRun:
    """The training run of a row: the base, what the row's file changes, then the settings that all share. Raises ConfigError."""
    file = config.rows / f"{name}.yaml"
    merged = overlaid({} if config.base is None else read_settings(config.base), read_settings(file))
    run = from_dict(ReconstructorRun, merged, str(file) if config.base is None else f"{config.base} with {file}")
    shared = {"shards": config.shards, "generator": config.generator, "total_images": config.total_images, "seed": config.seed}
    return dataclasses.replace(run, out=config.out / name, **shared)


def overlaid(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`base` with the values of `changes`, mapping by mapping."""
    both = {
        key: overlaid(base[key], value) for key, value in changes.items() if isinstance(value, dict) and isinstance(base.get(key), dict)
    }
    return base | changes | both


def changes_of(config: AblationRun, name: str) -> str:
    """What a row changes, as text."""

    def flat(values: dict[str, Any], prefix: str) -> list[str]:
        lines = []
        for key, value in values.items():
            lines += flat(value, f"{prefix}{key}.") if isinstance(value, dict) else [f"{prefix}{key} {json.dumps(value)}"]
        return lines

    return ", ".join(flat(read_settings(config.rows / f"{name}.yaml"), "")) or "the base as it is"


def evaluation_of(config: AblationRun, training: ReconstructorRun) -> EvaluateRun:
    """How a row is measured. A row that never learned to reconstruct with the cross-attention off is not asked to."""
    batches = training.batches
    switch = batches.switch and (batches.static_share > 0 or batches.swap_probability > 0)
    return EvaluateRun(
        out=training.out / "evaluation",
        reconstructor=training.out / "export",
        shards=config.shards,
        generator=config.generator,
        perception=config.perception,
        tasks=tuple(dict.fromkeys(column.task for column in COLUMNS)),
        switch=switch,
        identities=config.identities,
        samples=config.samples,
        resamples=config.resamples,
        seed=config.seed,
    )


def compare(config: AblationRun) -> dict[str, Any]:
    """Means and differences from the reference, row by row, from the evaluations of all rows; JSON."""
    results = {name: json.loads((config.out / name / "evaluation" / "evaluation.json").read_text("utf-8")) for name in config.names}
    samples = {name: read_samples(config.out / name / "evaluation" / "samples.csv") for name in config.names}
    rows = {
        name: {
            "changes": changes_of(config, name),
            "images": config.total_images,
            "reconstructor": results[name]["reconstructor"],
            "published_identity": PUBLISHED_IDENTITY.get(name),
            "scores": scores(config, samples[name], samples[config.reference]),
        }
        for name in config.names
    }
    one = results[config.reference]
    about = {"settings": to_dict(config), "reference": config.reference, "generator": one["generator"], "data": one["data"]}
    counts = {"samples": len(next(iter(samples.values()))), "identities": len({row["identity"] for row in samples[config.reference]})}
    return about | counts | {"rows": rows, "perception": one["perception"], "perception_errors": one.get("perception_errors")}


def read_samples(file: Path) -> list[dict[str, str]]:
    """The lines of an evaluation's samples.csv that are the reconstructor's."""
    with file.open(encoding="utf-8") as lines:
        return [line for line in csv.DictReader(lines) if line["row"] == "ours"]


def scores(config: AblationRun, mine: list[dict[str, str]], reference: list[dict[str, str]]) -> dict[str, Any]:
    """Column title -> {mean, low, high, difference: {mean, low, high}}; columns that were not measured are left out.

    Raises ConfigError if the two were not measured on the same samples.
    """
    key = ("task", "identity", "source", "driver", "bin")
    if [[line[name] for name in key] for line in mine] != [[line[name] for name in key] for line in reference]:
        raise ConfigError(f"{config.out}: the rows were not measured on the same samples; delete their folders 'evaluation' and call again")
    found = {}
    for column in COLUMNS:
        pairs = [(one, other) for one, other in zip(mine, reference, strict=True) if one["task"] == column.task]
        if not pairs or column.metric not in pairs[0][0]:
            continue
        identities = torch.tensor([int(one["identity"]) for one, _ in pairs])
        values, others = (torch.tensor([float(line[column.metric] or math.nan) for line in side]) for side in zip(*pairs, strict=True))
        found[column.title] = _interval(config, values, identities) | {"difference": _interval(config, values - others, identities)}
    return found


def _interval(config: AblationRun, values: torch.Tensor, identities: torch.Tensor) -> dict[str, float]:
    draws = torch_generator(config.seed, "ablation")  # the same resamples everywhere
    return dict(zip(("mean", "low", "high"), bootstrap_interval(values, identities, draws, config.resamples), strict=True))


def order(result: dict[str, Any], column: Column) -> str:
    """The rows from the best to the worst by one column, as text; and the paper's order of those rows that it is known of."""
    means = {name: row["scores"][column.title]["mean"] for name, row in result["rows"].items()}
    text = " > ".join(sorted(means, key=lambda name: -means[name] if column.higher_is_better else means[name]))
    if column.metric != "identity_cosine":
        return text
    known = {name: row["published_identity"] for name, row in result["rows"].items() if row["published_identity"] is not None}
    return f"{text} (paper: {' > '.join(sorted(known, key=lambda name: -known[name]))})" if known else text


def measured(result: dict[str, Any]) -> list[Column]:
    """The columns that there are numbers for."""
    return [column for column in COLUMNS if column.title in result["rows"][result["reference"]]["scores"]]


def _lines(result: dict[str, Any], column: Column) -> list[tuple[str, str, str]]:
    """(row, mean, difference from the reference)."""
    lines = []
    for name, row in result["rows"].items():
        score = row["scores"][column.title]
        own = name == result["reference"]
        lines.append((name, cell(score, column.metric), "-" if own else cell(score["difference"], column.metric)))
    return lines


def text_table(result: dict[str, Any]) -> str:
    """The comparison as text."""
    reference = result["reference"]
    lines = [f"{name}: {row['changes']}" for name, row in result["rows"].items()]
    lines.append(f"mean [95 % interval over identities], and the difference from {reference} on the same samples")
    for column in measured(result):
        lines.append(f"{column.title}: {order(result, column)}")
        lines += [f"  {name:4}{mean:>28}{difference:>30}" for name, mean, difference in _lines(result, column)]
    if result["perception"] is None:
        lines.append("identity, expression and jaw were not measured: they need a perception network (--perception DIR, role evaluation)")
    return "\n".join(lines)


def ablation_page(config: AblationRun, result: dict[str, Any]) -> str:
    """The comparison as a page, with the pictures of every row's evaluation, which lie beside it."""
    columns, reference = measured(result), result["reference"]
    lines = []
    for column in columns:
        of_rows = _lines(result, column)
        lines += [(column.title, *(mean for _, mean, _ in of_rows)), (f"minus {reference}", *(difference for _, _, difference in of_rows))]
    published = [row["published_identity"] for row in result["rows"].values()]
    lines.append(("paper's identity", *("-" if value is None else f"{value:.3f}" for value in published)))
    note = (
        f"Every row was shown {config.total_images} images. Mean and 95 % interval over identities, and the difference from {reference} on "
        "the same samples. Identity is the cosine of our own perception network's embeddings; the paper's is ArcFace's, on photographs."
    )
    orders = "".join(f"<p>{column.title}, best first: {order(result, column)}</p>" for column in columns)
    changes = [(name, row["changes"]) for name, row in result["rows"].items()]
    body = [section("Rows", note, table(("row", "changes"), changes) + table(("", *result["rows"]), lines) + orders)]
    task = "cross_reenactment"
    for name in result["rows"]:
        sheet = f"{name}/evaluation/sheet_{task}.png"
        if (config.out / sheet).exists():
            link = f'<p><a href="{name}/evaluation/index.html">More of this row</a></p>'
            body.append(section(f"Row {name}: cross-reenactment", changes_of(config, name), figure(sheet, 660, SHEET_COLUMNS[task]) + link))
    if errors := result["perception_errors"]:
        body.append(section("The perception network", "Differences below its own error mean little.", own_error_html(errors)))
    return page("Ablation", "What each part of the reconstructor's training is worth. All pictures are synthetic.", "\n".join(body))
