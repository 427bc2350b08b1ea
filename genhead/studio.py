"""The studio: textured, lit portraits of random people made from the built-in head, each with matte and label.

One portrait = one identity, one motion, one camera. The mesh of the head and of what the person wears is rasterised at
`supersampling` times the resolution, painted and lit per visible point (studio_paint.py, studio_shading.py), then averaged over
each pixel in linear light. Everything is a function of the generator that `portrait` is given.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import numpy as np
import torch

from genhead.portraits import Portrait
from genhead.studio_background import draw_background
from genhead.studio_clothing import clothing_meshes, glasses_meshes, neckline
from genhead.studio_hair import SkullMap, hair_meshes
from genhead.studio_meshes import HAIR, MM_PER_UNIT, SKIN, Mesh, cross, vertex_normals
from genhead.studio_paint import FaceAtlas, Points
from genhead.studio_people import Look, draw_label, draw_look
from genhead.studio_shading import shade
from head3d.cameras import Camera, look_at
from head3d.head_model import HeadModel
from head3d.labels import HeadLabel, pack_label
from head3d.procedural_head import build_procedural_head
from head3d.rasterize import Raster, rasterize
from head3d.run.config import Fraction, NonNegativeFloat, PositiveInt

STUDIO_VERSION = 1  # raise it when the same seed gives other pictures, so that old records are not taken for new ones
_SHADOW_DISTANCE, _SHADOW_HALF_EXTENT = 60.0, 0.62  # scene units: the lamp's camera is far away, so nearly parallel
_SHADOW_BIAS = 0.012  # scene units


@dataclasses.dataclass(frozen=True)
class StudioConfig:
    """How the built-in portraits are drawn."""

    supersampling: PositiveInt = 3  # rays per pixel and axis; 2 is faster, 3 has smoother edges
    wide_fraction: Fraction = 0.2  # portraits seen from anywhere within +-63 degrees; the others stay within +-34
    motion_scale: NonNegativeFloat = 1.0  # multiplies expression and jaw
    shadow_resolution: PositiveInt = 128  # pixels of the key lamp's shadow map


class Scene(NamedTuple):
    """One mesh of everything in front of the camera."""

    vertices: np.ndarray  # [N, 3] mm; those of the head come first
    faces: np.ndarray  # [F, 3]
    materials: np.ndarray  # [F]
    attributes: np.ndarray  # [N, 15] float32: paint coordinates 3, position 3, normal 3, extras 6 (see studio_paint.Points)


class Studio:
    """Draws portraits. Building it takes the built-in head's build time; then each portrait some tens of milliseconds."""

    def __init__(self, config: StudioConfig):
        self.config = config
        arrays = build_procedural_head()
        self.head = HeadModel.from_arrays(arrays, "built-in head")
        self.atlas = FaceAtlas(self.head, arrays)
        self._faces = self.head.faces.numpy()
        self._skull = SkullMap(self.atlas.template, self.atlas.outer_skin, self.atlas.skull_centre)
        template = self.atlas.template
        band = np.abs(template[:, 1] + 95) < 14
        self._neck_band = np.intersect1d(np.flatnonzero(band & (np.abs(template[:, 0]) < 75)), self.atlas.outer_skin)
        self._neck_half_width = template[self._neck_band, 0].max()
        self._ears = [arrays["mask_ears"][template[arrays["mask_ears"], 0] * side > 0] for side in (1, -1)]
        self._skin_ids = np.setdiff1d(np.arange(len(template)), self.head.regions.eyeballs.numpy())

    def portrait(self, generator: np.random.Generator, resolution: int) -> Portrait:
        """One random portrait of `resolution` pixels."""
        label = draw_label(generator, self.config.wide_fraction, self.config.motion_scale)
        look = draw_look(generator)
        background = draw_background(resolution, generator)
        image, matte = self.picture(label, look, background)
        return Portrait(image, matte, pack_label(*label)[0].numpy().astype(np.float32))

    @torch.no_grad()
    def picture(
        self,
        label: HeadLabel,  # batch of 1
        look: Look,
        background: np.ndarray,  # [R, R, 3] linear RGB
    ) -> tuple[np.ndarray, np.ndarray]:
        """(image uint8 [R, R, 3] sRGB, matte uint8 [R, R])."""
        resolution, factor = len(background), self.config.supersampling
        vertices = self.head.vertices(label.shape, label.motion)[0].numpy().astype(np.float64) * MM_PER_UNIT
        scene = self._assemble(vertices, look)
        eye = label.camera.c2w[0, :3, 3].numpy().astype(np.float64) * MM_PER_UNIT
        raster = _draw(scene.vertices, scene.faces, label.camera, resolution * factor)
        hit = raster.face_ids[0].numpy().ravel()
        seen = np.flatnonzero(hit >= 0)
        hit = hit[seen]
        weights = raster.barycentric[0].reshape(-1, 3)[seen].numpy()
        values = np.einsum("mkc,mk->mc", scene.attributes[scene.faces[hit]], weights)
        points = self._points(values, eye, self._lit(values[:, 3:6], values[:, 6:9], scene, look))
        colours = shade(scene.materials[hit], points, look, self.atlas)
        canvas = np.zeros((resolution * factor * resolution * factor, 4), np.float32)
        canvas[seen, :3], canvas[seen, 3] = np.clip(colours, 0, 4), 1
        canvas = _tone(canvas).reshape(resolution, factor, resolution, factor, 4).mean((1, 3))
        matte = canvas[..., 3:]
        picture = canvas[..., :3] + (1 - matte) * background
        return _to_srgb(picture), np.round(matte[..., 0] * 255).astype(np.uint8)

    def _assemble(self, head_mm: np.ndarray, look: Look) -> Scene:
        """The posed head [N, 3] with beard and clothing on it, and what the person wears, as one mesh."""
        atlas = self.atlas
        radii = self._skull.fit(head_mm)
        neck_scale = head_mm[self._neck_band, 0].max() / self._neck_half_width
        normals = vertex_normals(head_mm, self._faces)
        lift = np.clip(neckline(look, atlas.template) / 4, 0, 1) * 3.0
        if look.beard_m:
            lift = lift + np.clip(atlas.extras[:, 2] - 0.25, 0, None) * 1.33 * look.beard_m * 1000 * (1 - atlas.extras[:, 0])
        lift[atlas.materials_of_vertices != SKIN] = 0
        head_mm = head_mm + normals * lift[:, None]
        meshes = hair_meshes(look, self._skull, radii) + clothing_meshes(look, neck_scale)
        if look.glasses is not None:
            meshes += self._glasses(head_mm, look)
        vertices = np.concatenate([head_mm, *(m.vertices for m in meshes)])
        starts = np.cumsum([len(head_mm), *(len(m.vertices) for m in meshes)])
        faces = np.concatenate([self._faces, *(m.faces + start for m, start in zip(meshes, starts, strict=False))])
        materials = np.concatenate([atlas.materials, *(np.full(len(m.faces), m.material) for m in meshes)])
        coordinates = np.concatenate([atlas.template, *(m.coordinates for m in meshes)])
        extras = np.concatenate([atlas.extras, *(np.pad(m.tangents, ((0, 0), (0, 3))) for m in meshes)])
        attributes = np.concatenate([coordinates, vertices, vertex_normals(vertices, faces), extras], axis=1).astype(np.float32)
        return Scene(vertices, faces, materials, attributes)

    def _casters(self, scene: Scene, lamp: np.ndarray) -> np.ndarray:
        """Ids of the faces whose shadow is seen: the hair, and the skin that faces `lamp` (position [3], mm)."""
        a, b, c = (scene.vertices[self._faces[:, k]] for k in range(3))
        facing = np.einsum("fc,fc->f", cross(b - a, c - a), lamp - a) > 0
        casts = scene.materials == HAIR
        casts[: len(facing)] = facing & (scene.materials[: len(facing)] == SKIN)
        return np.flatnonzero(casts)

    def _glasses(self, head_mm: np.ndarray, look: Look) -> list[Mesh]:
        eyes = np.stack([head_mm[self.head.regions.left_eyeball.numpy()].mean(0), head_mm[self.head.regions.right_eyeball.numpy()].mean(0)])
        around = head_mm[self._skin_ids]
        near = (np.abs(np.abs(around[:, 0]) - eyes[0, 0]) < 24) & (np.abs(around[:, 1] - eyes[0, 1] + 2) < 20)
        ears = np.stack([head_mm[ids][np.argmax(head_mm[ids, 1])] for ids in self._ears])
        bridge = around[np.argmax(np.where(np.abs(around[:, 1] - eyes[:, 1].mean()) < 6, around[:, 2], -1e9))]
        return glasses_meshes(look, eyes, bridge, ears, float(around[near, 2].max()) + 3.0)

    def _points(self, values: np.ndarray, eye_mm: np.ndarray, lit: np.ndarray) -> Points:
        position, normal = values[:, 3:6], values[:, 6:9]
        view = eye_mm.astype(np.float32) - position
        view /= np.linalg.norm(view, axis=1, keepdims=True)
        normal = normal / (np.linalg.norm(normal, axis=1, keepdims=True) + 1e-9)
        normal = np.where((normal * view).sum(1, keepdims=True) < -0.05, -normal, normal)  # sheets are seen from both sides
        return Points(values[:, :3], position, normal, view, values[:, 9:], lit)

    def _lit(self, position: np.ndarray, normal: np.ndarray, scene: Scene, look: Look) -> np.ndarray:
        """Share of the key lamp [M] at visible points: depth from the lamp, compared at nine texels."""
        size, direction = self.config.shadow_resolution, torch.from_numpy(look.light.key_direction).float()
        focal = _SHADOW_DISTANCE / (2 * _SHADOW_HALF_EXTENT)
        intrinsics = torch.tensor([[[focal, 0, 0.5], [0, focal, 0.5], [0, 0, 1.0]]])
        lamp = look_at(direction[None] * _SHADOW_DISTANCE, torch.zeros(1, 3), intrinsics=intrinsics)
        casters = self._casters(scene, look.light.key_direction * _SHADOW_DISTANCE * MM_PER_UNIT)
        depth = _draw(scene.vertices, scene.faces[casters], lamp, size).depth[0].numpy()
        depth = np.pad(depth, 2, constant_values=np.inf)
        world_to_lamp = lamp.c2w[0, :3, :3].numpy()
        local = ((position + 2.0 * normal) / MM_PER_UNIT - lamp.c2w[0, :3, 3].numpy()) @ world_to_lamp
        near = -local[:, 2]
        u = np.clip((0.5 + focal * local[:, 0] / near) * size - 0.5, -1, size - 0.001) + 2
        v = np.clip((0.5 - focal * local[:, 1] / near) * size - 0.5, -1, size - 0.001) + 2
        column, row = np.floor(u).astype(int), np.floor(v).astype(int)
        fu, fv = u - column, v - row
        total = np.zeros(len(near), np.float32)
        # a 2 x 2 box of bilinear comparisons = 3 x 3 texels
        for dy, wy in ((-1, 1 - fv), (0, 1.0), (1, fv)):
            for dx, wx in ((-1, 1 - fu), (0, 1.0), (1, fu)):
                total += wx * wy * (near - _SHADOW_BIAS < depth[row + dy, column + dx])
        return total / 4


def _draw(vertices_mm: np.ndarray, faces: np.ndarray, camera: Camera, resolution: int) -> Raster:
    return rasterize(torch.from_numpy(vertices_mm / MM_PER_UNIT).float()[None], torch.from_numpy(faces), camera, resolution)


def _tone(linear: np.ndarray) -> np.ndarray:
    """Soft shoulder above 0.7 so that highlights do not clip; the fourth channel is kept."""
    colour = linear[..., :3]
    over = np.maximum(colour - 0.7, 0)
    return np.concatenate([np.minimum(colour, 0.7) + 0.3 * (1 - np.exp(-over / 0.3)), linear[..., 3:]], -1)


def _to_srgb(linear: np.ndarray) -> np.ndarray:
    """Linear RGB -> sRGB uint8 (IEC 61966-2-1)."""
    value = np.clip(linear, 0, 1)
    encoded = np.where(value <= 0.0031308, 12.92 * value, 1.055 * value ** (1 / 2.4) - 0.055)
    return np.round(encoded * 255).astype(np.uint8)
