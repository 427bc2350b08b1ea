"""The source picture of an avatar: a photograph of any size, cut to the square that labels frame, or a held-out sample of a data set.

Labels frame a head with a 12 degree camera some 4.17 scene units away: the pupils at 38 % of the height and 23 % of the side apart, the
chin at 78 %. A photograph's square comes from its label's intrinsics, from `crop`, or is the largest central one.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import ImageOps
from torch import Tensor

from datagen.reading import ShardDataset
from genhead.photographs import open_picture, read_label
from head3d.cameras import default_intrinsics
from head3d.labels import Motion, unpack_label
from head3d.run.errors import ConfigError, DataError
from reconstructor.batches import as_picture

ASTRONAUT = "astronaut"  # NASA's portrait of Eileen Collins (1999, public domain), which scikit-image ships
SQUARE_PIXELS = 0.01  # relative difference of the two focal lengths in pixels up to which a label's pixels count as square


class Crop(NamedTuple):
    """A square of a photograph, pixels from its top-left corner; it may reach over the edge, which is then repeated."""

    center_x: float
    center_y: float
    side: float


ASTRONAUT_CROP = Crop(
    224.0, 121.0, 186.0
)  # least-squares fit of the built-in head's eyes, nose, mouth and chin, as the frontal camera sees them


class Source(NamedTuple):
    """A picture and what is known about it."""

    image: Tensor  # [1, 3, n, n] in [-1, 1]
    shape: Tensor | None  # [1, 300]; None = unknown, taken as the mean head
    motion: Motion | None  # None = unknown, taken as neutral
    note: str  # for people


def read_photograph(source: str, crop: Crop | None, label: Path | None) -> Source:
    """The square of a picture file, or of "astronaut".

    With a label (.npy, 437 numbers, of the upright picture) its intrinsics say the square, and shape and motion are the label's. Without,
    the square is `crop` or the largest central one, and the head is taken as the mean shape with a neutral face: what its expression
    differs from neutral then stays in the avatar. Raises DataError for a file that cannot be used, ConfigError for crop and label at once.
    """
    if crop is not None and label is not None:
        raise ConfigError("crop and source_label: expected one of them, got both; a label's intrinsics say the square already")
    if source == ASTRONAUT:
        import skimage.data

        pixels, name, default = skimage.data.astronaut(), "astronaut (NASA, public domain)", ASTRONAUT_CROP
    else:
        path = Path(source)
        if not path.is_file():
            raise DataError(f"{path}: expected a picture file, there is none; give a JPEG or PNG, '{ASTRONAUT}' or 'shard'")
        pixels, name = np.asarray(ImageOps.exif_transpose(open_picture(path, str(path))).convert("RGB")), path.name
        default = central_square(pixels)
    if label is None:
        crop = crop or default
        return Source(crop_square(pixels, crop), None, None, f"{name}, {_square(crop)}, taken as mean shape and neutral face")
    known = unpack_label(torch.from_numpy(read_label(label, Path(name)))[None])
    crop = crop_of_intrinsics(known.camera.intrinsics[0], pixels.shape[1], pixels.shape[0], str(label))
    return Source(crop_square(pixels, crop), known.shape, known.motion, f"{name}, {_square(crop)}, shape and motion of {label.name}")


def _square(crop: Crop) -> str:
    return f"square of {crop.side:g} px around ({crop.center_x:g}, {crop.center_y:g})"


def central_square(pixels: np.ndarray) -> Crop:
    """The largest central square of [H, W, 3]."""
    height, width = pixels.shape[:2]
    return Crop(width / 2, height / 2, float(min(width, height)))


def crop_of_intrinsics(intrinsics: Tensor, width: int, height: int, where: str) -> Crop:
    """The square of a `width` x `height` picture that the 12 degree camera sees, for intrinsics [3, 3] divided by width and height.

    Cutting changes the intrinsics alone: focal length in pixels over the new side is to be the published 4.757, the principal point the
    middle. Raises DataError naming `where` if the pixels are not square.
    """
    focal_x, focal_y = float(intrinsics[0, 0]) * width, float(intrinsics[1, 1]) * height
    if abs(focal_x - focal_y) > SQUARE_PIXELS * focal_x:
        raise DataError(
            f"{where}: expected square pixels, got focal lengths of {focal_x:.1f} and {focal_y:.1f} px in a picture of {width} x {height}; "
            "divide the first row of the intrinsics by the width and the second by the height"
        )
    side = focal_x / float(default_intrinsics(1)[0, 0, 0])
    return Crop(float(intrinsics[0, 2]) * width, float(intrinsics[1, 2]) * height, side)


def crop_square(pixels: np.ndarray, crop: Crop, minimum_side: int = 8) -> Tensor:
    """The square of uint8 [H, W, 3] as [1, 3, n, n] in [-1, 1], n = its side in whole pixels; edges are repeated beyond the picture."""
    side = max(minimum_side, round(crop.side))
    rows = np.clip(np.arange(side) + round(crop.center_y - crop.side / 2), 0, pixels.shape[0] - 1)
    columns = np.clip(np.arange(side) + round(crop.center_x - crop.side / 2), 0, pixels.shape[1] - 1)
    return torch.from_numpy(as_picture(pixels[rows][:, columns]))[None]


def read_sample(dataset: ShardDataset, number: int, where: str) -> Source:
    """View 0 of the first frame of the `number`-th held-out identity, with its label. Raises ConfigError if there are fewer."""
    frames = held_out_frames(dataset)
    identities = sorted({frame.identity for frame in frames})
    if number >= len(identities):
        raise ConfigError(f"source_sample {number}: {where} holds {len(identities)} held-out identities; choose 0 to {len(identities) - 1}")
    frame = next(frame for frame in frames if frame.identity == identities[number])
    data = dataset.read(frame, ["rgb.0", "label"])
    label = unpack_label(torch.from_numpy(data["label"][:1]))
    image = torch.from_numpy(as_picture(data["rgb.0"]))[None]
    note = f"{where}, identity {frame.identity}, motion {frame.motion}, view 0, with its label"
    return Source(image, label.shape, label.motion, note)


def held_out_frames(dataset: ShardDataset) -> list:
    """Frames that no training saw, dynamic ones first; none of small pictures. Raises DataError if there are none."""
    frames = [frame for frame in dataset.frames if frame.split != "train" and frame.kind != "motion-rich"]
    if not frames:
        raise DataError(
            f"{dataset.storage.where()}: no identity is held out; generate with --recipe.test_share above 0, or give a picture file"
        )
    return sorted(frames, key=lambda frame: (frame.kind == "static", frame.identity, frame.motion))
