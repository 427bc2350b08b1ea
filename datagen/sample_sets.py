"""Published sample sets: fitted labels of photographs and of clips as .npy files, as a source of recipes (portrait4d, section 5).

    *_all_shape_n_c_params   [N, M, 325]   camera 25 | shape 300
    *_all_motion_params      [N, M, 112]   expression 100 | neck 3 | jaw 3 | eyes 6

N clips of M frames; photographs are clips of one frame. The neck repeats the rotation that the camera holds, so it is not used.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from head3d.labels import EXPRESSION_SIZE, SHAPE_SIZE
from head3d.run.errors import DataError
from head3d.run.files import sha256_of_file

CAMERA_SIZE = 25
MOTION_SIZE = EXPRESSION_SIZE + 12
_JAW, _EYES = slice(EXPRESSION_SIZE + 3, EXPRESSION_SIZE + 6), slice(EXPRESSION_SIZE + 6, MOTION_SIZE)
_ROWS = 4096  # checked at a time
_MARGIN = 1e-4  # scene units, for the rounding of float32 cameras
_REMEDY = "give the published .npy file, or write one array with numpy.save"


@dataclasses.dataclass(frozen=True)
class SampleSetFiles:
    """The four files of the published sample sets; all are needed for source sample-sets."""

    photograph_shapes: Path | None = None  # ffhq_all_shape_n_c_params.npy: cameras and shapes of photographs
    photograph_motions: Path | None = None  # ffhq_all_motion_params.npy: their motions
    clip_shapes: Path | None = None  # vfhq_all_shape_n_c_params.npy: cameras and shapes of clips
    clip_motions: Path | None = None  # vfhq_all_motion_params.npy: their motions
    content: str = ""  # hash of the files' bytes: filled in when a data set is planned, and checked when they are read

    def paths(self) -> tuple[Path, ...]:
        """The files that are given."""
        return tuple(
            path for path in (self.photograph_shapes, self.photograph_motions, self.clip_shapes, self.clip_motions) if path is not None
        )

    def pinned(self) -> SampleSetFiles:
        """With `content` of the files as they are. Raises DataError if one is missing, or not what `content` says."""
        for path in self.paths():
            if not path.is_file():
                raise DataError(f"{path}: there is no such file of a sample set; check recipe.sample_sets")
        content = hashlib.sha256("".join(map(sha256_of_file, self.paths())).encode()).hexdigest()[:16]
        if self.content not in ("", content):
            raise DataError(
                f"{', '.join(map(str, self.paths()))}: expected sample sets of content {self.content}, got {content}; "
                "bring back the files that the data set was made with, or make another data set"
            )
        return dataclasses.replace(self, content=content)


class SampleSets:
    """Draws from the files; made by `load_sample_sets`."""

    def __init__(self, files: SampleSetFiles) -> None:
        assert len(files.paths()) == 4, "four files"
        photograph_shapes, photograph_motions, clip_shapes, clip_motions = files.pinned().paths()
        self._shapes = [_open(path, CAMERA_SIZE + SHAPE_SIZE) for path in (photograph_shapes, clip_shapes)]
        self._motions = [_open(path, MOTION_SIZE) for path in (photograph_motions, clip_motions)]
        for path, labels, motions in zip((photograph_motions, clip_motions), self._shapes, self._motions, strict=True):
            if labels.shape[:2] != motions.shape[:2]:
                raise DataError(
                    f"{path}: expected motions [N, M] = {labels.shape[:2]} as its shapes and cameras have, got {motions.shape[:2]}; "
                    "give two files of one sample set"
                )
        if self._motions[1].shape[1] < 2:
            raise DataError(f"{clip_motions}: expected clips of at least 2 frames, got {self._motions[1].shape[1]}; is it of photographs?")
        bounds = [_check_cameras(path, array) for path, array in zip((photograph_shapes, clip_shapes), self._shapes, strict=True)]
        self.camera_distances = min(near for near, _ in bounds) - _MARGIN, max(far for _, far in bounds) + _MARGIN

    def shape(self, rng: np.random.Generator) -> np.ndarray:
        """Shape [300] of a frame of either set; all frames are equally likely."""
        return self._frame(rng)[CAMERA_SIZE:]

    def camera(self, rng: np.random.Generator) -> np.ndarray:
        """Camera label [25] of a frame of either set; all frames are equally likely."""
        return self._frame(rng)[:CAMERA_SIZE]

    def photograph(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(expression [100], jaw [3]) of one photograph and eyes [6] of another."""
        motions = self._motions[0]
        return self._parts(_pick(motions, rng), _pick(motions, rng))

    def clip_frame(self, clip_rng: np.random.Generator, index: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(expression [100], jaw [3]) of frame `index` of a clip and eyes [6] of any frame of any clip.

        `clip_rng`, at its start, chooses the clip and the order of its frames: the same for all motions of an identity. A clip's
        frames come once each, then again.
        """
        motions = self._motions[1]
        clip = int(clip_rng.integers(len(motions)))
        order = clip_rng.permutation(motions.shape[1])
        return self._parts(motions[clip, order[index % len(order)]], _pick(motions, rng))

    def _frame(self, rng: np.random.Generator) -> np.ndarray:
        first, second = self._shapes
        frame = int(rng.integers(first.shape[0] * first.shape[1] + second.shape[0] * second.shape[1]))
        photographs = first.shape[0] * first.shape[1]
        array, frame = (first, frame) if frame < photographs else (second, frame - photographs)
        return np.array(array[frame // array.shape[1], frame % array.shape[1]])

    @staticmethod
    def _parts(face: np.ndarray, gaze: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return np.array(face[:EXPRESSION_SIZE]), np.array(face[_JAW]), np.array(gaze[_EYES])


@functools.lru_cache(maxsize=2)
def load_sample_sets(files: SampleSetFiles) -> SampleSets:
    """Open and check the files, once a process. Raises DataError that names the file, what was expected and what was found."""
    return SampleSets(files)


def _pick(array: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A frame [C] of [N, M, C], all equally likely."""
    return array[int(rng.integers(array.shape[0])), int(rng.integers(array.shape[1]))]


def _open(path: Path, channels: int) -> np.ndarray:
    """The array [N, M, channels] in a file, mapped into memory, with finite numbers only."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise DataError(
            f"{path}: expected a .npy file [N, M, {channels}] of numbers, but it cannot be read ({error}); {_REMEDY}"
        ) from error
    if not isinstance(array, np.ndarray) or array.dtype.kind != "f" or array.ndim != 3 or array.shape[2] != channels or not array.size:
        found = f"{array.dtype} {array.shape}" if isinstance(array, np.ndarray) else "an archive of several arrays"
        raise DataError(f"{path}: expected floating-point numbers [N, M, {channels}], got {found}; {_REMEDY}")
    for first, rows in _blocks(array):
        bad = np.flatnonzero(~np.isfinite(rows).all(axis=(1, 2)))
        if len(bad):
            raise DataError(f"{path}: row {first + bad[0]} holds numbers that are not finite; drop it from both files of the set")
    return array


def _check_cameras(path: Path, array: np.ndarray) -> tuple[float, float]:
    """Smallest and largest |z of the world origin in camera axes|, scene units, after a check of every camera of [N, M, 325]."""
    near, far = np.inf, 0.0
    for first, rows in _blocks(array):
        c2w = rows[..., :16].reshape(-1, 4, 4).astype(np.float64)
        rotation, focal = c2w[:, :3, :3], rows[..., [16, 20]].reshape(-1, 2)
        wrong = np.abs(rotation @ rotation.transpose(0, 2, 1) - np.eye(3)).max(axis=(1, 2)) > 1e-2
        wrong |= (np.linalg.det(rotation) < 0) | (np.abs(c2w[:, 3] - [0, 0, 0, 1]).max(1) > 1e-4) | (focal <= 0).any(1)
        depth = (c2w[:, :3, 2] * c2w[:, :3, 3]).sum(1)  # of the origin, along the axis that points away from it
        wrong |= depth <= 0
        if wrong.any():
            row, frame = divmod(int(np.flatnonzero(wrong)[0]), array.shape[1])
            raise DataError(
                f"{path}: row {first + row}, frame {frame}: expected a camera in the first 25 numbers (row-major camera-to-world with a "
                "proper rotation, looking down -z at the origin, then intrinsics divided by the image size); check the order of the numbers"
            )
        near, far = min(near, float(depth.min())), max(far, float(depth.max()))
    return near, far


def _blocks(array: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """(first row, rows) of a mapped array, some thousand frames at a time."""
    step = max(1, _ROWS // array.shape[1])
    for first in range(0, len(array), step):
        yield first, np.asarray(array[first : first + step])
