"""The adversarial term of eq. 4: GenHead's discriminator between rendered pictures and the generator's own of the same heads.

    rendered picture, raw picture, opacity --\\
    correspondence map of the posed mesh    ---> Discriminator (camera) -> logit      real: the target's picture, reduced, and its opacity
                                                                                     with the same map and camera

The reconstructor's term is softplus(-D(fake)); the discriminator minimises softplus(D(fake)) + softplus(-D(real)), and in every 16th of
its steps takes one more with the gradient penalty (portrait4d, sections 3, 6.8 and 6.9). It trains only in steps in which the term
counts, so before 1,000,000 images it is as it began: at random as published, as the generator's, or as that of the reconstructor that the
run goes on from. Pictures are not blurred. One sample of 512 x 512 pixels costs the reconstructor's pass 249 GFLOP and 680 MB kept for the
gradient, the discriminator's step 745 GFLOP.

Deliberate differences from the source. The necks of our shards may turn, which the map shows and the camera does not; there they are at
rest, and the camera has the whole pose. The discriminator judges the pictures of the reconstructor's own step, rendered just before its
update, instead of rendering the batch again, which saves a forward pass of the reconstructor.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from genhead.losses import DiscriminatorParts
from genhead.train import DISCRIMINATOR_FOLDER, DISCRIMINATOR_KIND, DiscriminatorExport
from head3d.adversarial import R1Weights, discriminator_loss, generator_loss, lazy_adam, r1_penalty, sanitise_gradients
from head3d.head_model import HeadModel
from head3d.labels import unpack_label
from head3d.networks.discriminator import Discriminator, DiscriminatorConfig
from head3d.networks.resample import resize_antialias
from head3d.rasterize import correspondence_map
from head3d.rendering import HeadImages
from head3d.run.checkpoint import Checkpoint, export_model, fill_weights, load_exported, pack_optimizer, unpack_optimizer
from head3d.run.config import PositiveFloat, PositiveInt
from head3d.run.distributed import Process, average_gradients, mean_scalars
from head3d.run.errors import ConfigError
from head3d.run.seeding import torch_generator, weights_drawn_from
from head3d.run.training import part
from reconstructor.batches import Batch

_OPTIMIZER = "optimizer_discriminator"  # in checkpoints


@dataclasses.dataclass(frozen=True)
class AdversaryConfig:
    """The discriminator and how it learns. Defaults are the published run."""

    warm_start: bool = False  # begins as the generator's discriminator, which its export holds; False: at random (published)
    learning_rate: PositiveFloat = 1e-4  # Adam; times c = r1_every / (r1_every + 1), for the penalty's steps are steps of their own
    betas: tuple[float, float] = (0.9, 0.999)  # Adam, each to the power c
    epsilon: PositiveFloat = 1e-5  # Adam
    r1: R1Weights = R1Weights()  # gradient penalty by input
    r1_every: PositiveInt = 16  # training steps between penalties (gain times this)
    discriminator: DiscriminatorConfig = DiscriminatorConfig()  # the network; GenHead's design

    def check(self, image_resolution: int, batch: int, processes: int, micro_batch: int) -> None:
        """Raise ConfigError where the settings contradict the run's: sizes, and groups of the minibatch deviation that would be torn."""
        network = self.discriminator
        if network.resolution != image_resolution:
            raise ConfigError(
                f"adversary.discriminator.resolution is {network.resolution}, but the pictures are {image_resolution} px; make it "
                f"{image_resolution}, or train without a discriminator with --losses.adversarial.weight 0"
            )
        if batch % (processes * network.group_size) or micro_batch < network.group_size:
            raise ConfigError(
                f"adversary.discriminator.group_size is {network.group_size}: batches.size {batch} must be a multiple of it times the "
                f"{processes} processes, and micro_batch {micro_batch} no smaller than it; change one of them, or set group_size to 1"
            )


class Shown(NamedTuple):
    """A micro-batch as the discriminator sees it, rendered and true."""

    fake: DiscriminatorParts
    real: DiscriminatorParts  # raw picture and opacity at the rendering resolution of `fake`
    camera: Tensor  # [B, 25] the label of both

    def detach(self) -> Shown:
        return Shown(*(DiscriminatorParts(*(values.detach() for values in parts)) for parts in self[:2]), self.camera)


def show(head: HeadModel, rendered: HeadImages, batch: Batch) -> Shown:
    """What is judged of a micro-batch. Gradients flow into rendered picture, raw picture and opacity."""
    camera, shape, motion = unpack_label(batch.label)
    side = rendered.raw.shape[-1]
    with torch.no_grad():
        correspondence = correspondence_map(head, head.vertices(shape, motion), camera, batch.image.shape[-1])
    fake = DiscriminatorParts(rendered.image, rendered.raw, correspondence, rendered.opacity * 2 - 1)
    opacity = resize_antialias(batch.opacity, side) * 2 - 1
    return Shown(fake, DiscriminatorParts(batch.image, resize_antialias(batch.image, side), correspondence, opacity), camera.label())


class Adversary:
    """The discriminator and its optimiser. Its parameters take gradients in its own step alone."""

    def __init__(
        self,
        config: AdversaryConfig,
        seed: int,
        generator: Path,  # folder of the exported generator, for `begin`
        start_from: Path | None = None,  # folder of the exported reconstructor that the run goes on from, for `begin`
        device: torch.device | str = "cpu",
    ) -> None:
        """Random weights."""
        self.config, self._generator, self._start_from = config, generator, start_from
        with weights_drawn_from(torch_generator(seed, "reconstructor", "discriminator")):
            self.network = Discriminator(config.discriminator).to(device).requires_grad_(False)
        self.optimizer = lazy_adam(self.network.parameters(), config.learning_rate, config.r1_every, config.betas, config.epsilon)

    def begin(self) -> None:
        """Take the discriminator of `start_from` if that was exported with one, else the generator's if `warm_start` says so.

        Raises AssetError if the generator was exported without one or a file is damaged, ConfigError if it is of other settings.
        """
        onward = self._start_from and self._start_from / DISCRIMINATOR_FOLDER
        if onward and (onward.is_dir() or not onward.parent.is_dir()):  # an export that is gone is not one without a discriminator
            folder, remedy = onward, "--start_from None"
        elif self.config.warm_start:
            folder, remedy = self._generator / DISCRIMINATOR_FOLDER, "--adversary.warm_start false"
        else:
            return
        weights, exported = load_exported(folder, DiscriminatorExport, DISCRIMINATOR_KIND)
        if exported.discriminator != self.config.discriminator:
            raise ConfigError(
                f"{folder} has other settings than adversary.discriminator; take them from its config.yaml, or begin at random with "
                f"{remedy}"
            )
        fill_weights(self.network, weights, str(folder))

    def loss(self, shown: Shown) -> Tensor:
        """softplus(-D(fake)), the batch mean: the reconstructor's term before its weight."""
        return generator_loss(self.network(shown.fake.stack(), shown.camera))

    def step(self, shown: list[tuple[Shown, float]], number: int, process: Process) -> dict[str, float]:
        """One update from this process's micro-batches, each with its share of the process's samples; with the penalty, two.

        number: of the training step; penalties come in every `r1_every`-th. There is no update by what is not finite. Returns means over
        all processes for the log.
        """
        self.network.requires_grad_(True)
        sums: dict[str, Tensor] = {}
        for seen, share in shown:
            fake, real = (self.network(parts.stack(), seen.camera) for parts in (seen.fake, seen.real))
            loss = discriminator_loss(fake, real)
            (loss * share).backward()
            values = {"adversarial": loss, "fake_logits": fake.mean(), "real_logits": real.mean(), "real_signs": real.sign().mean()}
            _add(sums, values, share)
        scalars = self._update(sums, "adversarial", process)
        if number % self.config.r1_every == 0:
            sums = {}
            for seen, share in shown:
                inputs = DiscriminatorParts(*(values.detach().requires_grad_(True) for values in seen.real))
                logits = self.network(inputs.stack(), seen.camera)
                penalty = r1_penalty(logits, inputs, self.config.r1) * self.config.r1_every
                (penalty * share).backward()
                _add(sums, {"r1": penalty}, share)
            scalars |= self._update(sums, "r1", process)
        self.network.requires_grad_(False)
        return scalars

    def _update(self, sums: dict[str, Tensor], loss: str, process: Process) -> dict[str, float]:
        """One step of the optimiser unless `loss` is not finite. Returns the means over all processes under their names in logs."""
        means = mean_scalars(sums, process.device)
        average_gradients(self.network.parameters())
        if math.isfinite(means[loss]):
            sanitise_gradients(self.network.parameters())
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return {f"discriminator/{name}": value for name, value in means.items()}

    def pack(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and JSON state for a checkpoint."""
        tensors, state = pack_optimizer(self.optimizer, _OPTIMIZER)
        return tensors | {f"discriminator/{name}": value for name, value in self.network.state_dict().items()}, {_OPTIMIZER: state}

    def restore(self, saved: Checkpoint) -> None:
        """Put back what `pack` took; a run whose end was before the term's beginning saved nothing of it, and begins now."""
        weights = part(saved.tensors, "discriminator/")
        if weights:
            fill_weights(self.network, weights, str(saved.folder))
            unpack_optimizer(self.optimizer, _OPTIMIZER, saved.tensors, saved.state[_OPTIMIZER])
        else:
            self.begin()

    def export(self, folder: Path, images_seen: int, half: bool) -> None:
        """Write the discriminator into `folder`, an exported reconstructor's, for `begin` of a run that goes on from there."""
        settings = DiscriminatorExport(self.config.discriminator)
        export_model(folder / DISCRIMINATOR_FOLDER, self.network.state_dict(), settings, DISCRIMINATOR_KIND, images_seen, half=half)


def _add(sums: dict[str, Tensor], values: dict[str, Tensor], share: float) -> None:
    for name, value in values.items():
        sums[name] = sums.get(name, 0.0) + value.detach() * share
