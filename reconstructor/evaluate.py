"""Measure a reconstructor on held-out identities against exact truth; the tasks are those of `evaluation_cases`.

Each task has rows: the reconstructor, the source picture copied, the mean of training pictures; where view or motion change, the
generator's mean head in the target's motion; where the truth is a picture of the data set, the generator's rendering of the same recipe,
which nothing can beat; and with a perception network, which adds what it sees in the pictures, the truth as that network sees it.
Numbers are means over identities with a bootstrap interval over identities (95 %).
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from datagen.plan import Plan, open_plan
from datagen.reading import open_dataset
from head3d.labels import unpack_label
from head3d.pictures import colorize, grid, save_png, to_uint8
from head3d.run.checkpoint import exported_hash
from head3d.run.config import NonNegativeInt, PositiveInt, save_yaml, to_dict
from head3d.run.files import read_results, sha256_of_file, write_atomic, write_csv
from head3d.run.runlog import progress
from reconstructor.architecture import Driver
from reconstructor.evaluation_cases import STATIC_TASKS, TASKS, Case, Pictured, Sample, Task, Truths, batches_of, bin_of, draw_cases
from reconstructor.evaluation_measures import mean_training_image, measure, steadiness
from reconstructor.evaluation_page import SHEET_COLUMNS, evaluation_page
from reconstructor.evaluation_tables import ALL_METRICS, flat_rows, summarise, text_table
from reconstructor.model import Reconstructor, load_reconstructor
from reconstructor.motion_vectors import MotionVectors, exported_motion_vectors
from reconstructor.perception import Perception, load_errors, load_perception
from reconstructor.perception_errors import Judge, errors_table
from reconstructor.published_perception import PublishedNetworks, load_published_networks

COPY = "copy_source"
ROWS = ("ours", COPY, "mean_image")
MEAN_HEAD = "mean_head"  # a row of MEAN_HEAD_TASKS
RERENDERED = "rerendered"  # a row of tasks whose truth is a picture of the data set
TRUTH = "truth"  # a row that only what a network reads has
NOT_RECORDED = (
    "out",
    "reconstructor",
    "shards",
    "generator",
    "motion_encoder",
    "perception",
    "lpips",
    "arcface",
    "batch",
)  # other entries stand for them
_ERROR_SHOWN = 0.5  # end of the colour scale of differences, which go from 0 to 1


@dataclasses.dataclass(frozen=True)
class EvaluateRun:
    """Measure a reconstructor on held-out identities: tables, JSON, CSV, a page and picture sheets."""

    out: Path = Path("runs/evaluation")  # where results go
    reconstructor: Path = Path("runs/reconstructor/export")  # exported reconstructor
    shards: str = "runs/datagen"  # data set (folder or URL) that it was trained on; its held-out split is used
    generator: Path | None = None  # exported generator that renders the truth; None = the one that the shards record
    motion_encoder: Path | None = None  # exported perception network whose motion vectors it reads; None = the one it records
    perception: Path | None = None  # exported perception network of role evaluation; None = only what needs no network is measured
    lpips: tuple[Path, ...] = ()  # LPIPS on AlexNet, for who has it: the authors' alex.pth of version 0.1 and torchvision's AlexNet
    arcface: Path | None = None  # ArcFace, for who has it: a state dict of insightface's IR-ResNet
    tasks: tuple[Task, ...] = TASKS  # what is measured
    switch: bool = True  # static lift and novel view with the cross-attention off; false: the source's own motion drives there
    split: Literal["val", "test"] = "test"  # identities used
    identities: PositiveInt = 200  # at most this many source identities a task
    samples: PositiveInt = 4  # samples a source identity and task; steadiness has one sequence of each
    sequence_frames: PositiveInt = 8  # pictures of a sequence, at least 2
    mean_images: PositiveInt = 500  # training pictures averaged for the mean image
    sheet_rows: PositiveInt = 6  # samples on each picture sheet
    resamples: PositiveInt = 2000  # of the bootstrap
    batch: PositiveInt = 8  # samples computed together
    seed: NonNegativeInt = 0  # of the choice of samples and of the bootstrap

    def __post_init__(self) -> None:
        if self.sequence_frames < 2:
            raise ValueError(f"sequence_frames: expected at least 2, between which something changes, got {self.sequence_frames}")


class Measured(NamedTuple):
    """What was measured of every sample."""

    records: list[dict[str, Any]]  # one for each row of a sample
    sheets: dict[str, np.ndarray]  # task -> uint8 [H, W, 3]: its first samples


def evaluate(config: EvaluateRun) -> int:
    """Measure, write OUT/{evaluation.json, samples.csv, table.csv, index.html, sheet_*.png, config.yaml} and print the table.

    Returns the exit status, 0. What is already measured, with equal settings and files, is only printed. Raises DataError if the split
    holds no identity or allows no task; a task that the held-out identities do not allow is left out and named.
    """
    plan = open_plan(config.shards)
    record = {
        "reconstructor": exported_hash(config.reconstructor),
        "generator": plan.generator.hash,
        "data": {"hash": plan.hash, "identities": plan.identities},
        "perception": None if config.perception is None else exported_hash(config.perception),
        "published_networks": [sha256_of_file(path)[:16] for path in (*config.lpips, config.arcface) if path and path.is_file()],
        "settings": {key: value for key, value in to_dict(config).items() if key not in NOT_RECORDED},
    }
    finished = config.out / "evaluation.json"
    if there := read_results(finished, record):
        print(f"{finished}: measured before, with the same settings\n{text_table(there['tasks'], config.tasks)}")
        print_own_error(there)
        return 0
    measured = measure_all(config, plan)
    tasks = summarise(measured.records, config.seed, config.resamples)
    found = set().union(*measured.records)
    units = {name: unit for name, unit in ALL_METRICS.items() if name in found}
    result = record | {"metrics": units, "tasks": tasks, "rows": flat_rows(tasks)}
    if config.perception is not None:
        result |= {"perception_errors": load_errors(config.perception)}
    write_results(config, result, measured)
    print(text_table(tasks, config.tasks))
    print_own_error(result)
    return 0


def print_own_error(result: dict) -> None:
    """How wrong the network is that read the pictures, if one did."""
    if "perception_errors" in result:
        print(f"the perception network's {errors_table(result['perception_errors'])}")


def measure_all(config: EvaluateRun, plan: Plan) -> Measured:
    """Every sample's numbers, and the pictures of the first samples of each task."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dataset = open_dataset(config.shards)
    model = load_reconstructor(config.reconstructor, device)
    vectors = exported_motion_vectors(config.reconstructor, config.motion_encoder, "motion_encoder", device)
    truths = Truths(dataset, plan, config.generator or Path(plan.generator.folder), device)
    mean_image = mean_training_image(dataset, config.mean_images, config.seed)
    network = None if config.perception is None else load_perception(config.perception, "evaluation", device)
    published = load_published_networks(config.lpips, config.arcface, model.head_model)
    cases = draw_cases(dataset, config.split, config.seed, config.identities, config.samples, config.tasks)
    records: list[dict[str, Any]] = []
    pictures: dict[str, list[np.ndarray]] = {}
    with progress(len(cases), "evaluate", unit="sample") as bar:
        for part in batches_of(cases, config.batch):
            task = part[0].task
            moving = task == "steadiness"
            samples = truths.sequence(part[0], config.sequence_frames) if moving else [truths.sample(case) for case in part]
            made = predict(model, vectors, samples, task, mean_image, config.switch)
            found = steadiness_records(part[0], samples, made) if moving else picture_records(part, samples, made, published, network)
            records += ({"task": task} | one for one in found)
            if len(sheet := pictures.setdefault(task, [])) < config.sheet_rows:
                sheet += [sequence_rows(samples, made["ours"])] if moving else sample_rows(samples, made["ours"])
            bar.update(len(part))
    sheets = {}
    for task, shown in pictures.items():
        rows = np.concatenate(shown[: config.sheet_rows])
        sheets[task] = grid(rows.reshape(-1, *rows.shape[2:]), columns=rows.shape[1])
    names = [name for name in ALL_METRICS if any(name in record for record in records)]
    return Measured([{**record, **{name: record.get(name, math.nan) for name in names}} for record in records], sheets)


@torch.no_grad()
def predict(
    model: Reconstructor, vectors: MotionVectors, samples: list[Sample], task: str, mean_image: Tensor, switch: bool = True
) -> dict[str, Pictured]:
    """Row -> what it shows of B samples, on the CPU. switch: see EvaluateRun.

    A network that reads motion off pictures is shown the driver's; in self-reenactment that is the truth itself, as in the paper.
    """
    device = next(model.parameters()).device
    source_image, driver_image = (torch.stack([getattr(sample, name) for sample in samples]) for name in ("source_image", "driver_image"))
    source = unpack_label(torch.stack([sample.source_label for sample in samples]).to(device))
    target = unpack_label(torch.stack([sample.target_label for sample in samples]).to(device))
    scale = torch.full((len(samples),), 0.0 if switch and task in STATIC_TASKS else 1.0, device=device)
    source_vector = vectors.seen(source_image.to(device), source.motion)
    driver = Driver(vectors.seen(driver_image.to(device), target.motion), driver_image.to(device))
    images = model(source_image.to(device), source_vector, driver, scale, source.shape, target.motion, target.camera).images
    made = {
        "ours": Pictured(images.image.cpu(), images.depth.cpu(), images.opacity.cpu()),
        COPY: Pictured(source_image),
        "mean_image": Pictured(mean_image.expand_as(source_image)),
    }
    for row in (MEAN_HEAD, RERENDERED):
        if getattr(samples[0], row) is not None:
            made[row] = Pictured(*(torch.stack(part) for part in zip(*(getattr(sample, row) for sample in samples), strict=True)))
    return made


def picture_records(
    cases: list[Case], samples: list[Sample], made: dict[str, Pictured], published: PublishedNetworks, network: Perception | None
) -> Iterator[dict[str, Any]]:
    """The numbers of every sample that is one picture, in every row."""
    truth, source = (torch.stack([getattr(sample, name) for sample in samples]) for name in ("truth", "source_image"))
    label, source_label = (torch.stack([getattr(sample, name) for sample in samples]) for name in ("target_label", "source_label"))
    head = published.head
    judge = None if network is None else Judge(network, head, truth, source, label)
    judged = judge is not None or published.lpips is not None or published.arcface is not None
    for row, shown in (made | ({TRUTH: Pictured(truth)} if judged else {})).items():
        measured = {} if row == TRUTH else measure(shown, samples, head)
        if judge is not None:
            measured |= judge.measures(shown.image)
        measured |= published.measures(shown.image, source_label if row == COPY else label, truth, source, source_label)
        for index, (case, sample) in enumerate(zip(cases, samples, strict=True)):
            yield facts(case, row, bin_of(case, sample)) | {name: values[index].item() for name, values in measured.items()}


def steadiness_records(case: Case, samples: list[Sample], made: dict[str, Pictured]) -> Iterator[dict[str, Any]]:
    """The numbers of one sequence in every row."""
    truth = torch.stack([sample.truth for sample in samples])
    for row, shown in made.items():
        yield facts(case, row, None) | steadiness(shown.image, truth)


def facts(case: Case, row: str, part: str | None) -> dict[str, Any]:
    """What a record says beside numbers."""
    return {"bin": part, "row": row, "identity": case.source.identity, "source": case.source.key, "driver": case.driver.key}


def sample_rows(samples: list[Sample], ours: Pictured) -> list[np.ndarray]:
    """A row of pictures [1, 5, S, S, 3] for each sample: SHEET_COLUMNS."""
    rows = []
    for sample, image in zip(samples, ours.image, strict=True):
        pictures = to_uint8(torch.stack([sample.source_image, sample.driver_image, image, sample.truth]))
        difference = (image.clamp(-1, 1) - sample.truth.clamp(-1, 1)).abs().mean(0) / 2
        rows.append(np.concatenate([pictures, colorize(difference, 0.0, _ERROR_SHOWN)[None]])[None])
    return rows


def sequence_rows(samples: list[Sample], ours: Pictured) -> np.ndarray:
    """Two rows of pictures [2, 1 + T, S, S, 3] of a sequence: the source, then ours; the driver, then the truth."""
    first, truth = samples[0], torch.stack([sample.truth for sample in samples])
    return to_uint8(torch.stack([torch.cat([first.source_image[None], ours.image]), torch.cat([first.driver_image[None], truth])]))


def write_results(config: EvaluateRun, result: dict, measured: Measured) -> None:
    """JSON, both tables as CSV, the page and one sheet a task."""
    config.out.mkdir(parents=True, exist_ok=True)
    save_yaml(config, config.out / "config.yaml")
    for task, sheet in measured.sheets.items():
        save_png(config.out / f"sheet_{task}.png", sheet, {"command": "evaluate", "task": task, "columns": SHEET_COLUMNS[task]})
    write_csv(config.out / "samples.csv", measured.records)
    write_csv(config.out / "table.csv", result["rows"])
    write_atomic(config.out / "index.html", evaluation_page(result, measured.sheets))
    write_atomic(config.out / "evaluation.json", json.dumps(result, indent=1) + "\n")
