"""The skin mesh: where its vertices lie on the sculpted surface and how they are joined.

A vertex is a direction on a unit sphere (the chart of `sculpt.cast`). Feature lines (lid margins, lip rows, ears, midline, neck edge)
come first, the rest is filled by dart throwing with a spacing that follows the anatomy. The convex hull of the directions is the
Delaunay triangulation of the sphere; the triangles inside the eye openings, the mouth slit and the neck edge are left out.
Directions are mirror symmetric. Lengths in mm.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import numpy as np
from scipy.spatial import ConvexHull, cKDTree

from head3d.procedural import sculpt

EYE_LOOP = 30  # vertices around each lid margin
LID_ROWS = (1.7, 3.6, 5.7, 8.0)  # distances in mm of the vertex rows that follow the margin
MOUTH_COLUMNS = 21  # vertices of one lip from corner to corner, both corners counted
EAR_SPOKES = 28
EAR_RINGS = 11  # the last one lies on the head
NECK_LOOP = 48


class Skin(NamedTuple):
    """Triangulated skin with named vertices; loops are ordered vertex ids."""

    points: np.ndarray  # [N, 3] mm
    faces: np.ndarray  # [F, 3] outward winding
    mirror: np.ndarray  # [N] id of each vertex's mirror image
    eye_left: np.ndarray  # [EYE_LOOP] lid margin: outer corner, upper lid, inner corner, lower lid
    eye_right: np.ndarray
    mouth: np.ndarray  # [2 * MOUTH_COLUMNS - 2] slit: left corner, upper lip, right corner, lower lip
    ear_left: np.ndarray  # [1 + EAR_RINGS * EAR_SPOKES] centre, then rings from inside out
    ear_right: np.ndarray
    neck: np.ndarray  # [NECK_LOOP] lower edge


def lid_contour(grow: float) -> np.ndarray:
    """Points [EYE_LOOP, 3] of the left lid margin, widened by `grow` mm; outer corner first, then over the upper lid."""
    angle = 2.0 * np.pi * np.arange(EYE_LOOP) / EYE_LOOP
    c, s = np.cos(angle), np.sin(angle)
    half = 14.4
    arch = np.where(s >= 0.0, 5.4 - 0.5 * c, -(4.9 + 0.5 * c)) * np.abs(s) ** 1.3
    x = (half + grow) * c
    y = arch + np.sign(s) * grow * np.abs(s) + 0.9 * c - 0.6
    depth = np.sqrt(np.maximum(sculpt.LID_RADIUS**2 - 0.86 * (half * c) ** 2 - arch**2, 16.0))
    return sculpt.EYE + np.stack([x, y, depth], axis=1)


def _mouth_rows(opening: float) -> list[np.ndarray]:
    """Rows of points of the half mouth x >= 0, the slit's two rows first (the corner belongs to the upper one).

    `opening` is half the slit's height in the middle: wide while the chart is triangulated, almost nothing when it is cast.
    """
    x = sculpt.MOUTH_HALF_WIDTH * np.linspace(0.0, 1.0, MOUTH_COLUMNS // 2 + 1)
    slit = sculpt.slit_height(x)
    upper, lower = sculpt.lip_heights(x)
    gap = opening * np.sqrt(1.0 - (x / sculpt.MOUTH_HALF_WIDTH) ** 6)
    depth = 102.0 - 0.024 * x**2
    heights = [slit + gap, (slit - gap)[:-1]]
    for part in (0.36, 0.7, 1.0):
        heights += [slit + np.maximum(part * upper, gap + 0.7 + part), slit - np.maximum(part * lower, gap + 0.7 + part)]
    heights += [slit + upper + 2.0, slit - lower - 2.0]
    return [np.stack([x[: len(y)], y, depth[: len(y)]], axis=1) for y in heights]


def _ear_footprint() -> np.ndarray:
    """Points [1 + EAR_RINGS * EAR_SPOKES, 3] of the left ear's chart, a disk on the side of the head."""
    angle = 2.0 * np.pi * np.arange(EAR_SPOKES) / EAR_SPOKES
    rings = np.arange(1, EAR_RINGS + 1) / EAR_RINGS
    z = -8.0 - 12.0 * rings[:, None] * np.cos(angle)
    y = 20.0 + 24.0 * rings[:, None] * np.sin(angle)
    disk = np.stack([np.full(z.shape, 70.0), y, z], axis=-1).reshape(-1, 3)
    return np.concatenate([[[70.0, 20.0, -8.0]], disk])


def spacing(points: np.ndarray) -> np.ndarray:
    """Wanted edge length [N] in mm at surface points [N, 3]."""
    a = np.abs(points[:, 0])
    y, z = points[:, 1], points[:, 2]
    face = np.linalg.norm((np.stack([a, y, z], 1) - [25, 0, 80]) / [45, 75, 45], axis=1)
    h = np.clip(4.4 + 5.0 * (face - 1.0), 4.4, 9.5)
    eye = np.linalg.norm(np.stack([a, y, z], 1) - sculpt.EYE - [0, 0, 12], axis=1)
    mouth = np.hypot(np.maximum(a - 22.0, 0.0), y + 32.0) + np.maximum(70.0 - z, 0.0)
    nose = np.linalg.norm((np.stack([a, y, z], 1) - [7, -2, 102]) / [1.0, 1.3, 1.0], axis=1)
    ear = np.hypot((y - 20.0) / 1.8, z + 8.0) + np.maximum(45.0 - a, 0.0)
    for distance, fine, start, growth in ((eye, 2.2, 16, 0.16), (mouth, 2.4, 9, 0.14), (nose, 2.1, 9, 0.15), (ear, 3.0, 13, 0.25)):
        h = np.minimum(h, fine + growth * np.maximum(distance - start, 0.0))
    return h


def _fibonacci(count: int) -> np.ndarray:
    index = np.arange(count) + 0.5
    y = 1.0 - 2.0 * index / count
    radius, angle = np.sqrt(1.0 - y * y), np.pi * (1.0 + 5.0**0.5) * index
    return np.stack([radius * np.cos(angle), y, radius * np.sin(angle)], axis=1)


def _midline() -> np.ndarray:
    """Directions [M, 3] of the midline x = 0, spaced as `spacing` asks."""
    angle = np.linspace(sculpt.NECK_TO, np.pi - sculpt.NECK_TO, 700)
    directions = np.stack([np.zeros_like(angle), np.sin(angle), np.cos(angle)], axis=1)
    points = sculpt.cast(directions, steps=40)
    step = np.linalg.norm(np.diff(points, axis=0), axis=1) / spacing(0.5 * (points[1:] + points[:-1]))
    travelled = np.concatenate([[0.0], np.cumsum(step)])
    wanted = np.linspace(0.0, travelled[-1], round(float(travelled[-1])) + 1)[1:-1]
    at = np.interp(wanted, travelled, angle)
    return np.stack([np.zeros_like(at), np.sin(at), np.cos(at)], axis=1)


def _in_rows(points: np.ndarray) -> np.ndarray:
    """Which surface points [N, 3] of the half x >= 0 the rows around the eye and of the lips already cover, seen from the front."""
    contour = lid_contour(LID_ROWS[-1]) - sculpt.EYE
    offset = points - sculpt.EYE
    angle = np.arctan2(contour[:, 1], contour[:, 0])
    order = np.argsort(angle)
    edge = np.interp(np.arctan2(offset[:, 1], offset[:, 0]), angle[order], np.hypot(contour[order, 0], contour[order, 1]), period=2 * np.pi)
    eye = (offset[:, 2] > 0.0) & (np.hypot(offset[:, 0], offset[:, 1]) < edge)
    upper, lower = sculpt.lip_heights(points[:, 0])
    above = points[:, 1] - sculpt.slit_height(points[:, 0])
    mouth = (points[:, 2] > 70.0) & (points[:, 0] < sculpt.MOUTH_HALF_WIDTH) & (above < upper + 1.5) & (above > -lower - 1.5)
    return eye | mouth


def _fill(fixed: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Directions [M, 3] with x > 0 that fill the chart around the fixed ones (dart throwing)."""
    pool = [_fibonacci(9000)]
    for centre, angle_deg, count in (((0.0, -0.2, 1.0), 42.0, 26000), ((0.33, 0.06, 1.0), 18.0, 60000), ((0.1, -0.45, 1.0), 22.0, 60000)):
        cap = _fibonacci(count)
        axis = np.array(centre) / np.linalg.norm(centre)
        pool.append(cap[cap @ axis > np.cos(np.deg2rad(angle_deg))])
    pool = np.concatenate(pool)
    pool = pool[(pool[:, 0] > 0.004) & (pool[:, 1] > np.sin(sculpt.NECK_TO) + 0.002)]
    pool = pool[generator.permutation(len(pool))]
    points, held = sculpt.cast(pool, steps=22), sculpt.cast(fixed, steps=30)
    wanted = spacing(points)
    alive = (points[:, 0] > 0.45 * wanted) & ~_in_rows(points) & (cKDTree(fixed).query(pool)[0] > 0.019)
    tree = cKDTree(points)
    for near in tree.query_ball_point(held, 0.8 * spacing(held)):
        alive[near] = False
    chosen = []
    for i in range(len(pool)):
        if alive[i]:
            chosen.append(i)
            alive[tree.query_ball_point(points[i], 0.82 * wanted[i])] = False
    return pool[chosen]


def _hull(directions: np.ndarray) -> np.ndarray:
    """Delaunay triangles [F, 3] of unit directions, seen counter-clockwise from outside."""
    faces = ConvexHull(directions).simplices
    a, b, c = (directions[faces[:, i]] for i in range(3))
    inward = np.einsum("ij,ij->i", np.cross(b - a, c - a), a + b + c) < 0.0
    faces[inward] = faces[inward][:, ::-1]
    return faces[np.lexsort(faces.T[::-1])].astype(np.int64)


def _relax(directions: np.ndarray, joined: np.ndarray, movable: np.ndarray, mirror: np.ndarray, rounds: int) -> np.ndarray:
    """Even out the edges: every movable vertex goes toward the mean of its neighbours, long edges pulling harder.

    `joined` are the ids that take part in the triangulation.
    """
    for _ in range(rounds):
        faces = joined[_hull(directions[joined])]
        edges = np.unique(np.sort(np.concatenate([faces[:, [0, 1]], faces[:, [1, 2]], faces[:, [2, 0]]]), axis=1), axis=0)
        both = np.concatenate([edges, edges[:, ::-1]])
        offset = directions[both[:, 1]] - directions[both[:, 0]]
        pull = np.linalg.norm(offset, axis=1) ** 0.5
        total, force = np.full(len(directions), 1e-9), np.zeros_like(directions)
        np.add.at(total, both[:, 0], pull)
        np.add.at(force, both[:, 0], pull[:, None] * offset)
        moved = directions + 0.5 * force / total[:, None]
        moved = 0.5 * (moved + moved[mirror] * [-1.0, 1.0, 1.0])
        directions = np.where(movable[:, None], moved / np.linalg.norm(moved, axis=1, keepdims=True), directions)
    return directions


def _ear_faces(ear: np.ndarray) -> np.ndarray:
    """Triangles of the left ear's disk along its rings and spokes (rings run counter-clockwise seen from outside)."""
    rings = ear[1:].reshape(EAR_RINGS, EAR_SPOKES)
    faces = [np.stack([rings[0], np.roll(rings[0], -1), np.full(EAR_SPOKES, ear[0])], 1)]
    for inner, outer in itertools.pairwise(rings):
        following_in, following_out = np.roll(inner, -1), np.roll(outer, -1)
        faces += [np.stack([outer, following_out, inner], 1), np.stack([following_out, following_in, inner], 1)]
    return np.concatenate(faces)


def build_skin() -> Skin:
    """Place, join and cast the skin's vertices; the ears are still flat disks on the head."""
    generator = np.random.default_rng(20)
    neck_angle = np.pi * np.arange(NECK_LOOP // 2 + 1) / (NECK_LOOP // 2)  # from the front over the left side to the back
    cos, sin = np.cos(sculpt.NECK_TO), np.sin(sculpt.NECK_TO)
    neck = np.stack([cos * np.sin(neck_angle), np.full(neck_angle.shape, sin), cos * np.cos(neck_angle)], axis=1)
    rows = _mouth_rows(opening=0.8)
    towards = sculpt.towards
    groups = [neck, towards(lid_contour(0.0)), towards(rows[0]), towards(rows[1]), towards(_ear_footprint())]
    starts = np.cumsum([0] + [len(g) for g in groups])
    soft = [towards(lid_contour(grow)) for grow in LID_ROWS] + [towards(row[:-1]) for row in rows[2:]] + [_midline()]
    half = np.concatenate(groups)
    half[np.abs(half[:, 0]) < 1e-6, 0] = 0.0
    for extra in soft:  # later lines give way to earlier ones
        gap = cKDTree(half).query(extra)[0]
        half = np.concatenate([half, extra[gap > 0.011]])
    fixed = len(half)
    half = np.concatenate([half, _fill(half, generator)])
    twin = np.flatnonzero(half[:, 0] > 1e-7)
    directions = np.concatenate([half, half[twin] * [-1.0, 1.0, 1.0]])
    mirror = np.arange(len(directions))
    mirror[twin] = len(half) + np.arange(len(twin))
    mirror[mirror[twin]] = twin
    ids = [np.arange(starts[i], starts[i + 1]) for i in range(len(groups))]
    ear = ids[4]
    inner_ear = np.zeros(len(directions), bool)  # joined along rings and spokes, not by the triangulation
    inner_ear[ear[:-EAR_SPOKES]] = inner_ear[mirror[ear[:-EAR_SPOKES]]] = True
    joined = np.flatnonzero(~inner_ear)
    is_fixed = np.zeros(len(directions), bool)
    is_fixed[:fixed] = is_fixed[mirror[:fixed]] = True
    near_fixed = cKDTree(directions[is_fixed]).query(directions)[0] < 0.03
    directions = _relax(directions, joined, ~near_fixed, mirror, rounds=8)

    upper, lower = ids[2], ids[3]  # from the midline to the left corner
    mouth = np.concatenate([upper[::-1], mirror[upper[1:]], mirror[lower[1:]][::-1], lower])
    neck_loop = np.concatenate([ids[0], mirror[ids[0][1:-1]][::-1]])
    rim = ear[-EAR_SPOKES:]
    faces = joined[_hull(directions[joined])]
    for loop in (ids[1], mirror[ids[1]], mouth, neck_loop, rim, mirror[rim]):
        inside = np.zeros(len(directions), bool)
        inside[loop] = True
        faces = faces[~inside[faces].all(axis=1)]
    spokes = _ear_faces(ear)
    faces = np.concatenate([faces, spokes, mirror[spokes][:, ::-1]])
    closed = _mouth_rows(opening=0.2)[:2]
    for row, place in zip((upper, lower), closed, strict=True):
        directions[row] = towards(place)
        directions[mirror[row]] = towards(place * [-1.0, 1.0, 1.0])
    points = np.empty_like(directions)
    points[: len(half)] = sculpt.cast(directions[: len(half)])
    points[mirror[: len(half)]] = points[: len(half)] * [-1.0, 1.0, 1.0]
    points[: len(half), 0] = np.where(half[:, 0] > 1e-7, points[: len(half), 0], 0.0)
    return Skin(points, faces, mirror, ids[1], mirror[ids[1]], mouth, ear, mirror[ear], neck_loop)
