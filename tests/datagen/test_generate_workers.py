"""Who may work on a set: machines of one kind, on one folder, on a cluster that lets this program in."""

import json
import os
from pathlib import Path

import pytest

from datagen import generate as farm
from datagen import worker
from datagen.generate import generate, make_plan
from datagen.members import ShardConfig
from datagen.plan import open_plan
from datagen.recipes import RecipeConfig
from datagen.shards import read_sidecar
from datagen.storage import open_storage
from head3d.run.errors import ConfigError, DataError


def test_a_set_goes_on_as_it_was_begun_unless_a_mixed_one_is_asked_for(tmp_path, run_of, monkeypatch):
    out, begun = tmp_path / "set", worker.versions
    assert generate(run_of(out, identities=2)) == 0
    monkeypatch.setattr(worker, "versions", lambda *stack: begun(*stack) | {"torch": "0.1", "processor": "abacus"})
    with pytest.raises(ConfigError, match=r"processor: \S+ -> abacus, torch: \S+ -> 0\.1.*--mixed true"):
        generate(run_of(out, identities=4))
    assert open_plan(out).identities == 2, "the folder is not claimed for what cannot be made"
    assert generate(run_of(out, identities=4, mixed=True)) == 0
    stated = [read_sidecar(out, "frames", shard)["versions"] for shard in (0, 1)]
    assert [versions["processor"] for versions in stated] == [begun("cpu", "torch")["processor"], "abacus"]
    assert json.loads((out / "dataset.json").read_text())["versions"] == begun("cpu", "torch")


def test_workers_on_two_kinds_of_device_must_be_asked_for(run_of, tmp_path):
    with pytest.raises(ValueError, match="cpu_workers: expected 0 where mixed is false, got 2"):
        run_of(tmp_path, cpu_workers=2)


@pytest.mark.parametrize(
    ("changes", "resources", "posts"),
    [
        ({"workers": 3}, {"CPU": 8}, [("cpu", 3, 0)]),
        ({"workers": 3, "device": "auto"}, {"CPU": 8, "GPU": 2}, [("cuda", 3, 1)]),
        ({"workers": "auto", "device": "auto", "gpus_per_worker": 0.25}, {"CPU": 8, "GPU": 2}, [("cuda", None, 0.25)]),
        ({"workers": "auto", "device": "cpu"}, {"CPU": 8, "GPU": 2}, [("cpu", None, 0)]),
        ({"workers": 3, "device": "auto", "cpu_workers": 5, "mixed": True}, {"CPU": 8, "GPU": 1}, [("cuda", 3, 1), ("cpu", 5, 0)]),
        ({"workers": 3, "device": "auto", "cpu_workers": 5, "mixed": True}, {"CPU": 8}, [("cpu", 8, 0)]),
        ({"workers": 3, "device": "cuda", "address": "auto"}, {"CPU": 8}, [("cuda", 3, 1)]),  # GPU nodes may join later
    ],
)
def test_workers_are_asked_for_where_the_cluster_can_render(tmp_path, run_of, changes, resources, posts):
    config = run_of(tmp_path / "set", **changes)
    plan = make_plan(run_of(tmp_path / "set"))
    found = farm._posts(config, open_storage(config.out), plan, resources)
    assert [(post.arguments[1].device, post.wanted, post.gpus) for post in found] == posts
    assert all(post.arguments[1].hash == plan.hash for post in found)


def test_a_share_of_a_gpu_that_this_machine_does_not_have_is_an_error_and_no_endless_wait(tmp_path, run_of):
    config = run_of(tmp_path / "set", workers=1, device="cuda", gpus_per_worker=2.0)
    with pytest.raises(ConfigError, match="asks for 2 GPUs, this machine has 1"):
        farm._posts(config, open_storage(config.out), make_plan(run_of(tmp_path / "set")), {"CPU": 2, "GPU": 1})


def test_a_folder_that_the_nodes_do_not_share_is_found_out_before_the_first_shard(tmp_path, run_of):
    here, elsewhere = (open_storage(tmp_path / name) for name in ("here", "elsewhere"))
    maker = worker.ShardMaker(here, make_plan(run_of(here.address)), tmp_path)
    with farm._probe(here) as probe:
        assert maker.introduce(probe).name == f"{os.uname().nodename}:{os.getpid()}"
        maker.out = elsewhere
        with pytest.raises(DataError, match=r"elsewhere.*: .* does not see what another machine has written there.*a file system that all"):
            maker.introduce(probe)
    assert list((tmp_path / "here").iterdir()) == []
    with farm._probe(open_storage("memory://set")) as probe:
        assert probe is None


def test_a_cluster_that_refuses_says_what_to_set(monkeypatch):
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    said = farm._no_cluster("10.0.0.1:6379", ConnectionError("Failed to connect"))
    assert "RAY_AUTH_MODE=token (now disabled)" in said and "RAY_AUTH_TOKEN" in said and "ray get-auth-token" in said


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux")
def test_the_memory_of_a_worker_stays_flat_over_two_hundred_shards(tmp_path, run_of):
    """A worker that kept one shard's arrays or bytes would grow by twice the bound."""
    one_picture = RecipeConfig(dynamic_share=0.0, static_views=1)
    plan = make_plan(run_of(tmp_path / "set", identities=200, recipe=one_picture, shards=ShardConfig(identities_per_shard=1)))
    maker = worker.ShardMaker(open_storage(tmp_path / "set"), plan, Path(plan.generator.folder))
    resident = []
    for shard in range(200):
        written = maker.make(shard).bytes
        resident.append(int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"))
    assert resident[199] - resident[39] < 160 * written / 2
