"""Hair of the studio's people: a cap around the skull and what hangs from it.

Directions from the skull's centre are (polar angle from +y, azimuth from +z towards +x), radians; lengths are millimetres.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy.spatial import cKDTree

from genhead.studio_meshes import HAIR, Mesh, grid_faces, smooth
from genhead.studio_people import Look

_COLUMNS = 96  # of the hair cap, round the head
_CAP_ROWS = 18
_HANG_ROWS = 14


class SkullMap:
    """Radius of a head without its ears, seen from the middle of the skull, as a function of direction."""

    polar_steps, azimuth_steps = 48, 96

    def __init__(self, template_mm: np.ndarray, vertex_ids: np.ndarray, centre_mm: np.ndarray):
        """`vertex_ids`: vertices of the outer skin that count."""
        self.centre = centre_mm
        self._ids = vertex_ids
        offsets = template_mm[vertex_ids] - centre_mm
        tree = cKDTree(offsets / np.linalg.norm(offsets, axis=1, keepdims=True))
        polar = (np.arange(self.polar_steps) + 0.5) / self.polar_steps * np.pi
        azimuth = np.arange(self.azimuth_steps) / self.azimuth_steps * 2 * np.pi
        p, a = np.meshgrid(polar, azimuth, indexing="ij")
        distance, self._nearest = tree.query(directions(p, a), k=4)
        weight = 1 / (distance + 1e-3)
        self._weight = weight / weight.sum(-1, keepdims=True)

    def fit(self, vertices_mm: np.ndarray) -> np.ndarray:
        """Radii [polar, azimuth] mm of one posed head."""
        radius = np.linalg.norm(vertices_mm[self._ids] - self.centre, axis=1)
        return (radius[self._nearest] * self._weight).sum(-1)

    def radius(self, radii: np.ndarray, polar: np.ndarray, azimuth: np.ndarray) -> np.ndarray:
        """Bilinear look-up."""
        p = np.clip(polar / np.pi * self.polar_steps - 0.5, 0, self.polar_steps - 1.001)
        a = (azimuth / (2 * np.pi) * self.azimuth_steps) % self.azimuth_steps
        p0, a0 = p.astype(int), a.astype(int) % self.azimuth_steps
        fp, fa, a1 = p - p0, a - np.floor(a), (a0 + 1) % self.azimuth_steps
        top = radii[p0, a0] * (1 - fa) + radii[p0, a1] * fa
        bottom = radii[p0 + 1, a0] * (1 - fa) + radii[p0 + 1, a1] * fa
        return top * (1 - fp) + bottom * fp


def directions(polar: np.ndarray, azimuth: np.ndarray) -> np.ndarray:
    """Unit vectors [..., 3]."""
    return np.stack([np.sin(polar) * np.sin(azimuth), np.cos(polar), np.sin(polar) * np.cos(azimuth)], -1)


class _Style(NamedTuple):
    top: float  # thickness at the crown, mm
    side: float  # thickness above the ears
    edge: float  # thickness at the hairline
    front_deg: float  # polar angle of the hairline over the forehead
    ear_deg: float  # and over the ears
    bumps: float  # relative height of curls
    hang_to: float | None  # height of the lower end of hanging hair, mm; None = none


def _style(look: Look) -> _Style | None:
    u = look.hair_shape
    match look.hair_style:
        case "bald" | "buzz":
            return None
        case "short":
            return _Style(9 + 9 * u[0], 5 + 4 * u[1], 1.5, 66 + 6 * u[2], 103, 0.12, None)
        case "side_part":
            return _Style(15 + 12 * u[0], 7 + 5 * u[1], 3.0, 66 + 6 * u[2], 104, 0.06, None)
        case "fringe":
            return _Style(13 + 8 * u[0], 11 + 8 * u[1], 5.0, 82 + 8 * u[2], 112 + 14 * u[3], 0.05, None)
        case "quiff":
            return _Style(20 + 22 * u[0], 4 + 3 * u[1], 4.0, 65 + 5 * u[2], 102, 0.08, None)
        case "bob":
            return _Style(13 + 9 * u[0], 22 + 6 * u[1], 5.0, (66 if u[5] < 0.5 else 84) + 6 * u[2], 108, 0.04, -30 - 55 * u[3])
        case "long":
            return _Style(
                12 + 9 * u[0], 20 + 7 * u[1], 4.0, (66 if u[5] < 0.7 else 84) + 5 * u[2], 108, 0.05 + 0.05 * u[4], -175 - 40 * u[3]
            )
        case "bun":
            return _Style(6 + 4 * u[0], 5 + 2 * u[1], 1.5, 66 + 4 * u[2], 102, 0.03, None)
        case "curly":
            return _Style(24 + 14 * u[0], 24 + 8 * u[1], 9.0, 68 + 8 * u[2], 112 + 18 * u[3], 0.28, -20 - 40 * u[3] if u[5] < 0.4 else None)
        case "afro":
            return _Style(38 + 30 * u[0], 36 + 26 * u[1], 16.0, 66 + 6 * u[2], 118 + 8 * u[3], 0.12, None)
        case _:
            raise ValueError(f"unknown hair style {look.hair_style!r}")


def hairline(look: Look, azimuth: np.ndarray) -> np.ndarray:
    """Polar angle (rad) where the hair ends, for azimuths (rad); also the edge of a buzz cut."""
    style = _style(look) or _Style(0, 0, 0, 66 + 6 * look.hair_shape[2], 103, 0, None)
    front, ear = style.front_deg, style.ear_deg
    recede = 7 * look.hair_shape[6] if style.front_deg < 75 else 0.0  # bays beside a widow's peak
    burn = max(ear, 108 + 12 * look.hair_shape[7])
    phi = np.abs((np.degrees(azimuth) + 180) % 360 - 180)
    knots = [0, 12, 28, 40, 51, 60, 70, 78, 96, 108, 125, 150, 180]
    values = [front, front, front - recede, front + 1, front + 14, burn, burn, ear, ear, max(ear, 122), 139, 145, 146]
    return np.radians(np.interp(phi, knots, values))


def hair_meshes(look: Look, skull: SkullMap, radii: np.ndarray) -> list[Mesh]:
    """The hair of one person; empty for bald and buzz (which is paint)."""
    style = _style(look)
    if style is None:
        return []
    u = look.hair_shape
    azimuth = np.linspace(0, 2 * np.pi, _COLUMNS, endpoint=False)
    share = np.linspace(0.02, 1, _CAP_ROWS)[:, None]  # 1 = the hairline
    end = hairline(look, azimuth)[None]
    if look.hair_style in ("side_part", "quiff", "long", "bob") and style.front_deg < 75:  # the hairline dips on the combed side
        side = 1 if u[4] < 0.5 else -1
        end = end + np.radians(9) * np.exp(-(((azimuth[None] - np.pi - side * (np.pi - 0.6)) / 0.35) ** 2))
    phi_from_front = np.abs((azimuth[None] + np.pi) % (2 * np.pi) - np.pi)
    hangs = style.hang_to is not None
    hang_start = np.radians(54 + 16 * u[6])
    if hangs:  # the cap ends above the ears, the curtain goes on from there
        falls = smooth(phi_from_front, hang_start - 0.25, hang_start)
        end = end + falls * (np.radians(100) - end)
    g = np.random.default_rng(look.noise_seed)
    end = end + np.radians(1.1 if style.front_deg < 75 else 2.0) * g.normal(0, 1, _COLUMNS) * (
        1 - (hangs and falls)
    )  # locks of uneven length
    polar = share * end
    phi = np.broadcast_to(azimuth[None], polar.shape)
    front = 0.5 + 0.5 * np.cos(phi)
    lateral = smooth(polar, np.radians(35), np.radians(95))
    thickness = style.top * (1 - lateral) + style.side * lateral
    match look.hair_style:
        case "quiff":
            thickness = thickness + style.top * 0.9 * front**3 * np.exp(-(((np.degrees(polar) - 48) / 17) ** 2))
        case "side_part":
            side = 1 if u[4] < 0.5 else -1
            across = np.sin(phi) * np.sin(polar)
            thickness = thickness * (1 + 0.35 * side * across) - 6 * np.exp(-(((across + side * 0.33) / 0.05) ** 2)) * front
        case "long" | "bob":
            part = (u[4] - 0.5) * 0.7
            thickness = thickness - 6 * np.exp(-(((np.sin(phi) * np.sin(polar) - part) / 0.06) ** 2)) * smooth(front, 0.4, 0.8)
    taper = 1 - smooth(share, 0.62, 1.0)
    keep = smooth(phi_from_front, hang_start - 0.3, hang_start + 0.15) if hangs else 0.0
    taper = taper + (1 - taper) * keep  # hair that hangs keeps its thickness
    thickness = style.edge + (thickness - style.edge) * taper
    radius = skull.radius(radii, polar, phi)
    unit = directions(polar, phi)
    curls = 1 + style.bumps * _waves(unit * 9, look.noise_seed)
    cap = skull.centre + unit * (radius + np.maximum(thickness, 1.2) * curls)[..., None]
    along = share * 150 + 0 * phi
    depth = np.broadcast_to(smooth(share, 0.8, 1.0) * 0.35, polar.shape)
    depth = depth * (1 - (hangs and falls))
    hair = _hair_sheet(cap, phi, along, depth, closed=True)
    if hangs:
        hair = _hang(hair, np.flatnonzero(phi_from_front[0] > hang_start), azimuth, style, look)
    meshes = [hair]
    if look.hair_style == "bun":
        meshes.append(_bun(skull, radii, u))
    return meshes


def _hair_sheet(grid: np.ndarray, phi: np.ndarray, along: np.ndarray, depth: np.ndarray, closed: bool) -> Mesh:
    tangents = np.gradient(grid, axis=0)
    tangents = tangents / (np.linalg.norm(tangents, axis=-1, keepdims=True) + 1e-9)
    coordinates = np.stack([phi, along, depth], -1)
    rows, columns = grid.shape[:2]
    return Mesh(grid.reshape(-1, 3), grid_faces(rows, columns, closed), HAIR, coordinates.reshape(-1, 3), tangents.reshape(-1, 3))


def _hang(cap: Mesh, columns: np.ndarray, azimuth: np.ndarray, style: _Style, look: Look) -> Mesh:
    """The cap with a curtain that hangs from `columns` of its lower edge down to `style.hang_to`, and shares that edge's vertices."""
    t = np.linspace(0, 1, _HANG_ROWS)[:, None]
    u = look.hair_shape
    long = look.hair_style == "long"
    edge = (_CAP_ROWS - 1) * _COLUMNS + columns
    top, turn = cap.vertices[edge], azimuth[columns]
    phase = (turn * 5 + look.noise_seed % 7)[None]
    low = (
        style.hang_to
        + np.random.default_rng(look.noise_seed + 3).normal(0, 2.0, len(columns))
        + 6 * np.sin(phase * 1.7)
        + (0 if long else 12 * u[7] * np.cos(turn))
    )
    y = top[None, :, 1] + t * (low - top[None, :, 1])
    flare = 1 + (t * (0.02 + 0.20 * u[7]) if long else t * 0.10 * (u[7] - 0.5) - 0.12 * t**3)
    wave = 1 + (0.12 + 0.24 * u[4]) * style.bumps * t * np.sin(t * (6 + 9 * u[1]) + phase)
    reach = np.hypot(top[:, 0], top[:, 2])[None]
    reach = reach + (np.maximum(reach, 84) - reach) * smooth(t, 0, 0.5)  # falls clear of the neck
    angle = np.arctan2(top[:, 0], top[:, 2])[None]
    grid = np.stack([np.sin(angle) * reach * flare * wave, y, np.cos(angle) * reach * flare * wave], -1)
    along = 150 + (top[None, :, 1] - y)
    curtain = _hair_sheet(grid, np.broadcast_to(turn[None], along.shape), along, np.broadcast_to(0.15 * t, along.shape), closed=False)
    count = len(columns)  # the curtain's first row is the cap's edge
    ids = np.concatenate([edge, len(cap.vertices) + np.arange(len(curtain.vertices) - count)])
    parts = (np.concatenate([ours, theirs[count:]]) for ours, theirs in zip(cap[:1] + cap[3:], curtain[:1] + curtain[3:], strict=True))
    vertices, coordinates, tangents = parts
    return Mesh(vertices, np.concatenate([cap.faces, ids[curtain.faces]]), HAIR, coordinates, tangents)


def _bun(skull: SkullMap, radii: np.ndarray, u: np.ndarray) -> Mesh:
    polar, azimuth = np.radians(20 + 55 * u[3]), np.pi
    size = 26 + 12 * u[4]
    at = np.array([polar]), np.array([azimuth])
    centre = skull.centre + directions(*at)[0] * (skull.radius(radii, *at)[0] + 0.75 * size)
    p, a = np.meshgrid(np.linspace(0.02, np.pi - 0.02, 12), np.linspace(0, 2 * np.pi, 24, endpoint=False), indexing="ij")
    grid = centre + directions(p, a) * size * np.array([1.0, 0.92, 1.0])
    return _hair_sheet(grid, a * 3, p * 60, np.zeros_like(p), closed=True)


def _waves(points: np.ndarray, seed: int) -> np.ndarray:
    """Smooth noise of about unit amplitude, a few octaves of plane waves; [..., 3] -> [...]."""
    g = np.random.default_rng(seed)
    total = np.zeros(points.shape[:-1])
    for octave in range(3):
        vectors = g.normal(0, 1, (4, 3)) * 1.7**octave
        total += np.sin(points @ vectors.T + g.uniform(0, 6.28, 4)).sum(-1) * 0.5 / 1.6**octave
    return total * 0.7
