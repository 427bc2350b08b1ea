"""Files and folders appear whole or not at all."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from head3d.run import files
from head3d.run.errors import DataError
from head3d.run.files import (
    atomic_folder,
    atomic_path,
    read_results,
    remove_folder,
    scratch_folder,
    sha256_of_file,
    sweep_temporary,
    write_atomic,
    write_csv,
)


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def test_text_bytes_and_callables_are_written_and_missing_folders_made(tmp_path):
    write_atomic(tmp_path / "a" / "b" / "text", "grün")
    write_atomic(tmp_path / "bytes", b"\x00\xff")
    write_atomic(tmp_path / "called", lambda file: file.write(b"xyz"))
    assert (tmp_path / "a" / "b" / "text").read_bytes() == "grün".encode()
    assert (tmp_path / "bytes").read_bytes() == b"\x00\xff"
    assert (tmp_path / "called").read_bytes() == b"xyz"
    assert names(tmp_path) == ["a", "bytes", "called"]


def test_a_failing_writer_leaves_the_old_file_and_nothing_else(tmp_path):
    write_atomic(tmp_path / "file", "old")

    def fail(file):
        file.write(b"half")
        raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        write_atomic(tmp_path / "file", fail)
    assert (tmp_path / "file").read_text() == "old"
    assert names(tmp_path) == ["file"]


def test_a_full_disk_is_an_error_that_names_the_file_and_leaves_nothing(tmp_path):
    def fill_up(file):
        file.write(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(DataError, match=r"file: could not be written: No space left on device.*free space"):
        write_atomic(tmp_path / "file", fill_up)
    assert names(tmp_path) == []


def test_a_failing_folder_writer_leaves_the_old_folder_and_nothing_else(tmp_path):
    with atomic_folder(tmp_path / "folder") as folder:
        write_atomic(folder / "inside" / "old", "1")
    with pytest.raises(RuntimeError), atomic_folder(tmp_path / "folder") as folder:
        (folder / "new").write_text("2")
        raise RuntimeError("on purpose")
    assert names(tmp_path) == ["folder"]
    assert (tmp_path / "folder" / "inside" / "old").read_text() == "1"


def test_a_folder_is_replaced_as_a_whole(tmp_path):
    for name in ("first", "second"):
        with atomic_folder(tmp_path / "folder") as folder:
            (folder / name).write_text(name)
    assert names(tmp_path) == ["folder"]
    assert names(tmp_path / "folder") == ["second"]


def test_the_target_is_flushed_before_it_gets_its_name(tmp_path, monkeypatch):
    events = []
    monkeypatch.setattr(files.os, "fsync", lambda handle: events.append("flush"))
    rename = os.replace
    monkeypatch.setattr(files.os, "replace", lambda source, target: (events.append("rename"), rename(source, target)))
    write_atomic(tmp_path / "file", "x")
    assert events == ["flush", "rename", "flush"]  # the file, its name, the folder that holds the name


def test_a_killed_writer_leaves_only_what_a_sweep_removes(tmp_path):
    program = (
        "import os, signal, sys; from head3d.run.files import atomic_folder\n"
        "with atomic_folder(sys.argv[1]) as folder:\n"
        "    (folder / 'half').write_text('x'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path / "folder")], check=False)
    assert done.returncode == -signal.SIGKILL
    assert not (tmp_path / "folder").exists()
    (tmp_path / "kept").write_text("x")
    assert sweep_temporary(tmp_path) == 1
    assert names(tmp_path) == ["kept"]


def test_the_temporary_name_keeps_the_suffix_that_writers_look_at(tmp_path):
    with atomic_path(tmp_path / "video.mp4") as temporary:
        assert temporary.suffix == ".mp4" and temporary.parent == tmp_path
        temporary.write_bytes(b"")


def test_a_removed_folder_is_gone(tmp_path):
    (tmp_path / "folder" / "inside").mkdir(parents=True)
    remove_folder(tmp_path / "folder")
    assert names(tmp_path) == []


def test_the_hash_of_a_file_is_sha_256(tmp_path):
    (tmp_path / "file").write_bytes(b"abc")  # the first test vector of FIPS 180
    assert sha256_of_file(tmp_path / "file") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_records_become_a_table_with_empty_cells_for_nan(tmp_path):
    write_csv(tmp_path / "t.csv", [{"who": "a, b", "x": 0.5}, {"who": 2, "x": float("nan")}])
    assert (tmp_path / "t.csv").read_text() == 'who,x\n"a, b",0.5\n2,\n'


def test_results_are_read_only_if_they_were_made_from_the_same(tmp_path):
    path = tmp_path / "results.json"
    assert read_results(path, {"seed": 1}) is None
    path.write_text('{"seed": 1, "model": "ab", "score": 3.5}')
    assert read_results(path, {"seed": 1, "model": "ab"}) == {"seed": 1, "model": "ab", "score": 3.5}
    assert read_results(path, {"seed": 2, "model": "ab"}) is None
    assert read_results(path, {"seed": 1, "other": None, "score": 3}) is None


def test_a_scratch_folder_is_gone_after_its_block_whatever_is_in_it(tmp_path):
    with scratch_folder(tmp_path / "new") as folder:
        (folder / "a" / "b").mkdir(parents=True)
        (folder / "a" / "b" / "file").write_text("x")
        assert folder.parent == tmp_path / "new"
    assert names(tmp_path / "new") == []


def test_scratch_folders_of_killed_processes_are_swept_and_those_in_use_and_new_ones_are_not(tmp_path):
    code = f"import os, signal\nfrom pathlib import Path\nfrom head3d.run.files import scratch_folder\n" \
           f"with scratch_folder(Path({str(tmp_path)!r})):\n    os.kill(os.getpid(), signal.SIGKILL)"  # fmt: skip
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    (tmp_path / "headfoundry-mine").mkdir()  # a name of the user's
    with scratch_folder(tmp_path) as used:
        assert left.exists(), "it is less than a minute old"
        for folder in tmp_path.iterdir():
            os.utime(folder, (0, 0))
        with scratch_folder(tmp_path):
            assert not left.exists() and used.exists()
    assert names(tmp_path) == ["headfoundry-mine"]
