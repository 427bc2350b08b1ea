"""Measuring a bounded sample of a data set: where its cameras stand, how its people move, what is unusual.

    dataset -> sample of frames -> one reading of each -> Survey (an array for each quantity)

Everything is read from the shards, not from the recipes: this is what the data holds. Pictures and maps are compared on the grid of
the maps (R x R).
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import torch

from datagen.index import FrameEntry
from datagen.reading import ShardDataset
from head3d.cameras import Camera
from head3d.labels import unpack_label
from head3d.run.runlog import progress
from head3d.run.seeding import numpy_generator

SHARDS, FRAMES = 64, 300  # at most so many shards are opened, and so many of their frames read
MAPS = ("opacity", "parts", "depth")  # members that are measured where the set has them
SILHOUETTE = 0.5  # opacity from which a pixel counts as head
SKIN = 1  # number in the member `parts`
MAD_TO_DEVIATION = 1.4826  # of a normal distribution

# Kinds of the individual typology angle, degrees (Chardon et al., 1991): the name holds above the number
TONES = (("very light", 55.0), ("light", 41.0), ("intermediate", 28.0), ("tan", 10.0), ("brown", -30.0), ("dark", -math.inf))


@dataclasses.dataclass(frozen=True)
class Survey:
    """What was read. Arrays are [n] over views or over frames; NaN where there is no value (no head in the picture, no label)."""

    frames: list[FrameEntry]  # that were read
    shards: int  # that they were drawn from
    frame_of_view: np.ndarray  # index into `frames` of each view
    view: np.ndarray  # its number in the frame
    yaw_deg: np.ndarray  # of views: positive where the camera is on the head's left side
    pitch_deg: np.ndarray  # of views: positive from above
    silhouette: np.ndarray  # of views: area of the head at the camera's distance from the origin, square scene units
    exposure: np.ndarray  # of views: mean lightness L* of the head, 0 to 100
    depth: np.ndarray  # of views: mean distance behind (+) or before (-) the origin's, scene units; NaN without depth
    expression: np.ndarray  # of frames: Euclidean norm of the 100 components
    jaw_deg: np.ndarray  # of frames: rotation about x, positive opens
    gaze_pitch_deg: np.ndarray  # of frames: mean rotation of both eyes about x, positive looks down
    gaze_yaw_deg: np.ndarray  # of frames: about y, positive to the head's left
    tone_deg: np.ndarray  # of frames: individual typology angle of the skin in the most frontal view; lower is darker


def survey(dataset: ShardDataset, frames: int = FRAMES, shards: int = SHARDS) -> Survey:
    """Read at most `frames` frames of at most `shards` shards, drawn by the data set's own hash. Raises DataError as reading does."""
    rng = numpy_generator(dataset.manifest["config_hash"], "survey")
    there = sorted({frame.shard for frame in dataset.frames})
    opened = set(rng.permutation(there)[:shards].tolist())
    candidates = [frame for frame in dataset.frames if frame.shard in opened]
    chosen = [candidates[index] for index in sorted(rng.permutation(len(candidates))[:frames])]

    def read(frame: FrameEntry) -> dict[str, np.ndarray]:
        maps = [name for name in MAPS if name in frame.members]
        return measure_frame(dataset.read(frame, ["label", *maps, *(f"rgb.{view}" for view in range(frame.views))]))

    measured = []
    with progress(len(chosen), "survey", unit="frame") as bar:
        for values in dataset.storage.each(read, chosen):
            measured.append(values)
            bar.update()
    names = [field.name for field in dataclasses.fields(Survey)[4:]]
    empty = np.empty(0)
    return Survey(
        frames=chosen,
        shards=len(opened),
        frame_of_view=np.repeat(np.arange(len(chosen)), [frame.views for frame in chosen]),
        view=np.concatenate([empty.astype(int), *(np.arange(frame.views) for frame in chosen)]),
        **{name: np.concatenate([empty, *(values[name] for values in measured)]) for name in names},
    )


def measure_frame(members: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The quantities of `Survey` of one frame: [V] for views, [1] for the frame.

    members: `label` [V, 437], `rgb.0` ... [S, S, 3], and what there is of `opacity`, `parts` and `depth` [V, R, R].
    """
    label = unpack_label(torch.from_numpy(np.array(members["label"])))
    views = len(members["label"])
    backward, position = label.camera.c2w[:, :3, 2].numpy(), label.camera.c2w[:, :3, 3].numpy()
    yaw, distance = np.degrees(np.arctan2(backward[:, 0], backward[:, 2])), np.linalg.norm(position, axis=-1)
    eyes = np.degrees(label.motion.eye_pose[0].numpy().reshape(2, 3).mean(0))
    found = {name: np.full(views, np.nan) for name in ("silhouette", "exposure", "depth")} | {
        "yaw_deg": yaw,
        "pitch_deg": np.degrees(np.arcsin(np.clip(backward[:, 1], -1, 1))),
        "expression": np.linalg.norm(label.motion.expression[:1].numpy(), axis=-1),
        "jaw_deg": np.degrees(label.motion.jaw_pose[:1, 0].numpy()),
        "gaze_pitch_deg": eyes[:1],
        "gaze_yaw_deg": eyes[1:2],
        "tone_deg": np.full(1, np.nan),
    }
    if "opacity" not in members:
        return found
    head = members["opacity"] > SILHOUETTE
    lab = np.stack([_lab(members[f"rgb.{view}"], head.shape[1]) for view in range(views)])  # [V, R, R, 3]
    found["silhouette"] = head.mean((1, 2)) * _picture_area(label.camera, distance)
    found["exposure"] = np.array([_mean(values[..., 0], mask) for values, mask in zip(lab, head, strict=True)])
    if "depth" in members:
        found["depth"] = np.array([_mean(values, mask) for values, mask in zip(members["depth"], head, strict=True)]) - distance
    if "parts" in members:
        frontal = int(np.abs(yaw).argmin())
        found["tone_deg"][0] = skin_tone(lab[frontal], (members["parts"][frontal] == SKIN) & head[frontal])
    return found


def skin_tone(lab: np.ndarray, skin: np.ndarray) -> float:
    """Individual typology angle, atan((L* - 50) / b*) in degrees, of the median colour of the skin in the middle of the face.

    lab: [R, R, 3]; skin: bool [R, R]. The middle is the central third, in height and width, of the skin's bounding box: hair and neck
    are skin to the mesh too. It measures a rendered picture with its light, and says nothing of anybody's origin. NaN without skin.
    """
    rows, columns = (np.flatnonzero(skin.any(axis)) for axis in (1, 0))
    if not rows.size:
        return math.nan
    middle = np.zeros_like(skin)
    middle[_third(rows), _third(columns)] = True
    if not (skin & middle).any():
        return math.nan
    lightness, _, yellow = np.median(lab[skin & middle], axis=0)
    return math.degrees(math.atan2(lightness - 50, yellow))


def tone_name(angle_deg: float) -> str:
    """The kind that an angle belongs to."""
    return next(name for name, above in TONES if angle_deg > above)


def unusualness(values: np.ndarray) -> np.ndarray:
    """How far each value is from the median, in robust deviations (1.4826 x the median distance); 0 where there is no value (NaN).

    Iglewicz and Hoaglin, 1993: from 3.5 on a value may be called an outlier. Infinite where more than half of the values are equal
    and this one is another.
    """
    known = values[np.isfinite(values)]
    if not known.size:
        return np.zeros(values.shape)
    distance = np.abs(np.where(np.isfinite(values), values, np.median(known)) - np.median(known))
    deviation = MAD_TO_DEVIATION * np.median(np.abs(known - np.median(known)))
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(distance == 0, 0.0, distance / deviation)


def on_grid(pixels: np.ndarray, side: int) -> np.ndarray:
    """The pixels [side, side, ...] of a square picture [S, S, ...] that lie at the centres of a coarser or finer grid."""
    places = ((np.arange(side) + 0.5) * (pixels.shape[0] / side)).astype(int)
    return pixels[places][:, places]


def _lab(pixels: np.ndarray, side: int) -> np.ndarray:
    from skimage.color import rgb2lab  # a third of a second

    return rgb2lab(on_grid(pixels, side))


def _picture_area(camera: Camera, distance: np.ndarray) -> np.ndarray:
    """What a picture [V] covers at that distance, square scene units; intrinsics are divided by the picture's size."""
    focal = camera.intrinsics.numpy()
    return distance**2 / (focal[:, 0, 0] * focal[:, 1, 1])


def _mean(values: np.ndarray, mask: np.ndarray) -> float:
    return float(values[mask].mean()) if mask.any() else math.nan


def _third(places: np.ndarray) -> slice:
    """The central third of the range that `places` span."""
    first, size = places[0], places[-1] - places[0] + 1
    return slice(first + size // 3, first + size - size // 3)
