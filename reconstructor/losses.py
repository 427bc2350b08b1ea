"""The reconstruction losses with exact labels (Portrait4D, arXiv:2311.18729, eq. 4; weights and ranges of portrait4d, section 6.8).

Every term compares a rendered head with the generator's own rendering of the same head: pictures, features, tri-plane features at
points, depth and opacity. The perceptual and identity terms are in `frozen_networks.py`, the adversarial one in `adversary.py`.

Deliberate differences from the source. The target of foreground features is the generator's foreground before the background is
added. The target of foreground RGB is what the raw target leaves in front of the background, raw - (1 - opacity) * background, kept
between 0 and the opacity, as every rendered foreground is: targets that are one composite, and no label of its own. There, both are
composite times opacity, which mixes background into every half-covered pixel. Density smoothness, every 16 steps, is added to the other
terms of that step instead of taking a step of its own, so Adam's rates need no correction for more steps (there 16/17 of each).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from datagen.labels import label_of
from head3d.networks.resample import resize_antialias
from head3d.rendering import HeadImages
from head3d.run.config import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from head3d.run.errors import ConfigError
from head3d.run.seeding import Draws, normal, uniform
from reconstructor.batches import Batch

# (identity-shaped, driven planes at points [B, N, 3]) -> features [B, N, C] or raw density [B, N]
PlaneProbe = Callable[[Tensor], Tensor]


@dataclasses.dataclass(frozen=True)
class TermConfig:
    """Weight of one loss term and the training images during which it counts."""

    weight: NonNegativeFloat = 1.0  # 0 turns the term off; its labels are then not read
    since: NonNegativeInt = 0  # images seen from which it counts
    until: PositiveInt | None = None  # images seen from which it no longer counts; None = to the end

    def active(self, images_seen: int) -> bool:
        return self.weight > 0 and self.since <= images_seen and (self.until is None or images_seen < self.until)


@dataclasses.dataclass(frozen=True)
class SmoothnessConfig:
    """Density smoothness of the driven tri-planes (portrait4d, sections 3 and 6.8)."""

    weight: NonNegativeFloat = 0.25  # times `every`, in the steps in which it runs; 0 turns it off
    every: PositiveInt = 16  # training steps between two uses
    points: PositiveInt = 1000  # a sample, uniform in the box (published: in [-1, 1]^3, mostly outside of it)
    jitter: PositiveFloat = 0.0052  # standard deviation of the neighbour, scene units (0.004 of the box side)


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """Weights of eq. 4. Defaults are the published run."""

    image: TermConfig = TermConfig(1.0)  # L1 on final picture, raw picture, foreground RGB, background RGB (sum of four)
    perceptual: TermConfig = TermConfig(1.0)  # distance by a frozen network on the same four
    features: TermConfig = TermConfig(1.0, until=400_000)  # L1 on foreground features + L1 on background features
    points: TermConfig = TermConfig(0.1, until=400_000)  # L1 on mean-plane features at the stored points
    depth: TermConfig = TermConfig(1.0, until=400_000)  # L1 on ray distance (scene units) times the true opacity
    opacity: TermConfig = TermConfig(0.3)  # L1 on opacity in [-1, 1]
    identity: TermConfig = TermConfig(1.0, since=400_000)  # 1 - cosine of a frozen network's embeddings of the final pictures
    adversarial: TermConfig = TermConfig(0.01, since=1_000_000)  # softplus(-D(fake)); the discriminator trains while this counts
    smoothness: SmoothnessConfig = SmoothnessConfig()


# What each term compares with: members of a target frame, as `ShardDataset.read` names them. {view} is the target's view.
TERM_MEMBERS: dict[str, tuple[str, ...]] = {
    "image": ("opacity", "background"),
    "perceptual": ("opacity", "background"),
    "features": ("foreground", "identity.background"),
    "points": ("points", "point_features"),
    "depth": ("depth", "opacity"),
    "opacity": ("opacity",),
    "identity": (),
    "adversarial": ("opacity",),
}


def members_needed(config: LossConfig, images_seen: int) -> frozenset[str]:
    """Label members that the terms active at `images_seen` compare with (the picture itself is always read)."""
    terms = [term for term in TERM_MEMBERS if getattr(config, term).active(images_seen)]
    return frozenset(member for term in terms for member in TERM_MEMBERS[term])


def check_labels(config: LossConfig, available: Mapping[str, int], frames: int, where: str) -> list[str]:
    """Refuse to start if a term that will ever count has no labels; a sentence for each term that has them for some frames only.

    available: how many of the `frames` training frames have each member.
    Raises ConfigError naming the term, the member, its label and the remedy.
    """
    notes = []
    for term, members in TERM_MEMBERS.items():
        settings: TermConfig = getattr(config, term)
        if settings.weight == 0 or not members:
            continue
        fewest = min(members, key=lambda member: available.get(member, 0))
        count = available.get(fewest, 0)
        if count == 0:
            raise ConfigError(
                f"{where}: the loss losses.{term} compares with the member '{fewest}', but none of the {frames} training frames has it; "
                f"generate the shards with the label {label_of(fewest)} (--render.labels, --labels_share), or switch the term off with "
                f"--losses.{term}.weight 0"
            )
        if count < frames:
            span = "to the end" if settings.until is None else f"to {settings.until}"
            notes.append(f"losses.{term}: from {settings.since} images {span}, targets are the {count} of {frames} frames with '{fewest}'")
    return notes


def _l1(value: Tensor, target: Tensor) -> Tensor:
    assert value.shape == target.shape, f"loss compares {tuple(value.shape)} with {tuple(target.shape)}"
    return (value - target).abs().mean()


def labels_at(batch: Batch, resolution: int) -> Batch:
    """The batch with its label maps resized to R x R rays (bilinear), as published for opacity and background once R has grown."""
    maps = {name: getattr(batch, name) for name in ("opacity", "depth", "foreground", "background", "background_features")}
    resized = {name: resize_antialias(values, resolution) for name, values in maps.items() if values is not None}
    return dataclasses.replace(batch, **resized)


def picture_pairs(rendered: HeadImages, batch: Batch) -> dict[str, tuple[Tensor, Tensor]]:
    """The four pictures that eq. 4 compares, rendered and true, in [-1, 1]: final [B, 3, S, S]; raw, foreground, background [B, 3, R, R].

    The true foreground is raw - (1 - opacity) * background in [0, 1], between 0 and the opacity.
    """
    raw = resize_antialias(batch.image, rendered.raw.shape[-1])
    foreground = (raw + 1) / 2 - (1 - batch.opacity) * (batch.background + 1) / 2
    foreground = torch.minimum(foreground.clamp_min(0), batch.opacity)  # super-resolution changes empty pixels too
    return {
        "final": (rendered.image, batch.image),
        "raw": (rendered.raw, raw),
        "foreground": (rendered.foreground[:, :3] * 2 - 1, foreground * 2 - 1),
        "background": (rendered.background[:, :3], batch.background),
    }


def reconstruction_losses(
    config: LossConfig,
    rendered: HeadImages,
    batch: Batch,
    point_features: PlaneProbe,  # features of the driven planes at posed points, after the neck stage
    images_seen: int,
) -> dict[str, Tensor]:
    """The active terms, each already multiplied by its weight; their sum is what training minimises. Means over the batch.

    The labels must have the rendering resolution R of `rendered` (the raw target is the picture resized to R with antialiasing).
    """
    terms: dict[str, Tensor] = {}
    if config.image.active(images_seen):
        for name, (picture, truth) in picture_pairs(rendered, batch).items():
            terms[f"image_{name}"] = config.image.weight * _l1(picture, truth)
    if config.features.active(images_seen):
        foreground = 2 * _l1(rendered.foreground, batch.foreground)
        terms["features"] = config.features.weight * (foreground + _l1(rendered.background, batch.background_features))
    if config.points.active(images_seen):
        terms["points"] = config.points.weight * _l1(point_features(batch.points), batch.point_features)
    if config.depth.active(images_seen):
        terms["depth"] = config.depth.weight * ((rendered.depth - batch.depth).abs() * batch.opacity).mean()
    if config.opacity.active(images_seen):
        terms["opacity"] = config.opacity.weight * 2 * _l1(rendered.opacity, batch.opacity)
    return terms


def smoothness_loss(
    config: SmoothnessConfig,
    raw_density: PlaneProbe,  # raw density [B, N] of the driven planes at points of the space without neck rotation
    planes: Tensor,  # [B, ...]: how many samples, on which device
    box_side: float,  # scene units
    draws: Draws,
) -> Tensor:
    """weight * every * mean |density(x) - density(x + jitter)| with x uniform in the box (portrait4d, section 3)."""
    size = (len(planes), config.points, 3)
    points = (uniform(size, draws, planes) - 0.5) * box_side
    step = normal(size, draws, planes) * config.jitter
    densities = raw_density(torch.cat([points, points + step], dim=1))
    here, there = densities.split(config.points, dim=1)
    return config.weight * config.every * (here - there).abs().mean()
