"""The 68 face landmarks and two pupils on a head that comes without a landmark embedding.

A frontal layout of typical proportions is fitted to the eyeballs, the lips and the nose tip, and every point is moved along the
viewing axis onto the foremost face of the mesh. Good enough to crop and align pictures; an embedding in the file is better.
Order: iBUG's 68 (from the person's right to the left, -x to +x), then the right and the left pupil, so that points 68, 69, 30, 48, 54
stand in the order of the usual five-point face templates.
"""

from __future__ import annotations

import numpy as np

# Units: distance between the eyeball centres, from the middle between them; x to the person's left, y up.
# Right half only where the layout is symmetric; `_mirror` adds the left half.
_JAW_X = (-1.13, -1.12, -1.09, -1.03, -0.92, -0.75, -0.53, -0.28, 0.0)
_JAW_Y = (0.05, -0.25, -0.55, -0.85, -1.12, -1.36, -1.55, -1.68, -1.72)
_BROW = [(-0.92, 0.28), (-0.76, 0.41), (-0.57, 0.44), (-0.38, 0.41), (-0.2, 0.34)]
_EYE = [(-0.24, -0.01), (-0.11, 0.09), (0.09, 0.09), (0.23, -0.02), (0.09, -0.08), (-0.1, -0.08)]  # around the right eyeball centre
# Lips: x in half mouth widths, y in half lip heights, around the lips' centre.
_OUTER_LIP_X = (-1.0, -0.6, -0.22, 0.0, 0.22, 0.6, 1.0, 0.6, 0.25, 0.0, -0.25, -0.6)
_OUTER_LIP_Y = (0.0, 0.5, 0.9, 0.8, 0.9, 0.5, 0.0, -0.6, -0.95, -1.0, -0.95, -0.6)
_INNER_LIP = [(-0.85, 0.0), (-0.25, 0.25), (0.0, 0.22), (0.25, 0.25), (0.85, 0.0), (0.25, -0.3), (0.0, -0.33), (-0.25, -0.3)]


def frontal_layout(
    right_eye: np.ndarray,  # [2] x, y of the right eyeball's centre, any length unit
    left_eye: np.ndarray,  # [2]
    lips: np.ndarray,  # [n, 2] lip vertices
    nose_tip: np.ndarray,  # [2]
) -> np.ndarray:
    """The 70 points [70, 2] seen from the front, in the unit of the arguments."""
    middle, unit = (right_eye + left_eye) / 2, float(np.linalg.norm(left_eye - right_eye))
    low, high = lips.min(0), lips.max(0)
    mouth, half = (low + high) / 2, (high - low) / 2

    jaw = np.stack([_JAW_X, _JAW_Y], 1) * unit
    jaw[:, 1] *= (mouth[1] - middle[1]) / (-1.05 * unit)  # long and short faces: the mouth of the layout is at -1.05
    jaw = middle + np.concatenate([jaw, _mirror(jaw[:-1])[::-1]])
    brows = np.array(_BROW) * unit
    brows = middle + np.concatenate([brows, _mirror(brows)[::-1]])
    bridge_top = middle + [0.0, 0.05 * unit]
    bridge = bridge_top + np.linspace(0, 1, 4)[:, None] * (nose_tip - bridge_top)
    nostrils = nose_tip + np.array([(-0.24, -0.15), (-0.12, -0.19), (0.0, -0.22), (0.12, -0.19), (0.24, -0.15)]) * unit
    eye = np.array(_EYE) * unit
    eyes = np.concatenate([right_eye + eye, left_eye + _mirror(eye)[[3, 2, 1, 0, 5, 4]]])
    lips_outer, lips_inner = mouth + np.stack([_OUTER_LIP_X, _OUTER_LIP_Y], 1) * half, mouth + np.array(_INNER_LIP) * half
    return np.concatenate([jaw, brows, bridge, nostrils, eyes, lips_outer, lips_inner, right_eye[None], left_eye[None]])


def place_landmarks(
    layout: np.ndarray,  # [70, 2] x, y
    vertices: np.ndarray,  # [N, 3] template
    skin_faces: np.ndarray,  # [f, 3] faces that points 0-67 may lie on
    eye_faces: np.ndarray,  # [g, 3] for the pupils
    faces: np.ndarray,  # [F, 3] all faces, in which the result counts
) -> tuple[np.ndarray, np.ndarray]:
    """Face ids [70] and barycentric weights [70, 3] of the foremost hit of every point; the nearest corner where none is hit."""
    ids, weights = np.zeros(70, np.int64), np.zeros((70, 3), np.float32)
    index = {tuple(face): i for i, face in enumerate(faces.tolist())}
    for part, part_faces in ((range(68), skin_faces), (range(68, 70), eye_faces)):
        a, b, c = (vertices[part_faces[:, i]] for i in range(3))
        area = _cross(b - a, c - a)
        usable = np.abs(area) > 1e-12
        safe = np.where(usable, area, 1.0)
        for point in part:
            p = layout[point]
            flat = np.array([p[0], p[1], 0.0])
            opposite = [_cross(b - flat, c - flat), _cross(c - flat, a - flat), _cross(a - flat, b - flat)]
            bary = np.stack(opposite, 1) / safe[:, None]
            hit = usable & (bary >= 0).all(1)
            if hit.any():
                depth = (bary * np.stack([a[:, 2], b[:, 2], c[:, 2]], 1)).sum(1)
                best = int(np.where(hit, depth, -np.inf).argmax())
                weights[point] = bary[best]
            else:
                corners = vertices[part_faces][:, :, :2]
                best, corner = divmod(int(np.linalg.norm(corners - p, axis=2).argmin()), 3)
                weights[point, corner] = 1.0
            ids[point] = index[tuple(part_faces[best].tolist())]
    return ids, weights


def _mirror(points: np.ndarray) -> np.ndarray:
    return points * [-1.0, 1.0]


def _cross(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    return first[:, 0] * second[:, 1] - first[:, 1] * second[:, 0]
