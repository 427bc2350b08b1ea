"""Tri-planes: sampling and the decoder from plane features to colour features and density.

Plane order is XY, YZ, ZX; the first coordinate of a pair runs along the width of the plane. The older order XY, XZ, ZX reads one
pair of axes twice (a known bug) and is not offered.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from head3d.networks.stylegan2 import FullyConnected

PLANE_AXES = ((0, 1), (1, 2), (2, 0))  # XY, YZ, ZX: (width axis, height axis)


def sample_planes(
    planes: Tensor,  # [B, 3, C, H, W] XY, YZ, ZX
    points: Tensor,  # [B, N, 3] scene units
    box_side: float,  # scene units; the planes cover [-box_side/2, box_side/2]^3
) -> Tensor:
    """Mean over the three planes of the bilinear samples, [B, N, C]; zero outside the box (portrait4d, section 0).

    Differentiable in planes and points. Without a gradient, on a CPU, texels are gathered as rows of C features, which takes less than half
    of the time and is the same up to rounding.
    """
    assert planes.shape[1] == 3 and points.ndim == 3, f"planes [B, 3, C, H, W] and points [B, N, 3], got {planes.shape}, {points.shape}"
    if points.device.type == "cpu" and not (torch.is_grad_enabled() and (planes.requires_grad or points.requires_grad)):
        return _sample_rows(planes, points, box_side)
    return _sample_grid(planes, points, box_side)


def _sample_grid(planes: Tensor, points: Tensor, box_side: float) -> Tensor:
    """`sample_planes` by torch's grid_sample."""
    batch, channels = planes.shape[0], planes.shape[2]
    scaled = points * (2.0 / box_side)
    coordinates = torch.stack([scaled[..., axes] for axes in PLANE_AXES], dim=1)  # [B, 3, N, 2]
    samples = F.grid_sample(
        planes.reshape(batch * 3, channels, *planes.shape[3:]),
        coordinates.reshape(batch * 3, 1, -1, 2).to(planes.dtype),
        mode="bilinear",
        padding_mode="zeros",
        align_corners=False,
    )
    return samples.reshape(batch, 3, channels, -1).mean(dim=1).transpose(1, 2)


def _sample_rows(planes: Tensor, points: Tensor, box_side: float) -> Tensor:
    """`sample_planes` as a weighted sum of twelve rows a point, of square planes: [B, N, C], contiguous."""
    batch, _, channels, side, _ = planes.shape
    assert planes.shape[3] == planes.shape[4], f"square planes, got {planes.shape}"
    texels = planes.permute(0, 3, 4, 1, 2)  # [B, H, W, 3, C]
    if texels.stride(-1) != 1 or any(stride % channels for stride in texels.stride()[:-1]):
        texels = texels.contiguous()  # planes that come channels-last from their network are rows already, also where views share them
    to_image, to_row, to_column, to_plane = (stride // channels for stride in texels.stride()[:-1])
    extent = sum((size - 1) * stride // channels for size, stride in zip(texels.shape[:-1], texels.stride()[:-1], strict=True)) + 1
    rows = texels.as_strided((extent, channels), (channels, 1))

    place = ((points.mT * (2.0 / box_side) + 1) * (side / 2) - 0.5).clamp(-2, side + 1)  # [B, axis, N] in texels
    low = place.floor()
    share, low = place - low, low.to(torch.int32)
    inside = torch.stack([(low >= 0) & (low < side), (low >= -1) & (low < side - 1)])
    weight = torch.stack([1 - share, share]) * inside  # [2, B, axis, N] of the lower and the upper neighbour
    texel = torch.stack([low, low + 1]).clamp(0, side - 1)
    width, height = ([axes[i] for axes in PLANE_AXES] for i in (0, 1))
    origin = torch.arange(batch, dtype=torch.int32)[:, None, None] * to_image + torch.arange(3, dtype=torch.int32)[:, None] * to_plane
    index = (texel[:, :, width] * to_column + origin)[None] + texel[:, None, :, height] * to_row  # [2, 2, B, 3, N]
    weight = weight[None, :, :, width] * weight[:, None, :, height] / 3
    index, weight = (table.permute(2, 4, 0, 1, 3).reshape(-1, 12) for table in (index, weight))
    return F.embedding_bag(index, rows, per_sample_weights=weight.to(rows.dtype), mode="sum").reshape(batch, -1, channels)


class Decoder(nn.Module):
    """Plane features to colour features and raw density (portrait4d, section 0: 32 -> 64 softplus -> 1 | 32).

    The density layer starts at zero, so that the first pictures are an even fog.
    """

    def __init__(self, feature_channels: int = 32, hidden: int = 64, color_channels: int = 32) -> None:
        super().__init__()
        self.hidden = FullyConnected(feature_channels, hidden)
        self.density = FullyConnected(hidden, 1)
        self.color = FullyConnected(hidden, color_channels)
        nn.init.zeros_(self.density.weight)
        nn.init.zeros_(self.density.bias)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """features [..., C] -> (colours [..., K] in (-0.001, 1.001), raw density [..., 1] before activation)."""
        flat = F.softplus(self.hidden(features.reshape(-1, features.shape[-1])))
        colors = torch.sigmoid(self.color(flat)) * 1.002 - 0.001
        lead = features.shape[:-1]
        return colors.reshape(*lead, -1), self.density(flat).reshape(*lead, 1)
