"""Pictures of a training run: source, driver, output, truth, depths and a novel view of a few held-out samples."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from torch import Tensor

from datagen.reading import ShardDataset
from head3d.cameras import Camera, orbit
from head3d.labels import unpack_label
from head3d.pictures import colorize, grid, to_uint8
from reconstructor.architecture import Driver
from reconstructor.batches import Batch, BatchStream
from reconstructor.losses import members_needed
from reconstructor.model import Reconstructor
from reconstructor.order import usable_frames
from reconstructor.settings import ReconstructorRun


def preview_batch(config: ReconstructorRun, dataset: ShardDataset) -> Batch:
    """Held-out samples to look at (training samples if the validation split cannot form any), always the same."""
    static = config.batches.static_share == 1
    alone = dataclasses.replace(config.batches, static_weights=(), dynamic_weights=(), motion_rich_weights=())
    settings = dataclasses.replace(alone, size=4, static_share=float(static), threads=0)
    members = {"opacity", "depth"} & members_needed(config.losses_at(0), 0)
    held_out = [dataset.frames[index] for index in usable_frames(dataset.frames, settings, "val", members)]
    held_out = [frame for frame in held_out if (frame.kind == "static") == static]
    enough = any(frame.views > 1 for frame in held_out) if static else len({frame.identity for frame in held_out}) < len(held_out)
    split = "val" if enough else "train"
    with BatchStream(dataset, settings, config.seed, lambda seen: members, split=split, driver_image=True) as batches:
        return next(batches)


@torch.no_grad()
def preview_picture(model: Reconstructor, batch: Batch, resolution: int | None = None) -> np.ndarray:
    """One row a sample: source, driver, output, truth, depth, true depth (if stored), novel view. uint8 [H, W, 3].

    resolution: rays per side; None = the model's.
    """
    target, count = unpack_label(batch.label), len(batch)
    driver = Driver(batch.driving_motion, batch.driver_image)
    images, planes, source, _ = model(
        batch.source_image,
        batch.source_motion,
        driver,
        batch.motion_scale,
        target.shape,
        target.motion,
        target.camera,
        resolution=resolution,
    )
    device, side = batch.image.device, images.image.shape[-1]
    yaw = torch.full((count,), 0.6, device=device)
    camera = orbit(yaw, torch.zeros_like(yaw), torch.full_like(yaw, 4.17))
    novel = model.render(planes, source.background, model.pose(target.shape, target.motion), camera, resolution=resolution).image
    columns = [to_uint8(picture) for picture in (batch.source_image, batch.driver_image, images.image, batch.image)]
    for depth in (images.depth, batch.depth):
        if depth is not None:
            columns.append(depth_picture(depth, target.camera, side, model.config.sampling.box_side))
    columns.append(to_uint8(novel))
    sheet = np.stack([column[row] for row in range(count) for column in columns])
    return grid(sheet, columns=len(columns))


def depth_picture(depth: Tensor, camera: Camera, side: int, box_side: float) -> np.ndarray:
    """Ray distances [B, 1, R, R] (scene units) as pictures uint8 [B, side, side, 3]; near is bright, over the depth of the box."""
    nearness = camera.c2w[:, :3, 3].norm(dim=1)[:, None, None, None] - depth
    resized = torch.nn.functional.interpolate(nearness, size=(side, side), mode="nearest")
    return colorize(resized[:, 0], -box_side / 2, box_side / 2)
