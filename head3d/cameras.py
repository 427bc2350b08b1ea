"""Cameras: OpenGL axes (x right, y up, looking down -z), camera-to-world, intrinsics divided by the image size.

The 25-number label is the row-major 4x4 camera-to-world matrix followed by the row-major 3x3 intrinsics.
World frame: y up, the face looks toward +z, the origin is the canonical neck joint, lengths are scene units (FLAME metres x 3).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

FIELD_OF_VIEW_DEG = 12.0  # of the published labels; normalised focal length 1 / (2 tan 6 deg) = 4.7572


class Camera(NamedTuple):
    """A batch of pinhole cameras."""

    c2w: Tensor  # [B, 4, 4] camera-to-world, OpenGL axes
    intrinsics: Tensor  # [B, 3, 3] divided by the image size: fx, fy about 4.757, cx = cy = 0.5

    def label(self) -> Tensor:
        """The 25-number label [B, 25]."""
        return torch.cat([self.c2w.flatten(1), self.intrinsics.flatten(1)], dim=1)

    @classmethod
    def from_label(cls, label: Tensor) -> Camera:
        """Inverse of `label`; accepts [B, 25]."""
        assert label.ndim == 2 and label.shape[1] == 25, f"camera label must be [B, 25], got {tuple(label.shape)}"
        return cls(label[:, :16].reshape(-1, 4, 4), label[:, 16:].reshape(-1, 3, 3))

    def to(self, device: torch.device | str) -> Camera:
        return Camera(self.c2w.to(device), self.intrinsics.to(device))

    def select(self, index: Tensor | slice) -> Camera:
        return Camera(self.c2w[index], self.intrinsics[index])

    def repeat_interleave(self, count: int) -> Camera:
        return Camera(self.c2w.repeat_interleave(count, 0), self.intrinsics.repeat_interleave(count, 0))


def default_intrinsics(batch: int, field_of_view_deg: float = FIELD_OF_VIEW_DEG) -> Tensor:
    """Normalised intrinsics [B, 3, 3] of a centred square picture with the given field of view."""
    focal = 1.0 / (2.0 * math.tan(math.radians(field_of_view_deg) / 2.0))
    matrix = torch.tensor([[focal, 0.0, 0.5], [0.0, focal, 0.5], [0.0, 0.0, 1.0]])
    return matrix.expand(batch, 3, 3).clone()


def look_at(
    position: Tensor,  # [B, 3] camera centre, scene units
    target: Tensor,  # [B, 3] point on the optical axis
    roll_rad: Tensor | None = None,  # [B] rotation about the optical axis; positive turns the picture clockwise
    intrinsics: Tensor | None = None,  # [B, 3, 3]; None = the published field of view
) -> Camera:
    """Cameras at `position` that look at `target` with world y up.

    Straight up or down, where no direction in the picture is nearest to y, the picture's right is world +x: the limit of a camera in the
    plane x = 0 in front of the target. Not defined for position = target.
    """
    backward = torch.nn.functional.normalize(position - target, dim=-1)  # camera +z
    up = torch.tensor([0.0, 1.0, 0.0], device=position.device, dtype=position.dtype).expand_as(backward)
    across = torch.linalg.cross(up, backward)
    sideways = torch.tensor([1.0, 0.0, 0.0], device=position.device, dtype=position.dtype)
    vertical = across.norm(dim=-1, keepdim=True) < 1e-6
    right = torch.nn.functional.normalize(torch.where(vertical, sideways, across), dim=-1)
    true_up = torch.linalg.cross(backward, right)
    if roll_rad is not None:
        cos, sin = roll_rad.cos()[:, None], roll_rad.sin()[:, None]
        right, true_up = cos * right + sin * true_up, cos * true_up - sin * right
    c2w = torch.eye(4, device=position.device, dtype=position.dtype).repeat(position.shape[0], 1, 1)
    c2w[:, :3, :3] = torch.stack([right, true_up, backward], dim=-1)
    c2w[:, :3, 3] = position
    if intrinsics is None:
        intrinsics = default_intrinsics(position.shape[0]).to(position)
    return Camera(c2w, intrinsics)


def orbit(
    yaw_rad: Tensor,  # [B] positive moves the camera toward +x (it then sees the head's left side)
    pitch_rad: Tensor,  # [B] elevation, positive looks down from above
    radius: Tensor,  # [B] scene units from the target
    target: Tensor | None = None,  # [B, 3]; None = the origin
    roll_rad: Tensor | None = None,
    intrinsics: Tensor | None = None,
) -> Camera:
    """Cameras on a sphere around `target`; yaw = pitch = 0 is the frontal view from +z."""
    if target is None:
        target = torch.zeros(yaw_rad.shape[0], 3, device=yaw_rad.device, dtype=yaw_rad.dtype)
    offset = torch.stack([yaw_rad.sin() * pitch_rad.cos(), pitch_rad.sin(), yaw_rad.cos() * pitch_rad.cos()], dim=-1)
    return look_at(target + radius[:, None] * offset, target, roll_rad, intrinsics)


def frontal(batch: int = 1, radius: float = 4.17) -> Camera:
    """The frontal camera at the mean published radius."""
    zeros = torch.zeros(batch)
    return orbit(zeros, zeros, torch.full((batch,), radius))


def camera_rays(camera: Camera, resolution: int) -> tuple[Tensor, Tensor]:
    """Unit rays through the pixel centres ((i + 0.5) / R), row-major from the top-left pixel; skew is honoured.

    Returns (origins, directions), each [B, R*R, 3], world frame.
    """
    centres = (torch.arange(resolution, device=camera.c2w.device, dtype=camera.c2w.dtype) + 0.5) / resolution
    v, u = torch.meshgrid(centres, centres, indexing="ij")
    u, v = u.reshape(1, -1), v.reshape(1, -1)
    k = camera.intrinsics
    fx, skew, cx = k[:, 0, 0, None], k[:, 0, 1, None], k[:, 0, 2, None]
    fy, cy = k[:, 1, 1, None], k[:, 1, 2, None]
    y_down = (v - cy) / fy
    x = (u - cx - skew * y_down) / fx
    directions = torch.stack([x, -y_down, -torch.ones_like(x)], dim=-1)
    directions = torch.einsum("bij,brj->bri", camera.c2w[:, :3, :3], directions)
    directions = torch.nn.functional.normalize(directions, dim=-1)
    return camera.c2w[:, None, :3, 3].expand_as(directions), directions


def world_to_camera(points: Tensor, camera: Camera) -> Tensor:
    """World points [B, N, 3] in camera axes [B, N, 3] (visible points have negative z)."""
    rotation, centre = camera.c2w[:, :3, :3], camera.c2w[:, None, :3, 3]
    return torch.einsum("bji,bnj->bni", rotation, points - centre)


def project(points: Tensor, camera: Camera) -> tuple[Tensor, Tensor]:
    """Project world points [B, N, 3].

    Returns (uv [B, N, 2] in [0, 1] with v down, multiply by the resolution for pixels; depth [B, N] along -z, scene units).
    """
    local = world_to_camera(points, camera)
    depth = -local[..., 2]
    k = camera.intrinsics
    x, y_down = local[..., 0] / depth, -local[..., 1] / depth
    u = k[:, 0, 0, None] * x + k[:, 0, 1, None] * y_down + k[:, 0, 2, None]
    v = k[:, 1, 1, None] * y_down + k[:, 1, 2, None]
    return torch.stack([u, v], dim=-1), depth


def ray_bounds(camera: Camera, box_side: float) -> tuple[Tensor, Tensor]:
    """Near and far distance [B] along unit rays: |z of the world origin in camera axes| -+ box_side / 2 (portrait4d, section 0)."""
    origin = torch.zeros(camera.c2w.shape[0], 1, 3, device=camera.c2w.device, dtype=camera.c2w.dtype)
    distance = world_to_camera(origin, camera)[:, 0, 2].abs()
    return distance - box_side / 2, distance + box_side / 2
