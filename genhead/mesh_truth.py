"""What the posed head mesh says about a rendered head: depth, silhouette, and which pixels show the same point.

Photographs have no such truth; here the mesh that deformed the field is known exactly. Everything is a pure function of tensors, one
number a picture; colours are compared as |a - b| / 2, so 0 is equal and 1 is black against white.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from head3d.cameras import Camera, camera_rays, project
from head3d.head_model import HeadModel
from head3d.image_metrics import masked_mean
from head3d.rasterize import rasterize

SOLID = 0.5  # opacity above which a pixel shows the head
MESH_TOLERANCE = 0.015  # scene units (5 mm): a mesh point this little behind the nearest mesh surface is seen
DEPTH_TOLERANCE = 0.05  # scene units (17 mm): two rendered depths this near show the same point; coarse ray samples need it
RASTER_PX = 256  # side at which visibility of mesh points is decided


class MeshView(NamedTuple):
    """The posed mesh as a camera sees it, at the pixel centres of the rendered picture."""

    distance: Tensor  # [B, 1, R, R] along the unit ray, scene units; inf where the mesh is not
    face: Tensor  # [B, 1, R, R] bool, the nearest surface is skin of the face (no eyeballs, nothing inside the mouth)

    @property
    def silhouette(self) -> Tensor:
        """[B, 1, R, R] bool, where the mesh is."""
        return self.distance.isfinite()

    def strip(self, chosen: Tensor) -> MeshView:
        """What the rays `chosen` [B, n] of the R * R see, [B, 1, 1, n] each."""
        return MeshView(*(values.flatten(1).gather(1, chosen)[:, None, None] for values in self))


class HeadView(NamedTuple):
    """A picture of a head with the depth it was rendered from."""

    image: Tensor  # [B, 3, S, S] in [-1, 1]
    depth: Tensor  # [B, 1, R, R] distance along the unit ray, scene units
    opacity: Tensor  # [B, 1, R, R] in [0, 1]
    camera: Camera


class SurfacePoints(NamedTuple):
    """Points that ride on a mesh."""

    corners: Tensor  # [N, 3] vertex ids
    barycentric: Tensor  # [N, 3] weights, rows sum to 1

    def on(self, vertices: Tensor) -> Tensor:
        """Where they are on meshes [B, V, 3]: [B, N, 3]."""
        return (vertices[:, self.corners] * self.barycentric[..., None]).sum(2)


class ColorDifference(NamedTuple):
    """A difference of colours beside what chance gives; each [B], NaN where nothing is seen twice."""

    difference: Tensor  # mean |a - b| / 2 of matching pixels or points
    unmatched: Tensor  # the same without the correspondence
    share: Tensor  # of the pixels or points, those seen in both pictures


def ray_distance(z_depth: Tensor, camera: Camera) -> Tensor:
    """Distance along the unit ray [B, R, R] of a z-depth [B, R, R]: t = z / (d . f), d the pixel's unit ray, f the viewing direction."""
    directions = camera_rays(camera, z_depth.shape[-1])[1]
    cosine = torch.einsum("brj,bj->br", directions, -camera.c2w[:, :3, 2])
    return z_depth / cosine.view_as(z_depth)


def mesh_view(head: HeadModel, vertices: Tensor, camera: Camera, resolution: int) -> MeshView:
    """See posed meshes [B, V, 3] through the rays of a picture of that resolution."""
    raster = rasterize(vertices, head.faces, camera, resolution)
    skin = torch.zeros(vertices.shape[1], dtype=torch.bool, device=vertices.device)
    skin[head.regions.face] = True
    is_face = torch.cat([skin[head.faces].all(1), skin.new_zeros(1)])  # the last entry serves face id -1
    return MeshView(ray_distance(raster.depth, camera)[:, None], is_face[raster.face_ids][:, None])


def head_depth(head: HeadModel, vertices: Tensor) -> Tensor:
    """Front to back of the head [B], scene units: extent in world z of the posed mesh (neck at rest)."""
    z = vertices[:, head.regions.head, 2]
    return z.amax(1) - z.amin(1)


def depth_error(depth: Tensor, truth: MeshView) -> Tensor:
    """Median |rendered - true ray distance| [B] over the visible face, scene units; depth [B, 1, R, R]. NaN where no face is seen."""
    error = torch.where(truth.face, (depth - truth.distance).abs(), torch.nan)
    return error.flatten(1).nanmedian(1).values


def flat_face(truth: MeshView) -> Tensor:
    """The best depth without relief [B, 1, R, R]: the median ray distance of the visible face everywhere."""
    middle = torch.where(truth.face, truth.distance, torch.nan).flatten(1).nanmedian(1).values
    return middle[:, None, None, None].expand_as(truth.distance)


def silhouette_scores(opacity: Tensor, truth: MeshView) -> tuple[Tensor, Tensor]:
    """(IoU, recall), each [B], of {opacity [B, 1, R, R] > 0.5} against the mesh: |A and M| / |A or M| and |A and M| / |M|.

    Hair and clothing are no part of the mesh, so IoU stays below 1 even for real pictures; recall need not.
    """
    drawn, mesh = (opacity > SOLID).flatten(1), truth.silhouette.flatten(1)
    both = (drawn & mesh).sum(1).float()
    return both / (drawn | mesh).sum(1), both / mesh.sum(1)


def face_points(head: HeadModel, count: int, generator: torch.Generator) -> SurfacePoints:
    """Random points of the face's skin, uniform over faces and within each; the generator is a CPU one."""
    faces = head.faces_within(head.regions.face)
    chosen = torch.randint(len(faces), (count,), generator=generator)
    weights = torch.rand(count, 3, generator=generator).clamp_min(1e-6).log()  # exponentials, divided by their sum: uniform in a triangle
    return SurfacePoints(faces[chosen.to(faces.device)], (weights / weights.sum(1, keepdim=True)).to(faces.device))


def visible(points: Tensor, head: HeadModel, vertices: Tensor, camera: Camera) -> Tensor:
    """Which points [B, N, 3] the mesh [B, V, 3] does not hide from the camera and the picture holds: bool [B, N] (z-buffer test)."""
    uv, depth = project(points, camera)
    nearest = rasterize(vertices, head.faces, camera, RASTER_PX).depth
    surface = _sample(torch.where(nearest.isfinite(), nearest, 0.0)[:, None], uv, "nearest")[:, 0]  # 0 where the mesh is not: none is seen
    return (depth > 0) & (depth <= surface + MESH_TOLERANCE) & _inside(uv)


def motion_difference(
    first: Tensor,  # [B, 3, S, S] in [-1, 1], one motion
    second: Tensor,  # [B, 3, S, S], the same heads in another
    points: tuple[Tensor, Tensor],  # [B, N, 3] the same mesh points in either motion, world frame
    seen: Tensor,  # [B, N] bool, visible in both
    cameras: tuple[Camera, Camera],
    order: Tensor,  # [N] a random permutation of the points, which makes the pairs
) -> ColorDifference:
    """Does a point keep its colour when the face moves? Mean |a - b| / 2 over points seen in both; unmatched: random pairs of them.

    A pair is a point and its successor, among those seen, in the given order, so no point meets itself. Light that rightly changes
    with the motion counts too.
    """
    colors = [_sample(image, project(at, camera)[0]) for image, at, camera in zip((first, second), points, cameras, strict=True)]
    partner = torch.arange(seen.shape[1], device=seen.device).repeat(len(seen), 1)
    for row, mask in zip(partner, seen, strict=True):
        chosen = order[mask[order]]
        row[chosen] = chosen.roll(1)
    paired = colors[1].gather(2, partner[:, None].expand_as(colors[1]))
    return ColorDifference(_difference(colors[0], colors[1], seen), _difference(colors[0], paired, seen), seen.float().mean(1))


def view_difference(first: HeadView, second: HeadView) -> ColorDifference:
    """Do two views agree? Every solid pixel of the first goes by its depth to the second, where it counts if that depth shows it too.

    difference: mean |first - second, warped| / 2 over those pixels; unmatched: the same pixels without the warp; share: of the first
    picture's solid pixels, those that count (a head whose depth disagrees between the views has few).
    """
    seen, color, warped = _carried(first, second)
    unwarped = _sample(second.image, _pixel_centres(first))
    solid = (first.opacity > SOLID).flatten(1)
    return ColorDifference(_difference(color, warped, seen), _difference(color, unwarped, seen), seen.sum(1) / solid.sum(1))


def warped_view(first: HeadView, second: HeadView) -> Tensor:
    """The second picture's colours at the first one's pixels [B, 3, R, R], black (-1) where a pixel is not seen in both."""
    seen, _, warped = _carried(first, second)
    return torch.where(seen[:, None], warped, -1.0).view(len(warped), 3, *first.depth.shape[2:])


def _carried(first: HeadView, second: HeadView) -> tuple[Tensor, Tensor, Tensor]:
    """(seen twice [B, R*R], colour in the first [B, 3, R*R], colour in the second [B, 3, R*R]) of the first one's pixels."""
    origins, directions = camera_rays(first.camera, first.depth.shape[-1])
    points = origins + first.depth.flatten(1)[..., None] * directions
    uv, _ = project(points, second.camera)
    distance = (points - second.camera.c2w[:, None, :3, 3]).norm(dim=-1)
    there = _sample(torch.cat([second.depth, second.opacity], 1), uv)
    agree = (there[:, 1] > SOLID) & ((distance - there[:, 0]).abs() < DEPTH_TOLERANCE)
    seen = (first.opacity > SOLID).flatten(1) & _inside(uv) & agree
    return seen, _sample(first.image, _pixel_centres(first)), _sample(second.image, uv)


def _pixel_centres(view: HeadView) -> Tensor:
    """[B, R*R, 2] in [0, 1], row-major."""
    side = view.depth.shape[-1]
    centres = (torch.arange(side, device=view.depth.device) + 0.5) / side
    v, u = torch.meshgrid(centres, centres, indexing="ij")
    return torch.stack([u, v], dim=-1).reshape(1, -1, 2).expand(len(view.depth), -1, -1)


def _inside(uv: Tensor) -> Tensor:
    return ((uv > 0) & (uv < 1)).all(-1)


def _sample(maps: Tensor, uv: Tensor, mode: str = "bilinear") -> Tensor:
    """Values [B, C, N] of maps [B, C, H, W] at uv [B, N, 2] in [0, 1]; beyond the border, the border's."""
    return F.grid_sample(maps, 2 * uv[:, :, None] - 1, mode=mode, padding_mode="border", align_corners=False)[..., 0]


def _difference(first: Tensor, second: Tensor, seen: Tensor) -> Tensor:
    return masked_mean((first - second).abs()[..., None] / 2, seen[:, None, :, None].float())
