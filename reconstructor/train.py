"""Train the reconstructor on streamed shards: one loop, images seen as the clock, the same command resumes.

shards --BatchStream--> source picture, motions, switch, target labels         half static (switch 0), half dynamic (switch 1)
Reconstructor           -> pictures, features, depth, opacity, planes
losses.py               -> eq. 4 with exact labels; Adam; averaged weights
every so often          -> scalars, pictures, checkpoint; at the end the averaged reconstructor in RUN/export
"""

from __future__ import annotations

import copy
import dataclasses
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from datagen.cache import CacheConfig, ShardCache, open_cache
from datagen.plan import Plan, open_plan
from datagen.reading import ShardDataset, open_dataset
from datagen.worker import load_planned_generator
from genhead.generator import GenHead
from head3d.adversarial import Ema
from head3d.cameras import Camera, orbit
from head3d.head_model import load_head_model
from head3d.labels import MOTION_VECTOR_SIZE, unpack_label
from head3d.pictures import colorize, grid, to_uint8
from head3d.run import distributed
from head3d.run.checkpoint import Checkpoint, export_model, latest_checkpoint, pack_optimizer, save_checkpoint, unpack_optimizer
from head3d.run.config import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, config_hash, to_dict
from head3d.run.errors import AssetError, ConfigError
from head3d.run.seeding import torch_generator, weights_drawn_from
from head3d.run.training import (
    check_finite,
    check_state,
    crossed,
    is_finished,
    open_run,
    part,
    process_group,
    refuse_changes,
    refuse_other_circumstances,
)
from reconstructor.batches import Batch, BatchConfig, BatchStream, usable_frames
from reconstructor.losses import LossConfig, check_labels, members_needed, reconstruction_losses, smoothness_loss
from reconstructor.model import EXPORT_KIND, Reconstructor, ReconstructorConfig, ReconstructorExport

FREE_TO_CHANGE = (
    "out",
    "shards",
    "cache",
    "generator",
    "total_images",
    "log_every",
    "pictures_every",
    "checkpoint_every",
    "keep",
    "threads",
)  # on resume
FREE_IN_BATCHES = ("threads", "prefetch")
ADVICE = "Lower learning_rate and start again from there in another --out, or look for damaged labels with the verify command"


@dataclasses.dataclass(frozen=True)
class ReconstructorRun:
    """Train the reconstructor. Defaults are the published run at 512 x 512."""

    out: Path = Path("runs/reconstructor")  # run folder: checkpoints, logs, pictures, export
    shards: str = "runs/datagen"  # data set: a folder or a URL (made by the datagen command)
    generator: Path | None = None  # exported generator for the warm start; None = the one that the shards record
    head_model: str | None = None  # path of a FLAME-format file, or "procedural"; None = the one that the shards record
    warm_start: bool = True  # decoder and super-resolution begin as the generator's; False: at random (published default)
    seed: NonNegativeInt = 0  # of weights, order and every draw
    total_images: PositiveInt = 15_000_000  # targets shown before the run ends
    learning_rate: PositiveFloat = 1e-4  # Adam
    betas: tuple[float, float] = (0.9, 0.999)  # Adam
    epsilon: PositiveFloat = 1e-5  # Adam
    ema_images: PositiveFloat = 10_000.0  # half-life of the averaged weights, images
    ema_ramp: NonNegativeFloat = 0.05  # half-life is at most this share of the images seen; 0 = no ramp
    micro_batch: PositiveInt = 4  # samples a process takes through the network at once; gradients are averaged over the batch
    log_every: PositiveInt = 3_200  # images between lines of metrics, each the mean since the one before
    pictures_every: PositiveInt = 100_000  # images between picture grids
    checkpoint_every: PositiveInt = 100_000  # images between checkpoints
    keep: PositiveInt = 3  # newest checkpoints kept
    threads: NonNegativeInt = 0  # CPU threads of torch; 0 leaves its default
    cache: CacheConfig = CacheConfig()  # where copies of shards behind a URL are kept
    batches: BatchConfig = BatchConfig()  # what a batch holds and how it is read
    losses: LossConfig = LossConfig()  # weights and ranges of the loss terms
    model: ReconstructorConfig = ReconstructorConfig()  # the network


@dataclasses.dataclass
class Learner:
    """Network, averaged network, optimiser: what a step changes and a checkpoint holds."""

    model: Reconstructor
    averaged: Reconstructor
    ema: Ema
    optimizer: torch.optim.Adam
    head_model: str  # what the networks' head was loaded from


def train(config: ReconstructorRun) -> int:
    """Train until total_images, a stop signal or divergence. Returns the exit status: 0 unless something failed.

    A finished run is not repeated; a started one goes on from its newest checkpoint, bit for bit on one machine.
    """
    with process_group(config.threads) as process, open_cache(config.cache, config.shards) as cache:
        return _train(config, process, cache)


def _train(config: ReconstructorRun, process: distributed.Process, cache: ShardCache | None) -> int:
    dataset = open_dataset(config.shards)
    for note in check_data(config, dataset):
        if process.is_main:
            print(f"{config.shards}: {note}")
    saved = latest_checkpoint(config.out)
    learner = build(config, open_plan(config.shards), process.device, warm=config.warm_start and saved is None)
    images_seen = restore(config, learner, saved, circumstances(dataset)) if saved else 0
    if is_finished(config, images_seen, process):
        return 0
    preview = preview_batch(config, dataset).to(process.device)
    stream = BatchStream(
        dataset.through(cache),
        config.batches,
        config.seed,
        lambda seen: members_needed(config.losses, seen),
        samples_seen=images_seen,
        rank=process.rank,
        world_size=process.world_size,
    )
    size, waited, window = config.batches.size, 0.0, (images_seen, time.perf_counter())
    with open_run("reconstructor", config, saved, images_seen, process) as run, stream as batches:
        while images_seen < config.total_images:
            asked = time.perf_counter()
            batch = next(batches).to(process.device)
            waited += time.perf_counter() - asked
            scalars = step(config, learner, batch, images_seen, process)
            images_seen += size
            run.bar.update(size)
            check_finite(scalars, images_seen, config.out, ADVICE)
            run.means.add(scalars)
            stopping = distributed.any_process(run.stop.requested, process.device)
            finished = images_seen >= config.total_images
            if finished or crossed(images_seen, size, config.log_every):
                means, seconds = run.means.take(), time.perf_counter() - window[1]
                speed = {"speed/images_per_s": (images_seen - window[0]) / seconds, "speed/data_wait_share": waited / seconds}
                run.log.scalars(images_seen, means | speed)
                run.bar.set_postfix(loss=f"{means['loss/total']:.3f}", wait=f"{waited / seconds:.1%}")
                waited, window = 0.0, (images_seen, time.perf_counter())
            if process.is_main and (finished or crossed(images_seen, size, config.pictures_every)):
                run.log.image(images_seen, "preview", preview_picture(learner.averaged, preview))
            if process.is_main and (finished or stopping or crossed(images_seen, size, config.checkpoint_every)):
                save(config, learner, images_seen, {"circumstances": circumstances(dataset)} | run.state())
            if stopping:
                return 0
    if process.is_main:
        export(config, learner, images_seen)
    return 0


def step(config: ReconstructorRun, learner: Learner, batch: Batch, images_seen: int, process: distributed.Process) -> dict[str, float]:
    """One update from this process's part of a batch; none if the loss is not finite. Returns means over all processes for the log."""
    totals: dict[str, float] = {}
    learner.optimizer.zero_grad(set_to_none=True)
    for start in range(0, len(batch), config.micro_batch):
        part = batch.select(slice(start, start + config.micro_batch))
        share = len(part) / len(batch)
        draws = torch_generator(config.seed, "rays", process.rank, images_seen, start)
        terms = loss_terms(config, learner.model, part, images_seen, draws)
        terms["total"] = sum(terms.values())
        (terms["total"] * share).backward()
        for name, value in terms.items():
            totals[f"loss/{name}"] = totals.get(f"loss/{name}", 0.0) + value.item() * share
    totals = distributed.mean_scalars(totals, process.device)
    distributed.average_gradients(learner.model.parameters())
    if math.isfinite(totals["loss/total"]):
        learner.optimizer.step()
        learner.ema.update(learner.model, images_seen + config.batches.size, config.batches.size)
    return totals


def loss_terms(config: ReconstructorRun, model: Reconstructor, batch: Batch, images_seen: int, draws: torch.Generator) -> dict[str, Tensor]:
    """Forward pass and weighted loss terms; density smoothness joins every `losses.smoothness.every` steps."""
    target = unpack_label(batch.label)
    rendered, planes = model(
        batch.source_image,
        batch.source_motion,
        batch.driving_motion,
        batch.motion_scale,
        target.shape,
        target.motion,
        target.camera,
        generator=draws,
    )
    posed = model.pose(target.shape, target.motion)
    terms = reconstruction_losses(config.losses, rendered, batch, lambda points: model.point_features(planes, points, posed), images_seen)
    smoothness = config.losses.smoothness
    if smoothness.weight > 0 and (images_seen // config.batches.size) % smoothness.every == 0:
        side, device = config.model.sampling.box_side, planes.device
        terms["smoothness"] = smoothness_loss(smoothness, lambda points: model.field(planes, points)[1], len(batch), side, draws, device)
    return terms


def check_data(config: ReconstructorRun, dataset: ShardDataset) -> list[str]:
    """Raise ConfigError where the settings and the shards contradict each other. Returns what is worth knowing before training."""
    architecture, where = config.model.architecture, str(config.shards)
    planned = dataset.manifest["plan"]["frames"] - dataset.excluded_count
    if len(dataset.frames) < planned:
        raise ConfigError(
            f"{where}: holds {len(dataset.frames)} of the {planned} frames that it was planned with, and training on it would be another "
            "run; finish it by calling its datagen command again"
        )
    if architecture.motion_dim != MOTION_VECTOR_SIZE:
        raise ConfigError(
            f"model.architecture.motion_dim is {architecture.motion_dim}, but the motion comes as a FLAME vector of "
            f"{MOTION_VECTOR_SIZE} numbers (expression 100, jaw 3, eyes 6); set it to {MOTION_VECTOR_SIZE}"
        )
    model, losses, stored = config.model, config.losses, dataset.manifest["settings"]["generator"]["model"]
    maps = any(getattr(losses, term).weight for term in ("image", "features", "depth", "opacity"))
    for setting, own, name, needed in (
        ("architecture.image_resolution", architecture.image_resolution, "image_resolution", True),
        ("superresolution (its input, doubled by each block)", model.superresolution.output_resolution, "image_resolution", True),
        ("render_resolution", model.render_resolution, "render_resolution", maps),
        ("feature_channels", model.feature_channels, "feature_channels", losses.features.weight > 0),
        ("architecture.plane_channels", architecture.plane_channels, "plane_channels", losses.points.weight > 0),
    ):
        if needed and own != stored[name]:
            raise ConfigError(
                f"{where}: the shards were made with {name} {stored[name]}, but model.{setting} gives {own}; "
                f"make it {stored[name]}, or give shards of that size"
            )
    rich = dataset.manifest["settings"]["render"]["motion_rich_side"]
    if config.batches.motion_rich and rich != architecture.image_resolution:
        raise ConfigError(
            f"{where}: batches.motion_rich asks for motion-rich identities, whose pictures are {rich} px, but the others' are "
            f"{architecture.image_resolution} px; generate them with --render.motion_rich_side {architecture.image_resolution}, or set "
            "--batches.motion_rich false"
        )
    training = usable_frames(dataset.frames, config.batches, "train")
    available: dict[str, int] = {}
    for index in training:
        for member in dataset.frames[index].members:
            available[member] = available.get(member, 0) + 1
    return check_labels(config.losses, available, len(training), where)


def build(config: ReconstructorRun, plan: Plan, device: torch.device, warm: bool) -> Learner:
    """A learner at the start of its life. Raises AssetError if generator or head model are not those of the shards."""
    head_model = config.head_model or plan.generator.head_model
    head = load_head_model(head_model)
    if head.content_hash != plan.generator.head_hash:
        raise AssetError(
            f"head_model {head_model}: expected the head of the shards (hash {plan.generator.head_hash}), got {head.content_hash}; "
            f"give the file that the generator was trained with ({plan.generator.head_model})"
        )
    with weights_drawn_from(torch_generator(config.seed, "reconstructor", "weights")):
        model = Reconstructor(config.model, head).to(device)
    if warm:
        folder = config.generator or Path(plan.generator.folder)
        take_from_generator(model, load_planned_generator(plan, folder, str(device)))
    averaged = copy.deepcopy(model, {id(head): head}).eval().requires_grad_(False)  # one head model for both
    ema = Ema(averaged, half_life_images=config.ema_images, ramp=config.ema_ramp)
    optimizer = torch.optim.Adam(model.parameters(), config.learning_rate, config.betas, config.epsilon)
    return Learner(model, averaged, ema, optimizer, head_model)


def take_from_generator(model: Reconstructor, generator: GenHead) -> None:
    """Begin with the generator's decoder and super-resolution (portrait4d, section 6.8): plane features then mean the same.

    Raises ConfigError if a width differs.
    """
    for name in ("decoder", "superresolution"):
        own, other = getattr(model, name).state_dict(), getattr(generator, name).state_dict()
        differing = [
            key for key in sorted(own.keys() | other.keys()) if key not in own or key not in other or own[key].shape != other[key].shape
        ]
        if differing:
            raise ConfigError(
                f"warm_start: the generator's {name} does not fit the reconstructor's at {', '.join(differing[:3])}; give the {name} "
                "the generator's widths (its config.yaml lies beside its weights), or start at random with --warm_start false"
            )
        getattr(model, name).load_state_dict(other)


def preview_batch(config: ReconstructorRun, dataset: ShardDataset) -> Batch:
    """Held-out samples to look at (training samples if the validation split cannot form any), always the same."""
    static = config.batches.static_share == 1
    settings = dataclasses.replace(config.batches, size=4, static_share=float(static), threads=0)
    members = {"opacity", "depth"} & members_needed(config.losses, 0)
    held_out = [dataset.frames[index] for index in usable_frames(dataset.frames, settings, "val", members)]
    held_out = [frame for frame in held_out if (frame.kind == "static") == static]
    enough = any(frame.views > 1 for frame in held_out) if static else len({frame.identity for frame in held_out}) < len(held_out)
    split = "val" if enough else "train"
    with BatchStream(dataset, settings, config.seed, lambda seen: members, split=split, driver_image=True) as batches:
        return next(batches)


@torch.no_grad()
def preview_picture(model: Reconstructor, batch: Batch) -> np.ndarray:
    """One row a sample: source, driver, output, truth, depth, true depth (if stored), novel view. uint8 [H, W, 3]."""
    target, count = unpack_label(batch.label), len(batch)
    images, planes = model(
        batch.source_image, batch.source_motion, batch.driving_motion, batch.motion_scale, target.shape, target.motion, target.camera
    )
    device, side = batch.image.device, images.image.shape[-1]
    yaw = torch.full((count,), 0.6, device=device)
    camera = orbit(yaw, torch.zeros_like(yaw), torch.full_like(yaw, 4.17))
    background = model.architecture.encode_source(batch.source_image).background
    novel = model.render(planes, background, model.pose(target.shape, target.motion), camera).image
    columns = [to_uint8(picture) for picture in (batch.source_image, batch.driver_image, images.image, batch.image)]
    for depth in (images.depth, batch.depth):
        if depth is not None:
            columns.append(depth_picture(depth, target.camera, side, model.config.sampling.box_side))
    columns.append(to_uint8(novel))
    sheet = np.stack([column[row] for row in range(count) for column in columns])
    return grid(sheet, columns=len(columns))


def depth_picture(depth: Tensor, camera: Camera, side: int, box_side: float) -> np.ndarray:
    """Ray distances [B, 1, R, R] (scene units) as pictures uint8 [B, side, side, 3]; near is bright, over the depth of the box."""
    nearness = camera.c2w[:, :3, 3].norm(dim=1)[:, None, None, None] - depth
    resized = torch.nn.functional.interpolate(nearness, size=(side, side), mode="nearest")
    return colorize(resized[:, 0], -box_side / 2, box_side / 2)


def circumstances(dataset: ShardDataset) -> dict[str, Any]:
    """What the order of samples depends on beside the settings: a set that grew, lacked shards or excludes others has another order."""
    excluded = config_hash(dataset.excluded.entry())
    return {"data": {"config_hash": dataset.manifest["config_hash"], "frames": len(dataset.frames), "excluded": excluded}}


def save(config: ReconstructorRun, learner: Learner, images_seen: int, state: dict[str, Any]) -> Path:
    """Write a checkpoint: `state`, network, average, optimiser. The data and every draw need no state: they are keyed by images seen."""
    tensors, optimizer = pack_optimizer(learner.optimizer, "optimizer")
    for name, model in (("model", learner.model), ("averaged", learner.averaged)):
        tensors |= {f"{name}/{key}": value for key, value in model.weights().items()}
    check_state(tensors, images_seen, config.out, ADVICE)
    return save_checkpoint(config.out, images_seen, tensors, state | {"optimizer": optimizer}, config, config.keep)


def restore(config: ReconstructorRun, learner: Learner, saved: Checkpoint, around: dict[str, Any]) -> int:
    """Put a checkpoint back. Raises ConfigError if the run was started with other settings or data. Returns the images seen."""
    refuse_changes(saved, _settings(to_dict(config)), _settings(saved.config), ())
    refuse_other_circumstances(saved, around)
    for name, model in (("model", learner.model), ("averaged", learner.averaged)):
        model.load_weights(part(saved.tensors, f"{name}/"), str(saved.folder))
    unpack_optimizer(learner.optimizer, "optimizer", saved.tensors, saved.state["optimizer"])
    return saved.images_seen


def _settings(values: dict) -> dict:
    """What must be equal for a resume to be the same run."""
    kept = {key: value for key, value in values.items() if key not in FREE_TO_CHANGE}
    kept["batches"] = {key: value for key, value in values.get("batches", {}).items() if key not in FREE_IN_BATCHES}
    return kept


def export(config: ReconstructorRun, learner: Learner, images_seen: int) -> Path:
    """Write the averaged reconstructor for use: RUN/export."""
    settings = ReconstructorExport(head_model=learner.head_model, model=config.model)
    return export_model(config.out / "export", learner.averaged.weights(), settings, EXPORT_KIND, images_seen)
