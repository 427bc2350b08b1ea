"""The farm: the same bytes for any number of workers and after any kill; what stops it and what it says."""

import dataclasses
import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys

import numpy as np
import pytest
import torch

from datagen import generate as farm
from datagen import worker
from datagen.generate import generate, make_plan
from datagen.index import INDEX
from datagen.labels import SampleError
from datagen.ledger import LEDGER
from datagen.plan import open_plan
from datagen.reading import open_dataset
from datagen.recipes import draw_identity
from datagen.render import RenderConfig, frame_facts
from datagen.shards import _HashedStream, shard_name
from datagen.storage import open_storage
from head3d.run.config import save_yaml
from head3d.run.errors import AssetError, ConfigError, DataError


@pytest.fixture(scope="module")
def ray(s3_server):
    """One local cluster for all tests of this file, which knows the S3 server; `generate` uses it and leaves it."""
    ray = pytest.importorskip("ray")
    ray.init("local", num_cpus=2, object_store_memory=128 << 20, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield ray
    ray.shutdown()


# The same bytes ---------------------------------------------------------------------------------------------------------------


def test_a_set_holds_the_plan(tmp_path, run_of):
    out = tmp_path / "set"
    assert generate(run_of(out)) == 0
    dataset = open_dataset(out)
    assert [(entry.identity, entry.motion, entry.kind) for entry in dataset.frames] == [
        (0, 0, "static"), (1, 0, "dynamic"), (1, 1, "dynamic"), (2, 0, "static"), (3, 0, "dynamic"), (3, 1, "dynamic"), (4, 0, "static"),
    ]  # fmt: skip
    assert [entry.split for entry in dataset.frames] == ["val", "val", "val", "test", "test", "test", "train"]
    assert dataset.manifest["plan"] == {"identities": 5, "shards": 3, "frames": 7, "labels_share": 1.0}
    assert dataset.manifest["synthetic"] is True and open_plan(out) == make_plan(run_of(out))
    data = dataset.read(dataset.frames[1], ["rgb.2", "label", "depth", "points", "point_features", "identity.background", "json"])
    assert data["rgb.2"].shape == (32, 32, 3) and data["points"].shape == (3, 20, 3) and data["json"]["draws"]["look_at"]
    assert not list(out.rglob(".tmp-*"))


def test_the_log_says_who_made_what_and_where_the_time_went(tmp_path, run_of):
    generate(run_of(tmp_path / "set"))
    reports = [json.loads(line) for line in (tmp_path / "set" / "log.jsonl").read_text().splitlines()]
    assert [(report["shard"], report["frames"], report["pictures"]) for report in reports] == [(0, 3, 8), (1, 3, 8), (2, 1, 2)]
    for report in reports:
        stages = report["stages"]
        assert set(stages) == {"draw", "render", "pack", "commit"} and min(stages.values()) > 0
        assert stages["draw"] + stages["render"] + stages["commit"] <= report["seconds"] + 0.01, "packing runs beside rendering"
    assert [report["ended"] for report in reports] == sorted(report["ended"] for report in reports)


def test_two_workers_one_of_them_killed_and_one_worker_give_the_bytes_of_none(tmp_path, run_of, data_files, undisturbed, ray, monkeypatch):
    """The whole promise in one test, because starting workers is what takes time here."""
    killed, make = [], farm.Crew.make

    def kill_the_first_to_report(self, *arguments):
        for report in make(self, *arguments):
            if not killed:
                killed.append(int(report.worker.rpartition(":")[2]))
                os.kill(killed[0], signal.SIGKILL)
            yield report

    monkeypatch.setattr(farm.Crew, "make", kill_the_first_to_report)
    two = tmp_path / "two"
    assert generate(run_of(two, workers=2, identities=9)) == 0
    assert killed and killed[0] != os.getpid()
    monkeypatch.setattr(farm.Crew, "make", make)
    none = tmp_path / "none"
    assert generate(run_of(none, identities=9)) == 0
    assert data_files(two) == data_files(none)
    one = tmp_path / "one"
    assert generate(run_of(one, workers=1)) == 0
    assert data_files(one) == undisturbed
    workers = {json.loads(line)["worker"] for line in (one / "log.jsonl").read_text().splitlines()}
    assert len(workers) == 1 and not workers & {f"{os.uname().nodename}:{os.getpid()}"}


def test_two_workers_fill_a_bucket_with_the_bytes_of_a_folder(bucket, run_of, data_files, undisturbed, ray):
    url = f"{bucket}/set"
    assert generate(run_of(url, workers=2)) == 0
    assert data_files(url) == undisturbed
    log = [json.loads(line) for line in open_storage(url).read("log.jsonl").splitlines()]
    assert sorted(line["shard"] for line in log) == [0, 1, 2]


def test_what_a_worker_refuses_reaches_the_user(tmp_path, run_of, ray):
    with pytest.raises(DataError, match="frames.*could not be written"):
        out = tmp_path / "set"
        out.mkdir()
        (out / "frames").write_text("a file where a folder belongs")
        generate(run_of(out, workers=1))


KILL_ITSELF = """
import os, signal, sys
from datagen.shards import _HashedStream
write, left = _HashedStream.write, int(sys.argv[2])
def kill(self, data):
    global left
    left -= len(data)
    if left < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return write(self, data)
_HashedStream.write = kill
from pipelines.__main__ import main
main(["datagen", "--config", sys.argv[1]])
"""


def test_sigkill_half_way_and_the_same_command_again_give_the_same_bytes(tmp_path, run_of, data_files, undisturbed):
    """The process dies in the middle of writing a tar, once half of all bytes are on the disk."""
    out, config = tmp_path / "set", tmp_path / "run.yaml"
    save_yaml(run_of(out), config)
    half = sum(len(data) for name, data in undisturbed.items() if name.endswith(".tar")) // 2
    command = [sys.executable, "-c", KILL_ITSELF, str(config), str(half)]
    killed = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False, timeout=120)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert list(out.rglob(".tmp-*")), "half a tar is left behind"
    there = {name: data for name, data in data_files(out).items() if ".tmp-" not in name}
    assert INDEX not in there and there.items() <= undisturbed.items()
    finished = len([name for name in there if name.startswith("frames/") and name.endswith(".json")])
    assert 1 <= finished < 3
    assert generate(run_of(out)) == 0
    assert data_files(out) == undisturbed
    assert len((out / "log.jsonl").read_text().splitlines()) == 3  # nothing is made twice


def test_a_finished_set_is_left_alone_and_no_generator_is_loaded(tmp_path, run_of, monkeypatch, capsys):
    out = tmp_path / "set"
    generate(run_of(out))
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.tar")}
    monkeypatch.setattr(worker, "load_genhead", None)
    assert generate(run_of(out)) == 0
    assert before == {path: path.stat().st_mtime_ns for path in out.rglob("*.tar")}
    assert "made 0 shards now" in capsys.readouterr().out


def test_growing_a_set_gives_what_one_large_run_gives(tmp_path, run_of, data_files):
    out, whole = tmp_path / "grown", tmp_path / "whole"
    generate(run_of(out, identities=3, labels_share=0.5))
    generate(run_of(out, identities=6))
    generate(run_of(whole, identities=6))
    assert data_files(out) == data_files(whole)


def test_a_damaged_or_deleted_file_is_made_again(tmp_path, run_of, data_files, undisturbed):
    out = tmp_path / "set"
    generate(run_of(out))
    cut, gone = out / shard_name("labels", 1), out / shard_name("identities", 0)
    data = cut.read_bytes()
    cut.chmod(0o644)
    cut.write_bytes(data[:-512])
    gone.unlink()
    assert generate(run_of(out)) == 0
    assert data_files(out) == undisturbed


def test_killed_writers_leftovers_are_swept(tmp_path, run_of):
    out = tmp_path / "set"
    (out / "frames").mkdir(parents=True)
    (out / "frames" / ".tmp-0123456789ab-000000.tar").write_bytes(b"half a shard")
    generate(run_of(out))
    assert not list(out.rglob(".tmp-*"))


def test_only_the_first_share_of_the_shards_carries_labels(tmp_path, run_of):
    out = tmp_path / "set"
    generate(run_of(out, labels_share=0.34))
    assert sorted(path.name for path in (out / "labels").glob("*.tar")) == ["000000.tar", "000001.tar"]
    dataset = open_dataset(out)
    assert ["depth" in entry.members for entry in dataset.frames] == [True] * 6 + [False]


def test_a_damaged_plan_is_rebuilt_as_its_message_says(tmp_path, run_of, data_files, undisturbed):
    out = tmp_path / "set"
    generate(run_of(out))
    (out / "dataset.json").write_text("{")
    with pytest.raises(DataError, match="dataset.json: could not be read as JSON .*delete it and call the same"):
        generate(run_of(out))
    (out / "dataset.json").unlink()
    assert generate(run_of(out)) == 0
    assert data_files(out) == undisturbed


# The hash ----------------------------------------------------------------------------------------------------------------------


def test_the_hash_covers_what_decides_bytes_and_nothing_else(tmp_path, run_of, other_generator):
    base = run_of(tmp_path / "a")
    same = [
        run_of(tmp_path / "b", workers=3, address="auto", identities=99, labels_share=0.1, licence="other", failure_share=1.0, attempts=9),
        run_of(tmp_path / "c", gpus_per_worker=0.25, object_store_mb=999),
    ]
    other = [
        dataclasses.replace(base, seed=1),
        dataclasses.replace(base, generator=other_generator),
        dataclasses.replace(base, recipe=dataclasses.replace(base.recipe, truncation_psi=0.7)),
        dataclasses.replace(base, render=RenderConfig(points=21, views_at_once=2)),
        dataclasses.replace(base, shards=dataclasses.replace(base.shards, jpeg_quality=90)),
    ]
    hashes = [make_plan(config).hash for config in (base, *same, *other)]
    assert len(set(hashes[:3])) == 1 and len(set(hashes)) == 1 + len(other)


def test_other_settings_in_the_folder_stop_the_run_and_are_named(tmp_path, run_of, data_files, undisturbed):
    out = tmp_path / "set"
    generate(run_of(out))
    with pytest.raises(ConfigError, match=r"dataset.json: .*changed: seed: 0 -> 1\. Choose another --out"):
        generate(run_of(out, seed=1))
    with pytest.raises(ConfigError, match=r"a set can grow but not shrink"):
        generate(run_of(out, identities=4))
    assert data_files(out) == undisturbed


def test_a_folder_without_a_finished_shard_can_be_used_for_other_settings(tmp_path, run_of, monkeypatch):
    out, render = tmp_path / "set", worker.render_identity

    def poisoned(genhead, recipe, config):
        raise SampleError("not finite", recipe.identity, 0)

    monkeypatch.setattr(worker, "render_identity", poisoned)
    assert generate(run_of(out, seed=1)) == 1
    monkeypatch.setattr(worker, "render_identity", render)
    assert generate(run_of(out)) == 0
    assert open_plan(out).seed == 0


def test_a_shard_of_another_data_set_is_not_taken_for_done(tmp_path, run_of):
    out, other = tmp_path / "set", tmp_path / "other"
    generate(run_of(out))
    generate(run_of(other, seed=1))
    for suffix in (".tar", ".json"):
        source, target = ((folder / shard_name("frames", 1)).with_suffix(suffix) for folder in (other, out))
        os.replace(source, target)
    with pytest.raises(ConfigError, match=r"frames/000001.json: expected a shard of settings .* two data sets are mixed"):
        generate(run_of(out))


# What goes wrong ---------------------------------------------------------------------------------------------------------------


def test_a_poisoned_shard_is_collected_and_named_and_the_rest_is_made(tmp_path, run_of, data_files, undisturbed, monkeypatch, capsys):
    render = worker.render_identity

    def poisoned(genhead, recipe, config):
        if recipe.identity == 3:
            raise SampleError("identity 3 of seed 0, motion 0: not finite", 3, 0)
        return render(genhead, recipe, config)

    out = tmp_path / "set"
    monkeypatch.setattr(worker, "render_identity", poisoned)
    assert generate(run_of(out, failure_share=0.34)) == 1
    said = capsys.readouterr().out
    assert "shard 000001 failed: identity 3 of seed 0" in said and "call the same command again" in said
    assert {entry.identity for entry in open_dataset(out).frames} == {0, 1, 4}
    monkeypatch.setattr(worker, "render_identity", render)
    assert generate(run_of(out)) == 0
    assert data_files(out) == undisturbed


def test_too_many_failures_stop_the_run(tmp_path, run_of, monkeypatch, capsys):
    tried = []

    def poisoned(genhead, recipe, config):
        tried.append(recipe.identity)
        raise SampleError("not finite", recipe.identity, 0)

    monkeypatch.setattr(worker, "render_identity", poisoned)
    assert generate(run_of(tmp_path / "set", failure_share=0.34, attempts=1)) == 1
    assert tried == [0, 2]
    said = capsys.readouterr().out
    assert "made 0 shards now" in said and "3 shards are missing" in said  # the one that was not tried is missing too
    assert "stopped, because more than 0.34 of all shards were given up (failure_share)" in said


def test_a_value_out_of_range_names_the_identity(tmp_path, run_of, monkeypatch, capsys):
    render = worker.render_identity

    def too_far(genhead, recipe, config):
        rendered = render(genhead, recipe, config)
        rendered.frames[0]["depth"] = np.full_like(rendered.frames[0]["depth"], 9.0)
        return rendered

    monkeypatch.setattr(worker, "render_identity", too_far)
    assert generate(run_of(tmp_path / "set", failure_share=0.0)) == 1
    assert "identity 0 of seed 0, motion 0: depth must lie in" in capsys.readouterr().out


def test_a_full_disk_stops_the_run_with_a_remedy_and_leaves_no_half_shard(tmp_path, run_of, data_files, undisturbed, monkeypatch):
    out, write, written = tmp_path / "set", _HashedStream.write, []

    def fills_up(self, data):
        written.append(len(data))
        if sum(written) > 200_000 and not self.abandoned:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(self, data)

    monkeypatch.setattr(_HashedStream, "write", fills_up)
    with pytest.raises(DataError, match=r"No space left on device.*check the free space"):
        generate(run_of(out))
    assert not list(out.rglob(".tmp-*")) and data_files(out).items() <= undisturbed.items()
    monkeypatch.setattr(_HashedStream, "write", write)
    assert generate(run_of(out)) == 0
    assert data_files(out) == undisturbed


def test_a_folder_that_cannot_be_written_is_an_error_with_a_remedy(tmp_path, run_of):
    (tmp_path / "file").write_text("where a folder belongs")
    with pytest.raises(DataError, match="file: could not be written: File exists"):
        generate(run_of(tmp_path / "file"))
    out = tmp_path / "set"
    (out / "log.jsonl").mkdir(parents=True)
    with pytest.raises(DataError, match="log.jsonl: could not be written: Is a directory"):
        generate(run_of(out))


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_gpu_that_is_not_there_is_an_error_before_anything_is_written(tmp_path, run_of):
    with pytest.raises(ConfigError, match="device: cuda is asked for.*--device cpu"):
        generate(run_of(tmp_path / "set", device="cuda"))


def test_a_rasteriser_that_is_missing_is_said_before_anything_is_written(tmp_path, run_of, monkeypatch):
    monkeypatch.setitem(sys.modules, "warp", None)
    with pytest.raises(ConfigError, match="rasterizer: warp is asked for"):
        generate(run_of(tmp_path / "set", rasterizer="warp"))
    assert not (tmp_path / "set").exists()
    assert not (tmp_path / "set").exists()


def test_a_second_run_on_the_same_folder_is_refused(tmp_path, run_of):
    out = tmp_path / "set"
    out.mkdir()
    with (out / ".lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(DataError, match="another `headfoundry datagen` is writing"):
            generate(run_of(out))


def test_a_cluster_that_does_not_answer_is_an_error_with_a_remedy():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # not listening: connections are refused
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(ConfigError, match=f"nothing answers at '{address}'.*ray start --head"):
            farm._check_answers(address)


def test_a_missing_generator_is_an_error_before_anything_is_written(tmp_path, run_of):
    out = tmp_path / "set"
    with pytest.raises(AssetError, match="nowhere"):
        generate(run_of(out, generator=tmp_path / "nowhere"))
    assert not out.exists()


def test_a_generator_that_changed_since_the_plan_is_refused(run_of, tmp_path, other_generator):
    plan = make_plan(run_of(tmp_path / "set"))
    with pytest.raises(AssetError, match="expected generator weights"):
        worker.load_planned_generator(plan, other_generator, "cpu")


def test_a_poisoned_frame_is_written_down_with_each_attempt_and_calling_again_mends_it(tmp_path, run_of, monkeypatch):
    render, out = worker.render_identity, tmp_path / "set"

    def poisoned(genhead, recipe, config):
        if recipe.identity == 3:
            raise SampleError("identity 3 of seed 0, motion 1: not finite", 3, 1)
        return render(genhead, recipe, config)

    monkeypatch.setattr(worker, "render_identity", poisoned)
    assert generate(run_of(out, attempts=2, failure_share=0.34)) == 1
    lines = [json.loads(line) for line in (out / LEDGER).read_text().splitlines()]
    facts = [tuple(line[name] for name in ("shard", "identity", "motion", "attempt", "given_up", "reason")) for line in lines]
    reason = "identity 3 of seed 0, motion 1: not finite"
    assert facts == [(1, 3, 1, 1, False, reason), (1, 3, 1, 2, True, reason)]
    assert lines[0]["recipe"] == frame_facts(draw_identity(make_plan(run_of(out)).recipe, 0, 3), 1)
    assert lines[0]["config_hash"] == open_plan(out).hash and lines[0]["worker"].endswith(f":{os.getpid()}")
    monkeypatch.setattr(worker, "render_identity", render)
    assert generate(run_of(out)) == 0
    assert len((out / LEDGER).read_text().splitlines()) == 2, "what happened stays on record"
