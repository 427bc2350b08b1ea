"""`headfoundry head-page`: a page of renders of the head model, coloured by region: neutral, gaze, jaw, neck, and its first components."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from head3d.cameras import default_intrinsics, orbit
from head3d.head_model import BUILT_IN, HeadModel, load_head_model
from head3d.labels import SHAPE_SIZE, Motion
from head3d.mesh_regions import vertex_normals
from head3d.pictures import grid, save_png, to_uint8
from head3d.procedural_head import BLINK_CLOSES_AT, EXPRESSIONS, SHAPES, build_procedural_head
from head3d.rasterize import interpolate, rasterize
from head3d.run.config import PositiveInt, to_dict
from head3d.run.errors import ConfigError
from head3d.run.runlog import progress

COMPONENTS = 12  # of identity and of expression that are shown
EXTREME = 2.5  # standard deviations
_COLUMNS = 8
_SUPERSAMPLING = 2
_CAPTION_PX = 18
_RADIUS = 4.17  # scene units from the origin, the published mean
_SKIN, _LIPS, _EYE_WHITE, _IRIS, _PUPIL = (0.80, 0.59, 0.49), (0.70, 0.33, 0.31), (0.93, 0.93, 0.92), (0.27, 0.40, 0.52), (0.03, 0.03, 0.03)
_TEETH, _CAVITY, _TONGUE, _BROWS = (0.93, 0.90, 0.82), (0.42, 0.13, 0.13), (0.70, 0.33, 0.33), (0.52, 0.36, 0.28)
_BACKGROUND = (0.93, 0.94, 0.95)
_LIGHTS = ((-0.45, 0.55, 0.70, 0.62), (0.85, 0.10, 0.40, 0.22))  # direction in camera axes, strength
_AMBIENT = 0.30


@dataclasses.dataclass(frozen=True)
class HeadPage:
    """Render one page that shows what a head model can do."""

    out: Path = Path("runs/head.png")  # the picture to write; its folder is made
    head_model: str = BUILT_IN  # "procedural", or a FLAME-format .npz or .pkl file
    size: PositiveInt = 160  # pixels of one picture's side


class Tile(NamedTuple):
    """One picture of the page."""

    caption: str
    shape: Tensor  # [1, 300]
    motion: Motion
    yaw_deg: float = 0.0
    zoom: float = 1.05  # 1 is the published framing
    height: float = 0.02  # of the picture's centre above the neck joint, scene units


def main(config: HeadPage) -> None:
    """Write the page and print where it is."""
    print(write_head_page(config))


def write_head_page(config: HeadPage) -> Path:
    """Render all tiles and write `out`; returns its path. Raises AssetError if the head model cannot be read."""
    if config.out.suffix != ".png":
        raise ConfigError(f"out: expected the path of a .png file, got {config.out}; for example --out {config.out / 'head.png'}")
    head = load_head_model(config.head_model)
    colors = region_colors(head, build_procedural_head() if config.head_model == BUILT_IN else {})
    page = tiles(named=config.head_model == BUILT_IN)
    pictures = [_with_caption(render(head, colors, tile, config.size), tile.caption) for tile in progress(page, "head page", "picture")]
    config.out.parent.mkdir(parents=True, exist_ok=True)
    provenance = {"made_by": "headfoundry head-page", "settings": to_dict(config), "head_model_hash": head.content_hash}
    save_png(config.out, grid(np.stack(pictures), _COLUMNS), provenance)
    return config.out


def tiles(named: bool) -> list[Tile]:
    """The page's pictures in order; `named` says that the components have the built-in head's names."""
    neutral = Tile("neutral", torch.zeros(1, SHAPE_SIZE), Motion.neutral())

    def moved(caption: str, yaw_deg: float = 0.0, **motion: tuple[float, ...]) -> Tile:
        tensors = {key: torch.tensor([value]) for key, value in motion.items()}
        return neutral._replace(caption=caption, yaw_deg=yaw_deg, motion=neutral.motion._replace(**tensors))

    def gaze(pitch: float, yaw: float) -> tuple[float, ...]:
        return (pitch, yaw, 0.0) * 2

    result = [
        neutral._replace(caption="front"),
        neutral._replace(caption="three quarters", yaw_deg=40.0),
        neutral._replace(caption="profile", yaw_deg=90.0),
        neutral._replace(caption="from behind", yaw_deg=150.0),
        moved("jaw 0.15 rad", jaw_pose=(0.15, 0.0, 0.0)),
        moved("jaw 0.3 rad", jaw_pose=(0.3, 0.0, 0.0)),
        moved("jaw 0.3 rad", 40.0, jaw_pose=(0.3, 0.0, 0.0)),
        moved("jaw 0.3 rad", 90.0, jaw_pose=(0.3, 0.0, 0.0)),
        moved("gaze to its left", eye_pose=gaze(0.0, 0.5)),
        moved("gaze to its right", eye_pose=gaze(0.0, -0.5)),
        moved("gaze up", eye_pose=gaze(-0.35, 0.0)),
        moved("gaze down", eye_pose=gaze(0.35, 0.0)),
        moved("neck to its left", neck_pose=(0.0, 0.6, 0.0)),
        moved("neck to its right", neck_pose=(0.0, -0.6, 0.0)),
        moved("neck up", neck_pose=(-0.3, 0.0, 0.0)),
        moved("neck down", neck_pose=(0.3, 0.0, 0.0)),
    ]
    shape_names = list(SHAPES) if named else [f"shape {i}" for i in range(COMPONENTS)]
    expression_names = list(EXPRESSIONS) if named else [f"expression {i}" for i in range(COMPONENTS)]
    for index, name in enumerate(shape_names[:COMPONENTS]):
        for value in (-EXTREME, EXTREME):
            shape = neutral.shape.clone()
            shape[0, index] = value
            result.append(Tile(f"{name.replace('_', ' ')} {value:+.1f}", shape, neutral.motion, 25.0, 1.25, 0.05))
    for index, name in enumerate(expression_names[:COMPONENTS]):
        lowest, highest = (-0.5, BLINK_CLOSES_AT) if name.startswith("blink") else (-EXTREME, EXTREME)  # lids open no wider
        for value in (lowest, highest):
            expression = neutral.motion.expression.clone()
            expression[0, index] = value
            motion = neutral.motion._replace(expression=expression)
            result.append(Tile(f"{name.replace('_', ' ')} {value:+.1f}", neutral.shape, motion, 12.0, 1.75, 0.02))
    return result


def region_colors(head: HeadModel, arrays: dict[str, np.ndarray]) -> Tensor:
    """A colour [N, 3] in [0, 1] for every vertex; `arrays` may hold vertex sets that the model itself does not keep."""
    colors = torch.tensor(_SKIN).repeat(len(head.canonical_vertices), 1)
    for name, color in (("brows", _BROWS), ("mouth_cavity", _CAVITY)):
        colors[torch.as_tensor(arrays.get(f"mask_{name}", np.zeros(0, np.int64)).copy())] = torch.tensor(color)
    colors[head.regions.lips] = torch.tensor(_LIPS)
    for name, color in (("upper_teeth", _TEETH), ("lower_teeth", _TEETH), ("tongue", _TONGUE)):
        colors[torch.as_tensor(arrays.get(f"mask_{name}", np.zeros(0, np.int64)).copy())] = torch.tensor(color)
    for ball in (head.regions.left_eyeball, head.regions.right_eyeball):
        points = head.canonical_vertices[ball]
        offset = points - points.mean(0)
        forward = offset[:, 2] / offset.norm(dim=1).clamp(min=1e-9)
        colors[ball] = torch.tensor(_EYE_WHITE)
        colors[ball[forward > math.cos(0.52)]] = torch.tensor(_IRIS)
        colors[ball[forward > math.cos(0.19)]] = torch.tensor(_PUPIL)
    return colors


def render(head: HeadModel, colors: Tensor, tile: Tile, size: int) -> np.ndarray:
    """One shaded picture, uint8 [size, size, 3]: Lambert's law with smooth normals, two lights that travel with the camera."""
    vertices = head.vertices(tile.shape, tile.motion)
    intrinsics = default_intrinsics(1) * torch.tensor([tile.zoom, tile.zoom, 1.0])[:, None].where(torch.eye(3) > 0, torch.ones(3, 3))
    target = torch.tensor([[0.0, tile.height, 0.0]])
    camera = orbit(torch.tensor([math.radians(tile.yaw_deg)]), torch.zeros(1), torch.tensor([_RADIUS]), target, intrinsics=intrinsics)
    raster = rasterize(vertices, head.faces, camera, size * _SUPERSAMPLING)
    normals = torch.from_numpy(vertex_normals(vertices[0].double().numpy(), head.faces.numpy())).float()
    attributes = torch.cat([colors, torch.nn.functional.normalize(normals, dim=1) @ camera.c2w[0, :3, :3]], dim=1)
    values = interpolate(raster, head.faces, attributes)  # [1, 6, H, W]
    color, normal = values[:, :3], torch.nn.functional.normalize(values[:, 3:], dim=1)
    light = torch.full_like(color[:, :1], _AMBIENT)
    for *direction, strength in _LIGHTS:
        toward = torch.nn.functional.normalize(torch.tensor(direction), dim=0)
        light = light + strength * (normal * toward[:, None, None]).sum(1, keepdim=True).clamp(min=0.0)
    light = torch.where(normal[:, 2:] < -0.05, 0.12, light)  # the inside of the skin, seen through the lips or from below
    covered = (raster.face_ids >= 0)[:, None]
    picture = torch.where(covered, (color * light).clamp(0.0, 1.0) ** (1 / 1.3), torch.tensor(_BACKGROUND)[:, None, None])
    return to_uint8(torch.nn.functional.avg_pool2d(picture, _SUPERSAMPLING) * 2.0 - 1.0)[0]


def _with_caption(picture: np.ndarray, caption: str) -> np.ndarray:
    strip = Image.new("RGB", (picture.shape[1], _CAPTION_PX), (255, 255, 255))
    draw = ImageDraw.Draw(strip)
    draw.text((picture.shape[1] / 2, _CAPTION_PX / 2), caption, fill=(60, 60, 60), font=ImageFont.load_default(12), anchor="mm")
    return np.concatenate([picture, np.asarray(strip)])


CONFIG = HeadPage
