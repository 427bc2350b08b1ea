"""What is measured: the samples of every task, their pictures and their exact truth.

    static lift          source and target: one picture; the truth is that picture
    novel view           the source's motion from cameras at chosen yaws, to 60 degrees; the truth is rendered
    self-reenactment     source and target: two motions of one identity, any views; the truth is a picture of the data set
    cross-reenactment    the source's identity in the motion, and from the camera, of another identity's frame; the truth is rendered
    steadiness           the source's identity moves from one motion of another identity to the next, before that frame's camera; the
                         truth is rendered

The truth is rendered by the generator from the recipe of the source's identity, which no real recording can give. Where it is a
picture of the data set, the same rendering of it shows how near to that picture anything could come. Where the view or the motion
changes, the generator's mean head in that motion, before that camera, shows how near one comes without knowing the person.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor

from datagen.index import FrameEntry
from datagen.plan import Plan
from datagen.reading import ShardDataset
from datagen.recipes import draw_identity
from datagen.render import IdentityRenderer
from datagen.worker import load_planned_generator
from head3d.cameras import orbit
from head3d.labels import Motion, pack_label, unpack_label
from head3d.rotations import axis_angle_to_matrix
from head3d.run.errors import DataError
from head3d.run.seeding import numpy_generator
from reconstructor.batches import as_picture
from reconstructor.sequences import interpolate_motion

Task = Literal["static_lift", "novel_view", "self_reenactment", "cross_reenactment", "steadiness"]
TASKS: tuple[Task, ...] = get_args(Task)
STORED_TASKS = ("static_lift", "self_reenactment")  # the truth is a picture of the data set; elsewhere it is rendered
STATIC_TASKS = ("static_lift", "novel_view")  # the target's motion is the source's
MEAN_HEAD_TASKS = ("novel_view", "self_reenactment", "cross_reenactment")  # beside which the mean head is rendered
NOVEL_YAWS_DEG = (-60, -45, -30, -15, 0, 15, 30, 45, 60)  # of the camera that the novel view is seen from
_NOVEL_RADIUS, _NOVEL_TARGET = 4.05, (0.0, 0.0, 0.09)  # the middle of the look-at cameras that data sets are made with, scene units
_YAW_BINS = ((15.0, "below 15 deg"), (30.0, "15 to 30 deg"), (np.inf, "over 30 deg"))  # of self-reenactment, as the paper's


class Case(NamedTuple):
    """One sample of one task: which frames and views."""

    task: str
    source: FrameEntry
    source_view: int
    driver: FrameEntry
    driver_view: int  # its camera is the target's camera, but for novel views
    yaw_deg: int | None = None  # of a novel view's camera
    last: FrameEntry | None = None  # of steadiness: the frame in whose motion the sequence ends


class Pictured(NamedTuple):
    """What a row of the table makes of samples. [3, S, S] in [-1, 1], maps [1, R, R]; or all with B in front."""

    image: Tensor
    depth: Tensor | None = None  # ray distance, scene units
    opacity: Tensor | None = None  # in [0, 1]


class Sample(NamedTuple):
    """What a case looks like. Pictures [3, S, S] in [-1, 1]; maps [1, R, R]."""

    source_image: Tensor
    source_label: Tensor  # [437]
    driver_image: Tensor
    target_label: Tensor  # [437] driver's camera and motion, source's shape
    truth: Tensor
    depth: Tensor | None  # ray distance, scene units; None if the data set has no depth
    opacity: Tensor  # in [0, 1]
    rerendered: Pictured | None = None  # the truth rendered once more, where it is a picture of the data set
    mean_head: Pictured | None = None  # the mean head in the target's motion, before its camera; in MEAN_HEAD_TASKS


class Truths:
    """Reads or renders samples; keeps the generator's planes of the identity rendered last."""

    def __init__(self, dataset: ShardDataset, plan: Plan, generator: Path, device: str) -> None:
        self._dataset, self._plan = dataset, plan
        self._genhead = load_planned_generator(plan, generator, device)
        self._renderer: IdentityRenderer | None = None
        self._mean_renderer = self._mean_head()

    def sample(self, case: Case) -> Sample:
        """Pictures, labels and truth of a case that is one picture, on the CPU."""
        source_image, source_label = self._shown(case.source, case.source_view)
        picture, target = self._shown(case.driver, case.driver_view)
        target[25:325] = source_label[25:325]
        if case.yaw_deg is not None:
            target[:25] = novel_camera(case.yaw_deg)
        rendered = self._render(case.source.identity, target)
        mean_head = _rendered(self._mean_renderer, target) if case.task in MEAN_HEAD_TASKS else None
        if case.task not in STORED_TASKS:
            return Sample(source_image, source_label, picture, target, *rendered, mean_head=mean_head)
        has_depth = "depth" in case.driver.members
        maps = self._dataset.read(case.driver, ["opacity", *(["depth"] if has_depth else [])])
        opacity = torch.from_numpy(maps["opacity"][case.driver_view][None])
        depth = torch.from_numpy(maps["depth"][case.driver_view][None]) if has_depth else None
        return Sample(source_image, source_label, picture, target, picture, depth, opacity, rendered, mean_head)

    def sequence(self, case: Case, frames: int) -> list[Sample]:
        """The pictures of a steadiness case in their order: from the driver's motion to the last one's, slow at both ends."""
        source_image, source_label = self._shown(case.source, case.source_view)
        first, last = self._shown(case.driver, case.driver_view)[1], self._shown(case.last, 0)[1]
        driver, end = unpack_label(first[None]), unpack_label(last[None]).motion
        keys = Motion(*(torch.cat(parts) for parts in zip(driver.motion, end, strict=True)))
        motion, camera = interpolate_motion(keys, frames - 1), driver.camera.repeat_interleave(frames)
        targets = pack_label(camera, source_label[None, 25:325].expand(frames, -1), motion)
        shown = [self._render(case.driver.identity, label).image for label in pack_label(camera, driver.shape.expand(frames, -1), motion)]
        truths = [self._render(case.source.identity, label) for label in targets]
        return [
            Sample(source_image, source_label, picture, target, truth.image, truth.depth, truth.opacity)
            for picture, target, truth in zip(shown, targets, truths, strict=True)
        ]

    def _shown(self, frame: FrameEntry, view: int) -> tuple[Tensor, Tensor]:
        """A picture [3, S, S] of the data set and its label [437]."""
        stored = self._dataset.read(frame, [f"rgb.{view}", "label"])
        return torch.from_numpy(as_picture(stored[f"rgb.{view}"])), torch.from_numpy(np.array(stored["label"][view]))

    def _render(self, identity: int, label: Tensor) -> Pictured:
        if self._renderer is None or self._renderer.recipe.identity != identity:
            recipe = draw_identity(self._plan.recipe, self._plan.seed, identity)
            self._renderer = IdentityRenderer(self._genhead, recipe, self._plan.render.precision)
        return _rendered(self._renderer, label)

    @torch.no_grad()
    def _mean_head(self) -> IdentityRenderer:
        """Nobody: truncation to the mean w, the mean shape, and the background of z = 0."""
        recipe = draw_identity(self._plan.recipe, self._plan.seed, 0)
        recipe = recipe._replace(shape=torch.zeros_like(recipe.shape), truncation_psi=0.0)
        renderer = IdentityRenderer(self._genhead, recipe, self._plan.render.precision)
        renderer.background = self._genhead.background(
            torch.zeros(1, self._genhead.config.z_dim, device=renderer.device), renderer.precision
        )
        return renderer


def _rendered(renderer: IdentityRenderer, label: Tensor) -> Pictured:
    """An identity in the motion of a label [437], before its camera; on the CPU."""
    target = unpack_label(label[None])
    images = renderer.render(renderer.pose(target.motion), target.camera.label()).images
    return Pictured(images.image[0].cpu(), images.depth[0].cpu(), images.opacity[0].cpu())


def novel_camera(yaw_deg: float) -> Tensor:
    """The camera [25] of a novel view: at eye level, at a yaw about the middle of the head; positive sees the head's left side."""
    yaw = torch.deg2rad(torch.tensor([float(yaw_deg)]))
    return orbit(yaw, torch.zeros(1), torch.full((1,), _NOVEL_RADIUS), torch.tensor([_NOVEL_TARGET])).label()[0]


def head_yaw_deg(label: Tensor) -> float:
    """From which side a label's camera [437] sees the head: degrees about the head's own vertical axis, 0 in front."""
    camera, _, motion = unpack_label(label[None])
    backward = axis_angle_to_matrix(motion.neck_pose)[0].T @ camera.c2w[0, :3, 2]
    return float(torch.rad2deg(torch.atan2(backward[0], backward[2])))


def bin_of(case: Case, sample: Sample) -> str | None:
    """The part of its task that a sample belongs to: by the yaw between source and target, or the yaw of a novel view; None if unparted."""
    match case.task:
        case "self_reenactment":
            difference = abs((head_yaw_deg(sample.source_label) - head_yaw_deg(sample.target_label) + 180) % 360 - 180)
            return next(name for limit, name in _YAW_BINS if difference < limit or limit == np.inf)
        case "novel_view":
            return f"at {abs(case.yaw_deg)} deg"
        case _:
            return None


def bins_of(task: str) -> list[str]:
    """The names that `bin_of` may give, in their order."""
    match task:
        case "self_reenactment":
            return [name for _, name in _YAW_BINS]
        case "novel_view":
            return [f"at {yaw} deg" for yaw in sorted({abs(yaw) for yaw in NOVEL_YAWS_DEG})]
        case _:
            return []


def draw_cases(dataset: ShardDataset, split: str, seed: int, identities: int, samples: int, tasks: Sequence[Task] = TASKS) -> list[Case]:
    """The samples of the tasks, by task and source identity; those of a task are a pure function of (frames, seed, counts).

    At most `identities` source identities a task, `samples` samples of each; one sequence of each for steadiness.
    Raises DataError if the split holds no identity or allows no task.
    """
    by_identity: dict[int, list[FrameEntry]] = {}
    for frame in dataset.frames:
        if frame.split == split and frame.kind != "motion-rich":  # those pictures are small
            by_identity.setdefault(frame.identity, []).append(frame)
    if not by_identity:
        raise DataError(
            f"{dataset.storage.address}: no identity is in the split '{split}'; "
            f"generate more identities or a larger share (--recipe.{split}_share)"
        )
    everyone = sorted(by_identity)
    # Drivers of other identities: the dynamic frames, whose motions are as the training's
    drivers = [frame for identity in everyone for frame in by_identity[identity] if frame.kind != "static"] or [
        frame for identity in everyone for frame in by_identity[identity]
    ]
    cases = []
    for task in tasks:
        able = [identity for identity in everyone if _can(task, by_identity[identity], drivers)]
        chosen = numpy_generator(seed, "evaluate", task).permutation(able)[:identities]
        for identity in sorted(int(value) for value in chosen):
            for number in range(1 if task == "steadiness" else samples):
                rng = numpy_generator(seed, "evaluate", task, identity, number)
                cases.append(_draw_case(task, by_identity[identity], drivers, rng))
    if not cases:
        raise DataError(
            f"{dataset.storage.address}: the identities of the split '{split}' allow none of the tasks {', '.join(tasks)}; "
            "generate more identities and motions, or ask for others (--tasks)"
        )
    return cases


def _can(task: str, frames: list[FrameEntry], drivers: list[FrameEntry]) -> bool:
    match task:
        case "static_lift" | "novel_view":
            return True
        case "self_reenactment":
            return len(frames) > 1
        case "cross_reenactment":
            return bool(_others(frames, drivers))
        case "steadiness":
            return bool(_moving(_others(frames, drivers)))
        case _:
            raise ValueError(f"no such task: {task}")


def _others(frames: list[FrameEntry], drivers: list[FrameEntry]) -> list[FrameEntry]:
    return [frame for frame in drivers if frame.identity != frames[0].identity]


def _moving(drivers: list[FrameEntry]) -> list[FrameEntry]:
    """Those whose identity has another motion among them."""
    return [frame for frame in drivers if any(other.identity == frame.identity and other.motion != frame.motion for other in drivers)]


def _draw_case(task: str, frames: list[FrameEntry], drivers: list[FrameEntry], rng: np.random.Generator) -> Case:
    def one_of(choices: list[FrameEntry]) -> FrameEntry:
        return choices[int(rng.integers(len(choices)))]

    source = one_of(frames)
    view = int(rng.integers(source.views))
    match task:
        case "static_lift":
            return Case(task, source, view, source, view)
        case "novel_view":
            return Case(task, source, view, source, view, yaw_deg=NOVEL_YAWS_DEG[int(rng.integers(len(NOVEL_YAWS_DEG)))])
        case "self_reenactment":
            driver = one_of([frame for frame in frames if frame.motion != source.motion])
            return Case(task, source, view, driver, int(rng.integers(driver.views)))
        case "cross_reenactment":
            driver = one_of(_others(frames, drivers))
            return Case(task, source, view, driver, int(rng.integers(driver.views)))
        case "steadiness":
            driver = one_of(_moving(_others(frames, drivers)))
            last = one_of([frame for frame in drivers if frame.identity == driver.identity and frame.motion != driver.motion])
            return Case(task, source, view, driver, int(rng.integers(driver.views)), last=last)
        case _:
            raise ValueError(f"no such task: {task}")


def batches_of(cases: list[Case], size: int) -> Iterator[list[Case]]:
    """Batches of at most `size` that never mix tasks; a steadiness case, which is many pictures, stands alone."""
    for task in TASKS:
        chosen = [case for case in cases if case.task == task]
        count = 1 if task == "steadiness" else size
        for start in range(0, len(chosen), count):
            yield chosen[start : start + count]
