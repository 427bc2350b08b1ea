"""Backdrops of the studio: gradients, blurred blobs, bokeh discs, soft shapes, a blurred room. Linear RGB."""

from __future__ import annotations

import numpy as np
from scipy.ndimage import gaussian_filter, zoom

from genhead.studio_people import lab_to_linear


def draw_background(
    resolution: int,  # pixels
    generator: np.random.Generator,
) -> np.ndarray:
    """One backdrop, float32 [R, R, 3], linear RGB in [0, 1]. Its content does not depend on the resolution, only its sampling does."""
    kind = generator.choice(["gradient", "blobs", "bokeh", "shapes", "room"], p=[0.27, 0.23, 0.17, 0.13, 0.20])
    palette = _palette(generator)
    centres = (np.arange(resolution) + 0.5) / resolution
    y, x = np.meshgrid(centres, centres, indexing="ij")
    match kind:
        case "gradient":
            picture = _gradient(x, y, palette, generator)
        case "blobs":
            picture = _smooth_noise(resolution, palette, generator)
        case "bokeh":
            picture = _bokeh(x, y, 0.45 * palette, generator)
        case "shapes":
            picture = _shapes(x, y, palette, generator)
        case _:
            picture = _room(x, y, palette, generator)
    vignette = 1 - generator.uniform(0, 0.35) * ((x - 0.5) ** 2 + (y - 0.5) ** 2)[..., None] * 2
    return np.clip(picture * vignette, 0, 1).astype(np.float32)


def _palette(g: np.random.Generator) -> np.ndarray:
    """Four related colours [4, 3]: one hue with variation in lightness, or two hues."""
    hue = g.uniform(0, 2 * np.pi) + np.where(np.arange(4) < 2, 0, g.normal(0, 1.0))
    chroma = g.beta(1.3, 2.2) * 45 * g.uniform(0.6, 1.0, 4)
    lightness = np.clip(g.uniform(20, 88) + g.normal(0, 14, 4), 8, 96)
    return lab_to_linear(np.stack([lightness, chroma * np.cos(hue), chroma * np.sin(hue)], -1))


def _mix(weight: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return a + np.clip(weight, 0, 1)[..., None] * (b - a)


def _gradient(x: np.ndarray, y: np.ndarray, palette: np.ndarray, g: np.random.Generator) -> np.ndarray:
    if g.random() < 0.5:  # a lit studio wall
        centre = g.uniform(0.2, 0.8, 2)
        return _mix(np.hypot(x - centre[0], y - centre[1]) * g.uniform(0.8, 1.5), palette[0], palette[1] * 0.6)
    angle = g.uniform(0, 2 * np.pi)
    return _mix(0.5 + (x - 0.5) * np.cos(angle) + (y - 0.5) * np.sin(angle), palette[0], palette[2])


def _smooth_noise(resolution: int, palette: np.ndarray, g: np.random.Generator) -> np.ndarray:
    cells = int(g.integers(4, 9))
    weights = gaussian_filter(g.normal(0, 1, (cells, cells, 4)), (0.7, 0.7, 0), mode="nearest")
    weights = np.exp(2.2 * weights)
    coarse = (weights / weights.sum(-1, keepdims=True)) @ palette
    return zoom(coarse, (resolution / cells, resolution / cells, 1), order=3, mode="nearest", grid_mode=True)


def _discs(x: np.ndarray, y: np.ndarray, radius: float, softness: float, centre: np.ndarray) -> np.ndarray:
    return np.clip((radius - np.hypot(x - centre[0], y - centre[1])) / softness + 0.5, 0, 1)


def _bokeh(x: np.ndarray, y: np.ndarray, palette: np.ndarray, g: np.random.Generator) -> np.ndarray:
    picture = _gradient(x, y, palette, g)
    for _ in range(int(g.integers(8, 22))):
        radius = g.uniform(0.02, 0.09)
        disc = _discs(x, y, radius, max(0.012, 1.2 / len(x)), g.uniform(-0.05, 1.05, 2))
        picture = picture + disc[..., None] * g.uniform(0.06, 0.5) * (palette[g.integers(4)] * 1.6 + 0.1)
    return picture


def _shapes(x: np.ndarray, y: np.ndarray, palette: np.ndarray, g: np.random.Generator) -> np.ndarray:
    picture = _gradient(x, y, palette, g)
    for _ in range(int(g.integers(2, 6))):
        angle, offset, softness = g.uniform(0, np.pi), g.uniform(-0.4, 0.4), g.uniform(0.02, 0.2)
        side = (x - 0.5) * np.cos(angle) + (y - 0.5) * np.sin(angle) - offset
        width = g.uniform(0.08, 0.4)
        picture = _mix(g.uniform(0.3, 0.9) * np.clip((width - np.abs(side)) / softness + 0.5, 0, 1), picture, palette[g.integers(4)])
    return picture


def _room(x: np.ndarray, y: np.ndarray, palette: np.ndarray, g: np.random.Generator) -> np.ndarray:
    """Out-of-focus upright rectangles: windows, shelves, doors; or a horizon."""
    blur = g.uniform(0.03, 0.09)

    def step(value: np.ndarray, edge: float) -> np.ndarray:
        return np.clip((value - edge) / blur + 0.5, 0, 1)

    picture = _mix(step(y, g.uniform(0.35, 0.9)), palette[0], palette[1] * g.uniform(0.4, 0.9))
    for _ in range(int(g.integers(2, 6))):
        left, top = g.uniform(-0.2, 0.9), g.uniform(-0.2, 0.5)
        right, bottom = left + g.uniform(0.1, 0.45), top + g.uniform(0.2, 0.9)
        box = step(x, left) * (1 - step(x, right)) * step(y, top) * (1 - step(y, bottom))
        picture = _mix(box * g.uniform(0.4, 0.95), picture, palette[g.integers(4)] * g.uniform(0.5, 1.5))
    return picture
