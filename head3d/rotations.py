"""Rotations as axis-angle vectors (radians)."""

from __future__ import annotations

import torch
from torch import Tensor


def axis_angle_to_matrix(vectors: Tensor) -> Tensor:
    """Rodrigues' formula: [..., 3] -> [..., 3, 3].

    R = I + sin(a)/a K + (1 - cos(a))/a^2 K^2 with K the cross-product matrix of the vector and a its length. The zero vector gives
    exactly the identity, with a finite gradient.
    """
    square = vectors.square().sum(-1)[..., None, None]
    tiny = square < 1e-12
    angle = torch.where(tiny, torch.ones_like(square), square).sqrt()
    first = torch.where(tiny, 1 - square / 6, angle.sin() / angle)
    second = torch.where(tiny, 0.5 - square / 24, 2 * (angle / 2).sin().square() / angle.square())
    x, y, z = vectors.unbind(-1)
    zero = torch.zeros_like(x)
    cross = torch.stack([zero, -z, y, z, zero, -x, -y, x, zero], dim=-1).unflatten(-1, (3, 3))
    identity = torch.eye(3, device=vectors.device, dtype=vectors.dtype)
    return identity + first * cross + second * (cross @ cross)
