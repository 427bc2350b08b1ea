"""Stage A of the deformation: undo the neck's rotation with a surface field sampled on two grids (portrait4d, section 2).

Surface field (GNARF, arXiv:2206.14797, section 3.2): a point keeps its place relative to the nearest triangle while the mesh moves. It is
evaluated at the cell centres of a fine grid, exact near the surface, and of a coarse, smoothed one for the space around it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from head3d.nearest import VertexIndex

TRUST_RADIUS_SQUARED = 3e-3  # within about 0.055 scene units of the surface the fine grid alone counts
TRUST_FALLOFF = 1000.0  # weight exp(-falloff (d^2 - radius^2)) beyond
PUBLISHED_MIN_AREA = 5e-3  # smaller triangles lose their inside and are measured to their edges (published quirk)
SKIP_DISTANCE = 0.25  # cells farther from the surface than this have no say (weight below 1e-9) and are not computed
PAIRS_PER_CHUNK_CPU = 1 << 20
PAIRS_PER_CHUNK_CUDA = 1 << 25


@dataclass(frozen=True)
class NeckField:
    """Offsets from posed space to the space with an unturned neck, on cell-centred grids over the box."""

    fine: Tensor  # [B, 4, G, G, G] offset xyz and squared distance to the surface; axes z, y, x
    coarse: Tensor  # [B, 3, g, g, g] smoothed offset
    box_side: float
    published: bool

    def select(self, rows: list[int]) -> NeckField:
        return NeckField(self.fine[rows], self.coarse[rows], self.box_side, self.published)

    def apply(self, points: Tensor) -> Tensor:
        """Posed points [B, M, 3] -> points with the neck unturned [B, M, 3]."""
        fine, coarse = self._sample(self.fine, points), self._sample(self.coarse, points)
        trust = torch.exp(-TRUST_FALLOFF * (fine[..., 3:] - TRUST_RADIUS_SQUARED).clamp(min=0))
        return points + trust * fine[..., :3] + (1 - trust) * coarse

    def _sample(self, grid: Tensor, points: Tensor) -> Tensor:
        """Trilinear between cell centres. Outside the outermost centres: the border's value; as published: fading to 0."""
        half = self.box_side / 2 * (1 - 1 / grid.shape[-1])  # position of the outermost cell centre
        padding = "zeros" if self.published else "border"
        values = F.grid_sample(grid, (points / half)[:, :, None, None], mode="bilinear", padding_mode=padding, align_corners=True)
        return values[..., 0, 0].transpose(1, 2)


@torch.no_grad()
def build_neck_field(
    posed: Tensor,  # [B, n, 3] coarse mesh with the neck turned
    unturned: Tensor,  # [B, n, 3] the same mesh, neck at zero
    faces: Tensor,  # [f, 3]
    *,
    box_side: float,
    fine_cells: int,
    coarse_cells: int,
    published: bool,
) -> NeckField:
    """Sample posed -> unturned on both grids.

    published=True keeps two quirks: triangles below `PUBLISHED_MIN_AREA` are measured to their edges, and a point is carried by the
    triangle's plane with unclamped barycentric weights. Faces that share the nearest edge or corner then tie and each carries the point
    elsewhere, so the result is reproduced only from meshes with the published last bits (published_skinning.py). The default carries it
    by the triangle's closest point and the rotation of its frame, which is the same for a rigid motion and does not extrapolate a
    sliver's shear.
    """
    fine, coarse = [], []
    for target, reference in zip(posed.float(), unturned.float(), strict=True):
        centres = cell_centres(fine_cells, box_side, target)
        fine.append(_fine_grid(centres, target, reference, faces, published))
        offset, _ = surface_offset(cell_centres(coarse_cells, box_side, target), target[faces], reference[faces], published)
        coarse.append(offset.T)
    grids = torch.stack(coarse).unflatten(-1, (coarse_cells,) * 3)
    for _ in range(2):
        grids = F.avg_pool3d(F.pad(grids, (1,) * 6, mode="replicate"), 3, stride=1)
    return NeckField(torch.stack(fine).unflatten(-1, (fine_cells,) * 3), grids, box_side, published)


def cell_centres(cells: int, box_side: float, like: Tensor) -> Tensor:
    """[cells^3, 3] x, y, z of the centres, x fastest."""
    # The order of these operations decides the last bit, and with it the ties of the published stage.
    axis = (torch.arange(cells, device=like.device, dtype=like.dtype) * (1 / cells) + 0.5 / cells - 0.5) * box_side
    z, y, x = torch.meshgrid(axis, axis, axis, indexing="ij")
    return torch.stack([x, y, z], dim=-1).flatten(0, 2)


def _fine_grid(centres: Tensor, target: Tensor, reference: Tensor, faces: Tensor, published: bool) -> Tensor:
    """[4, G^3]; cells whose weight vanishes get a zero offset and the distance to the nearest vertex."""
    to_vertex = _distance_to_vertices(centres, target)
    triangles = target[faces]
    longest = (triangles - triangles.roll(1, dims=1)).norm(dim=-1).max()
    near = to_vertex - longest < SKIP_DISTANCE
    result = torch.cat([torch.zeros_like(centres), to_vertex.square()[:, None]], dim=1)
    result[near] = torch.cat(surface_offset(centres[near], triangles, reference[faces], published), dim=1)
    return result.T


def surface_offset(points: Tensor, target: Tensor, reference: Tensor, published: bool) -> tuple[Tensor, Tensor]:
    """Offset [P, 3] that carries points [P, 3] from triangles target [f, 3, 3] to reference, and squared distance [P, 1] to the surface."""
    found = nearest_triangle(points, target, PUBLISHED_MIN_AREA if published else 0.0)
    source, goal = target[found.face], reference[found.face]
    if published:
        weights = found.projection
        normal = F.normalize(torch.linalg.cross(source[:, 1] - source[:, 0], source[:, 2] - source[:, 0]), dim=-1)
        goal_normal = F.normalize(torch.linalg.cross(goal[:, 1] - goal[:, 0], goal[:, 2] - goal[:, 0]), dim=-1)
        height = ((points - (weights[..., None] * source).sum(1)) * normal).sum(-1, keepdim=True)
        carried = (weights[..., None] * goal).sum(1) + height * goal_normal
    else:
        weights = found.closest
        residual = points - (weights[..., None] * source).sum(1)
        local = (_frame(source) * residual[:, :, None]).sum(1)  # frame^T r
        carried = (weights[..., None] * goal).sum(1) + (_frame(goal) * local[:, None, :]).sum(2)
    return carried - points, found.distance_squared[:, None]


class Nearest(NamedTuple):
    """Nearest triangles of P points."""

    face: Tensor  # [P] int64
    distance_squared: Tensor  # [P]
    projection: Tensor  # [P, 3] barycentric weights of the projection onto the plane, not clamped
    closest: Tensor  # [P, 3] barycentric weights of the closest point of the triangle


def nearest_triangle(points: Tensor, triangles: Tensor, min_area: float = 0.0) -> Nearest:
    """Nearest of triangles [f, 3, 3] for points [P, 3], exact; ties go to the lower face id. Triangles smaller than `min_area`
    (scene units squared) are measured to their edges only.

    A triangle with centroid c and circumradius r about it is at least |p - c| - r from p, so only those are measured for which that does
    not exceed the distance to the nearest corner: a dozen or two of 1394 near the surface.
    """
    bound = _distance_to_vertices(points, triangles.flatten(0, 1))[:, None] + 1e-6  # rounding
    centroids = triangles.mean(1)
    radii = (triangles - centroids[:, None]).norm(dim=-1).amax(1)
    keys = torch.full((len(points),), torch.iinfo(torch.int64).max, dtype=torch.int64, device=points.device)
    step = max(1, (PAIRS_PER_CHUNK_CUDA if points.device.type == "cuda" else PAIRS_PER_CHUNK_CPU) // len(triangles))
    for start in range(0, len(points), step):
        away = torch.cdist(points[start : start + step], centroids, compute_mode="donot_use_mm_for_euclid_dist")
        point, face = (away - radii <= bound[start : start + step]).nonzero(as_tuple=True)
        distance = _pairs(points[start + point], triangles[face], min_area)[0]
        keys.scatter_reduce_(0, start + point, (distance.contiguous().view(torch.int32).long() << 32) | face, "amin")
    face = keys & 0xFFFFFFFF
    return Nearest(face, *_pairs(points, triangles[face], min_area))


def _distance_to_vertices(points: Tensor, vertices: Tensor) -> Tensor:
    """Distance [P] of points [P, 3] to the nearest of vertices [n, 3]."""
    nearest = VertexIndex(vertices[None]).query(points[None])[0]
    return (points - vertices[nearest]).norm(dim=-1)


def _pairs(points: Tensor, triangles: Tensor, min_area: float) -> tuple[Tensor, Tensor, Tensor]:
    """Squared distance [P], projection weights [P, 3] and closest-point weights [P, 3] of points [P, 3] and triangles [P, 3, 3].

    Ericson, Real-Time Collision Detection, sections 3.4 and 5.1. Distances to edges follow pytorch3d's arithmetic step by step, because
    faces that share an edge or a corner tie there and the last bit decides; with a `min_area` their dot products also round as published.
    """
    dot = _fused_dot if min_area > 0 else _dot
    a, b, c = triangles.unbind(1)
    e0, e1, w = b - a, c - a, points - a
    d00, d01, d11, w0, w1 = _dot(e0, e0), _dot(e0, e1), _dot(e1, e1), _dot(w, e0), _dot(w, e1)
    gram = (d00 * d11 - d01 * d01).clamp(min=1e-20)  # (2 area)^2
    v, u = (d11 * w0 - d01 * w1) / gram, (d00 * w1 - d01 * w0) / gram
    inside = (v >= 0) & (u >= 0) & (v + u <= 1) & (gram > 1e-19) & (gram >= 4 * min_area**2)
    plane = _dot(w, torch.linalg.cross(e0, e1)).square() / gram

    (to_ab, s_ab), (to_ac, s_ac), (to_bc, s_bc) = (_to_segment(points, start, end, dot) for start, end in ((a, b), (a, c), (b, c)))
    distance = torch.where(inside, plane, torch.minimum(torch.minimum(to_ab, to_ac), to_bc))
    projection = torch.stack([1 - v - u, v, u], dim=-1)
    zero = torch.zeros_like(v)
    along = [torch.stack(weights, -1) for weights in ((1 - s_ab, s_ab, zero), (1 - s_ac, zero, s_ac), (zero, 1 - s_bc, s_bc))]
    edge = torch.stack([to_ab, to_ac, to_bc]).argmin(0)[:, None]
    closest = torch.where(edge == 0, along[0], torch.where(edge == 1, along[1], along[2]))
    return distance, projection, torch.where(inside[:, None], projection, closest)


def _to_segment(points: Tensor, start: Tensor, end: Tensor, dot: Callable[[Tensor, Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """Squared distance to a segment, and the closest point's place on it in [0, 1]; a segment shorter than 1e-4 is its end."""
    along = end - start
    length_squared = dot(along, along)
    place = (dot(along, points - start) / length_squared.clamp(min=1e-20)).clamp(0, 1)
    place = torch.where(length_squared <= 1e-8, torch.ones_like(place), place)
    away = points - (start + place[..., None] * along)
    return dot(away, away), place


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return a[..., 0] * b[..., 0] + a[..., 1] * b[..., 1] + a[..., 2] * b[..., 2]


def _fused_dot(a: Tensor, b: Tensor) -> Tensor:
    """fma(a_z, b_z, fma(a_x, b_x, a_y b_y)): a compiler's contraction of the sum, as the published networks' recorded points show it."""
    x, y, z = ((a[..., i].double(), b[..., i].double()) for i in range(3))  # a product of two float32 is exact in float64
    first = (x[0] * x[1] + (y[0] * y[1]).float().double()).float()
    return (z[0] * z[1] + first.double()).float()


def _frame(triangles: Tensor) -> Tensor:
    """Orthonormal axes as columns [P, 3, 3]: first edge, in-plane perpendicular, normal."""
    first = F.normalize(triangles[:, 1] - triangles[:, 0], dim=-1)
    normal = F.normalize(torch.linalg.cross(first, triangles[:, 2] - triangles[:, 0]), dim=-1)
    return torch.stack([first, torch.linalg.cross(normal, first), normal], dim=-1)
