"""Volume rendering along rays: depths, importance sampling, compositing.

A field is any callable; renderers never subclass each other:

    points [B, R, S, 3] world -> FieldSamples(colors [B, R, S, C], raw_density [B, R, S])

`generator=None` renders deterministically (bin centres; importance draws u_i = (i + 0.5) / n), with a generator both passes are
jittered. Equations: portrait4d, section 0 (NeRF, arXiv:2003.08934, with the midpoint rule of EG3D, arXiv:2112.07945).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from head3d.run.config import NonNegativeInt, PositiveFloat
from head3d.run.seeding import Draws, uniform


@dataclasses.dataclass(frozen=True)
class RaySampling:
    """How rays are sampled. Defaults are the published run."""

    depth_samples: NonNegativeInt = 48  # per ray, first pass; at least 2
    importance_samples: NonNegativeInt = 48  # per ray, second pass; 0 turns it off
    box_side: PositiveFloat = 1.3  # scene units; rays run from |z of the origin| - box_side/2 to + box_side/2

    def __post_init__(self) -> None:
        if self.depth_samples < 2:
            raise ValueError(f"depth_samples: expected at least 2 (an interval needs two ends), got {self.depth_samples}")


class FieldSamples(NamedTuple):
    """What a field says about points."""

    colors: Tensor  # [B, R, S, C] colour features in [0, 1]
    raw_density: Tensor  # [B, R, S] before softplus(x - 1)


Field = Callable[[Tensor], FieldSamples]


class Rendered(NamedTuple):
    """One integration along rays."""

    colors: Tensor  # [B, R, C] sum of weights * colours, not divided by the opacity
    depth: Tensor  # [B, R] distance along the unit ray, scene units; `far` where nothing was hit
    transmittance: Tensor  # [B, R] what is left of the light behind the last sample, in [0, 1]
    weights: Tensor  # [B, R, S-1] of the intervals
    depths: Tensor  # [B, R, S] sample distances, ascending
    raw_density: Tensor  # [B, R, S] at the samples


@dataclasses.dataclass(frozen=True)
class HeadImages:
    """Pictures of a batch of heads. R is the rendering resolution, S the final one."""

    image: Tensor  # [B, 3, S, S] final picture, [-1, 1]
    raw: Tensor  # [B, 3, R, R] rendered colours before super-resolution, [-1, 1]
    features: Tensor  # [B, C, R, R] composited features, [-1, 1]; the first three channels are `raw`
    foreground: Tensor  # [B, C, R, R] sum of weights * colours in [0, 1], before the background is added
    background: Tensor  # [B, C, R, R] features of the background, [-1, 1]
    depth: Tensor  # [B, 1, R, R] distance along the unit ray, scene units
    opacity: Tensor  # [B, 1, R, R] in [0, 1]
    rays: Rendered  # per-ray detail: weights, distances, densities
    eye_mask: Tensor | None = None  # [B, 1, R, R] in [0, 1]
    mouth_mask: Tensor | None = None  # [B, 1, R, R] in [0, 1]
    head_mask: Tensor | None = None  # [B, 1, R, R] in [0, 1], the mesh, eyes and mouth included


def stratified_depths(near: Tensor, far: Tensor, rays: int, samples: int, generator: Draws | None) -> Tensor:
    """Distances [B, rays, samples]: linspace(near, far) + u * step with u ~ U(0, 1), or 0.5 without a generator.

    near, far: [B] scene units. As published, the last sample may pass `far` by up to one step.
    """
    step = (far - near) / (samples - 1)
    steps = torch.arange(samples, device=near.device, dtype=near.dtype)
    grid = near[:, None, None] + steps * step[:, None, None]
    if generator is None:
        return (grid + 0.5 * step[:, None, None]).expand(-1, rays, -1)
    return grid + uniform((near.shape[0], rays, samples), generator, near) * step[:, None, None]


def composite(
    colors: Tensor,  # [B, R, S, C]
    raw_density: Tensor,  # [B, R, S]
    depths: Tensor,  # [B, R, S] ascending
    far: Tensor | None = None,  # [B] depth given to rays that hit nothing; None = the last sample
) -> Rendered:
    """Integrate with the midpoint rule over S - 1 intervals.

    density = softplus(mean of the two raw densities - 1), alpha = 1 - exp(-density * dt),
    weight_i = alpha_i * prod_{j<i} (1 - alpha_j); depth = sum w t / sum w, kept inside the ray's own samples.
    """
    assert colors.shape[:3] == raw_density.shape == depths.shape and depths.shape[2] >= 2, (
        f"composite: colors {tuple(colors.shape)}, raw_density {tuple(raw_density.shape)}, depths {tuple(depths.shape)}"
    )
    weights, depth, transmittance = _march(raw_density, depths, far)
    colors = (_sample_weights(weights)[..., None] * colors).sum(-2)
    return Rendered(colors, depth, transmittance, weights, depths, raw_density)


def _march(raw_density: Tensor, depths: Tensor, far: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """What `composite` says of weights [B, R, S-1], depth [B, R] and transmittance [B, R]."""
    intervals = depths[..., 1:] - depths[..., :-1]
    middle_depth = (depths[..., 1:] + depths[..., :-1]) / 2
    density = F.softplus((raw_density[..., 1:] + raw_density[..., :-1]) / 2 - 1)
    alpha = 1 - torch.exp(-density * intervals)
    passed = torch.cumprod(1 - alpha + 1e-10, dim=-1)
    weights = alpha * torch.cat([torch.ones_like(passed[..., :1]), passed[..., :-1]], dim=-1)
    total = weights.sum(-1)
    last = depths[..., -1] if far is None else far[:, None].expand_as(total)
    hit = total > 1e-6
    depth = torch.where(hit, (weights * middle_depth).sum(-1) / total.clamp_min(1e-6), last)
    depth = torch.minimum(torch.maximum(depth, depths[..., 0]), torch.maximum(depths[..., -1], last))
    return weights, depth, 1 - total


def _sample_weights(weights: Tensor) -> Tensor:
    """Weights [..., S-1] of the intervals, whose colour is the mean of their two samples, as weights [..., S] of the samples."""
    return (F.pad(weights, (1, 0)) + F.pad(weights, (0, 1))) / 2


@torch.no_grad()
def importance_depths(depths: Tensor, weights: Tensor, samples: int, generator: Draws | None) -> Tensor:
    """Draw `samples` more distances [B, R, samples] where the weights are.

    The weights [B, R, S-1] are widened (max-pool 2, then average-pool 2), 0.01 is added, and the resulting density over the
    midpoints of the S distances is inverted at u. As published, the two outermost weights are left out.
    """
    batch, rays, count = weights.shape
    flat = weights.reshape(batch * rays, 1, count)
    smooth = F.avg_pool1d(F.max_pool1d(flat, 2, 1, padding=1), 2, 1).reshape(batch * rays, count) + 0.01
    edges = ((depths[..., 1:] + depths[..., :-1]) / 2).reshape(batch * rays, count)
    pdf = smooth[:, 1:-1] + 1e-5
    pdf = pdf / pdf.sum(-1, keepdim=True)
    cdf = F.pad(torch.cumsum(pdf, -1), (1, 0))  # [B*R, S-2] at edges[0 .. S-3]
    if generator is None:
        u = ((torch.arange(samples, device=weights.device, dtype=weights.dtype) + 0.5) / samples).expand(batch * rays, samples)
    else:
        u = uniform((batch, rays, samples), generator, weights).reshape(batch * rays, samples)
    u = u.contiguous()
    above = torch.searchsorted(cdf, u, right=True)
    low, high = (above - 1).clamp_min(0), above.clamp_max(cdf.shape[1] - 1)
    cdf_low, cdf_high = cdf.gather(1, low), cdf.gather(1, high)
    edge_low, edge_high = edges.gather(1, low), edges.gather(1, high)
    width = cdf_high - cdf_low
    fraction = (u - cdf_low) / torch.where(width < 1e-5, torch.ones_like(width), width)
    return (edge_low + fraction * (edge_high - edge_low)).reshape(batch, rays, samples)


def render_rays(
    field: Field,
    origins: Tensor,  # [B, R, 3]
    directions: Tensor,  # [B, R, 3] unit
    near: Tensor,  # [B]
    far: Tensor,  # [B]
    sampling: RaySampling,
    generator: Draws | None = None,  # for the whole batch, or one for each entry
) -> Rendered:
    """Two-pass rendering: stratified samples, then importance samples from their weights, merged and sorted.

    Both passes evaluate the field once; the first pass's samples are used again in the final integral.
    """

    def at(depths: Tensor) -> FieldSamples:
        return field(origins[:, :, None] + depths[..., None] * directions[:, :, None])

    depths = stratified_depths(near, far, origins.shape[1], sampling.depth_samples, generator)
    samples = at(depths)
    if not sampling.importance_samples:
        return composite(samples.colors, samples.raw_density, depths, far)
    with torch.no_grad():
        weights = _march(samples.raw_density, depths, None)[0]
    extra = importance_depths(depths, weights, sampling.importance_samples, generator)
    passes = (samples, at(extra))
    depths, order = torch.sort(torch.cat([depths, extra], dim=-1), dim=-1)
    raw_density = torch.cat([part.raw_density for part in passes], dim=2).gather(2, order)
    weights, depth, transmittance = _march(raw_density, depths, far)
    # Colours stay where they are, a few bytes a sample are sorted back to them: colours are most of the memory.
    shares = torch.zeros_like(depths).scatter(2, order, _sample_weights(weights)).split([part.colors.shape[2] for part in passes], dim=2)
    colors = sum((share[:, :, None] @ part.colors)[:, :, 0] for share, part in zip(shares, passes, strict=True))
    return Rendered(colors, depth, transmittance, weights, depths, raw_density)


def to_picture(per_ray: Tensor, resolution: int) -> Tensor:
    """Row-major rays [B, R*R, C] or [B, R*R] as a picture [B, C, R, R]."""
    if per_ray.ndim == 2:
        per_ray = per_ray[..., None]
    return per_ray.transpose(1, 2).reshape(per_ray.shape[0], per_ray.shape[2], resolution, resolution)


def compose_pictures(
    rendered: Rendered,  # of R*R row-major rays
    background: Tensor,  # [B, C, b, b] in [0, 1]
    resolution: int,  # R
    superresolution: Callable[[Tensor, Tensor], Tensor],  # (raw [B, 3, R, R], features [B, C, R, R]) -> picture [B, 3, S, S]
) -> HeadImages:
    """Put the rendered foreground before the background: F = F_foreground + T * background, then 2F - 1 and super-resolution."""
    foreground = to_picture(rendered.colors, resolution)
    transmittance = to_picture(rendered.transmittance, resolution)
    behind = F.interpolate(background, size=(resolution, resolution), mode="bilinear", align_corners=False)
    features = (foreground + transmittance * behind) * 2 - 1
    raw = features[:, :3]
    return HeadImages(
        image=superresolution(raw, features),
        raw=raw,
        features=features,
        foreground=foreground,
        background=behind * 2 - 1,
        depth=to_picture(rendered.depth, resolution),
        opacity=1 - transmittance,
        rays=rendered,
    )
