"""What lies behind the openings of the skin: lid rims, eyeballs, the mouth's lining, teeth and tongue; and the ears. Lengths in mm."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from head3d.procedural import sculpt

EYEBALL_SEGMENTS = 24
_IRIS = float(np.arcsin(5.9 / sculpt.EYEBALL_RADIUS))  # half angle of the iris, radius 5.9 mm
_PUPIL = float(np.arcsin(2.1 / sculpt.EYEBALL_RADIUS))
THROAT = np.array([0.0, -34.0, 34.0])  # apex of the mouth's lining
TEETH = 12  # in one row
_TOOTH_COLUMNS = 3  # columns of vertices a tooth


class Patch(NamedTuple):
    """A piece of mesh; faces index `points`."""

    points: np.ndarray  # [N, 3] mm
    faces: np.ndarray  # [F, 3]


def bridge(outer: np.ndarray, inner: np.ndarray, closed: bool = True) -> np.ndarray:
    """Triangles between two rows of equally many vertex ids, wound like (outer[0], outer[1], inner[0])."""
    following = np.roll(np.arange(len(outer)), -1) if closed else np.arange(1, len(outer))
    here = np.arange(len(following))
    a, b, c, d = outer[here], outer[following], inner[here], inner[following]
    return np.concatenate([np.stack([a, b, c], 1), np.stack([b, d, c], 1)])


def fan(ring: np.ndarray, apex: int) -> np.ndarray:
    """Triangles that close a ring of vertex ids toward one vertex, wound like (ring[0], ring[1], apex)."""
    return np.stack([ring, np.roll(ring, -1), np.full(len(ring), apex)], 1)


def mirrored(patch: Patch) -> Patch:
    return Patch(patch.points * [-1.0, 1.0, 1.0], patch.faces[:, ::-1])


class Eyeball(NamedTuple):
    patch: Patch
    iris: np.ndarray  # vertex ids inside the iris, pupil included
    pupil: np.ndarray


def left_eyeball() -> Eyeball:
    """A sphere whose front pole looks along +z, with rings on the edges of pupil and iris."""
    angles = np.concatenate([[0.5 * _PUPIL, _PUPIL], np.linspace(_PUPIL, _IRIS, 4)[1:], np.linspace(_IRIS, np.pi, 16)[1:-1]])
    turn = 2.0 * np.pi * np.arange(EYEBALL_SEGMENTS) / EYEBALL_SEGMENTS
    ring = np.stack(
        [np.sin(angles)[:, None] * np.cos(turn), np.sin(angles)[:, None] * np.sin(turn), np.cos(angles)[:, None] + 0 * turn], -1
    )
    points = np.concatenate([[[0.0, 0.0, 1.0]], ring.reshape(-1, 3), [[0.0, 0.0, -1.0]]])
    rings = 1 + np.arange(len(angles))[:, None] * EYEBALL_SEGMENTS + np.arange(EYEBALL_SEGMENTS)
    faces = [fan(rings[0], 0)]
    faces += [bridge(rings[i + 1], rings[i]) for i in range(len(angles) - 1)]
    faces.append(fan(rings[-1][::-1], len(points) - 1))
    polar = np.arccos(np.clip(points[:, 2], -1.0, 1.0))
    patch = Patch(sculpt.EYE + sculpt.EYEBALL_RADIUS * points, np.concatenate(faces))
    return Eyeball(patch, np.flatnonzero(polar < _IRIS + 1e-6), np.flatnonzero(polar < _PUPIL + 1e-6))


def lid_rims(margin: np.ndarray) -> np.ndarray:
    """Rings [3, EYE_LOOP, 3] behind the left lid margin [EYE_LOOP, 3]: the lid's edge, then a pocket around the eyeball."""
    offset = margin - sculpt.EYE
    reach = np.linalg.norm(offset, axis=1, keepdims=True)
    out = offset * [1.0, 1.0, 0.0]
    out /= np.linalg.norm(out, axis=1, keepdims=True)
    direction = offset / reach
    rings = []
    for radius, outward in ((sculpt.EYEBALL_RADIUS + 0.35, 0.03), (sculpt.EYEBALL_RADIUS + 0.5, 0.3), (sculpt.EYEBALL_RADIUS + 0.7, 0.75)):
        turned = direction + outward * out - [0.0, 0.0, 0.6 * outward]
        rings.append(sculpt.EYE + radius * turned / np.linalg.norm(turned, axis=1, keepdims=True))
    return np.stack(rings)


def mouth_lining(slit: np.ndarray) -> np.ndarray:
    """Rings [8, M, 3] behind the lip slit [M, 3]: inner lips, the pocket before the teeth, palate and floor, throat."""
    count = len(slit)
    angle = 2.0 * np.pi * np.arange(count) / count  # 0 at the left corner, pi / 2 at the middle of the upper lip
    across, up = slit[:, 0] / sculpt.MOUTH_HALF_WIDTH, np.sign(np.round(np.sin(angle), 6))
    bulge = np.sqrt(np.clip(1.0 - across**2, 0.0, 1.0))
    rings = []
    for depth, half_width, height in ((2.2, 24.4, 0.35), (5.0, 24.0, 1.2), (8.0, 23.8, 5.0), (10.0, 24.0, 12.0)):
        x, y = half_width * across, slit[:, 1] + up * height * bulge
        rings.append(np.stack([x, y, slit[:, 2] - depth], axis=1))
    for z, half_width, height in ((80.0, 27.0, 15.0), (66.0, 27.0, 15.0), (50.0, 23.0, 13.0), (38.0, 14.0, 8.0)):
        x, y = half_width * np.cos(angle), -34.0 + height * np.sin(angle)
        rings.append(np.stack([x, y, z - 0.012 * x**2], axis=1))
    return np.stack(rings)


def _arch(t: np.ndarray, half_width: float, front: float) -> tuple[np.ndarray, np.ndarray]:
    """x and z along a dental arch; t in [-1, 1]."""
    angle = t * 1.42
    return half_width * np.sin(angle), front - 34.0 * (1.0 - np.cos(angle))


def tooth_row(upper: bool) -> Patch:
    """One row of teeth: a closed band whose front bulges and whose edge dips at every tooth."""
    front, half_width = (89.5, 24.5) if upper else (86.0, 22.5)
    edge, root = (-34.4, -22.0) if upper else (-33.6, -45.0)
    widths = np.array([4.4, 3.5, 4.0, 3.6, 3.6, 5.0]) if upper else np.array([2.9, 3.1, 3.6, 3.7, 3.8, 5.4])
    bounds = np.concatenate([[0.0], np.cumsum(widths)]) / widths.sum()
    t, phase = [], []
    for side in range(TEETH // 2):
        local = np.arange(_TOOTH_COLUMNS) / _TOOTH_COLUMNS
        t.append(bounds[side] + local * (bounds[side + 1] - bounds[side]))
        phase.append(local)
    t, phase = np.concatenate(t + [[1.0]]), np.concatenate(phase + [[0.0]])
    t, phase = np.concatenate([-t[:0:-1], t]), np.concatenate([phase[:0:-1], phase])
    crown = np.sin(np.pi * phase) ** 0.5  # 0 between two teeth
    dip = 1.3 * (1.0 - crown) * (1.0 if upper else -1.0)
    rows = []
    for height, thick in ((0.0, 0.3), (0.35, 0.9), (0.85, 1.5), (1.0, 1.2)):  # front, root to edge
        x, z = _arch(t, half_width, front - 0.9 * (1.0 - crown) + 0.8 * thick)
        y = root + (edge - root) * height + dip * height
        rows.append(np.stack([x, y, z], axis=1))
    for height, thick in ((1.0, 2.2), (0.4, 5.0), (0.0, 5.5)):  # back, edge to root
        x, z = _arch(t, half_width - 0.8 * thick, front - thick)
        rows.append(np.stack([x, root + (edge - root) * height + dip * height, z], axis=1))
    points = np.concatenate(rows)
    ids = np.arange(len(points)).reshape(len(rows), len(t))
    faces = np.concatenate([bridge(ids[i], ids[(i + 1) % len(rows)], closed=False) for i in range(len(rows))])
    for end, flip in ((0, 1), (-1, -1)):
        cap = ids[:, end]
        faces = np.concatenate([faces, np.stack([np.full(len(cap) - 2, cap[0]), cap[1:-1], cap[2:]], 1)[:, ::flip]])
    return Patch(points, faces[:, ::-1] if upper else faces)


def tongue() -> Patch:
    """A flattened closed blob behind the lower teeth."""
    rings, segments = 7, 14
    polar = np.pi * np.arange(1, rings + 1) / (rings + 1)
    turn = 2.0 * np.pi * np.arange(segments) / segments
    ring = np.stack([np.sin(polar)[:, None] * np.cos(turn), np.sin(polar)[:, None] * np.sin(turn), np.cos(polar)[:, None] + 0 * turn], -1)
    points = np.concatenate([[[0, 0, 1.0]], ring.reshape(-1, 3), [[0, 0, -1.0]]])
    points[:, 1] += 0.25 * np.cos(np.pi * points[:, 0]) * 0.5 - 0.25 * points[:, 2] ** 2
    points = points * [17.0, 7.5, 21.0] + [0.0, -41.0, 60.0]
    ids = 1 + np.arange(rings * segments).reshape(rings, segments)
    faces = [fan(ids[0], 0)] + [bridge(ids[i + 1], ids[i]) for i in range(rings - 1)] + [fan(ids[-1][::-1], len(points) - 1)]
    return Patch(points, np.concatenate(faces))


# Cross sections of the ear along a spoke, from the concha to the root: reach (1 = outline) and height above the ear's plane in mm.
_EAR_BACK = np.stack(  # toward the back and the top: concha, antihelix, scapha, helix, back
    [(0.0, 0.28, 0.46, 0.58, 0.68, 0.78, 0.88, 0.96, 1.0, 0.95, 0.72), (-3.0, -4.0, -1.5, 3.5, 4.0, 1.8, 2.2, 5.0, 3.0, -1.5, -6.0)],
    axis=1,
)
_EAR_LOBE = np.stack(  # toward the lobe
    [(0.0, 0.25, 0.38, 0.48, 0.6, 0.72, 0.84, 0.95, 1.0, 0.94, 0.72), (-3.0, -3.5, 0.5, 3.0, 2.2, 2.2, 2.5, 2.2, 0.6, -1.2, -3.0)],
    axis=1,
)
_EAR_FRONT = np.stack(  # toward the cheek: concha, tragus, head
    [(0.0, 0.25, 0.45, 0.65, 0.85, 0.95, 1.05, 1.15, 1.3, 1.5, 1.7), (-3.0, -3.5, -2.5, 0.5, 3.2, 3.6, 2.8, 1.5, 0.4, 0.0, 0.0)],
    axis=1,
)


def left_ear(disk: np.ndarray, spokes: int) -> np.ndarray:
    """Lift the flat disk [1 + rings * spokes, 3] of the ear's vertices off the head; its last ring stays where it is."""
    rings = (len(disk) - 1) // spokes
    tilt, lean = np.deg2rad(24.0), np.deg2rad(9.0)
    back = np.array([np.sin(tilt), 0.0, -np.cos(tilt)])
    up = np.array([0.05, np.cos(lean), -np.sin(lean)])
    out = np.cross(up, back)
    out *= np.sign(out[0])
    origin = disk[0] + [1.0, 0.0, 6.0]
    angle = 2.0 * np.pi * np.arange(spokes) / spokes  # 0 at the back, pi / 2 at the top
    c, s = np.cos(angle), np.sin(angle)
    round_c, round_s = np.sign(c) * np.abs(c) ** 0.85, np.sign(s) * np.abs(s) ** 0.92
    u = np.where(c > 0.0, 23.0, 9.0) * round_c * np.where(s < 0.0, 1.0 + 0.30 * s, 1.0)
    v = np.where(s > 0.0, 31.0, 30.0) * round_s
    front = sculpt.smoothstep(-c, 0.15, 0.85)
    lobe = np.clip(-s, 0.0, 1.0) ** 1.5 * (1.0 - front)
    lifted = disk.copy()
    lifted[0] = origin - 3.0 * out
    for ring in range(rings - 1):
        ids = 1 + ring * spokes + np.arange(spokes)
        back_part = (1.0 - front - lobe)[:, None] * _EAR_BACK[ring + 1]
        section = back_part + lobe[:, None] * _EAR_LOBE[ring + 1] + front[:, None] * _EAR_FRONT[ring + 1]
        reach, height = section[:, :1], section[:, 1:]
        free = origin + reach * (u[:, None] * back + v[:, None] * up) + height * out
        attach = (front * np.clip((ring - 4) / 5.0, 0.0, 1.0))[:, None]  # toward the cheek the ear runs out on the head
        lifted[ids] = (1 - attach) * free + attach * disk[ids]
    return lifted
