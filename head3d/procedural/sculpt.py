"""The sculpted outer surface of the built-in head: a signed-distance field of smoothly joined anatomical volumes.

Space: millimetres, x to the subject's left, y up, z forward; the origin lies midway between the ears, 4 mm below the neck joint.
Proportions follow adult anthropometric means (Farkas, Anthropometry of the Head and Face, 1994): head breadth about 150,
depth about 190, pupils 62 apart at half the head's height, nose bottom about 47 below them, mouth 50 wide.
The field left of the midline is the mirror image of the right one.
"""

from __future__ import annotations

import numpy as np

CENTRE = np.array([0.0, 30.0, -5.0])  # every point of the outer surface (ears aside) is seen from here
EYE = np.array([31.0, 36.0, 69.0])  # centre of the left eyeball; the right one is mirrored
EYEBALL_RADIUS = 12.0
LID_RADIUS = 13.3  # of the outer lid surface about the eyeball's centre
ROOT_JOINT, NECK_JOINT, JAW_JOINT = np.array([0.0, -110.0, -20.0]), np.array([0.0, 4.0, -14.0]), np.array([0.0, 6.0, 12.0])
MOUTH_HALF_WIDTH = 25.0
NECK_BOTTOM = -172.0  # height of the open lower edge
NECK_FROM, NECK_TO = np.deg2rad(-60.0), np.deg2rad(-82.0)  # chart elevations where the neck begins and where it is cut


def smooth_min(a: np.ndarray, b: np.ndarray, k: float) -> np.ndarray:
    """Polynomial smooth minimum; k is the width of the blend."""
    h = np.maximum(k - np.abs(a - b), 0.0) / k
    return np.minimum(a, b) - h * h * k * 0.25


def smooth_max(a: np.ndarray, b: np.ndarray, k: float) -> np.ndarray:
    return -smooth_min(-a, -b, k)


def smoothstep(x: np.ndarray, low: float, high: float) -> np.ndarray:
    """0 at `low`, 1 at `high` (which may be the smaller), with zero slope at both."""
    t = np.clip((x - low) / (high - low), 0.0, 1.0)
    return t * t * (3.0 - 2.0 * t)


def bell(x: np.ndarray, width: float) -> np.ndarray:
    return np.exp(-((x / width) ** 2))


def _length(q: np.ndarray) -> np.ndarray:
    return np.sqrt(q[:, 0] ** 2 + q[:, 1] ** 2 + q[:, 2] ** 2)


def ellipsoid(p: np.ndarray, centre: tuple, radii: tuple) -> np.ndarray:
    q = (p - np.array(centre)) / np.array(radii)
    a, b = _length(q), _length(q / np.array(radii)) + 1e-9
    return a * (a - 1.0) / b


def capsule(p: np.ndarray, a: tuple, b: tuple, radius_a: float, radius_b: float) -> np.ndarray:
    start, axis = np.array(a, float), np.array(b, float) - np.array(a, float)
    t = np.clip(((p - start) @ axis) / (axis @ axis), 0.0, 1.0)
    return _length(p - start - t[:, None] * axis) - (radius_a + t * (radius_b - radius_a))


def slit_height(x: np.ndarray) -> np.ndarray:
    """Height of the line between the closed lips."""
    return -32.6 - 0.7 * bell(x, 5.0) + 0.5 * bell(np.abs(x) - 11.0, 6.0) - 0.6 * (x / MOUTH_HALF_WIDTH) ** 4


def lip_heights(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Heights of the red of the upper and of the lower lip at x; 0 beyond the corners."""
    a = np.abs(x)
    reach = np.clip(1.0 - (a / (MOUTH_HALF_WIDTH + 0.5)) ** 2, 0.0, 1.0)
    upper = 7.4 * reach**0.75 + reach * (1.0 * bell(a - 5.0, 3.5) - 1.1 * bell(a, 2.2))
    lower = 9.0 * reach**0.8
    return upper, lower


def _lips(p: np.ndarray) -> np.ndarray:
    """Outward displacement of the lips and the groove between them."""
    x, s = p[:, 0], p[:, 1] - slit_height(p[:, 0])
    upper, lower = lip_heights(x)
    reach = np.clip(1.0 - (x / (MOUTH_HALF_WIDTH + 1.0)) ** 2, 0.0, 1.0)
    roll_upper = np.sin(np.pi * np.clip(s / (upper + 0.4), 0.0, 1.0) ** 0.62)
    roll_lower = np.sin(np.pi * np.clip(-s / (lower + 0.4), 0.0, 1.0) ** 0.72)
    tubercle = 1.0 + 0.22 * bell(x, 5.0)
    pads = 1.0 + 0.10 * bell(np.abs(x) - 8.0, 6.0)
    out = 3.3 * reach**0.7 * tubercle * roll_upper + 4.1 * reach**0.8 * pads * roll_lower
    out -= 1.3 * reach**0.3 * bell(s, 1.3)
    out -= 1.5 * bell(np.hypot(np.abs(x) - 26.0, (p[:, 1] + 33.0) * 1.2), 5.5)  # pits at the corners
    return out


def _face_relief(p: np.ndarray) -> np.ndarray:
    """Small outward displacements of the front of the face: philtrum, folds, sulci."""
    a, y = np.abs(p[:, 0]), p[:, 1]
    philtrum = smoothstep(y, -11.0, -15.0) * smoothstep(y, -27.0, -23.0)
    out = philtrum * (0.9 * bell(a - 5.2, 2.4) - 1.3 * bell(a, 2.8))
    out -= 2.6 * bell(y + 47.0 - 0.012 * a * a, 4.5) * bell(a, 17.0)  # between lower lip and chin
    along = np.clip((y + 4.0) / -34.0, 0.0, 1.0)  # nasolabial fold from the wing of the nose to the mouth corner
    fold = smoothstep(y, 6.0, -6.0) * smoothstep(y, -42.0, -28.0)
    offset = a - (18.0 + 15.0 * along)
    out += fold * (-0.9 * bell(offset, 3.0) + 0.7 * bell(offset - 8.0, 7.0))
    return out


def _skull_and_flesh(p: np.ndarray, a: np.ndarray) -> np.ndarray:
    """Cranium, face, jaw and neck without eyes, nose and lips; `a` is p with |x|."""
    d = ellipsoid(p, (0, 62, -28), (74.5, 77, 74))  # back of the cranium
    d = smooth_min(d, ellipsoid(p, (0, 66, 16), (65.5, 77, 73)), 34.0)  # forehead
    d = smooth_min(d, ellipsoid(p, (0, 4, 28), (57, 76, 58)), 26.0)  # mid face
    d = smooth_min(d, ellipsoid(a, (42, 13, 52), (19, 13, 22)), 24.0)  # cheek bone
    d = smooth_min(d, capsule(a, (50, 14, 6), (42, -34, 11), 13, 9), 26.0)  # ramus of the jaw
    d = smooth_min(d, capsule(a, (40, -35, 14), (12, -60, 75), 10, 11), 26.0)  # body of the jaw
    d = smooth_min(d, ellipsoid(p, (0, -59, 80), (16, 14, 16)), 14.0)  # chin
    d = smooth_min(d, ellipsoid(p, (0, -26, 64), (32, 30, 35)), 16.0)  # tooth-bearing part
    d = smooth_min(d, ellipsoid(a, (30, -8, 58), (25, 26, 25)), 16.0)  # cheek
    flare = 1.0 + 0.95 * smoothstep(p[:, 1], -92.0, -190.0)
    neck = capsule(p / np.stack([flare, np.ones_like(flare), 0.72 + 0.28 * flare], axis=1), (0, 0, -17), (0, -200, -17), 49, 50)
    neck = smooth_min(neck, capsule(a, (38, -30, -14), (12, -172, 24), 10, 10), 18.0)  # sternomastoid
    return smooth_min(d, neck, 18.0)


def _nose(p: np.ndarray, a: np.ndarray) -> np.ndarray:
    d = capsule(p, (0, 44, 81), (0, 22, 92.5), 7.5, 7.0)
    d = smooth_min(d, capsule(p, (0, 22, 93), (0, 4, 104.5), 7.0, 7.0), 6.0)
    d = smooth_min(d, capsule(a, (3.5, 38, 79), (6.0, 4, 92), 6.5, 7.0), 13.0)  # side walls
    d = smooth_min(d, ellipsoid(p, (0, 0.5, 105.5), (9.0, 8.0, 10.5)), 7.0)  # tip
    d = smooth_min(d, ellipsoid(a, (10.8, -3.6, 96.0), (6.4, 6.6, 8.8)), 6.0)  # wings
    return smooth_min(d, capsule(p, (0, -5.0, 106), (0, -11.0, 97), 3.6, 4.2), 4.0)  # columella


def signed_distance(p: np.ndarray) -> np.ndarray:
    """Approximate signed distance [N] in mm of points [N, 3] to the outer surface, negative inside."""
    a = np.stack([np.sqrt(p[:, 0] ** 2 + 0.25), p[:, 1], p[:, 2]], axis=1)
    d = _skull_and_flesh(p, a)
    d = smooth_min(d, capsule(a, (10, 54, 81.5), (29, 57, 79), 8.0, 7.0), 13.0)  # brow ridge
    d = smooth_min(d, capsule(a, (29, 57, 78.5), (46, 49, 60), 6.5, 5.0), 14.0)
    d = smooth_max(d, -ellipsoid(a, (31, 37, 96), (17.5, 11.5, 18)), 14.0)  # eye socket
    d = smooth_min(d, _nose(p, a), 8.0)
    lids = _length((a - EYE) * np.array([0.93, 1.0, 1.0])) - LID_RADIUS
    d = smooth_min(d, lids, 5.0)
    d = smooth_max(d, -ellipsoid(a, (6.6, -10.0, 101.5), (3.4, 4.6, 5.6)), 2.5)  # nostril
    front = smoothstep(p[:, 2], 45.0, 65.0)
    crease = np.hypot(a[:, 0] - EYE[0], 1.25 * (p[:, 1] - EYE[1] + 1.0))
    fold = 0.8 * bell(crease - 13.4, 2.0) * smoothstep(p[:, 1], EYE[1] + 3.0, EYE[1] + 8.0)
    return d - front * (_lips(p) + _face_relief(p) - fold)


def _rays(directions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Origins and unit rays of chart directions.

    Down to NECK_FROM below the horizon they leave CENTRE. Below that the origin slides down the neck's axis while the rays turn
    horizontal, so that the chart covers chin, neck and shoulders without folding and ends level at NECK_BOTTOM.
    """
    elevation = np.arcsin(np.clip(directions[:, 1], -1.0, 1.0))
    t = np.clip((NECK_FROM - elevation) / (NECK_FROM - NECK_TO), 0.0, 1.0)
    t = 0.6 * t**1.6 + 0.4 * t
    origins = CENTRE + np.stack([0 * t, (NECK_BOTTOM - CENTRE[1]) * t, -7.0 * t], axis=1)
    flat = np.hypot(directions[:, 0], directions[:, 2])[:, None]
    azimuth = directions[:, ::2] / np.maximum(flat, 1e-9)
    slope = np.where(t > 0.0, np.tan(NECK_FROM) * (1.0 - t) ** 1.3, directions[:, 1] / np.maximum(flat[:, 0], 1e-9))
    rays = np.stack([azimuth[:, 0], slope, azimuth[:, 1]], axis=1)
    rays = np.where((t > 0.0)[:, None], rays / np.linalg.norm(rays, axis=1, keepdims=True), directions)
    return origins, rays


def cast(directions: np.ndarray, steps: int = 48) -> np.ndarray:
    """Outermost surface points [N, 3] of unit chart directions [N, 3] (sphere tracing inward, then bisection)."""
    origins, rays = _rays(directions)
    radius = np.full(len(directions), 180.0)
    for _ in range(steps):
        radius = radius - np.clip(0.65 * signed_distance(origins + radius[:, None] * rays), -4.0, 40.0)
    low, high = radius - 2.0, radius + 2.0
    for _ in range(11):
        middle = 0.5 * (low + high)
        inside = signed_distance(origins + middle[:, None] * rays) < 0.0
        low, high = np.where(inside, middle, low), np.where(inside, high, middle)
    return origins + (0.5 * (low + high))[:, None] * rays


def towards(points: np.ndarray) -> np.ndarray:
    """Chart directions of points [N, 3] above the neck."""
    offset = points - CENTRE
    return offset / np.linalg.norm(offset, axis=-1, keepdims=True)
