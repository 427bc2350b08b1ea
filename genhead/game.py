"""The two players of GenHead's training, their optimisers and one step of each (portrait4d, section 3).

Every draw comes from a generator keyed by (seed, phase, images seen) or (seed, phase, images seen, number in the batch), so a resumed
run makes the draws of an uninterrupted one without any random state on disk, and the number of processes and of micro-batches
changes no result beyond the rounding of sums: conditions, latents and the neighbour swap belong to the whole batch, ray jitter, noise
and smoothness points to one sample each, and a micro-batch holds whole groups of the minibatch deviation (`split_batch`).
"""

from __future__ import annotations

import copy
import dataclasses
from typing import NamedTuple

import torch
from torch import Tensor

from genhead.autoencoder import AutoencoderConfig, PortraitEncoder, divergence, draw_rays, feature_weight, ray_loss
from genhead.generator import GenHead, GenHeadConfig, GenHeadOutput
from genhead.losses import (
    DiscriminatorParts,
    RegularizerConfig,
    density_smoothness,
    fake_parts,
    mesh_surface,
    part_regularizers,
    real_parts,
)
from genhead.mesh_truth import mesh_view
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
from head3d.cameras import Camera
from head3d.deformation import PosedHead
from head3d.head_model import HeadModel
from head3d.labels import HeadLabel, unpack_label
from head3d.networks.discriminator import Discriminator, DiscriminatorConfig, split_batch
from head3d.run.config import Fraction, NonNegativeFloat, PositiveFloat, PositiveInt
from head3d.run.distributed import Process, average_gradients, average_tensors
from head3d.run.seeding import normal, torch_generator, weights_drawn_from


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
    autoencoder: AutoencoderConfig = AutoencoderConfig()  # portraits rendered again; not published, for trainings of few images


class Conditions(NamedTuple):
    """What fakes of one micro-batch are made from."""

    label: HeadLabel  # camera, shape, motion of random portraits (never recombined in training), neck zero
    z: Tensor  # [B, z_dim]
    condition_camera: Tensor  # [B, 25], the neighbour's for some samples
    condition_shape: Tensor  # [B, 300], the neighbour's together with the camera
    draws: list[torch.Generator]  # one for each sample: noise, ray jitter, smoothness points


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
        process: Process,
    ) -> None:
        self.config, self.regularizers, self.seed, self.device = config, regularizers, seed, process.device
        with weights_drawn_from(torch_generator(seed, "genhead", "weights")):
            self.generator = GenHead(model, head).to(self.device)
            self.discriminator = Discriminator(discriminator).to(self.device)
            encodes = config.autoencoder.weight > 0
            self.encoder = PortraitEncoder(discriminator, model.z_dim).to(self.device) if encodes else None
        shared = {id(self.generator.head_model): self.generator.head_model}
        self.averaged = copy.deepcopy(self.generator, shared).eval().requires_grad_(False)
        self.ema = Ema(self.averaged, half_life_images=config.ema_images, ramp=config.ema_ramp)
        self.optimizers = {
            "generator": lazy_adam(self.generator.parameters(), config.generator_rate, config.smoothness_every),
            "discriminator": lazy_adam(self.discriminator.parameters(), config.discriminator_rate, config.r1_every),
        }
        if self.encoder is not None:
            both = [*self.generator.parameters(), *self.encoder.parameters()]
            self.optimizers["autoencoder"] = torch.optim.Adam(both, config.autoencoder.rate, (0.9, 0.99))
        parts = split_batch(config.batch, process.world_size * config.accumulation, discriminator.group_size)
        self.parts = parts.chunk(process.world_size)[process.rank]  # [accumulation, samples] numbers in the batch, of this process

    def networks(self) -> dict[str, torch.nn.Module]:
        """What a checkpoint holds, by name."""
        networks = {"generator": self.generator, "averaged": self.averaged, "discriminator": self.discriminator}
        return networks if self.encoder is None else networks | {"encoder": self.encoder}

    # -- one step ---------------------------------------------------------------------------------------------------------

    def step(self, labels: Tensor, real: tuple[Tensor, Tensor, Tensor], images_seen: int, step: int) -> dict[str, Tensor]:
        """Gmain, Greg every `smoothness_every` steps, Dmain, Dreg every `r1_every` steps: optimiser steps of their own, as published.

        labels [N, 437] of the whole set, real = (image [B, 3, S, S] in [-1, 1], matte [B, 1, S, S] in [0, 1], label [B, 437]) of
        the samples self.parts of the batch, in that order. Returns scalars for the log, means over this process's samples.
        """
        batches = list(zip(*(tensor.to(self.device).chunk(len(self.parts)) for tensor in real), strict=True))
        scalars: dict[str, Tensor] = {}
        if self.encoder is not None:
            scalars |= self.autoencoder_step(labels, batches, images_seen)
        plays = self.encoder is None or images_seen >= self.config.autoencoder.alone_until
        if plays:
            generated, fakes = self.generator_step(labels, images_seen)
            scalars |= generated
        if self.regularizers.smoothness and step % self.config.smoothness_every == 0:
            scalars |= self.smoothness_step(labels, images_seen)
        if plays:
            scalars |= self.discriminator_step(labels, batches, images_seen, fakes if self.config.reuse_fakes else None)
        if plays and step % self.config.r1_every == 0:
            scalars |= self.penalty_step(batches, images_seen)
        self.ema.update(self.generator, images_seen, self.config.batch)
        return scalars

    def generator_step(self, labels: Tensor, images_seen: int) -> tuple[dict[str, Tensor], list[tuple[Tensor, Tensor]]]:
        """One update of the generator (Gmain), and of its running mean of w by the whole batch.

        Returns scalars and, for each micro-batch, the discriminator's input [B, 10, S, S] (detached) with its camera labels [B, 25].
        """
        scalars, fakes = _Scalars("generator", len(self.parts)), []
        sigma = self._blur(images_seen)
        mapping = self.generator.mapping
        mean_w = torch.zeros_like(mapping.w_average)
        self.discriminator.requires_grad_(False)
        self.optimizers["generator"].zero_grad(set_to_none=True)
        for members in self.parts:
            conditions = self.conditions(labels, members, images_seen, "generator")
            ws, output, posed, fake = self._fake(conditions)
            camera = conditions.label.camera.label()
            fakes.append((fake.detach(), camera))
            mean_w += ws[:, 0].detach().mean(0) / len(self.parts)
            logits = self.discriminator(blur_images(fake, sigma), camera)
            losses = {"adversarial": generator_loss(logits)} | self._regularize(output, posed, conditions.label.camera)
            (sum(losses.values()) / len(self.parts)).backward()
            scalars.add(losses | {"logits": logits.mean(), "opacity": output.images.opacity.mean()})
        self._update("generator", self.generator)
        average_tensors([mean_w])
        mapping.move_average(mean_w)
        self.discriminator.requires_grad_(True)
        return scalars.values, fakes

    def smoothness_step(self, labels: Tensor, images_seen: int) -> dict[str, Tensor]:
        """One update of the generator by the density smoothness of fresh planes (Greg), times the steps between two of them."""
        scalars = _Scalars("generator", len(self.parts))
        self.optimizers["generator"].zero_grad(set_to_none=True)
        for members in self.parts:
            conditions = self.conditions(labels, members, images_seen, "smoothness")
            _, planes = self._planes(conditions)
            loss = density_smoothness(self.generator, planes, self.regularizers, conditions.draws) * self.config.smoothness_every
            (loss / len(self.parts)).backward()
            scalars.add({"smoothness": loss})
        self._update("generator", self.generator)
        return scalars.values

    def autoencoder_step(self, labels: Tensor, real: list[tuple[Tensor, Tensor, Tensor]], images_seen: int) -> dict[str, Tensor]:
        """One update of generator and encoder by the step's portraits, encoded and rendered again with their own shape, motion, camera.

        Half of the planes are conditioned on another portrait's camera, so that they do not depend on the view.
        """
        assert self.encoder is not None
        config, model = self.config.autoencoder, self.generator
        scalars = _Scalars("autoencoder", len(self.parts))
        self.optimizers["autoencoder"].zero_grad(set_to_none=True)
        for members, (image, matte, label) in zip(self.parts, real, strict=True):
            draws = [torch_generator(self.seed, "autoencoder", images_seen, number, device=self.device) for number in members.tolist()]
            camera, shape, motion = unpack_label(label)
            posed = model.pose(shape, motion.without_neck())
            mean, log_variance = self.encoder(image)
            z = mean + normal(mean.shape, draws, mean) * (log_variance / 2).exp()
            ws = model.map(z, self._shown_cameras(labels, label, images_seen, members), shape)
            planes = model.planes(ws, noise="random", generator=draws)
            weight = feature_weight(model.head_model, posed.vertices_posed, camera, model.config.render_resolution, config.features)
            chosen = draw_rays(weight, config.rays, draws)
            output = model.render_chosen(planes, model.background(z), posed, camera, chosen, generator=draws)
            rays = ray_loss(output.images, real_parts(model, image, matte, posed.vertices_posed, camera), chosen)
            losses = {"rays": config.weight * rays, "divergence": config.weight * config.divergence * divergence(mean, log_variance)}
            losses |= self._regularize(output, posed, camera, chosen)
            (sum(losses.values()) / len(self.parts)).backward()
            scalars.add(losses)
        self._update("autoencoder", torch.nn.ModuleList([model, self.encoder]))
        return scalars.values

    def discriminator_step(
        self,
        labels: Tensor,
        real: list[tuple[Tensor, Tensor, Tensor]],  # by micro-batch
        images_seen: int,
        fakes: list[tuple[Tensor, Tensor]] | None = None,  # by micro-batch; None makes fresh ones
    ) -> dict[str, Tensor]:
        """One update of the discriminator (Dmain)."""
        scalars, sigma = _Scalars("discriminator", len(self.parts)), self._blur(images_seen)
        self.optimizers["discriminator"].zero_grad(set_to_none=True)
        for index, portraits in enumerate(real):
            fake, camera = fakes[index] if fakes else self._fresh_fakes(labels, self.parts[index], images_seen)
            fake_logits = self.discriminator(blur_images(fake, sigma), camera)
            seen, real_camera = self._real(*portraits)
            real_logits = self.discriminator(blur_images(seen.stack(), sigma, include_raw=True), real_camera)
            loss = discriminator_loss(fake_logits, real_logits)
            (loss / len(self.parts)).backward()
            signs = {"fake_logits": fake_logits.mean(), "real_logits": real_logits.mean(), "real_signs": real_logits.sign().mean()}
            scalars.add({"adversarial": loss} | signs)
        self._update("discriminator", self.discriminator)
        return scalars.values

    def penalty_step(self, real: list[tuple[Tensor, Tensor, Tensor]], images_seen: int) -> dict[str, Tensor]:
        """One update of the discriminator by its gradient penalty on the step's portraits (Dreg), times the steps between two of them."""
        scalars, sigma = _Scalars("discriminator", len(self.parts)), self._blur(images_seen)
        self.optimizers["discriminator"].zero_grad(set_to_none=True)
        for portraits in real:
            seen, camera = self._real(*portraits)
            seen = DiscriminatorParts(*(item.detach().requires_grad_(True) for item in seen))
            logits = self.discriminator(blur_images(seen.stack(), sigma, include_raw=True), camera)
            loss = r1_penalty(logits, seen, self.config.r1) * self.config.r1_every
            (loss / len(self.parts)).backward()
            scalars.add({"r1": loss})
        self._update("discriminator", self.discriminator)
        return scalars.values

    # -- its parts --------------------------------------------------------------------------------------------------------

    def conditions(self, labels: Tensor, members: Tensor, images_seen: int, phase: str) -> Conditions:
        """Random portraits' (camera, shape, motion) and fresh latents; conditions of some samples come from their neighbour.

        Drawn for the whole batch, of which the samples `members` [B] are returned. The neighbour of sample n is n - 1 of the whole
        batch; the share of swapped samples falls linearly from swap_start to swap_end over swap_images (portrait4d, section 1).
        """
        config = self.config
        draws = torch_generator(self.seed, phase, images_seen)
        chosen = torch.randint(labels.shape[0], (config.batch,), generator=draws)
        share = config.swap_start + (config.swap_end - config.swap_start) * min(images_seen / config.swap_images, 1.0)
        swap = torch.rand(config.batch, generator=draws) < share
        z = torch.randn(config.batch, self.generator.config.z_dim, generator=draws)
        shown_as = torch.where(swap, chosen.roll(1), chosen)
        label = unpack_label(labels[chosen[members]].to(self.device))
        condition = unpack_label(labels[shown_as[members]].to(self.device))
        return Conditions(
            label._replace(motion=label.motion.without_neck()),
            z[members].to(self.device),
            condition_camera=condition.camera.label(),
            condition_shape=condition.shape,
            draws=[torch_generator(self.seed, phase, images_seen, number, device=self.device) for number in members.tolist()],
        )

    def _shown_cameras(self, labels: Tensor, label: Tensor, images_seen: int, members: Tensor) -> Tensor:
        """Camera labels [B, 25] that planes of portraits [B, 437] are conditioned on: their own, or by half any other portrait's."""
        draws = torch_generator(self.seed, "autoencoder cameras", images_seen)
        others = torch.randint(labels.shape[0], (self.config.batch,), generator=draws)[members]
        swap = torch.rand(self.config.batch, generator=draws)[members] < 0.5
        other = labels[others].to(label.device)
        return torch.where(swap.to(label.device)[:, None], other, label)[:, :25]

    def _regularize(self, output: GenHeadOutput, posed: PosedHead, camera: Camera, chosen: Tensor | None = None) -> dict[str, Tensor]:
        """The regularisers of rendered heads, weighted; `chosen` [B, n] if they are strips of those rays."""
        losses = part_regularizers(output, self.regularizers)
        if self.regularizers.surface:
            mesh = mesh_view(self.generator.head_model, posed.vertices_posed, camera, self.generator.config.render_resolution)
            if chosen is not None:
                mesh = mesh.strip(chosen)
            losses["surface"] = mesh_surface(output.images, mesh, self.regularizers)
        return losses

    def _planes(self, conditions: Conditions) -> tuple[Tensor, Tensor]:
        """Styles [B, L, w_dim] and planes [B, 2, 3, C, P, P]."""
        ws = self.generator.map(conditions.z, conditions.condition_camera, conditions.condition_shape)
        return ws, self.generator.planes(ws, noise="random", generator=conditions.draws)

    def _fake(self, conditions: Conditions) -> tuple[Tensor, GenHeadOutput, PosedHead, Tensor]:
        """Styles, output, posed heads and discriminator input [B, 10, S, S] of generated pictures."""
        model, label = self.generator, conditions.label
        ws, planes = self._planes(conditions)
        posed = model.pose(label.shape, label.motion)
        output = model.render(planes, model.background(conditions.z), posed, label.camera, generator=conditions.draws)
        return ws, output, posed, fake_parts(model, output, posed.vertices_posed, label.camera).stack()

    @torch.no_grad()
    def _fresh_fakes(self, labels: Tensor, members: Tensor, images_seen: int) -> tuple[Tensor, Tensor]:
        conditions = self.conditions(labels, members, images_seen, "discriminator")
        return self._fake(conditions)[-1], conditions.label.camera.label()

    @torch.no_grad()
    def _real(self, image: Tensor, matte: Tensor, label: Tensor) -> tuple[DiscriminatorParts, Tensor]:
        camera, shape, motion = unpack_label(label)
        vertices = self.generator.head_model.vertices(shape, motion.without_neck())
        return real_parts(self.generator, image, matte, vertices, camera), camera.label()

    def _blur(self, images_seen: int) -> float:
        return blur_sigma(images_seen, self.config.blur_sigma, self.config.blur_images)

    def _update(self, name: str, network: torch.nn.Module) -> None:
        average_gradients(network.parameters())
        sanitise_gradients(network.parameters())
        self.optimizers[name].step()


class _Scalars:
    """Means over micro-batches; they stay on their device until the log reads them all at once."""

    def __init__(self, prefix: str, parts: int) -> None:
        self.prefix, self.parts, self.values = prefix, parts, {}

    def add(self, values: dict[str, Tensor]) -> None:
        for name, value in values.items():
            key = f"{self.prefix}/{name}"
            self.values[key] = self.values.get(key, 0.0) + value.detach() / self.parts
