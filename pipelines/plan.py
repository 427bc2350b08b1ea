"""`headfoundry plan`: what a large data set will take, from a small one that was made or from numbers."""

from __future__ import annotations

import dataclasses
import datetime

from datagen.forecast import HOURS_A_MONTH, Farm, Forecast, Work, forecast, measure
from head3d.run.config import Fraction, NonNegativeFloat, PositiveFloat, PositiveInt
from head3d.run.errors import ConfigError

OF_THE_SET = ("seconds_per_picture", "identities_per_shard", "pictures_per_identity", "frames_per_identity")
OF_FAMILIES = {"frames": "frame_kb_per_identity", "labels": "label_kb_per_identity", "identities": "shared_kb_per_identity"}


@dataclasses.dataclass(frozen=True)
class PlanRun:
    """Forecast hours, bytes, requests and cost of a data set, and what is full first. The formulas are in datagen/forecast.py."""

    identities: PositiveFloat = 1e6  # people; 1e6 is allowed
    workers: PositiveInt = 500  # that render at once
    measured: str | None = None  # a data set made with the same settings: its log and sidecars give what is not given below
    seconds_per_picture: PositiveFloat | None = None  # of one worker, encoding and packing included
    identities_per_shard: PositiveInt | None = None
    pictures_per_identity: PositiveFloat | None = None  # motions x views, on average
    frames_per_identity: PositiveFloat | None = None  # motions, on average
    frame_kb_per_identity: NonNegativeFloat | None = None  # kB in the family frames
    label_kb_per_identity: NonNegativeFloat | None = None  # kB in the family labels, where there are labels
    shared_kb_per_identity: NonNegativeFloat | None = None  # kB in the family identities
    labels_share: Fraction = 1.0  # of the shards that carry the family labels
    gpus_per_worker: NonNegativeFloat = 1.0  # for the cost; 0 counts no GPU
    workers_per_node: PositiveInt = 8  # that share a node's network
    node_gbit: PositiveFloat = 10.0  # network of a node, Gbit/s
    store_gbit: PositiveFloat = 100.0  # what the storage takes from all nodes together, Gbit/s
    store_writes_per_s: PositiveFloat = 3500.0  # requests that write, a second; Amazon S3's stated least for one prefix
    latency_s: NonNegativeFloat = 0.05  # of a request to the storage
    start_s: NonNegativeFloat = 60.0  # until a worker renders: its machine is up, Ray and the generator are loaded
    lost_per_hour: NonNegativeFloat = 0.0  # times an hour that a worker is lost; 0.05 is usual for machines sold by the moment
    gpu_hour_price: NonNegativeFloat = 0.0  # money for a GPU and an hour
    thousand_writes_price: NonNegativeFloat = 0.0  # money for a thousand requests that write
    gb_month_price: NonNegativeFloat = 0.0  # money for keeping a GB (1e9 bytes) a month

    def __post_init__(self) -> None:
        if not float(self.identities).is_integer():
            raise ValueError(f"identities: expected a whole number, got {self.identities}")


def main(config: PlanRun) -> None:
    """Print the forecast. Raises ConfigError if a number is neither given nor measured."""
    work, seconds_per_picture = resolve_work(config)
    farm = Farm(
        workers=config.workers,
        seconds_per_picture=seconds_per_picture,
        workers_per_node=config.workers_per_node,
        node_gbit=config.node_gbit,
        store_gbit=config.store_gbit,
        store_writes_per_s=config.store_writes_per_s,
        latency_s=config.latency_s,
        start_s=config.start_s,
        lost_per_hour=config.lost_per_hour,
    )
    for line in describe(config, work, farm, forecast(work, farm)):
        print(line)


def resolve_work(config: PlanRun) -> tuple[Work, float]:
    """The work and the seconds a picture: what is given, and else what is measured."""
    found = measure(config.measured)._asdict() if config.measured is not None else {}
    sizes = {family: size / 1e3 for family, size in found.get("bytes_per_identity", {}).items()}
    given = {name: getattr(config, name) for name in OF_THE_SET} | {setting: getattr(config, setting) for setting in OF_FAMILIES.values()}
    known = {name: found.get(name) for name in OF_THE_SET} | {
        setting: sizes.get(family, 0.0) if found else None for family, setting in OF_FAMILIES.items()
    }
    values = {name: known[name] if value is None else value for name, value in given.items()}
    missing = [name for name, value in values.items() if value is None]
    if missing:
        raise ConfigError(
            f"expected --measured DIR (a data set made with the same settings) or all of its numbers, got neither for {', '.join(missing)}"
        )
    work = Work(
        identities=int(config.identities),
        identities_per_shard=values["identities_per_shard"],
        pictures_per_identity=values["pictures_per_identity"],
        frames_per_identity=values["frames_per_identity"],
        bytes_per_identity={family: values[setting] * 1e3 for family, setting in OF_FAMILIES.items() if values[setting]},
        labels_share=config.labels_share,
    )
    return work, values["seconds_per_picture"]


def describe(config: PlanRun, work: Work, farm: Farm, result: Forecast) -> list[str]:
    """The lines that are printed."""
    hours, gpus = result.seconds / 3600, farm.workers * config.gpus_per_worker
    busy = work.shards * result.shard_s / (farm.workers * result.seconds)
    parts = [f"{family} {_size(_stored(work, family))}" for family in work.bytes_per_identity]
    rows = [
        ("people, frames, pictures", f"{work.identities:,}, {result.frames:,.0f}, {result.pictures:,.0f}"),
        ("shards", f"{result.shards:,} of {work.identities_per_shard} people, {_size(sum(work.file_bytes().values()))} each"),
        ("bytes", f"{_size(result.bytes)}: {', '.join(parts)}"),
        ("requests", f"{result.writes:,.0f} writes, {result.reads:,.0f} reads"),
        (
            "one shard",
            f"{result.render_s:.1f} s rendering, {result.put_s:.1f} s putting ({result.put_s / (result.render_s + result.put_s):.1%}), "
            f"{result.shard_s:.1f} s with lost workers",
        ),
        ("time", f"{_duration(result.seconds)} ({hours:,.2f} hours) in {result.rounds:,} rounds, waiting for: {result.limit}"),
        ("workers", f"{farm.workers:,} on {-(-farm.workers // farm.workers_per_node):,} nodes, busy {min(busy, 1):.0%} of the time"),
        ("pictures a second", f"{result.pictures / result.seconds:,.1f}, {result.pictures / result.seconds / farm.workers:.3f} a worker"),
        ("storage", f"{result.bytes * 8 / result.seconds / 1e9:,.2f} Gbit/s, {result.writes / result.seconds:,.1f} writes/s on average"),
        ("GPU hours", f"{gpus * hours:,.0f}"),
        (
            "cost",
            f"{gpus * hours * config.gpu_hour_price:,.0f} for GPUs, {result.writes / 1e3 * config.thousand_writes_price:,.0f} for writes, "
            f"{result.bytes / 1e9 * config.gb_month_price:,.0f} a month for keeping it "
            f"({result.bytes / 1e9 * config.gb_month_price * hours / HOURS_A_MONTH:,.0f} while it is made)",
        ),
    ]
    lines = [f"{name:<26}{text}" for name, text in rows]
    lines.append(f"{'full first':<26}{result.paces[0].name}, at {result.paces[0].full_at:,.0f} workers")
    lines += [f"{'then':<26}{pace.name}, at {pace.full_at:,.0f} workers" for pace in result.paces[1:]]
    return lines


def _stored(work: Work, family: str) -> float:
    return work.bytes_per_identity[family] * work.share(family) * work.identities


def _size(count: float) -> str:
    """Bytes in powers of 1000."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} PB"


def _duration(seconds: float) -> str:
    return str(datetime.timedelta(seconds=round(seconds)))


CONFIG = PlanRun
