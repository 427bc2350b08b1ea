"""Picture grids of a generator in training: truncation, one identity in four motions, in four views, with depth."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from genhead.autoencoder import PortraitEncoder
from genhead.generator import GenHead
from genhead.pool import PortraitPool
from head3d.cameras import frontal, orbit
from head3d.labels import EXPRESSION_SIZE, HeadLabel, Motion, unpack_label
from head3d.pictures import colorize, grid, to_uint8
from head3d.rendering import HeadImages
from head3d.run.seeding import torch_generator

TRUNCATIONS = (0.0, 0.35, 0.7, 1.0)
VIEWS_YAW_RAD = (-0.7, -0.25, 0.25, 0.7)
COLUMNS = 4
GAZE_RAD = 0.4


def four_motions() -> Motion:
    """Neutral; jaw open; gaze left with the first expression component; gaze right with the second."""
    expression = torch.zeros(COLUMNS, EXPRESSION_SIZE)
    expression[2, 0], expression[3, 1] = 2.0, 2.0
    jaw, eyes = torch.zeros(COLUMNS, 3), torch.zeros(COLUMNS, 6)
    jaw[1, 0] = 0.25
    eyes[2, [1, 4]], eyes[3, [1, 4]] = GAZE_RAD, -GAZE_RAD
    return Motion(expression, torch.zeros(COLUMNS, 3), jaw, eyes)


@torch.no_grad()
def sample_pictures(genhead: GenHead, labels: Tensor, seed: int, identities: int = 4) -> dict[str, np.ndarray]:
    """Grids by name, uint8 [H, W, 3]; one row an identity. `labels` [N, 437] supplies shapes, motions and condition cameras.

    The same seed draws the same identities, so pictures of successive checkpoints compare.
    """
    device = next(genhead.parameters()).device
    draws = torch_generator(seed, "sample pictures")
    chosen: HeadLabel = unpack_label(labels[torch.randint(labels.shape[0], (identities,), generator=draws)].to(device))
    z = torch.randn(identities, genhead.config.z_dim, generator=draws).to(device)
    condition = frontal(identities).to(device)
    ws = genhead.map(z, condition.label(), chosen.shape)
    planes, background = genhead.planes(ws), genhead.background(z)

    # Truncation pulls the styles toward their mean, so one row per identity shows how far z carries.
    per_truncation = []
    for psi in TRUNCATIONS:
        truncated = genhead.planes(genhead.map(z, condition.label(), chosen.shape, psi))
        posed = genhead.pose(chosen.shape, chosen.motion.without_neck())
        per_truncation.append(genhead.render(truncated, background, posed, chosen.camera).images)
    pictures = {"truncation": _rows([images.image for images in per_truncation])}

    repeated = (planes.repeat_interleave(COLUMNS, 0), background.repeat_interleave(COLUMNS, 0))
    shape = chosen.shape.repeat_interleave(COLUMNS, 0)
    motions = Motion(*(part.repeat(identities, 1).to(device) for part in four_motions()))
    images = genhead.render(*repeated, genhead.pose(shape, motions), frontal(identities * COLUMNS).to(device)).images
    pictures["motions"] = grid(to_uint8(images.image), COLUMNS)

    yaw = torch.tensor(VIEWS_YAW_RAD).repeat(identities)
    camera = orbit(yaw, torch.zeros_like(yaw), torch.full_like(yaw, 4.17)).to(device)
    posed = genhead.pose(shape, Motion.neutral(identities * COLUMNS).to(device))
    images = genhead.render(*repeated, posed, camera).images
    pictures["views"] = grid(to_uint8(images.image), COLUMNS)
    pictures["depth"] = grid(_depth(images), COLUMNS)
    return pictures


@torch.no_grad()
def encoded_pictures(genhead: GenHead, encoder: PortraitEncoder, pool: PortraitPool, portraits: int = 8) -> np.ndarray:
    """The first portraits; the same rendered again from their codes; with the jaw open; looking left; looking right: uint8 rows."""
    device = next(genhead.parameters()).device
    image, _, label = (values.to(device) for values in pool.batch(torch.arange(min(portraits, len(pool)))))
    camera, shape, motion = unpack_label(label)
    motion, z = motion.without_neck(), encoder(image)[0]
    planes, background = genhead.planes(genhead.map(z, camera.label(), shape)), genhead.background(z)
    jaw, left = torch.zeros_like(motion.jaw_pose), torch.zeros_like(motion.eye_pose)
    jaw[:, 0], left[:, [1, 4]] = 0.25, GAZE_RAD
    rows = [image]
    for shown in (motion, motion._replace(jaw_pose=jaw), motion._replace(eye_pose=left), motion._replace(eye_pose=-left)):
        rows.append(genhead.render(planes, background, genhead.pose(shape, shown), camera).images.image)
    return grid(to_uint8(torch.cat(rows)), len(image))


def _rows(columns: list[Tensor]) -> np.ndarray:
    """Columns of [I, 3, S, S] as a grid with one row an identity."""
    stacked = torch.stack(columns, dim=1)
    return grid(to_uint8(stacked.flatten(0, 1)), len(columns))


def _depth(images: HeadImages) -> np.ndarray:
    """Depth [B, 1, R, R] as colours, near is bright; grey where nothing is."""
    depth = torch.where(images.opacity > 0.5, images.depth, torch.nan)[:, 0]
    return colorize(-depth, -4.6, -3.5)
