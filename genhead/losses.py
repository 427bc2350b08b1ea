"""Losses of the GenHead game and its regularisers (portrait4d, section 3). All are batch means."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from genhead.generator import GenHead, GenHeadOutput
from genhead.mesh_truth import MeshView
from head3d.cameras import Camera
from head3d.networks.resample import resize_antialias
from head3d.rasterize import correspondence_map
from head3d.rendering import HeadImages, Rendered
from head3d.run.config import NonNegativeFloat, PositiveInt
from head3d.run.seeding import Draws, normal, uniform
from head3d.triplane import sample_planes


@dataclasses.dataclass(frozen=True)
class RegularizerConfig:
    """Weights of the generator's regularisers. Defaults are the published run."""

    head_density: NonNegativeFloat = 10.0  # no head-branch density on eye and mouth rays
    distortion: NonNegativeFloat = 100.0  # compact eyes and mouth (mip-NeRF 360)
    transmittance: NonNegativeFloat = 100.0  # opaque eyes and mouth
    smoothness: NonNegativeFloat = 0.25  # density differences between neighbouring points
    smoothness_points: PositiveInt = 1000  # points per plane set
    smoothness_step: NonNegativeFloat = 0.004  # jitter, as a share of the box side
    surface: NonNegativeFloat = 0.0  # not published: the face's surface lies on the head mesh; for trainings of few images
    surface_slack: NonNegativeFloat = 0.02  # distance that costs nothing, scene units: brows, beard, glasses


class DiscriminatorParts(NamedTuple):
    """The discriminator's four inputs before they are resized and stacked; R1 differentiates by these."""

    image: Tensor  # [B, 3, S, S] in [-1, 1]
    raw: Tensor  # [B, 3, R, R]
    correspondence: Tensor  # [B, 3, S, S]
    opacity: Tensor  # [B, 1, R, R] in [-1, 1]

    def stack(self) -> Tensor:
        """The ten channels [B, 10, S, S]."""
        side = self.image.shape[-1]
        return torch.cat([self.image, resize_antialias(self.raw, side), self.correspondence, resize_antialias(self.opacity, side)], dim=1)


def fake_parts(genhead: GenHead, output: GenHeadOutput, vertices: Tensor, camera: Camera) -> DiscriminatorParts:
    """Discriminator inputs of generated pictures; `vertices` [B, N, 3] are those of the pose they were rendered with."""
    images = output.images
    correspondence = correspondence_map(genhead.head_model, vertices, camera, images.image.shape[-1])
    return DiscriminatorParts(images.image, images.raw, correspondence, images.opacity * 2 - 1)


def real_parts(genhead: GenHead, image: Tensor, matte: Tensor, vertices: Tensor, camera: Camera) -> DiscriminatorParts:
    """Discriminator inputs of portraits: image [B, 3, S, S] in [-1, 1], matte [B, 1, S, S] in [0, 1].

    The raw picture and the matte are reduced to the rendering resolution, as the fakes' are; the correspondence map is rendered
    from the label (stored 8-bit maps made the published training unstable).
    """
    side = genhead.config.render_resolution
    correspondence = correspondence_map(genhead.head_model, vertices, camera, image.shape[-1])
    return DiscriminatorParts(image, resize_antialias(image, side), correspondence, resize_antialias(matte, side) * 2 - 1)


def distortion(weights: Tensor, depths: Tensor) -> Tensor:
    """mip-NeRF 360's distortion per ray (arXiv:2111.12077, eq. 15), [B, R], for weights [B, R, S-1] and edges [B, R, S].

    sum_ij w_i w_j |m_i - m_j| + 1/3 sum_i w_i^2 d_i with midpoints m and widths d, in O(S) by prefix sums because m ascends:
    sum_ij w_i w_j |m_i - m_j| = 2 sum_i w_i (m_i W_<i - (wm)_<i).
    """
    middle = (depths[..., 1:] + depths[..., :-1]) / 2
    width = depths[..., 1:] - depths[..., :-1]
    weighted = weights * middle
    before = torch.cumsum(weights, -1) - weights
    weighted_before = torch.cumsum(weighted, -1) - weighted
    pairs = 2 * (weights * (middle * before - weighted_before)).sum(-1)
    return pairs + (weights.square() * width).sum(-1) / 3


def part_regularizers(output: GenHeadOutput, config: RegularizerConfig) -> dict[str, Tensor]:
    """Keep the head branch out of eye and mouth rays and make those rays compact and opaque.

    head_density: mean softplus(b s_h) M_e + mean softplus(M_m s_h) M_m over all samples;
    distortion, transmittance: mean of the ray quantity times M_e, plus the same for M_m. Means run over all pixels.
    """
    images: HeadImages = output.images
    assert images.eye_mask is not None and images.mouth_mask is not None
    eye, mouth = images.eye_mask.flatten(1), images.mouth_mask.flatten(1)  # [B, R*R]
    losses: dict[str, Tensor] = {}
    if config.head_density:
        density = torch.cat([p.head_density for p in output.passes], dim=2)
        inside = torch.cat([p.inside_eye for p in output.passes], dim=2)
        eyes_term = (F.softplus(inside * density) * eye[..., None]).mean()
        mouth_term = (F.softplus(mouth[..., None] * density) * mouth[..., None]).mean()
        losses["head_density"] = config.head_density * (eyes_term + mouth_term)
    rays: Rendered = images.rays
    if config.distortion:
        spread = distortion(rays.weights, rays.depths)
        losses["distortion"] = config.distortion * ((spread * eye).mean() + (spread * mouth).mean())
    if config.transmittance:
        losses["transmittance"] = config.transmittance * ((rays.transmittance * eye).mean() + (rays.transmittance * mouth).mean())
    return losses


def mesh_surface(images: HeadImages, mesh: MeshView, config: RegularizerConfig) -> Tensor:
    """Keep what a ray shows where the posed mesh is: the mean over the mesh's rays of sum_i w_i d_i + T d_last, times the weight.

    d_i is how far the middle of interval i lies from the mesh along the ray, less the slack; light that hits nothing (T) counts as
    the last sample. On the face and the eyes both sides count; elsewhere (hair, clothing, the open mouth) only what lies behind the
    mesh does, because nothing is seen through it. The published training has no such term: millions of pictures settle the depth,
    thousands do not, and a surface off the mesh is also outside the eye and mouth regions, so that it does not follow the controls.
    """
    assert images.eye_mask is not None
    rays, truth = images.rays, mesh.distance.flatten(1)
    seen = truth.isfinite()
    middles = torch.cat([(rays.depths[..., 1:] + rays.depths[..., :-1]) / 2, rays.depths[..., -1:]], dim=-1)
    behind = middles - torch.where(seen, truth, 0.0)[..., None]
    both_sides = mesh.face.flatten(1) | (images.eye_mask.flatten(1) > 0.5)
    distance = (torch.where(both_sides[..., None], behind.abs(), behind) - config.surface_slack).clamp_min(0)
    spread = (torch.cat([rays.weights, rays.transmittance[..., None]], dim=-1) * distance).sum(-1)
    return config.surface * (spread * seen).sum() / seen.sum().clamp_min(1)


def density_smoothness(genhead: GenHead, planes: Tensor, config: RegularizerConfig, generator: Draws) -> Tensor:
    """L1 between raw densities at random canonical points and at jittered copies, mean over the two plane sets, times the weight.

    Points are uniform in the box. The published code draws them in [-1, 1]^3, most of which lies outside; `published` keeps that.
    Eye and mouth read the same planes, so one evaluation stands for both and counts twice (published: mean over eye, head, mouth).
    """
    box_side = genhead.config.sampling.box_side
    batch, half = planes.shape[0], 1.0 if genhead.config.published else box_side / 2
    size = (batch, config.smoothness_points, 3)
    points = (uniform(size, generator, planes) * 2 - 1) * half
    step = normal(size, generator, planes) * (config.smoothness_step * box_side)
    both = torch.cat([points, points + step], dim=1)
    total = planes.new_zeros(())
    for index, share in ((0, 2 / 3), (1, 1 / 3)):
        density = genhead.decoder(sample_planes(planes[:, index], both, box_side))[1][..., 0]
        here, there = density.chunk(2, dim=1)
        total = total + share * (here - there).abs().mean()
    return config.smoothness * total
