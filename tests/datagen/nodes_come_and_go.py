"""The farm on a real cluster of several nodes, all on this machine: nodes join and leave, and the bytes stay."""

import json
import os
import time

import pytest

from datagen import crew
from datagen.generate import generate
from datagen.ledger import LEDGER
from datagen.worker import ShardMaker

WAIT_S = 300  # until a test gives up; it never waits that long unless something is wrong


@pytest.fixture(scope="module")
def cluster():
    """A head without room for workers; tests add nodes. `generate` uses the connection that the program has."""
    ray = pytest.importorskip("ray")
    utilities = pytest.importorskip("ray.cluster_utils")
    before = {name: os.environ.get(name) for name in ("RAY_AUTH_MODE", "RAY_USAGE_STATS_ENABLED")}
    os.environ.update(RAY_AUTH_MODE="disabled", RAY_USAGE_STATS_ENABLED="0")
    cluster = utilities.Cluster(
        initialize_head=True, head_node_args={"num_cpus": 0, "object_store_memory": 80 << 20, "include_dashboard": False}
    )
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    yield cluster
    ray.shutdown()
    cluster.shutdown()
    for name, value in before.items():
        os.environ.pop(name) if value is None else os.environ.__setitem__(name, value)


@pytest.fixture
def add_node(cluster):
    """Adds a node with room for one worker; takes it away when the test ends."""
    nodes = []

    def add():
        nodes.append(cluster.add_node(num_cpus=1, object_store_memory=80 << 20))
        return nodes[-1]

    yield add
    for node in nodes:
        if node in cluster.worker_nodes:
            cluster.remove_node(node, allow_graceful=False)


def test_nodes_join_leave_and_join_during_a_run_and_the_bytes_are_those_of_one_process(
    tmp_path, run_of, data_files, cluster, add_node, monkeypatch
):
    """One node, then a second, the first is killed with shards in its hands, then a third: each of them makes some."""
    out, seen = tmp_path / "set", tmp_path / "seen"
    seen.mkdir()

    class Meeting(ShardMaker):
        """Makes one shard, and the others once three workers have begun one."""

        def make(self, shard):
            deadline = time.monotonic() + WAIT_S
            while (seen / str(os.getpid())).exists() and len(list(seen.iterdir())) < 3 and time.monotonic() < deadline:
                time.sleep(0.02)
            (seen / str(os.getpid())).touch()
            return super().make(shard)

    make, nodes, workers = crew.Crew.make, [add_node()], []

    def change_nodes(self, *arguments):
        for report in make(self, *arguments):
            if report.worker not in workers:
                workers.append(report.worker)
                if len(workers) == 2:
                    cluster.remove_node(nodes[0], allow_graceful=False)
                if len(workers) < 3:
                    nodes.append(add_node())
            yield report

    monkeypatch.setattr(crew, "ShardMaker", Meeting)
    monkeypatch.setattr(crew.Crew, "make", change_nodes)
    assert generate(run_of(out, workers="auto", identities=20)) == 0
    monkeypatch.undo()
    assert len(workers) == 3 and len(nodes) == 3
    made = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert sorted(line["shard"] for line in made) == list(range(10))
    failures = [json.loads(line) for line in (out / LEDGER).read_text().splitlines()]
    assert {line["worker"] for line in failures} == {workers[0]} and not any(line["given_up"] for line in failures)
    undisturbed = tmp_path / "undisturbed"
    assert generate(run_of(undisturbed, identities=20)) == 0
    assert data_files(out) == data_files(undisturbed)
