"""Copies of remote shards on this machine's disk: bounded, shared by threads and processes, and fetched before they are needed.

    with open_cache(CacheConfig(), "s3://bucket/faces") as cache:
        dataset = open_dataset("s3://bucket/faces").through(cache)

A copy bears the SHA-256 of its content as its name, which is checked once, when it arrives; so runs, data sets and processes may share a
folder. One process at a time fetches into a folder, in pieces that travel side by side; everybody reads meanwhile. To make room, the
copies that were used least recently go; what a reader has open stays readable until it lets go of it. Which copies are there changes
how long a read takes and never what is read.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import os
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

from datagen.shards import remedy
from datagen.storage import LocalFolder, Storage, open_storage
from head3d.run.config import PositiveFloat
from head3d.run.errors import ConfigError, DataError, FoundryError
from head3d.run.files import atomic_path, scratch_folder, sweep_temporary, write_errors

PIECE = 8 << 20  # bytes of one request
PIECES_AT_ONCE = 8
SAMPLES_AHEAD = 20_000  # as far as is looked ahead: a minute of a fast training run
_PATIENCE_S = 30.0  # after a file that could not be fetched ahead, before it is tried again


@dataclasses.dataclass(frozen=True)
class CacheConfig:
    """Where copies of remote shards are kept. Shards in a local folder are read where they are."""

    folder: Path | None = None  # stays, and is shared by the processes and runs that name it; none = a private one, deleted at the end
    gigabytes: PositiveFloat = 50.0  # of all copies in the folder together


class Tar(NamedTuple):
    """A remote file, and what it must hold."""

    name: str
    size: int  # bytes
    sha256: str


@contextlib.contextmanager
def open_cache(config: CacheConfig, place: Storage | Path | str) -> Iterator[ShardCache | None]:
    """The cache for a place; None if it is a local folder, which needs none."""
    with open_caches(config, [place]) as caches:
        yield caches[0]


@contextlib.contextmanager
def open_caches(config: CacheConfig, places: Sequence[Storage | Path | str]) -> Iterator[list[ShardCache | None]]:
    """The cache for each place, as `open_cache`; all of them share one folder and its limit."""
    storages, limit = [open_storage(place) for place in places], round(config.gigabytes * 1e9)
    remote = [not isinstance(storage, LocalFolder) for storage in storages]
    with contextlib.ExitStack() as stack:
        folder = config.folder if config.folder is not None or not any(remote) else stack.enter_context(scratch_folder())
        yield [ShardCache(storage, folder, limit) if far else None for storage, far in zip(storages, remote, strict=True)]


class ShardCache:
    """Copies of files of one place, in a folder of at most `limit` bytes."""

    def __init__(self, storage: Storage, folder: Path, limit: int) -> None:
        self.storage, self.folder, self.limit = storage, folder, limit
        self._damaged: dict[Tar, str] = {}  # what was fetched in vain, and what was wrong

    def open(self, tar: Tar) -> BinaryIO:
        """A copy, opened to read; fetched first if it is not there.

        Raises DataError if it cannot be fetched, is not what it must be, or the disk is full; ConfigError if it is larger than the cache.
        """
        file = self._there(tar)
        if file is None:
            if tar in self._damaged:
                raise DataError(self._damaged[tar])
            with self._alone():
                file = self._there(tar)  # somebody else may have fetched it meanwhile
                if file is None:
                    self._fetch(tar)
                    file = self._path(tar).open("rb")
        return file

    def used(self, tar: Tar) -> bool:
        """Note that a copy is in use. False if it is no longer there."""
        return self._date(tar, None)

    def holds(self, tar: Tar) -> bool:
        """Whether there is a copy."""
        return self._path(tar).exists()

    def finished(self, tar: Tar) -> None:
        """Note that a copy is not needed for a while: it goes first."""
        self._date(tar, (0.0, 0.0))

    def drop(self, tar: Tar) -> None:
        """Delete a copy, if it is there."""
        self._path(tar).unlink(missing_ok=True)

    def _path(self, tar: Tar) -> Path:
        return self.folder / f"{tar.sha256}.tar"

    def _date(self, tar: Tar, times: tuple[float, float] | None) -> bool:
        try:
            os.utime(self._path(tar), times)
        except FileNotFoundError:
            return False
        return True

    def _there(self, tar: Tar) -> BinaryIO | None:
        try:
            file = self._path(tar).open("rb")
        except FileNotFoundError:
            return None
        if os.fstat(file.fileno()).st_size != tar.size:  # no copy that was made here
            file.close()
            return None
        self.used(tar)
        return file

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Be the only one who fetches, among all threads and processes; the system lets go of the lock of a process that ends."""
        with write_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = (self.folder / ".lock").open("w")
        with lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _fetch(self, tar: Tar) -> None:
        sweep_temporary(self.folder)  # of killed processes, for nobody else is fetching
        self._make_room(tar)
        for _ in range(2):
            with contextlib.suppress(_Damaged), atomic_path(self._path(tar)) as temporary, temporary.open("wb") as file:
                digest = hashlib.sha256()
                for piece in self._pieces(tar):
                    digest.update(piece)
                    file.write(piece)
                if digest.hexdigest() != tar.sha256:
                    raise _Damaged
                return
        path = self.storage.where(tar.name)
        self._damaged[tar] = f"{path}: fetched twice, its SHA-256 is {digest.hexdigest()}, expected {tar.sha256}; {remedy(path)}"
        raise DataError(self._damaged[tar])

    def _pieces(self, tar: Tar) -> Iterator[bytes]:
        length = tar.size if self.storage.sends_whole_files else PIECE

        def read(start: int) -> bytes:
            return self.storage.read(tar.name, start, min(start + length, tar.size))

        try:
            yield from self.storage.each(read, range(0, tar.size, length), PIECES_AT_ONCE)
        except FileNotFoundError as error:
            path = self.storage.where(tar.name)
            raise DataError(f"{path}: could not be opened ({error}); {remedy(path)}") from error

    def _make_room(self, tar: Tar) -> None:
        """Delete the copies that were used least recently until one more fits the limit and the disk."""
        if tar.size > self.limit:
            raise ConfigError(
                f"cache.gigabytes: {self.limit / 1e9:g} is less than the file {self.storage.where(tar.name)} has ({tar.size / 1e9:g}); "
                "give the cache more room"
            )
        copies = sorted((path.stat().st_mtime, path.stat().st_size, path) for path in self.folder.glob("*.tar"))
        total = sum(size for _, size, _ in copies)
        for _, size, path in copies:
            if total + tar.size <= self.limit and shutil.disk_usage(self.folder).free >= tar.size:
                return
            path.unlink(missing_ok=True)
            total -= size


class _Damaged(Exception):
    """What arrived is not what was asked for."""


class Copy(NamedTuple):
    """A remote file, and the cache that it is read through."""

    cache: ShardCache
    tar: Tar


class FetchAhead:
    """A thread that brings files into caches in the order in which they will be wanted, as far ahead as there is room.

    wanted: (sample, files that it is read from), endless and ascending; the reader reports with `passed` how far it is. limit: bytes of
    all caches together. What cannot be fetched is left to the reader, who will meet the same error; it is tried again until he has.
    """

    def __init__(self, wanted: Iterable[tuple[int, Iterable[Copy]]], limit: int) -> None:
        self._wanted, self._limit = wanted, limit
        self._passed, self._closed = 0, False
        self._change = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="fetch-ahead", daemon=True)
        self._thread.start()

    def passed(self, sample: int) -> None:
        """All samples before this one have been read."""
        with self._change:
            self._passed = sample
            self._change.notify_all()

    def close(self) -> None:
        """End the thread, after the file that it is fetching. Calling it twice is fine."""
        with self._change:
            self._closed = True
            self._change.notify_all()
        self._thread.join()

    def _run(self) -> None:
        with contextlib.suppress(FoundryError):
            ahead: dict[Copy, int] = {}  # files from here to where the thread is -> the last sample that is known to want them
            for sample, copies in self._wanted:
                self._wait(lambda: sample - self._passed <= SAMPLES_AHEAD)  # noqa: B023
                for copy in copies:
                    if copy not in ahead:
                        self._wait(lambda: self._fits(copy, ahead))  # noqa: B023
                        self._fetch(copy, sample)
                    ahead[copy] = sample
                if self._closed:
                    return

    def _fits(self, copy: Copy, ahead: dict[Copy, int]) -> bool:
        """Whether one more file leaves room for those that are still wanted; forgets those that are not."""
        for other in [other for other, last in ahead.items() if last < self._passed]:
            del ahead[other]
            other.cache.finished(other.tar)
        return sum(other.tar.size for other in ahead) + copy.tar.size <= self._limit

    def _fetch(self, copy: Copy, sample: int) -> None:
        while not self._closed and self._passed <= sample:
            try:
                copy.cache.open(copy.tar).close()
            except DataError:
                self._wait(lambda: self._passed > sample, _PATIENCE_S)
            else:
                return

    def _wait(self, condition: Callable[[], bool], timeout_s: float | None = None) -> None:
        with self._change:
            self._change.wait_for(lambda: self._closed or condition(), timeout_s)
