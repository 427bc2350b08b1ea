"""The shard format: where files lie, the writer and the sidecar. What a sample holds is in `datagen.members`.

    out/dataset.json                      schema, settings and their hash, generator and head-model hashes, plan, depth range: first
    out/frames/000123.tar  + .json        pictures, labels, opacity, parts
    out/labels/000123.tar  + .json        depth, foreground features, plane points; same keys
    out/identities/000123.tar + .json     once per identity: background features
    out/index.safetensors                 rebuilt from the sidecars at any time

A sample is a frame: one (identity, motion) with all its views; key {shard:06d}{frame:04d}. An identity's frames are adjacent in one
shard. The .json beside a tar (its sidecar) is the commit mark and the index: SHA-256 of the tar, and offset, size and CRC-32 of each
member. The tar is a pure function of the settings: the same bytes whoever writes it, and whenever. The sidecar is one of the settings
and of the versions of what rendered the shard, which it states, because a set may grow on another machine.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from datagen.members import Family, json_bytes
from datagen.storage import Storage, open_storage
from head3d.run.errors import DataError

SCHEMA = "headfoundry-shards/2"
BLOCK = 512  # of a tar file; every header here fits one


def sample_key(shard: int, index: int) -> str:
    """The key of the index-th sample of a shard."""
    return f"{shard:06d}{index:04d}"


def shard_name(family: Family, shard: int) -> str:
    """The name of the tar of one family of one shard."""
    return f"{family}/{shard:06d}.tar"


def sidecar_name(family: Family, shard: int) -> str:
    """The name of that tar's sidecar."""
    return f"{family}/{shard:06d}.json"


# Writing ------------------------------------------------------------------------------------------------------------------


class _HashedStream:
    """A binary file that counts and hashes what passes."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self.sha256, self.size, self.abandoned = file, hashlib.sha256(), 0, False

    def write(self, data: bytes) -> int:
        if self.abandoned:  # tarfile writes once more when it is collected
            return len(data)
        self.sha256.update(data)
        self.size += len(data)
        return self._file.write(data)


class ShardWriter:
    """Adds samples to one tar through webdataset's TarWriter and notes where their members lie. Made by `write_shard`."""

    def __init__(self, stream: _HashedStream) -> None:
        from webdataset import TarWriter  # half a second; readers do without

        self._stream, self.samples = stream, []
        self._tar = TarWriter(stream, user="headfoundry", group="headfoundry", mode=0o444, compress=False, encoder=False, mtime=0)

    def add(self, key: str, files: dict[str, bytes], info: dict[str, Any]) -> None:
        """Write one sample: its members by extension, adjacent and sorted; `info` goes into the sidecar."""
        offset = self._tar.tarstream.offset
        members = {}
        for extension in sorted(files):
            data = files[extension]
            members[extension] = [offset + BLOCK, len(data), zlib.crc32(data)]
            offset += BLOCK + -(-len(data) // BLOCK) * BLOCK
        self._tar.write({"__key__": key, **files})
        assert self._tar.tarstream.offset == offset, "a tar header took more than one block"
        self.samples.append({"key": key, **info, "members": members})

    @property
    def size(self) -> int:
        """Bytes written so far."""
        return self._stream.size

    def close(self) -> None:
        self._tar.close()


@contextlib.contextmanager
def write_shard(place: Storage | Path | str, family: Family, shard: int, facts: dict[str, Any]) -> Iterator[ShardWriter]:
    """Write one family of one shard: give a writer, and when the block ends well the tar appears, whole, and then its sidecar.

    facts: what the sidecar states beside the samples (config hash, identities). If the block raises, or the process is killed,
    nothing appears under the final names but possibly a tar without its sidecar, which counts as absent. The block's end waits for a
    slow place. Raises DataError if the disk is full or the place refuses.
    """
    storage = open_storage(place)
    with storage.writing(shard_name(family, shard)) as temporary, temporary.open("wb") as file:
        stream = _HashedStream(file)
        writer = ShardWriter(stream)
        try:
            yield writer
            writer.close()
        except BaseException:
            stream.abandoned = True
            raise
    sidecar = {
        "schema": SCHEMA,
        "family": family,
        "shard": shard,
        **facts,
        "bytes": stream.size,
        "sha256": stream.sha256.hexdigest(),
        "samples": writer.samples,
    }
    storage.write(sidecar_name(family, shard), json_bytes(sidecar))


def read_sidecar(place: Storage | Path | str, family: Family, shard: int) -> dict[str, Any] | None:
    """A sidecar's content; None if there is none. Raises DataError if it is no JSON, from another schema, or belongs elsewhere."""
    storage = open_storage(place)
    path = storage.where(sidecar_name(family, shard))
    try:
        content = json.loads(storage.read(sidecar_name(family, shard)))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise DataError(f"{path}: could not be read as JSON ({error}); {remedy(path)}") from error
    check_schema(content, path)
    absent = sorted({"config_hash", "bytes", "sha256", "samples"} - content.keys())
    if absent:
        raise DataError(f"{path}: expected the entries of a sidecar, {', '.join(absent)} is missing; {remedy(path)}")
    if not isinstance(content["samples"], list) or content.get("family") != family or content.get("shard") != shard:
        raise DataError(
            f"{path}: expected the sidecar of {family} shard {shard}, got {content.get('family')} shard {content.get('shard')}; "
            f"the file was renamed or copied; {remedy(path)}"
        )
    return content


def check_schema(content: Any, path: str) -> None:
    """Raise DataError if a JSON file of a data set is from another schema."""
    schema = content.get("schema") if isinstance(content, dict) else None
    if schema != SCHEMA:
        raise DataError(f"{path}: expected schema {SCHEMA!r}, got {schema!r}; read it with the program that wrote it, or generate it anew")


def remedy(path: str) -> str:
    """What to do about a damaged file of a shard, given its address."""
    stem = path.rpartition(".")[0]
    return f"delete {stem}.tar and {stem}.json and call the same `headfoundry datagen` command again: it makes only what is missing"
