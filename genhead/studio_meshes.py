"""What a person in the studio wears: hair, bun, collar, shoulders and glasses as small meshes around a posed head.

Lengths in this file are millimetres (a scene unit is 1000 / 3 mm); x to the person's left, y up, z forward, origin at the
neck joint. Directions from the skull's centre are (polar angle from +y, azimuth from +z towards +x), radians.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy.spatial import cKDTree

from genhead.studio_people import Look

MM_PER_UNIT = 1000.0 / 3.0
HAIR, CLOTH, FRAME = 10, 11, 12  # materials; those of the head are in studio_shading
_COLUMNS = 96  # of the hair cap, round the head
_CAP_ROWS = 18
_HANG_ROWS = 14


class Mesh(NamedTuple):
    """A surface with what its material needs."""

    vertices: np.ndarray  # [N, 3] mm
    faces: np.ndarray  # [F, 3]
    material: int
    coordinates: np.ndarray  # [N, 3] hair: azimuth rad, distance from the crown mm, depth into the hair 0-1; others: position mm
    tangents: np.ndarray  # [N, 3] unit direction of the strands; 0 for others


def grid_faces(rows: int, columns: int, closed: bool) -> np.ndarray:
    """Triangles of a rows x columns grid of vertices; `closed` joins the last column to the first."""
    last = columns if closed else columns - 1
    r, c = np.meshgrid(np.arange(rows - 1), np.arange(last), indexing="ij")
    a, b = r * columns + c, r * columns + (c + 1) % columns
    d, e = a + columns, b + columns
    return np.concatenate([np.stack([a, d, b], -1).reshape(-1, 3), np.stack([b, d, e], -1).reshape(-1, 3)])


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
            return _Style(12 + 9 * u[0], 20 + 7 * u[1], 4.0, (66 if u[5] < 0.7 else 84) + 5 * u[2], 108, 0.05 + 0.05 * u[4], -175 - 40 * u[3])
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


def _smooth(x: np.ndarray, low: float, high: float) -> np.ndarray:
    t = np.clip((x - low) / (high - low), 0, 1)
    return t * t * (3 - 2 * t)


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
        falls = _smooth(phi_from_front, hang_start - 0.25, hang_start)
        end = end + falls * (np.radians(100) - end)
    g = np.random.default_rng(look.noise_seed)
    end = end + np.radians(1.1 if style.front_deg < 75 else 2.0) * g.normal(0, 1, _COLUMNS) * (1 - (hangs and falls))  # locks of uneven length
    polar = share * end
    phi = np.broadcast_to(azimuth[None], polar.shape)
    front = 0.5 + 0.5 * np.cos(phi)
    lateral = _smooth(polar, np.radians(35), np.radians(95))
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
            thickness = thickness - 6 * np.exp(-(((np.sin(phi) * np.sin(polar) - part) / 0.06) ** 2)) * _smooth(front, 0.4, 0.8)
    taper = 1 - _smooth(share, 0.62, 1.0)
    keep = _smooth(phi_from_front, hang_start - 0.3, hang_start + 0.15) if hangs else 0.0
    taper = taper + (1 - taper) * keep  # hair that hangs keeps its thickness
    thickness = style.edge + (thickness - style.edge) * taper
    radius = skull.radius(radii, polar, phi)
    unit = directions(polar, phi)
    curls = 1 + style.bumps * _waves(unit * 9, look.noise_seed)
    cap = skull.centre + unit * (radius + np.maximum(thickness, 1.2) * curls)[..., None]
    along = share * 150 + 0 * phi
    depth = np.broadcast_to(_smooth(share, 0.8, 1.0) * 0.35, polar.shape)
    meshes = [_hair_sheet(cap, phi, along, depth, closed=True)]
    if hangs:
        columns = np.flatnonzero(phi_from_front[0] > hang_start)
        meshes.append(_hanging(cap[-1, columns], azimuth[columns], style, look))
    if look.hair_style == "bun":
        meshes.append(_bun(skull, radii, u))
    return meshes


def _hair_sheet(grid: np.ndarray, phi: np.ndarray, along: np.ndarray, depth: np.ndarray, closed: bool) -> Mesh:
    tangents = np.gradient(grid, axis=0)
    tangents = tangents / (np.linalg.norm(tangents, axis=-1, keepdims=True) + 1e-9)
    coordinates = np.stack([phi, along, depth], -1)
    rows, columns = grid.shape[:2]
    return Mesh(grid.reshape(-1, 3), grid_faces(rows, columns, closed), HAIR, coordinates.reshape(-1, 3), tangents.reshape(-1, 3))


def _hanging(top: np.ndarray, azimuth: np.ndarray, style: _Style, look: Look) -> Mesh:
    """A curtain from the cap's lower edge `top` [columns, 3] down to `style.hang_to`."""
    t = np.linspace(0, 1, _HANG_ROWS)[:, None]
    u = look.hair_shape
    long = look.hair_style == "long"
    phase = (azimuth * 5 + look.noise_seed % 7)[None]
    low = style.hang_to + 6 * np.sin(phase * 1.7) + (12 * u[7] * np.cos(azimuth) if not long else 0)
    y = top[None, :, 1] + t * (low - top[None, :, 1])
    flare = 1 + t * (0.02 + 0.20 * u[7] if long else 0.10 * (u[7] - 0.5)) - (0.12 * t**3 if not long else 0.0)
    wave = 1 + (0.03 + 0.06 * u[4]) * style.bumps * 8 * t * np.sin(t * (6 + 9 * u[1]) + phase) * 0.5
    reach = np.hypot(top[:, 0], top[:, 2])[None]
    reach = reach + (np.maximum(reach, 84) - reach) * _smooth(t, 0, 0.5)  # falls clear of the neck
    angle = np.arctan2(top[:, 0], top[:, 2])[None]
    grid = np.stack([np.sin(angle) * reach * flare * wave, y, np.cos(angle) * reach * flare * wave], -1)
    along = 150 + (top[None, :, 1] - y)
    depth = np.broadcast_to(0.15 * t, along.shape)
    return _hair_sheet(grid, np.broadcast_to(azimuth[None], along.shape), along, depth, closed=False)


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


# ---- clothing and glasses ----------------------------------------------------------------------------------------------


def neckline(look: Look, points: np.ndarray) -> np.ndarray:
    """How far (mm, positive) points [..., 3] lie below the edge of the garment; the garment is where this is > 0."""
    x, y, z = points[..., 0], points[..., 1], points[..., 2]
    base, slope = {"crew": (-104, 0.34), "v_neck": (-106, 0.28), "turtleneck": (-84, 0.22), "shirt": (-98, 0.34), "hoodie": (-98, 0.30)}[look.garment]
    edge = base - slope * (z + 18)
    if look.garment == "v_neck":
        edge = edge - np.where(z > -10, np.maximum(0, 46 - np.abs(x)) * 0.9, 0)
    return edge - y


# rows of the shoulders: height, half width, half depth, z of the middle
_TORSO = np.array(
    [[-92, 46, 42, -18], [-116, 66, 52, -20], [-134, 98, 60, -20], [-148, 138, 70, -18], [-162, 172, 82, -15], [-185, 196, 96, -10], [-225, 210, 108, -6], [-320, 214, 116, -4]]
)


def clothing_meshes(look: Look, neck_scale: float) -> list[Mesh]:
    """Shoulders, and the collar or hood. `neck_scale`: this neck's half width over the mean head's."""
    angle = np.linspace(0, 2 * np.pi, 64, endpoint=False)
    rows = np.linspace(0, len(_TORSO) - 1, 22)
    profile = np.stack([np.interp(rows, np.arange(len(_TORSO)), _TORSO[:, k]) for k in range(4)], -1)
    sin, cos = np.sin(angle)[None], np.cos(angle)[None]
    width, depth = profile[:, 1:2] * np.where(rows[:, None] < 2, neck_scale, 1), profile[:, 2:3]
    sag = 10 * _smooth(rows[:, None], 1, 4) * (1 - np.abs(sin))  # the chest and the back lie lower than the shoulders' top
    grid = np.stack([width * np.sign(sin) * np.abs(sin) ** 0.85, profile[:, :1] - sag + 0 * sin, profile[:, 3:4] + depth * np.sign(cos) * np.abs(cos) ** 0.9], -1)
    meshes = [_sheet(grid, CLOTH, closed=True)]
    half_width, half_depth, z = 60 * neck_scale, 58 * neck_scale, -16
    match look.garment:
        case "shirt":
            open_by = 0.22
            around = np.linspace(open_by, 2 * np.pi - open_by, 60)
            rise = np.array([0, 12, 22, 24, 14, -2, -14])[:, None]
            out = np.array([1, 1, 3, 6, 10, 15, 19])[:, None]
            point = np.exp(-((np.minimum(around, 2 * np.pi - around) - open_by) / 0.35)[None] ** 2) * np.array([0, 0, 0, 0, 4, 10, 18])[:, None]
            meshes.append(_sheet(_ring(around, half_width, half_depth, z, out, -100 + rise - point, 0.34), CLOTH, closed=False))
        case "hoodie":
            tube = np.linspace(0, 2 * np.pi, 12)[:, None]
            thick = 11 + 9 * (0.5 - 0.5 * np.cos(angle))[None]
            meshes.append(_sheet(_ring(angle, half_width, half_depth, z, 10 + thick * np.sin(tube), -100 + thick * np.cos(tube), 0.36), CLOTH, closed=True))
        case "crew" | "turtleneck":
            tube = np.linspace(0, 2 * np.pi, 8)[:, None]
            height, slope = (-105, 0.34) if look.garment == "crew" else (-84, 0.22)
            meshes.append(_sheet(_ring(angle, half_width - 3, half_depth - 3, z, 3.2 * np.sin(tube), height + 4.2 * np.cos(tube), slope), CLOTH, closed=True))
    return meshes


def _ring(angle: np.ndarray, half_width: float, half_depth: float, z: float, out: np.ndarray, height: np.ndarray, slope: float) -> np.ndarray:
    """Rows x angles of points round the neck, `out` mm from its ellipse, at `height`, lower in front by `slope`."""
    x = (half_width + out) * np.sin(angle)[None]
    depth = (half_depth + out) * np.cos(angle)[None]
    return np.stack([x, height - slope * (depth + 0 * x) + 0 * x, z + depth + 0 * x], -1)


def _sheet(grid: np.ndarray, material: int, closed: bool) -> Mesh:
    rows, columns = grid.shape[:2]
    points = grid.reshape(-1, 3)
    return Mesh(points, grid_faces(rows, columns, closed), material, points, np.zeros_like(points))


def glasses_meshes(look: Look, eyes: np.ndarray, bridge: np.ndarray, ears: np.ndarray, front_z: float) -> list[Mesh]:
    """Two rims, a bridge and two temples. eyes [2, 3], ears [2, 3] (left, right), bridge [3] on the nose, `front_z`: plane of the rims; mm."""
    size, roundness, thick = look.glasses_shape
    tube = 1.1 + 1.3 * thick
    angle = np.linspace(0, 2 * np.pi, 40, endpoint=False)
    power = 2 / (2 + 2.2 * (1 - roundness))
    half = (eyes[0, 0] - eyes[1, 0]) / 2
    width, height = min(22 + 4 * size, half - 7), 16 + 6 * size
    meshes = []
    for side, eye, ear in zip((1, -1), eyes, ears, strict=True):
        outline = np.stack(
            [eye[0] + side * 1.5 + width * np.sign(np.cos(angle)) * np.abs(np.cos(angle)) ** power,
             eye[1] - 2 + height * np.sign(np.sin(angle)) * np.abs(np.sin(angle)) ** power,
             front_z - 0.10 * np.maximum(0, side * (np.cos(angle) * width * side + eye[0]) - half) + 0 * angle], -1)  # fmt: skip
        meshes.append(_tube(outline, tube, closed=True))
        hinge = np.array([eye[0] + side * (1.5 + width), eye[1] + 4, front_z - 0.10 * width])
        meshes.append(_tube(np.stack([hinge, hinge + [side * 3, 0, -8], [ear[0] + side * 2, eye[1] + 5, (hinge[2] + ear[2]) / 2], ear + [0, 6, 0]]), tube * 0.8, closed=False))
    inner = eyes[:, 0] + np.array([1, -1]) * (1.5 - width)
    height_bridge = (eyes[:, 1].mean() + bridge[1]) / 2 + 4
    meshes.append(_tube(np.array([[inner[0], height_bridge, front_z], [0, height_bridge + 2.5, front_z + 1.5], [inner[1], height_bridge, front_z]]), tube, closed=False))
    return meshes


def _tube(path: np.ndarray, radius: float, closed: bool) -> Mesh:
    """A round tube along a path [n, 3]."""
    along = np.roll(path, -1, 0) - np.roll(path, 1, 0) if closed else np.gradient(path, axis=0)
    along = along / np.linalg.norm(along, axis=1, keepdims=True)
    first = np.cross(along, np.array([0.13, 0.21, 0.97]) if closed else np.array([0.1, 0.99, 0.05]))
    first /= np.linalg.norm(first, axis=1, keepdims=True)
    second = np.cross(along, first)
    angle = np.linspace(0, 2 * np.pi, 7)[:, None, None]
    grid = path[None] + radius * (np.cos(angle) * first[None] + np.sin(angle) * second[None])
    return _sheet(grid, FRAME, closed=closed)
