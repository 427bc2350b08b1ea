"""Compare our GenHead with reference numbers of the published network (recipe.json and io.npz in one folder, head.npz above it).

The reference replaced the renderer's two random draws: stratified offset half a bin, importance draws (i + 0.5) / n. That is our
deterministic mode. Noise is the constant buffers; truncation is 0.7 on all layers.
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from genhead.generator import GenHead, GenHeadConfig
from genhead.published import GENHEAD_NAMES, read_recipe, rename
from head3d.cameras import Camera
from head3d.deformation import DeformationConfig
from head3d.head_model import HeadModel, load_head_model
from head3d.labels import Motion
from head3d.rasterize import correspondence_map, part_masks
from head3d.run.checkpoint import fill_weights
from head3d.run.errors import AssetError
from head3d.run.seeding import torch_generator, weights_drawn_from

TRUNCATION = 0.7


class Comparison(NamedTuple):
    """One row of the table."""

    quantity: str
    value: float  # the measured error, share or decibels
    limit: float
    at_least: bool  # True: value >= limit holds the bar (shares, dB); False: value <= limit

    @property
    def ok(self) -> bool:
        return self.value >= self.limit if self.at_least else self.value <= self.limit


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    """|a - b| / |b|."""
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm())


def psnr_db(ours: Tensor, theirs: Tensor, span: float) -> float:
    """Peak signal-to-noise ratio for values that span `span`."""
    return float(20 * np.log10(span) - 10 * torch.log10((ours.double() - theirs.double()).square().mean().clamp_min(1e-20)))


def read_recording(folder: Path) -> Callable[[str], Tensor]:
    """Access to io.npz by name, float32 tensors. Raises AssetError if the file or a name is missing."""
    path = folder / "io.npz"
    if not path.is_file():
        raise AssetError(
            f"{path}: expected the recorded inputs and outputs, found no such file; give the folder that holds recipe.json and io.npz"
        )
    try:
        arrays = np.load(path, allow_pickle=False)
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise AssetError(f"{path}: expected an .npz of plain arrays, but it cannot be read ({error}); copy it again") from error

    def read(name: str) -> Tensor:
        if name not in arrays.files:
            raise AssetError(f"{path}: expected an array {name!r}, the file has {', '.join(arrays.files[:8])}, ...; is it of this network?")
        return torch.from_numpy(arrays[name]).float()

    return read


def read_head(folder: Path) -> HeadModel:
    """The head that a recording was made with, from above its folder. Raises AssetError if it is missing or damaged."""
    path = folder.resolve().parent / "head.npz"
    if not path.is_file():
        raise AssetError(
            f"{path}: expected the head of the recordings above {folder}, found no such file; copy it together with the folder"
        )
    return load_head_model(path)


@torch.no_grad()
def compare(folder: Path) -> list[Comparison]:
    """Build the 512 x 512 network, fill it from the recipe, run the recorded inputs. Needs about 2 GB and a minute of one core."""
    recorded = read_recording(folder)
    head = read_head(folder)
    config = GenHeadConfig(published=True, deformation=DeformationConfig(published=True))
    with weights_drawn_from(torch_generator("parity")):
        genhead = GenHead(config, head).eval()
    recipe = rename(read_recipe(folder), GENHEAD_NAMES, str(folder))
    fill_weights(genhead, recipe, str(folder / "recipe.json"), "copy the file again; it lists every tensor of the 512 x 512 network")

    z, shape, pose = recorded("z"), recorded("shape"), recorded("pose")
    camera = Camera.from_label(recorded("camera"))
    motion = Motion(recorded("expression"), pose[:, :3], pose[:, 3:], recorded("eye_pose"))
    rows: list[Comparison] = []

    def error(name: str, ours: Tensor, theirs: Tensor, limit: float) -> None:
        rows.append(Comparison(name, relative_error(ours, theirs), limit, at_least=False))

    ws = genhead.map(z, recorded("condition_camera"), shape, TRUNCATION)
    error("ws", ws[:, 0], recorded("ws"), 1e-4)
    planes = genhead.planes(ws)
    error("planes", planes.flatten(1, 3)[..., ::16, ::16], recorded("planes_every16"), 1e-4)

    for prefix, neck in (("deform", torch.zeros_like(pose[:, :3])), ("deform_neck", recorded("pose_neck")[:, :3])):
        turned = motion._replace(neck_pose=neck)
        if prefix == "deform_neck":
            turned = turned._replace(jaw_pose=recorded("pose_neck")[:, 3:])
        rows += _compare_deformation(genhead, shape, turned, recorded, prefix)

    posed = genhead.pose(shape, motion)
    masks = part_masks(
        head, posed.vertices_posed, camera, config.render_resolution, raster_resolution=config.mask_resolution, published=True
    )
    for name, mask in (("eye", masks.eye), ("mouth", masks.mouth), ("head", masks.head)):
        same = ((mask - recorded(f"out_{name}_mask")).abs() < 1 / 255).float().mean()
        rows.append(Comparison(f"{name} mask, equal pixels", float(same), 0.999, at_least=True))
    side = recorded("uv").shape[-1]
    same = ((correspondence_map(head, posed.vertices_posed, camera, side) - recorded("uv")).abs().amax(1) < 2e-3).float().mean()
    rows.append(Comparison("correspondence map, equal pixels", float(same), 0.999, at_least=True))

    images = genhead.render(planes, genhead.background(z), posed, camera).images
    error("background", images.background, recorded("out_background"), 1e-2)
    error("depth", images.depth, recorded("out_image_depth"), 1e-2)
    error("features", images.features, recorded("out_image_feature"), 1e-2)
    error("transmittance", 1 - images.opacity, recorded("out_T_bg"), 1e-2)
    error("sorted distances", images.rays.depths[:, :256], recorded("out_interval_rays0_256"), 1e-2)
    error("weights", images.rays.weights[:, :256], recorded("out_all_weights_rays0_256"), 1e-2)
    error("raw image", images.raw, recorded("out_image"), 1e-2)
    rows.append(Comparison("final image, dB", psnr_db(images.image, recorded("out_image_sr"), 2.0), 40.0, at_least=True))
    return rows


def _compare_deformation(
    genhead: GenHead, shape: Tensor, motion: Motion, recorded: Callable[[str], Tensor], prefix: str
) -> list[Comparison]:
    """Share of query points whose canonical position agrees to 1e-4 (relative), and of equal eye-box tests."""
    posed, rows = genhead.pose(shape, motion), []
    points = genhead.deformation.remove_neck(recorded("query"), posed)
    for part, theirs in (("eyes", "eye"), ("head", "face"), ("mouth", "mouth")):
        ours, expected = genhead.deformation.to_canonical(points, posed, part), recorded(f"{prefix}_canonical_{theirs}")
        close = (ours - expected).norm(dim=-1) <= 1e-4 * expected.norm(dim=-1).clamp_min(0.1)
        rows.append(Comparison(f"{prefix} {part}, equal points", float(close.float().mean()), 0.995, at_least=True))
    inside = genhead.deformation.inside_eye_boxes(points, posed).float()
    same = (inside == (recorded(f"{prefix}_inside_bbox_eye") > 0.5).float()).float().mean()
    rows.append(Comparison(f"{prefix} eye boxes, equal points", float(same), 0.995, at_least=True))
    return rows
