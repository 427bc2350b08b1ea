"""Linear components of the built-in head: identity and expression. Displacements in mm for one standard deviation.

The first ones are hand-made brushes with a meaning, the rest smooth random fields of falling amplitude and scale, orthogonal to them
and to each other. Identity fields are constant around each eyeball, so an eye travels as a whole with its lids; expression fields
vanish there, but for the blinks, which slide the lids over the eyeball. No field differs across the lip slit unless it means to
open it.
"""

from __future__ import annotations

import numpy as np

from head3d.procedural import sculpt
from head3d.procedural.assembly import Assembly, smooth
from head3d.procedural.sculpt import bell, smoothstep

BLINK_CLOSES_AT = 2.5  # value of blink_left or blink_right at which the lids of the neutral head meet

RIDGE = 1e-3  # keeps the orthogonalisation well conditioned, so that rounding errors of the linear algebra stay below a nanometre
_EYES = (sculpt.EYE, sculpt.EYE * [-1.0, 1.0, 1.0])


def brush(p: np.ndarray, centre: tuple, widths: tuple | float, both_sides: bool = False) -> np.ndarray:
    """Gaussian weight [N] around a point; `both_sides` adds the mirrored point (the larger counts)."""
    q = np.stack([np.abs(p[:, 0]), p[:, 1], p[:, 2]], 1) if both_sides else p
    return np.exp(-0.5 * (((q - np.array(centre)) / np.array(widths)) ** 2).sum(1))


def _vector(weight: np.ndarray, x: np.ndarray | float, y: np.ndarray | float, z: np.ndarray | float) -> np.ndarray:
    return weight[:, None] * np.stack(np.broadcast_arrays(x, y, z, weight)[:3], axis=1)


def shape_brushes(p: np.ndarray) -> dict[str, np.ndarray]:
    """The identity components with a meaning, name -> [N, 3]."""
    x, y, z = p.T
    side = np.tanh(x / 8.0)
    one = np.ones(len(p))
    above_neck = smoothstep(y, -130.0, -40.0)
    slit = np.tanh((y - sculpt.slit_height(np.clip(x, -25, 25))) / 5.0)
    lips = brush(p, (0, -33, 98), (20, 10, 18))
    big_eyes = sum(smoothstep(np.linalg.norm(p - eye, axis=1), 30.0, 16.0)[:, None] * (p - eye) for eye in _EYES)
    ear = brush(p, (80, 20, -14), (16, 26, 18), both_sides=True)
    return {
        "head_width": _vector(above_neck, 0.034 * x, 0.0, 0.0),
        "head_height": _vector(one, 0.0, np.interp(y, [30, 70, 150], [0.0, 1.4, 5.0]), 0.0),
        "face_length": _vector(one, 0.0, np.interp(y, [-172, -110, -80, 20, 60], [0.0, -3.0, -4.2, 0.0, 0.0]), 0.0),
        "nose_length": _vector(brush(p, (0, -2, 106), (13, 15, 15)), 0.0, -1.2, 2.6),
        "nose_width": _vector(brush(p, (0, -4, 98), (17, 12, 15)), 0.15 * x, 0.0, 0.0),
        "jaw_width": _vector(bell(y + 44.0, 36.0) * smoothstep(z, -35.0, 15.0), 0.075 * x, 0.0, 0.0),
        "chin": _vector(brush(p, (0, -64, 86), (20, 15, 22)), 0.0, -1.8, 3.6),
        "brow": _vector(brush(p, (24, 55, 84), (19, 8, 14), both_sides=True), 0.0, -0.6, 2.0),
        "eye_spacing": _vector(brush(p, (31, 34, 78), (18, 24, 30), both_sides=True), 1.8 * side, 0.0, 0.0),
        "eye_size": 0.05 * big_eyes,
        "lip_thickness": _vector(lips, 0.0, 1.4 * slit, 1.0),
        "mouth_width": _vector(brush(p, (0, -33, 90), (26, 15, 24)), 0.075 * x, 0.0, -0.6 * bell(np.abs(x) - 25.0, 9.0)),
        "cheek_bones": _vector(brush(p, (47, 10, 60), (15, 15, 20), both_sides=True), 2.0 * side, 0.0, 1.8),
        "forehead": _vector(brush(p, (0, 98, 66), (45, 28, 40)), 0.0, 0.0, 3.4),
        "nose_bridge": _vector(brush(p, (0, 25, 96), (9, 13, 14)), 0.0, 0.0, 2.2),
        "cheek_flesh": _vector(brush(p, (40, -22, 58), (17, 20, 22), both_sides=True), 2.6 * side, 0.0, 1.3),
        "ear_size": ear[:, None] * ((p - np.stack([74.0 * np.sign(x), 0 * y + 20.0, 0 * z - 4.0], 1)) * 0.075),
        "neck_width": _vector(smoothstep(y, -45.0, -95.0) * smoothstep(y, -172.0, -140.0), 0.05 * x, 0.0, 0.05 * (z + 17.0)),
    }


def expression_brushes(p: np.ndarray, below: np.ndarray, assembly: Assembly) -> dict[str, np.ndarray]:
    """The expression components with a meaning, name -> [N, 3]."""
    x = p[:, 0]
    side = np.tanh(x / 8.0)
    corner = brush(p, (25, -33, 86), (10, 10, 16), both_sides=True)
    cheek = brush(p, (37, 2, 74), (13, 11, 16), both_sides=True)
    mouth = brush(p, (0, -33, 96), (22, 15, 22))
    nose_wings = brush(p, (15, -4, 94), (7, 8, 10), both_sides=True)
    brows = brush(p, (28, 60, 80), (22, 11, 20), both_sides=True)
    upper, lower = brush(p, (0, -27, 100), (15, 10, 18)) * (1.0 - below), brush(p, (0, -38, 98), (15, 10, 18)) * below
    return {
        "smile": _vector(corner, 2.3 * side, 2.6, -1.9) + _vector(cheek, 0.7 * side, 2.0, 1.2),
        "pucker": _vector(mouth, -0.10 * x, 0.0, 0.0) + _vector(brush(p, (0, -33, 99), (14, 11, 18)), 0.0, 0.0, 1.7),
        "brow_raise": _vector(brows, 0.0, 2.1, -0.2),
        "blink_left": blink(p, assembly, 0),
        "blink_right": blink(p, assembly, 1),
        "frown": _vector(brush(p, (13, 55, 88), (10, 8, 16), both_sides=True), -1.2 * side, -1.5, 0.4),
        "mouth_corners_down": _vector(corner, 0.4 * side, -2.2, -0.4),
        "mouth_stretch": _vector(corner, 2.3 * side, -0.3, -1.6),
        "upper_lip_raise": _vector(upper, 0.0, 1.7, 0.2) + _vector(nose_wings, 0.3 * side, 0.7, 0.0),
        "lower_lip_down": _vector(lower, 0.0, -1.8, 0.1),
        "cheek_puff": _vector(brush(p, (36, -28, 66), (13, 15, 18), both_sides=True), 2.4 * side, 0.0, 1.7),
        "mouth_left": _vector(brush(p, (0, -34, 94), (22, 16, 24)), 2.1, 0.0, 0.0),
        "squint": _squint_lids(p, assembly) + _vector(cheek, 0.0, 0.8, 0.3),
        "lips_press": _vector(brush(p, (0, -33, 101), (19, 9, 10)), 0.0, -1.0 * np.tanh((p[:, 1] + 33.0) / 5.0), -1.2),
    }


def _squint_lids(p: np.ndarray, assembly: Assembly) -> np.ndarray:
    """The lids' share of a squint: the lower lids rise, the upper ones hardly move."""
    return sum(0.35 * blink(p, assembly, eye, upper=0.35) for eye in (0, 1))


def blink(p: np.ndarray, assembly: Assembly, eye: int, upper: float = 1.0) -> np.ndarray:
    """One unit of closing the left (0) or right (1) eye, [N, 3]; `upper` scales the upper lid's share.

    Lid vertices turn about the eyeball's lateral axis and keep their distance from it; the turn falls off toward the lid fold.
    """
    mirror = np.array([-1.0 if eye else 1.0, 1.0, 1.0])
    margin = p[assembly.skin.eye_right if eye else assembly.skin.eye_left] * mirror - sculpt.EYE
    q = p * mirror - sculpt.EYE
    half = len(margin) // 2
    top, bottom = margin[: half + 1][::-1], np.concatenate([margin[half:], margin[:1]])  # both from the inner to the outer corner
    angle_top = np.interp(q[:, 0], top[:, 0], np.arctan2(top[:, 1], top[:, 2]))
    angle_bottom = np.interp(q[:, 0], bottom[:, 0], np.arctan2(bottom[:, 1], bottom[:, 2]))
    meet = angle_bottom + 0.22 * (angle_top - angle_bottom)
    angle, radius = np.arctan2(q[:, 1], q[:, 2]), np.hypot(q[:, 1], q[:, 2])
    is_upper = angle > 0.5 * (angle_top + angle_bottom)
    fold_top, fold_bottom = np.deg2rad(55.0), np.deg2rad(40.0)
    share_top = np.clip(1.0 - (angle - angle_top) / fold_top, 0.0, 1.0) ** 1.5
    share_bottom = np.clip(1.0 - (angle_bottom - angle) / fold_bottom, 0.0, 1.0) ** 1.5
    turn = np.where(is_upper, upper * share_top * (meet - angle_top), share_bottom * (meet - angle_bottom))
    turn *= smoothstep(np.linalg.norm(q, axis=1), 23.0, 17.0) * (q[:, 2] > -2.0)
    turned = np.stack([q[:, 0], radius * np.sin(angle + turn), radius * np.cos(angle + turn)], 1)
    moved = np.zeros(len(p), bool)
    moved[: len(assembly.skin.points)] = True
    moved[assembly.lid_rims_right if eye else assembly.lid_rims_left] = True
    offset = np.where(moved[:, None], (turned - q) * mirror, 0.0)
    loose = smoothstep(np.where(is_upper, share_top, share_bottom), 0.6, 0.3)[:, None]  # the skin of the fold gives way evenly
    even = np.stack([smooth(axis, assembly.faces, rounds=4) for axis in offset.T], axis=1)
    return np.where(moved[:, None], offset + loose * (even - offset), 0.0) / BLINK_CLOSES_AT


def _near_eyes(p: np.ndarray, low: float, high: float) -> list[np.ndarray]:
    """For each eye the weight [N]: 1 within `low` mm of its centre, 0 beyond `high`."""
    return [smoothstep(np.linalg.norm(p - eye, axis=1), high, low) for eye in _EYES]


def carry_eyes(field: np.ndarray, p: np.ndarray, assembly: Assembly) -> np.ndarray:
    """Make an identity field [N, 3, ...] constant around each eyeball: the mean over the eyeball."""
    result = field.copy()
    ids = (assembly.left_eyeball, assembly.right_eyeball)
    for weight, ball in zip(_near_eyes(p, 16.0, 30.0), ids, strict=True):
        weight = weight.reshape(-1, *[1] * (field.ndim - 1))
        result += weight * (field[ball].mean(0) - result)
    return result


def _random_fields(
    p: np.ndarray, count: int, widths: tuple[float, float], centres: np.ndarray, generator: np.random.Generator
) -> np.ndarray:
    """Smooth random fields [N, 3, count]: sums of six Gaussians of falling width (first, last); two of three are symmetric."""
    fields = np.empty((len(p), 3, count))
    for k in range(count):
        width = widths[0] * (widths[1] / widths[0]) ** (k / max(count - 1, 1))
        at = centres[generator.integers(len(centres), size=6)]
        amplitude = generator.standard_normal((6, 3))
        if k % 3:
            at, amplitude = np.concatenate([at, at * [-1, 1, 1]]), np.concatenate([amplitude, amplitude * [-1, 1, 1]])
        squared = (p**2).sum(1)[:, None] + (at**2).sum(1) - 2.0 * p @ at.T
        fields[:, :, k] = np.exp(-0.5 * squared / width**2) @ amplitude
    return fields


def _orthogonal_to(named: np.ndarray, extra: np.ndarray) -> np.ndarray:
    """Columns of `extra` [M, K] made orthogonal to those of `named` [M, n] and nearly so to each other, of unit length."""
    rest = extra - named @ np.linalg.lstsq(named.T @ named, named.T @ extra, rcond=None)[0]
    rest /= np.linalg.norm(rest, axis=0)
    factor = np.linalg.cholesky(rest.T @ rest + RIDGE * np.eye(rest.shape[1]))
    rest = rest @ np.linalg.inv(factor).T
    return rest / np.linalg.norm(rest, axis=0)


def _complete(named: dict[str, np.ndarray], extra: np.ndarray, strength_mm: np.ndarray) -> np.ndarray:
    """All components [N, 3, named + K]; the random ones get the given root mean square displacement over the head."""
    first = np.stack(list(named.values()), axis=2)
    count = len(first)
    rigid = [i for i, name in enumerate(named) if name != "eye_size"]  # subtracting it would let lids slip over the eyeball
    rest = _orthogonal_to(first[:, :, rigid].reshape(3 * count, -1), extra.reshape(3 * count, -1))
    rest = rest * strength_mm * np.sqrt(count)
    return np.concatenate([first, rest.reshape(count, 3, -1)], axis=2)


def shape_components(assembly: Assembly, count: int) -> tuple[list[str], np.ndarray]:
    """Names of the first identity components and all of them [N, 3, count]."""
    p = assembly.points
    named = shape_brushes(p)
    named = {name: field if name == "eye_size" else carry_eyes(field, p, assembly) for name, field in named.items()}
    generator = np.random.default_rng(21)
    skin = assembly.skin.points
    more = count - len(named)
    extra = carry_eyes(_random_fields(p, more, (60.0, 13.0), skin[skin[:, 1] > -110.0], generator), p, assembly)
    return list(named), _complete(named, extra, 0.75 * (1.0 + np.arange(more) / 8.0) ** -1.0)


def expression_components(assembly: Assembly, below: np.ndarray, count: int) -> tuple[list[str], np.ndarray]:
    """Names of the first expression components and all of them [N, 3, count]. Teeth, tongue and eyeballs keep still."""
    p = assembly.points
    follows = np.ones(len(p))
    for ring, ids in enumerate(assembly.lining):
        follows[ids] = (1.0, 0.9, 0.6, 0.3, 0.0, 0.0, 0.0, 0.0)[ring]
    still = (assembly.upper_teeth, assembly.lower_teeth, assembly.tongue, assembly.left_eyeball, assembly.right_eyeball)
    follows[np.concatenate([[assembly.throat], *still])] = 0.0
    away = (1.0 - np.maximum(*_near_eyes(p, 16.5, 26.0))) * follows
    named = expression_brushes(p, below, assembly)
    for name in named:
        if name == "squint":
            lids = _squint_lids(p, assembly)
            named[name] = lids + (named[name] - lids) * away[:, None]
        elif not name.startswith("blink"):
            named[name] = named[name] * away[:, None]
    generator = np.random.default_rng(22)
    skin = assembly.skin.points
    front = skin[(skin[:, 2] > 45.0) & (skin[:, 1] > -80.0) & (skin[:, 1] < 90.0)]
    more = count - len(named)
    extra = _random_fields(p, more, (26.0, 13.0), front, generator) * (away * smoothstep(p[:, 2], 5.0, 50.0))[:, None, None]
    return list(named), _complete(named, extra, 0.22 * (1.0 + np.arange(more) / 6.0) ** -1.0)
