"""One training step of the reconstructor: forward pass, loss terms, gradients, update."""

from __future__ import annotations

import math
import time

import torch
from torch import Tensor

from head3d.labels import unpack_label
from head3d.rendering import HeadImages
from head3d.run import distributed
from head3d.run.seeding import Draws, torch_generator
from reconstructor.adversary import Shown, show
from reconstructor.architecture import Driver
from reconstructor.batches import Batch
from reconstructor.frozen_networks import frozen_network_losses
from reconstructor.learner import Learner
from reconstructor.losses import labels_at, reconstruction_losses, smoothness_loss
from reconstructor.settings import ReconstructorRun
from reconstructor.stages import enter, stage_at


class Stopwatch:
    """Seconds by part of a step. On a GPU it waits for the work of each part, which otherwise runs behind the program."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._last, self._seconds = device, time.perf_counter(), {}

    def start(self) -> None:
        """What has passed since the last lap belongs to no part."""
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        """What has passed since the last lap belongs to `name`."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        now = time.perf_counter()
        self._seconds[name] = self._seconds.get(name, 0.0) + now - self._last
        self._last = now

    def take(self) -> dict[str, float]:
        """Seconds by name, and begin anew."""
        seconds, self._seconds = self._seconds, {}
        return seconds


def step(
    config: ReconstructorRun,
    learner: Learner,
    batch: Batch,
    images_seen: int,
    process: distributed.Process,
    watch: Stopwatch | None = None,  # takes the laps forward, backward, update, discriminator
) -> dict[str, float]:
    """One update from this process's part of a batch; none if the loss is not finite. While the adversarial term counts, the
    discriminator then takes its own. Returns means over all processes for the log.

    Every draw belongs to one sample of the whole batch, and no group of the discriminator's minibatch deviation is torn, so the number
    of processes and of micro-batches changes nothing beyond the rounding of sums.
    """
    totals: dict[str, float] = {}
    watch = watch or Stopwatch(process.device)
    batch = learner.vectors.of_batch(batch)
    term = config.losses_at(images_seen).adversarial
    adversary = learner.adversary if term.active(images_seen) else None
    shown: list[tuple[Shown, float]] = []
    enter(stage_at(config.all_stages(), images_seen), learner.optimizer, config.learning_rate)
    learner.optimizer.zero_grad(set_to_none=True)
    for rows in micro_batches(len(batch), config.micro_batch, config.adversary.discriminator.group_size if adversary else 1):
        part, share = batch.select(rows.to(process.device)), len(rows) / len(batch)
        numbers = (process.rank + process.world_size * rows).tolist()  # in the whole batch
        draws = [torch_generator(config.seed, "rays", images_seen, number, device=process.device) for number in numbers]
        terms, images = loss_terms(config, learner, part, images_seen, draws)
        if adversary:
            seen = show(learner.model.head_model, images, part)
            terms["adversarial"] = term.weight * adversary.loss(seen)
            shown.append((seen.detach(), share))
        terms["total"] = sum(terms.values())
        watch.lap("forward")
        (terms["total"] * share).backward()
        watch.lap("backward")
        for name, value in terms.items():
            totals[f"loss/{name}"] = totals.get(f"loss/{name}", 0.0) + value.item() * share
    totals = distributed.mean_scalars(totals, process.device)
    distributed.average_gradients(learner.model.parameters())
    if math.isfinite(totals["loss/total"]):
        learner.optimizer.step()
        learner.ema.update(learner.model, images_seen + config.batches.size, config.batches.size)
    watch.lap("update")
    if adversary:
        totals |= adversary.step(shown, images_seen // config.batches.size, process)
        watch.lap("discriminator")
    return totals


def micro_batches(count: int, most: int, group: int) -> list[Tensor]:
    """Row numbers of each micro-batch of `count` samples: at most `most` of them, in whole groups of the minibatch deviation.

    group divides count and is at most `most`; samples n, n + count / group, ... make a group, in a micro-batch as in the whole.
    """
    return [rows.flatten() for rows in torch.arange(count).view(group, -1).split(most // group, dim=1)]


def loss_terms(
    config: ReconstructorRun, learner: Learner, batch: Batch, images_seen: int, draws: Draws
) -> tuple[dict[str, Tensor], HeadImages]:
    """Forward pass and weighted loss terms, all but the adversarial one; density smoothness joins every `smoothness.every` steps."""
    model, target = learner.model, unpack_label(batch.label)
    losses, rays = config.losses_at(images_seen), config.rays_at(images_seen)
    images, planes, source, driver = model(
        batch.source_image,
        batch.source_motion,
        Driver(batch.driving_motion, batch.driver_image),
        batch.motion_scale,
        target.shape,
        target.motion,
        target.camera,
        generator=draws,
        resolution=rays,
        precision=config.precision,
    )
    batch = labels_at(batch, rays)
    posed = model.pose(target.shape, target.motion)
    terms = reconstruction_losses(losses, images, batch, lambda points: model.point_features(planes, points, posed), images_seen)
    terms |= frozen_network_losses(losses, learner.frozen, images, batch, images_seen)
    terms |= model.architecture.extra_losses(source, driver, planes, images, batch, model.render_at_rest)
    smoothness = losses.smoothness
    if smoothness.weight > 0 and (images_seen // config.batches.size) % smoothness.every == 0:
        side = config.model.sampling.box_side
        terms["smoothness"] = smoothness_loss(smoothness, lambda points: model.field(planes, points)[1], planes, side, draws)
    return terms, images
