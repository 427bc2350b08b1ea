"""Motion sequences for `drive`: built in, from a data set's labels, or from a file; and smooth interpolation between key motions."""

from __future__ import annotations

import dataclasses
import zipfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from scipy.spatial.transform import Rotation, Slerp
from torch import Tensor

from head3d.cameras import Camera, frontal, orbit
from head3d.labels import EXPRESSION_SIZE, HeadLabel, Motion
from head3d.run.errors import DataError

FRONTAL_RADIUS = 4.17  # scene units; the published labels' mean distance
_FILE_KEYS = {"expression": EXPRESSION_SIZE, "neck_pose": 3, "jaw_pose": 3, "eye_pose": 6}


@dataclasses.dataclass(frozen=True)
class Sequence:
    """T frames: what moves, seen from where."""

    motion: Motion  # [T, ...]
    camera: Camera  # [T, ...] of the driver
    vector: Tensor | None = None  # [T, D] what the network's attention reads; None = the FLAME motion's own vector

    def __len__(self) -> int:
        return self.motion.expression.shape[0]

    def select(self, index: slice) -> Sequence:
        """Some of the frames."""
        vector = None if self.vector is None else self.vector[index]
        return Sequence(self.motion.select(index), self.camera.select(index), vector)


def interpolate(
    keys: Tensor,  # [K, D], K >= 1
    frames_between: int,  # frames from one key to the next
) -> Tensor:
    """A smooth path through the keys, [(K - 1) * frames_between + 1, D]: it rests at each key (smoothstep 3 t^2 - 2 t^3 between them).

    Coefficients and axis-angle poses are taken as they are; for the small rotations of jaw, eyes and neck that is close to the
    shortest rotation.
    """
    t = _smoothstep(frames_between).to(keys.dtype)[None, :, None]
    path = keys[:-1, None] * (1 - t) + keys[1:, None] * t
    return torch.cat([path.flatten(0, 1), keys[-1:]])


def interpolate_directions(keys: Tensor, frames_between: int) -> Tensor:
    """`interpolate` for vectors [K, D] of which the direction counts: between two keys their lengths are interpolated too, and kept."""
    return F.normalize(interpolate(keys, frames_between), dim=1) * interpolate(keys.norm(dim=1, keepdim=True), frames_between)


def _smoothstep(frames_between: int) -> Tensor:
    t = torch.arange(frames_between) / frames_between
    return t * t * (3 - 2 * t)


def interpolate_camera(keys: Camera, frames_between: int) -> Camera:
    """`interpolate` for K cameras: rotations take the shortest arc; the position is interpolated in the camera's own axes, so that
    cameras that look at the origin from one distance go around it."""
    count, c2w = len(keys.c2w), keys.c2w
    rotation = c2w[:, :3, :3]
    if count > 1:
        times = (torch.arange(count - 1)[:, None] + _smoothstep(frames_between)).flatten()
        times = torch.cat([times, torch.tensor([count - 1.0])])
        turned = Slerp(np.arange(count), Rotation.from_matrix(rotation.double().numpy()))(times.double().numpy())
        rotation = torch.from_numpy(turned.as_matrix()).to(c2w)
    local = interpolate(torch.einsum("bji,bj->bi", c2w[:, :3, :3], c2w[:, :3, 3]), frames_between)
    path = torch.eye(4).repeat(len(local), 1, 1)
    path[:, :3, :3], path[:, :3, 3] = rotation, torch.einsum("bij,bj->bi", rotation, local)
    return Camera(path, interpolate(keys.intrinsics.flatten(1), frames_between).unflatten(1, (3, 3)))


def interpolate_motion(keys: Motion, frames_between: int) -> Motion:
    """`interpolate` for each part of K motions."""
    return Motion(*(interpolate(part, frames_between) for part in keys))


def of_labels(labels: HeadLabel, frames_between: int) -> Sequence:
    """K labels as key motions, each seen from its own camera."""
    return Sequence(interpolate_motion(labels.motion, frames_between), interpolate_camera(labels.camera, frames_between))


def orbiting(frames: int, yaw_rad: float, radius: float = FRONTAL_RADIUS) -> Camera:
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
    """Read FLAME motions, a frame a row, rotations in axis-angle radians.

    .npz: expression [T, 100], neck_pose [T, 3], jaw_pose [T, 3], eye_pose [T, 6] (left, right); optional camera [T, 25] and vector [T, D],
    the motion vectors of a reconstructor's encoder, beside which expression may be absent. Absent motion is zero; without a camera it is
    the frontal one. .npy: [T, 112], the label's order: expression | neck | jaw | eyes.
    Raises DataError naming the file, the key and the shape expected.
    """
    sizes = ", ".join(f"{name}=[T, {size}]" for name, size in _FILE_KEYS.items())
    plain = f"numpy.save(path, [T, {sum(_FILE_KEYS.values())}])"
    remedy = f"write it with numpy.savez(path, {sizes}), optionally camera=[T, 25], vector=[T, D]; or {plain}"
    arrays = _read_arrays(path, remedy)
    unknown = sorted(set(arrays) - set(_FILE_KEYS) - {"camera", "vector"})
    first = arrays.get("expression", arrays.get("vector"))
    if unknown or first is None:
        allowed, got = ", ".join([*_FILE_KEYS, "camera", "vector"]), ", ".join(arrays) or "none"
        raise DataError(f"{path}: expected the key expression or vector, and no other than {allowed}; got {got}; {remedy}")
    frames = len(first) if first.ndim else 0
    widths = _FILE_KEYS | {"camera": 25, "vector": arrays["vector"].shape[-1] if "vector" in arrays and arrays["vector"].ndim else 0}
    for name, array in arrays.items():
        _check_array(array, frames, widths[name], f"{path}: key {name}", remedy)
    tensors = {name: torch.from_numpy(array.astype(np.float32)) for name, array in arrays.items()}
    motion = Motion(*(tensors.get(name, torch.zeros(frames, size)) for name, size in _FILE_KEYS.items()))
    camera = Camera.from_label(tensors["camera"]) if "camera" in tensors else frontal(frames)
    return Sequence(motion, camera, tensors.get("vector"))


def _read_arrays(path: Path, remedy: str) -> dict[str, np.ndarray]:
    """The arrays of a .npz by name; those of a .npy split by the label's order."""
    try:
        loaded = np.load(path, allow_pickle=False)
        if not isinstance(loaded, np.ndarray):
            with loaded as file:
                return {name: file[name] for name in file.files}
    except OSError as error:
        raise DataError(f"{path}: could not be read: {error.strerror or error}; {remedy}") from error
    except (ValueError, EOFError, zipfile.BadZipFile) as error:  # neither format, or objects inside
        raise DataError(f"{path}: expected a .npz or .npy of number arrays ({error}); {remedy}") from error
    _check_array(loaded, len(loaded) if loaded.ndim else 0, sum(_FILE_KEYS.values()), str(path), remedy)
    ends = np.cumsum(list(_FILE_KEYS.values()))[:-1]
    return dict(zip(_FILE_KEYS, np.split(loaded, ends, axis=1), strict=True))


def _check_array(array: np.ndarray, frames: int, size: int, where: str, remedy: str) -> None:
    if array.shape != (frames, size) or frames == 0 or array.dtype.kind not in "fiu" or not np.isfinite(array).all():
        raise DataError(
            f"{where}: expected finite numbers of shape [{frames or 'T'}, {size}], got {array.dtype} {list(array.shape)}; {remedy}"
        )
