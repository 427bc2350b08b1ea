"""Who, which motions, which cameras: pure functions of (config, seed, identity).

Every aspect of an identity draws from its own stream, `numpy_generator(seed, "identity", identity, aspect)`, so neither the order,
the number of workers nor a later setting of another aspect changes it. Distributions follow Portrait4D's synthesis
(portrait4d, section 5). Where the published code draws rows of fitted labels there are three sources: a parametric distribution
with the statistics of those labels, stated at each field; the draws of the built-in studio, which are right for a generator
trained on its portraits, because a generator shows best what it has seen; or the published sample sets themselves.

    dynamic      several motions, each from several cameras: reenactment pairs
    static       one motion from several cameras: reconstruction pairs; no jaw augmentation, as published
    motion-rich  many motions, drawn as dynamic ones are, in small pictures: motions to tell apart (contrastive pre-training)
The neck is at rest in all of them: the camera carries the head's rotation (section 5, "neck = 0 always").
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor

from datagen.sample_sets import LabelRows, PortraitRows, SampleSetFiles, load_portrait_rows, load_sample_sets
from genhead.studio_people import draw_label
from head3d.cameras import orbit
from head3d.labels import EXPRESSION_SIZE, SHAPE_SIZE, HeadLabel, Motion
from head3d.run.config import Fraction, NonNegativeFloat, PositiveFloat, PositiveInt, to_dict
from head3d.run.errors import DataError
from head3d.run.seeding import numpy_generator

STUDIO_TARGET_XY, STUDIO_RADIUS = 0.03, (3.74, 4.45)  # the limits inside `draw_label`, scene units

Kind = Literal["static", "dynamic", "motion-rich"]
KINDS: tuple[Kind, ...] = get_args(Kind)
Split = Literal["train", "val", "test"]
Source = Literal["parametric", "studio", "portraits", "sample-sets"]


def _check_range(name: str, values: tuple[float, float], lowest: float, highest: float = math.inf) -> None:
    if not lowest <= values[0] <= values[1] <= highest:
        raise ValueError(f"{name}: expected a smaller and a larger number between {lowest:.4g} and {highest:.4g}, got {values}")


@dataclasses.dataclass(frozen=True)
class LookAtCameras:
    """Cameras drawn around the head (section 5, "Camera augmentation"). All published."""

    yaw_rad: NonNegativeFloat = 0.78  # yaw ~ U(-, +)
    pitch: tuple[float, float] = (-0.25, 0.65)  # parameter p ~ U; sin(elevation) = 2 p / pi, so -9.2 to +24.4 degrees
    roll_rad: NonNegativeFloat = 0.25  # roll ~ U(-, +)
    target_xy: NonNegativeFloat = 0.03  # point looked at: x, y ~ U(-, +), scene units
    target_z: tuple[float, float] = (0.06, 0.12)  # point looked at: z ~ U, scene units
    radius: tuple[float, float] = (3.65, 4.45)  # distance from that point ~ U, scene units

    def __post_init__(self) -> None:
        _check_range("pitch", self.pitch, -math.pi / 2, math.pi / 2)
        _check_range("target_z", self.target_z, -math.inf)
        _check_range("radius", self.radius, 1.0)  # outside of the head, which the box of rays surrounds


@dataclasses.dataclass(frozen=True)
class PortraitCameras:
    """Cameras as fitted to portrait photographs; they stand in for the published draw of a fitted label (section 4 statistics)."""

    yaw_std_rad: NonNegativeFloat = 0.25  # normal
    pitch_std_rad: NonNegativeFloat = 0.12  # elevation, normal
    roll_std_rad: NonNegativeFloat = 0.05  # normal
    target_xy: NonNegativeFloat = 0.02  # the optical axis passes the origin this closely: U(-, +), scene units
    radius_mean: PositiveFloat = 4.17  # scene units
    radius_std: NonNegativeFloat = 0.16  # normal, cut to `radius`
    radius: tuple[float, float] = (3.74, 4.45)  # smallest and largest radius, scene units

    def __post_init__(self) -> None:
        _check_range("radius", self.radius, 1.0)


@dataclasses.dataclass(frozen=True)
class MotionDraws:
    """Expression, jaw and gaze. Statistics of the published fitted labels (section 4); the published code draws their rows."""

    expression_std: NonNegativeFloat = 2.1  # each component normal, one draw a motion
    jaw_mean_rad: float = 0.024  # jaw x (opening), normal, never below 0
    jaw_std_rad: NonNegativeFloat = 0.034
    jaw_open_probability: Fraction = 0.5  # dynamic only: jaw x is replaced by U(jaw_open_rad) with this probability (published)
    jaw_open_rad: tuple[float, float] = (0.0, 0.2)  # published
    gaze_pitch_std_rad: NonNegativeFloat = 0.07  # both eyes share one rotation; normal
    gaze_yaw_std_rad: NonNegativeFloat = 0.10

    def __post_init__(self) -> None:
        _check_range("jaw_open_rad", self.jaw_open_rad, 0.0)


@dataclasses.dataclass(frozen=True)
class RecipeConfig:
    """What is drawn for an identity. Defaults are the published distributions; counts are ours (published: 2 motions, 3 pictures)."""

    dynamic_share: Fraction = 0.5  # of the identities; spread evenly over the identity numbers
    dynamic_motions: PositiveInt = 4  # motions of a dynamic identity
    dynamic_views: PositiveInt = 5  # cameras of each of its motions
    static_views: PositiveInt = 5  # cameras of a static identity's one motion
    motion_rich_share: Fraction = 0.0  # of the identities; the rest are static
    motion_rich_motions: PositiveInt = 16  # motions of a motion-rich identity
    motion_rich_views: PositiveInt = 2  # cameras of each of its motions
    source: Source = "parametric"  # of shapes, motions, portrait cameras; studio: as the built-in portraits; the others: rows of labels
    portraits: PortraitRows = PortraitRows()  # the record, if source is portraits
    sample_sets: SampleSetFiles = SampleSetFiles()  # the files, if source is sample-sets
    split_rows: bool = True  # each row (photograph, clip) serves one split; false: all splits draw from all rows (published: no splits)
    truncation_psi: NonNegativeFloat = 0.95  # of the generator's mapping; the background is never truncated
    shape_std: NonNegativeFloat = 0.92  # parametric: each shape component normal
    look_at_probability: Fraction = 0.5  # a camera is a look-at camera with this probability, else like a fitted portrait's
    look_at: LookAtCameras = LookAtCameras()  # the first sort of cameras
    portrait: PortraitCameras = PortraitCameras()  # the second, if parametric
    motion: MotionDraws = MotionDraws()  # expression, jaw, gaze; of the studio's motions the jaw alone is changed
    val_share: Fraction = 0.02  # of the identities
    test_share: Fraction = 0.02  # of the identities
    cut_deviations: PositiveFloat = 3.0  # every normal draw is cut at this many standard deviations
    split_rule: Literal["hash", "modulo"] = (
        "hash"  # hash: each identity by its own hash, shares hold on average; modulo: by its number among
    )
    # the identities of its kind, in a period of 1 / smaller share: val first, then test, then train, so that tiny sets hold some of each

    def __post_init__(self) -> None:
        if self.dynamic_share + self.motion_rich_share > 1:
            raise ValueError(f"dynamic_share + motion_rich_share: expected at most 1, got {self.dynamic_share + self.motion_rich_share:g}")
        if self.val_share + self.test_share > 1:
            raise ValueError(f"val_share + test_share: expected at most 1, got {self.val_share + self.test_share:g}")
        if self.source == "sample-sets" and len(self.sample_sets.paths()) < 4:
            raise ValueError("source sample-sets: expected all four files under sample_sets, got fewer")
        if self.source == "portraits" and self.portraits.record is None:
            raise ValueError("source portraits: expected a portraits record under portraits.record, got none")

    def pinned(self, head_model: str) -> RecipeConfig:
        """With the content of the files that are drawn from, for a generator of this head model. Raises DataError where they are wrong."""
        match self.source:
            case "sample-sets":
                return dataclasses.replace(self, sample_sets=self.sample_sets.pinned())
            case "portraits":
                return dataclasses.replace(self, portraits=self.portraits.pinned(head_model))
            case _:
                return self


class MotionRecipe(NamedTuple):
    """One motion and the cameras that see it."""

    motion: Motion  # [1, ...]
    cameras: Tensor  # [V, 25] camera labels
    draws: dict  # what was drawn by chance: jaw_opened, and look_at for each view


class IdentityRecipe(NamedTuple):
    """One identity, ready to be rendered."""

    identity: int
    kind: Kind
    split: Split
    seed: int  # of the data set
    shape: Tensor  # [1, 300]
    condition_camera: Tensor  # [1, 25] the mapping's camera: the first view of the first motion, for all pictures (published)
    truncation_psi: float
    motions: tuple[MotionRecipe, ...]

    def latent(self, size: int) -> Tensor:
        """z ~ N(0, 1), [1, size]; a shorter z is the beginning of a longer one."""
        values = self.stream("z").standard_normal(size)
        return torch.from_numpy(values.astype(np.float32))[None]

    def stream(self, *aspect: str | int) -> np.random.Generator:
        """The generator of one aspect of this identity."""
        return numpy_generator(self.seed, "identity", self.identity, *aspect)


def kind_of(config: RecipeConfig, identity: int) -> Kind:
    """Kinds are spread evenly: among the first n identities there are floor(n * motion_rich_share) motion-rich ones, and dynamic ones
    are spread in the same way over the others."""
    return _kind_and_rank(config, identity)[0]


def split_of(config: RecipeConfig, seed: int, identity: int) -> Split:
    """The split of an identity; see `RecipeConfig.split_rule`."""
    if config.split_rule == "hash":
        place, val, test = float(numpy_generator(seed, "split", identity).random()), config.val_share, config.test_share
    else:
        shares = [share for share in (config.val_share, config.test_share) if share > 0]
        if not shares:
            return "train"
        _, rank = _kind_and_rank(config, identity)
        period = max(1, round(1 / min(shares)))
        place, val, test = rank % period, round(config.val_share * period), round(config.test_share * period)
    return "val" if place < val else "test" if place < val + test else "train"


def frame_count(config: RecipeConfig, identity: int) -> int:
    """Frames (motions) of an identity, without drawing it."""
    match kind_of(config, identity):
        case "dynamic":
            return config.dynamic_motions
        case "motion-rich":
            return config.motion_rich_motions
        case "static":
            return 1


def view_count(config: RecipeConfig, identity: int) -> int:
    """Cameras of each of an identity's motions, without drawing it."""
    return {"dynamic": config.dynamic_views, "static": config.static_views, "motion-rich": config.motion_rich_views}[
        kind_of(config, identity)
    ]


def draw_identity(config: RecipeConfig, seed: int, identity: int) -> IdentityRecipe:
    """Everything there is to know about identity number `identity` of the data set with this seed.

    Raises DataError if the rows of labels that are drawn from do not suffice.
    """
    kind = kind_of(config, identity)
    rng = numpy_generator(seed, "identity", identity, "shape")
    rows, split = _label_rows(config), split_of(config, seed, identity)
    if rows is not None and config.split_rows:
        rows = rows.of_split(split, config.val_share, config.test_share)
    if kind == "motion-rich" and rows is not None and rows.clip_frames is not None and rows.clip_frames < config.motion_rich_motions:
        raise DataError(
            f"recipe.motion_rich_motions: {config.motion_rich_motions} different motions are asked for, but a clip has {rows.clip_frames} "
            "frames; ask for at most that many"
        )
    shape = _draw_shape(config, rng, rows)
    views = view_count(config, identity)
    motions = []
    for index in range(frame_count(config, identity)):
        clip_rng = numpy_generator(seed, "identity", identity, "clip")  # the same for all motions
        motion, jaw_opened = _draw_motion(config, numpy_generator(seed, "identity", identity, "motion", index), kind, clip_rng, index, rows)
        cameras, look_at = _draw_cameras(config, numpy_generator(seed, "identity", identity, "cameras", index), views, rows)
        motions.append(MotionRecipe(motion, cameras, {"jaw_opened": jaw_opened, "look_at": look_at}))
    return IdentityRecipe(
        identity=identity,
        kind=kind,
        split=split,
        seed=seed,
        shape=shape,
        condition_camera=motions[0].cameras[:1].clone(),
        truncation_psi=config.truncation_psi,
        motions=tuple(motions),
    )


def camera_distances(config: RecipeConfig) -> tuple[float, float]:
    """Bounds of |z of the world origin in camera axes| over every camera that can be drawn, scene units."""
    look_at, portrait = config.look_at, config.portrait
    reach = math.hypot(look_at.target_xy, look_at.target_xy, max(abs(z) for z in look_at.target_z))
    near, far = look_at.radius[0] - reach, look_at.radius[1] + reach
    rows = _label_rows(config)
    if rows is not None:
        fitted = rows.camera_distances
        return min(near, fitted[0]), max(far, fitted[1])
    if config.source == "studio":
        portrait = PortraitCameras(target_xy=STUDIO_TARGET_XY, radius=STUDIO_RADIUS)
    reach = math.hypot(portrait.target_xy, portrait.target_xy)
    return min(near, portrait.radius[0] - reach), max(far, portrait.radius[1] + reach)


def deciding_settings(config: RecipeConfig) -> dict[str, Any]:
    """The settings that what is drawn depends on: files are left out where no file is read."""
    settings, read = to_dict(config), {"portraits": ("portraits", "split_rows"), "sample-sets": ("sample_sets", "split_rows")}
    unread = {"portraits", "sample_sets", "split_rows"} - set(read.get(config.source, ()))
    return {name: value for name, value in settings.items() if name not in unread}


def _label_rows(config: RecipeConfig) -> LabelRows | None:
    """The rows of fitted labels that the source names, if it names any."""
    match config.source:
        case "sample-sets":
            return load_sample_sets(config.sample_sets)
        case "portraits":
            return load_portrait_rows(config.portraits)
        case _:
            return None


def _kind_and_rank(config: RecipeConfig, identity: int) -> tuple[Kind, int]:
    """The kind of an identity, and how many of that kind have a smaller number."""

    def count(numbers: int, share: float) -> int:
        return math.floor(numbers * share + 1e-9)  # the small term keeps 10 * 0.3 at 3

    rich = count(identity, config.motion_rich_share)
    if count(identity + 1, config.motion_rich_share) > rich:
        return "motion-rich", rich
    place = identity - rich  # among the others
    share = config.dynamic_share / (1 - config.motion_rich_share)
    dynamic = count(place, share)
    return ("dynamic", dynamic) if count(place + 1, share) > dynamic else ("static", place - dynamic)


def _studio_label(rng: np.random.Generator) -> HeadLabel:
    """A label as the built-in portraits have them."""
    return draw_label(rng, wide_fraction=0.2, motion_scale=1.0)


def _draw_shape(config: RecipeConfig, rng: np.random.Generator, rows: LabelRows | None) -> Tensor:
    """Shape [1, 300]."""
    match config.source:
        case "parametric":
            return _row(config.shape_std * _cut_normal(rng, SHAPE_SIZE, config.cut_deviations))
        case "studio":
            return _studio_label(rng).shape
        case "portraits" | "sample-sets":
            return _row(rows.shape(rng))


def _draw_motion(
    config: RecipeConfig, rng: np.random.Generator, kind: Kind, clip_rng: np.random.Generator, index: int, rows: LabelRows | None
) -> tuple[Motion, bool]:
    """A motion [1, ...], number `index` of its identity, and whether its jaw was opened."""
    match config.source:
        case "parametric":
            motion = _parametric_motion(config.motion, rng, config.cut_deviations)
        case "studio":
            motion = _studio_label(rng).motion
        case "portraits" | "sample-sets":
            parts = rows.photograph(rng) if kind == "static" else rows.clip_frame(clip_rng, index, rng)
            expression, jaw_pose, eye_pose = map(_row, parts)
            motion = Motion(expression, torch.zeros(1, 3), jaw_pose, eye_pose)
    opened, jaw = bool(rng.random() < config.motion.jaw_open_probability), rng.uniform(*config.motion.jaw_open_rad)
    if kind == "static" or not opened:
        return motion, False
    jaw_pose = motion.jaw_pose.clone()
    jaw_pose[:, 0] = jaw
    return motion._replace(jaw_pose=jaw_pose), True


def _parametric_motion(config: MotionDraws, rng: np.random.Generator, cut: float) -> Motion:
    expression = config.expression_std * _cut_normal(rng, EXPRESSION_SIZE, cut)
    jaw = max(0.0, config.jaw_mean_rad + config.jaw_std_rad * float(_cut_normal(rng, 1, cut)[0]))
    pitch, yaw = _cut_normal(rng, 2, cut) * (config.gaze_pitch_std_rad, config.gaze_yaw_std_rad)
    return Motion(
        expression=_row(expression),
        neck_pose=torch.zeros(1, 3),
        jaw_pose=_row(np.array([jaw, 0.0, 0.0])),
        eye_pose=_row(np.array([pitch, yaw, 0.0] * 2)),  # the eyes' roll cannot be seen
    )


def _draw_cameras(config: RecipeConfig, rng: np.random.Generator, views: int, rows: LabelRows | None) -> tuple[Tensor, list[bool]]:
    """Camera labels [views, 25] and which of them are look-at cameras. Both sorts are drawn for every view, so that a changed
    probability moves no other camera."""
    labels, chosen = [], []
    for _ in range(views):
        is_look_at = bool(rng.random() < config.look_at_probability)
        around = _look_at_camera(config.look_at, rng)
        match config.source:
            case "parametric":
                portrait = _portrait_camera(config.portrait, rng, config.cut_deviations)
            case "studio":
                portrait = _studio_label(rng).camera.label()
            case "portraits" | "sample-sets":
                portrait = _row(rows.camera(rng))
                around[:, 16:] = portrait[:, 16:]  # a look-at camera has the intrinsics of the label that it replaces
        labels.append(around if is_look_at else portrait)
        chosen.append(is_look_at)
    return torch.cat(labels), chosen


def _look_at_camera(config: LookAtCameras, rng: np.random.Generator) -> Tensor:
    yaw = rng.uniform(-config.yaw_rad, config.yaw_rad)
    elevation = math.asin(2 * rng.uniform(*config.pitch) / math.pi)
    roll, radius = rng.uniform(-config.roll_rad, config.roll_rad), rng.uniform(*config.radius)
    target = [*rng.uniform(-config.target_xy, config.target_xy, 2), rng.uniform(*config.target_z)]
    return _orbit_label(yaw, elevation, roll, radius, target)


def _portrait_camera(config: PortraitCameras, rng: np.random.Generator, cut: float) -> Tensor:
    yaw, elevation, roll, distance = _cut_normal(rng, 4, cut) * (
        config.yaw_std_rad,
        config.pitch_std_rad,
        config.roll_std_rad,
        config.radius_std,
    )
    target = [*rng.uniform(-config.target_xy, config.target_xy, 2), 0.0]
    return _orbit_label(yaw, elevation, roll, np.clip(config.radius_mean + distance, *config.radius), target)


def _orbit_label(yaw: float, elevation: float, roll: float, radius: float, target: list[float]) -> Tensor:
    """The label [1, 25] of a camera on a sphere around `target`."""
    values = torch.tensor([[yaw, elevation, roll, radius, *target]], dtype=torch.float64)
    return orbit(values[:, 0], values[:, 1], values[:, 3], target=values[:, 4:], roll_rad=values[:, 2]).label().float()


def _cut_normal(rng: np.random.Generator, size: int, cut: float) -> np.ndarray:
    """Normal draws, cut at `cut` deviations (a fixed number of draws, unlike rejection)."""
    return np.clip(rng.standard_normal(size), -cut, cut)


def _row(values: np.ndarray) -> Tensor:
    return torch.from_numpy(values.astype(np.float32))[None]
