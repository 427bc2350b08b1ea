"""How fast training samples are read: made-up shards of the published sizes, written by our writer and read by our reader.

What the pictures and maps show does not change the time; a picture has as many bytes as a rendered head.
"""

from __future__ import annotations

import collections
import functools
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from datagen.index import FrameEntry
from datagen.members import FAMILIES, Member, Scales, ShardConfig, decode, dequantise, encode_sample
from datagen.plan import GeneratorFacts, Plan, manifest_text, versions
from datagen.reading import ShardDataset, open_dataset, write_index
from datagen.recipes import RecipeConfig, draw_identity
from datagen.render import RenderConfig, dataset_scales
from datagen.shards import sample_key, write_shard
from genhead.background import BackgroundConfig
from genhead.generator import GenHeadConfig
from head3d.networks.superresolution import SuperResolutionConfig
from head3d.run.config import to_dict
from head3d.run.seeding import numpy_generator
from reconstructor.batches import BatchStream
from reconstructor.losses import LossConfig, members_needed
from reconstructor.order import BatchConfig, Item, ItemOrder

BATCH = 4  # samples that a process reads at a time: the published micro-batch
THREADS = BatchConfig().threads
ROUNDS = 7  # of which the median counts
TINY = GenHeadConfig(  # pictures and maps as large as those of configs/genhead_tiny.yaml
    plane_channels=16, feature_channels=16, image_resolution=64,
    background=BackgroundConfig(channels=16), superresolution=SuperResolutionConfig(input_resolution=64, feature_channels=16, channels=()),
)  # fmt: skip
_GRAIN = 12.0  # standard deviation of the colours of a made-up picture at a quarter of its side: some 85 kB at 512 x 512


class ReadingTime(NamedTuple):
    """Seconds of one training sample with all labels by THREADS threads, from pages that the system holds.

    A sample is a target's picture, label and label members, and its source's picture and label; of arrays with a row for each view one
    is converted. Each is the median of ROUNDS, in which all take turns; shares are medians over rounds of memory_s through the other.
    """

    side: int  # of the pictures, px
    megabytes: float  # as stored, of the members that are read
    memory_s: float  # decode them from bytes in memory and convert them to the units of training, by the reader's own functions
    first_s: float  # the same by the reader for the first time: find, map, compute checksums, decode, convert
    read_s: float  # the same by the reader again, when checksums are known to be right
    batch_s: float  # the same by a `BatchStream` again: order, pictures as floats, gathered in batches of BATCH
    first_share: float
    read_share: float
    batch_share: float
    wait_s: float  # a batch of BATCH, for a training loop that computes for a second between two of them


def measure_reading(generator: GenHeadConfig, samples: int, step_s: float = 1.0) -> ReadingTime:
    """Write a small set for pictures and maps of a generator's sizes, and read `samples` training samples of it, whole batches."""
    samples = max(samples // BATCH, 2) * BATCH
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(THREADS) as threads:
        dataset = write_made_up(Path(folder), generator)
        members, config = members_needed(LossConfig(), 0), BatchConfig(size=BATCH, threads=THREADS)
        order = ItemOrder(dataset.frames, config, seed=0, members=members)
        wanted = [_wanted(dataset, order.item(position), members) for position in range(samples)]
        stored = [[(_stored(dataset, frame, names), view) for frame, names, view in sample] for sample in wanted]

        def from_memory(index: int) -> None:
            for sample, view in stored[index]:
                for data, member, extension in sample:
                    _value(data, member, extension, dataset.scales, view)

        def read(source: ShardDataset, index: int) -> None:
            for frame, names, view in wanted[index]:
                source.read(frame, names, view=view)

        def seconds(work: Callable[[int], None]) -> float:
            begun = time.perf_counter()
            collections.deque(threads.map(work, range(samples)), maxlen=0)
            return (time.perf_counter() - begun) / samples

        rounds = []
        for _ in range(ROUNDS):
            fresh = dataset.through(None)
            kinds = (from_memory, functools.partial(read, fresh), functools.partial(read, fresh))
            rounds.append((*map(seconds, kinds), _batch_seconds(fresh, config, members, samples)))
        waits = _waits(dataset, config, members, samples, step_s)
    megabytes = sum(len(data) for sample in stored for found, _ in sample for data, _, _ in found) / samples / 1e6
    times = [statistics.median(column) for column in zip(*rounds, strict=True)]
    shares = [statistics.median(one[0] / one[k] for one in rounds) for k in (1, 2, 3)]
    return ReadingTime(generator.image_resolution, megabytes, *times, *shares, statistics.median(waits))


def _wanted(dataset: ShardDataset, item: Item, members: frozenset[str]) -> list[tuple[FrameEntry, list[str], int]]:
    """What `read_item` reads: frame, names and view of target and source."""
    target = (dataset.frames[item.target], sorted(members | {"label", f"rgb.{item.target_view}"}), item.target_view)
    return [target, (dataset.frames[item.source], [f"rgb.{item.source_view}", "label"], item.source_view)]


def write_made_up(folder: Path, generator: GenHeadConfig, identities: int = 6) -> ShardDataset:
    """A data set with the labels that are made by default, of numbers without meaning; two identities a shard."""
    recipe = RecipeConfig(val_share=0.0, test_share=0.0, motion_rich_share=0.0)
    plan = Plan(
        identities=identities, seed=0, labels_share=1.0, recipe=recipe, render=RenderConfig(), shards=ShardConfig(identities_per_shard=2),
        generator=GeneratorFacts("none", "0" * 64, to_dict(generator), "none", "none"),
        scales=dataset_scales(recipe, generator.sampling), licence="none: made-up numbers", device="cpu", rasterizer="torch",
    )  # fmt: skip
    about_it = versions("cpu", "torch")
    (folder / "dataset.json").write_text(manifest_text(plan.manifest(about_it)))
    for shard in range(plan.shard_count):
        recipes = [draw_identity(recipe, plan.seed, identity) for identity in plan.shard_identities(shard)]
        for family in FAMILIES:
            facts = plan.sidecar_facts(shard) | {"versions": about_it}
            with write_shard(folder, family, shard, facts) as writer:
                for one in recipes:
                    for motion, drawn in enumerate(one.motions if family != "identities" else one.motions[:1]):
                        rng, sizes = numpy_generator(0, family, one.identity, motion), plan.sizes(one.kind) | {"V": len(drawn.cameras)}
                        members = plan.members(one.kind, family)
                        values = {"rgb" if "{view}" in m.name else m.asked: _made_up(m, sizes, plan.scales, rng) for m in members}
                        about = {"identity": one.identity}
                        if family != "identities":
                            about |= {"motion": motion, "kind": one.kind, "split": one.split, "views": sizes["V"]}
                        writer.add(sample_key(shard, len(writer.samples)), encode_sample(members, values, plan.scales, plan.shards), about)
    write_index(folder)
    return open_dataset(folder)


def _made_up(member: Member, sizes: dict[str, int], scales: Scales, rng: np.random.Generator) -> Any:
    """A value of a member, in the units in which it is read."""
    shape = tuple(sizes[side] if isinstance(side, str) else side for side in member.shape)
    if member.kind == "json":
        return {}
    if member.kind == "picture":
        pictures = np.stack([_picture(shape[0], rng) for _ in range(sizes["V"] if "{view}" in member.name else 1)])
        return pictures if "{view}" in member.name else pictures[0]
    match member.scale:
        case "unit":
            return rng.random(shape)
        case "depth":
            return rng.uniform(scales.near, scales.far, shape)
        case "box":
            return rng.uniform(-scales.box_side / 2, scales.box_side / 2, shape)
        case _ if member.dtype == "uint8":
            return rng.integers(0, 4, shape, dtype=np.uint8)
        case _:
            return rng.random(shape, dtype=np.float32)


def _picture(side: int, rng: np.random.Generator) -> np.ndarray:
    """Colours uint8 [side, side, 3] with detail, as a face has some."""
    grain = torch.from_numpy(rng.normal(128, _GRAIN, (1, 3, max(side // 4, 1), max(side // 4, 1))).astype(np.float32))
    smooth = torch.nn.functional.interpolate(grain, size=side, mode="bicubic")
    return smooth[0].permute(1, 2, 0).clamp(0, 255).byte().numpy()


def _stored(dataset: ShardDataset, frame: FrameEntry, names: Sequence[str]) -> list[tuple[memoryview, Member, str]]:
    """The bytes of members, in memory, and what decoding needs."""
    found = []
    for name in names:
        member, place = dataset.members["rgb.{view}" if name.startswith("rgb.") else name], frame.members[name]
        data = memoryview(dataset.storage.read(place.tar, place.offset, place.offset + place.size))
        found.append((data, member, member.extension("jpg")))
    return found


def _value(data: memoryview, member: Member, extension: str, scales: Scales, view: int) -> Any:
    """What `ShardDataset.read` gives for a member."""
    value = decode(data, extension)
    if member.kind != "array":
        return value
    return dequantise(value[view] if member.shape[:1] == ("V",) else value, member, scales)


def _batch_seconds(dataset: ShardDataset, config: BatchConfig, members: frozenset[str], samples: int) -> float:
    """Of one sample, when batches are asked for as fast as they come."""
    with BatchStream(dataset, config, 0, lambda seen: members) as batches:
        for _ in range(config.prefetch + 1):  # until memory is used again
            next(batches)
        begun = time.perf_counter()
        for _ in range(samples // config.size):
            next(batches)
        return (time.perf_counter() - begun) / samples


def _waits(dataset: ShardDataset, config: BatchConfig, members: frozenset[str], samples: int, step_s: float) -> list[float]:
    """Seconds that a loop which computes for `step_s` a batch waits for each batch but the first."""
    factor, waits = torch.rand(256, 256), []
    with BatchStream(dataset, config, 0, lambda seen: members) as batches:
        for _ in range(min(samples // BATCH, 6)):
            begun = time.perf_counter()
            next(batches)
            waits.append(time.perf_counter() - begun)
            while time.perf_counter() - begun < waits[-1] + step_s:
                factor @ factor
    return waits[1:]
