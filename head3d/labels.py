"""The 437-number label: camera 25 | shape 300 | expression 100 | neck 3 | jaw 3 | eyes 6.

Poses are axis-angle, radians. Fitted labels of real photographs hold the whole head rotation in the camera and repeat it in
the neck; set the neck to zero when the camera is used (portrait4d, section 4).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from head3d.cameras import Camera
from head3d.run.errors import DataError

SHAPE_SIZE = 300
EXPRESSION_SIZE = 100
LABEL_SIZE = 437
MOTION_VECTOR_SIZE = 109  # expression 100 | jaw 3 | eyes 6
_SPLIT = (25, SHAPE_SIZE, EXPRESSION_SIZE, 3, 3, 6)


class Motion(NamedTuple):
    """What moves: FLAME expression coefficients and joint rotations (axis-angle, radians)."""

    expression: Tensor  # [B, 100]
    neck_pose: Tensor  # [B, 3]
    jaw_pose: Tensor  # [B, 3]
    eye_pose: Tensor  # [B, 6] left eye, right eye

    @classmethod
    def neutral(cls, batch: int = 1) -> Motion:
        return cls(torch.zeros(batch, EXPRESSION_SIZE), torch.zeros(batch, 3), torch.zeros(batch, 3), torch.zeros(batch, 6))

    def vector(self) -> Tensor:
        """The 109-number motion vector [B, 109]: expression, jaw, eyes. The neck is not in it: it moves rigidly."""
        return torch.cat([self.expression, self.jaw_pose, self.eye_pose], dim=1)

    def without_neck(self) -> Motion:
        return self._replace(neck_pose=torch.zeros_like(self.neck_pose))

    def to(self, device: torch.device | str) -> Motion:
        return Motion(*(part.to(device) for part in self))

    def select(self, index: Tensor | slice) -> Motion:
        return Motion(*(part[index] for part in self))

    def repeat_interleave(self, count: int) -> Motion:
        return Motion(*(part.repeat_interleave(count, 0) for part in self))


class HeadLabel(NamedTuple):
    """A camera, who (shape [B, 300]) and what motion."""

    camera: Camera
    shape: Tensor
    motion: Motion


def pack_label(camera: Camera, shape: Tensor, motion: Motion) -> Tensor:
    """The 437-number label [B, 437]."""
    return torch.cat([camera.label(), shape, motion.expression, motion.neck_pose, motion.jaw_pose, motion.eye_pose], dim=1)


def unpack_label(label: Tensor) -> HeadLabel:
    """Inverse of `pack_label` for [B, 437]."""
    assert label.ndim == 2 and label.shape[1] == LABEL_SIZE, f"label must be [B, {LABEL_SIZE}], got {tuple(label.shape)}"
    camera, shape, expression, neck, jaw, eyes = label.split(_SPLIT, dim=1)
    return HeadLabel(Camera.from_label(camera), shape, Motion(expression, neck, jaw, eyes))


def check_label(label: np.ndarray, where: str) -> np.ndarray:
    """Validate one label from a file and return it as float32 [437].

    Raises DataError naming `where` if the length, a value, the camera rotation or the focal length is wrong.
    """
    label = np.asarray(label)
    if label.shape != (LABEL_SIZE,):
        raise DataError(
            f"{where}: a label has {LABEL_SIZE} numbers (camera 25, shape 300, expression 100, neck 3, jaw 3, eyes 6), "
            f"got shape {label.shape}; write the numbers in that order with numpy.save"
        )
    if label.dtype.kind not in "fiu":
        raise DataError(f"{where}: a label holds numbers, got dtype {label.dtype}; save it as float32")
    label = label.astype(np.float32)
    bad = np.flatnonzero(~np.isfinite(label))
    if bad.size:
        raise DataError(f"{where}: entries {bad[:5].tolist()} of the label are not finite; refit or drop this picture")
    c2w, intrinsics = label[:16].reshape(4, 4), label[16:25].reshape(3, 3)
    error = float(np.abs(c2w[:3, :3] @ c2w[:3, :3].T - np.eye(3)).max())
    if error > 1e-2 or np.linalg.det(c2w[:3, :3]) < 0:
        raise DataError(
            f"{where}: the first 16 numbers must be a row-major camera-to-world matrix with a proper rotation; "
            f"R R^T differs from the identity by {error:.3g} (limit 0.01) or is mirrored; check row order and handedness"
        )
    if not np.allclose(c2w[3], [0, 0, 0, 1], atol=1e-4):
        raise DataError(
            f"{where}: the last row of the camera-to-world matrix must be 0 0 0 1, got {c2w[3].tolist()}; it may be stored transposed"
        )
    if intrinsics[0, 0] <= 0 or intrinsics[1, 1] <= 0 or abs(intrinsics[0, 2]) > 2 or abs(intrinsics[1, 2]) > 2:
        raise DataError(
            f"{where}: intrinsics must be divided by the image size (focal length > 0, centre near 0.5), got "
            f"fx {intrinsics[0, 0]:.4g}, fy {intrinsics[1, 1]:.4g}, cx {intrinsics[0, 2]:.4g}, cy {intrinsics[1, 2]:.4g}"
        )
    return label
