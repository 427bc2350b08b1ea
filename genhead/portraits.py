"""The portraits record: one LMDB of single-view portraits, each with a matte and a 437-number label.

A record is a folder with one `data.mdb`. Keys `00000000`, `00000001`, ... hold one portrait each:

    header   little-endian: magic "HFP1", flags u32 (bit 0: a matte was given), image bytes u32, matte bytes u32, CRC-32 of the rest u32
    label    437 x float32
    image    JPEG 4:4:4 or PNG, RGB, square
    matte    PNG, 8-bit grey, 255 = the person; all 255 where no matte was given (bit 0 of the flags is then 0)

and `metadata` holds JSON: schema, version, count, resolution, provenance, config hash. It is written last and the folder is
renamed into place after that, so a record is there whole or not at all.
"""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import struct
import weakref
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import lmdb
import numpy as np
import simplejpeg
import torch
from PIL import Image
from torch import Tensor

from head3d.labels import LABEL_SIZE
from head3d.run.errors import DataError
from head3d.run.files import TEMPORARY_PREFIX, atomic_folder

SCHEMA = "headfoundry-portraits"
VERSION = 1
_HEADER = struct.Struct("<4sIIII")
_MAGIC = b"HFP1"
_HAS_MATTE = 1
_LABEL_BYTES = LABEL_SIZE * 4
_COMMIT_EVERY = 256  # portraits per LMDB transaction

ImageFormat = Literal["jpeg", "png"]


class Portrait(NamedTuple):
    """One picture of one person."""

    image: np.ndarray  # uint8 [H, W, 3] RGB
    matte: np.ndarray  # uint8 [H, W], 255 = the person (head, hair, clothing), 0 = background
    label: np.ndarray  # float32 [437], head3d/labels.py


# ---- one record <-> bytes ----------------------------------------------------------------------------------------------


def encode_portrait(portrait: Portrait, image_format: ImageFormat = "jpeg", has_matte: bool = True) -> bytes:
    """One portrait as the bytes of its LMDB value (see the module docstring)."""
    image, matte, label = portrait
    side = image.shape[0]
    assert image.shape == (side, side, 3) and image.dtype == np.uint8, f"image must be uint8 [S, S, 3], got {image.dtype} {image.shape}"
    assert matte.shape == (side, side) and matte.dtype == np.uint8, f"matte must be uint8 [{side}, {side}], got {matte.dtype} {matte.shape}"
    assert label.shape == (LABEL_SIZE,), f"label must be [{LABEL_SIZE}], got {label.shape}"
    match image_format:
        case "jpeg":
            encoded = simplejpeg.encode_jpeg(
                np.ascontiguousarray(image), quality=95, colorspace="RGB", colorsubsampling="444", fastdct=False
            )
        case "png":
            encoded = _encode_png(image)
        case _:
            raise ValueError(f"image_format must be 'jpeg' or 'png', got {image_format!r}")
    matte_bytes = _encode_png(matte)
    body = label.astype("<f4").tobytes() + encoded + matte_bytes
    return _HEADER.pack(_MAGIC, _HAS_MATTE if has_matte else 0, len(encoded), len(matte_bytes), zlib.crc32(body)) + body


def decode_portrait(value: bytes | memoryview, where: str) -> Portrait:
    """Inverse of `encode_portrait`. Raises DataError naming `where` if a byte is wrong."""
    _, image_bytes, matte_bytes = _read_header(value, where)
    body = memoryview(value)[_HEADER.size :]
    if len(body) != _LABEL_BYTES + image_bytes + matte_bytes or zlib.crc32(body) != _HEADER.unpack_from(value)[4]:
        raise DataError(f"{where}: the checksum or the length does not match, so the file is damaged; delete the record and make it again")
    label = np.frombuffer(body[:_LABEL_BYTES], "<f4").astype(np.float32)
    image = _decode(bytes(body[_LABEL_BYTES : _LABEL_BYTES + image_bytes]), "RGB")
    matte = _decode(bytes(body[_LABEL_BYTES + image_bytes :]), "L")
    return Portrait(image, matte, label)


def _read_header(value: bytes | memoryview, where: str) -> tuple[int, int, int]:
    """(flags, image bytes, matte bytes)."""
    if len(value) < _HEADER.size + _LABEL_BYTES or bytes(value[:4]) != _MAGIC:
        raise DataError(
            f"{where}: expected an entry that begins with {_MAGIC!r}, got {bytes(value[:4])!r}; delete the record and make it again"
        )
    return _HEADER.unpack_from(value)[1:4]


def _encode_png(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG", compress_level=3)
    return buffer.getvalue()


def _decode(data: bytes, mode: str) -> np.ndarray:
    if data[:2] == b"\xff\xd8":
        return simplejpeg.decode_jpeg(data, colorspace="RGB", fastdct=False, fastupsample=False)
    with Image.open(io.BytesIO(data)) as picture:
        return np.asarray(picture.convert(mode))


# ---- writing -----------------------------------------------------------------------------------------------------------


class PortraitWriter:
    """Writes encoded portraits in order, one after the other; made by `create_record`."""

    def __init__(self, environment: lmdb.Environment, resolution: int, folder: Path):
        self.folder = folder  # under its temporary name; further files of the record go here
        self._environment = environment
        self._transaction = environment.begin(write=True)
        self._resolution = resolution
        self.count = 0
        self.without_matte = 0

    def add(self, value: bytes) -> None:
        """Append one value of `encode_portrait`."""
        self.without_matte += not _read_header(value, f"portrait {self.count}")[0] & _HAS_MATTE
        self._transaction.put(b"%08d" % self.count, value, append=True)
        self.count += 1
        if self.count % _COMMIT_EVERY == 0:
            self._transaction.commit()
            self._transaction = self._environment.begin(write=True)

    def finish(self, metadata: dict) -> None:
        entry = {
            "schema": SCHEMA,
            "version": VERSION,
            "count": self.count,
            "resolution": self._resolution,
            "without_matte": self.without_matte,
        }
        self._transaction.put(b"metadata", json.dumps(entry | metadata, sort_keys=True).encode())
        self._transaction.commit()


@contextlib.contextmanager
def create_record(path: Path, resolution: int, expected_count: int, metadata: dict) -> Iterator[PortraitWriter]:
    """Write the record `path`: whole when the block ends, not at all when it raises.

    `metadata` is JSON-able; schema, version, count, resolution and without_matte are added to it. A hidden temporary folder
    that a killed process left is removed by the next call.
    Raises DataError if `path` holds something else or the disk is full.
    """
    path = Path(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise DataError(
            f"{path}: expected a new or empty folder for the portraits, but something is there; choose another --out or delete it"
        )
    for left_over in path.parent.glob(f"{TEMPORARY_PREFIX}*-{path.name}"):
        shutil.rmtree(left_over)
    try:
        with (
            atomic_folder(path) as partial,
            lmdb.open(str(partial), map_size=_map_size(resolution, expected_count), lock=False, sync=False) as environment,
        ):
            writer = PortraitWriter(environment, resolution, partial)
            yield writer
            writer.finish(metadata)
            environment.sync(True)
    except lmdb.Error as error:
        raise DataError(
            f"{path}: could not write the portraits ({error}); nothing was kept, free some space or choose another --out"
        ) from error


def _map_size(resolution: int, count: int) -> int:
    """Upper bound of the file's size in bytes: raw pixels bound the encoded ones. The file grows only as it fills."""
    return (count + 1) * (5 * resolution * resolution + 16_384) + (64 << 20)


def write_portraits(
    path: Path, portraits: Iterable[Portrait], resolution: int, expected_count: int, metadata: dict, image_format: ImageFormat = "jpeg"
) -> None:
    """Write portraits that are already in memory or drawn one by one (see `create_record`)."""
    with create_record(path, resolution, expected_count, metadata) as writer:
        for portrait in portraits:
            writer.add(encode_portrait(portrait, image_format))


# ---- reading -----------------------------------------------------------------------------------------------------------


# lmdb refuses to open a file twice in one process, so objects on the same file share its environment. It is read-only and
# without a lock file, hence a forked process may go on using it.
_environments: weakref.WeakValueDictionary[tuple[int, int], lmdb.Environment] = weakref.WeakValueDictionary()


def open_environment(path: Path, remedy: str) -> lmdb.Environment:
    """The LMDB in the folder `path`, to read from. Raises DataError, ending in `remedy`, if it is none or cut off."""
    try:
        environment = lmdb.open(str(path), readonly=True, lock=False, readahead=False)
    except lmdb.Error as error:
        raise DataError(f"{path}/data.mdb: expected an LMDB file, but it does not open ({error}); {remedy}") from error
    # The file is mapped into memory: to read a page beyond its end would kill the process without a word.
    promised = (environment.info()["last_pgno"] + 1) * environment.stat()["psize"]
    size = (path / "data.mdb").stat().st_size
    if size < promised:
        raise DataError(f"{path}/data.mdb: expected {promised} bytes, got {size}: the file was cut off; {remedy}")
    return environment


class PortraitSet:
    """A record of portraits: `len(portraits)`, `portraits[i] -> Portrait`, `labels()`, `images(indices)`, `mattes(indices)`.

    The file is opened once per process, so an object may be pickled to, or inherited by, data workers.
    Raises DataError if the record is missing, unfinished, damaged or of another schema.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._environment: lmdb.Environment | None = None
        self._labels: np.ndarray | None = None
        self._has_matte: np.ndarray | None = None
        if not (self.path / "data.mdb").is_file():
            raise DataError(
                f"{self.path}: expected a portraits record (a folder with data.mdb), found none; "
                f"make one with `headfoundry portraits --out {self.path}`"
            )
        with self._reading() as transaction:
            entry = transaction.get(b"metadata")
            entry = None if entry is None else bytes(entry)
        if entry is None:
            raise DataError(f"{self.path}: the record has no metadata entry, so it was not finished; delete the folder and make it again")
        try:
            self.metadata: dict = json.loads(entry)
        except ValueError as error:
            raise DataError(f"{self.path}: expected JSON in the metadata entry ({error}); delete the folder and make it again") from error
        if (self.metadata.get("schema"), self.metadata.get("version")) != (SCHEMA, VERSION):
            raise DataError(
                f"{self.path}: expected schema {SCHEMA} version {VERSION}, got {self.metadata.get('schema')} version "
                f"{self.metadata.get('version')}; "
                "make the portraits again with this program"
            )

    @property
    def resolution(self) -> int:
        """Side of the square pictures, pixels."""
        return self.metadata["resolution"]

    def __len__(self) -> int:
        return self.metadata["count"]

    def __getitem__(self, index: int) -> Portrait:
        if not 0 <= index < len(self):
            raise IndexError(f"portrait {index} of {len(self)}")
        with self._reading() as transaction:
            return decode_portrait(self._entry(transaction, index), f"{self.path}, portrait {index}")

    def labels(self) -> np.ndarray:
        """All labels, float32 [N, 437], read once and kept; treat as read-only."""
        if self._labels is None:
            self._read_labels()
        return self._labels

    def has_matte(self) -> np.ndarray:
        """bool [N]: False where no matte was given and the stored one is all 255."""
        if self._has_matte is None:
            self._read_labels()
        return self._has_matte

    def images(self, indices: Sequence[int] | np.ndarray | Tensor) -> Tensor:
        """Pictures [B, 3, H, W], float32 in [-1, 1]."""
        return self.batch(indices)[0]

    def mattes(self, indices: Sequence[int] | np.ndarray | Tensor) -> Tensor:
        """Mattes [B, 1, H, W], float32 opacity in [0, 1]."""
        return self.batch(indices)[1]

    def batch(self, indices: Sequence[int] | np.ndarray | Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(images [B, 3, H, W] in [-1, 1], mattes [B, 1, H, W] in [0, 1], labels [B, 437]), each entry read once."""
        images, mattes, labels = (np.stack(part) for part in zip(*(self[int(index)] for index in indices), strict=True))
        images = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous().float() / 127.5 - 1
        return images, torch.from_numpy(mattes)[:, None].float() / 255, torch.from_numpy(labels)

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_environment": None}

    def _open(self) -> lmdb.Environment:
        if self._environment is None:
            status = (self.path / "data.mdb").stat()
            key = (status.st_dev, status.st_ino)
            self._environment = _environments.get(key)
            if self._environment is None:
                self._environment = _environments[key] = open_environment(
                    self.path, "copy it again, or delete the folder and make it again"
                )
        return self._environment

    @contextlib.contextmanager
    def _reading(self) -> Iterator[lmdb.Transaction]:
        try:
            with self._open().begin(buffers=True) as transaction:
                yield transaction
        except lmdb.Error as error:
            raise DataError(
                f"{self.path}/data.mdb: the file is damaged ({error}); copy it again, or delete the folder and make it again"
            ) from error

    def _entry(self, transaction: lmdb.Transaction, index: int) -> memoryview:
        value = transaction.get(b"%08d" % index)
        if value is None:
            raise DataError(
                f"{self.path}: the metadata promises {len(self)} portraits, but number {index} is missing; "
                f"delete the folder and make it again"
            )
        return value

    def _read_labels(self) -> None:
        labels = np.empty((len(self), LABEL_SIZE), np.float32)
        flags = np.empty(len(self), np.uint32)
        with self._reading() as transaction:
            for index in range(len(self)):
                value = self._entry(transaction, index)
                flags[index] = _read_header(value, f"{self.path}, portrait {index}")[0]
                labels[index] = np.frombuffer(value[_HEADER.size : _HEADER.size + _LABEL_BYTES], "<f4")
        self._labels, self._has_matte = labels, (flags & _HAS_MATTE).astype(bool)
