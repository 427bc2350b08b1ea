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

    Differentiable in planes and points.
    """
    batch, count, channels = planes.shape[0], planes.shape[1], planes.shape[2]
    assert count == 3 and points.ndim == 3, f"planes [B, 3, C, H, W] and points [B, N, 3], got {planes.shape}, {points.shape}"
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
