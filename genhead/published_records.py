"""Published portrait records: an LMDB of protobuf messages (portrait4d, section 4, "LMDB"), read without a protobuf library.

Keys `00000000`, `00000001`, ... and `num_samples`; each value is a message Datum_genhead:

    1 channels   2 height   3 width      int32
    4 image      5 seg                   the bytes of a picture file
    6 labels     437 float32             camera 25 | shape 300 | expression 100 | neck 3 | jaw 3 | eyes 6
    7 mots       548 float32             a motion code of another network; not kept

These fitted labels hold the whole head rotation in the camera and repeat it in the neck, so the neck is set to zero. The matte is
the mean of the segmentation's three channels.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import lmdb
import numpy as np
from PIL import Image

from genhead.photographs import check_fitted, check_picture, open_picture, resize_picture
from genhead.portraits import Portrait, open_environment
from head3d.labels import LABEL_SIZE
from head3d.run.errors import DataError

_NECK = slice(425, 428)


class Datum(NamedTuple):
    """The fields of one message that portraits are made of."""

    image: bytes
    seg: bytes  # empty where there is none
    labels: np.ndarray  # float32 [437]


def parse_datum(message: bytes | memoryview, where: str) -> Datum:
    """Read a Datum_genhead message; unknown fields are passed over. Raises DataError naming `where` if it is malformed or incomplete."""
    image, seg, labels = b"", b"", []
    for field, wire_type, value in _fields(memoryview(message), where):
        match field, wire_type:
            case (4, 2):
                image = bytes(value)
            case (5, 2):
                seg = bytes(value)
            case (6, 2) if len(value) % 4 == 0:  # packed
                labels.append(np.frombuffer(value, "<f4"))
            case (6, 5):  # one number
                labels.append(np.frombuffer(value, "<f4"))
            case (4 | 5 | 6, _):
                raise DataError(
                    f"{where}: field {field} has wire type {wire_type}, expected a Datum_genhead message; is it another record?"
                )
    numbers = np.concatenate(labels) if labels else np.zeros(0, np.float32)
    if not image or len(numbers) != LABEL_SIZE:
        raise DataError(
            f"{where}: expected an image (field 4) and {LABEL_SIZE} labels (field 6), got {len(image)} bytes and {len(numbers)} numbers; "
            "is this a record of another kind (clips), or cut off?"
        )
    return Datum(image, seg, numbers.astype(np.float32))


def _fields(message: memoryview, where: str) -> Iterator[tuple[int, int, memoryview]]:
    """(field number, wire type, content) of each field: 0 a varint, passed over; 1 eight bytes; 2 bytes with a length; 5 four bytes."""
    position = 0

    def varint() -> int:
        nonlocal position
        value = 0
        for shift in range(0, 70, 7):
            if position >= len(message):
                raise DataError(f"{where}: the message ends inside a number, at byte {position}; the record is cut off, copy it again")
            byte = message[position]
            position += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
        raise DataError(f"{where}: a number of more than ten bytes before byte {position}; this is no protobuf message")

    while position < len(message):
        key = varint()
        field, wire_type = key >> 3, key & 7
        match wire_type:
            case 0:
                varint()
                size = 0
            case 1:
                size = 8
            case 2:
                size = varint()
            case 5:
                size = 4
            case _:
                raise DataError(f"{where}: wire type {wire_type} before byte {position}; this is no protobuf message")
        if field == 0 or size > len(message) - position:
            raise DataError(
                f"{where}: field {field} promises {size} bytes at byte {position}, the message has {len(message)}; "
                "the record is cut off or no Datum_genhead, copy it again"
            )
        yield field, wire_type, message[position : position + size]
        position += size


class PublishedRecord:
    """A published portraits LMDB: `len(record)`, `record.portrait(index, resolution)`.

    Raises DataError if the folder holds no such record, or where an entry is missing or malformed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not (path / "data.mdb").is_file():
            raise DataError(f"{path}: expected a folder with data.mdb, found none; check --from-lmdb")
        self._environment = open_environment(path, "copy it again")
        with self._reading() as transaction:
            entry = transaction.get(b"num_samples")
            text = b"" if entry is None else bytes(entry[:20])
        if not text.isdigit() or int(text) < 1:
            raise DataError(f"{path}: expected an entry num_samples that counts the portraits, got {text!r}; is it another record?")
        self._count = int(text)

    def __len__(self) -> int:
        return self._count

    def portrait(self, index: int, resolution: int) -> tuple[Portrait, bool]:
        """(portrait, whether it has a matte), checked and resized like photographs; the neck's rotation is zero."""
        where = f"{self.path}, entry {index:08d}"
        with self._reading() as transaction:
            message = transaction.get(b"%08d" % index)
            if message is None:
                raise DataError(f"{where}: missing, though num_samples is {self._count}; copy the record again")
            datum = parse_datum(message, where)
        label = datum.labels.copy()
        label[_NECK] = 0
        label = check_fitted(label, where)
        picture = open_picture(io.BytesIO(datum.image), f"{where}, image")
        side = check_picture(picture, f"{where}, image", ("RGB",), resolution)
        image = np.asarray(resize_picture(picture, resolution))
        if not datum.seg:
            return Portrait(image, np.full((resolution, resolution), 255, np.uint8), label), False
        matte = open_picture(io.BytesIO(datum.seg), f"{where}, seg")
        if check_picture(matte, f"{where}, seg", ("L", "RGB"), resolution) != side:
            raise DataError(f"{where}: expected a segmentation of the image's size, {side} px, got {matte.width} px; drop this entry")
        mean = np.asarray(matte, np.float32).reshape(side, side, -1).mean(-1)
        grey = Image.fromarray(np.rint(mean).astype(np.uint8))
        return Portrait(image, np.asarray(resize_picture(grey, resolution)), label), True

    @contextlib.contextmanager
    def _reading(self) -> Iterator[lmdb.Transaction]:
        try:
            with self._environment.begin(buffers=True) as transaction:
                yield transaction
        except lmdb.Error as error:
            raise DataError(f"{self.path}/data.mdb: the file is damaged ({error}); copy it again") from error
