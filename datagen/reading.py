"""Reading shards by byte offsets: nothing is listed or scanned, only the members asked for are read.

    dataset = open_dataset(folder)
    entry = dataset.frames[0]
    dataset.read(entry, ["rgb.0", "label", "depth", "identity.background"])

The same tars are read by webdataset, Hugging Face datasets, Ray Data and `tar`; this reader adds random access, the checks and the
conversion to scene units.
"""

from __future__ import annotations

import collections
import json
import mmap
import threading
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from datagen.exclusion import Exclusion
from datagen.members import FAMILIES, Family, Scales, decode, dequantise, json_bytes, read_member_entries
from datagen.shards import SCHEMA, check_schema, read_sidecar, remedy, shard_name, sidecar_name
from datagen.storage import LocalFolder, Storage, open_storage
from head3d.run.errors import DataError

_OPEN_FILES = 128  # tars kept mapped at once; mapping again costs a fraction of a millisecond


class FrameEntry(NamedTuple):
    """Where one frame lies: one (identity, motion) with all its views."""

    key: str
    shard: int
    identity: int
    motion: int
    kind: str  # static, dynamic
    split: str  # train, val or test
    views: int
    members: dict[str, tuple[str, int, int]]  # name as asked for -> (tar, offset, size in bytes)
    checksums: dict[str, int]  # name -> CRC-32 of those bytes


class ShardDataset:
    """An opened data set. Reading is safe from several threads; a copy sent to another process maps the files anew.

    Local tars are mapped into memory; elsewhere, each member is one request for just its bytes.
    """

    def __init__(self, storage: Storage, manifest: dict[str, Any], sidecars: dict[Family, list[dict[str, Any]]], checksums: bool) -> None:
        self.storage, self.manifest, self.checksums = storage, manifest, checksums
        self.scales = Scales(manifest["depth"]["near"], manifest["depth"]["far"], manifest["box_side"])
        self._members = read_member_entries(manifest["members"], storage.where("dataset.json"))
        self._image_format = manifest["settings"]["shards"]["image_format"]
        self._bytes = {shard_name(family, sidecar["shard"]): sidecar["bytes"] for family in FAMILIES for sidecar in sidecars[family]}
        self.excluded = Exclusion.from_manifest(manifest, storage.where("dataset.json"))
        entries = _frame_entries(sidecars)
        self.frames: list[FrameEntry] = [entry for entry in entries if not self.excluded.covers(entry.identity, entry.key)]
        self.excluded_count = len(entries) - len(self.frames)  # frames that are there but not read
        self._forget_maps()

    def read(self, entry: FrameEntry, members: Sequence[str], dequantised: bool = True) -> dict[str, Any]:
        """Members of one frame by name: 'rgb.0', 'opacity', 'label', 'depth', 'json', 'identity.background', ...

        Pictures are uint8 [H, W, 3], 'parts' uint8, 'json' a dict, everything else float32 in scene units or [0, 1]; with
        dequantised=False arrays come as stored. Raises DataError naming file, key and member if one is missing or damaged.
        """
        return {name: self._read_member(entry, name, dequantised) for name in members}

    def _read_member(self, entry: FrameEntry, name: str, dequantised: bool) -> Any:
        if name not in entry.members:
            raise DataError(
                f"{self.storage.where()}: frame {entry.key} has no member {name!r}; it has {', '.join(sorted(entry.members))}. "
                "Generate the data with that label (--render.labels, --labels_share 1), or do without"
            )
        tar, offset, size = entry.members[name]
        path = self.storage.where(tar)
        data = self._bytes_of(tar, offset, size)
        where = f"{path}: key {entry.key}, member {name!r} at byte {offset}"
        if self.checksums and zlib.crc32(data) != entry.checksums[name]:
            raise DataError(f"{where}: the checksum does not match, so bytes have changed; {remedy(path)}")
        member = self._members["rgb.{view}" if name.startswith("rgb.") else name]
        try:
            value = decode(data, member.extension(self._image_format))
        except ValueError as error:
            raise DataError(f"{where}: could not be decoded ({error}); {remedy(path)}") from error
        return dequantise(value, member, self.scales) if dequantised and member.kind == "array" else value

    def _bytes_of(self, tar: str, offset: int, size: int) -> bytes | memoryview:
        if isinstance(self.storage, LocalFolder):
            return memoryview(self._map(tar, self.storage.folder / tar))[offset : offset + size]
        try:
            return self.storage.read(tar, offset, offset + size)
        except FileNotFoundError as error:
            path = self.storage.where(tar)
            raise DataError(f"{path}: could not be opened ({error}); {remedy(path)}") from error

    def _map(self, tar: str, path: Path) -> mmap.mmap:
        with self._lock:
            if tar in self._maps:
                self._maps.move_to_end(tar)
                return self._maps[tar]
            try:
                with path.open("rb") as file:
                    mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            except (OSError, ValueError) as error:  # ValueError: an empty file cannot be mapped
                raise DataError(f"{path}: could not be opened ({error}); {remedy(str(path))}") from error
            if len(mapped) != self._bytes[tar]:
                raise DataError(
                    f"{path}: expected {self._bytes[tar]} bytes, got {len(mapped)}: cut short or from elsewhere; {remedy(str(path))}"
                )
            self._maps[tar] = mapped
            if len(self._maps) > _OPEN_FILES:
                self._maps.popitem(last=False)  # unmapped when the last reader lets go of it
            return mapped

    def _forget_maps(self) -> None:
        self._maps: collections.OrderedDict[str, mmap.mmap] = collections.OrderedDict()
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_maps", "_lock")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget_maps()


def open_dataset(place: Storage | Path | str, checksums: bool = True) -> ShardDataset:
    """Open the data set in a folder or at a URL through its index.json, or through the sidecars where that is missing or old.

    checksums: check each member's CRC-32 when it is read (under a tenth of decoding a picture). Raises DataError if there is no data
    set or one from another schema.
    """
    storage = open_storage(place)
    manifest = read_manifest(storage)
    content = _read_json(storage, "index.json")
    if content is not None and content["config_hash"] == manifest["config_hash"] and content["plan"] == manifest["plan"]:
        sidecars = {family: content["shards"][family] for family in FAMILIES}
    else:
        sidecars = read_sidecars(storage, manifest)
    return ShardDataset(storage, manifest, sidecars, checksums)


def read_manifest(place: Storage | Path | str) -> dict[str, Any]:
    """dataset.json. Raises DataError if it is missing or from another schema."""
    storage = open_storage(place)
    content = _read_json(storage, "dataset.json")
    if content is None:
        raise DataError(
            f"{storage.where('dataset.json')}: there is no such file, so {storage.where()} holds no data set; "
            f"make one with `headfoundry datagen --out {storage.where()}`"
        )
    return content


def read_sidecars(place: Storage | Path | str, manifest: dict[str, Any]) -> dict[Family, list[dict[str, Any]]]:
    """The sidecars of all shards of the plan that are there, in order. A shard without its frames' sidecar is not committed.

    Raises DataError if one is damaged or of other settings than the manifest's.
    """
    storage = open_storage(place)

    def read(shard: int) -> list[tuple[Family, dict[str, Any]]]:
        sidecars = [("frames", read_sidecar(storage, "frames", shard))]
        if sidecars[0][1] is not None:
            sidecars += [(family, read_sidecar(storage, family, shard)) for family in FAMILIES if family != "frames"]
        return [(family, sidecar) for family, sidecar in sidecars if sidecar is not None]

    found: dict[Family, list[dict[str, Any]]] = {family: [] for family in FAMILIES}
    for sidecars in storage.each(read, range(manifest["plan"]["shards"])):
        for family, sidecar in sidecars:
            if sidecar["config_hash"] != manifest["config_hash"]:
                path = storage.where(sidecar_name(family, sidecar["shard"]))
                raise DataError(
                    f"{path}: expected a shard of settings {manifest['config_hash']} as dataset.json says, got {sidecar['config_hash']}; "
                    f"two data sets are mixed here; {remedy(path)}"
                )
            found[family].append(sidecar)
    return found


def write_index(place: Storage | Path | str) -> None:
    """Rebuild index.json from the sidecars."""
    storage = open_storage(place)
    manifest = read_manifest(storage)
    index = {"schema": SCHEMA, "config_hash": manifest["config_hash"], "plan": manifest["plan"], "shards": read_sidecars(storage, manifest)}
    storage.write("index.json", json_bytes(index))


def _read_json(storage: Storage, name: str) -> Any:
    """A JSON file of the set; None if there is none."""
    try:
        content = json.loads(storage.read(name))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise DataError(
            f"{storage.where(name)}: could not be read as JSON ({error}); "
            "delete it and call the same `headfoundry datagen` command again, which rebuilds it"
        ) from error
    check_schema(content, storage.where(name))
    return content


def _frame_entries(sidecars: dict[Family, list[dict[str, Any]]]) -> list[FrameEntry]:
    """Join the families: labels by the frame's key, identity members by the identity."""
    labels = {sample["key"]: (sidecar["shard"], sample) for sidecar in sidecars["labels"] for sample in sidecar["samples"]}
    identities = {sample["identity"]: (sidecar["shard"], sample) for sidecar in sidecars["identities"] for sample in sidecar["samples"]}
    entries = []
    for sidecar in sidecars["frames"]:
        for sample in sidecar["samples"]:
            places, sums = {}, {}
            for family, found in (
                ("frames", (sidecar["shard"], sample)),
                ("labels", labels.get(sample["key"])),
                ("identities", identities.get(sample["identity"])),
            ):
                if found is None:
                    continue
                tar = shard_name(family, found[0])
                for extension, (offset, size, checksum) in found[1]["members"].items():
                    name = asked_name(family, extension)
                    places[name], sums[name] = (tar, offset, size), checksum
            facts = {field: sample[field] for field in ("key", "identity", "motion", "kind", "split", "views")}
            entries.append(FrameEntry(shard=sidecar["shard"], members=places, checksums=sums, **facts))
    return entries


def asked_name(family: Family, extension: str) -> str:
    """The name by which readers ask for a member: 'rgb.0.jpg' is 'rgb.0'; members of an identity begin with 'identity.'."""
    name = extension if extension == "json" else extension.rpartition(".")[0]
    return f"identity.{name}" if family == "identities" else name
