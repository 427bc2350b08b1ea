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

from datagen.members import FAMILIES, MEMBERS, Family, Member, Scales, decode, dequantise, json_bytes
from datagen.shards import SCHEMA, check_schema, read_sidecar, remedy, shard_path
from head3d.run.errors import DataError
from head3d.run.files import write_atomic

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
    members: dict[str, tuple[str, int, int]]  # name as asked for -> (path, offset, size in bytes)
    checksums: dict[str, int]  # name -> CRC-32 of those bytes


class ShardDataset:
    """An opened data set. Reading is safe from several threads; a copy sent to another process maps the files anew."""

    def __init__(self, folder: Path, manifest: dict[str, Any], sidecars: dict[Family, list[dict[str, Any]]], checksums: bool) -> None:
        self.folder, self.manifest, self.checksums = folder, manifest, checksums
        self.scales = Scales(manifest["depth"]["near"], manifest["depth"]["far"], manifest["box_side"])
        self._image_format = manifest["settings"]["shards"]["image_format"]
        self._bytes = {
            str(shard_path(folder, family, sidecar["shard"])): sidecar["bytes"] for family in FAMILIES for sidecar in sidecars[family]
        }
        self.frames: list[FrameEntry] = _frame_entries(folder, sidecars)
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
                f"{self.folder}: frame {entry.key} has no member {name!r}; it has {', '.join(sorted(entry.members))}. "
                "Generate the data with labels (--labels_share 1), or do without"
            )
        path, offset, size = entry.members[name]
        data = memoryview(self._map(path))[offset : offset + size]
        where = f"{path}: key {entry.key}, member {name!r} at byte {offset}"
        if self.checksums and zlib.crc32(data) != entry.checksums[name]:
            raise DataError(f"{where}: the checksum does not match, so bytes have changed; {remedy(Path(path))}")
        member = _MEMBER_OF["rgb.{view}" if name.startswith("rgb.") else name]
        try:
            value = decode(data, member.extension(self._image_format))
        except ValueError as error:
            raise DataError(f"{where}: could not be decoded ({error}); {remedy(Path(path))}") from error
        return dequantise(value, member, self.scales) if dequantised and member.kind == "array" else value

    def _map(self, path: str) -> mmap.mmap:
        with self._lock:
            if path in self._maps:
                self._maps.move_to_end(path)
                return self._maps[path]
            try:
                with Path(path).open("rb") as file:
                    mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            except (OSError, ValueError) as error:  # ValueError: an empty file cannot be mapped
                raise DataError(f"{path}: could not be opened ({error}); {remedy(Path(path))}") from error
            if len(mapped) != self._bytes[path]:
                raise DataError(
                    f"{path}: expected {self._bytes[path]} bytes, got {len(mapped)}: cut short or from elsewhere; {remedy(Path(path))}"
                )
            self._maps[path] = mapped
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


def open_dataset(folder: Path | str, checksums: bool = True) -> ShardDataset:
    """Open the data set in `folder` through its index.json, or through the sidecars where that is missing or old.

    checksums: check each member's CRC-32 when it is read (under a tenth of decoding a picture). Raises DataError if the folder holds
    no data set or one from another schema.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    index = folder / "index.json"
    sidecars = None
    if index.exists():
        content = _read_json(index)
        check_schema(content, index)
        if content["config_hash"] == manifest["config_hash"] and content["plan"] == manifest["plan"]:
            sidecars = {family: content["shards"][family] for family in FAMILIES}
    if sidecars is None:
        sidecars = read_sidecars(folder, manifest)
    return ShardDataset(folder, manifest, sidecars, checksums)


def read_manifest(folder: Path) -> dict[str, Any]:
    """dataset.json. Raises DataError if it is missing or from another schema."""
    path = Path(folder) / "dataset.json"
    if not path.exists():
        raise DataError(f"{path}: there is no such file, so {folder} holds no data set; make one with `headfoundry datagen --out {folder}`")
    content = _read_json(path)
    check_schema(content, path)
    return content


def read_sidecars(folder: Path, manifest: dict[str, Any]) -> dict[Family, list[dict[str, Any]]]:
    """The sidecars of all shards of the plan that are there, in order. A shard without its frames' sidecar is not committed.

    Raises DataError if one is damaged or of other settings than the manifest's.
    """
    found: dict[Family, list[dict[str, Any]]] = {family: [] for family in FAMILIES}
    for shard in range(manifest["plan"]["shards"]):
        if not shard_path(folder, "frames", shard).with_suffix(".json").exists():
            continue
        for family in FAMILIES:
            path = shard_path(folder, family, shard).with_suffix(".json")
            if not path.exists():
                continue
            sidecar = read_sidecar(path, family, shard)
            if sidecar["config_hash"] != manifest["config_hash"]:
                raise DataError(
                    f"{path}: expected a shard of settings {manifest['config_hash']} as dataset.json says, got {sidecar['config_hash']}; "
                    f"two data sets are mixed here; {remedy(path)}"
                )
            found[family].append(sidecar)
    return found


def write_index(folder: Path) -> None:
    """Rebuild index.json from the sidecars."""
    manifest = read_manifest(folder)
    index = {"schema": SCHEMA, "config_hash": manifest["config_hash"], "plan": manifest["plan"], "shards": read_sidecars(folder, manifest)}
    write_atomic(Path(folder) / "index.json", json_bytes(index))


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path}: could not be read as JSON ({error}); "
            "delete it and call the same `headfoundry datagen` command again, which rebuilds it"
        ) from error


def _frame_entries(folder: Path, sidecars: dict[Family, list[dict[str, Any]]]) -> list[FrameEntry]:
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
                path = str(shard_path(folder, family, found[0]))
                for extension, (offset, size, checksum) in found[1]["members"].items():
                    name = asked_name(family, extension)
                    places[name], sums[name] = (path, offset, size), checksum
            facts = {field: sample[field] for field in ("key", "identity", "motion", "kind", "split", "views")}
            entries.append(FrameEntry(shard=sidecar["shard"], members=places, checksums=sums, **facts))
    return entries


def asked_name(family: Family, extension: str) -> str:
    """The name by which readers ask for a member: 'rgb.0.jpg' is 'rgb.0'; members of an identity begin with 'identity.'."""
    name = extension if extension == "json" else extension.rpartition(".")[0]
    return f"identity.{name}" if family == "identities" else name


_MEMBER_OF: dict[str, Member] = {("identity." if member.family == "identities" else "") + member.name: member for member in MEMBERS}
