"""`headfoundry bench`: time the parts that set the pace, each beside what the machine could do at best."""

from __future__ import annotations

import dataclasses
import datetime
import json
import platform
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from datagen.speed import FarmTime, measure_farm
from genhead.generator import GenHeadConfig
from genhead.speed import (
    CONVOLUTION_FLOP,
    MOTIONS,
    VIEWS,
    GeneratorTimes,
    convolution_seconds,
    measure_generator,
    median_seconds,
)
from head3d.cameras import camera_rays, frontal
from head3d.deformation import Deformation
from head3d.head_model import load_head_model
from head3d.labels import Motion
from head3d.rasterize import rasterize
from head3d.run.config import NonNegativeInt, PositiveInt
from head3d.run.files import write_atomic
from head3d.run.memory import peak_memory_mb
from head3d.run.seeding import torch_generator
from head3d.triplane import sample_planes
from reconstructor import speed
from reconstructor.model import ReconstructorConfig
from reconstructor.reading_speed import BATCH, THREADS, TINY, ReadingTime, measure_reading
from reconstructor.settings import ReconstructorRun

POINTS = 64 * 64 * 48  # of one picture at 64 x 64 rays: 196,608
BOX_SIDE = 1.3


@dataclasses.dataclass(frozen=True)
class BenchRun:
    """Print a table and write it as JSON with machine, versions and date. It runs on OMP_NUM_THREADS threads, or on all cores."""

    out: Path = Path("runs/bench.json")  # the table as JSON
    repeats: PositiveInt = 10  # timings of each row, of which the median counts
    genhead: NonNegativeInt = 3  # timings of each stage of the published generator, of which the median counts; 0 leaves it out
    farm: NonNegativeInt = 2  # shards that each data-generation worker makes with it, alone and with a second one; 0 leaves it out
    reconstructor: NonNegativeInt = 3  # timings of each stage of the published reconstructor; 0 leaves it out
    training: NonNegativeInt = 2  # timings of its training step, early and late, of up to a minute and 9 GB or more; 0 leaves it out
    reading: NonNegativeInt = 32  # training samples that are read, with all labels; 0 leaves it out
    head_model: str = "procedural"  # path of a FLAME-format file, or "procedural"


class Row(NamedTuple):
    """One line of the table."""

    part: str
    seconds: float
    limit_s: float  # what the machine's arithmetic or memory alone would take; 0 where none is known
    limit: str  # what the limit is made of


def main(config: BenchRun) -> None:
    """Measure on the CPU, print, write `config.out`."""
    with torch.inference_mode():
        table = measure(config)
    width = max(len(row.part) for row in table)
    print(f"{'part':{width}} {'ms':>9} {'limit ms':>9}  of the limit")
    for row in table:
        share = f"{row.limit_s / row.seconds:7.0%}" if row.limit_s else "      -"
        print(f"{row.part:{width}} {row.seconds * 1e3:9.2f} {row.limit_s * 1e3:9.2f} {share}  {row.limit}")
    times = GeneratorTimes([], [])
    if config.genhead:
        times = measure_generator(GenHeadConfig(), load_head_model(config.head_model), repeats=config.genhead)
        print_generator(times)
    farm_rows = measure_farm(GenHeadConfig(), config.head_model, config.farm) if config.farm else []
    print_farm(farm_rows)
    reconstructor_rows: list[speed.StageTime] = []
    if config.reconstructor:
        reconstructor_rows = speed.measure_reconstructor(
            ReconstructorConfig(), load_head_model(config.head_model), repeats=config.reconstructor
        )
        print_reconstructor(reconstructor_rows)
    training_rows: list[speed.TrainingTime] = []
    if config.training:
        training_rows = speed.measure_training(ReconstructorRun(), load_head_model(config.head_model), config.training)
        print_training(training_rows)
    reading_rows = [measure_reading(sizes, config.reading) for sizes in (GenHeadConfig(), TINY)] if config.reading else []
    print_reading(reading_rows, training_rows)
    record = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": {"system": platform.platform(), "processor": processor(), "threads": torch.get_num_threads()},
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__},
        "rows": [row._asdict() for row in table],
        "genhead": {"identities": [row._asdict() for row in times.identities], "stages": [row._asdict() for row in times.stages]},
        "farm": [row._asdict() for row in farm_rows],
        "reconstructor": [row._asdict() for row in reconstructor_rows],
        "training": [row._asdict() for row in training_rows],
        "reading": [row._asdict() for row in reading_rows],
        "peak_memory_mb": peak_memory_mb(),
    }
    write_atomic(config.out, json.dumps(record, indent=1) + "\n")
    print(f"Written to {config.out}")


def print_generator(times: GeneratorTimes) -> None:
    """The published generator: one identity as it is shared by its pictures, and the stages of independent ones."""
    print("\npublished GenHead, 512 x 512 from 64 x 64 rays; the floor is its arithmetic at the speed of a large convolution")
    print(f"{f'one identity, {MOTIONS} motions x {VIEWS} views':30} {'s/image':>8} {'PSNR dB':>8} {'peak MB':>8}")
    for row in times.identities:
        quality = "-" if row.psnr_db is None else f"{row.psnr_db:.1f}"
        print(f"{row.precision:30} {row.seconds_per_image:8.3f} {quality:>8} {row.peak_memory_mb:8.0f}")
    print(f"{'stage':30} {'precision':>9} {'batch':>5} {'s/image':>8} {'floor s':>8} {'GFLOP':>7}")
    for row in times.stages:
        arithmetic = f"{row.floor_s:8.3f} {row.gflop_per_image:7.1f}" if row.gflop_per_image else f"{'-':>8} {'-':>7}"
        print(f"{row.stage:30} {row.precision:>9} {row.batch:5d} {row.seconds_per_image:8.3f} {arithmetic}")


def print_farm(rows: list[FarmTime]) -> None:
    """Data generation with one worker and more: pace, what it costs beside rendering, and how well workers add up."""
    if rows:
        print(f"\n{'data generation, 512 x 512':30} {'s/picture':>9} {'beside rendering':>17} {'times one worker':>17}")
    for row in rows:
        workers = f"{row.workers} worker{'s' if row.workers > 1 else ''}, one thread each"
        print(f"{workers:30} {row.seconds:9.3f} {row.beside_s / row.render_s:17.1%} {rows[0].seconds / row.seconds:17.2f}")


def print_reconstructor(rows: list[speed.StageTime]) -> None:
    """The published reconstructor's stages, and what a user waits for."""
    print(f"\n{'published reconstructor, 512 x 512':46} {'once a':>7} {'s':>8} {'GFLOP':>7}")
    for row in rows:
        print(f"{row.stage:46} {row.often:>7} {row.seconds:8.3f} {row.gflop:7.1f}")


def print_training(rows: list[speed.TrainingTime]) -> None:
    """The published reconstructor's training step for one target."""
    columns = f"{'forward s':>9} {'backward s':>10} {'update s':>8} {'discriminator s':>15} {'step s':>7} {'peak MB':>8}"
    print(f"\n{'training step, one target, float32':36} {columns}")
    for row in rows:
        whole = row.forward_s + row.backward_s + row.update_s + row.discriminator_s
        parts = f"{row.forward_s:9.2f} {row.backward_s:10.2f} {row.update_s:8.2f} {row.discriminator_s:15.2f} {whole:7.2f}"
        print(f"{f'{row.when}, {row.rays} x {row.rays} rays':36} {parts} {row.peak_memory_mb:8.0f}")


def print_reading(rows: list[ReadingTime], training: list[speed.TrainingTime]) -> None:
    """Reading training samples, beside what it cannot be faster than; for the published sizes what training waits for it, if its step
    was timed too."""
    for row in rows:
        title = f"reading, {row.side} x {row.side}, all labels, {row.megabytes:.1f} MB a sample, {THREADS} threads"
        print(f"\n{title:66} {'s':>8} {'of the speed':>13}")
        print(f"{'decode its members from memory':66} {row.memory_s:8.5f}")
        print(f"{'read them from shards for the first time, with checksums':66} {row.first_s:8.5f} {row.first_share:13.0%}")
        print(f"{'read them again':66} {row.read_s:8.5f} {row.read_share:13.0%}")
        print(f"{'in a batch, as the network takes them':66} {row.batch_s:8.5f} {row.batch_share:13.0%}")
        print(f"{f'wait for a batch of {BATCH}, computing for a second before':66} {row.wait_s:8.5f}")
        for step in training[:1] if row.side == ReconstructorConfig().architecture.image_resolution else []:
            seconds = BATCH * (step.forward_s + step.backward_s) + step.update_s
            print(f"{f'its share of a training step of {seconds:.0f} s':66} {row.wait_s / (seconds + row.wait_s):8.2%}")


def measure(config: BenchRun) -> list[Row]:
    """The rows, in the order of the pipeline: machine, head, field, network, picture."""
    generator = torch_generator(0, "bench")

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    def timed(work: Callable[[], object]) -> float:
        return median_seconds(work, config.repeats)

    matrix, block = draw(1024, 1024), draw(1 << 24)
    product_s = timed(lambda: matrix @ matrix)
    convolution_s, rounded_s = (convolution_seconds(precision, config.repeats) for precision in ("float32", "bfloat16"))
    flops = max(2 * 1024**3 / product_s, CONVOLUTION_FLOP / convolution_s)  # different libraries do the two
    bandwidth = 2 * 4 * block.numel() / timed(block.clone)
    rows = [
        Row("matrix product 1024", product_s, 2 * 1024**3 / flops, f"{2 * 1024**3 / product_s / 1e9:.0f} GFLOP/s"),
        Row(
            "convolution 256 channels, 64 x 64",
            convolution_s,
            CONVOLUTION_FLOP / flops,
            f"{CONVOLUTION_FLOP / convolution_s / 1e9:.0f} GFLOP/s",
        ),
        Row("the same in bfloat16", rounded_s, 0.0, f"{CONVOLUTION_FLOP / rounded_s / 1e9:.0f} GFLOP/s"),
        Row("copy 64 MiB", 8 * block.numel() / bandwidth, 0.0, f"{bandwidth / 1e9:.1f} GB/s"),
    ]

    head, camera, rest = load_head_model(config.head_model), frontal(1), Motion.neutral(1)
    shape, deformation = torch.zeros(1, 300), Deformation(head)
    vertices, posed = head.vertices(shape, rest), deformation.prepare(shape, rest)
    blended = 4 * 3 * head.canonical_vertices.shape[0] * (300 + 100 + 36)
    rows += [
        Row("head: vertices of one motion", timed(lambda: head.vertices(shape, rest)), blended / bandwidth, "reading the components once"),
        Row("head: rasterise 512 x 512", timed(lambda: rasterize(vertices, head.faces, camera, 512)), 0.0, ""),
        Row("deformation: prepare one head", timed(lambda: deformation.prepare(shape, rest)), 0.0, ""),
    ]

    origins, directions = camera_rays(camera, 64)
    depths = origins.norm(dim=-1, keepdim=True) + torch.linspace(-BOX_SIDE / 2, BOX_SIDE / 2, 48)
    points = (origins[:, :, None] + depths[..., None] * directions[:, :, None]).reshape(1, POINTS, 3)
    planes, moved = draw(1, 3, 32, 256, 256), 4 * 32 * POINTS * (3 * 4 + 1)
    rows += [
        Row("deformation: 64 x 64 x 48 points", timed(lambda: deformation.to_canonical(points, posed, "head")), 0.0, ""),
        Row(
            "planes: sample those points",
            timed(lambda: sample_planes(planes, points, BOX_SIDE)),
            moved / bandwidth,
            "four texels a plane, one result",
        ),
    ]

    hidden, weights = draw(POINTS, 32), draw(64, 32)
    rows.append(
        Row("decoder: first layer", timed(lambda: F.softplus(F.linear(hidden, weights))), 2 * POINTS * 32 * 64 / flops, "arithmetic")
    )
    for channels, resolution in ((512, 32), (128, 128)):
        image, kernel = draw(1, channels, resolution, resolution), draw(channels, channels, 3, 3)
        arithmetic = 2 * 9 * channels**2 * resolution**2 / flops
        seconds = timed(lambda image=image, kernel=kernel: F.conv2d(image, kernel, padding=1))
        rows.append(Row(f"convolution {channels} channels, {resolution} x {resolution}", seconds, arithmetic, "arithmetic"))
    return rows + picture_rows(timed)


def picture_rows(timed: Callable[[Callable[[], object]], float]) -> list[Row]:
    """The codec, which sets the pace of writing and reading shards."""
    import simplejpeg

    smooth = F.interpolate(torch.rand(1, 3, 32, 32, generator=torch_generator(0, "picture")), size=512, mode="bicubic").clamp(0, 1)
    pixels = np.ascontiguousarray((smooth[0] * 255).byte().permute(1, 2, 0).numpy())
    coded = simplejpeg.encode_jpeg(pixels, quality=95, colorsubsampling="444")
    return [
        Row(
            "JPEG: write 512 x 512",
            timed(lambda: simplejpeg.encode_jpeg(pixels, quality=95, colorsubsampling="444")),
            0.0,
            f"{len(coded)} bytes",
        ),
        Row("JPEG: read 512 x 512", timed(lambda: simplejpeg.decode_jpeg(coded)), 0.0, ""),
    ]


def processor() -> str:
    """The processor's name where the system tells it."""
    description = Path("/proc/cpuinfo")
    if description.exists():
        for line in description.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


CONFIG = BenchRun
