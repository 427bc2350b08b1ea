"""A small head in FLAME's format, built from a sphere: open neck, mouth slit, two eyeballs, no vertex sets."""

from __future__ import annotations

import numpy as np
import pytest

from head3d.head_model import HeadModel

COLUMNS, ROWS = 48, 29
EYES = ((0.031, 0.02, 0.078), (-0.031, 0.02, 0.078))  # left, right; metres
EYE_RADIUS = 0.012


def _grid(columns: int, rows: int, low: float, high: float) -> tuple[np.ndarray, np.ndarray]:
    """Unit sphere between two latitudes (radians): vertices [columns * rows, 3] and outward faces; column 0 looks toward +z."""
    latitude, longitude = np.linspace(low, high, rows), np.arange(columns) / columns * 2 * np.pi
    y, turn = np.meshgrid(latitude, longitude, indexing="ij")
    vertices = np.stack([np.cos(y) * np.sin(turn), np.sin(y), np.cos(y) * np.cos(turn)], -1).reshape(-1, 3)
    row, column = np.meshgrid(np.arange(rows - 1), np.arange(columns), indexing="ij")
    a, b = (row * columns + column).ravel(), (row * columns + (column + 1) % columns).ravel()
    faces = np.concatenate([np.stack([a, b, b + columns], 1), np.stack([a, b + columns, a + columns], 1)])
    return vertices, faces


def build_small_head() -> dict[str, np.ndarray]:
    skin, skin_faces = _grid(COLUMNS, ROWS, -1.2, 1.5)
    skin = skin * [0.075, 0.115, 0.09]
    middle = skin[skin_faces].mean(1)
    slit = (np.abs(middle[:, 0]) < 0.022) & (np.abs(middle[:, 1] + 0.045) < 0.005) & (middle[:, 2] > 0)
    skin_faces = skin_faces[~slit]
    parts, faces = [skin], [skin_faces]
    for centre in EYES:
        ball, ball_faces = _grid(14, 9, -1.55, 1.55)
        faces.append(ball_faces + sum(map(len, parts)))
        parts.append(ball * EYE_RADIUS + centre)
    vertices, count, ball = np.concatenate(parts), sum(map(len, parts)), len(parts[1])

    weights = np.zeros((count, 5))
    y, front = skin[:, 1], skin[:, 2] > 0.02
    root = np.clip((-0.06 - y) / 0.03, 0, 1) * ~front
    jaw = (front & (y < -0.045)) * np.clip((skin[:, 2] - 0.02) / 0.03, 0, 1)
    weights[: len(skin), 0], weights[: len(skin), 2] = root, jaw * (1 - root)
    weights[: len(skin), 1] = 1 - weights[: len(skin)].sum(1)
    weights[len(skin) : len(skin) + ball, 3] = weights[len(skin) + ball :, 4] = 1

    joints = np.array([[0, -0.1, -0.01], [0, -0.02, -0.03], [0, -0.03, 0.0], *EYES])
    regressor = np.zeros((5, count))
    for joint, position in enumerate(joints):
        near = np.argsort(np.linalg.norm(vertices - position, axis=1))[:40]
        system = np.concatenate([vertices[near].T, np.ones((1, 40))])
        regressor[joint, near] = np.linalg.lstsq(system, np.append(position, 1.0), rcond=None)[0]
    rng = np.random.default_rng(5)
    waves, phase = rng.normal(size=(400, 3)) * 12, rng.normal(size=400)
    smooth = np.sin(vertices @ waves.T + phase)[:, None] * rng.normal(size=(1, 3, 400)) * 1e-3
    return {
        "v_template": vertices.astype(np.float32),
        "f": np.concatenate(faces).astype(np.int64),
        "shapedirs": smooth.astype(np.float32),
        "posedirs": (smooth[:, :, :36] * 0.5).astype(np.float32),
        "J_regressor": regressor.astype(np.float32),
        "weights": weights.astype(np.float32),
        "kintree_table": np.array([[2**32 - 1, 0, 1, 1, 1], range(5)], dtype=np.uint32),
    }  # fmt: skip


@pytest.fixture(scope="session")
def small_head_arrays() -> dict[str, np.ndarray]:
    """Arrays in FLAME's keys; copy before changing."""
    return build_small_head()


@pytest.fixture(scope="session")
def small_head(small_head_arrays: dict[str, np.ndarray]) -> HeadModel:
    return HeadModel.from_arrays(small_head_arrays)
