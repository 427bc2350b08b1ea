"""Labels of generated frames: what each is, in which unit, how it is computed and stored.

A label is one `Label` in the table below and its name in `LabelName`; whatever writes, reads, checks or describes a data set goes by
its members. `compute` sees some rendered views of one motion and gives [V, ...] by member; `compute_shared` what all pictures of an
identity share. Maps have the rendering resolution R, row 0 at the top. A surface is seen where the opacity is at least a half.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from datagen.members import ALWAYS, Family, Member
from genhead.generator import GenHeadOutput
from genhead.mesh_truth import visible
from head3d.cameras import Camera, camera_rays, project
from head3d.deformation import PosedHead
from head3d.labels import Motion
from head3d.pictures import to_uint8
from head3d.rotations import axis_angle_to_matrix
from head3d.run.errors import DataError

if TYPE_CHECKING:
    from datagen.render import IdentityRenderer

SOLID = 0.5  # opacity from which a pixel shows a surface
NORMAL_STEP = 0.01  # scene units (3 mm): how far from the surface the density is read for its gradient

LabelName = Literal[
    "depth", "opacity", "parts", "foreground", "background", "planepoints",
    "planes", "normals", "landmarks", "gaze", "correspondence",
]  # fmt: skip
DEFAULT_LABELS: tuple[LabelName, ...] = ("depth", "opacity", "parts", "foreground", "background", "planepoints")

Values = dict[str, Tensor | np.ndarray]  # by the names that readers ask for


class SampleError(DataError):
    """The generator made a frame that cannot be used, for example one with numbers that are not finite.

    `identity` and `motion` say which; they travel with the error from one process to another.
    """

    def __init__(self, message: str, identity: int, motion: int) -> None:
        super().__init__(message)
        self.identity, self.motion = identity, motion

    def __reduce__(self) -> tuple[type, tuple[str, int, int]]:
        return type(self), (str(self), self.identity, self.motion)


class Seen(NamedTuple):
    """Some views of one motion of one identity: what labels are computed from."""

    renderer: IdentityRenderer  # the identity
    motion: int  # its number
    posed: PosedHead  # of that motion, batch 1
    camera: Camera  # V of them
    first: int  # number of the first view
    output: GenHeadOutput  # batch V
    points: int  # plane points asked for, a view
    where: str  # for messages

    @property
    def solid(self) -> Tensor:
        """Where a surface is seen, bool [V, R * R]."""
        return self.output.images.opacity.flatten(1) >= SOLID

    def error(self, problem: str) -> SampleError:
        """That these views cannot be used."""
        return SampleError(f"{self.where}: {problem}", self.renderer.recipe.identity, self.motion)

    def surface(self) -> Tensor:
        """Points [V, R * R, 3] at the rendered depth, posed space, world axes, scene units."""
        depth = self.output.images.depth
        origins, directions = camera_rays(self.camera, depth.shape[-1])
        return origins + depth.flatten(1)[..., None] * directions


class Label(NamedTuple):
    """One label. A member whose shape has no V is the same for all views."""

    name: LabelName
    members: tuple[Member, ...]
    compute: Callable[[Seen], Values] | None = None  # [V, ...] by member; members of an identity are not among them
    compute_shared: Callable[[IdentityRenderer], Values] | None = None  # members of an identity


# Of the rendering ---------------------------------------------------------------------------------------------------------


def _depth(seen: Seen) -> Values:
    return {"depth": seen.output.images.depth[:, 0]}


def _opacity(seen: Seen) -> Values:
    return {"opacity": seen.output.images.opacity[:, 0]}


def _foreground(seen: Seen) -> Values:
    return {"foreground": seen.output.images.foreground}


def _parts(seen: Seen) -> Values:
    """Part numbers [V, R, R], where at least half of a pixel is covered."""
    images = seen.output.images
    parts = (images.head_mask >= 0.5).to(torch.uint8)
    parts[images.eye_mask >= 0.5] = 2
    parts[images.mouth_mask >= 0.5] = 3
    return {"parts": parts[:, 0]}


def _background(seen: Seen) -> Values:
    return {"background": to_uint8(seen.output.images.background[:, :3])}


def _background_features(renderer: IdentityRenderer) -> Values:
    side = renderer.genhead.config.render_resolution
    return {"identity.background": F.interpolate(renderer.background, (side, side), mode="bilinear", align_corners=False)[0]}


def _planes(renderer: IdentityRenderer) -> Values:
    return {"identity.planes": renderer.planes[0]}


def _planepoints(seen: Seen) -> Values:
    """Points [V, N, 3] on the coarse pass and the head planes' features there [V, N, P] (section 5, "Tri-plane samples").

    As published, points whose part weight (eyes, mouth) is above zero are left out. Unlike there, so are points outside the box:
    tri-planes read zero there. Points are rounded to the 16-bit steps in which they are stored before the features are read.
    """
    renderer, genhead = seen.renderer, seen.renderer.genhead
    coarse, box = seen.output.passes[0], genhead.config.sampling.box_side
    views = coarse.points.shape[0]
    points = coarse.points.reshape(views, -1, 3)
    allowed = ((coarse.part_weight.reshape(views, -1) == 0) & (points.abs() <= box / 2).all(-1)).cpu().numpy()
    chosen = np.empty((views, seen.points), np.int64)
    for view in range(views):
        places = np.flatnonzero(allowed[view])
        if len(places) < seen.points:
            raise seen.error(
                f"only {len(places)} ray samples are in the box and outside eyes and mouth, {seen.points} are asked for; "
                "set --render.points lower"
            )
        chosen[view] = renderer.recipe.stream("points", seen.motion, seen.first + view).choice(places, seen.points, replace=False)
    step = box / 65535
    index = torch.from_numpy(chosen).to(points.device)[..., None].expand(-1, -1, 3)
    points = ((points.gather(1, index) + box / 2) / step).round().clamp(0, 65535) * step - box / 2
    repeated = seen.posed.expand_views(views)
    without_neck = genhead.deformation.remove_neck(points, repeated)
    planes = renderer.planes.expand(views, *renderer.planes.shape[1:])
    return {"points": points, "point_features": genhead.sample_head_features(planes, without_neck, repeated)}


def _normals(seen: Seen) -> Values:
    """Outward unit normals [V, 3, R, R] of the density at the rendered depth, hair and clothing included.

    n = -g / |g| with g the central differences of the density: of the surface that is rendered, not of the mesh, and smoother than
    differences of neighbouring depths, which carry the noise of the ray samples. Six more samples a ray.
    """
    surface, side = seen.surface(), seen.output.images.depth.shape[-1]
    steps = NORMAL_STEP * torch.eye(3, device=surface.device)
    density = seen.output.field(surface[:, :, None] + torch.cat([steps, -steps])).raw_density  # [V, R * R, 6]
    normals = F.normalize(density[..., 3:] - density[..., :3], dim=-1) * seen.solid[..., None]
    return {"normals": normals.transpose(1, 2).unflatten(2, (side, side))}


def _correspondence(seen: Seen) -> Values:
    """Canonical positions [V, 3, R, R] of what is seen, by the deformation of the part that a pixel shows."""
    genhead, images = seen.renderer.genhead, seen.output.images
    side, half = images.depth.shape[-1], genhead.config.sampling.box_side / 2
    repeated = seen.posed.expand_views(len(images.depth))
    surface = genhead.deformation.remove_neck(seen.surface(), repeated)
    parts = torch.as_tensor(_parts(seen)["parts"]).flatten(1)[..., None]
    canonical = genhead.deformation.to_canonical(surface, repeated, "head")
    for number, part in ((2, "eyes"), (3, "mouth")):
        canonical = torch.where(parts == number, genhead.deformation.to_canonical(surface, repeated, part), canonical)
    known = seen.solid & (canonical.abs() <= half).all(-1)
    canonical = torch.where(known[..., None], canonical, -half)
    return {"correspondence": canonical.transpose(1, 2).unflatten(2, (side, side))}


# Of the mesh --------------------------------------------------------------------------------------------------------------


def _landmarks(seen: Seen) -> Values:
    """World positions [V, 70, 3] and, in the picture, (u, v, seen) [V, 70, 3]; what the head's own mesh hides is not seen."""
    head, views = seen.renderer.genhead.head_model, len(seen.camera.c2w)
    vertices = seen.posed.vertices_posed.expand(views, -1, -1)
    points = head.landmarks(vertices)
    flags = visible(points, head, vertices, seen.camera).to(points.dtype)
    return {"landmarks": points, "landmarks_2d": torch.cat([project(points, seen.camera)[0], flags[..., None]], dim=-1)}


def _gaze(seen: Seen) -> Values:
    """Where the left and the right eye look, unit vectors in world [V, 2, 3] and camera axes: at rest along +z of the head."""
    directions = gaze_directions(seen.renderer.recipe.motions[seen.motion].motion).to(seen.camera.c2w)
    rotation = seen.camera.c2w[:, :3, :3]
    return {"gaze": directions.expand(len(rotation), -1, -1), "gaze_camera": directions @ rotation}


def gaze_directions(motion: Motion) -> Tensor:
    """Unit vectors [B, 2, 3], left and right eye, world axes: +z turned by the eye's rotation, then by the neck's."""
    eyes = axis_angle_to_matrix(motion.eye_pose.unflatten(1, (2, 3)))
    return (axis_angle_to_matrix(motion.neck_pose)[:, None] @ eyes)[..., 2]


# The table ----------------------------------------------------------------------------------------------------------------


_MAP = ("V", "R", "R")
_FEATURES = (-0.01, 1.01)  # limits of colours and features: a sigmoid, widened by 0.001, and the rounding of float16


def _array(
    family: Family, name: str, dtype: str, shape: tuple[str | int, ...], unit: str, note: str, scale: str = "none", limits: Any = None
) -> Member:
    return Member(family, name, "array", dtype, shape, scale, unit, note, limits)


_TABLE = (
    Label(
        "depth",
        (_array("labels", "depth", "uint16", _MAP, "scene units", "along the unit ray; far where empty", "depth"),),
        _depth,
    ),
    Label("opacity", (_array("frames", "opacity", "uint8", _MAP, "share", "1 - transmittance", "unit"),), _opacity),
    Label(
        "parts",
        (_array("frames", "parts", "uint8", _MAP, "number", "mesh seen: 0 none, 1 skin, 2 eye, 3 mouth", limits=(0.0, 3.0)),),
        _parts,
    ),
    Label(
        "foreground",
        (
            _array(
                "labels", "foreground", "float16", ("V", "C", "R", "R"), "feature", "before the background, premultiplied", limits=_FEATURES
            ),
        ),
        _foreground,
    ),
    Label(
        "background",
        (
            Member("frames", "background", "picture", "uint8", ("R", "R", 3), "none", "colour", "background colours"),
            _array("identities", "background", "float16", ("C", "R", "R"), "feature", "background features", limits=_FEATURES),
        ),
        _background,
        _background_features,
    ),
    Label(
        "planepoints",
        (
            _array("labels", "points", "uint16", ("V", "N", 3), "scene units", "points of the coarse pass, posed space", "box"),
            _array("labels", "point_features", "float16", ("V", "N", "P"), "feature", "head planes at the points' canonical positions"),
        ),
        _planepoints,
    ),
    Label(
        "planes",
        (_array("identities", "planes", "float16", (2, 3, "P", "T", "T"), "feature", "of parts, of the head; XY, YZ, ZX; canonical"),),
        compute_shared=_planes,
    ),
    Label(
        "normals",
        (
            _array(
                "labels",
                "normals",
                "int8",
                ("V", 3, "R", "R"),
                "unit vector",
                "of the density, outward, world axes; 0 where empty",
                "signed",
            ),
        ),
        _normals,
    ),
    Label(
        "landmarks",
        (
            _array("frames", "landmarks", "float32", (70, 3), "scene units", "68 of the face, right, left pupil; posed, world"),
            _array("frames", "landmarks_2d", "float32", ("V", 70, 3), "picture sides", "u to the right, v down, 1 if seen, else 0"),
        ),
        _landmarks,
    ),
    Label(
        "gaze",
        (
            _array("frames", "gaze", "float32", (2, 3), "unit vector", "left, right eye; world axes", limits=(-1.001, 1.001)),
            _array("frames", "gaze_camera", "float32", ("V", 2, 3), "unit vector", "the same in camera axes", limits=(-1.001, 1.001)),
        ),
        _gaze,
    ),
    Label(
        "correspondence",
        (
            _array(
                "labels",
                "correspondence",
                "uint16",
                ("V", 3, "R", "R"),
                "scene units",
                "canonical position of what is seen; the box's lowest corner where empty",
                "box",
            ),
        ),
        _correspondence,
    ),
)

LABELS: dict[str, Label] = {label.name: label for label in _TABLE}


def members_of(labels: Iterable[str], family: Family | None = None) -> tuple[Member, ...]:
    """The members of frames with these labels, those of one family or of all; their order is that of the table."""
    chosen = set(labels)
    members = ALWAYS + tuple(member for label in _TABLE if label.name in chosen for member in label.members)
    return tuple(member for member in members if family in (None, member.family))


def label_of(asked: str) -> str:
    """The label to choose so that frames have the member that readers ask for; "" if all have it."""
    return next((label.name for label in _TABLE for member in label.members if member.asked == asked), "")
