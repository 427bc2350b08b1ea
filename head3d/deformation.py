"""Posed space -> canonical space, part by part (portrait4d, section 2). Nothing here has a gradient.

    posed point --remove_neck--> neck unturned --to_canonical(part)--> canonical point of the part
                 (stage A, neck_field.py)      (stage B)

Stage B: the nearest vertex among the part's vertices, then the offset of that vertex and its edge neighbours, weighted by inverse
squared distance. Far points copy the offset of the nearest vertex, so hair and shoulders follow the skin next to them.
The skin's nearest vertex is never on an eyeball, so gaze moves the eyes and nothing else; the mouth follows shape and jaw but not
the expression, so teeth stay rigid.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from head3d.head_model import HeadModel
from head3d.labels import Motion
from head3d.nearest import VertexIndex
from head3d.neck_field import NeckField, build_neck_field
from head3d.published_skinning import published_vertices
from head3d.run.config import PositiveFloat, PositiveInt

Part = Literal["head", "eyes", "mouth"]

POINTS_PER_CHUNK_CPU = 1 << 14  # ring tables of a chunk fit the cache
POINTS_PER_CHUNK_CUDA = 1 << 21
PADDING_POSITION = 1e3  # where the ring's padding vertex stands, in both meshes: its weight vanishes


@dataclass(frozen=True)
class DeformationConfig:
    """How points are carried between posed and canonical space. Defaults are the published grids with mended arithmetic."""

    box_side: PositiveFloat = 1.3  # scene units; side of the box that the neck grids span
    fine_cells: PositiveInt = 24  # cells per side of the neck grid that counts near the surface
    coarse_cells: PositiveInt = 8  # cells per side of the smoothed neck grid that counts elsewhere
    eye_box_scale: PositiveFloat = 1.2  # side of an eye box, in extents of the eyeball
    published: bool = False  # reproduce the released code's neck stage, quirks included


@dataclass(frozen=True)
class PartOffsets:
    """One part's search set and offsets."""

    index: VertexIndex  # over the part's vertices
    rings: Tensor  # [B, n, 6, K] of each of them, itself and its edge neighbours: posed x y z, canonical minus posed x y z

    def select(self, rows: list[int]) -> PartOffsets:
        return PartOffsets(self.index.select(rows), self.rings[rows])


@dataclass(frozen=True)
class PosedHead:
    """Heads in one pose each, with everything that queries need; made by `Deformation.prepare`, read-only."""

    vertices_posed: Tensor  # [B, N, 3]
    vertices_without_neck: Tensor  # [B, N, 3] the same motion, neck at zero
    vertices_mouth: Tensor  # [B, N, 3] shape and jaw only
    neck_field: NeckField | None  # None if no neck is turned: stage A is the identity
    eye_centres: Tensor  # [B, 2, 3] left, right
    eye_half_sides: Tensor  # [B, 2, 3]
    parts: dict[Part, PartOffsets]

    def select(self, rows: Sequence[int]) -> PosedHead:
        """The heads `rows` of the batch, repetitions allowed; search trees are shared, not rebuilt."""
        rows = list(rows)
        return PosedHead(
            self.vertices_posed[rows], self.vertices_without_neck[rows], self.vertices_mouth[rows],
            None if self.neck_field is None else self.neck_field.select(rows),
            self.eye_centres[rows], self.eye_half_sides[rows],
            {part: field.select(rows) for part, field in self.parts.items()},
        )  # fmt: skip

    def expand_views(self, views: int) -> PosedHead:
        """Every head `views` times in a row (as `repeat_interleave`): one motion seen by several cameras."""
        return self.select([row for row in range(len(self.vertices_posed)) for _ in range(views)])


class Deformation:
    """The deformation field of one head model."""

    def __init__(self, head: HeadModel, config: DeformationConfig = DeformationConfig()):
        self.head, self.config = head, config

    @torch.no_grad()
    def prepare(self, shape: Tensor, motion: Motion) -> PosedHead:
        """Pose heads of shape [B, 300] and build their search trees; one skinning call for all the meshes needed."""
        head, config, batch = self.head, self.config, shape.shape[0]
        turned = bool((motion.neck_pose != 0).any())
        rest = motion.without_neck()
        jaw_only = rest._replace(expression=torch.zeros_like(rest.expression), eye_pose=torch.zeros_like(rest.eye_pose))
        motions = [rest, jaw_only, motion] if turned else [rest, jaw_only]
        stacked = Motion(*(torch.cat(values) for values in zip(*motions, strict=True)))
        meshes = head.vertices(shape.repeat(len(motions), 1), stacked).split(batch)
        unturned, mouth, posed = meshes if turned else (*meshes, meshes[0])

        neck_field = None
        if turned:
            simplified = head.simplified
            source, goal = (published_vertices(head, shape, m) for m in (motion, rest)) if config.published else (posed, unturned)
            neck_field = build_neck_field(
                simplified.apply(source), simplified.apply(goal), simplified.faces, box_side=config.box_side,
                fine_cells=config.fine_cells, coarse_cells=config.coarse_cells, published=config.published,
            )  # fmt: skip
        regions = head.regions
        eyes = [unturned[:, ids] for ids in (regions.left_eyeball, regions.right_eyeball)]
        return PosedHead(
            vertices_posed=posed,
            vertices_without_neck=unturned,
            vertices_mouth=mouth,
            neck_field=neck_field,
            eye_centres=torch.stack([eye.mean(1) for eye in eyes], 1),
            eye_half_sides=torch.stack([(eye.amax(1) - eye.amin(1)) * (config.eye_box_scale / 2) for eye in eyes], 1),
            parts={
                "head": self._part(unturned, regions.head),
                "eyes": self._part(unturned, regions.eyeballs),
                "mouth": self._part(mouth, regions.lips),
            },
        )

    @torch.no_grad()
    def remove_neck(self, points: Tensor, posed: PosedHead) -> Tensor:
        """Posed points [B, M, 3] with the neck's rotation undone (stage A); unchanged if no neck is turned."""
        return points if posed.neck_field is None else posed.neck_field.apply(points)

    @torch.no_grad()
    def to_canonical(self, points: Tensor, posed: PosedHead, part: Part) -> Tensor:
        """Canonical positions [B, M, 3] of points with the neck unturned [B, M, 3], carried by `part` (stage B)."""
        field = posed.parts[part]
        nearest = field.index.query(points)
        step = POINTS_PER_CHUNK_CUDA if points.device.type == "cuda" else POINTS_PER_CHUNK_CPU
        result = torch.empty_like(points)
        for b in range(points.shape[0]):
            for start in range(0, points.shape[1], step):
                chunk = slice(start, start + step)
                around, offsets = field.rings[b].index_select(0, nearest[b, chunk]).split(3, dim=1)  # [m, 3, K] each
                away = around - points[b, chunk, :, None]
                weights = (away.square_().sum(1) + 1e-10).reciprocal_()
                weighted = torch.bmm(offsets, weights[:, :, None])[..., 0]
                torch.add(points[b, chunk], weighted / weights.sum(-1, keepdim=True), out=result[b, chunk])
        return result

    @torch.no_grad()
    def inside_eye_boxes(self, points: Tensor, posed: PosedHead) -> Tensor:
        """Whether points with the neck unturned [B, M, 3] lie in the box around either eyeball, bool [B, M]."""
        away = (points[:, :, None] - posed.eye_centres[:, None]).abs()  # [B, M, 2, 3]
        return (away <= posed.eye_half_sides[:, None]).all(-1).any(-1)

    def _part(self, targets: Tensor, vertex_ids: Tensor) -> PartOffsets:
        padding = targets.new_full((targets.shape[0], 1, 3), PADDING_POSITION)
        offsets = torch.cat([self.head.canonical_vertices - targets, torch.zeros_like(padding)], 1)
        table = torch.cat([torch.cat([targets, padding], 1), offsets], 2)  # [B, N + 1, 6]
        rings = table[:, self.head.ring[vertex_ids]].transpose(2, 3).contiguous()
        return PartOffsets(VertexIndex(targets[:, vertex_ids]), rings)
