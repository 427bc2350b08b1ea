"""The rasteriser's inner loop as an NVIDIA Warp kernel (optional; `pip install head-foundry[warp]`).

Same rule and same result as the plain torch loop in `rasterize.py`; several times faster on both kinds of device once its
kernel is compiled (a few seconds on first use, cached by Warp).
"""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any

import torch
from torch import Tensor


@functools.cache
def _kernel() -> tuple[ModuleType, Any]:
    import warp as wp

    wp.config.quiet = True
    wp.init()

    @wp.kernel
    def draw(
        corners: wp.array(dtype=wp.vec3, ndim=3),
        drawable: wp.array(dtype=wp.bool, ndim=2),
        resolution: int,
        keys: wp.array(dtype=wp.int64, ndim=3),
    ):
        image, face = wp.tid()
        if not drawable[image, face]:
            return
        a = corners[image, face, 0]
        b = corners[image, face, 1]
        c = corners[image, face, 2]
        last = float(resolution - 1)
        x_low = int(wp.clamp(wp.ceil(wp.min(wp.min(a[0], b[0]), c[0]) - 0.5), 0.0, last + 1.0))
        x_high = int(wp.clamp(wp.floor(wp.max(wp.max(a[0], b[0]), c[0]) - 0.5), -1.0, last))
        y_low = int(wp.clamp(wp.ceil(wp.min(wp.min(a[1], b[1]), c[1]) - 0.5), 0.0, last + 1.0))
        y_high = int(wp.clamp(wp.floor(wp.max(wp.max(a[1], b[1]), c[1]) - 0.5), -1.0, last))
        area = (b[0] - a[0]) * (c[1] - a[1]) - (b[1] - a[1]) * (c[0] - a[0])
        for y in range(y_low, y_high + 1):
            for x in range(x_low, x_high + 1):
                px = float(x) + 0.5
                py = float(y) + 0.5
                wa = ((b[0] - px) * (c[1] - py) - (b[1] - py) * (c[0] - px)) / area
                wb = ((c[0] - px) * (a[1] - py) - (c[1] - py) * (a[0] - px)) / area
                wc = ((a[0] - px) * (b[1] - py) - (a[1] - py) * (b[0] - px)) / area
                if wa >= 0.0 and wb >= 0.0 and wc >= 0.0:
                    depth = 1.0 / (wa / a[2] + wb / b[2] + wc / c[2])
                    key = (wp.int64(wp.cast(depth, wp.int32)) << wp.int64(32)) | wp.int64(face)
                    wp.atomic_min(keys, image, y, x, key)

    return wp, draw


def nearest_faces(
    corners: Tensor,  # [B, F, 3, 3] (x px, y px, depth)
    drawable: Tensor,  # [B, F] bool
    resolution: int,
) -> Tensor:
    """Nearest face id [B, R, R], -1 where nothing is hit. Raises ImportError if warp-lang is not installed."""
    warp, draw = _kernel()
    batch, count = drawable.shape
    nothing = torch.iinfo(torch.int64).max
    keys = torch.full((batch, resolution, resolution), nothing, dtype=torch.int64, device=corners.device)
    warp.launch(
        draw,
        dim=(batch, count),
        inputs=[
            warp.from_torch(corners.contiguous(), dtype=warp.vec3),
            warp.from_torch(drawable.contiguous(), dtype=warp.bool),
            resolution,
            warp.from_torch(keys, dtype=warp.int64),
        ],
        device=str(corners.device),
    )
    return torch.where(keys == nothing, -1, keys & 0xFFFFFFFF)
