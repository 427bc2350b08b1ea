"""Where a data set lies: a local folder, or whatever place fsspec opens by URL (s3://, gs://, memory://, https:// for reading, ...).

    storage = open_storage("s3://bucket/faces")
    storage.read("frames/000123.json")

A data set is a set of names that its plan knows, so files are asked for by name and nothing is listed. Files appear whole: locally by
temporary name, flush and rename; elsewhere a file is made in a scratch folder of this machine, put under its name, and its size is
asked back. What goes wrong on the way is tried again a few times, with waits that grow; then it is a DataError.

A local folder has one writer at a time. An object store has no lock, and needs none: two runs of one plan on equal machines put the
same bytes under the same names, and two runs of different plans are found out, because each shard's record states its plan.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import fcntl
import os
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol, TypeVar

import fsspec

from head3d.run.errors import ConfigError, DataError
from head3d.run.files import atomic_path, scratch_folder, sweep_temporary, write_errors
from head3d.run.seeding import numpy_generator

CONCURRENT = 32  # requests at once where each is mostly waiting
LOG_EVERY_S = 60.0  # how often a growing file is put again where files cannot be appended to
SILENCE_S = 15.0  # of a server in the midst of a request, after which the attempt has failed

Item = TypeVar("Item")
Result = TypeVar("Result")


class Storage(Protocol):
    """A folder of named files; names are relative, with '/' between their parts ("frames/000123.tar").

    Whatever is refused for good (no permission, full disk, no answer after several attempts) is a DataError that names the file.
    """

    address: str  # as the user gave it
    sends_whole_files: bool  # whether it is known to send all of a file to who asks for a part

    def where(self, name: str = "") -> str:
        """The file's full address, for messages."""

    def resolved(self) -> Storage:
        """The same place for a process with another working folder."""

    def size(self, name: str) -> int | None:
        """Bytes of a file; None if there is none."""

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        """The bytes [start, stop) of a file. Raises FileNotFoundError if there is none."""

    def write(self, name: str, content: bytes | str) -> None:
        """Make or replace a file; text is UTF-8."""

    def writing(self, name: str) -> contextlib.AbstractContextManager[Path]:
        """Give a local path to write to; when the block ends well, the file appears under `name`, whole. Otherwise nothing appears."""

    def appending(self, name: str) -> contextlib.AbstractContextManager[Callable[[str], None]]:
        """Give a function that adds a line to a file; what was in it stays."""

    def delete(self, name: str) -> None:
        """Delete a file; it need not be there."""

    def names(self, folder: str) -> list[str]:
        """The names of the files in a folder. The one request whose cost grows with the folder: for `verify`, not for work."""

    def each(self, function: Callable[[Item], Result], items: Iterable[Item], at_once: int = CONCURRENT) -> Iterator[Result]:
        """function(item) of each item, in order; several at once where requests are mostly waiting."""

    def only_writer(self, folders: Iterable[str]) -> contextlib.AbstractContextManager[None]:
        """Keep other runs out while the block lasts, where that is possible, and delete what killed writers left in `folders`.

        Raises DataError if another run is writing.
        """


def open_storage(address: Storage | Path | str) -> Storage:
    """The place that a setting names: a path, or a URL with "://". Nothing is asked of it yet.

    Credentials and endpoints are fsspec's own: the environment and files of the provider's tools, FSSPEC_... variables, and
    ~/.config/fsspec. Raises ConfigError if the kind of URL is unknown or needs a package that is not installed.
    """
    if isinstance(address, (LocalFolder, RemoteFolder)):
        return address
    if "://" not in str(address):
        return LocalFolder(str(address), Path(address))
    protocol = _protocol(str(address))
    if protocol in ("file", "local"):
        return LocalFolder(str(address), Path(fsspec.filesystem("file")._strip_protocol(str(address))))
    try:
        fsspec.get_filesystem_class(protocol)
    except (ImportError, ValueError) as error:
        remedy = "pip install 'head-foundry[s3]'" if protocol == "s3" else "install the fsspec package for this kind of URL"
        raise ConfigError(f"{address}: places with {protocol}:// cannot be opened here ({error}); {remedy}, or give a folder") from error
    return RemoteFolder(str(address))


def in_threads(function: Callable[[Item], Result], items: Iterable[Item], at_once: int) -> Iterator[Result]:
    """function(item) of each item, in order, in so many threads; as many results again may wait for whoever reads them."""
    waiting: collections.deque[Future[Result]] = collections.deque()
    with ThreadPoolExecutor(at_once, thread_name_prefix="storage") as threads:
        try:
            for item in items:
                waiting.append(threads.submit(function, item))
                if len(waiting) > 2 * at_once:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for request in waiting:
                request.cancel()


class LocalFolder:
    """A `Storage` on this machine's file system."""

    sends_whole_files = False

    def __init__(self, address: str, folder: Path) -> None:
        self.address, self.folder = address, folder

    def where(self, name: str = "") -> str:
        return str(self.folder / name)

    def resolved(self) -> Storage:
        return LocalFolder(self.address, self.folder.resolve())

    def size(self, name: str) -> int | None:
        try:
            return (self.folder / name).stat().st_size
        except (FileNotFoundError, NotADirectoryError):
            return None

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        try:
            with (self.folder / name).open("rb") as file:
                file.seek(start)
                return file.read(-1 if stop is None else stop - start)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise FileNotFoundError(str(error)) from error
        except OSError as error:
            raise DataError(f"{self.where(name)}: could not be read: {error.strerror or error}; check its permissions") from error

    def write(self, name: str, content: bytes | str) -> None:
        with self.writing(name) as path:
            path.write_bytes(content.encode() if isinstance(content, str) else content)

    def writing(self, name: str) -> contextlib.AbstractContextManager[Path]:
        return atomic_path(self.folder / name)

    @contextlib.contextmanager
    def appending(self, name: str) -> Iterator[Callable[[str], None]]:
        path = self.folder / name
        with write_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            file = path.open("a", encoding="utf-8")

        def add(line: str) -> None:
            with write_errors(path):
                file.write(line + "\n")
                file.flush()

        with file:
            yield add

    def delete(self, name: str) -> None:
        with write_errors(self.folder / name):
            (self.folder / name).unlink(missing_ok=True)

    def names(self, folder: str) -> list[str]:
        return sorted(f"{folder}/{path.name}" for path in (self.folder / folder).glob("*"))

    def each(self, function: Callable[[Item], Result], items: Iterable[Item], at_once: int = CONCURRENT) -> Iterator[Result]:
        return map(function, items)

    @contextlib.contextmanager
    def only_writer(self, folders: Iterable[str]) -> Iterator[None]:
        lock = self.folder / ".lock"
        with write_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        with write_errors(lock):
            file = lock.open("w")
        with file:  # the system lets go of the lock when this process ends, however it ends
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise DataError(
                    f"{self.folder}: another `headfoundry datagen` is writing to this folder; wait for it, or choose another --out"
                ) from error
            self._sweep(folders)
            yield
            self._sweep(folders)

    def _sweep(self, folders: Iterable[str]) -> None:
        for folder in ("", *folders):
            sweep_temporary(self.folder / folder)


@dataclasses.dataclass(frozen=True)
class Patience:
    """How often a request is made before it counts as refused. Which attempt succeeds decides no byte."""

    attempts: int = 5
    first_wait_s: float = 0.5  # before the second attempt; doubles with each, and each is stretched by a factor from [0.5, 1.5)

    def wait_s(self, attempt: int, name: str) -> float:
        """Seconds to wait after attempt 0, 1, ...: of its own for each process, so that a crowd does not come back all at once."""
        stretch = numpy_generator("patience", os.getpid(), name, attempt).uniform(0.5, 1.5)
        return float(self.first_wait_s * 2**attempt * stretch)


class RemoteFolder:
    """A `Storage` behind an fsspec URL. Safe for threads; a copy sent to another process connects anew."""

    def __init__(self, address: str, patience: Patience = Patience()) -> None:
        self.address, self.patience, self.sends_whole_files = address.rstrip("/"), patience, False
        self._connection: tuple[int, fsspec.AbstractFileSystem, str] | None = None

    def where(self, name: str = "") -> str:
        return f"{self.address}/{name}" if name else self.address

    def resolved(self) -> Storage:
        return self

    def size(self, name: str) -> int | None:
        try:
            return self._tried("read", name, lambda filesystem, path: filesystem.info(path)["size"])
        except FileNotFoundError:
            return None

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        def get(filesystem: fsspec.AbstractFileSystem, path: str) -> bytes:
            data = filesystem.cat_file(path, start=start or None, end=stop)
            if stop is not None and len(data) > stop - start and len(data) >= stop:  # HTTP allows a server to ignore the range
                self.sends_whole_files = True
                return data[start:stop]
            if stop is not None and len(data) != stop - start:
                raise OSError(f"asked for bytes {start} to {stop}, got {len(data)} bytes")
            return data

        return self._tried("read", name, get)

    def write(self, name: str, content: bytes | str) -> None:
        with self.writing(name) as path:
            path.write_bytes(content.encode() if isinstance(content, str) else content)

    @contextlib.contextmanager
    def writing(self, name: str) -> Iterator[Path]:
        with scratch_folder() as scratch:
            local = scratch / name.rpartition("/")[2]
            with write_errors(local):
                yield local
                size = local.stat().st_size
            self._put(local, name, size)

    def _put(self, local: Path, name: str, size: int) -> None:
        def put(filesystem: fsspec.AbstractFileSystem, path: str) -> None:
            if self.address.startswith(("http://", "https://")):
                raise NotImplementedError("places behind plain HTTP are read-only")
            filesystem.put_file(str(local), path)
            there = filesystem.info(path)["size"]
            if there != size:
                raise OSError(f"put {size} bytes, {there} arrived")

        try:
            self._tried("written", name, put)
        except FileNotFoundError as error:  # there is no such bucket
            raise DataError(f"{self.where(name)}: could not be written: {error}; make the bucket, or choose another place") from error

    @contextlib.contextmanager
    def appending(self, name: str) -> Iterator[Callable[[str], None]]:
        try:
            lines = [self.read(name).decode()]
        except FileNotFoundError:
            lines = []
        put_at = time.monotonic()

        def add(line: str) -> None:
            nonlocal put_at
            lines.append(line + "\n")
            if time.monotonic() - put_at > LOG_EVERY_S:
                self.write(name, "".join(lines))
                put_at = time.monotonic()

        before = len(lines)
        yield add
        if len(lines) > before:
            self.write(name, "".join(lines))

    def delete(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._tried("deleted", name, lambda filesystem, path: filesystem.rm_file(path))

    def names(self, folder: str) -> list[str]:
        try:
            paths = self._tried("listed", folder, lambda filesystem, path: filesystem.ls(path, detail=False, refresh=True))
        except FileNotFoundError:
            return []
        return sorted(f"{folder}/{path.rstrip('/').rpartition('/')[2]}" for path in paths)

    def each(self, function: Callable[[Item], Result], items: Iterable[Item], at_once: int = CONCURRENT) -> Iterator[Result]:
        yield from in_threads(function, items, at_once)

    @contextlib.contextmanager
    def only_writer(self, folders: Iterable[str]) -> Iterator[None]:
        yield  # no lock is possible and none is needed (see above); nobody sees what a killed writer left

    def _tried(self, doing: str, name: str, request: Callable[[fsspec.AbstractFileSystem, str], Result]) -> Result:
        """request(file system, full path), again after a while if it fails. Raises FileNotFoundError, or DataError in the end."""
        for attempt in range(self.patience.attempts):
            try:
                filesystem, root = self._connect()
                return request(filesystem, f"{root}/{name}")
            except FileNotFoundError:
                raise
            except Exception as error:  # every protocol has exceptions of its own
                if _is_final(error):
                    raise DataError(f"{self.where(name)}: could not be {doing}: {error}; {_ACCESS}") from error
                if attempt + 1 == self.patience.attempts:
                    raise DataError(
                        f"{self.where(name)}: could not be {doing} in {self.patience.attempts} attempts: {type(error).__name__}: {error}; "
                        f"{_ACCESS}, then call the same command again: it goes on where it stopped"
                    ) from error
            time.sleep(self.patience.wait_s(attempt, name))
        raise AssertionError("attempts must be at least 1")

    def _connect(self) -> tuple[fsspec.AbstractFileSystem, str]:
        if self._connection is None or self._connection[0] != os.getpid():
            protocol = _protocol(self.address)
            users = fsspec.config.conf.get(protocol, {})
            options = {name: value | users.get(name, {}) for name, value in _options(protocol).items()}
            filesystem, root = fsspec.core.url_to_fs(self.address, use_listings_cache=False, **options)
            if hasattr(filesystem, "retries"):
                filesystem.retries = 1
            self._connection = os.getpid(), filesystem, root.rstrip("/")
        return self._connection[1:]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_connection": None}


def _options(protocol: str) -> dict[str, dict[str, Any]]:
    """Trying again is done here, in one place, and not also by the libraries below, where waits would multiply; nobody waits for ever."""
    match protocol:
        case "s3":
            return {"config_kwargs": {"retries": {"total_max_attempts": 1}, "connect_timeout": SILENCE_S, "read_timeout": SILENCE_S}}
        case "http" | "https":
            import aiohttp  # what fsspec reads these with

            return {"client_kwargs": {"timeout": aiohttp.ClientTimeout(total=None, sock_connect=SILENCE_S, sock_read=SILENCE_S)}}
        case _:
            return {}


def _protocol(url: str) -> str:
    return url.partition("://")[0].rpartition("::")[2]


def _is_final(error: Exception) -> bool:
    """Whether asking again would give the same answer: a refusal, as far as it can be told."""
    status = getattr(error, "status", None)  # of HTTP; 408 and 429 ask for patience
    return isinstance(error, (PermissionError, NotImplementedError)) or (status in range(400, 500) and status not in (408, 429))


_ACCESS = "check the address, the network, the credentials and what they may do"
