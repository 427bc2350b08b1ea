"""Measure a reconstructor on held-out identities against exact truth.

    novel view           source and target: one frame of the data set, two views; switch 0
    self-reenactment     source and target: two motions of one identity, any views; switch 1
    cross-reenactment    the source's identity in the motion, and from the camera, of another identity's frame; switch 1.
                         The truth is rendered by the generator, which no real recording can give

Each task has three rows: the reconstructor, the source picture copied, and the mean of training pictures; with a perception network,
which adds what it sees in the pictures, a fourth: the truth, as that network sees it. Numbers are means over identities with a
bootstrap interval over identities (95 %).
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from datagen.index import FrameEntry
from datagen.plan import Plan, open_plan
from datagen.reading import ShardDataset, open_dataset
from datagen.recipes import draw_identity
from datagen.render import IdentityRenderer
from datagen.worker import load_planned_generator
from head3d.image_metrics import bootstrap_interval, masked_mean, psnr, ssim
from head3d.labels import unpack_label
from head3d.pictures import grid, save_png, to_uint8
from head3d.run.checkpoint import exported_hash
from head3d.run.config import NonNegativeInt, PositiveInt, save_yaml, to_dict
from head3d.run.errors import DataError
from head3d.run.files import read_results, write_atomic, write_csv
from head3d.run.runlog import progress
from head3d.run.seeding import numpy_generator, torch_generator
from reconstructor.architecture import Driver
from reconstructor.batches import as_picture
from reconstructor.model import Reconstructor, load_reconstructor
from reconstructor.motion_vectors import MotionVectors, exported_motion_vectors
from reconstructor.perception import load_errors, load_perception
from reconstructor.perception_errors import PICTURE_UNITS, errors_table, picture_measures

TASKS = ("novel_view", "self_reenactment", "cross_reenactment")
ROWS = ("ours", "copy_source", "mean_image")
NOT_RECORDED = ("out", "reconstructor", "shards", "generator", "motion_encoder", "perception", "batch")  # other entries stand for them
TRUTH = "truth"  # a row that only what a network reads has
METRICS = {
    "psnr": "dB, whole picture, higher is better",
    "psnr_head": "dB, where the head truly is, higher is better",
    "ssim": "whole picture, higher is better",
    "depth": "mean distance error on the head, scene units (a third of a metre), lower is better",
}


@dataclasses.dataclass(frozen=True)
class EvaluateRun:
    """Measure a reconstructor on held-out identities: table, JSON, CSV and picture sheets."""

    out: Path = Path("runs/evaluation")  # where results go
    reconstructor: Path = Path("runs/reconstructor/export")  # exported reconstructor
    shards: str = "runs/datagen"  # data set (folder or URL) that it was trained on; its held-out split is used
    generator: Path | None = None  # exported generator that renders the truth; None = the one that the shards record
    motion_encoder: Path | None = None  # exported perception network whose motion vectors it reads; None = the one it records
    perception: Path | None = None  # exported perception network of role evaluation; None = only what needs no network is measured
    split: Literal["val", "test"] = "test"  # identities used
    identities: PositiveInt = 200  # at most this many source identities a task
    samples: PositiveInt = 4  # samples a source identity and task
    mean_images: PositiveInt = 500  # training pictures averaged for the mean image
    sheet_rows: PositiveInt = 6  # samples on each picture sheet
    resamples: PositiveInt = 2000  # of the bootstrap
    batch: PositiveInt = 8  # samples computed together
    seed: NonNegativeInt = 0  # of the choice of samples and of the bootstrap


class Case(NamedTuple):
    """One sample of one task: which frames and views."""

    task: str
    source: FrameEntry
    source_view: int
    driver: FrameEntry
    driver_view: int  # its camera is the target's camera


class Sample(NamedTuple):
    """What a case looks like. Pictures [3, S, S] in [-1, 1]; maps [1, R, R]."""

    source_image: Tensor
    source_label: Tensor  # [437]
    driver_image: Tensor
    target_label: Tensor  # [437] driver's camera and motion, source's shape
    truth: Tensor
    depth: Tensor | None  # ray distance, scene units; None if the data set has no depth
    opacity: Tensor  # in [0, 1]


class Truths:
    """Reads or renders samples; keeps the generator's planes of the identity rendered last."""

    def __init__(self, dataset: ShardDataset, plan: Plan, generator: Path, device: str) -> None:
        self._dataset, self._plan = dataset, plan
        self._genhead = load_planned_generator(plan, generator, device)
        self._renderer: IdentityRenderer | None = None

    def sample(self, case: Case) -> Sample:
        """Pictures, labels and truth of a case, on the CPU."""
        seen, shown = f"rgb.{case.source_view}", f"rgb.{case.driver_view}"
        source = self._dataset.read(case.source, [seen, "label"])
        has_depth = case.task == "cross_reenactment" or "depth" in case.driver.members
        wanted = [shown, "label", "opacity", *(["depth"] if has_depth else [])]
        driver = self._dataset.read(case.driver, wanted if case.task != "cross_reenactment" else [shown, "label"])
        source_label = torch.from_numpy(np.array(source["label"][case.source_view]))
        target = torch.from_numpy(np.array(driver["label"][case.driver_view]))
        target[25:325] = source_label[25:325]
        picture, view = torch.from_numpy(as_picture(driver[shown])), case.driver_view
        if case.task == "cross_reenactment":
            truth, depth, opacity = self._render(case.source.identity, target)
        else:
            truth, opacity = picture, torch.from_numpy(driver["opacity"][view][None])
            depth = torch.from_numpy(driver["depth"][view][None]) if has_depth else None
        return Sample(torch.from_numpy(as_picture(source[seen])), source_label, picture, target, truth, depth, opacity)

    def _render(self, identity: int, label: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if self._renderer is None or self._renderer.recipe.identity != identity:
            recipe = draw_identity(self._plan.recipe, self._plan.seed, identity)
            self._renderer = IdentityRenderer(self._genhead, recipe, self._plan.render.precision)
        target = unpack_label(label[None])
        images = self._renderer.render(self._renderer.pose(target.motion), target.camera.label()).images
        return images.image[0].cpu(), images.depth[0].cpu(), images.opacity[0].cpu()


def evaluate(config: EvaluateRun) -> int:
    """Measure, write OUT/{evaluation.json, samples.csv, sheet_*.png, config.yaml} and print the table. Returns the exit status, 0.

    What is already measured, with equal settings and files, is only printed. Raises DataError if the split holds no identity; a task
    that the held-out identities do not allow is left out and named.
    """
    plan = open_plan(config.shards)
    record = {
        "reconstructor": exported_hash(config.reconstructor),
        "generator": plan.generator.hash,
        "data": {"hash": plan.hash, "identities": plan.identities},
        "perception": None if config.perception is None else exported_hash(config.perception),
        "settings": {key: value for key, value in to_dict(config).items() if key not in NOT_RECORDED},
    }
    finished = config.out / "evaluation.json"
    if there := read_results(finished, record):
        print(f"{finished}: measured before, with the same settings\n{table(there['tasks'])}")
        print_own_error(there)
        return 0
    records, sheets = measure_all(config, plan)
    tasks = summarise(records, config)
    rows = [
        {"task": task, "row": row, "metric": metric, **interval}
        for task, content in tasks.items()
        for row, metrics in content["rows"].items()
        for metric, interval in metrics.items()
    ]
    result = record | {"metrics": METRICS, "tasks": tasks, "rows": rows}
    if config.perception is not None:
        result |= {"metrics": METRICS | PICTURE_UNITS, "perception_errors": load_errors(config.perception)}
    write_results(config, result, records, sheets)
    print(table(tasks))
    print_own_error(result)
    return 0


def print_own_error(result: dict) -> None:
    """How wrong the network is that read the pictures, if one did."""
    if "perception_errors" in result:
        print(f"the perception network's {errors_table(result['perception_errors'])}")


def measure_all(config: EvaluateRun, plan: Plan) -> tuple[list[dict], dict[str, list[np.ndarray]]]:
    """Every sample's numbers (one record a row of the table), and the pictures of the first samples of each task."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dataset = open_dataset(config.shards)
    model = load_reconstructor(config.reconstructor, device)
    vectors = exported_motion_vectors(config.reconstructor, config.motion_encoder, "motion_encoder", device)
    truths = Truths(dataset, plan, config.generator or Path(plan.generator.folder), device)
    mean_image = mean_training_image(dataset, config.mean_images, config.seed)
    network = None if config.perception is None else load_perception(config.perception, "evaluation", device)
    cases = draw_cases(dataset, config)
    records: list[dict] = []
    sheets: dict[str, list[np.ndarray]] = {}
    with progress(len(cases), "evaluate", unit="sample") as bar:
        for part in _runs(cases, config.batch):
            samples, task = [truths.sample(case) for case in part], part[0].task
            predictions = predict(model, vectors, samples, task, mean_image)
            truth, source = (torch.stack([getattr(sample, name) for sample in samples]) for name in ("truth", "source_image"))
            label = torch.stack([sample.target_label for sample in samples])
            for row, (images, depth) in (predictions | ({} if network is None else {TRUTH: (truth, None)})).items():
                measured = {} if row == TRUTH else measure(images, depth, samples)
                if network is not None:
                    measured |= picture_measures(network, model.head_model, images, truth, source, label)
                for index, case in enumerate(part):
                    facts = {
                        "task": task,
                        "row": row,
                        "identity": case.source.identity,
                        "source": case.source.key,
                        "driver": case.driver.key,
                    }
                    records.append(facts | {name: values[index].item() for name, values in measured.items()})
            sheet = sheets.setdefault(task, [])
            for index, sample in enumerate(samples):
                if len(sheet) < 5 * config.sheet_rows:
                    columns = (sample.source_image, sample.driver_image, predictions["ours"][0][index], sample.truth, sample.source_image)
                    sheet += [to_uint8(column) for column in columns]
            bar.update(len(part))
    return records, sheets


def draw_cases(dataset: ShardDataset, config: EvaluateRun) -> list[Case]:
    """The samples of all tasks, by task and source identity; a pure function of (frames, seed, counts)."""
    by_identity: dict[int, list[FrameEntry]] = {}
    for frame in dataset.frames:
        if frame.split == config.split and frame.kind != "motion-rich":  # those pictures are small
            by_identity.setdefault(frame.identity, []).append(frame)
    if not by_identity:
        raise DataError(
            f"{config.shards}: no identity is in the split '{config.split}'; "
            f"generate more identities or a larger share (--recipe.{config.split}_share)"
        )
    everyone = sorted(by_identity)
    # Drivers of other identities: the dynamic frames, whose motions are as the training's
    drivers = [frame for identity in everyone for frame in by_identity[identity] if frame.kind != "static"] or [
        frame for identity in everyone for frame in by_identity[identity]
    ]
    cases = []
    for task in TASKS:
        able = [identity for identity in everyone if _can(task, by_identity[identity], drivers)]
        chosen = numpy_generator(config.seed, "evaluate", task).permutation(able)[: config.identities]
        for identity in sorted(int(value) for value in chosen):
            for number in range(config.samples):
                rng = numpy_generator(config.seed, "evaluate", task, identity, number)
                cases.append(_draw_case(task, by_identity[identity], drivers, rng))
    if not cases:
        raise DataError(
            f"{config.shards}: the split '{config.split}' holds one frame with one view, which forms no task; "
            f"generate more identities, motions or views"
        )
    return cases


def _can(task: str, frames: list[FrameEntry], drivers: list[FrameEntry]) -> bool:
    match task:
        case "novel_view":
            return any(frame.views > 1 for frame in frames)
        case "self_reenactment":
            return len(frames) > 1
        case "cross_reenactment":
            return any(frame.identity != frames[0].identity for frame in drivers)
        case _:
            raise ValueError(f"no such task: {task}")


def _draw_case(task: str, frames: list[FrameEntry], drivers: list[FrameEntry], rng: np.random.Generator) -> Case:
    if task == "novel_view":
        frames = [frame for frame in frames if frame.views > 1]
    source = frames[int(rng.integers(len(frames)))]
    view = int(rng.integers(source.views))
    if task == "novel_view":
        return Case(task, source, view, source, (view + 1 + int(rng.integers(source.views - 1))) % source.views)
    if task == "self_reenactment":
        others = [frame for frame in frames if frame.motion != source.motion]
    else:
        others = [frame for frame in drivers if frame.identity != source.identity]
    driver = others[int(rng.integers(len(others)))]
    return Case(task, source, view, driver, int(rng.integers(driver.views)))


def _runs(cases: list[Case], size: int) -> Iterator[list[Case]]:
    """Batches of at most `size` that never mix tasks."""
    for task in TASKS:
        chosen = [case for case in cases if case.task == task]
        for start in range(0, len(chosen), size):
            yield chosen[start : start + size]


@torch.no_grad()
def predict(
    model: Reconstructor, vectors: MotionVectors, samples: list[Sample], task: str, mean_image: Tensor
) -> dict[str, tuple[Tensor, Tensor | None]]:
    """Row -> (pictures [B, 3, S, S], depth [B, 1, R, R] or None), on the CPU.

    A network that reads motion off pictures is shown the driver's; in self-reenactment that is the truth itself, as in the paper.
    """
    device = next(model.parameters()).device
    source_image, driver_image = (torch.stack([getattr(sample, name) for sample in samples]) for name in ("source_image", "driver_image"))
    source = unpack_label(torch.stack([sample.source_label for sample in samples]).to(device))
    target = unpack_label(torch.stack([sample.target_label for sample in samples]).to(device))
    scale = torch.full((len(samples),), 0.0 if task == "novel_view" else 1.0, device=device)
    source_vector = vectors.seen(source_image.to(device), source.motion)
    driver = Driver(vectors.seen(driver_image.to(device), target.motion), driver_image.to(device))
    images = model(source_image.to(device), source_vector, driver, scale, source.shape, target.motion, target.camera).images
    return {
        "ours": (images.image.cpu(), images.depth.cpu()),
        "copy_source": (source_image, None),
        "mean_image": (mean_image.expand_as(source_image), None),
    }


def measure(images: Tensor, depth: Tensor | None, samples: list[Sample]) -> dict[str, Tensor]:
    """Metric -> [B]; NaN where it does not apply."""
    truth = torch.stack([sample.truth for sample in samples])
    opacity = torch.stack([sample.opacity for sample in samples])
    head = F.interpolate(opacity, size=truth.shape[-2:], mode="bilinear", align_corners=False)
    result = {"psnr": psnr(images, truth), "psnr_head": psnr(images, truth, head), "ssim": ssim(images, truth)}
    result["depth"] = torch.full((len(samples),), math.nan)
    if depth is not None and samples[0].depth is not None:
        result["depth"] = masked_mean((depth - torch.stack([sample.depth for sample in samples])).abs(), opacity)
    return result


def mean_training_image(dataset: ShardDataset, count: int, seed: int) -> Tensor:
    """Mean [3, S, S] of `count` training pictures (all, if there are fewer)."""
    frames = [frame for frame in dataset.frames if frame.split == "train" and frame.kind != "motion-rich"]
    pictures = [(frame, view) for frame in frames for view in range(frame.views)]
    if not pictures:
        raise DataError(f"{dataset.storage.address}: no training frame to average; the data set holds held-out identities only")
    chosen = numpy_generator(seed, "mean image").permutation(len(pictures))[:count]
    total = 0.0
    for index in chosen:
        frame, view = pictures[index]
        total = total + as_picture(dataset.read(frame, [f"rgb.{view}"])[f"rgb.{view}"]).astype(np.float64)
    return torch.from_numpy(total / len(chosen)).float()


def summarise(records: list[dict], config: EvaluateRun) -> dict:
    """task -> {samples, identities, rows: {row: {metric: {mean, low, high}}}}; metrics that do not apply are left out."""
    tasks: dict[str, dict] = {}
    for task in TASKS:
        mine = [record for record in records if record["task"] == task]
        if not mine:
            continue
        rows = {}
        for row in dict.fromkeys(record["row"] for record in mine):
            of_row = [record for record in mine if record["row"] == row]
            identities = torch.tensor([record["identity"] for record in of_row])
            rows[row] = {}
            for metric in (name for name in (*METRICS, *PICTURE_UNITS) if name in of_row[0]):
                draws = torch_generator(config.seed, "bootstrap", task)  # the same resamples for every row
                mean, low, high = bootstrap_interval(
                    torch.tensor([record[metric] for record in of_row]), identities, draws, config.resamples
                )
                if not math.isnan(mean):
                    rows[row][metric] = {"mean": mean, "low": low, "high": high}
        tasks[task] = {"samples": len(mine) // len(rows), "identities": len({record["identity"] for record in mine}), "rows": rows}
    return tasks


def table(tasks: dict) -> str:
    """The summary as text."""
    lines = []
    for task, content in tasks.items():
        size = f"{content['samples']} samples of {content['identities']} identities"
        lines.append(f"{task.replace('_', ' ')}: {size}; mean [95 % interval over identities]")
        shown = [name for name in (*METRICS, *PICTURE_UNITS) if any(name in metrics for metrics in content["rows"].values())]
        for start in range(0, len(shown), 4):
            lines += _block(content["rows"], shown[start : start + 4])
    missing = [task for task in TASKS if task not in tasks]
    if missing:
        lines.append(f"left out, because the held-out identities do not allow it: {', '.join(missing)}")
    return "\n".join(lines)


def _block(rows: dict, metrics: list[str]) -> list[str]:
    """Some columns of a task's table."""
    lines = [f"  {'':12}" + "".join(f"{metric:>26}" for metric in metrics)]
    for row, values in rows.items():
        cells = []
        for metric in metrics:
            digits, value = 2 if metric.startswith("psnr") or metric.endswith(("deg", "mm")) else 4, values.get(metric)
            cells.append("-" if value is None else f"{value['mean']:.{digits}f} [{value['low']:.{digits}f}, {value['high']:.{digits}f}]")
        if any(cell != "-" for cell in cells):
            lines.append(f"  {row.replace('_', ' '):12}" + "".join(f"{cell:>26}" for cell in cells))
    return lines


def write_results(config: EvaluateRun, result: dict, records: list[dict], sheets: dict[str, list[np.ndarray]]) -> None:
    """JSON, CSV and one sheet a task with the columns source, driver, ours, truth, source copied."""
    config.out.mkdir(parents=True, exist_ok=True)
    save_yaml(config, config.out / "config.yaml")
    for task, pictures in sheets.items():
        about = {"command": "evaluate", "task": task, "columns": "source, driver, ours, truth, source copied"}
        save_png(config.out / f"sheet_{task}.png", grid(np.stack(pictures), columns=5), about)
    write_csv(config.out / "samples.csv", records)
    write_atomic(config.out / "evaluation.json", json.dumps(result, indent=1) + "\n")
