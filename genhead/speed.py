"""Seconds an image of a GenHead by stage and precision, beside what its arithmetic alone would take; random weights (they do not change
the time)."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from genhead.generator import GenHead, GenHeadConfig
from genhead.parity import psnr_db
from head3d.cameras import Camera, orbit
from head3d.head_model import HeadModel
from head3d.labels import Motion
from head3d.networks.stylegan2 import Precision
from head3d.rasterize import part_masks
from head3d.run.memory import peak_memory_mb
from head3d.run.runlog import progress
from head3d.run.seeding import torch_generator, weights_drawn_from

PRECISIONS: tuple[Precision, ...] = get_args(Precision)
MOTIONS, VIEWS = 4, 4  # of the shared identity
DENSITY_STD = 3.0  # of the density layer's weights, which are zero in a new network: pictures of an even fog would compare too well
CONVOLUTION_FLOP = 2 * 9 * 256**2 * 64**2  # of `convolution_seconds`


class StageTime(NamedTuple):
    """One stage of one batch size in one precision."""

    stage: str
    precision: Precision
    batch: int
    seconds_per_image: float  # median over the repeats
    gflop_per_image: float  # multiplications and additions of convolutions and matrix products; 0 where none were counted
    floor_s: float  # what these would take at the speed of a large convolution; rays and meshes are float32 in every precision


class IdentityTime(NamedTuple):
    """One identity in 4 motions x 4 views, as data generation renders it."""

    precision: Precision
    seconds_per_image: float
    psnr_db: float | None  # of its pictures against float32; None for float32
    peak_memory_mb: float  # the most the process has held until then


class GeneratorTimes(NamedTuple):
    """Everything that is measured."""

    identities: list[IdentityTime]
    stages: list[StageTime]


@torch.no_grad()
def measure_generator(config: GenHeadConfig, head: HeadModel, batches: tuple[int, ...] = (1, 4), repeats: int = 3) -> GeneratorTimes:
    """Time one identity, then every stage for each batch size, in each precision."""
    draws = torch_generator(0, "genhead speed")
    with weights_drawn_from(draws):
        genhead = GenHead(config, head).eval()
        torch.nn.init.normal_(genhead.decoder.density.weight, std=DENSITY_STD)
    pictures, identities = {}, {}
    for precision in reversed(PRECISIONS):  # the frugal one first: the peak only grows
        _identity(genhead, precision, motions=1)  # first calls choose kernels
        begun = time.perf_counter()
        pictures[precision] = _identity(genhead, precision, MOTIONS)
        seconds = (time.perf_counter() - begun) / len(pictures[precision])
        identities[precision] = IdentityTime(precision, seconds, None, peak_memory_mb())
    exact = pictures["float32"]
    rounded = identities["bfloat16"]._replace(psnr_db=psnr_db(pictures["bfloat16"], exact, 2.0))
    rates = {precision: CONVOLUTION_FLOP / convolution_seconds(precision, 10) for precision in PRECISIONS}
    stages: list[StageTime] = []
    for batch in progress(batches, "bench: genhead"):
        for precision in PRECISIONS:
            stages += _stages(genhead, batch, precision, repeats, rates)
    return GeneratorTimes([identities["float32"], rounded], stages)


def convolution_seconds(precision: Precision, repeats: int) -> float:
    """Median time of a 3 x 3 convolution of 256 channels at 64 x 64 px."""
    draws, dtype = torch_generator(0, "convolution"), getattr(torch, precision)
    image, kernel = torch.randn(1, 256, 64, 64, generator=draws), torch.randn(256, 256, 3, 3, generator=draws)
    image, kernel = image.to(dtype, memory_format=torch.channels_last), kernel.to(dtype)
    return median_seconds(lambda: F.conv2d(image, kernel, padding=1), repeats)


def _stages(genhead: GenHead, batch: int, precision: Precision, repeats: int, rates: dict[Precision, float]) -> list[StageTime]:
    config = genhead.config
    z, shape, motion, camera = _inputs(genhead, batch)
    ws = genhead.map(z, camera.label(), shape)
    planes, background, posed = genhead.planes(ws, precision=precision), genhead.background(z, precision), genhead.pose(shape, motion)

    def render() -> object:
        return genhead.render(planes, background, posed, camera, precision=precision)

    def masks() -> object:
        side, raster = config.render_resolution, config.mask_resolution
        return part_masks(genhead.head_model, posed.vertices_posed, camera, side, raster_resolution=raster, published=config.published)

    images = render().images
    rounded: dict[str, Callable[[], object]] = {
        "planes": lambda: genhead.planes(ws, precision=precision),
        "background": lambda: genhead.background(z, precision),
        "super-resolution": lambda: genhead.superresolution(images.raw, images.features, precision=precision),
    }
    exact: dict[str, Callable[[], object]] = {
        "mapping": lambda: genhead.map(z, camera.label(), shape),
        "mesh and deformation tables": lambda: genhead.pose(shape, motion),
        "masks": masks,
    }
    measured = {name: _measured(work, repeats) for name, work in (rounded | exact).items()}
    seconds, flop = ({name: values[i] for name, values in measured.items()} for i in (0, 1))
    with _deformation_clock(genhead) as clock:
        whole, whole_flop = _measured(render, repeats)
    seconds["deformation"] = statistics.median(_split(clock, repeats + 1)[1:])
    seconds["rays"] = whole - seconds["masks"] - seconds["super-resolution"] - seconds["deformation"]
    flop["rays"] = whole_flop - flop["super-resolution"] - flop["masks"]
    rows = [
        StageTime(
            name,
            precision,
            batch,
            seconds[name] / batch,
            flop.get(name, 0.0) / batch / 1e9,
            flop.get(name, 0.0) / batch / rates[precision if name in rounded else "float32"],
        )
        for name in ("mapping", "planes", "background", "mesh and deformation tables", "masks", "deformation", "rays", "super-resolution")
    ]
    return [*rows, StageTime("all", precision, batch, *(sum(row[column] for row in rows) for column in (3, 4, 5)))]


def _inputs(genhead: GenHead, batch: int) -> tuple[torch.Tensor, torch.Tensor, Motion, Camera]:
    draws = torch_generator(0, "genhead speed inputs")
    z, shape = torch.randn(batch, genhead.config.z_dim, generator=draws), torch.randn(batch, 300, generator=draws)
    jaw, neck = (torch.tensor([pose]).repeat(batch, 1) for pose in ((0.15, 0.0, 0.0), (0.05, 0.15, 0.0)))
    yaw = torch.linspace(-0.5, 0.5, batch)
    motion = Motion.neutral(batch)._replace(jaw_pose=jaw, neck_pose=neck)
    return z, shape, motion, orbit(yaw, torch.zeros(batch), torch.full((batch,), 4.17))


def _identity(genhead: GenHead, precision: Precision, motions: int) -> torch.Tensor:
    """Pictures [motions * 4, 3, S, S] of one identity: planes and background once, tables once a motion, views batched."""
    z, shape, motion, _ = _inputs(genhead, 1)
    camera = orbit(torch.linspace(-0.5, 0.5, VIEWS), torch.zeros(VIEWS), torch.full((VIEWS,), 4.17))
    planes = genhead.planes(genhead.map(z, camera.label()[:1], shape), precision=precision).expand(VIEWS, -1, -1, -1, -1, -1)
    background = genhead.background(z, precision).expand(VIEWS, -1, -1, -1)
    pictures = []
    for index in range(motions):
        share = (index + 1) / motions
        posed = genhead.pose(shape, motion._replace(jaw_pose=motion.jaw_pose * share, neck_pose=motion.neck_pose * share))
        pictures.append(genhead.render(planes, background, posed.expand_views(VIEWS), camera, precision=precision).images.image)
    return torch.cat(pictures)


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
    return statistics.median(_seconds(work) for _ in range(repeats))


def _measured(work: Callable[[], object], repeats: int) -> tuple[float, int]:
    """Median wall time of `work`, and the operations that its first call, which does not count, was seen to do."""
    with FlopCounterMode(display=False) as counter:
        work()
    return statistics.median(_seconds(work) for _ in range(repeats)), counter.get_total_flops()


def _seconds(work: Callable[[], object]) -> float:
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun
