"""The surface of a density field as a triangle mesh with colours, and its files.

Marching cubes (scikit-image) at one density on the nodes of a cubic grid. A mesh is in the field's own frame and unit: scene units
(FLAME metres x 3), y up, the face to +z, the canonical neck joint at the origin; normals point out of the head.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import numpy as np
import pydantic
import torch
from torch import Tensor

from head3d.pictures import SYNTHETIC_NOTICE, to_uint8
from head3d.rendering import composite
from head3d.run.config import PositiveFloat
from head3d.run.errors import DataError
from head3d.run.files import write_atomic

if TYPE_CHECKING:
    from trimesh import Trimesh

POINTS_PER_CHUNK = 1 << 17  # of a query of the field: some 50 MB of features at 32 channels
# A vertex has the colour that a ray sees which meets the surface along its normal, between these distances in front of it and behind;
# a field that is no sharp surface has other colours at the threshold itself than in its pictures.
RAY_START, RAY_END, RAY_SAMPLES = 0.03, -0.09, 13  # scene units: 10 mm before, 30 mm behind
UNITS = "scene units, FLAME metres x 3; y up, the face looks to +z, the origin is the canonical neck joint"

# points [N, 3] scene units -> colours [N, >= 3] in [0, 1], the first three RGB, and raw density [N] before softplus(x - 1)
PointField = Callable[[Tensor], tuple[Tensor, Tensor]]


@dataclasses.dataclass(frozen=True)
class SurfaceConfig:
    """Where the surface is looked for, and how finely."""

    resolution: Annotated[int, pydantic.Field(ge=4, le=1024)] = 128  # grid nodes along each side of the box; 128 as published
    threshold: PositiveFloat = 24.0  # density per scene unit at the surface; as published, 25 before softplus(x - 1)
    box_side: PositiveFloat = 1.3  # scene units; the box is centred on the origin, and what it cuts is closed at its sides


@torch.no_grad()
def extract_surface(field: PointField, config: SurfaceConfig, device: torch.device | str = "cpu") -> Trimesh:
    """The surface density = threshold of `field` as a closed mesh with a colour at each vertex.

    The grid's nodes span the box from side to side. One layer of zero density lies around them, so that a surface that leaves the box
    is closed there, less than one cell outside. Raises DataError if the density crosses the threshold nowhere.
    """
    import trimesh  # these two take half a second
    from skimage.measure import marching_cubes

    cell = config.box_side / (config.resolution - 1)
    axis = torch.linspace(-config.box_side / 2, config.box_side / 2, config.resolution)
    nodes = torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"), dim=-1).reshape(-1, 3)
    raw = torch.cat([field(chunk.to(device))[1].float().cpu() for chunk in nodes.split(POINTS_PER_CHUNK)])
    density = torch.nn.functional.softplus(raw - 1)
    lowest, highest = float(density.min()), float(density.max())
    if not highest > config.threshold:  # also where it is not a number
        raise DataError(
            f"surface: expected a density above the threshold, {config.threshold:g} per scene unit, somewhere in a box of "
            f"{config.box_side:g}, found {lowest:.3g} to {highest:.3g}; choose a `threshold` between those"
        )
    volume = np.pad(density.reshape((config.resolution,) * 3).numpy(), 1)
    # scikit-image winds triangles clockwise as seen from the side that this argument names; from outside they must be counter-clockwise
    vertices, faces, _, _ = marching_cubes(volume, config.threshold, spacing=(cell,) * 3, gradient_direction="ascent")
    vertices = vertices.astype(np.float32) - np.float32(cell + config.box_side / 2)
    mesh = trimesh.Trimesh(vertices, faces, process=False)
    mesh.visual.vertex_colors = _colors(field, torch.from_numpy(vertices), torch.from_numpy(mesh.vertex_normals.astype(np.float32)), device)
    return mesh


def _colors(field: PointField, vertices: Tensor, normals: Tensor, device: torch.device | str) -> np.ndarray:
    """What a ray against the normal sees at vertices [N, 3]: uint8 [N, 3]."""
    offsets = torch.linspace(RAY_START, RAY_END, RAY_SAMPLES)
    seen = []
    for start in range(0, len(vertices), POINTS_PER_CHUNK // RAY_SAMPLES):
        rows = slice(start, start + POINTS_PER_CHUNK // RAY_SAMPLES)
        points = vertices[rows, None] + offsets[:, None] * normals[rows, None]  # [n, samples, 3]
        colors, raw = (values.float().cpu().unflatten(0, points.shape[:2])[None] for values in field(points.flatten(0, 1).to(device)))
        rendered = composite(colors[..., :3], raw, (RAY_START - offsets).expand_as(raw))
        seen.append(rendered.colors[0] / (1 - rendered.transmittance[0, :, None]).clamp_min(1e-6))
    return to_uint8(torch.cat(seen).T[..., None] * 2 - 1)[:, 0]


def save_mesh(path: Path, mesh: Trimesh) -> None:
    """Write a mesh atomically as .ply (binary) or .obj, by the path's suffix, with colours and normals, marked as synthetic.

    Raises DataError for another suffix.
    """
    lines = (SYNTHETIC_NOTICE, f"Units: {UNITS}")
    match path.suffix:
        case ".ply":
            data = mesh.export(file_type="ply", vertex_normal=True)
            start, end = data.split(b"\n", 2)[:2], data.split(b"\n", 2)[2]
            write_atomic(path, b"\n".join([*start, *(f"comment {line}".encode("ascii") for line in lines), end]))
        case ".obj":
            write_atomic(path, mesh.export(file_type="obj", include_normals=True, header="\n# ".join(lines)))
        case suffix:
            raise DataError(f"{path}: expected a mesh file named .ply or .obj, got {suffix!r}; give one of those")
