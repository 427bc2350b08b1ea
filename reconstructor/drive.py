"""The `drive` command: one source picture and a motion sequence -> a video and a contact sheet."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from datagen.reading import ShardDataset, open_dataset, read_manifest
from head3d.head_model import BUILT_IN
from head3d.labels import Motion, unpack_label
from head3d.pictures import grid, save_png, save_video, to_uint8
from head3d.run.checkpoint import exported_hash, load_exported
from head3d.run.config import NonNegativeInt, PositiveFloat, PositiveInt, to_dict
from head3d.run.errors import ConfigError, DataError
from head3d.run.files import sha256_of_file, write_atomic
from head3d.run.runlog import progress
from reconstructor.avatar import Avatar
from reconstructor.batches import as_picture
from reconstructor.model import EXPORT_KIND, ReconstructorExport, load_reconstructor
from reconstructor.sequences import Sequence, built_in, from_file, interpolate_motion, orbiting

ASTRONAUT = "astronaut"  # NASA's portrait of Eileen Collins (1999, public domain), which scikit-image ships


class Crop(NamedTuple):
    """A square of a photograph, pixels from its top-left corner; it may reach over the edge, which is then repeated."""

    center_x: float
    center_y: float
    side: float


ASTRONAUT_CROP = Crop(
    224.0, 121.0, 186.0
)  # least-squares fit of the built-in head's eyes, nose, mouth and chin, as the frontal camera sees them


@dataclasses.dataclass(frozen=True)
class DriveRun:
    """Drive a head from one picture with a motion sequence: OUT/drive.mp4 and OUT/contact_sheet.png."""

    out: Path = Path("runs/drive")  # where the video and the contact sheet go
    reconstructor: Path = Path("runs/reconstructor/export")  # exported reconstructor
    # a picture file, "astronaut" (the public-domain portrait that scikit-image ships), or "shard": a held-out sample of `shards`
    source: str = ASTRONAUT
    source_sample: NonNegativeInt = 0  # which held-out identity, for source "shard"
    # square of a picture file to use: centre x, centre y, side in px, framed as the labels frame heads: the pupils at 38 % of the
    # height and 23 % of the side apart, the chin at 78 %; None = the largest central square
    crop: tuple[float, float, float] | None = None
    # "built-in" (smile, jaw, blink, gaze, turn), "shard" (motions of held-out identities), or a .npz of FLAME motions
    motion: str = "built-in"
    motion_count: PositiveInt = 8  # motions taken for motion "shard"
    shards: str = "runs/datagen"  # data set (folder or URL), read for source or motion "shard" only
    frames_between: PositiveInt = 12  # frames from one key motion to the next; a .npz is played as it is
    turn_deg: PositiveFloat = 35.0  # how far the camera swings around the head
    fps: PositiveFloat = 25.0  # frames per second of the video
    sheet_frames: PositiveInt = 11  # frames on the contact sheet, beside the source
    batch: PositiveInt = 4  # frames computed together


class Source(NamedTuple):
    """A picture and what is known about it."""

    image: Tensor  # [1, 3, H, W] in [-1, 1]
    shape: Tensor | None  # [1, 300]; None = unknown, taken as the mean head
    motion: Motion | None  # None = unknown, taken as neutral
    note: str  # for people


def drive(config: DriveRun) -> int:
    """Write the video, the contact sheet and, last, drive.json. Returns the exit status, 0; what is done already is not done again.

    Raises DataError or ConfigError for unusable input.
    """
    record = {
        "reconstructor": exported_hash(config.reconstructor),
        "inputs": _inputs(config),
        "settings": {key: value for key, value in to_dict(config).items() if key not in ("out", "reconstructor", "shards", "batch")},
    }
    video, finished = config.out / "drive.mp4", config.out / "drive.json"
    if finished.exists() and video.exists():
        there = json.loads(finished.read_text(encoding="utf-8"))
        if all(there.get(key) == value for key, value in record.items()):
            print(f"{video}: made before, with the same settings")
            return 0
    model = load_reconstructor(config.reconstructor, "cuda" if torch.cuda.is_available() else "cpu")
    dataset = open_dataset(config.shards) if "shard" in (config.source, config.motion) else None
    source, sequence = read_source(config, dataset), read_sequence(config, dataset)
    print(f"source: {source.note}")
    avatar = Avatar.from_image(model, source.image, shape=source.shape, motion=source.motion)
    frames = render_frames(avatar, sequence, config.batch)
    record |= {"command": "drive", "source": source.note, "frames": len(frames)}
    save_video(video, frames, config.fps, record)
    save_png(config.out / "contact_sheet.png", contact_sheet(source, frames, config.sheet_frames), record)
    write_atomic(finished, json.dumps(record, indent=1) + "\n")
    print(f"{video}: {len(frames)} frames")
    return 0


def _inputs(config: DriveRun) -> dict[str, str]:
    """Hashes of what the settings only name: picture file, motion file, data set."""
    found = {}
    for name, value in (("source", config.source), ("motion", config.motion)):
        if value == "shard":
            found["shards"] = read_manifest(config.shards)["config_hash"]
        elif Path(value).is_file():
            found[name] = sha256_of_file(value)
    return found


def render_frames(avatar: Avatar, sequence: Sequence, batch: int) -> np.ndarray:
    """The sequence as pictures uint8 [T, H, W, 3]."""
    frames = []
    with progress(len(sequence), "drive", unit="frame") as bar:
        for start in range(0, len(sequence), batch):
            part = slice(start, start + batch)
            frames.append(to_uint8(avatar.drive(sequence.motion.select(part), sequence.camera.select(part)).image))
            bar.update(len(frames[-1]))
    return np.concatenate(frames)


def contact_sheet(source: Source, frames: np.ndarray, count: int) -> np.ndarray:
    """The source, then `count` frames evenly spread over the video, four a row or more."""
    side = frames.shape[1]
    picture = torch.nn.functional.interpolate(source.image, size=(side, side), mode="bilinear", antialias=True, align_corners=False)
    chosen = frames[np.linspace(0, len(frames) - 1, count).round().astype(int)]
    sheet = np.concatenate([to_uint8(picture), chosen])
    return grid(sheet, columns=max(4, -(-len(sheet) // 4)))


def read_source(config: DriveRun, dataset: ShardDataset | None) -> Source:
    """The source picture. A photograph is taken as the mean shape with a neutral face, for lack of a fitted label."""
    if config.source == "shard":
        frames = held_out_frames(dataset)
        identities = sorted({frame.identity for frame in frames})
        if config.source_sample >= len(identities):
            raise ConfigError(
                f"source_sample {config.source_sample}: {config.shards} holds {len(identities)} held-out identities; "
                f"choose 0 to {len(identities) - 1}"
            )
        frame = next(frame for frame in frames if frame.identity == identities[config.source_sample])
        data = dataset.read(frame, ["rgb.0", "label"])
        label = unpack_label(torch.from_numpy(data["label"][:1]))
        image = torch.from_numpy(as_picture(data["rgb.0"]))[None]
        return Source(
            image, label.shape, label.motion, f"{config.shards}, identity {frame.identity}, motion {frame.motion}, view 0, with its label"
        )
    if config.source == ASTRONAUT:
        import skimage.data

        pixels, crop, name = skimage.data.astronaut(), config.crop or ASTRONAUT_CROP, "astronaut (NASA, public domain)"
    else:
        path = Path(config.source)
        try:
            with Image.open(path) as picture:
                pixels = np.asarray(picture.convert("RGB"))
        except (OSError, UnidentifiedImageError) as error:
            raise DataError(f"{path}: expected a picture file ({error}); give a JPEG or PNG, '{ASTRONAUT}' or 'shard'") from error
        height, width = pixels.shape[:2]
        crop, name = config.crop or (width / 2, height / 2, float(min(width, height))), path.name
    crop = Crop(*crop)
    note = f"{name}, square of {crop.side:g} px around ({crop.center_x:g}, {crop.center_y:g}), taken as mean shape and neutral motion"
    return Source(crop_square(pixels, crop), None, None, note)


def crop_square(pixels: np.ndarray, crop: Crop, minimum_side: int = 8) -> Tensor:
    """The square of uint8 [H, W, 3] as [1, 3, n, n] in [-1, 1], n = its side in whole pixels; edges are repeated beyond the picture."""
    side = max(minimum_side, round(crop.side))
    rows = np.clip(np.arange(side) + round(crop.center_y - crop.side / 2), 0, pixels.shape[0] - 1)
    columns = np.clip(np.arange(side) + round(crop.center_x - crop.side / 2), 0, pixels.shape[1] - 1)
    return torch.from_numpy(as_picture(pixels[rows][:, columns]))[None]


def read_sequence(config: DriveRun, dataset: ShardDataset | None) -> Sequence:
    """The motions to play and the cameras to see them from."""
    if config.motion == "built-in":
        _, export = load_exported(config.reconstructor, ReconstructorExport, EXPORT_KIND)
        return built_in(expression_names(export.head_model), config.frames_between, np.deg2rad(config.turn_deg))
    if config.motion == "shard":
        frames = held_out_frames(dataset)[: config.motion_count]
        labels = np.stack([dataset.read(frame, ["label"])["label"][0] for frame in frames])
        motion = interpolate_motion(unpack_label(torch.from_numpy(labels)).motion, config.frames_between)
        return Sequence(motion, orbiting(motion.expression.shape[0], np.deg2rad(config.turn_deg)))
    return from_file(Path(config.motion))


def expression_names(head_model: str) -> dict[str, int]:
    """Names of expression components; only the built-in head has them."""
    if head_model != BUILT_IN:
        return {}
    from head3d.procedural_head import EXPRESSIONS

    return EXPRESSIONS


def held_out_frames(dataset: ShardDataset) -> list:
    """Frames that no training saw, dynamic ones first; none of small pictures. Raises DataError if there are none."""
    frames = [frame for frame in dataset.frames if frame.split != "train" and frame.kind != "motion-rich"]
    if not frames:
        raise DataError(
            f"{dataset.folder}: no identity is held out; generate with --recipe.test_share above 0, or give a picture file as source"
        )
    return sorted(frames, key=lambda frame: (frame.kind == "static", frame.identity, frame.motion))
