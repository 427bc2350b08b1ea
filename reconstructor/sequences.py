"""Motion sequences for `drive`: built in, from a data set's frames, or from a file; and smooth interpolation between key motions."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from head3d.cameras import Camera, frontal, orbit
from head3d.labels import EXPRESSION_SIZE, Motion
from head3d.run.errors import DataError

_FILE_KEYS = {"expression": EXPRESSION_SIZE, "neck_pose": 3, "jaw_pose": 3, "eye_pose": 6}


class Sequence(NamedTuple):
    """T frames: what moves, seen from where."""

    motion: Motion  # [T, ...]
    camera: Camera  # [T, ...]

    def __len__(self) -> int:
        return self.motion.expression.shape[0]


def interpolate(
    keys: Tensor,  # [K, D], K >= 1
    frames_between: int,  # frames from one key to the next
) -> Tensor:
    """A smooth path through the keys, [(K - 1) * frames_between + 1, D]: it rests at each key (smoothstep 3 t^2 - 2 t^3 between them).

    Coefficients and axis-angle poses are taken as they are; for the small rotations of jaw, eyes and neck that is close to the
    shortest rotation.
    """
    t = torch.arange(frames_between, dtype=keys.dtype) / frames_between
    t = (t * t * (3 - 2 * t))[None, :, None]
    path = keys[:-1, None] * (1 - t) + keys[1:, None] * t
    return torch.cat([path.flatten(0, 1), keys[-1:]])


def interpolate_motion(keys: Motion, frames_between: int) -> Motion:
    """`interpolate` for each part of K motions."""
    return Motion(*(interpolate(part, frames_between) for part in keys))


def orbiting(frames: int, yaw_rad: float, radius: float = 4.17) -> Camera:
    """A camera that swings once to +yaw, to -yaw and back, along a sine."""
    phase = torch.arange(frames) / max(1, frames - 1) * (2 * torch.pi)
    return orbit(yaw_rad * phase.sin(), torch.zeros(frames), torch.full((frames,), radius))


def built_in(
    expressions: dict[str, int],  # names of the head model's expression components; empty where they have none
    frames_between: int,
    turn_rad: float,  # how far the head is turned at the end, by the camera
) -> Sequence:
    """Smile, open jaw, blink, gaze to both sides, then a turn of the whole head.

    Without names (a FLAME file) the first component stands for the smile and the second for the blink: FLAME's components are
    statistical and have no single meaning.
    """
    smile = [(expressions.get("smile", 0), 2.0)]
    blinks = [expressions[name] for name in ("blink_left", "blink_right") if name in expressions]
    blink = [(index, 2.0) for index in blinks] or [(1, 2.0)]
    steps = (
        {},
        {"expression": smile},
        {},
        {"jaw": 0.25},
        {},
        {"expression": blink},
        {},
        {"gaze": 0.35},
        {"gaze": -0.35},
        {},
    )
    keys = Motion.neutral(len(steps))
    for row, step in enumerate(steps):
        for index, value in step.get("expression", ()):
            keys.expression[row, index] = value
        keys.jaw_pose[row, 0] = step.get("jaw", 0.0)
        keys.eye_pose[row, [1, 4]] = step.get("gaze", 0.0)
    acting = interpolate_motion(keys, frames_between)
    still, turning = acting.expression.shape[0], 4 * frames_between
    motion = Motion(*(torch.cat([part, part[-1:].expand(turning, -1)]) for part in acting))
    fixed, swing = frontal(still), orbiting(turning, turn_rad)
    return Sequence(motion, Camera(torch.cat([fixed.c2w, swing.c2w]), torch.cat([fixed.intrinsics, swing.intrinsics])))


def from_file(path: Path) -> Sequence:
    """Read a .npz of FLAME motions: expression [T, 100], neck_pose [T, 3], jaw_pose [T, 3], eye_pose [T, 6]; optional camera [T, 25].

    Absent poses are zero; without a camera it is the frontal one. Raises DataError naming the file, the key and the shape expected.
    """
    arguments = ", ".join(f"{name}=[T, {size}]" for name, size in _FILE_KEYS.items())
    remedy = f"write it with numpy.savez(path, {arguments}), optionally camera=[T, 25]"
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except OSError as error:
        raise DataError(f"{path}: could not be read: {error.strerror or error}; {remedy}") from error
    except (ValueError, AttributeError) as error:  # no zip, or objects inside; a lone .npy has no `files`
        raise DataError(f"{path}: expected a .npz of number arrays ({error}); {remedy}") from error
    unknown = sorted(set(arrays) - set(_FILE_KEYS) - {"camera"})
    if unknown or "expression" not in arrays:
        allowed, got = ", ".join([*_FILE_KEYS, "camera"]), ", ".join(arrays) or "none"
        raise DataError(f"{path}: expected the key expression, and no other than {allowed}; got {got}; {remedy}")
    frames = len(arrays["expression"]) if arrays["expression"].ndim else 0
    sizes = _FILE_KEYS | {"camera": 25}
    for name, array in arrays.items():
        if array.shape != (frames, sizes[name]) or frames == 0 or array.dtype.kind not in "fiu" or not np.isfinite(array).all():
            raise DataError(
                f"{path}: key {name}: expected finite numbers of shape [{frames or 'T'}, {sizes[name]}], "
                f"got {array.dtype} {list(array.shape)}; {remedy}"
            )
    tensors = {name: torch.from_numpy(array.astype(np.float32)) for name, array in arrays.items()}
    motion = Motion(*(tensors.get(name, torch.zeros(frames, size)) for name, size in _FILE_KEYS.items()))
    return Sequence(motion, Camera.from_label(tensors["camera"]) if "camera" in tensors else frontal(frames))
