"""What a large data set will take: hours, bytes, files, requests, money, and what is full first. Plain arithmetic, stated here.

    N  = ceil(identities / identities a shard)                       shards
    t  = pictures a shard x seconds a picture                        rendering, encoding and packing one shard
    u  = bytes a shard x workers a node / node network + requests a shard x latency      putting it; a worker does this after t
    T  = (e^(l (t + u)) - 1) (1 / l + r)                             a shard where workers are lost at rate l and back after r
    h  = b + max(ceil(N / W) T, N bytes / store network, N writes / store writes a second, N d) + e
    b  = start + N latency / 32,   e = N families latency / 32       reading what is there; reading the sidecars into the index

The expression for T is that of work which begins anew at each failure (Duda 1983); its limit for l = 0 is t + u. A worker can do no
more than shards one after the other, so W workers need ceil(N / W) rounds. Storage and driver serve all workers, each at a pace of
its own; a pace is full at the number of workers that reach it together: pace x T. Requests are those of `datagen.storage`: a file is
put in one request below 100 MiB and in parts of 50 MiB above (s3fs), and its size is asked back.
"""

from __future__ import annotations

import collections
import math
from pathlib import Path
from typing import NamedTuple

from datagen.plan import open_plan
from datagen.reading import read_manifest, read_sidecars
from datagen.report import read_log
from datagen.storage import CONCURRENT, Storage, open_storage
from head3d.run.errors import DataError

ONE_PUT_BYTES, PART_BYTES = 100 << 20, 50 << 20  # of s3fs
DRIVER_S = 0.0017  # of the driver a shard, measured with Ray 2.60: 0.7 to 1.7 ms
HOURS_A_MONTH = 730


class Work(NamedTuple):
    """A data set to be made."""

    identities: int
    identities_per_shard: int
    pictures_per_identity: float
    frames_per_identity: float
    bytes_per_identity: dict[str, float]  # by family; labels: of an identity that has them
    labels_share: float  # of the shards

    @property
    def shards(self) -> int:
        return math.ceil(self.identities / self.identities_per_shard)

    def file_bytes(self) -> dict[str, float]:
        """Size of a whole shard's tars by family."""
        return {family: size * self.identities_per_shard for family, size in self.bytes_per_identity.items()}

    def share(self, family: str) -> float:
        """Of the shards, those that have the family."""
        return self.labels_share if family == "labels" else 1.0


class Farm(NamedTuple):
    """Who makes it, and where it is put."""

    workers: int
    seconds_per_picture: float  # of one worker
    workers_per_node: int
    node_gbit: float  # network of a node, Gbit/s
    store_gbit: float  # what the storage takes from all nodes together, Gbit/s
    store_writes_per_s: float  # files or parts put a second
    latency_s: float  # of a request
    start_s: float  # until a worker renders: Ray, the generator, the first kernels
    lost_per_hour: float  # workers lost, each worker


class Pace(NamedTuple):
    """Something that all workers share."""

    name: str
    seconds: float  # it alone would take for the whole set
    full_at: float  # workers that use all of it


class Forecast(NamedTuple):
    """What it takes."""

    shards: int
    pictures: float
    frames: float
    bytes: float
    writes: float
    reads: float
    render_s: float  # t
    put_s: float  # u
    shard_s: float  # T
    rounds: int
    seconds: float  # h, from beginning to end
    paces: list[Pace]  # what all workers share, the one that is full first at the front
    limit: str  # what the time is spent waiting for: "workers" or the name of a pace


def forecast(work: Work, farm: Farm) -> Forecast:
    """The arithmetic above. A last shard that is not full counts as full."""
    files, shards = work.file_bytes(), work.shards
    put_requests = {family: _put_requests(size) + 1 for family, size in files.items()}  # of the tar and its sidecar
    size = sum(files.values())  # of a shard with labels, which sets the time
    render_s = work.identities_per_shard * work.pictures_per_identity * farm.seconds_per_picture
    requests = sum(put_requests.values()) + 2 * len(files)  # each of the two files is asked for its size
    put_s = size * 8 * farm.workers_per_node / (farm.node_gbit * 1e9) + requests * farm.latency_s
    shard_s = _with_losses(render_s + put_s, farm.lost_per_hour / 3600, farm.start_s)
    stored = sum(size * work.share(family) for family, size in files.items()) * work.identities / work.identities_per_shard
    writes = shards * sum(count * work.share(family) for family, count in put_requests.items())
    families = sum(work.share(family) for family in files)
    paces = [
        Pace("storage network", stored * 8 / (farm.store_gbit * 1e9), 0),
        Pace("storage writes", writes / farm.store_writes_per_s, 0),
        Pace("driver", shards * DRIVER_S, 0),
    ]
    paces = [pace._replace(full_at=shards / pace.seconds * shard_s) for pace in paces]
    paces.append(Pace("shards", shard_s, shards))  # more workers than shards have nothing to do
    rounds = math.ceil(shards / farm.workers)
    slowest = max(paces, key=lambda pace: pace.seconds)
    begin_s, end_s = farm.start_s + shards * farm.latency_s / CONCURRENT, shards * families * farm.latency_s / CONCURRENT
    return Forecast(
        shards=shards,
        pictures=work.identities * work.pictures_per_identity,
        frames=work.identities * work.frames_per_identity,
        bytes=stored,
        writes=writes,
        reads=shards * (1 + 3 * families),  # is it there; two sizes and a sidecar for each family
        render_s=render_s,
        put_s=put_s,
        shard_s=shard_s,
        rounds=rounds,
        seconds=begin_s + max(rounds * shard_s, slowest.seconds) + end_s,
        paces=sorted(paces, key=lambda pace: pace.full_at),
        limit=slowest.name if slowest.seconds > rounds * shard_s else "workers",
    )


class Measured(NamedTuple):
    """What a small data set tells about a large one of the same settings."""

    seconds_per_picture: float  # of one worker, everything included
    identities_per_shard: int
    pictures_per_identity: float
    frames_per_identity: float
    bytes_per_identity: dict[str, float]  # by family, as `Work`


def measure(place: Storage | Path | str) -> Measured:
    """Read the log and the sidecars of a data set. Raises DataError if nothing in it was finished, or nobody knows how long it took."""
    storage = open_storage(place)
    plan = open_plan(storage)
    pictures: dict[int, int] = {}  # by shard
    sizes, people = collections.Counter(), collections.Counter()  # by family
    frames = 0
    for family, sidecar in read_sidecars(storage, read_manifest(storage)):
        sizes[family] += sidecar["bytes"]
        people[family] += len(plan.shard_identities(sidecar["shard"]))
        if family == "frames":
            frames += len(sidecar["samples"])
            pictures[sidecar["shard"]] = sum(sample["views"] for sample in sidecar["samples"])
    # The last time that each was made
    seconds = {report["shard"]: report["seconds"] for report in read_log(storage) if report["shard"] in pictures}
    if not seconds:
        raise DataError(
            f"{storage.where('log.jsonl')}: expected a line for each finished shard of {storage.where()}, found none of them; "
            "give a data set that was made here, or all the numbers by hand"
        )
    return Measured(
        seconds_per_picture=sum(seconds.values()) / sum(pictures[shard] for shard in seconds),
        identities_per_shard=plan.shards.identities_per_shard,
        pictures_per_identity=sum(pictures.values()) / people["frames"],
        frames_per_identity=frames / people["frames"],
        bytes_per_identity={family: size / people[family] for family, size in sizes.items()},
    )


def _put_requests(size: float) -> int:
    """Requests that put a file of that size: one, or those that begin and end it and one for each part."""
    return 1 if size < ONE_PUT_BYTES else 2 + math.ceil(size / PART_BYTES)


def _with_losses(seconds: float, lost_per_s: float, back_s: float) -> float:
    """Expected time of work that begins anew whenever its worker is lost."""
    if lost_per_s == 0:
        return seconds
    return math.expm1(lost_per_s * seconds) * (1 / lost_per_s + back_s)
