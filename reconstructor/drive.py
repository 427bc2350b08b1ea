"""The `drive` command: one source picture and a driver -> a video, pictures, a contact sheet, meshes."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from datagen.reading import ShardDataset, open_dataset, read_manifest
from genhead.photographs import fingerprint
from head3d.cameras import frontal
from head3d.head_model import BUILT_IN
from head3d.labels import MOTION_VECTOR_SIZE, Motion, unpack_label
from head3d.networks.resample import resize_antialias
from head3d.pictures import grid, save_png, save_video, to_uint8
from head3d.run.checkpoint import exported_config, exported_hash
from head3d.run.config import NonNegativeInt, PositiveFloat, PositiveInt, to_dict
from head3d.run.errors import ConfigError, DataError
from head3d.run.files import atomic_folder, sha256_of_file, write_atomic
from head3d.run.runlog import progress
from head3d.surface import SurfaceConfig, save_mesh
from reconstructor.avatar import Avatar
from reconstructor.batches import as_picture
from reconstructor.drivers import MotionReader, Pictures, drives_by_pictures, open_pictures, perception_reader, sequence_of
from reconstructor.model import EXPORT_KIND, Reconstructor, ReconstructorExport, load_reconstructor
from reconstructor.motion_vectors import NO_ENCODER, exported_motion_vectors
from reconstructor.perception import load_perception
from reconstructor.sequences import Sequence, built_in, from_file, interpolate_directions, of_labels, orbiting
from reconstructor.sources import ASTRONAUT, Crop, Source, held_out_frames, read_photograph, read_sample

DEFAULT_FPS = 25.0
NOT_RECORDED = ("out", "reconstructor", "perception", "shards", "batch")  # settings that change nothing, or stand in the record as hashes
Output = Literal["video", "frames", "sheet", "mesh"]


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Meshes of the head at rest (neutral motion) and in one frame.

    Scene units (FLAME metres x 3), y up, the face to +z.
    """

    frame: NonNegativeInt = 0  # number of the driven frame, its neck turned as in the video
    format: Literal["ply", "obj"] = "ply"  # both hold colours and normals
    surface: SurfaceConfig = SurfaceConfig()  # grid, threshold and box


@dataclasses.dataclass(frozen=True)
class DriveRun:
    """Drive a head from one picture: OUT/drive.mp4, OUT/frames/, OUT/contact_sheet.png, OUT/mesh_rest and mesh_driven, as asked for."""

    out: Path = Path("runs/drive")  # where everything goes
    reconstructor: Path = Path("runs/reconstructor/export")  # exported reconstructor
    # a picture file, "astronaut" (the public-domain portrait that scikit-image ships), or "shard": a held-out sample of `shards`
    source: str = ASTRONAUT
    source_sample: NonNegativeInt = 0  # which held-out identity, for source "shard"
    # square of a picture file to use: centre x, centre y, side in px, framed as the labels frame heads: the pupils at 38 % of the
    # height and 23 % of the side apart, the chin at 78 %; None = the largest central square
    crop: tuple[float, float, float] | None = None
    # .npy of the picture's 437-number label, intrinsics divided by width and height: says square, shape and motion; None = unknown
    source_label: Path | None = None
    # .npz with the key vector [1, D]: the picture's motion as the encoder that the reconstructor was trained with reads it, where that
    # encoder is not here (imported networks); None = read by `perception`, or of the label
    source_vector: Path | None = None
    # "built-in" (smile, jaw, blink, gaze, turn), "shard" (held-out identities, by label or picture), a file of motions (.npz, .npy),
    # or pictures: a video file, a folder, or the number of a camera
    motion: str = "built-in"
    motion_count: PositiveInt = 8  # motions taken for motion "shard"
    # exported perception network that reads the motion of such pictures; a network of architecture.motion image has its own, which lay
    # where it records unless given here
    perception: Path | None = None
    most_frames: PositiveInt = 250  # of a video, folder or camera as driver
    shards: str = "runs/datagen"  # data set (folder or URL), read for source or motion "shard" only
    frames_between: PositiveInt = 12  # frames from one key motion to the next; files and pictures are played as they are
    # driver: as the driver's head is seen (a label's or file's camera; still, then a turn for "built-in"); fixed: from the front;
    # orbit: one swing to both sides
    camera: Literal["driver", "fixed", "orbit"] = "driver"
    turn_deg: PositiveFloat = 35.0  # how far the camera swings around the head
    fps: PositiveFloat | None = None  # frames per second of the video; None = the driver's, 25 where it has none
    outputs: tuple[Output, ...] = ("video", "sheet")  # what to write
    sheet_frames: PositiveInt = 11  # frames on the contact sheet, beside the source
    mesh: MeshConfig = MeshConfig()  # for output "mesh"
    batch: PositiveInt = 4  # frames computed together


def drive(config: DriveRun, reader: MotionReader | None = None) -> int:
    """Write what is asked for and, last, drive.json. Returns the exit status, 0; what is done already is not done again.

    `reader` reads motion off pictures; None = the perception network of the settings. Raises DataError or ConfigError for unusable input.
    """
    record = {
        "reconstructor": exported_hash(config.reconstructor),
        "inputs": _inputs(config),
        "settings": {key: value for key, value in to_dict(config).items() if key not in NOT_RECORDED},
    }
    written = _paths(config)
    if not config.motion.isdecimal() and _made_before(config.out / "drive.json", record, written):
        print(f"{config.out}: made before, with the same settings")
        return 0
    device = "cuda" if torch.cuda.is_available() else "cpu"
    vectors = exported_motion_vectors(config.reconstructor, config.perception, "perception", device)
    model, flame = load_reconstructor(config.reconstructor, device), vectors.kind == "flame"
    if reader is None and vectors.network is not None:
        reader = perception_reader(vectors.network, vectors.kind)
    elif reader is None and flame and config.perception is not None and drives_by_pictures(config.motion):
        reader = perception_reader(load_perception(config.perception, None, device), vectors.kind)
    dataset = open_dataset(config.shards) if "shard" in (config.source, config.motion) else None
    source = read_source(config, dataset)
    sequence, fps = read_sequence(config, dataset, model, reader)
    if "mesh" in config.outputs and config.mesh.frame >= len(sequence):
        raise ConfigError(f"mesh.frame {config.mesh.frame}: the driver has {len(sequence)} frames; choose 0 to {len(sequence) - 1}")
    image, note, vector = resize_antialias(source.image, model.architecture.config.image_resolution), source.note, None
    if config.source_vector is not None:
        vector, note = read_source_vector(config.source_vector), f"{note}; its motion of {config.source_vector.name}"
    elif reader is not None and (not flame or (sequence.vector is not None and source.motion is None)):
        vector, note = reader(image.to(device)).vector, f"{note}; its motion as the reader of the driver sees it"
    elif not flame:
        raise ConfigError(NO_ENCODER)
    if sequence.vector is None:
        sequence = dataclasses.replace(sequence, vector=vectors.described(sequence.motion))
    print(f"source: {note}")
    avatar = Avatar.from_image(model, image, shape=source.shape, motion=source.motion, vector=vector)
    record |= {"command": "drive", "source": note, "frames": len(sequence)}
    if "mesh" in config.outputs:
        driven = sequence.select(slice(config.mesh.frame, config.mesh.frame + 1))
        neutral = Motion.neutral(1)
        rest = avatar.pose(neutral, vectors.described(neutral) if flame or vectors.network else vector)
        for name, head in (("rest", rest), ("driven", avatar.pose(driven.motion, driven.vector))):
            save_mesh(config.out / f"mesh_{name}.{config.mesh.format}", avatar.surface(head, config.mesh.surface))
    write_pictures(config, avatar, source, sequence, config.fps or fps or DEFAULT_FPS, record)
    write_atomic(config.out / "drive.json", json.dumps(record, indent=1) + "\n")
    print(f"{', '.join(str(path) for path in written)}: {len(sequence)} frames")
    return 0


def _paths(config: DriveRun) -> list[Path]:
    """What the settings ask for."""
    names = {
        "video": ["drive.mp4"],
        "frames": ["frames"],
        "sheet": ["contact_sheet.png"],
        "mesh": [f"mesh_rest.{config.mesh.format}", f"mesh_driven.{config.mesh.format}"],
    }
    return [config.out / name for output in config.outputs for name in names[output]]


def _made_before(finished: Path, record: dict, written: list[Path]) -> bool:
    if not finished.exists() or not all(path.exists() for path in written):
        return False
    there = json.loads(finished.read_text(encoding="utf-8"))
    return all(there.get(key) == value for key, value in record.items())


def _inputs(config: DriveRun) -> dict[str, str]:
    """Hashes of what the settings only name: files, a folder of pictures, the data set."""
    found = {} if config.perception is None else {"perception": exported_hash(config.perception)}
    for name, value in (
        ("source", config.source),
        ("source_label", str(config.source_label)),
        ("source_vector", str(config.source_vector)),
        ("motion", config.motion),
    ):
        if value == "shard":
            found["shards"] = read_manifest(config.shards)["config_hash"]
        elif Path(value).is_file():
            found[name] = sha256_of_file(value)
        elif Path(value).is_dir():
            found[name] = fingerprint(Path(value))
    return found


def write_pictures(config: DriveRun, avatar: Avatar, source: Source, sequence: Sequence, fps: float, record: dict) -> None:
    """Render the sequence once, frame by frame, into the video, the pictures and the sheet, as far as they are asked for."""
    if not {"video", "frames", "sheet"} & set(config.outputs):
        return
    chosen = collections.Counter(np.linspace(0, len(sequence) - 1, config.sheet_frames).round().astype(int).tolist())
    shown: list[np.ndarray] = []

    def pictures(folder: Path | None) -> Iterator[np.ndarray]:
        for index, frame in enumerate(render_frames(avatar, sequence, config.batch)):
            if folder is not None:
                save_png(folder / f"{index:06d}.png", frame, record)
            shown.extend([frame] * chosen[index])
            yield frame

    with atomic_folder(config.out / "frames") if "frames" in config.outputs else contextlib.nullcontext() as folder:
        if "video" in config.outputs:
            save_video(config.out / "drive.mp4", pictures(folder), fps, record)
        else:
            collections.deque(pictures(folder), maxlen=0)
    if "sheet" in config.outputs:
        save_png(config.out / "contact_sheet.png", contact_sheet(source, np.stack(shown)), record)


def render_frames(avatar: Avatar, sequence: Sequence, batch: int) -> Iterator[np.ndarray]:
    """The sequence as pictures uint8 [H, W, 3], one after the other."""
    with progress(len(sequence), "drive", unit="frame") as bar:
        for start in range(0, len(sequence), batch):
            part = sequence.select(slice(start, start + batch))
            yield from to_uint8(avatar.drive(part.motion, part.camera, vector=part.vector).image)
            bar.update(len(part))


def contact_sheet(source: Source, frames: np.ndarray) -> np.ndarray:
    """The source, then the frames, four a row or more."""
    side = frames.shape[1]
    picture = torch.nn.functional.interpolate(source.image, size=(side, side), mode="bilinear", antialias=True, align_corners=False)
    sheet = np.concatenate([to_uint8(picture), frames])
    return grid(sheet, columns=max(4, -(-len(sheet) // 4)))


def read_source(config: DriveRun, dataset: ShardDataset | None) -> Source:
    """The source picture that the settings name."""
    if config.source == "shard":
        return read_sample(dataset, config.source_sample, config.shards)
    return read_photograph(config.source, None if config.crop is None else Crop(*config.crop), config.source_label)


def read_source_vector(path: Path) -> Tensor:
    """The source's motion vector [1, D]. Raises DataError if the file holds none, or several."""
    vector = from_file(path).vector
    if vector is None or len(vector) != 1:
        raise DataError(f"{path}: expected one motion vector; write it with numpy.savez(path, vector=[1, D])")
    return vector


def read_sequence(
    config: DriveRun, dataset: ShardDataset | None, model: Reconstructor, reader: MotionReader | None
) -> tuple[Sequence, float | None]:
    """The frames to play, seen from where the settings say, and the driver's own frames per second, if it has any."""
    fps = None
    if config.motion == "built-in":
        export = exported_config(config.reconstructor, ReconstructorExport, EXPORT_KIND)
        sequence = built_in(expression_names(export.head_model), config.frames_between, np.deg2rad(config.turn_deg))
    elif config.motion == "shard":
        frames = held_out_frames(dataset)[: config.motion_count]
        samples = [dataset.read(frame, ["rgb.0", "label"]) for frame in frames]
        sequence = of_labels(unpack_label(torch.from_numpy(np.stack([one["label"][0] for one in samples]))), config.frames_between)
        if reader is not None and model.architecture.config.motion == "image":
            pictures = torch.from_numpy(np.stack([as_picture(one["rgb.0"]) for one in samples]))
            vectors = reader(pictures.to(next(model.parameters()).device)).vector
            sequence = dataclasses.replace(sequence, vector=interpolate_directions(vectors, config.frames_between))
    elif drives_by_pictures(config.motion):
        with open_pictures(config.motion) as pictures:
            sequence, fps = _read_pictures(config, pictures, model, reader), pictures.fps
    else:
        sequence = from_file(Path(config.motion))
    match config.camera:
        case "driver":
            return sequence, fps
        case "fixed":
            return dataclasses.replace(sequence, camera=frontal(len(sequence))), fps
        case "orbit":
            return dataclasses.replace(sequence, camera=orbiting(len(sequence), np.deg2rad(config.turn_deg))), fps
        case other:
            raise ValueError(f"camera: expected driver, fixed or orbit, got {other!r}")


def _read_pictures(config: DriveRun, pictures: Pictures, model: Reconstructor, reader: MotionReader | None) -> Sequence:
    if reader is None and model.architecture.config.motion == "image":
        raise ConfigError(NO_ENCODER)
    if reader is None:
        raise ConfigError(
            f"motion {config.motion}: it is pictures, and this reconstructor takes FLAME motion ({MOTION_VECTOR_SIZE} numbers: expression, "
            "jaw, eyes); give a network that reads them with --perception DIR (made by the perception command), or FLAME motions (a file "
            "of them, 'built-in' or 'shard')"
        )
    device = next(model.parameters()).device
    return sequence_of(pictures, reader, config.most_frames, model.architecture.config.image_resolution, device)


def expression_names(head_model: str) -> dict[str, int]:
    """Names of expression components; only the built-in head has them."""
    if head_model != BUILT_IN:
        return {}
    from head3d.procedural_head import EXPRESSIONS

    return EXPRESSIONS
