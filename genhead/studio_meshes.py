"""Small meshes of the studio and the materials they are made of.

Lengths in the studio are millimetres (a scene unit is 1000 / 3 mm); x to the person's left, y up, z forward, origin at the
neck joint.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

MM_PER_UNIT = 1000.0 / 3.0
SKIN, LEFT_EYE, RIGHT_EYE, TEETH, CAVITY, HAIR, CLOTH, FRAME = range(8)  # materials


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


def sheet(grid: np.ndarray, material: int, closed: bool) -> Mesh:
    rows, columns = grid.shape[:2]
    points = grid.reshape(-1, 3)
    return Mesh(points, grid_faces(rows, columns, closed), material, points, np.zeros_like(points))


def smooth(x: np.ndarray, low: float, high: float) -> np.ndarray:
    """0 at `low`, 1 at `high` (which may be the smaller), with zero slope at both."""
    t = np.clip((x - low) / (high - low), 0, 1)
    return t * t * (3 - 2 * t)


def cross(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Cross product of rows; several times faster than numpy.cross."""
    return np.stack(
        [a[:, 1] * b[:, 2] - a[:, 2] * b[:, 1], a[:, 2] * b[:, 0] - a[:, 0] * b[:, 2], a[:, 0] * b[:, 1] - a[:, 1] * b[:, 0]], -1
    )


def vertex_normals(vertices: np.ndarray, faces: np.ndarray) -> np.ndarray:
    """Area-weighted unit normals [N, 3]."""
    a, b, c = (vertices[faces[:, k]] for k in range(3))
    face_normals = cross(b - a, c - a)
    total = np.stack([np.bincount(faces.ravel(), np.repeat(face_normals[:, k], 3), len(vertices)) for k in range(3)], -1)
    return total / (np.linalg.norm(total, axis=1, keepdims=True) + 1e-12)
