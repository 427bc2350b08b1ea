"""Files and folders that appear whole or not at all: temporary name beside the target, flush, rename."""

from __future__ import annotations

import csv
import fcntl
import hashlib
import io
import json
import math
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from head3d.run.errors import DataError

SCRATCH_PREFIX = ".headfoundry-scratch-"
TEMPORARY_PREFIX = ".tmp-"  # what follows ends in the target's own name, so that writers who look at the suffix are content


@contextmanager
def atomic_path(path: Path | str) -> Iterator[Path]:
    """Give a temporary path in the target's folder to write to; flush and rename it onto `path` when the block ends well.

    The folder is made if missing; an existing file is replaced. If the block raises, nothing is left behind. Raises DataError
    if the system refuses (full disk, no permission), naming the file.
    """
    path = Path(path)
    with write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = _temporary_name(path)
        try:
            yield temporary
            _flush(temporary)
            os.replace(temporary, path)
            _flush(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path | str) -> Iterator[Path]:
    """Give an empty temporary folder beside `path`; flush its files and rename it to `path` when the block ends well.

    An existing folder of that name is replaced. If the block raises, nothing is left behind. Raises DataError like `atomic_path`.
    """
    path = Path(path)
    with write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = _temporary_name(path)
        temporary.mkdir()
        try:
            yield temporary
            for entry in sorted(temporary.rglob("*")):
                _flush(entry)
            _flush(temporary)
            if path.exists():
                remove_folder(path)
            os.rename(temporary, path)
            _flush(path.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def scratch_folder(parent: Path | None = None) -> Iterator[Path]:
    """Give an empty folder of this process alone, in `parent` (default: the system's place for temporary files), deleted after the block.

    It is locked while the process lives; what killed processes left there is deleted by the next call. Raises DataError if the
    system refuses.
    """
    parent = Path(tempfile.gettempdir()) if parent is None else parent
    with write_errors(parent):
        parent.mkdir(parents=True, exist_ok=True)
        _sweep_scratch(parent)
        folder = Path(tempfile.mkdtemp(prefix=SCRATCH_PREFIX, dir=parent))
        handle = os.open(folder, os.O_RDONLY)
        fcntl.flock(handle, fcntl.LOCK_EX)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(handle)


def _sweep_scratch(parent: Path) -> None:
    """Delete scratch folders whose process is gone: nobody holds their lock. A new one may be just short of its lock, so it is spared."""
    for folder in parent.glob(f"{SCRATCH_PREFIX}*"):
        with suppress(OSError):  # another user's, or deleted by another process at the same time
            handle = os.open(folder, os.O_RDONLY)
            try:
                if time.time() - os.fstat(handle).st_mtime > 60:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(folder)
            finally:
                os.close(handle)


def write_atomic(path: Path | str, content: bytes | str | Callable[[BinaryIO], object]) -> None:
    """Write bytes, text (UTF-8) or what a callable writes into the binary file it is given. Errors as `atomic_path`."""
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        if callable(content):
            content(file)
        else:
            file.write(content.encode() if isinstance(content, str) else content)


def write_csv(path: Path | str, records: Sequence[Mapping[str, object]]) -> None:
    """Write records of equal keys as a table with a header; NaN becomes an empty cell. Errors as `atomic_path`."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(records[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(
        {key: "" if isinstance(value, float) and math.isnan(value) else value for key, value in record.items()} for record in records
    )
    write_atomic(path, text.getvalue())


def read_results(path: Path, made_from: Mapping[str, object]) -> dict[str, Any] | None:
    """The JSON object in `path` if it says that it was made from just that (its entries equal those of `made_from`); otherwise None."""
    if not path.exists():
        return None
    there = json.loads(path.read_text(encoding="utf-8"))
    return there if all(there.get(key) == value for key, value in made_from.items()) else None


def remove_folder(path: Path) -> None:
    """Delete a folder so that nobody sees half of it: it loses its name first."""
    doomed = _temporary_name(path)
    os.rename(path, doomed)
    shutil.rmtree(doomed)


def sweep_temporary(folder: Path | str) -> int:
    """Delete what killed writers left in `folder` and return how many there were. Only for a folder that nobody else is writing to."""
    leftovers = list(Path(folder).glob(f"{TEMPORARY_PREFIX}*"))
    for entry in leftovers:
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()
    return len(leftovers)


def sha256_of_file(path: Path | str) -> str:
    """SHA-256 of a file's bytes, 64 hex digits."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _temporary_name(path: Path) -> Path:
    return path.with_name(f"{TEMPORARY_PREFIX}{os.urandom(6).hex()}-{path.name}")


def _flush(path: Path) -> None:
    """Have the system put a file's bytes, or a folder's names, on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def write_errors(path: Path | str) -> Iterator[None]:
    """Within the block, what the system refuses (full disk, no permission, a file in the way) is a DataError that names `path`."""
    try:
        yield
    except OSError as error:
        raise DataError(
            f"{path}: could not be written: {error.strerror or error}. Nothing half-written was left; "
            "check the free space and the permissions of that folder, then call the same command again"
        ) from error
