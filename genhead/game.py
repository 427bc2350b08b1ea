"""The two players of GenHead's training, their optimisers and one step of each (portrait4d, section 3).

Every draw comes from a generator keyed by (seed, phase, rank, images seen), so a resumed run makes the draws of an uninterrupted
one without any random state on disk.
"""

from __future__ import annotations

import copy
import dataclasses
from typing import NamedTuple

import torch
from torch import Tensor

from genhead.generator import GenHead, GenHeadConfig, GenHeadOutput
from genhead.losses import DiscriminatorParts, RegularizerConfig, density_smoothness, fake_parts, part_regularizers, real_parts
from head3d.adversarial import (
    Ema,
    R1Weights,
    blur_images,
    blur_sigma,
    discriminator_loss,
    generator_loss,
    lazy_adam,
    r1_penalty,
    sanitise_gradients,
)
from head3d.head_model import HeadModel
from head3d.labels import HeadLabel, unpack_label
from head3d.networks.discriminator import Discriminator, DiscriminatorConfig
from head3d.run.config import Fraction, NonNegativeFloat, PositiveFloat, PositiveInt
from head3d.run.distributed import average_gradients, average_tensors
from head3d.run.seeding import torch_generator, weights_drawn_from


@dataclasses.dataclass(frozen=True)
class GameConfig:
    """How the game is played. Defaults are the published run."""

    batch: PositiveInt = 32  # pictures per step over all processes
    accumulation: PositiveInt = 1  # micro-batches a step is split into, to save memory
    generator_rate: PositiveFloat = 0.0025  # Adam learning rate of the generator
    discriminator_rate: PositiveFloat = 0.002  # Adam learning rate of the discriminator
    swap_start: Fraction = 1.0  # share of samples conditioned on their neighbour, at the start
    swap_end: Fraction = 0.5  # the same after swap_images
    swap_images: PositiveInt = 1_000_000  # images over which the share falls linearly
    blur_sigma: NonNegativeFloat = 10.0  # pixels; blur of what the discriminator sees, at the start
    blur_images: PositiveInt = 200_000  # images over which the blur falls linearly to none
    r1: R1Weights = R1Weights()  # gradient penalty by input
    r1_every: PositiveInt = 16  # discriminator steps between penalties (gain times this)
    smoothness_every: PositiveInt = 4  # generator steps between density smoothness terms (gain times this)
    reuse_fakes: bool = False  # the discriminator judges the generator step's pictures instead of fresh ones: a third less work
    ema_images: PositiveFloat = 10_000.0  # half-life of the averaged weights, images
    ema_ramp: NonNegativeFloat = 0.05  # half-life is at most this share of the images seen; 0 = no ramp


class Conditions(NamedTuple):
    """What fakes of one micro-batch are made from."""

    label: HeadLabel  # camera, shape, motion of random portraits (never recombined in training), neck zero
    z: Tensor  # [B, z_dim]
    condition_camera: Tensor  # [B, 25], swapped with the neighbour for some samples
    condition_shape: Tensor  # [B, 300], swapped together with the camera


class Game:
    """Generator, discriminator, averaged generator and both optimisers."""

    def __init__(
        self,
        config: GameConfig,
        model: GenHeadConfig,
        discriminator: DiscriminatorConfig,
        regularizers: RegularizerConfig,
        head: HeadModel,
        seed: int,
        device: torch.device,
    ) -> None:
        self.config, self.regularizers, self.seed, self.device = config, regularizers, seed, device
        with weights_drawn_from(torch_generator(seed, "genhead", "weights")):
            self.generator = GenHead(model, head).to(device)
            self.discriminator = Discriminator(discriminator).to(device)
        shared = {id(self.generator.head_model): self.generator.head_model}
        self.averaged = copy.deepcopy(self.generator, shared).eval().requires_grad_(False)
        self.ema = Ema(self.averaged, half_life_images=config.ema_images, ramp=config.ema_ramp)
        self.optimizers = {
            "generator": lazy_adam(self.generator.parameters(), config.generator_rate, config.smoothness_every),
            "discriminator": lazy_adam(self.discriminator.parameters(), config.discriminator_rate, config.r1_every),
        }

    def networks(self) -> dict[str, torch.nn.Module]:
        """What a checkpoint holds, by name."""
        return {"generator": self.generator, "averaged": self.averaged, "discriminator": self.discriminator}

    # -- one step ---------------------------------------------------------------------------------------------------------

    def step(self, labels: Tensor, real: tuple[Tensor, Tensor, Tensor], images_seen: int, step: int, rank: int) -> dict[str, float]:
        """Gmain (with the lazy smoothness term), then Dmain (with the lazy gradient penalty).

        The published loop takes the lazy terms in optimiser steps of their own, with fresh draws; here they join the main step, which
        saves a rendering and a pass of the discriminator. The optimisers keep the published correction of rate and decays.

        labels [N, 437] of the whole set, real = (image [B, 3, S, S] in [-1, 1], matte [B, 1, S, S] in [0, 1], label [B, 437]) of
        this process. Returns scalars for the log.
        """
        scalars, fakes = self.generator_step(labels, real[0].shape[0], images_seen, step, rank)
        scalars |= self.discriminator_step(labels, real, images_seen, step, rank, fakes if self.config.reuse_fakes else None)
        self.ema.update(self.generator, images_seen, self.config.batch)
        return scalars

    def generator_step(
        self, labels: Tensor, batch: int, images_seen: int, step: int, rank: int
    ) -> tuple[dict[str, float], list[tuple[Tensor, Tensor]]]:
        """One update of the generator; the smoothness term joins every `smoothness_every` steps.

        Returns scalars and, for each micro-batch, the discriminator's input [B, 10, S, S] (detached) with its camera labels [B, 25].
        """
        config, scalars, fakes = self.config, _Scalars(self.config.accumulation), []
        sigma = blur_sigma(images_seen, config.blur_sigma, config.blur_images)
        self.discriminator.requires_grad_(False)
        self.optimizers["generator"].zero_grad(set_to_none=True)
        for part in range(config.accumulation):
            draws = torch_generator(self.seed, "generator", rank, images_seen, part)
            conditions = self.conditions(labels, batch // config.accumulation, images_seen, draws)
            planes, output, fake, camera = self._fake(conditions, draws, update_average=True)
            fakes.append((fake.detach(), camera))
            logits = self.discriminator(blur_images(fake, sigma), camera)
            losses = {"adversarial": generator_loss(logits)} | part_regularizers(output, self.regularizers)
            if self.regularizers.smoothness and step % config.smoothness_every == 0:
                smoothness = density_smoothness(self.generator, planes, self.regularizers, draws)
                losses["smoothness"] = smoothness * config.smoothness_every
            (sum(losses.values()) / config.accumulation).backward()
            scalars.add("generator", losses | {"logits": logits.mean(), "opacity": output.images.opacity.mean()})
        self._update("generator", self.generator)
        average_tensors([self.generator.mapping.w_average])
        self.discriminator.requires_grad_(True)
        return scalars.values, fakes

    def discriminator_step(
        self,
        labels: Tensor,
        real: tuple[Tensor, Tensor, Tensor],
        images_seen: int,
        step: int,
        rank: int,
        fakes: list[tuple[Tensor, Tensor]] | None = None,  # by micro-batch; None makes fresh ones
    ) -> dict[str, float]:
        """One update of the discriminator; the gradient penalty joins every `r1_every` steps."""
        config, scalars = self.config, _Scalars(self.config.accumulation)
        self.optimizers["discriminator"].zero_grad(set_to_none=True)
        sigma = blur_sigma(images_seen, config.blur_sigma, config.blur_images)
        for part, (image, matte, label) in enumerate(zip(*(tensor.chunk(config.accumulation) for tensor in real), strict=True)):
            fake, camera = fakes[part] if fakes else self._fresh_fakes(labels, image.shape[0], images_seen, rank, part)
            fake_logits = self.discriminator(blur_images(fake, sigma), camera)
            seen, real_camera = self._real(image.to(self.device), matte.to(self.device), label.to(self.device))
            penalize = step % config.r1_every == 0
            seen = DiscriminatorParts(*(item.detach().requires_grad_(penalize) for item in seen))
            real_logits = self.discriminator(blur_images(seen.stack(), sigma, include_raw=True), real_camera)
            losses = {"adversarial": discriminator_loss(fake_logits, real_logits)}
            if penalize:
                losses["r1"] = r1_penalty(real_logits, seen, config.r1) * config.r1_every
            (sum(losses.values()) / config.accumulation).backward()
            signs = {"fake_logits": fake_logits.mean(), "real_logits": real_logits.mean(), "real_signs": real_logits.sign().mean()}
            scalars.add("discriminator", losses | signs)
        self._update("discriminator", self.discriminator)
        return scalars.values

    # -- its parts --------------------------------------------------------------------------------------------------------

    def conditions(self, labels: Tensor, batch: int, images_seen: int, draws: torch.Generator) -> Conditions:
        """Random portraits' (camera, shape, motion) and fresh latents; conditions of some samples come from their neighbour.

        The share of swapped samples falls linearly from swap_start to swap_end over swap_images (portrait4d, section 1).
        """
        config = self.config
        chosen = labels[torch.randint(labels.shape[0], (batch,), generator=draws)].to(self.device)
        label = unpack_label(chosen)
        label = label._replace(motion=label.motion.without_neck())
        share = config.swap_start + (config.swap_end - config.swap_start) * min(images_seen / config.swap_images, 1.0)
        swap = (torch.rand(batch, 1, generator=draws) < share).to(self.device)
        camera = label.camera.label()
        z = torch.randn(batch, self.generator.config.z_dim, generator=draws).to(self.device)
        return Conditions(
            label,
            z,
            condition_camera=torch.where(swap, camera.roll(1, 0), camera),
            condition_shape=torch.where(swap, label.shape.roll(1, 0), label.shape),
        )

    def _fake(
        self, conditions: Conditions, draws: torch.Generator, update_average: bool = False
    ) -> tuple[Tensor, GenHeadOutput, Tensor, Tensor]:
        """Planes, output, discriminator input [B, 10, S, S] and camera label [B, 25] of generated pictures."""
        model, (label, z, camera, shape) = self.generator, conditions
        ws = model.map(z, camera, shape, update_average=update_average)
        planes = model.planes(ws, noise="random", generator=draws)
        posed = model.pose(label.shape, label.motion)
        output = model.render(planes, model.background(z), posed, label.camera, generator=draws)
        return planes, output, fake_parts(model, output, posed.vertices_posed, label.camera).stack(), label.camera.label()

    @torch.no_grad()
    def _fresh_fakes(self, labels: Tensor, batch: int, images_seen: int, rank: int, part: int) -> tuple[Tensor, Tensor]:
        draws = torch_generator(self.seed, "discriminator", rank, images_seen, part)
        return self._fake(self.conditions(labels, batch, images_seen, draws), draws)[2:]

    @torch.no_grad()
    def _real(self, image: Tensor, matte: Tensor, label: Tensor) -> tuple[DiscriminatorParts, Tensor]:
        camera, shape, motion = unpack_label(label)
        vertices = self.generator.head_model.vertices(shape, motion.without_neck())
        return real_parts(self.generator, image, matte, vertices, camera), camera.label()

    def _update(self, name: str, network: torch.nn.Module) -> None:
        average_gradients(network.parameters())
        sanitise_gradients(network.parameters())
        self.optimizers[name].step()


class _Scalars:
    """Means over micro-batches, as plain numbers."""

    def __init__(self, parts: int) -> None:
        self.parts, self.values = parts, {}

    def add(self, prefix: str, values: dict[str, Tensor]) -> None:
        for name, value in values.items():
            key = f"{prefix}/{name}"
            self.values[key] = self.values.get(key, 0.0) + float(value.detach()) / self.parts
