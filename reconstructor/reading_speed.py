"""How fast training samples are read: made-up shards of the published sizes, written by our writer and read by our reader.

What the pictures and maps show does not change the time; a picture has as many bytes as a rendered head.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from datagen.members import FAMILIES, Member, Scales, ShardConfig, decode, dequantise, encode_sample
from datagen.plan import GeneratorFacts, Plan, manifest_text, versions
from datagen.reading import ShardDataset, open_dataset, write_index
from datagen.recipes import RecipeConfig, draw_identity
from datagen.render import RenderConfig, dataset_scales
from datagen.shards import sample_key, write_shard
from genhead.generator import GenHeadConfig
from head3d.run.config import to_dict
from head3d.run.seeding import numpy_generator
from reconstructor.batches import BatchStream, read_item
from reconstructor.losses import LossConfig, members_needed
from reconstructor.order import BatchConfig, ItemOrder

BATCH = 4  # samples that a process reads at a time: the published micro-batch
_GRAIN = 12.0  # standard deviation of the colours of a made-up picture at a quarter of its side: some 85 kB at 512 x 512


class ReadingTime(NamedTuple):
    """Seconds of one sample with all labels, one thread, from pages that the system holds."""

    megabytes: float  # as stored, of the members that are read
    memory_s: float  # decode them from bytes in memory, and convert them to the units of training
    read_s: float  # the same by the reader: find, map, check, decode, and convert the view that is wanted
    sample_s: float  # a training sample: the same, the source's picture and label, pictures as floats
    wait_s: float  # a batch of BATCH, for a training loop that computes for a second between two of them


def measure_reading(generator: GenHeadConfig, samples: int, step_s: float = 1.0) -> ReadingTime:
    """Write a small set for pictures and maps of a generator's sizes, and read `samples` training samples of it."""
    with tempfile.TemporaryDirectory() as folder:
        dataset = write_made_up(Path(folder), generator)
        members = members_needed(LossConfig(), 0)
        order = ItemOrder(dataset.frames, BatchConfig(size=2), seed=0)
        items = [order.item(position) for position in range(samples)]
        wanted = [(dataset.frames[item.target], sorted(members | {"label", f"rgb.{item.target_view}"})) for item in items]
        stored = [[_stored(dataset, entry.members[name], name) for name in names] for entry, names in wanted]

        def from_memory(index: int) -> list[Any]:
            return [_value(data, member, extension, dataset.scales) for data, member, extension in stored[index]]

        memory_s = _median(from_memory, samples)
        read_s = _median(lambda index: dataset.read(*wanted[index], view=items[index].target_view), samples)
        sample_s = _median(lambda index: read_item(dataset, items[index], members), samples)
        waits = _waits(dataset, members, samples, step_s)
    megabytes = sum(len(data) for sample in stored for data, _, _ in sample) / samples / 1e6
    return ReadingTime(megabytes, memory_s, read_s, sample_s, statistics.median(waits))


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


def _stored(dataset: ShardDataset, place: Any, name: str) -> tuple[bytes, Member, str]:
    """The bytes of a member, in memory, and what decoding needs."""
    member = dataset.members["rgb.{view}" if name.startswith("rgb.") else name]
    return dataset.storage.read(place.tar, place.offset, place.offset + place.size), member, member.extension("jpg")


def _value(data: bytes, member: Member, extension: str, scales: Scales) -> Any:
    value = decode(data, extension)
    return dequantise(value, member, scales) if member.kind == "array" else value


def _median(work: Callable[[int], object], count: int) -> float:
    """Of the seconds of `work(0)`, `work(1)`, ..., each done once before."""
    seconds = []
    for index in range(count):
        work(index)
        begun = time.perf_counter()
        work(index)
        seconds.append(time.perf_counter() - begun)
    return statistics.median(seconds)


def _waits(dataset: ShardDataset, members: frozenset[str], samples: int, step_s: float) -> list[float]:
    """Seconds that a loop which computes for `step_s` a batch waits for each batch but the first."""
    factor, waits = torch.rand(256, 256), []
    with BatchStream(dataset, BatchConfig(size=BATCH), 0, lambda seen: members) as batches:
        for _ in range(max(samples // BATCH, 2)):
            begun = time.perf_counter()
            next(batches)
            waits.append(time.perf_counter() - begun)
            while time.perf_counter() - begun < waits[-1] + step_s:
                factor @ factor
    return waits[1:]
