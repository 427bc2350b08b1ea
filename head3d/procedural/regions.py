"""Vertex sets and landmarks of the built-in head. Heights and depths in mm, frame of `sculpt`."""

from __future__ import annotations

import numpy as np

from head3d.procedural import sculpt
from head3d.procedural.assembly import Assembly


def hairline(z: np.ndarray) -> np.ndarray:
    """Height of the lower edge of the hair at depth z: nape, behind and above the ear, temple, forehead."""
    return np.interp(z, [-110, -62, -40, -27, -16, 2, 14, 28, 48, 62, 78], [-48, -46, -34, 6, 54, 54, 18, 30, 74, 92, 99])


def masks(assembly: Assembly) -> dict[str, np.ndarray]:
    """Sorted vertex ids by name, int64."""
    skin_count = len(assembly.skin.points)
    p = assembly.points[:skin_count]
    x, y, z = np.abs(p[:, 0]), p[:, 1], p[:, 2]
    ear = np.zeros(skin_count, bool)
    ear[assembly.skin.ear_left] = ear[assembly.skin.ear_right] = True
    scalp = (y > hairline(z)) & ~ear
    neck = (~scalp & ~ear) & ((y < -82.0) | ((z < 22.0) & (y < -44.0)) | ((z < -10.0) & (y < 10.0)) | ((z < 62.0) & (y < -74.0)))
    upper, lower = sculpt.lip_heights(p[:, 0])
    above_slit = y - sculpt.slit_height(p[:, 0])
    lips = (z > 70.0) & (x < sculpt.MOUTH_HALF_WIDTH) & (above_slit < upper + 0.35) & (above_slit > -lower - 0.35)
    lips[assembly.skin.mouth] = True
    face = ~ear & ~neck & ~scalp & (z > 12.0)
    nose = face & (x < np.interp(y, [-13, -6, 8, 30, 44], [14.0, 19.5, 17.0, 11.0, 9.0])) & (y > -12.5) & (y < 44.0) & (z > 80.0)
    brow_middle = brow_height(x)
    brows = face & (np.abs(y - brow_middle) < np.interp(x, [10, 40, 52], [5.0, 3.8, 2.6])) & (x > 9.0) & (x < 51.0)
    moustache = (y < -11.0) & (y > -34.0) & (x < 31.0)
    beard = face & ~lips & ((y < -36.0) | moustache | ((z < 42.0) & (y < 12.0)) | (y < -10.0 - 26.0 * sculpt.smoothstep(x, 60.0, 26.0)))
    eyelids = np.zeros(skin_count, bool)
    for side in (1.0, -1.0):
        offset = p - sculpt.EYE * [side, 1.0, 1.0]
        eyelids |= (np.linalg.norm(offset, axis=1) < 17.5) & (offset[:, 2] > -1.0)
    rims = np.concatenate([assembly.lid_rims_left.ravel(), assembly.lid_rims_right.ravel()])
    cavity = np.append(assembly.lining.ravel(), assembly.throat)
    inner = np.concatenate([cavity, assembly.upper_teeth, assembly.lower_teeth, assembly.tongue])
    named = {
        "scalp": scalp, "neck": neck, "ears": ear, "nose": nose, "brows": brows, "beard": beard,
        "face": np.append(np.flatnonzero(face), rims),
        "lips": np.append(np.flatnonzero(lips), assembly.lining[:3].ravel()),
        "eyelids": np.append(np.flatnonzero(eyelids), rims),
        "noinmouth": np.setdiff1d(np.arange(len(assembly.points)), inner),
        "left_eyeball": assembly.left_eyeball, "right_eyeball": assembly.right_eyeball, "iris": assembly.iris, "pupil": assembly.pupil,
        "upper_teeth": assembly.upper_teeth, "lower_teeth": assembly.lower_teeth, "tongue": assembly.tongue, "mouth_cavity": cavity,
    }  # fmt: skip
    return {name: np.flatnonzero(ids) if ids.dtype == bool else np.unique(ids) for name, ids in named.items()}


def brow_height(x: np.ndarray) -> np.ndarray:
    """Height of the middle of the eyebrow at |x|."""
    return np.interp(x, [9, 20, 36, 44, 52], [55.5, 58.0, 60.5, 58.5, 53.5])


def landmarks(assembly: Assembly) -> tuple[np.ndarray, np.ndarray]:
    """Face ids [70] and barycentric weights [70, 3]: iBUG's 68 from the person's right to the left, then the right and left pupil."""
    skin = assembly.skin
    jaw_side = [(69, 20, 14), (68, 4, 14), (65, -14, 15), (62, -30, 18), (55, -46, 28), (46, -57, 42), (34, -67, 60), (18, -74, 79)]
    jaw = [*jaw_side, (0, -75, 88)]
    brow_x = np.array([50.0, 43.0, 34.0, 23.0, 11.0])
    brow = np.stack([brow_x, brow_height(brow_x), np.array([62.0, 72.0, 82.0, 90.0, 95.0])], 1)
    nose = [(0, 40, 90), (0, 27, 96), (0, 13, 102), (0, 1, 117)]
    nostrils = [(12.5, -9.5, 99), (6.5, -11, 104), (0, -11.5, 103)]
    x_lip = np.array([17.0, 6.0, 0.0])
    upper, lower = sculpt.lip_heights(x_lip)
    slit = sculpt.slit_height(x_lip)
    depth = 102.0 - 0.024 * x_lip**2
    flip = np.array([-1.0, 1.0, 1.0])

    def both(right_half: np.ndarray) -> np.ndarray:  # left-side points ordered from outside to the midline
        half = np.asarray(right_half, float)
        return np.concatenate([half * flip, half[-2::-1]])

    outer = np.concatenate([both(np.stack([x_lip, slit + upper, depth], 1)), both(np.stack([x_lip, slit - lower, depth], 1))[::-1]])
    skin_targets = sculpt.cast(sculpt.towards(np.concatenate([both(jaw), brow * flip, brow[::-1], nose, both(nostrils), outer])))
    faces, weights = _nearest_on_faces(assembly, skin_targets, np.arange(len(skin.faces)))

    def vertex(ids: list[int] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return _corner(assembly.faces, np.asarray(ids))

    count = len(skin.eye_left)
    on_lid = np.array([count // 2, count // 3, count // 6, 0, count - count // 6, count - count // 3])  # inner corner, over the top, under
    left_eye = skin.eye_left[on_lid]
    right_eye = skin.eye_right[on_lid[[3, 2, 1, 0, 5, 4]]]
    half = len(skin.mouth) // 2
    corner_left, corner_right = skin.mouth[0], skin.mouth[half]
    at = np.array([half // 2 + 4, half // 2, half // 2 - 4])  # upper lip's inner edge from the right
    inner = np.concatenate([[corner_right], skin.mouth[at], [corner_left], skin.mouth[(-at[::-1]) % len(skin.mouth)]])
    pupils = [assembly.right_eyeball[0], assembly.left_eyeball[0]]
    eye_f, eye_w = vertex(np.concatenate([right_eye, left_eye]))
    corner_f, corner_w = vertex([corner_right, corner_left])
    inner_f, inner_w = vertex(inner)
    pupil_f, pupil_w = vertex(pupils)
    # 0-35 jaw, brows, nose | 36-47 eyes | 48 corner, 49-53 upper, 54 corner, 55-59 lower | 60-67 inner lips | pupils
    ids = np.concatenate([faces[:36], eye_f, corner_f[:1], faces[36:41], corner_f[1:], faces[41:46], inner_f, pupil_f])
    bary = np.concatenate([weights[:36], eye_w, corner_w[:1], weights[36:41], corner_w[1:], weights[41:46], inner_w, pupil_w])
    return ids, bary


def _corner(faces: np.ndarray, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A face id and one-hot weights for each vertex."""
    found = np.array([np.flatnonzero((faces == i).any(axis=1))[0] for i in ids])
    return found, (faces[found] == ids[:, None]).astype(float)


def _nearest_on_faces(assembly: Assembly, targets: np.ndarray, face_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The face whose (clamped) barycentric projection comes nearest to each target, and its weights."""
    corners = assembly.points[assembly.faces[face_ids]]
    chosen, weights = [], []
    for target in targets:
        near = np.argsort(((corners.mean(1) - target) ** 2).sum(1), kind="stable")[:12]
        a, b, c = corners[near, 0], corners[near, 1], corners[near, 2]
        ab, ac, at = b - a, c - a, target - a
        d00, d01, d11 = (ab * ab).sum(1), (ab * ac).sum(1), (ac * ac).sum(1)
        d20, d21 = (at * ab).sum(1), (at * ac).sum(1)
        scale = d00 * d11 - d01 * d01
        v, w = (d11 * d20 - d01 * d21) / scale, (d00 * d21 - d01 * d20) / scale
        bary = np.clip(np.stack([1 - v - w, v, w], 1), 0.0, None)
        bary /= bary.sum(1, keepdims=True)
        distance = np.linalg.norm((bary[..., None] * corners[near]).sum(1) - target, axis=1)
        best = int(distance.argmin())
        chosen.append(face_ids[near[best]])
        weights.append(bary[best])
    return np.array(chosen), np.array(weights)
