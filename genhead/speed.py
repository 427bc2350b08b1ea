"""How long the generator takes, stage by stage, with random weights (they do not change the time)."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode

from genhead.generator import GenHead, GenHeadConfig
from head3d.cameras import Camera, orbit
from head3d.head_model import HeadModel
from head3d.labels import Motion
from head3d.rasterize import part_masks
from head3d.run.runlog import progress
from head3d.run.seeding import torch_generator, weights_drawn_from

MOTIONS, VIEWS = 4, 4  # of the shared identity


class StageTime(NamedTuple):
    """One line of the table."""

    stage: str
    batch: int
    seconds_per_image: float  # median over the repeats
    gflop_per_image: float  # multiplications and additions of convolutions and matrix products; 0 where none were counted


@torch.no_grad()
def measure_stages(config: GenHeadConfig, head: HeadModel, batches: tuple[int, ...] = (1, 4), repeats: int = 3) -> list[StageTime]:
    """Seconds an image by stage for each batch size, then of one identity in 4 motions x 4 views against 16 independent images."""
    draws = torch_generator(0, "genhead speed")
    with weights_drawn_from(draws):
        genhead = GenHead(config, head).eval()
    rows: list[StageTime] = []
    for batch in progress(batches, "bench: genhead"):
        rows += _stages(genhead, batch, repeats, draws)
    independent = sum(row.seconds_per_image for row in rows if row.batch == batches[0] and row.stage == "all")
    shared = median_seconds(lambda: _identity(genhead, draws), 1) / (MOTIONS * VIEWS)
    return [
        *rows,
        StageTime(f"identity of {MOTIONS} motions x {VIEWS} views", VIEWS, shared, 0.0),
        StageTime(f"{MOTIONS * VIEWS} independent images", batches[0], independent, 0.0),
    ]


def _stages(genhead: GenHead, batch: int, repeats: int, draws: torch.Generator) -> list[StageTime]:
    config = genhead.config
    z, shape, motion, camera = _inputs(genhead, batch, draws)
    ws = genhead.map(z, camera.label(), shape)
    planes, background, posed = genhead.planes(ws), genhead.background(z), genhead.pose(shape, motion)
    images = genhead.render(planes, background, posed, camera).images

    def masks() -> object:
        side, raster = config.render_resolution, config.mask_resolution
        return part_masks(genhead.head_model, posed.vertices_posed, camera, side, raster_resolution=raster, published=config.published)

    stages: dict[str, Callable[[], object]] = {
        "mapping": lambda: genhead.map(z, camera.label(), shape),
        "planes": lambda: genhead.planes(ws),
        "background": lambda: genhead.background(z),
        "mesh and deformation tables": lambda: genhead.pose(shape, motion),
        "masks": masks,
        "super-resolution": lambda: genhead.superresolution(images.raw, images.features),
    }
    seconds = {name: median_seconds(work, repeats) for name, work in stages.items()}
    flop = {name: _gflop(work) for name, work in stages.items()}
    with _deformation_clock(genhead) as clock:
        render = median_seconds(lambda: genhead.render(planes, background, posed, camera), repeats)
    seconds["deformation"] = statistics.median(_split(clock, repeats + 1)[1:])
    everything = _gflop(lambda: genhead.render(planes, background, posed, camera))
    seconds["rays"] = render - seconds["masks"] - seconds["super-resolution"] - seconds["deformation"]
    flop |= {"deformation": 0.0, "rays": everything - flop["super-resolution"] - flop["masks"]}
    rows = [StageTime(name, batch, value / batch, flop[name] / batch) for name, value in seconds.items()]
    whole = StageTime("all", batch, sum(row.seconds_per_image for row in rows), sum(row.gflop_per_image for row in rows))
    return [*rows, whole]


def _inputs(genhead: GenHead, batch: int, draws: torch.Generator) -> tuple[torch.Tensor, torch.Tensor, Motion, Camera]:
    z, shape = torch.randn(batch, genhead.config.z_dim, generator=draws), torch.randn(batch, 300, generator=draws)
    motion = Motion.neutral(batch)._replace(jaw_pose=torch.tensor([[0.15, 0.0, 0.0]]).repeat(batch, 1))
    yaw = torch.linspace(-0.5, 0.5, batch)
    return z, shape, motion, orbit(yaw, torch.zeros(batch), torch.full((batch,), 4.17))


def _identity(genhead: GenHead, draws: torch.Generator) -> None:
    """One identity as data generation renders it: planes and background once, tables once a motion, views batched."""
    z, shape, motion, _ = _inputs(genhead, 1, draws)
    camera = orbit(torch.linspace(-0.5, 0.5, VIEWS), torch.zeros(VIEWS), torch.full((VIEWS,), 4.17))
    planes, background = genhead.planes(genhead.map(z, camera.label()[:1], shape)), genhead.background(z)
    for index in range(MOTIONS):
        posed = genhead.pose(shape, motion._replace(jaw_pose=motion.jaw_pose * index / MOTIONS))
        genhead.render(
            planes.expand(VIEWS, *planes.shape[1:]), background.expand(VIEWS, *background.shape[1:]), posed.expand_views(VIEWS), camera
        )


@contextlib.contextmanager
def _deformation_clock(genhead: GenHead) -> Iterator[list[float]]:
    """Within the context, every deformation query of `genhead` notes the seconds it took."""
    spent: list[float] = []
    deformation, names = genhead.deformation, ("remove_neck", "to_canonical", "inside_eye_boxes")

    def clocked(work: Callable) -> Callable:
        def call(*arguments: object) -> object:
            begun = time.perf_counter()
            result = work(*arguments)
            spent.append(time.perf_counter() - begun)
            return result

        return call

    for name in names:
        setattr(deformation, name, clocked(getattr(deformation, name)))
    try:
        yield spent
    finally:
        for name in names:
            delattr(deformation, name)


def _split(spent: list[float], runs: int) -> list[float]:
    """Seconds by run: every run makes the same number of queries."""
    each = len(spent) // runs
    return [sum(spent[run * each : (run + 1) * each]) for run in range(runs)]


def median_seconds(work: Callable[[], object], repeats: int) -> float:
    """Median wall time of `work` over `repeats` calls, after one that does not count."""
    work()
    times = []
    for _ in range(repeats):
        begun = time.perf_counter()
        work()
        times.append(time.perf_counter() - begun)
    return statistics.median(times)


def _gflop(work: Callable[[], object]) -> float:
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops() / 1e9
