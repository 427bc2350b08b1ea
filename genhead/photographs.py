"""A folder of real photographs as portraits: NAME.png|jpg, NAME.npy (437 numbers) and, if there is one, NAME_matte.png.

Every file is checked before anything is written. Labels follow head3d/labels.py: camera-to-world in OpenGL axes, scene units
(FLAME metres x 3, the canonical neck joint at the origin). They are stored as given, the neck pose too: who uses a fitted
label with its camera sets the neck to zero.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from genhead.portraits import Portrait
from head3d.cameras import project
from head3d.labels import check_label, unpack_label
from head3d.run.errors import DataError

_IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg"}
_ORIENTATION = 0x0112  # EXIF tag; 1 = stored upright
# what a head can be: |value| beyond these is a wrong unit or order, not a person
_LIMITS = (("shape", 12.0), ("expression", 30.0), ("neck_pose", 3.2), ("jaw_pose", 1.6), ("eye_pose", 3.2))


class Photograph(NamedTuple):
    """One checked photograph of a folder."""

    image: Path
    matte: Path | None
    label: np.ndarray  # float32 [437]


def check_folder(folder: Path, resolution: int) -> list[Photograph]:
    """Find and check the photographs of `folder` (not its sub-folders), sorted by name.

    Raises DataError that names the file, what was expected, what was found and what to do, at the first thing that is wrong.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: expected a folder of photographs, but there is none; check --from-folder")
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in _IMAGE_SUFFIXES and not path.stem.endswith("_matte"))
    if not files:
        raise DataError(f"{folder}: expected pictures (.png, .jpg), found none; put NAME.png and NAME.npy beside each other in it")
    photographs: list[Photograph] = []
    for image in files:
        if photographs and photographs[-1].image.stem == image.stem:
            raise DataError(
                f"{image}: expected one picture per name, but {photographs[-1].image.name} has the same; rename one with its label"
            )
        matte = folder / f"{image.stem}_matte.png"
        photographs.append(Photograph(image, matte if matte.exists() else None, read_label(image.with_suffix(".npy"), image)))
        side = check_picture(open_picture(image, str(image)), str(image), ("RGB",), resolution)
        if matte.exists() and check_picture(open_picture(matte, str(matte)), str(matte), ("L", "RGB"), resolution) != side:
            raise DataError(
                f"{matte}: expected the size of {image.name}, {side} x {side}, got another; export the matte at the picture's size"
            )
    return photographs


def read_label(path: Path, image: Path) -> np.ndarray:
    """The checked label float32 [437] in `path`, which belongs to the picture `image`."""
    if not path.exists():
        raise DataError(
            f"{path}: expected the label of {image.name} (437 numbers), but there is no such file; fit one or remove the picture"
        )
    try:
        array = np.load(path, allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise DataError(
            f"{path}: expected a .npy file of 437 numbers, but it cannot be read ({error}); write it with numpy.save"
        ) from error
    if not isinstance(array, np.ndarray):
        raise DataError(f"{path}: expected a .npy file of 437 numbers, got an archive of several arrays; write one array with numpy.save")
    return check_fitted(array, str(path))


def check_fitted(array: np.ndarray, where: str) -> np.ndarray:
    """The label float32 [437], if it can be that of a head in the picture. Raises DataError naming `where` otherwise."""
    label = check_label(array, where)
    parts = unpack_label(torch.from_numpy(label)[None])
    values = {"shape": parts.shape} | parts.motion._asdict()
    for name, limit in _LIMITS:
        largest = float(values[name].abs().max())
        if largest > limit:
            raise DataError(
                f"{where}: expected |{name}| <= {limit} (standard deviations or radians), got {largest:.4g}; "
                "check the order and the unit of the numbers"
            )
    uv, depth = project(torch.zeros(1, 1, 3), parts.camera)
    if not (float(depth) > 0 and bool(((uv >= 0) & (uv <= 1)).all())):
        raise DataError(
            f"{where}: expected the neck joint (the origin) in front of the camera and inside the picture, got depth {float(depth):.3g} at "
            f"({float(uv[0, 0, 0]):.3g}, {float(uv[0, 0, 1]):.3g}) of the picture; "
            "the camera must be camera-to-world, look down -z, and be in FLAME metres x 3"
        )
    return label


def check_picture(picture: Image.Image, where: str, modes: Sequence[str], resolution: int) -> int:
    """The side of a square picture of one of `modes`. Raises DataError naming `where` if it is another kind or too small."""
    if picture.mode not in modes:
        raise DataError(
            f"{where}: expected {' or '.join(modes)} with 8 bits a channel, got {picture.mode}; "
            "convert it (an alpha channel belongs in NAME_matte.png)"
        )
    if picture.getexif().get(_ORIENTATION, 1) != 1:
        raise DataError(f"{where}: expected upright pixels, but the EXIF orientation turns them; save it turned and fit the label to that")
    if picture.width != picture.height:
        raise DataError(
            f"{where}: expected a square picture, got {picture.width} x {picture.height}; crop it as its label's camera sees it"
        )
    if picture.width < resolution:
        raise DataError(
            f"{where}: expected at least {resolution} x {resolution} pixels, got {picture.width} x {picture.height}; "
            "use a larger picture or a smaller --resolution"
        )
    return picture.width


def open_picture(source: Path | BinaryIO, where: str) -> Image.Image:
    """Decoded in full, so that a cut-off file is found now. Raises DataError naming `where`."""
    try:
        with Image.open(source) as picture:
            picture.load()
            return picture
    except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as error:  # SyntaxError: broken PNG chunks
        raise DataError(
            f"{where}: expected a PNG or JPEG picture, but it cannot be decoded ({error}); export it again or remove it"
        ) from error


def fingerprint(folder: Path) -> str:
    """A digest of names, sizes and modification times, so that a changed folder is not taken for the one already imported."""
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        status = path.stat()
        digest.update(f"{path.name}\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:16]


def read_photograph(photograph: Photograph, resolution: int) -> tuple[Portrait, bool]:
    """(portrait, whether a matte was given), resized to `resolution` with Pillow's anti-aliased Lanczos filter.

    Where there is no matte, the stored one is 255 everywhere and the flag is False.
    """
    image = np.asarray(resize_picture(open_picture(photograph.image, str(photograph.image)), resolution))
    if photograph.matte is None:
        return Portrait(image, np.full((resolution, resolution), 255, np.uint8), photograph.label), False
    return Portrait(
        image, np.asarray(resize_picture(open_picture(photograph.matte, str(photograph.matte)).convert("L"), resolution)), photograph.label
    ), True


def resize_picture(picture: Image.Image, resolution: int) -> Image.Image:
    """To `resolution` x `resolution` with Pillow's anti-aliased Lanczos filter."""
    return picture if picture.width == resolution else picture.resize((resolution, resolution), Image.Resampling.LANCZOS)
