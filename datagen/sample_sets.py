"""Rows of fitted labels as a source of recipes: the published sample sets (portrait4d, section 5), or a portraits record.

    *_all_shape_n_c_params   [N, M, 325]   camera 25 | shape 300
    *_all_motion_params      [N, M, 112]   expression 100 | neck 3 | jaw 3 | eyes 6

N clips of M frames; photographs are clips of one frame. The neck repeats the rotation that the camera holds, so it is not used.
A portraits record has photographs alone: the motions of a dynamic identity are then those of several people.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import hashlib
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from genhead.portraits import PortraitSet
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


@dataclasses.dataclass(frozen=True)
class PortraitRows:
    """A record of portraits whose labels are drawn from, for source portraits."""

    record: Path | None = None  # folder that the portraits command made
    content: str = ""  # hash of its labels: filled in when a data set is planned, and checked when they are read

    def pinned(self, head_model: str) -> PortraitRows:
        """With `content` of the labels as they are.

        Raises DataError if the record is missing, labelled for another head model, or not what `content` says.
        """
        assert self.record is not None, "checked by RecipeConfig"
        portraits = PortraitSet(self.record)
        labelled_for = portraits.metadata.get("head_model", head_model)
        if labelled_for != head_model:
            raise DataError(
                f"{self.record}: labelled for the head model {labelled_for!r}, but the generator's is {head_model!r}: the numbers mean "
                "other heads; give the portraits that the generator was trained on"
            )
        content = hashlib.sha256(portraits.labels().tobytes()).hexdigest()[:16]
        if self.content not in ("", content):
            raise DataError(
                f"{self.record}: expected portraits with labels of content {self.content}, got {content}; bring back the record that the "
                "data set was made with, or make another data set"
            )
        return dataclasses.replace(self, content=content)


class LabelRows:
    """Draws from rows of fitted labels; made by `load_sample_sets` and `load_portrait_rows`."""

    def __init__(self, shapes: list[np.ndarray], motions: list[np.ndarray], bounds: tuple[float, float]) -> None:
        """shapes [N, M, 325] and motions [N, M, 112] of photographs, then, if there are any, of clips.

        bounds: smallest and largest |z of the world origin in camera axes|.
        """
        self._shapes, self._motions = shapes, motions
        self._rows = [np.arange(len(array)) for array in shapes]  # that may be drawn
        self._of_split: dict[tuple[str, float, float], LabelRows] = {}
        self.camera_distances = bounds[0] - _MARGIN, bounds[1] + _MARGIN

    def of_split(self, split: str, val_share: float, test_share: float) -> LabelRows:
        """The rows that identities of one split draw from: val and test have their shares of the rows, at least one, train the rest.

        Rows are ordered by a hash of their first shape, and equal shapes stay together, so a row's split depends neither on a seed nor
        on its place in the file. Raises DataError if there are fewer different rows than splits.
        """
        key = split, val_share, test_share
        if key not in self._of_split:
            rows = []
            for rank in self._ranks:
                distinct = int(rank.max()) + 1
                val, test = (math.ceil(share * distinct - 1e-9) for share in (val_share, test_share))
                first, end = {"val": (0, val), "test": (val, val + test), "train": (val + test, distinct)}[split]
                rows.append(np.flatnonzero((rank >= first) & (rank < end)))
                if not len(rows[-1]):
                    raise DataError(
                        f"recipe.split_rows: {distinct} different rows of fitted labels leave none for the split {split!r}; give more, "
                        "or set --recipe.split_rows false, so that splits share rows"
                    )
            self._of_split[key] = copy.copy(self)
            self._of_split[key]._rows = rows
        return self._of_split[key]

    @functools.cached_property
    def _ranks(self) -> list[np.ndarray]:
        """Of photographs and of clips, each row's place in the order of the hashes; equal shapes have one place."""
        digests = [np.array([_digest(row[0, CAMERA_SIZE:]) for row in array]) for array in self._shapes]
        return [np.unique(array, return_inverse=True)[1] for array in digests]

    @property
    def clip_frames(self) -> int | None:
        """Frames of a clip; None if there are only photographs."""
        return self._motions[1].shape[1] if len(self._motions) > 1 else None

    def shape(self, rng: np.random.Generator) -> np.ndarray:
        """Shape [300] of a frame of any row; all frames are equally likely."""
        return self._frame(rng)[CAMERA_SIZE:]

    def camera(self, rng: np.random.Generator) -> np.ndarray:
        """Camera label [25] of a frame of any row; all frames are equally likely."""
        return self._frame(rng)[:CAMERA_SIZE]

    def photograph(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(expression [100], jaw [3]) of one photograph and eyes [6] of another."""
        return self._parts(self._pick(0, rng), self._pick(0, rng))

    def clip_frame(self, clip_rng: np.random.Generator, index: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(expression [100], jaw [3]) of frame `index` of a clip and eyes [6] of any frame of any clip; without clips, a photograph.

        `clip_rng`, at its start, chooses the clip and the order of its frames: the same for all motions of an identity. A clip's
        frames come once each, then again.
        """
        if len(self._motions) == 1:
            return self.photograph(rng)
        motions = self._motions[1]
        clip = self._rows[1][int(clip_rng.integers(len(self._rows[1])))]
        order = clip_rng.permutation(motions.shape[1])
        return self._parts(motions[clip, order[index % len(order)]], self._pick(1, rng))

    def _frame(self, rng: np.random.Generator) -> np.ndarray:
        counts = [len(rows) * array.shape[1] for rows, array in zip(self._rows, self._shapes, strict=True)]
        frame = int(rng.integers(sum(counts)))
        which = int(frame >= counts[0])
        array, frame = self._shapes[which], frame - which * counts[0]
        return np.array(array[self._rows[which][frame // array.shape[1]], frame % array.shape[1]])

    def _pick(self, which: int, rng: np.random.Generator) -> np.ndarray:
        """A frame [112] of the motions of photographs or clips, all equally likely."""
        rows, motions = self._rows[which], self._motions[which]
        return motions[rows[int(rng.integers(len(rows)))], int(rng.integers(motions.shape[1]))]

    @staticmethod
    def _parts(face: np.ndarray, gaze: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return np.array(face[:EXPRESSION_SIZE]), np.array(face[_JAW]), np.array(gaze[_EYES])


@functools.lru_cache(maxsize=2)
def load_sample_sets(files: SampleSetFiles) -> LabelRows:
    """Open and check the files, once a process. Raises DataError that names the file, what was expected and what was found."""
    assert len(files.paths()) == 4, "four files"
    photograph_shapes, photograph_motions, clip_shapes, clip_motions = files.pinned().paths()
    shapes = [_open(path, CAMERA_SIZE + SHAPE_SIZE) for path in (photograph_shapes, clip_shapes)]
    motions = [_open(path, MOTION_SIZE) for path in (photograph_motions, clip_motions)]
    for path, labels, array in zip((photograph_motions, clip_motions), shapes, motions, strict=True):
        if labels.shape[:2] != array.shape[:2]:
            raise DataError(
                f"{path}: expected motions [N, M] = {labels.shape[:2]} as its shapes and cameras have, got {array.shape[:2]}; "
                "give two files of one sample set"
            )
    if motions[1].shape[1] < 2:
        raise DataError(f"{clip_motions}: expected clips of at least 2 frames, got {motions[1].shape[1]}; is it of photographs?")
    bounds = [_check_cameras(path, array) for path, array in zip((photograph_shapes, clip_shapes), shapes, strict=True)]
    return LabelRows(shapes, motions, (min(near for near, _ in bounds), max(far for _, far in bounds)))


@functools.lru_cache(maxsize=2)
def load_portrait_rows(rows: PortraitRows) -> LabelRows:
    """The labels of a portraits record as photographs, once a process. Raises DataError as `PortraitSet` and `PortraitRows.pinned`."""
    portraits = PortraitSet(rows.record)
    rows.pinned(portraits.metadata.get("head_model", ""))
    labels = portraits.labels()[:, None]  # [N, 1, 437]
    shapes, motions = labels[..., : CAMERA_SIZE + SHAPE_SIZE], labels[..., CAMERA_SIZE + SHAPE_SIZE :]
    return LabelRows([shapes], [motions], _check_cameras(rows.record, shapes))


def _digest(shape: np.ndarray) -> int:
    """64 bits of a hash of one shape."""
    return int.from_bytes(hashlib.blake2b(np.ascontiguousarray(shape, "<f4").tobytes(), digest_size=8).digest(), "little")


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
