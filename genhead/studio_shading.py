"""Light of the studio, per visible point: a key and a fill lamp, sky-to-ground ambient, highlights. Linear RGB."""

from __future__ import annotations

import numpy as np

from genhead import studio_paint as paint
from genhead.studio_meshes import CAVITY, CLOTH, FRAME, HAIR, LEFT_EYE, RIGHT_EYE, SKIN, TEETH
from genhead.studio_paint import FaceAtlas, Points, Surface
from genhead.studio_people import Light, Look


def shade(materials: np.ndarray, points: Points, look: Look, atlas: FaceAtlas) -> np.ndarray:
    """Linear RGB [M, 3] of visible points with `materials` [M]."""
    colours = np.zeros((len(materials), 3), np.float32)
    for material in np.unique(materials):
        chosen = np.flatnonzero(materials == material)
        part = points.select(chosen)
        match int(material):
            case m if m == SKIN:
                surface = paint.paint_skin(part, look, atlas)
            case m if m in (LEFT_EYE, RIGHT_EYE):
                surface = paint.paint_eye(part, look, atlas, m)
            case m if m == TEETH:
                surface = paint.paint_teeth(part, look, atlas)
            case m if m == CAVITY:
                surface = paint.paint_cavity(part, look, atlas)
            case m if m == HAIR:
                colours[chosen] = _light_hair(part, paint.paint_hair(part, look), look.light)
                continue
            case m if m == CLOTH:
                surface = paint.paint_cloth(part, look)
            case m if m == FRAME:
                surface = paint.paint_frame(part, look)
            case m:
                raise ValueError(f"unknown material {m}")
        colours[chosen] = _light(part, surface, look.light)
    return colours


def _ambient(normal: np.ndarray, light: Light) -> np.ndarray:
    """Hemisphere light [M, 3]."""
    up = (0.5 + 0.5 * normal[:, 1])[:, None]
    return light.ground + up * (light.sky - light.ground)


def _light(points: Points, surface: Surface, light: Light) -> np.ndarray:
    total = _ambient(points.normal, light) * surface.occlusion[:, None]
    shine = np.zeros((len(points.normal), 3), np.float32)
    for direction, power, lit in ((light.key_direction, light.key, points.lit), (light.fill_direction, light.fill, np.ones(1, np.float32))):
        cosine = (points.normal @ direction)[:, None]
        total = (
            total
            + power * np.clip((cosine + surface.wrap) / (1 + surface.wrap), 0, None) * (lit * (0.4 + 0.6 * surface.occlusion))[:, None]
        )
        half = points.view + direction
        half = half / np.linalg.norm(half, axis=1, keepdims=True)
        highlight = np.clip((points.normal * half).sum(1), 0, 1) ** surface.sharpness * lit * (cosine[:, 0] > 0)
        shine = shine + power * (highlight * surface.gloss)[:, None]
    return surface.albedo * total + shine


def _light_hair(points: Points, surface: Surface, light: Light) -> np.ndarray:
    """Strands (Kajiya and Kay, SIGGRAPH 1989): sine falloff across the strand, softened by the surface normal."""
    tangent = points.extras[:, :3]
    tangent = tangent / (np.linalg.norm(tangent, axis=1, keepdims=True) + 1e-6)
    total = _ambient(points.normal, light) * surface.occlusion[:, None]
    shine = np.zeros((len(tangent), 3), np.float32)
    for direction, power, lit in ((light.key_direction, light.key, points.lit), (light.fill_direction, light.fill, np.ones(1, np.float32))):
        facing = np.clip(0.25 + 0.75 * (points.normal @ direction), 0, 1)
        across = np.sqrt(np.clip(1 - (tangent @ direction) ** 2, 0, 1))
        total = total + power * (facing * (0.35 + 0.65 * across) * lit * (0.4 + 0.6 * surface.occlusion))[:, None]
        half = points.view + direction
        half = half / np.linalg.norm(half, axis=1, keepdims=True)
        ring = np.sqrt(np.clip(1 - (tangent * half).sum(1) ** 2, 0, 1))
        shine = shine + power * (ring**40 * facing * lit * surface.occlusion)[:, None]
    strength = surface.albedo * 0.55 + 0.03
    return surface.albedo * total * 1.15 + shine * strength
