"""One mesh out of the parts: skin, lid rims, mouth lining, teeth, tongue and, last, the eyeballs. Lengths in mm."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import numpy as np

from head3d.procedural import openings, sculpt, surface


class Assembly(NamedTuple):
    """The neutral head and the vertex ids of its parts."""

    points: np.ndarray  # [N, 3] mm, frame of `sculpt`
    faces: np.ndarray  # [F, 3] outward winding
    skin: surface.Skin  # its vertices come first, under their own ids
    lid_rims_left: np.ndarray  # [3, EYE_LOOP] from the margin inward, in the order of skin.eye_left
    lid_rims_right: np.ndarray
    lining: np.ndarray  # [LINING_RINGS, M] from the lips to the throat, in the order of skin.mouth
    throat: int
    upper_teeth: np.ndarray
    lower_teeth: np.ndarray
    tongue: np.ndarray
    left_eyeball: np.ndarray
    right_eyeball: np.ndarray
    iris: np.ndarray  # of both eyes, pupils included
    pupil: np.ndarray


def _rings(loop: np.ndarray, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids [count, M] of new rings that continue a loop, and the faces between them."""
    ids = first + np.arange(count * len(loop)).reshape(count, len(loop))
    rows = [loop, *ids]
    return ids, np.concatenate([openings.bridge(a, b) for a, b in itertools.pairwise(rows)])


def assemble() -> Assembly:
    """Build and join all parts of the neutral head."""
    skin = surface.build_skin()
    skin_points = skin.points.copy()
    ear = openings.left_ear(skin_points[skin.ear_left], surface.EAR_SPOKES)
    skin_points[skin.ear_left], skin_points[skin.ear_right] = ear, ear * [-1.0, 1.0, 1.0]
    points, faces, total = [skin_points], [skin.faces], len(skin_points)

    def add(new_points: np.ndarray, new_faces: np.ndarray) -> np.ndarray:
        nonlocal total
        points.append(new_points)
        faces.append(new_faces)
        total += len(new_points)
        return np.arange(total - len(new_points), total)

    rims = openings.lid_rims(skin_points[skin.eye_left])
    left_ids, rim_faces = _rings(skin.eye_left, total, len(rims))
    add(rims.reshape(-1, 3), rim_faces)
    right_ids, rim_faces = _rings(skin.eye_right, total, len(rims))
    add(rims.reshape(-1, 3) * [-1.0, 1.0, 1.0], rim_faces[:, ::-1])

    lining = openings.mouth_lining(skin_points[skin.mouth])
    lining_ids, lining_faces = _rings(skin.mouth, total, len(lining))
    throat = total + lining.shape[0] * lining.shape[1]
    add(np.concatenate([lining.reshape(-1, 3), [openings.THROAT]]), np.concatenate([lining_faces, openings.fan(lining_ids[-1], throat)]))

    def add_patch(patch: openings.Patch) -> np.ndarray:
        return add(patch.points, patch.faces + total)

    upper_teeth, lower_teeth = add_patch(openings.tooth_row(upper=True)), add_patch(openings.tooth_row(upper=False))
    tongue = add_patch(openings.tongue())
    eyeball = openings.left_eyeball()
    left_eye = add_patch(eyeball.patch)
    right_eye = add_patch(openings.mirrored(eyeball.patch))
    return Assembly(
        np.concatenate(points), np.concatenate(faces), skin, left_ids, right_ids, lining_ids, throat, upper_teeth, lower_teeth, tongue,
        left_eye, right_eye, np.concatenate([left_eye[eyeball.iris], right_eye[eyeball.iris]]),
        np.concatenate([left_eye[eyeball.pupil], right_eye[eyeball.pupil]]),
    )  # fmt: skip


def below_mouth(assembly: Assembly) -> np.ndarray:
    """How far a vertex belongs to the lower half of the face [N]: 0 above the mouth, 1 below, a step across the slit, smooth elsewhere."""
    points, skin = assembly.points, assembly.skin
    p = points[: len(skin.points)]
    hinge = sculpt.JAW_JOINT
    plane = hinge[1] + (slit_middle() - hinge[1]) * (p[:, 2] - hinge[2]) / (98.0 - hinge[2])  # through the jaw's axis and the slit
    below = sculpt.smoothstep(plane - p[:, 1], -12.0, 16.0)
    at_lips = (np.abs(p[:, 0]) < 0.98 * sculpt.MOUTH_HALF_WIDTH) & (p[:, 2] > 70.0) & (np.abs(p[:, 1] + 33.0) < 17.0)
    sharp = (p[:, 1] < sculpt.slit_height(p[:, 0])).astype(float)
    below = np.where(at_lips, sharp, below)
    half = len(skin.mouth) // 2
    below[skin.mouth[1:half]], below[skin.mouth[half + 1 :]] = 0.0, 1.0
    below[skin.mouth[[0, half]]] = 0.5
    below = smooth(below, skin.faces, rounds=12)
    result = np.zeros(len(points))
    result[: len(p)] = below
    angle = 2.0 * np.pi * np.arange(len(skin.mouth)) / len(skin.mouth)
    for ring, ids in enumerate(assembly.lining):
        share = np.clip((ring - 1) / 3.0, 0.0, 1.0)
        deep = (0.5 - 0.5 * np.sin(angle)) * (1.0 if ring < 6 else 0.5)
        result[ids] = (1 - share) * below[skin.mouth] + share * deep
    result[assembly.throat] = 0.2
    result[np.concatenate([assembly.lower_teeth, assembly.tongue])] = 1.0
    return result


def slit_middle() -> float:
    return float(sculpt.slit_height(np.zeros(1))[0])


def smooth(values: np.ndarray, faces: np.ndarray, rounds: int) -> np.ndarray:
    """Repeatedly replace vertex values [N] by the mean of themselves and the mean of their neighbours."""
    edges = np.unique(np.sort(np.concatenate([faces[:, [0, 1]], faces[:, [1, 2]], faces[:, [2, 0]]]), axis=1), axis=0)
    a, b = edges.T
    degree = np.bincount(edges.ravel(), minlength=len(values))
    for _ in range(rounds):
        around = np.bincount(a, values[b], len(values)) + np.bincount(b, values[a], len(values))
        values = 0.5 * values + 0.5 * around / np.maximum(degree, 1)
    return values


def joints() -> np.ndarray:
    """Root, neck, jaw, left and right eye [5, 3], mm."""
    return np.array([sculpt.ROOT_JOINT, sculpt.NECK_JOINT, sculpt.JAW_JOINT, sculpt.EYE, sculpt.EYE * [-1.0, 1.0, 1.0]])


def skinning_weights(assembly: Assembly, below: np.ndarray) -> np.ndarray:
    """Weights [N, 5]; rows sum to one. The lower edge of the neck stays with the root, the lower face follows the jaw."""
    p = assembly.points
    count = len(assembly.skin.points)
    jaw = below * sculpt.smoothstep(p[:, 1], -118.0, -84.0) * sculpt.smoothstep(p[:, 2], -4.0, 34.0)
    jaw[:count] = smooth(jaw[:count], assembly.skin.faces, rounds=3)
    jaw[np.concatenate([assembly.lower_teeth, assembly.tongue])] = 1.0
    root = sculpt.smoothstep(p[:, 1], -52.0, -150.0)
    weights = np.zeros((len(p), 5))
    weights[:, 0] = root
    weights[:, 2] = (1.0 - root) * jaw
    weights[:, 1] = 1.0 - weights[:, 0] - weights[:, 2]
    for joint, ids in ((3, assembly.left_eyeball), (4, assembly.right_eyeball)):
        weights[ids] = np.eye(5)[joint]
    return weights


def joint_regressor(assembly: Assembly) -> np.ndarray:
    """Weights [5, N] over vertices whose means are the joints; rows sum to one.

    Every joint is the smallest change of a uniform mean over vertices around it that hits it exactly, so that it moves with them.
    """
    p = assembly.points
    skin = np.arange(len(assembly.skin.points))
    at = joints()
    rows = np.zeros((5, len(p)))
    neck_low = np.flatnonzero(p[:, 1] < -85.0)
    skull_base = skin[np.abs(p[skin, 1] - at[1, 1]) < 24.0]
    jaw_hinge = skin[(np.linalg.norm((np.abs(p[skin]) * [1, 0, 0] + p[skin] * [0, 1, 1]) - [66, at[2, 1], at[2, 2]], axis=1) < 30.0)]
    for joint, ids in enumerate((neck_low, skull_base, jaw_hinge, assembly.left_eyeball, assembly.right_eyeball)):
        moments = np.concatenate([np.ones((1, len(ids))), (p[ids] - at[joint]).T])  # rows: sum, x, y, z about the joint
        uniform = np.full(len(ids), 1.0 / len(ids))
        missing = np.array([1.0, 0.0, 0.0, 0.0]) - moments @ uniform
        rows[joint, ids] = uniform + moments.T @ np.linalg.solve(moments @ moments.T, missing)
    return rows
