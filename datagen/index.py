"""The index of a data set: what all its sidecars say, as columns of numbers, so that a million frames open in a second.

    index.safetensors
      {family}/shard     i32 [S]       S shards of the family that are committed, ascending
      {family}/bytes     i64 [S]       of the tar;  {family}/sha256  u8 [S, 32];  {family}/samples  i32 [S]
      {family}/sidecar   u8 [S, 32]    SHA-256 of the sidecar, so that `verify` sees whether it changed
      {family}/identity  i32 [N]       N samples, shard after shard;  {family}/layout  u16 [N]: which list of member names
      {family}/size      u32 [K]       K members, sample after sample, in the order of the tar;  {family}/checksum  u32 [K]: CRC-32
      frames/motion, views  i32 [N];  frames/kind, split  u8 [N]
      metadata                         JSON: schema, config hash, plan, and the words that numbers above stand for

A frame takes some 150 bytes here, and 200 in memory. Keys and offsets are not stored, for they follow: samples of a shard are counted
from 0, and members lie one after another, each behind a header of one block and padded to blocks.
"""

from __future__ import annotations

import array
import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import safetensors
import safetensors.numpy

from datagen.exclusion import Exclusion
from datagen.members import FAMILIES, Family, json_bytes
from datagen.shards import BLOCK, SCHEMA, check_schema, remedy, sample_key, shard_name, sidecar_name
from head3d.run.errors import DataError

INDEX = "index.safetensors"
_WORDS = ("layout", "kind", "split")  # columns of numbers that stand for words


class Place(NamedTuple):
    """Where the bytes of one member lie."""

    tar: str  # name of the file
    offset: int
    size: int  # bytes
    checksum: int  # CRC-32
    number: int  # counts the members of its family, over all shards


class FrameEntry(NamedTuple):
    """One frame: one (identity, motion) with all its views."""

    key: str
    shard: int
    identity: int
    motion: int
    kind: str  # static, dynamic, motion-rich
    split: str  # train, val or test
    views: int
    members: Mapping[str, Place]  # by the name that is asked for; looked up when it is used
    dataset: int = 0  # its number among data sets that are read together


@dataclasses.dataclass(frozen=True)
class Index:
    """The sidecars of a data set as columns; see above."""

    config_hash: str
    plan: dict[str, Any]  # of dataset.json
    words: dict[str, list[Any]]  # by column, what its numbers stand for
    columns: dict[str, np.ndarray]

    def to_bytes(self) -> bytes:
        """The file; equal sidecars give equal bytes."""
        facts = {"schema": SCHEMA, "config_hash": self.config_hash, "plan": self.plan, "words": self.words}
        return safetensors.numpy.save(self.columns, {"index": json_bytes(facts).decode()})

    @classmethod
    def from_bytes(cls, data: bytes, where: str) -> Index:
        """Inverse of `to_bytes`. Raises DataError if the file is damaged or from another schema."""
        try:
            facts = json.loads(_metadata(data)["index"])
            columns = safetensors.numpy.load(data)
            absent = sorted({f"{family}/{name}" for family in FAMILIES for name in _types(family)} - columns.keys())
            if absent:
                raise ValueError(f"{', '.join(absent)} is missing")
        except (safetensors.SafetensorError, ValueError, LookupError, TypeError) as error:
            raise DataError(
                f"{where}: could not be read as an index ({error}); "
                "delete it and call the same `headfoundry datagen` command again, which rebuilds it"
            ) from error
        check_schema(facts, where)
        return cls(facts["config_hash"], facts["plan"], facts["words"], columns)

    def tars(self) -> dict[str, tuple[int, str]]:
        """Bytes and SHA-256 of every tar by its name."""
        sizes, digests = self._by_shard("bytes"), self._by_shard("sha256")
        return {shard_name(*place): (size.item(), digests[place].tobytes().hex()) for place, size in sizes.items()}

    def sidecars(self) -> dict[str, bytes]:
        """SHA-256 of every sidecar by its name."""
        return {sidecar_name(*place): digest.tobytes() for place, digest in self._by_shard("sidecar").items()}

    def _by_shard(self, column: str) -> dict[tuple[Family, int], np.ndarray]:
        return {
            (family, shard): value
            for family in FAMILIES
            for shard, value in zip(self.columns[f"{family}/shard"].tolist(), self.columns[f"{family}/{column}"], strict=True)
        }


def build_index(manifest: dict[str, Any], sidecars: Iterable[tuple[Family, dict[str, Any]]], where: Callable[[str], str]) -> Index:
    """The index of the sidecars, which come in the order of their shards. Raises DataError if one does not describe a tar of ours.

    where: the address of a file, for messages.
    """
    columns = {family: _Columns(family) for family in FAMILIES}
    words: dict[str, dict[Any, int]] = {name: {} for name in _WORDS}
    for family, sidecar in sidecars:
        try:
            columns[family].add(sidecar, words)
        except (LookupError, TypeError, ValueError, OverflowError) as error:
            path = where(sidecar_name(family, sidecar["shard"]))
            raise DataError(f"{path}: it does not describe a tar of ours ({type(error).__name__}: {error}); {remedy(path)}") from error
    return Index(
        manifest["config_hash"],
        manifest["plan"],
        {name: list(numbers) for name, numbers in words.items()},
        {f"{family}/{name}": column for family in FAMILIES for name, column in columns[family].arrays().items()},
    )


def _types(family: Family) -> dict[str, str]:
    """The columns of a family, each with its number format; hashes are bytes, 32 a shard."""
    of_shards = {"shard": "i", "bytes": "q", "samples": "i", "sha256": "B", "sidecar": "B"}
    of_samples = {"identity": "i", "layout": "H"} | ({"motion": "i", "views": "i", "kind": "B", "split": "B"} if family == "frames" else {})
    return of_shards | of_samples | {"size": "I", "checksum": "I"}


class _Columns:
    """The columns of one family while they grow."""

    def __init__(self, family: Family) -> None:
        self._columns = {name: array.array(kind) for name, kind in _types(family).items()}
        self._of_samples = _types(family).keys() - {"shard", "bytes", "samples", "sha256", "sidecar", "size", "checksum"}

    def add(self, sidecar: dict[str, Any], words: dict[str, dict[Any, int]]) -> None:
        columns, offset = self._columns, 0
        for place, sample in enumerate(sidecar["samples"]):
            members = sorted(sample["members"].items())
            facts = sample | {"layout": tuple(name for name, _ in members)}
            for name in self._of_samples:
                value = facts[name]
                columns[name].append(words[name].setdefault(value, len(words[name])) if name in words else value)
            for name, (start, size, checksum) in members:
                if start != offset + BLOCK or sample["key"] != sample_key(sidecar["shard"], place):
                    raise ValueError(f"sample {sample['key']}, member {name!r} at byte {start} is out of place")
                offset = start + _padded(size)
                columns["size"].append(size)
                columns["checksum"].append(checksum)
        columns["shard"].append(sidecar["shard"])
        columns["bytes"].append(sidecar["bytes"])
        columns["samples"].append(len(sidecar["samples"]))
        columns["sha256"].frombytes(bytes.fromhex(sidecar["sha256"]))
        columns["sidecar"].frombytes(hashlib.sha256(json_bytes(sidecar)).digest())

    def arrays(self) -> dict[str, np.ndarray]:
        arrays = {name: np.array(column, dtype=column.typecode) for name, column in self._columns.items()}
        return arrays | {name: arrays[name].reshape(-1, 32) for name in ("sha256", "sidecar")}


class Frames(Sequence[FrameEntry]):
    """The frames of a set that readers see, in order, without those that it excludes. An entry is made when it is asked for."""

    def __init__(self, index: Index, excluded: Exclusion) -> None:
        self._kinds, self._splits = index.words["kind"], index.words["split"]
        self._tables = {family: _Table(index, family) for family in FAMILIES}
        self._facts = {name: index.columns[f"frames/{name}"] for name in ("identity", "motion", "kind", "split", "views")}
        frames = self._tables["frames"]
        kept = ~np.isin(self._facts["identity"], list(excluded.identities))
        for key in excluded.frames:
            row = frames.row(int(key[:-4]), int(key[-4:])) if key.isdecimal() and len(key) > 4 else None
            if row is not None:
                kept[row] = False
        self._rows = np.flatnonzero(kept).astype(np.int32)
        self._others = {  # [N] the row of each frame's sample in the other families; -1 where there is none
            "labels": self._tables["labels"].rows(frames),
            "identities": self._tables["identities"].rows_of_identities(self._facts["identity"]),
        }
        tables = [frames, *(self._tables[family] for family in self._others)]
        rows = [np.arange(len(kept)), *self._others.values()]
        layouts = [table.layouts(at) for table, at in zip(tables, rows, strict=True)]
        kinds, self._kind = np.unique(np.stack(layouts, axis=1), axis=0, return_inverse=True)  # [N] which list of members
        self._names = [
            {name: None for table, layout in zip(tables, kind, strict=True) if layout >= 0 for name in table.names[layout]}
            for kind in kinds.tolist()
        ]
        self.excluded = int(len(kept) - len(self._rows))

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int | slice) -> FrameEntry | list[FrameEntry]:
        if isinstance(index, slice):
            return [self._entry(row) for row in self._rows[index].tolist()]
        return self._entry(int(self._rows[index]))

    def __iter__(self) -> Iterator[FrameEntry]:
        return map(self._entry, self._rows.tolist())

    def _entry(self, row: int) -> FrameEntry:
        facts, (shard, place) = self._facts, self._tables["frames"].position(row)
        return FrameEntry(
            sample_key(shard, place),
            shard,
            facts["identity"].item(row),
            facts["motion"].item(row),
            self._kinds[facts["kind"].item(row)],
            self._splits[facts["split"].item(row)],
            facts["views"].item(row),
            _Members(self, row),
        )

    def names(self, row: int) -> dict[str, None]:
        """The members of the frame in one row of the frames' columns, in a fixed order: its own, its labels' and its identity's."""
        return self._names[self._kind.item(row)]

    def places(self, row: int) -> dict[str, Place]:
        """Where they lie."""
        rows = {"frames": row} | {family: rows.item(row) for family, rows in self._others.items()}
        return {name: place for family, at in rows.items() if at >= 0 for name, place in self._tables[family].members(at)}


class _Members(Mapping[str, Place]):
    """The members of one frame; where they lie is looked up at the first use."""

    __slots__ = ("_found", "_frames", "_row")

    def __init__(self, frames: Frames, row: int) -> None:
        self._frames, self._row, self._found = frames, row, None

    def __getitem__(self, name: str) -> Place:
        if self._found is None:
            self._found = self._frames.places(self._row)
        return self._found[name]

    def __contains__(self, name: object) -> bool:
        return name in self._frames.names(self._row)

    def __iter__(self) -> Iterator[str]:
        return iter(self._frames.names(self._row))

    def __len__(self) -> int:
        return len(self._frames.names(self._row))


class _Table:
    """Where the samples of one family lie. A sample's row counts through all shards."""

    def __init__(self, index: Index, family: Family) -> None:
        self._family = family
        self.names = [[asked_name(family, extension) for extension in layout] for layout in index.words["layout"]]
        self._identity, self._layout, self._size, self._checksum, self._shards, samples = (
            index.columns[f"{family}/{name}"] for name in ("identity", "layout", "size", "checksum", "shard", "samples")
        )
        counts = np.array([len(names) for names in self.names], np.int64)[self._layout] if len(self._layout) else self._layout
        self._first_row = _starts(samples)  # [S + 1]
        self._first_member = _starts(counts)  # [N + 1]
        self._shard_at = np.repeat(np.arange(len(samples), dtype=np.int32), samples)  # [N] index into the shards
        ends = _starts(_padded(self._size.astype(np.int64)) + BLOCK)  # [K + 1] as if all tars were one
        self._byte = ends[self._first_member[:-1]] - ends[self._first_member[self._first_row[self._shard_at]]]  # [N] within the tar

    def position(self, row: int) -> tuple[int, int]:
        """The shard's number and the sample's place in it."""
        at = self._shard_at.item(row)
        return self._shards.item(at), row - self._first_row.item(at)

    def row(self, shard: int, place: int) -> int | None:
        """The inverse of `position`; None if that shard is not there."""
        at = int(np.searchsorted(self._shards, shard))
        if at == len(self._shards) or self._shards[at] != shard:
            return None
        row = self._first_row.item(at) + place
        return row if row < self._first_row.item(at + 1) else None

    def rows(self, frames: _Table) -> np.ndarray:
        """The rows [N] of the samples with the keys of `frames`; -1 where there is none."""
        if not len(self._shards):
            return np.full(len(frames._layout), -1, np.int32)
        at = np.searchsorted(self._shards, frames._shards).clip(max=len(self._shards) - 1)  # of the shards of `frames`
        first = np.where(self._shards[at] == frames._shards, self._first_row[at] - frames._first_row[:-1], -(2**31))
        rows = np.arange(len(frames._layout)) + first[frames._shard_at]
        return np.where((rows >= 0) & (rows < self._first_row[at + 1][frames._shard_at]), rows, -1).astype(np.int32)

    def rows_of_identities(self, identities: np.ndarray) -> np.ndarray:
        """The rows of the samples of identities, where every identity has one and they ascend; -1 where there is none."""
        if not len(self._identity):
            return np.full(len(identities), -1, np.int32)
        rows = np.searchsorted(self._identity, identities).clip(max=len(self._identity) - 1)
        return np.where(self._identity[rows] == identities, rows, -1).astype(np.int32)

    def layouts(self, rows: np.ndarray) -> np.ndarray:
        """Which list of names the samples in `rows` have; -1 where the row is."""
        return np.where(rows >= 0, self._layout[rows].astype(np.int32), -1) if len(self._layout) else np.full(len(rows), -1, np.int32)

    def members(self, row: int) -> Iterator[tuple[str, Place]]:
        """Name and place of each member of a sample."""
        tar, offset, names = shard_name(self._family, self.position(row)[0]), self._byte.item(row), self.names[self._layout.item(row)]
        first = self._first_member.item(row)
        last = first + len(names)
        sizes, checksums = self._size[first:last].tolist(), self._checksum[first:last].tolist()
        for number, name, size, checksum in zip(range(first, last), names, sizes, checksums, strict=True):
            yield name, Place(tar, offset + BLOCK, size, checksum, number)
            offset += BLOCK + _padded(size)


def asked_name(family: Family, extension: str) -> str:
    """The name by which readers ask for a member: 'rgb.0.jpg' is 'rgb.0'; members of an identity begin with 'identity.'."""
    name = extension if extension == "json" else extension.rpartition(".")[0]
    return f"identity.{name}" if family == "identities" else name


def _padded(size: Any) -> Any:
    """Bytes that a member of `size` bytes takes behind its header."""
    return -(-size // BLOCK) * BLOCK


def _starts(counts: np.ndarray) -> np.ndarray:
    """Running sums [n + 1] from 0."""
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(counts, dtype=np.int64)])


def _metadata(data: bytes) -> dict[str, str]:
    """The metadata of a safetensors file that is in memory."""
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length])["__metadata__"]
