"""What a sample holds: its members, and values to bytes and back. Members that can be chosen are in `datagen.labels`.

Three families of tars hold the members of a frame: `frames` (pictures, labels, opacity, parts), `labels` (what training from exact
labels compares with) and `identities` (once per identity). A member is a picture, an array (.npy) or JSON; arrays of a bounded
quantity are stored as integers over its range, which dataset.json states.
"""

from __future__ import annotations

import dataclasses
import functools
import io
import json
import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import simplejpeg
from PIL import Image

from head3d.run.config import PositiveInt
from head3d.run.errors import DataError

Family = Literal["frames", "labels", "identities"]
FAMILIES: tuple[Family, ...] = ("frames", "labels", "identities")
_NPY_PREFIX = 10  # bytes of an .npy file before its header: magic, version, and the header's length in two


@dataclasses.dataclass(frozen=True)
class ShardConfig:
    """How frames are packed into files. Everything here changes bytes."""

    identities_per_shard: PositiveInt = 48  # about 120 frames when half the identities have four motions
    image_format: Literal["jpg", "png"] = "jpg"  # jpg: 4:4:4; png: lossless, about four times the bytes and the reading time
    jpeg_quality: PositiveInt = 95  # 1 to 100

    def __post_init__(self) -> None:
        if self.jpeg_quality > 100:
            raise ValueError(f"jpeg_quality: expected 1 to 100, got {self.jpeg_quality}")


@dataclasses.dataclass(frozen=True)
class Scales:
    """Ranges of the 16-bit members; stated in dataset.json."""

    near: float  # scene units: depth 0
    far: float  # scene units: depth 65535
    box_side: float  # scene units: points 0 .. 65535 span -box_side/2 .. box_side/2


@dataclasses.dataclass(frozen=True)
class Member:
    """One entry of a sample. Shapes: V views, S picture side, R rendering side, C features, P plane features, T plane side, N points."""

    family: Family
    name: str  # what readers ask for; {view} stands for 0 .. V-1
    kind: Literal["picture", "array", "json"]  # encoding: jpg or png, npy, UTF-8 JSON
    dtype: str  # as stored
    shape: tuple[str | int, ...]
    scale: Literal["none", "unit", "signed", "depth", "box"]  # what integers stand for: [0, 1], [-1, 1], [near, far], the box
    unit: str  # of the numbers as they are read
    note: str  # what they say, and in which space
    limits: tuple[float, float] | None = None  # of the stored numbers, where they are narrower than those of their type

    @property
    def asked(self) -> str:
        """The name by which readers ask for it; members of an identity begin with 'identity.'."""
        return f"identity.{self.name}" if self.family == "identities" else self.name

    def extension(self, image_format: str) -> str:
        """The member's name in the tar, after the sample's key."""
        return {"picture": f"{self.name}.{image_format}", "array": f"{self.name}.npy", "json": "json"}[self.kind]


def member_entries(members: Sequence[Member]) -> list[dict[str, Any]]:
    """The table as dataset.json states it, so that a set is read by what it says itself."""
    return [dataclasses.asdict(member) | {"shape": list(member.shape)} for member in members]


def read_member_entries(entries: Sequence[dict[str, Any]], where: str) -> dict[str, Member]:
    """Inverse of `member_entries`, by the names that readers ask for. Raises DataError if an entry is not of a member."""
    try:
        members = [
            Member(**entry | {"shape": tuple(entry["shape"]), "limits": entry["limits"] and tuple(entry["limits"])}) for entry in entries
        ]
    except (TypeError, KeyError) as error:
        raise DataError(f"{where}: expected the table of members, but an entry is of another form ({error}); restore the file") from error
    return {member.asked: member for member in members}


ALWAYS: tuple[Member, ...] = (
    Member("frames", "rgb.{view}", "picture", "uint8", ("S", "S", 3), "none", "colour", "final picture of each view"),
    Member(
        "frames", "label", "array", "float32", ("V", 437), "none", "scene units, radians",
        "camera 25, shape 300, expression 100, neck 3, jaw 3, eyes 6",
    ),
    Member("frames", "json", "json", "", (), "none", "", "who, which motion, split, seed, draws: enough to render it again"),
)  # fmt: skip


# Values <-> stored numbers ------------------------------------------------------------------------------------------------


def quantise(values: np.ndarray, member: Member, scales: Scales) -> np.ndarray:
    """Floats as the member stores them. Raises ValueError if a number is not finite or outside the member's range."""
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        raise ValueError(f"{member.name} holds {np.count_nonzero(~np.isfinite(values))} numbers that are not finite")
    if member.scale != "none":
        low, high, first, last = _range(member, scales)
        values = np.rint((values.astype(np.float64) - low) * ((last - first) / (high - low)) + first)
        if values.size and (values.min() < first - 1 or values.max() > last + 1):
            raise ValueError(
                f"{member.name} must lie in [{low:g}, {high:g}], got steps {values.min():g} to {values.max():g} of {first} to {last}"
            )
        values = np.clip(values, first, last)
    with np.errstate(over="ignore"):  # checked in the next line
        stored = values.astype(member.dtype)
    if member.dtype == "float16" and not np.isfinite(stored).all():
        raise ValueError(f"{member.name} is too large for float16: largest value {np.abs(values).max():g}")
    return stored


def dequantise(stored: np.ndarray, member: Member, scales: Scales) -> np.ndarray:
    """Inverse of `quantise`, a new array: float32 where the numbers stand for a quantity, as stored for pictures and part numbers."""
    if member.scale != "none":
        low, high, first, last = _range(member, scales)
        step = (high - low) / (last - first)
        return stored.astype(np.float32) * np.float32(step) + np.float32(low - first * step)
    return stored.astype(np.float32 if stored.dtype.kind == "f" else stored.dtype)


def _range(member: Member, scales: Scales) -> tuple[float, float, int, int]:
    """(lowest, highest value, the integers that stand for them); zero is exact where the range is signed."""
    last = int(np.iinfo(member.dtype).max)
    match member.scale:
        case "unit":
            return 0.0, 1.0, 0, last
        case "signed":
            return -1.0, 1.0, -last, last
        case "depth":
            return scales.near, scales.far, 0, last
        case "box":
            return -scales.box_side / 2, scales.box_side / 2, 0, last
        case _:
            raise ValueError(f"no range belongs to scale {member.scale!r}")


def encode_sample(members: Sequence[Member], values: dict[str, Any], scales: Scales, config: ShardConfig) -> dict[str, bytes]:
    """One sample's members as bytes by extension; all of one family. `values` has an entry by the name that readers ask for, but the
    pictures of all views, [V, S, S, 3], are under `rgb`. Raises ValueError if a value is out of range (see `quantise`).
    """
    files = {}
    for member in members:
        if member.kind == "json":
            files["json"] = json_bytes(values["json"])
        elif member.kind == "array":
            files[member.extension("")] = _npy(quantise(values[member.asked], member, scales))
        else:
            name = member.name.removesuffix(".{view}")
            pictures = values[name] if "{view}" in member.name else values[name][None]
            for view, pixels in enumerate(pictures):
                extension = member.extension(config.image_format).format(view=view)
                files[extension] = _encode_picture(pixels, config)
    return files


def json_bytes(value: Any) -> bytes:
    """JSON with sorted keys, so that equal values are equal bytes."""
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def decode(data: bytes | memoryview, extension: str) -> Any:
    """Bytes of one member to pixels uint8 [H, W, 3], an array as stored, or a JSON value. Raises ValueError if they are damaged.

    An array is a view of the bytes: nothing is copied, so what is not looked at is not read, and nothing can be written to it.
    """
    suffix = extension.rpartition(".")[2]
    try:
        match suffix:
            case "npy":
                begin = _NPY_PREFIX + int.from_bytes(data[_NPY_PREFIX - 2 : _NPY_PREFIX], "little")
                shape, column_major, dtype = _npy_header(bytes(data[:begin]))
                values = np.frombuffer(data, dtype, math.prod(shape), begin)
                return values.reshape(shape, order="F" if column_major else "C")
            case "jpg":
                return simplejpeg.decode_jpeg(data, colorspace="RGB", fastdct=False, fastupsample=False)
            case "png":
                with Image.open(io.BytesIO(data)) as picture:
                    return np.asarray(picture.convert("RGB"))
            case "json":
                return json.loads(bytes(data))
    except (OSError, EOFError, SyntaxError) as error:  # what pillow and numpy raise for some sorts of damage
        raise ValueError(str(error)) from error
    raise ValueError(f"no decoder for members that end in .{suffix}")


@functools.lru_cache(maxsize=256)  # shapes of one data set are few, and parsing takes longer than all else
def _npy_header(start: bytes) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, whether column-major, and type by the first bytes of an .npy file, as numpy's `save` writes arrays of numbers."""
    stream = io.BytesIO(start)
    if np.lib.format.read_magic(stream) != (1, 0):
        raise ValueError("expected an .npy file of version 1.0")
    return np.lib.format.read_array_header_1_0(stream)


def _npy(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, np.ascontiguousarray(array), allow_pickle=False)
    return stream.getvalue()


def _encode_picture(pixels: np.ndarray, config: ShardConfig) -> bytes:
    pixels = np.ascontiguousarray(pixels)
    if config.image_format == "jpg":
        return simplejpeg.encode_jpeg(pixels, quality=config.jpeg_quality, colorspace="RGB", colorsubsampling="444", fastdct=False)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG", compress_level=1)
    return stream.getvalue()
