"""Pictures that drive a head: a video, a folder of pictures or a camera, and what reads motion off them.

    pictures --MotionReader--> PictureMotion --sequence_of--> Sequence, played as a file of FLAME motions is

A picture is cut to its largest central square. The reader is a trained network: the perception network, or another that is passed in.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from genhead.photographs import open_picture
from head3d.cameras import Camera, default_intrinsics
from head3d.labels import Motion
from head3d.networks.resample import resize_antialias
from head3d.run.errors import DataError
from head3d.run.runlog import progress
from reconstructor.motion import MotionKind
from reconstructor.motion_vectors import MotionVectors
from reconstructor.perception import Perception
from reconstructor.sequences import FRONTAL_RADIUS, Sequence
from reconstructor.sources import central_square, crop_square

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg")
NO_FILES = ("built-in", "shard")  # drivers that no file holds
READER_BATCH = 16  # pictures read together


class PictureMotion(NamedTuple):
    """What a reader finds in B pictures."""

    motion: Motion  # [B, ...] FLAME motion, the neck at rest: the head's rotation is the next field
    rotation: Tensor  # [B, 3, 3] head axes -> camera axes (OpenGL)
    vector: Tensor  # [B, D] what the reconstructor's attention reads


MotionReader = Callable[[Tensor], PictureMotion]  # pictures [B, 3, n, n] in [-1, 1]


def perception_reader(network: Perception, kind: MotionKind) -> MotionReader:
    """The perception network as a reader for a reconstructor: of the FLAME motion that it reads, or of its motion encoder's vectors."""

    @torch.no_grad()
    def read(pictures: Tensor) -> PictureMotion:
        found = network.read(pictures)
        motion = Motion(found.expression, torch.zeros_like(found.jaw_pose), found.jaw_pose, found.eye_pose)
        return PictureMotion(motion, found.rotation, MotionVectors(kind, network).seen(pictures, motion))

    return read


class Pictures(NamedTuple):
    """An opened driver."""

    frames: Iterator[np.ndarray]  # uint8 [H, W, 3]
    fps: float | None  # None where pictures have no rate of their own


def drives_by_pictures(driver: str) -> bool:
    """Whether `driver` names pictures: the number of a camera, a folder, or a file that is no array file.

    Raises DataError if it names nothing that is there.
    """
    if driver in NO_FILES:
        return False
    if not driver.isdecimal() and not Path(driver).exists():
        raise DataError(
            f"motion {driver}: expected {', '.join(NO_FILES)}, a file of motions (.npz, .npy), a video, a folder of pictures or the number "
            "of a camera; there is no such file or folder"
        )
    return driver.isdecimal() or Path(driver).is_dir() or Path(driver).suffix not in (".npz", ".npy")


@contextlib.contextmanager
def open_pictures(driver: str) -> Iterator[Pictures]:
    """Open a camera by its number, a folder by name order of its .png and .jpg, or a video file.

    Raises DataError naming the driver if it holds no picture, cannot be decoded or is not there.
    """
    if Path(driver).is_dir() and not driver.isdecimal():
        yield Pictures(_folder(Path(driver)), None)
        return
    import imageio.v3 as imageio

    if Path(driver).suffix.lower() in PICTURE_SUFFIXES:
        raise DataError(f"{driver}: expected a video, got a picture; put it in a folder, alone or with others, and give the folder")
    where = f"<video{driver}>" if driver.isdecimal() else driver
    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context(imageio.imopen(where, "r", plugin="FFMPEG"))
            fps = float(file.metadata()["fps"])  # opens it
        except IndexError as error:  # imageio's word for a camera that is not there
            raise DataError(
                f"camera {driver}: expected a camera that ffmpeg can open, found none ({_last_line(error)}); "
                "connect one and check the permissions of its device, or give a video file"
            ) from error
        except OSError as error:
            raise DataError(f"{driver}: expected a video that ffmpeg can read ({_last_line(error)}); convert it to H.264 in mp4") from error
        yield Pictures(file.iter(), fps)


def _folder(folder: Path) -> Iterator[np.ndarray]:
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in PICTURE_SUFFIXES)
    if not paths:
        raise DataError(f"{folder}: expected pictures ({', '.join(PICTURE_SUFFIXES)}), found none; name them in the order of their frames")
    for path in paths:
        yield np.asarray(open_picture(path, str(path)).convert("RGB"))


def _last_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or ["no reason given"])[-1]


def sequence_of(pictures: Pictures, reader: MotionReader, limit: int, resolution: int, device: torch.device | str) -> Sequence:
    """The first `limit` pictures as motions and the cameras that see the head turned as they show it; `resolution`: side in px that
    the reader is given.

    Raises DataError if there is no picture.
    """
    found: list[PictureMotion] = []
    frames = itertools.islice(pictures.frames, limit)
    with progress(limit, "read driver", unit="frame") as bar:
        while chunk := list(itertools.islice(frames, READER_BATCH)):
            squares = [resize_antialias(crop_square(pixels, central_square(pixels)), resolution) for pixels in chunk]
            found.append(reader(torch.cat(squares).to(device)))
            bar.update(len(chunk))
    if not found:
        raise DataError("driver: expected at least one picture, found none; give a longer video or a folder with pictures")
    motion = Motion(*(torch.cat(parts) for parts in zip(*(part.motion for part in found), strict=True)))
    camera = camera_of_rotation(torch.cat([part.rotation for part in found]))
    return Sequence(motion, camera, torch.cat([part.vector for part in found]))


def camera_of_rotation(rotation: Tensor) -> Camera:
    """Cameras that see an unturned head as `rotation` [B, 3, 3] (head axes -> camera axes) shows it: around the origin, which they have
    in the middle, at the frontal camera's distance."""
    c2w = torch.eye(4, device=rotation.device).repeat(len(rotation), 1, 1)
    c2w[:, :3, :3] = rotation.mT
    c2w[:, :3, 3] = FRONTAL_RADIUS * rotation[:, 2]  # R^T (0, 0, r)
    return Camera(c2w, default_intrinsics(len(rotation)).to(rotation.device))
