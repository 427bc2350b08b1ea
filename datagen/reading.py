"""Reading shards by byte offsets: nothing is listed or scanned, only the members asked for are read.

    dataset = open_dataset(folder)
    entry = dataset.frames[0]
    dataset.read(entry, ["rgb.0", "label", "depth", "identity.background"])

The same tars are read by webdataset, Hugging Face datasets, Ray Data and `tar`; this reader adds random access, the checks and the
conversion to scene units.
"""

from __future__ import annotations

import collections
import copy
import json
import mmap
import threading
import time
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from datagen.cache import Copy, FetchAhead, ShardCache, Tar
from datagen.exclusion import Exclusion
from datagen.index import INDEX, FrameEntry, Frames, Index, Place, build_index
from datagen.members import FAMILIES, Family, Scales, decode, dequantise, read_member_entries
from datagen.shards import check_schema, read_sidecar, remedy, sidecar_name
from datagen.storage import LocalFolder, Storage, open_storage
from head3d.run.errors import ConfigError, DataError

_TELL_EVERY_S = 1.0  # a cache is told that a copy is in use
_OPEN_FILES = 128  # tars kept mapped at once; mapping again costs a fraction of a millisecond


class ShardDataset:
    """An opened data set. Reading is safe from several threads; a copy sent to another process maps the files anew.

    Local tars are mapped into memory, and so are a cache's copies of remote ones (see `through`); without a cache, each member of a
    remote tar is one request for just its bytes.
    """

    def __init__(self, storage: Storage, manifest: dict[str, Any], index: Index, checksums: bool) -> None:
        self.storage, self.manifest, self.checksums = storage, manifest, checksums
        self.scales = Scales(manifest["depth"]["near"], manifest["depth"]["far"], manifest["box_side"])
        self.members = read_member_entries(manifest["members"], storage.where("dataset.json"))
        self._image_format = manifest["settings"]["shards"]["image_format"]
        self.tars = {name: Tar(name, *facts) for name, facts in index.tars().items()}
        self._member_counts = {family: len(index.columns[f"{family}/size"]) for family in FAMILIES}
        self.cache: ShardCache | None = None  # what it is read through
        self.excluded = Exclusion.from_manifest(manifest, storage.where("dataset.json"))
        self.frames: Sequence[FrameEntry] = Frames(index, self.excluded)
        self.excluded_count = self.frames.excluded  # frames that are there but not read
        self.dataset_count = 1  # see `reconstructor.mixture`
        self._forget_maps()

    def through(self, cache: ShardCache | None) -> ShardDataset:
        """The same data set, read through a cache (none: as it is)."""
        dataset = copy.copy(self)  # by __getstate__, so that it maps files of its own
        dataset.cache = cache
        return dataset

    def fetch_ahead(self, wanted: Iterable[tuple[int, FrameEntry, frozenset[str]]], shards: int) -> FetchAhead | None:
        """As the function `fetch_ahead`, of this data set alone."""
        return fetch_ahead([self], wanted, shards)

    def copies(self, entry: FrameEntry, members: Iterable[str]) -> frozenset[Copy]:
        """The files of the cache that members of a frame are read from; none if there is no cache."""
        if self.cache is None:
            return frozenset()
        return frozenset(Copy(self.cache, self.tars[entry.members[name].tar]) for name in members)

    def read(self, entry: FrameEntry, members: Sequence[str], dequantised: bool = True, view: int | None = None) -> dict[str, Any]:
        """Members of one frame by name: 'rgb.0', 'opacity', 'label', 'depth', 'json', 'identity.background', ...

        Pictures are uint8 [H, W, 3], 'parts' uint8, 'json' a dict, everything else float32 in scene units or [0, 1]; with
        dequantised=False arrays come as stored. Of arrays with a row for each view, `view` takes one, which is then the only one that is
        converted. A member's checksum is computed when it is first read, and whenever it comes by a request; otherwise only what is
        converted is looked at. Raises DataError naming file, key and member if one is missing or damaged.
        """
        each = map if self.cache is not None else self.storage.each  # requests travel side by side
        return dict(zip(members, each(lambda name: self._read_member(entry, name, dequantised, view), members), strict=True))

    def _read_member(self, entry: FrameEntry, name: str, dequantised: bool, view: int | None) -> Any:
        if name not in entry.members:
            raise DataError(
                f"{self.storage.where()}: frame {entry.key} has no member {name!r}; it has {', '.join(sorted(entry.members))}. "
                "Generate the data with that label (--render.labels, --labels_share 1), or do without"
            )
        place = entry.members[name]
        data = self._bytes_of(place)
        if self.checksums and not self._is_whole(place, data):
            if self.cache is not None:  # its copy was damaged since it arrived
                self._forget(place.tar)
                data = self._bytes_of(place)
            if self.cache is None or not self._is_whole(place, data):
                raise self._damage(entry, name, "the checksum does not match, so bytes have changed")
        member = self.members["rgb.{view}" if name.startswith("rgb.") else name]
        try:
            value = decode(data, member.extension(self._image_format))
        except ValueError as error:
            raise self._damage(entry, name, f"could not be decoded ({error})") from error
        if member.kind != "array":
            return value
        if view is not None and member.shape[:1] == ("V",):
            value = value[view]
        return dequantise(value, member, self.scales) if dequantised else value.copy()  # not a view of the file

    def _is_whole(self, place: Place, data: bytes | memoryview) -> bool:
        """Whether the checksum is right, or was when the member was first read from a file."""
        checked, from_file = self._checked[place.tar.partition("/")[0]], isinstance(data, memoryview)
        if not (from_file and checked[place.number]):
            checked[place.number] = zlib.crc32(data) == place.checksum
        return bool(checked[place.number])

    def _damage(self, entry: FrameEntry, name: str, what: str) -> DataError:
        place = entry.members[name]
        path = self.storage.where(place.tar)
        return DataError(f"{path}: key {entry.key}, member {name!r} at byte {place.offset}: {what}; {remedy(path)}")

    def _bytes_of(self, place: Place) -> bytes | memoryview:
        end = place.offset + place.size
        if self.cache is not None or isinstance(self.storage, LocalFolder):
            return memoryview(self._map(self.tars[place.tar]))[place.offset : end]
        try:
            return self.storage.read(place.tar, place.offset, end)
        except FileNotFoundError as error:
            path = self.storage.where(place.tar)
            raise DataError(f"{path}: could not be opened ({error}); {remedy(path)}") from error

    def _map(self, tar: Tar) -> mmap.mmap:
        with self._lock:
            if tar.name in self._maps and self._is_kept(tar):
                self._maps.move_to_end(tar.name)
                return self._maps[tar.name]
        path = self.storage.where(tar.name)
        try:  # without the lock: others read on while a file is fetched
            with Path(path).open("rb") if self.cache is None else self.cache.open(tar) as file:
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:  # ValueError: an empty file cannot be mapped
            raise DataError(f"{path}: could not be opened ({error}); {remedy(path)}") from error
        if len(mapped) != tar.size:
            raise DataError(f"{path}: expected {tar.size} bytes, got {len(mapped)}: cut short or from elsewhere; {remedy(path)}")
        with self._lock:
            self._maps[tar.name] = mapped
            if len(self._maps) > _OPEN_FILES:
                self._maps.popitem(last=False)  # unmapped when the last reader lets go of it
            if self.cache is not None:  # a copy that went takes up room until nobody maps it
                for name in [name for name in self._maps if not self.cache.holds(self.tars[name])]:
                    del self._maps[name]
        return mapped

    def _is_kept(self, tar: Tar) -> bool:
        """Tell the cache that a copy is in use, once in a while; False if it went meanwhile, so that its room on the disk is given back."""
        now = time.monotonic()
        if self.cache is None or now < self._told.get(tar.name, 0.0) + _TELL_EVERY_S:
            return True
        self._told[tar.name] = now
        return self.cache.used(tar)

    def _forget(self, tar: str) -> None:
        """Drop a damaged copy."""
        with self._lock:
            self._maps.pop(tar, None)
            self.cache.drop(self.tars[tar])

    def _forget_maps(self) -> None:
        self._checked = {family: np.zeros(count, bool) for family, count in self._member_counts.items()}  # members that were whole
        self._maps: collections.OrderedDict[str, mmap.mmap] = collections.OrderedDict()
        self._told: dict[str, float] = {}  # when the cache was told that a tar is in use
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_maps", "_checked", "_told", "_lock")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget_maps()


def fetch_ahead(
    datasets: Sequence[ShardDataset], wanted: Iterable[tuple[int, FrameEntry, frozenset[str]]], shards: int
) -> FetchAhead | None:
    """A thread that fetches what will be read into the caches of some data sets; none if they have no cache.

    wanted: (sample, frame, members), endless and ascending, of which `shards` shards are read at a time. Raises ConfigError if the
    caches, which share their room, cannot hold that many.
    """
    cached = [dataset for dataset in datasets if dataset.cache is not None]
    if not cached:
        return None
    limit, sizes = cached[0].cache.limit, collections.Counter()
    for number, dataset in enumerate(cached):
        for tar in dataset.tars.values():
            sizes[number, tar.name.rpartition("/")[2]] += tar.size
    together = sum(sorted(sizes.values())[-shards:])
    if together > limit:
        where = ", ".join(dataset.storage.where() for dataset in cached)
        raise ConfigError(
            f"cache.gigabytes: {limit / 1e9:g} cannot hold the {shards} shards of {where} that are read at a time, up to "
            f"{together / 1e9:.3g}; give the cache more room, or lower batches.shuffle_window"
        )
    known: dict[tuple[int, frozenset[str]], frozenset[Copy]] = {}  # the frames of a shard lie in the same files

    def copies(frame: FrameEntry, members: frozenset[str]) -> frozenset[Copy]:
        key = frame.shard, members
        if key not in known:
            known[key] = datasets[frame.dataset].copies(frame, members)
        return known[key]

    return FetchAhead(((sample, copies(frame, members)) for sample, frame, members in wanted), limit)


def open_dataset(place: Storage | Path | str, checksums: bool = True) -> ShardDataset:
    """Open the data set in a folder or at a URL through its index, or through the sidecars where that is missing or old.

    checksums: check each member's CRC-32 when it is first read (see `ShardDataset.read`). Raises DataError if there is no data
    set or one from another schema.
    """
    storage = open_storage(place)
    manifest = read_manifest(storage)
    try:
        index = Index.from_bytes(storage.read(INDEX), storage.where(INDEX))
    except FileNotFoundError:
        index = None
    if index is None or index.config_hash != manifest["config_hash"] or index.plan != manifest["plan"]:
        index = build_index(manifest, read_sidecars(storage, manifest), storage.where)
    return ShardDataset(storage, manifest, index, checksums)


def read_manifest(place: Storage | Path | str) -> dict[str, Any]:
    """dataset.json. Raises DataError if it is missing or from another schema."""
    storage = open_storage(place)
    path = storage.where("dataset.json")
    try:
        content = json.loads(storage.read("dataset.json"))
    except FileNotFoundError as error:
        raise DataError(
            f"{path}: there is no such file, so {storage.where()} holds no data set; "
            f"make one with `headfoundry datagen --out {storage.where()}`"
        ) from error
    except ValueError as error:
        raise DataError(
            f"{path}: could not be read as JSON ({error}); "
            "delete it and call the same `headfoundry datagen` command again, which rebuilds it"
        ) from error
    check_schema(content, path)
    return content


def read_sidecars(place: Storage | Path | str, manifest: dict[str, Any]) -> Iterator[tuple[Family, dict[str, Any]]]:
    """The sidecars of all shards of the plan that are there, in order. A shard without its frames' sidecar is not committed.

    Raises DataError if one is damaged or of other settings than the manifest's.
    """
    storage = open_storage(place)

    def read(shard: int) -> list[tuple[Family, dict[str, Any]]]:
        sidecars = [("frames", read_sidecar(storage, "frames", shard))]
        if sidecars[0][1] is not None:
            sidecars += [(family, read_sidecar(storage, family, shard)) for family in FAMILIES if family != "frames"]
        return [(family, sidecar) for family, sidecar in sidecars if sidecar is not None]

    for sidecars in storage.each(read, range(manifest["plan"]["shards"])):
        for family, sidecar in sidecars:
            if sidecar["config_hash"] != manifest["config_hash"]:
                path = storage.where(sidecar_name(family, sidecar["shard"]))
                raise DataError(
                    f"{path}: expected a shard of settings {manifest['config_hash']} as dataset.json says, got {sidecar['config_hash']}; "
                    f"two data sets are mixed here; {remedy(path)}"
                )
            yield family, sidecar


def index_of_sidecars(place: Storage | Path | str) -> Index:
    """The index as the sidecars are now. Raises DataError like `read_sidecars`."""
    storage = open_storage(place)
    manifest = read_manifest(storage)
    return build_index(manifest, read_sidecars(storage, manifest), storage.where)


def write_index(place: Storage | Path | str) -> None:
    """Rebuild the index from the sidecars."""
    open_storage(place).write(INDEX, index_of_sidecars(place).to_bytes())
