"""Clothing and glasses of the studio's people; lengths are millimetres."""

from __future__ import annotations

import numpy as np

from genhead.studio_meshes import CLOTH, FRAME, Mesh, sheet, smooth
from genhead.studio_people import Look


def neckline(look: Look, points: np.ndarray) -> np.ndarray:
    """How far (mm, positive) points [..., 3] lie below the edge of the garment; the garment is where this is > 0."""
    x, y, z = points[..., 0], points[..., 1], points[..., 2]
    base, slope = {"crew": (-104, 0.34), "v_neck": (-106, 0.28), "turtleneck": (-84, 0.22), "shirt": (-98, 0.34), "hoodie": (-98, 0.30)}[
        look.garment
    ]
    edge = base - slope * (z + 18)
    if look.garment == "v_neck":
        edge = edge - np.where(z > -10, np.maximum(0, 46 - np.abs(x)) * 0.9, 0)
    return edge - y


# rows of the shoulders: height, half width, half depth, z of the middle
_TORSO = np.array(
    [
        [-92, 46, 42, -18],
        [-116, 66, 52, -20],
        [-134, 98, 60, -20],
        [-148, 138, 70, -18],
        [-162, 172, 82, -15],
        [-185, 196, 96, -10],
        [-225, 210, 108, -6],
        [-320, 214, 116, -4],
    ]
)


def clothing_meshes(look: Look, neck_scale: float) -> list[Mesh]:
    """Shoulders, and the collar or hood. `neck_scale`: this neck's half width over the mean head's."""
    angle = np.linspace(0, 2 * np.pi, 64, endpoint=False)
    rows = np.linspace(0, len(_TORSO) - 1, 15)
    profile = np.stack([np.interp(rows, np.arange(len(_TORSO)), _TORSO[:, k]) for k in range(4)], -1)
    sin, cos = np.sin(angle)[None], np.cos(angle)[None]
    width, depth = profile[:, 1:2] * np.where(rows[:, None] < 2, neck_scale, 1), profile[:, 2:3]
    sag = 10 * smooth(rows[:, None], 1, 4) * (1 - np.abs(sin))  # the chest and the back lie lower than the shoulders' top
    grid = np.stack(
        [
            width * np.sign(sin) * np.abs(sin) ** 0.85,
            profile[:, :1] - sag + 0 * sin,
            profile[:, 3:4] + depth * np.sign(cos) * np.abs(cos) ** 0.9,
        ],
        -1,
    )
    meshes = [sheet(grid, CLOTH, closed=True)]
    half_width, half_depth, z = 60 * neck_scale, 58 * neck_scale, -16
    match look.garment:
        case "shirt":
            open_by = 0.22
            around = np.linspace(open_by, 2 * np.pi - open_by, 60)
            rise = np.array([0, 12, 22, 24, 14, -2, -14])[:, None]
            out = np.array([1, 1, 3, 6, 10, 15, 19])[:, None]
            point = (
                np.exp(-(((np.minimum(around, 2 * np.pi - around) - open_by) / 0.35)[None] ** 2))
                * np.array([0, 0, 0, 0, 4, 10, 18])[:, None]
            )
            meshes.append(sheet(_ring(around, half_width, half_depth, z, out, -100 + rise - point, 0.34), CLOTH, closed=False))
        case "hoodie":
            tube = np.linspace(0, 2 * np.pi, 12)[:, None]
            thick = 11 + 9 * (0.5 - 0.5 * np.cos(angle))[None]
            meshes.append(
                sheet(
                    _ring(angle, half_width, half_depth, z, 10 + thick * np.sin(tube), -100 + thick * np.cos(tube), 0.36),
                    CLOTH,
                    closed=True,
                )
            )
        case "crew" | "turtleneck":
            tube = np.linspace(0, 2 * np.pi, 8)[:, None]
            height, slope = (-105, 0.34) if look.garment == "crew" else (-84, 0.22)
            meshes.append(
                sheet(
                    _ring(angle, half_width - 3, half_depth - 3, z, 3.2 * np.sin(tube), height + 4.2 * np.cos(tube), slope),
                    CLOTH,
                    closed=True,
                )
            )
    return meshes


def _ring(
    angle: np.ndarray, half_width: float, half_depth: float, z: float, out: np.ndarray, height: np.ndarray, slope: float
) -> np.ndarray:
    """Rows x angles of points round the neck, `out` mm from its ellipse, at `height`, lower in front by `slope`."""
    x = (half_width + out) * np.sin(angle)[None]
    depth = (half_depth + out) * np.cos(angle)[None]
    return np.stack([x, height - slope * (depth + 0 * x) + 0 * x, z + depth + 0 * x], -1)


def glasses_meshes(look: Look, eyes: np.ndarray, bridge: np.ndarray, ears: np.ndarray, front_z: float) -> list[Mesh]:
    """Two rims, a bridge and two temples.

    eyes [2, 3], ears [2, 3] (left, right), bridge [3] on the nose, `front_z`: plane of the rims; mm.
    """
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
        meshes.append(
            _tube(
                np.stack([hinge, hinge + [side * 3, 0, -8], [ear[0] + side * 2, eye[1] + 5, (hinge[2] + ear[2]) / 2], ear + [0, 6, 0]]),
                tube * 0.8,
                closed=False,
            )
        )
    inner = eyes[:, 0] + np.array([1, -1]) * (1.5 - width)
    height_bridge = (eyes[:, 1].mean() + bridge[1]) / 2 + 4
    meshes.append(
        _tube(
            np.array([[inner[0], height_bridge, front_z], [0, height_bridge + 2.5, front_z + 1.5], [inner[1], height_bridge, front_z]]),
            tube,
            closed=False,
        )
    )
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
    return sheet(grid, FRAME, closed=closed)
