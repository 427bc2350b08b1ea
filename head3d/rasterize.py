"""Mesh rasterisation in plain torch: face ids, depth, interpolated attributes, part masks and the correspondence map.

The default backend enumerates, for every face, the pixels of its bounding box, tests them, and keeps the nearest face with an
integer `amin` over keys (depth bits << 32 | face id). An integer minimum does not depend on order, so the result is the same
on every run and device, for every batch size and chunk size. It needs no compiled extension and agrees with pytorch3d's
`MeshRasterizer` (blur 0, one face per pixel); two deliberate differences: a face with a vertex at or behind the camera plane
is dropped (pytorch3d clips it), and a pixel centre exactly on a shared edge is covered by the lower face id (pytorch3d leaves
a one-pixel crack there).

Nothing here is differentiable with respect to the vertices.
"""

from __future__ import annotations

import importlib
import itertools
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from head3d.cameras import Camera, project
from head3d.run.errors import ConfigError

if TYPE_CHECKING:
    from head3d.head_model import HeadModel

Backend = Literal["torch", "pytorch3d", "warp"]
REMEDIES = {  # of an optional backend whose package, of the same name, is missing
    "pytorch3d": "build it for your torch as its INSTALL.md says (the package index has no wheel for Linux)",
    "warp": "pip install 'head-foundry[warp]'",
}

NEAR_DEPTH = 1e-4  # scene units; faces with a vertex nearer than this are dropped
PAIRS_PER_CHUNK_CPU = 1 << 17  # fits the cache: 512^2 takes 47 ms against 62 ms unchunked
PAIRS_PER_CHUNK_CUDA = 1 << 24  # every chunk costs one host synchronisation


class Raster(NamedTuple):
    """What is nearest at every pixel centre ((i + 0.5) / R), row 0 at the top."""

    face_ids: Tensor  # [B, H, W] int64, -1 where nothing is hit
    barycentric: Tensor  # [B, H, W, 3] perspective-correct weights of the face's corners, 0 where nothing is hit
    depth: Tensor  # [B, H, W] camera z-depth > 0 in scene units (not ray distance), inf where nothing is hit


class PartMasks(NamedTuple):
    """Soft region masks, each [B, 1, R, R] in [0, 1]."""

    eye: Tensor  # visible eyeballs
    mouth: Tensor  # what is seen through the lips
    head: Tensor  # silhouette


def check_backend(backend: Backend) -> None:
    """Raise ConfigError that says how to install it if the package of an optional backend cannot be imported."""
    if backend in REMEDIES:
        try:
            importlib.import_module(backend)
        except ImportError as error:
            raise ConfigError(
                f"rasterizer: {backend} is asked for, but its package cannot be imported ({error}); {REMEDIES[backend]}, "
                "or set --rasterizer torch, which needs nothing and finds the same faces"
            ) from error


@torch.no_grad()
def rasterize(
    vertices: Tensor,  # [B, N, 3] world frame, scene units
    faces: Tensor,  # [F, 3] int64, counter-clockwise from outside
    camera: Camera,
    resolution: int,
    *,
    cull_backfaces: bool = False,
    backend: Backend = "torch",
) -> Raster:
    """Find the nearest face at every pixel of a square picture; any intrinsics (focal lengths, centre, skew).

    Raises ConfigError if an optional backend is chosen that is not installed.
    """
    check_backend(backend)
    assert vertices.ndim == 3 and vertices.shape[-1] == 3, f"vertices must be [B, N, 3], got {tuple(vertices.shape)}"
    assert camera.c2w.shape[0] == vertices.shape[0], f"{camera.c2w.shape[0]} cameras for {vertices.shape[0]} meshes"
    uv, depth = project(vertices.float(), Camera(camera.c2w.float(), camera.intrinsics.float()))
    corners = torch.cat([uv * resolution, depth[..., None]], dim=-1)[:, faces]  # [B, F, corner, (x px, y px, depth)]
    match backend:
        case "torch":
            face_ids = _nearest_faces(corners, resolution, cull_backfaces)
        case "pytorch3d":
            face_ids = _nearest_faces_pytorch3d(corners, resolution, cull_backfaces)
        case "warp":
            from head3d.rasterize_warp import nearest_faces

            face_ids = nearest_faces(corners, _drawable(corners, cull_backfaces), resolution)
        case _:
            raise ValueError(f"unknown rasteriser backend {backend!r}; expected torch, pytorch3d or warp")
    return _shade(face_ids, corners)


def interpolate(
    raster: Raster,
    faces: Tensor,  # [F, 3] the faces that were rasterised
    attributes: Tensor,  # [N, C] shared by the batch, or [B, N, C]
) -> Tensor:
    """Vertex attributes at every pixel, [B, C, H, W]; 0 where nothing is hit. Differentiable in `attributes`."""
    batch, height, width = raster.face_ids.shape
    corners = faces[raster.face_ids.clamp(min=0)].flatten(1)  # [B, H*W*3]
    if attributes.ndim == 2:
        values = attributes[corners]
    else:
        values = attributes.gather(1, corners[..., None].expand(-1, -1, attributes.shape[-1]))
    values = values.view(batch, height, width, 3, -1)
    return (values * raster.barycentric[..., None].to(values)).sum(3).permute(0, 3, 1, 2)


def _signed_area(corners: Tensor) -> Tensor:
    """Twice the signed area in pixel axes (y down): negative when the face looks at the camera."""
    a, b, c = corners[..., 0, :2], corners[..., 1, :2], corners[..., 2, :2]
    return (b[..., 0] - a[..., 0]) * (c[..., 1] - a[..., 1]) - (b[..., 1] - a[..., 1]) * (c[..., 0] - a[..., 0])


def _drawable(corners: Tensor, cull_backfaces: bool) -> Tensor:
    """Faces [B, F] in front of the camera, not edge-on and, if asked, facing it."""
    area = _signed_area(corners)
    drawable = (corners[..., 2] > NEAR_DEPTH).all(-1) & (area != 0) & area.isfinite()
    return drawable & (area < 0) if cull_backfaces else drawable


def _edge_weights(corners: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Screen-space barycentric weights [..., 3] of the points (x, y) [...] in the faces [..., 3, 3].

    Edge functions are taken relative to the point, so that the two faces of a shared edge get exactly opposite values.
    """
    dx, dy = corners[..., 0] - x[..., None], corners[..., 1] - y[..., None]
    weights = torch.stack(
        [dx[..., (i + 1) % 3] * dy[..., (i + 2) % 3] - dy[..., (i + 1) % 3] * dx[..., (i + 2) % 3] for i in range(3)], dim=-1
    )
    return weights / _signed_area(corners)[..., None]


def _nearest_faces(corners: Tensor, resolution: int, cull_backfaces: bool, pairs_per_chunk: int | None = None) -> Tensor:
    """Nearest face id [B, R, R] (-1 none) of corners [B, F, 3, 3] in pixels and depth."""
    batch, device = corners.shape[0], corners.device
    if pairs_per_chunk is None:
        pairs_per_chunk = PAIRS_PER_CHUNK_CUDA if device.type == "cuda" else PAIRS_PER_CHUNK_CPU
    # Pixel i has its centre at i + 0.5: the box [low, high] covers ceil(low - 0.5) .. floor(high - 0.5).
    position = torch.where(corners[..., :2].isfinite(), corners[..., :2], torch.zeros_like(corners[..., :2]))
    low = (position.amin(2) - 0.5).ceil().clamp(0, resolution).long()  # [B, F, 2]
    high = (position.amax(2) - 0.5).floor().clamp(-1, resolution - 1).long()
    extent = (high - low + 1).clamp(min=0)
    counts = extent[..., 0] * extent[..., 1] * _drawable(corners, cull_backfaces)
    image, face = counts.nonzero(as_tuple=True)
    counts = counts[image, face]
    ends = counts.cumsum(0)
    boxes = torch.stack([low[image, face, 0], low[image, face, 1], extent[image, face, 0], ends - counts], dim=1)  # corner, width, first
    rows = corners[image, face].flatten(1)  # [n, 9]; boxes and corners are read by whole rows below
    nothing = torch.iinfo(torch.int64).max
    keys = torch.full((batch * resolution * resolution,), nothing, dtype=torch.int64, device=device)

    total = int(ends[-1]) if ends.numel() else 0
    # Chunks hold whole faces: a chunk ends with the face that holds its last pair.
    marks = torch.arange(pairs_per_chunk, total + pairs_per_chunk, pairs_per_chunk, device=device).clamp(max=total)
    stops = torch.searchsorted(ends, marks).add(1).clamp(max=ends.numel()).unique().tolist() if total else []
    for start, stop in itertools.pairwise([0, *stops]):
        owner = torch.repeat_interleave(torch.arange(start, stop, device=device), counts[start:stop])
        left, top, width, first = boxes.index_select(0, owner).unbind(1)
        offset = torch.arange(owner.numel(), device=device) + boxes[start, 3] - first
        row = torch.div(offset, width, rounding_mode="floor")
        x, y = left + offset - row * width, top + row
        face_corners = rows.index_select(0, owner).unflatten(1, (3, 3))
        weights = _edge_weights(face_corners, x + 0.5, y + 0.5)
        hit = (weights.amin(-1) >= 0).nonzero()[:, 0]
        depth = 1.0 / (weights[hit] / face_corners[hit, :, 2]).sum(-1)
        owner = owner[hit]
        key = (depth.contiguous().view(torch.int32).long() << 32) | face[owner]
        pixel = (image[owner] * resolution + y[hit]) * resolution + x[hit]
        keys.scatter_reduce_(0, pixel, key, "amin")
    face_ids = torch.where(keys == nothing, -1, keys & 0xFFFFFFFF)
    return face_ids.view(batch, resolution, resolution)


def _shade(face_ids: Tensor, corners: Tensor) -> Raster:
    """Barycentric weights and depth of known face ids; every backend ends here, so they agree to the last bit."""
    barycentric = torch.zeros(*face_ids.shape, 3, device=corners.device)
    depth = torch.full(face_ids.shape, torch.inf, device=corners.device)
    image, y, x = (face_ids >= 0).nonzero(as_tuple=True)
    face_corners = corners[image, face_ids[image, y, x]]
    weights = _edge_weights(face_corners, x + 0.5, y + 0.5) / face_corners[..., 2]
    inverse_depth = weights.sum(-1)
    barycentric[image, y, x] = weights / inverse_depth[:, None]
    depth[image, y, x] = 1.0 / inverse_depth
    return Raster(face_ids, barycentric, depth)


def _nearest_faces_pytorch3d(corners: Tensor, resolution: int, cull_backfaces: bool) -> Tensor:
    """The same through pytorch3d's rasteriser (its frame: x left, y up, picture in [-1, 1]; face ids are packed)."""
    from pytorch3d.renderer.mesh.rasterize_meshes import rasterize_meshes
    from pytorch3d.structures import Meshes

    batch, count = corners.shape[:2]
    vertices = torch.stack([1 - 2 * corners[..., 0] / resolution, 1 - 2 * corners[..., 1] / resolution, corners[..., 2]], dim=-1).reshape(
        batch, count * 3, 3
    )
    faces = torch.arange(count * 3, device=corners.device).view(1, count, 3).expand(batch, -1, -1)
    packed, *_ = rasterize_meshes(
        Meshes(vertices, faces), image_size=resolution, blur_radius=0.0, faces_per_pixel=1,
        perspective_correct=True, cull_backfaces=cull_backfaces,
    )  # fmt: skip
    packed = packed[..., 0]
    offset = torch.arange(batch, device=packed.device).view(-1, 1, 1) * count
    return torch.where(packed < 0, packed, packed - offset)


# Part masks and the correspondence map -----------------------------------------------------------------------------------


@torch.no_grad()
def part_masks(
    head: HeadModel,
    posed_vertices: Tensor,  # [B, N, 3] world frame
    camera: Camera,
    resolution: int,
    *,
    raster_resolution: int = 512,
    published: bool = False,
) -> PartMasks:
    """Where eyes, mouth and head are seen, drawn by `head.rasterizer` at `raster_resolution`, reduced to `resolution` with anti-aliasing.

    Default: one visibility test. The lips' inner rim is closed by a cap (`head.mouth_cap`) in place of whatever lies behind it;
    a pixel is mouth if the cap is nearest, eye if an eyeball face is, head if anything is hit. Neck opening and silhouette
    therefore never count as mouth, and a nose in front hides the eye.

    published=True: the released rule (portrait4d, section 1): eye = eyeball faces, culled, where no face-region skin is drawn;
    head = silhouette of the simplified mesh; mouth = head where the culled mesh without inner mouth is not drawn.
    """
    size = raster_resolution

    def drawn(faces: Tensor, vertices: Tensor = posed_vertices, cull: bool = True) -> Tensor:
        return rasterize(vertices, faces, camera, size, cull_backfaces=cull, backend=head.rasterizer).face_ids >= 0

    if published:
        eye = drawn(head.faces_within(head.regions.eyeballs)) & ~drawn(head.faces_within(head.regions.face))
        outline = drawn(head.simplified.faces, head.simplified.apply(posed_vertices), cull=False)
        mouth = outline & ~drawn(head.faces_within(head.regions.without_inner_mouth))
    else:
        outside, cap = head.faces_within(head.regions.without_inner_mouth), head.mouth_cap
        kind = torch.ones(len(posed_vertices), len(outside) + len(cap) + 1, dtype=torch.uint8, device=outside.device)
        kind[:, : len(outside)][:, torch.isin(outside[:, 0], head.regions.eyeballs)] = 2
        kind[:, len(outside) : -1][_facing(posed_vertices[:, cap], camera)] = 3  # from inside, through the neck, a cap is no mouth
        kind[:, -1] = 0  # where nothing is hit (face id -1)
        face_ids = rasterize(posed_vertices, torch.cat([outside, cap]), camera, size, backend=head.rasterizer).face_ids
        seen = kind.gather(1, (face_ids % kind.shape[1]).flatten(1)).view_as(face_ids)
        eye, mouth, outline = seen == 2, seen == 3, seen > 0
    masks = torch.stack([eye, mouth, outline], dim=1).to(posed_vertices.dtype)
    if resolution != size:
        masks = F.interpolate(masks, (resolution, resolution), mode="bilinear", align_corners=False, antialias=True)
    return PartMasks(*masks.clamp(0, 1).split(1, dim=1))


def _facing(triangles: Tensor, camera: Camera) -> Tensor:
    """Whether triangles [B, F, 3, 3] (world) turn their outside to the camera, [B, F]."""
    a, b, c = triangles.unbind(2)
    return (torch.linalg.cross(b - a, c - a) * (camera.c2w[:, None, :3, 3] - a)).sum(-1) > 0


@torch.no_grad()
def correspondence_map(head: HeadModel, posed_vertices: Tensor, camera: Camera, resolution: int) -> Tensor:
    """Canonical position / 0.6 of the visible face and eyes, [B, 3, R, R], 0 elsewhere (portrait4d, section 3, "uv map").

    The discriminator reads it as a picture. Eyeballs are shifted by -0.5 in z so that gaze shows.
    """
    faces = head.faces_within(torch.cat([head.regions.face, head.regions.eyeballs]))
    values = head.canonical_vertices / 0.6
    shift = torch.zeros_like(values)
    shift[head.regions.eyeballs, 2] = -0.5
    raster = rasterize(posed_vertices, faces, camera, resolution, cull_backfaces=True, backend=head.rasterizer)
    return interpolate(raster, faces, values + shift)
