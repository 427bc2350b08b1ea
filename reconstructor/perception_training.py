"""Train the perception network and the motion encoder on shards: one loop, images seen as the clock, the same command resumes.

shards --stream_pictures--> several motions of each of some identities --augment--> pictures, moved landmarks
Perception             -> identity, reading, motion vectors; the losses below; Adam; averaged weights
at the end             -> RUN/export: weights, config, and errors.json, measured on people whom neither role has seen
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import nn

from datagen.cache import CacheConfig, ShardCache, open_cache
from datagen.plan import Plan, open_plan
from datagen.reading import ShardDataset, open_dataset
from datagen.worker import load_planned_head
from head3d.adversarial import Ema
from head3d.head_model import HeadModel
from head3d.pictures import grid, to_uint8
from head3d.run import distributed
from head3d.run.checkpoint import (
    Checkpoint,
    export_model,
    fill_weights,
    latest_checkpoint,
    pack_optimizer,
    save_checkpoint,
    unpack_optimizer,
)
from head3d.run.config import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, to_dict
from head3d.run.errors import ConfigError, DataError
from head3d.run.files import write_atomic
from head3d.run.seeding import numpy_generator, torch_generator, weights_drawn_from
from head3d.run.training import is_finished, open_run, part, process_group, refuse_changes, refuse_other_circumstances
from reconstructor.perception import ERRORS_FILE, EXPORT_KIND, Perception, PerceptionConfig, PerceptionExport, Reading, Role, true_reading
from reconstructor.perception_data import (
    AugmentConfig,
    Augmented,
    PictureBatchConfig,
    PictureOrder,
    Pictures,
    augment,
    stream_pictures,
    training_frames,
)
from reconstructor.perception_errors import errors_table, held_out_errors, held_out_pictures
from reconstructor.perception_losses import PerceptionWeights, Scaffold, loss_terms

FREE_TO_CHANGE = (
    "out",
    "shards",
    "cache",
    "head_model",
    "total_images",
    "log_every",
    "pictures_every",
    "checkpoint_every",
    "keep",
    "export_half",
    "threads",
)
ADVICE = "Lower learning_rate and start again from there in another --out, or look for damaged labels with the verify command"
_CALIBRATION_FRAMES = 500  # training frames whose labels give means and deviations


@dataclasses.dataclass(frozen=True)
class PerceptionRun:
    """Train a measurement network and a motion encoder on shards, and measure their errors."""

    out: Path = Path("runs/perception")  # run folder: checkpoints, logs, pictures, export
    shards: str = "runs/datagen"  # data set: a folder or a URL (made by the datagen command)
    head_model: str | None = None  # path of a FLAME-format file, or "procedural"; None = the one that the shards record
    role: Role = "losses"  # which half of the training people is seen: the network that trains a reconstructor, or the one that judges it
    seed: NonNegativeInt = 0  # of weights, order and every draw; the roles differ also with one seed
    total_images: PositiveInt = 3_000_000  # pictures shown before the run ends
    learning_rate: PositiveFloat = 1e-3  # Adam
    betas: tuple[float, float] = (0.9, 0.99)  # Adam
    ema_images: PositiveFloat = 20_000.0  # half-life of the averaged weights, images
    ema_ramp: NonNegativeFloat = 0.05  # half-life is at most this share of the images seen; 0 = no ramp
    log_every: PositiveInt = 12_800  # images between lines of metrics, each the mean since the one before
    pictures_every: PositiveInt = 500_000  # images between pictures of what the network is shown
    checkpoint_every: PositiveInt = 200_000  # images between checkpoints
    keep: PositiveInt = 3  # newest checkpoints kept
    export_half: bool = False  # store exported weights as float16
    threads: NonNegativeInt = 0  # CPU threads of torch; 0 leaves its default
    cache: CacheConfig = CacheConfig()  # where copies of shards behind a URL are kept
    batches: PictureBatchConfig = PictureBatchConfig()  # what a batch holds
    augment: AugmentConfig = AugmentConfig()  # how its pictures are changed
    weights: PerceptionWeights = PerceptionWeights()  # of the loss terms
    network: PerceptionConfig = PerceptionConfig()  # widths

    @property
    def batch_size(self) -> int:
        """Pictures in a batch, over all ranks."""
        return self.batches.identities * self.batches.pictures


@dataclasses.dataclass
class Learner:
    """Networks, average, optimiser: what a step changes and a checkpoint holds; and the head of the labels."""

    network: Perception
    averaged: Perception
    scaffold: Scaffold
    ema: Ema
    optimizer: torch.optim.Adam
    head: HeadModel

    def parameters(self) -> list[nn.Parameter]:
        return [*self.network.parameters(), *self.scaffold.parameters()]


def train(config: PerceptionRun) -> int:
    """Train until total_images, a stop signal or divergence. Returns the exit status: 0 unless something failed.

    A finished run is not repeated; a started one goes on from its newest checkpoint, bit for bit on one machine.
    """
    with process_group(config.threads) as process, open_cache(config.cache, config.shards) as cache:
        return _train(config, process, cache)


def _train(config: PerceptionRun, process: distributed.Process, cache: ShardCache | None) -> int:
    if config.batches.identities % process.world_size:
        raise ConfigError(
            f"batches.identities {config.batches.identities} is not divisible by {process.world_size} ranks; all must get equally many"
        )
    dataset, plan = open_dataset(config.shards).through(cache), open_plan(config.shards)
    by_identity = training_frames(dataset.frames, config.role, config.shards)
    check_data(config, dataset)
    around = {"data": {"config_hash": dataset.manifest["config_hash"], "frames": len(dataset.frames)}}
    saved = latest_checkpoint(config.out)
    learner = build(config, dataset, plan, by_identity, process.device)
    images_seen = restore(config, learner, saved, around) if saved else 0
    if is_finished(config, images_seen, process):
        return 0
    size, order = config.batch_size, PictureOrder(dataset.frames, by_identity, config.batches, _seed(config))
    stream = stream_pictures(dataset, order, config.network.resolution, images_seen, process.rank, process.world_size)
    with (
        open_run("perception", config, size, ADVICE, saved, images_seen, process) as run,
        contextlib.closing(stream) as batches,
    ):
        while run.goes_on:
            pictures = next(batches).to(process.device)
            seen = show(config, pictures, run.images_seen, process)
            run.advance(step(config, learner, pictures, seen, run.images_seen, process))
            if run.due(config.log_every):
                means = run.means.take()
                run.log.scalars(run.images_seen, means)
                run.bar.set_postfix(loss=f"{means['loss/total']:.3f}")
            if run.due(config.pictures_every):
                run.log.image(run.images_seen, "shown", grid(to_uint8(seen.image), columns=config.batches.pictures))
            if process.is_main and (run.stopping or run.due(config.checkpoint_every)):
                save(config, learner, run.images_seen, {"circumstances": around} | run.state())
    if process.is_main and not run.stopping:
        export(config, learner, dataset, run.images_seen)
    return 0


def check_data(config: PerceptionRun, dataset: ShardDataset) -> None:
    """Raise DataError if a frame lacks what is read, or nobody is held out to measure the errors on."""
    lacking = [frame.key for frame in dataset.frames if "opacity" not in frame.members]
    if lacking:
        raise DataError(
            f"{config.shards}: {len(lacking)} of {len(dataset.frames)} frames have no member 'opacity', which tells people from their "
            f"backgrounds (the first is {lacking[0]}); give all frames this label (--render.labels, --render.motion_rich_labels)"
        )
    held_out_pictures(dataset.frames, config.shards)


def show(config: PerceptionRun, pictures: Pictures, images_seen: int, process: distributed.Process) -> Augmented:
    """This rank's pictures as the network sees them in the step at `images_seen`."""
    rows = torch.arange(config.batch_size).unflatten(0, (config.batches.identities, -1))[process.rank :: process.world_size].flatten()
    return augment(pictures, config.augment, torch_generator(_seed(config), "augment", images_seen), rows, config.batch_size)


def step(
    config: PerceptionRun, learner: Learner, pictures: Pictures, seen: Augmented, images_seen: int, process: distributed.Process
) -> dict[str, float]:
    """One update from this process's part of a batch; none if the loss is not finite. Returns means over all processes for the log."""
    learner.optimizer.zero_grad(set_to_none=True)
    terms = loss_terms(config.weights, learner.network, learner.scaffold, learner.head, pictures, seen)
    terms["total"] = sum(terms.values())
    terms["total"].backward()
    scalars = distributed.mean_scalars({f"loss/{name}": value for name, value in terms.items()}, process.device)
    distributed.average_gradients(learner.parameters())
    if math.isfinite(scalars["loss/total"]):
        learner.optimizer.step()
        learner.ema.update(learner.network, images_seen + config.batch_size, config.batch_size)
    return scalars


def build(config: PerceptionRun, dataset: ShardDataset, plan: Plan, by_identity: dict[int, list[int]], device: torch.device) -> Learner:
    """A learner at the start of its life. Raises AssetError if the head model is not that of the shards."""
    head_model = config.head_model or plan.generator.head_model
    head = load_planned_head(plan, head_model)
    with weights_drawn_from(torch_generator(_seed(config), "perception", "weights")):
        network, scaffold = Perception(config.network), Scaffold(config.network, sorted(by_identity))
    truth = training_labels(dataset, by_identity, head)
    network.calibrate(truth, head)
    scaffold.calibrate(truth, network, head)
    network, scaffold, head = network.to(device), scaffold.to(device), head.to(device)
    averaged = copy.deepcopy(network).eval().requires_grad_(False)
    ema = Ema(averaged, half_life_images=config.ema_images, ramp=config.ema_ramp)
    optimizer = torch.optim.Adam([*network.parameters(), *scaffold.parameters()], config.learning_rate, config.betas)
    return Learner(network, averaged, scaffold, ema, optimizer, head)


def training_labels(dataset: ShardDataset, by_identity: dict[int, list[int]], head: HeadModel) -> Reading:
    """What some training pictures truly show, one random view of each of at most _CALIBRATION_FRAMES frames."""
    rng = numpy_generator("perception calibration")
    chosen = rng.permutation(sorted(index for indices in by_identity.values() for index in indices))[:_CALIBRATION_FRAMES]
    labels = []
    for index in chosen:
        frame = dataset.frames[index]
        labels.append(torch.from_numpy(dataset.read(frame, ["label"])["label"][int(rng.integers(frame.views))]))
    parts = [true_reading(rows, head) for rows in torch.stack(labels).split(50)]
    return Reading(*(torch.cat(column) for column in zip(*parts, strict=True)))


def save(config: PerceptionRun, learner: Learner, images_seen: int, state: dict[str, Any]) -> Path:
    """Write a checkpoint. The data and every draw need no state: they are keyed by images seen."""
    tensors, optimizer = pack_optimizer(learner.optimizer, "optimizer")
    for name, model in (("network", learner.network), ("averaged", learner.averaged), ("scaffold", learner.scaffold)):
        tensors |= {f"{name}/{key}": value for key, value in model.state_dict().items()}
    return save_checkpoint(config.out, images_seen, tensors, state | {"optimizer": optimizer}, config, config.keep)


def restore(config: PerceptionRun, learner: Learner, saved: Checkpoint, around: dict[str, Any]) -> int:
    """Put a checkpoint back. Raises ConfigError if the run was started with other settings or data. Returns the images seen."""
    refuse_changes(saved, to_dict(config), saved.config, FREE_TO_CHANGE)
    refuse_other_circumstances(saved, around)
    for name, model in (("network", learner.network), ("averaged", learner.averaged), ("scaffold", learner.scaffold)):
        fill_weights(model, part(saved.tensors, f"{name}/"), str(saved.folder))
    unpack_optimizer(learner.optimizer, "optimizer", saved.tensors, saved.state["optimizer"])
    return saved.images_seen


def export(config: PerceptionRun, learner: Learner, dataset: ShardDataset, images_seen: int) -> Path:
    """Measure the averaged network and write it for use: RUN/export; its errors first, so that a finished export has them."""
    errors = held_out_errors(learner.averaged, dataset, learner.head, config.shards)
    print(errors_table(errors))
    folder = config.out / "export"
    write_atomic(folder / ERRORS_FILE, json.dumps(errors, indent=1) + "\n")
    settings = PerceptionExport(config.role, config.seed, dataset.manifest["config_hash"], config.network)
    return export_model(folder, learner.averaged.state_dict(), settings, EXPORT_KIND, images_seen, half=config.export_half)


def _seed(config: PerceptionRun) -> int:
    """Of every draw: another one for each role."""
    return int(numpy_generator(config.seed, "perception", config.role).integers(2**62))
