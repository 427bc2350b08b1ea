"""Measure a generator: how near its pictures are to the portraits, and how well its heads obey the mesh that deforms them.

    Frechet distance     pictures of generated people with the portraits' cameras, shapes and motions, against portraits
    depth, silhouette    of each generated person's pictures against the posed mesh, which is known exactly
    motion               one camera, two motions: does the same point of the face keep its colour
    views                one motion, two cameras: do pixels that show the same point by their depth have the same colour

Beside each number of the generator stand a floor, what no skill at all would give, and, where there is one, a ceiling: the portraits
themselves. Means over people with a bootstrap interval over people (95 %).
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import pydantic
import torch
import torch.nn.functional as F
from torch import Tensor

from genhead.features import FRECHET_METRICS, Features, chosen_features, frechet_distance, reference_statistics, statistics
from genhead.generator import GenHead, GenHeadExport, load_genhead
from genhead.mesh_truth import (
    HeadView,
    MeshView,
    depth_error,
    face_points,
    flat_face,
    head_depth,
    mesh_view,
    motion_difference,
    silhouette_scores,
    view_difference,
    visible,
    warped_view,
)
from genhead.portraits import PortraitSet
from head3d.cameras import Camera
from head3d.deformation import PosedHead
from head3d.image_metrics import bootstrap_interval
from head3d.labels import HeadLabel, unpack_label
from head3d.pictures import colorize, grid, save_png, to_uint8
from head3d.rendering import HeadImages
from head3d.run.checkpoint import exported_hash
from head3d.run.config import NonNegativeInt, PositiveInt, config_hash, load_yaml, save_yaml, to_dict
from head3d.run.errors import ConfigError, DataError
from head3d.run.files import read_results, write_atomic, write_csv
from head3d.run.runlog import progress
from head3d.run.seeding import numpy_generator, torch_generator

AtLeastTwo = Annotated[int, pydantic.Field(ge=2)]  # a covariance needs them
GEOMETRY_METRICS = {
    "depth": "median error over the visible face, scene units (a third of a metre), lower is better; floor: the best flat face",
    "depth_percent": "the same in % of the head's depth from front to back; floor: as above",
    "silhouette_iou": "opacity > 0.5 against the mesh, higher is better; ceiling: the portraits' mattes, whose hair the mesh lacks too, "
    "floor: a picture that is opaque everywhere",
    "silhouette_recall": "share of the mesh's silhouette that is opaque, higher is better; ceiling and floor: as above",
    "motion": "colour change of a face point between two motions, 0 to 1, lower is better; floor: two random points",
    "view": "colour difference of pixels that show the same point in two views, 0 to 1, lower is better; floor: the same pixel of both",
    "view_share": "share of the head's pixels whose depth finds them again in the other view, higher is better",
}
METRICS = FRECHET_METRICS | GEOMETRY_METRICS  # of the first, those of the features that are used
PICTURES = ("first", "turned", "moved")  # of every person: a camera and motion, another camera, another motion
SHEET_COLUMNS = "first, mesh's face over it, depth minus mesh's (violet near, yellow far), opacity, turned, turned warped to first, moved"
DEPTH_SHOWN = 0.2  # scene units: end of the colour scale of depth differences


@dataclasses.dataclass(frozen=True)
class GeneratorMeasures:
    """How much of a generator is measured."""

    pictures: AtLeastTwo = 10_000  # generated for the Frechet distance, and portraits on the other side; at most half of the portraits
    identities: PositiveInt = 200  # generated people whose geometry is measured, three pictures each
    points: PositiveInt = 1_000  # points of a face that are followed from one motion to another
    sheet_rows: PositiveInt = 6  # people on the picture sheet
    resamples: PositiveInt = 2_000  # of the bootstrap
    batch: PositiveInt = 8  # people rendered together
    inception: Path | None = None  # weights of Inception-v3 for the Frechet distance (README); None = a fixed random network's features


class Evaluation(NamedTuple):
    """What was measured."""

    scores: dict[str, dict[str, dict[str, float | None]]]  # metric -> ours, floor, ceiling -> mean, low, high (None: no interval)
    records: list[dict[str, Any]]  # one a picture of a generated person
    sheet: np.ndarray  # uint8 [H, W, 3], columns as SHEET_COLUMNS

    def scalars(self) -> dict[str, float]:
        """The generator's own numbers, named for a training log."""
        means = {metric: rows["ours"]["mean"] for metric, rows in self.scores.items()}
        return {f"evaluation/{metric}": math.nan if mean is None else mean for metric, mean in means.items()}


@torch.no_grad()
def evaluate_generator(
    genhead: GenHead,
    portraits: PortraitSet,
    features: Features,  # of the Frechet distance
    measures: GeneratorMeasures,
    seed: int,
    cache: Path | None = None,  # folder that keeps the portraits' statistics; None computes them every time
    show_progress: bool = True,
) -> Evaluation:
    """Measure. The same seed draws the same people, so checkpoints compare. Raises DataError if there are fewer than 4 portraits."""
    if len(portraits) < 4:
        raise DataError(f"{portraits.path}: expected at least 4 portraits to measure against, got {len(portraits)}; make more")
    labels = torch.from_numpy(portraits.labels())
    count = min(measures.pictures, len(portraits) // 2)  # equal on both sides and for the ceiling: the distance depends on it
    with progress(count + len(PICTURES) * measures.identities, "evaluate", unit="img", enabled=show_progress) as bar:
        ours = statistics(_batches_of_features(genhead, labels, count, measures.batch, seed, features, bar.update))
        references = reference_statistics(portraits, count, seed, features, measures.batch, cache)
        records, sheet = _people(genhead, labels, measures, seed, bar.update)
    scores = {
        features.metric: {
            "ours": _plain(frechet_distance(ours, references.first)),
            "floor": _plain(frechet_distance(references.mean_picture, references.first)),
            "ceiling": _plain(frechet_distance(references.second, references.first)),
        }
    }
    who = torch.tensor([record["identity"] for record in records])
    for metric in GEOMETRY_METRICS:
        scores[metric] = {}
        for row, key in (("ours", metric), ("floor", f"{metric}_floor")):
            if key in records[0]:
                scores[metric][row] = _interval(torch.tensor([record[key] for record in records]), who, measures, seed)
    for metric, values in _silhouettes_of_portraits(genhead, portraits, measures, seed).items():
        if len(values):
            scores[metric]["ceiling"] = _interval(values, torch.arange(len(values)), measures, seed)
    return Evaluation(scores, records, sheet)


def _interval(values: Tensor, groups: Tensor, measures: GeneratorMeasures, seed: int) -> dict[str, float | None]:
    found = bootstrap_interval(values, groups, torch_generator(seed, "bootstrap"), measures.resamples)
    return {name: None if math.isnan(value) else value for name, value in zip(("mean", "low", "high"), found, strict=True)}


def _plain(value: float) -> dict[str, float | None]:
    return {"mean": value, "low": None, "high": None}


# ---- Frechet distance --------------------------------------------------------------------------------------------------


def _batches_of_features(
    genhead: GenHead, labels: Tensor, count: int, batch: int, seed: int, features: Features, done: Any
) -> Iterator[Tensor]:
    """Features [B, F] of generated people, each with camera, shape and motion of a random portrait."""
    device = next(genhead.parameters()).device
    for start in range(0, count, batch):
        size = min(batch, count - start)
        draws = [numpy_generator(seed, "evaluate picture", index) for index in range(start, start + size)]
        label = _without_neck(labels[[int(rng.integers(len(labels))) for rng in draws]].to(device))
        z = _latents(genhead, draws)
        yield features.extract(genhead(z, label.shape, label.motion, label.camera).images.image)
        done(size)


# ---- geometry ----------------------------------------------------------------------------------------------------------


def _people(genhead: GenHead, labels: Tensor, measures: GeneratorMeasures, seed: int, done: Any) -> tuple[list[dict[str, Any]], np.ndarray]:
    """One record a picture of each generated person, and the sheet of the first of them."""
    device = next(genhead.parameters()).device
    records: list[dict[str, Any]] = []
    sheet: list[np.ndarray] = []
    for start in range(0, measures.identities, measures.batch):
        identities = range(start, min(start + measures.batch, measures.identities))
        draws = [numpy_generator(seed, "evaluate identity", identity) for identity in identities]
        chosen = np.stack([rng.choice(len(labels), 3, replace=False) for rng in draws])
        first, turned, moved = (_without_neck(labels[index].to(device)) for index in chosen.T)
        z = _latents(genhead, draws)
        ws = genhead.map(z, first.camera.label(), first.shape)
        planes, background = genhead.planes(ws), genhead.background(z)
        rest, other = genhead.pose(first.shape, first.motion), genhead.pose(first.shape, moved.motion)
        circumstances = ((rest, first.camera), (rest, turned.camera), (other, first.camera))
        images = [genhead.render(planes, background, posed, camera).images for posed, camera in circumstances]
        meshes = [
            mesh_view(genhead.head_model, posed.vertices_posed, camera, image.depth.shape[-1])
            for (posed, camera), image in zip(circumstances, images, strict=True)
        ]
        measured = _measure(genhead, images, meshes, circumstances, measures.points, torch_generator(seed, "evaluate points"))
        for index, identity in enumerate(identities):
            for picture in PICTURES:
                records.append({"identity": identity, "picture": picture} | {k: v[index].item() for k, v in measured[picture].items()})
        sheet += _sheet(images, meshes, circumstances)[: measures.sheet_rows - len(sheet)]
        done(len(PICTURES) * len(identities))
    return records, grid(np.concatenate(sheet), columns=len(sheet[0]))


def _measure(
    genhead: GenHead,
    images: list[HeadImages],
    meshes: list[MeshView],
    circumstances: tuple[tuple[PosedHead, Camera], ...],
    points: int,
    draws: torch.Generator,  # of the points and the random pairs
) -> dict[str, dict[str, Tensor]]:
    """Picture's name -> column -> [B]; NaN where a column does not apply to a picture."""
    head, found = genhead.head_model, {}
    for name, image, mesh, (posed, _) in zip(PICTURES, images, meshes, circumstances, strict=True):
        depth, flat = depth_error(image.depth, mesh), depth_error(flat_face(mesh), mesh)
        percent = 100 / head_depth(head, posed.vertices_posed)
        iou, recall = silhouette_scores(image.opacity, mesh)
        iou_floor, recall_floor = silhouette_scores(torch.ones_like(image.opacity), mesh)
        found[name] = {
            "depth": depth,
            "depth_floor": flat,
            "depth_percent": depth * percent,
            "depth_percent_floor": flat * percent,
            "silhouette_iou": iou,
            "silhouette_iou_floor": iou_floor,
            "silhouette_recall": recall,
            "silhouette_recall_floor": recall_floor,
        }
    (rest, camera), _, (other, _) = circumstances
    surface, order = face_points(head, points, draws), torch.randperm(points, generator=draws).to(camera.c2w.device)
    before, after = surface.on(rest.vertices_posed), surface.on(other.vertices_posed)
    seen = visible(before, head, rest.vertices_posed, camera) & visible(after, head, other.vertices_posed, camera)
    motion = motion_difference(images[0].image, images[2].image, (before, after), seen, (camera, camera), order)
    view = view_difference(*_views(images, circumstances))
    in_pairs = {
        "turned": {"view": view.difference, "view_floor": view.unmatched, "view_share": view.share},
        "moved": {"motion": motion.difference, "motion_floor": motion.unmatched},
    }
    nothing = {column: torch.full_like(value, math.nan) for columns in in_pairs.values() for column, value in columns.items()}
    return {name: columns | nothing | in_pairs.get(name, {}) for name, columns in found.items()}


def _views(images: list[HeadImages], circumstances: tuple[tuple[PosedHead, Camera], ...]) -> tuple[HeadView, HeadView]:
    """The first and the turned picture, with depth and camera."""
    first, turned, _ = (
        HeadView(image.image, image.depth, image.opacity, camera) for image, (_, camera) in zip(images, circumstances, strict=True)
    )
    return first, turned


def _silhouettes_of_portraits(genhead: GenHead, portraits: PortraitSet, measures: GeneratorMeasures, seed: int) -> dict[str, Tensor]:
    """The ceiling: (IoU, recall) of the portraits' own mattes against the meshes of their labels, [N] each; none without mattes."""
    device = next(genhead.parameters()).device
    able = np.flatnonzero(portraits.has_matte())
    chosen = numpy_generator(seed, "evaluate mattes").permutation(able)[: measures.identities]
    found: list[tuple[Tensor, Tensor]] = []
    for start in range(0, len(chosen), measures.batch):
        _, mattes, labels = portraits.batch(chosen[start : start + measures.batch])
        label = _without_neck(labels.to(device))
        vertices = genhead.head_model.vertices(label.shape, label.motion)
        side = genhead.config.render_resolution  # compared where the generator's opacity is
        small = F.interpolate(mattes.to(device), (side, side), mode="bilinear", align_corners=False, antialias=True)
        found.append(silhouette_scores(small, mesh_view(genhead.head_model, vertices, label.camera, side)))
    iou, recall = (torch.cat([pair[part] for pair in found]).cpu() if found else torch.empty(0) for part in (0, 1))
    return {"silhouette_iou": iou, "silhouette_recall": recall}


def _latents(genhead: GenHead, draws: list[np.random.Generator]) -> Tensor:
    """z [B, z_dim] ~ N(0, 1), a row from each generator."""
    device = next(genhead.parameters()).device
    return torch.from_numpy(np.stack([rng.standard_normal(genhead.config.z_dim) for rng in draws])).float().to(device)


def _without_neck(labels: Tensor) -> HeadLabel:
    """Labels [B, 437] as the generator is trained with them: the neck at rest, because the camera holds the head's rotation."""
    label = unpack_label(labels)
    return label._replace(motion=label.motion.without_neck())


def _sheet(images: list[HeadImages], meshes: list[MeshView], circumstances: tuple[tuple[PosedHead, Camera], ...]) -> list[np.ndarray]:
    """Rows of the picture sheet, uint8 [7, S, S, 3] each; columns as SHEET_COLUMNS."""
    size = images[0].image.shape[-1]
    first, mesh = images[0], meshes[0]
    error = torch.where(mesh.face, first.depth - mesh.distance, torch.nan)
    face, error, opacity = (F.interpolate(maps.float(), size, mode="nearest") for maps in (mesh.face, error, first.opacity))
    overlay = first.image + face * (torch.tensor([0.2, 1.0, 0.2], device=face.device)[:, None, None] - first.image) * 0.4
    warped = F.interpolate(warped_view(*_views(images, circumstances)), size, mode="nearest")
    opacity = (opacity * 2 - 1).expand(-1, 3, -1, -1)
    columns = [to_uint8(picture) for picture in (first.image, overlay, opacity, images[1].image, warped, images[2].image)]
    columns.insert(2, colorize(error[:, 0], -DEPTH_SHOWN, DEPTH_SHOWN))
    return list(np.stack(columns, axis=1))


# ---- the command -------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class GeneratorEvaluation:
    """Measure an exported generator: table, JSON, CSV and a picture sheet."""

    out: Path = Path("runs/evaluation")  # where results go
    generator: Path = Path("runs/genhead/export")  # exported generator
    portraits: Path = Path("runs/portraits")  # LMDB of portraits that it was trained on
    seed: NonNegativeInt = 0  # of the people, and of the bootstrap
    measures: GeneratorMeasures = GeneratorMeasures()  # how much is measured


def evaluate(config: GeneratorEvaluation) -> int:
    """Measure, write OUT/{evaluation.json, samples.csv, sheet_generator.png, config.yaml} and print the table. Returns the exit status, 0.

    What is already measured, with equal settings and files, is only printed. Raises ConfigError if the portraits' labels are for another
    head model or the portraits of another resolution.
    """
    portraits = PortraitSet(config.portraits)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    features = chosen_features(config.measures.inception, device)
    settings = {key: value for key, value in to_dict(config.measures).items() if key not in ("batch", "inception")}
    record = {
        "generator": exported_hash(config.generator),
        "portraits": config_hash(portraits.metadata),
        "features": features.name,
        "settings": {"seed": config.seed} | settings,
    }
    finished = config.out / "evaluation.json"
    if there := read_results(finished, record):
        print(f"{finished}: measured before, with the same settings\n{table(there['scores'])}")
        return 0
    genhead = load_genhead(config.generator, device)
    made_for = load_yaml(GenHeadExport, config.generator / "config.yaml").head_model
    if portraits.metadata.get("head_model", made_for) != made_for:
        raise ConfigError(
            f"{config.generator} has the head model {made_for!r} but the labels of {config.portraits} belong to "
            f"{portraits.metadata['head_model']!r}; give the portraits that it was trained on"
        )
    if portraits.resolution != genhead.config.image_resolution:
        raise ConfigError(
            f"{config.generator} makes {genhead.config.image_resolution} px pictures, {config.portraits} holds {portraits.resolution} px; "
            "give the portraits that it was trained on"
        )
    found = evaluate_generator(genhead, portraits, features, config.measures, config.seed, cache=config.out)
    write_results(config, record, found)
    print(table(found.scores))
    return 0


def table(scores: dict[str, dict[str, dict[str, float | None]]]) -> str:
    """The scores as text: metric, ours with its interval, floor, ceiling, and what they mean."""
    lines = [f"{'':18}{'ours':>30}{'floor':>12}{'ceiling':>12}   mean [95 % interval over people]"]
    for metric, rows in scores.items():
        cells = []
        for row, width in (("ours", 30), ("floor", 12), ("ceiling", 12)):
            value = rows.get(row)
            text = "-" if value is None or value["mean"] is None else f"{value['mean']:.4f}"
            if row == "ours" and value is not None and value["low"] is not None:
                text += f" [{value['low']:.4f}, {value['high']:.4f}]"
            cells.append(f" {text:>{width - 1}}")
        lines.append(f"{metric:18}" + "".join(cells))
    return "\n".join([*lines, *(f"{metric}: {meaning}" for metric, meaning in METRICS.items() if metric in scores)])


def write_results(config: GeneratorEvaluation, record: dict[str, Any], found: Evaluation) -> None:
    """JSON, CSV and the sheet; the JSON last, because it says that everything is there."""
    config.out.mkdir(parents=True, exist_ok=True)
    save_yaml(config, config.out / "config.yaml")
    save_png(config.out / "sheet_generator.png", found.sheet, {"command": "evaluate", "what": "generator", "columns": SHEET_COLUMNS})
    write_csv(config.out / "samples.csv", found.records)
    rows = [{"metric": metric, "row": row, **value} for metric, rows in found.scores.items() for row, value in rows.items()]
    result = record | {"metrics": {metric: METRICS[metric] for metric in found.scores}, "scores": found.scores, "rows": rows}
    write_atomic(config.out / "evaluation.json", json.dumps(result, indent=1) + "\n")
