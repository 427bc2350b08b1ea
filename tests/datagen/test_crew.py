"""Hiring, blaming and replacing workers, on a stand-in for Ray that does what a test says, at once and in order."""

import itertools
import json
import types

import pytest

from datagen import crew as crew_module
from datagen.crew import FAILURES_IN_A_ROW, FALSE_STARTS, IN_FLIGHT, Crew, Post
from datagen.dispatch import Dispatch
from datagen.generate import make_plan
from datagen.labels import SampleError
from datagen.ledger import LEDGER, Ledger
from datagen.storage import open_storage
from datagen.worker import Introduction, ShardReport
from head3d.run.errors import ConfigError, DataError


class RayError(Exception):
    pass


class RayTaskError(RayError):
    def __init__(self, cause):
        super().__init__(f"remote traceback of {cause}")
        self.cause = cause


class ActorDiedError(RayError):
    pass


class ActorUnavailableError(RayError):
    pass


class Call:
    """A method of an actor; its reference is (actor, work)."""

    def __init__(self, actor, method):
        self.actor, self.method = actor, method

    def remote(self, *arguments):
        return (next(self.actor.ray.calls), self.actor, self.method, arguments)


class Actor:
    """A worker of one node; `make` is the test's, which sees the worker's number."""

    def __init__(self, ray, number):
        self.ray, self.number, self.node, self.dead = ray, number, f"node{number}", False
        self.introduce, self.make, self.__ray_call__ = Call(self, self._introduce), Call(self, self._make), Call(self, lambda _: self.node)

    def _introduce(self, probe):
        return self.ray.arrive(self.number) or Introduction(f"host{self.number}:1", {"device": "cpu"})

    def _make(self, shard):
        return self.ray.make(self.number, shard) or ShardReport(shard, 1, 1, 1, 0.0, {}, 0.0, f"host{self.number}:1")


class FakeRay:
    """`room` actors are placed at once; the others wait for the death of one."""

    exceptions = types.SimpleNamespace(
        RayError=RayError, RayTaskError=RayTaskError, ActorDiedError=ActorDiedError, ActorUnavailableError=ActorUnavailableError
    )

    def __init__(self, room, make=lambda worker, shard: None, arrive=lambda worker: None, newest_first=False):
        self.room, self.make, self.arrive, self.newest_first = room, make, arrive, newest_first
        self.actors, self.calls, self.gone, self.most_in_flight = [], itertools.count(), set(), 0

    def remote(self, maker, *arguments):
        """The decorator of a class, and the making of an actor."""
        if maker is crew_module.ShardMaker:
            return types.SimpleNamespace(options=lambda **_: types.SimpleNamespace(remote=self._start))
        raise AssertionError(maker)

    def _start(self, *arguments):
        self.actors.append(Actor(self, len(self.actors)))
        return self.actors[-1]

    def wait(self, references, num_returns, timeout):
        placed = [actor for actor in self.actors if not actor.dead][: self.room]
        self.most_in_flight = max(self.most_in_flight, len(references))
        ready = [reference for reference in references if reference[1] in placed or reference[1].dead]
        return sorted(ready, key=lambda reference: reference[0], reverse=self.newest_first)[:1], []

    def get(self, reference):
        if isinstance(reference, list):
            return [self.get(each) for each in reference]
        _, actor, method, arguments = reference
        if actor.dead:
            raise ActorDiedError("the actor is dead")
        try:
            return method(*arguments)
        except RayError as error:
            actor.dead = not isinstance(error, RayTaskError)
            raise
        except Exception as error:
            raise RayTaskError(error) from error

    def kill(self, actor):
        actor.dead = True

    def nodes(self):
        return [{"NodeID": actor.node, "Alive": actor.node not in self.gone} for actor in self.actors]

    def cluster_resources(self):
        return {"CPU": float(self.room)}


@pytest.fixture
def run(tmp_path, run_of):
    """run(ray, shards, wanted) -> (shards in the order in which they were made, dispatch, lines of the ledger)."""
    config = run_of(tmp_path / "set")
    plan, out = make_plan(config), open_storage(config.out)

    def run(ray, shards=4, wanted=2, attempts=3, allowed=0, accept=lambda worker: None):
        dispatch = Dispatch(range(shards), attempts, allowed)
        made = []
        try:
            with Ledger(plan, out) as ledger:
                for report in Crew(ray, [Post((), wanted, cpus=1, gpus=0)], None, accept).make(dispatch, ledger):
                    made.append(report.shard)
        finally:
            assert all(actor.dead for actor in ray.actors), "no worker outlives the run"
        path = tmp_path / "set" / LEDGER
        return made, dispatch, [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    return run


def test_every_shard_is_made_once_with_two_calls_in_flight_at_most(run):
    ray = FakeRay(room=2)
    made, dispatch, lines = run(ray, shards=9)
    assert sorted(made) == list(range(9)) and lines == [] and dispatch.unfinished == 0
    assert len(ray.actors) == 2 and ray.most_in_flight == 2 * IN_FLIGHT


def test_no_more_workers_are_hired_than_there_are_shards(run):
    ray = FakeRay(room=9)
    run(ray, shards=3, wanted=9)
    assert len(ray.actors) == 3


def test_an_open_number_of_workers_grows_while_there_is_room(run):
    ray = FakeRay(room=5)
    made, _, _ = run(ray, shards=40, wanted=None)
    assert sorted(made) == list(range(40))
    assert len(ray.actors) == 11, "five work, one more than that wait for room"


@pytest.mark.parametrize("newest_first", [False, True])
def test_of_a_worker_that_dies_the_shard_it_was_making_is_blamed_and_the_one_that_waited_is_not(run, newest_first):
    def make(worker, shard):
        if worker == 0:
            raise ActorDiedError("killed")

    made, _, lines = run(FakeRay(room=1, make=make, newest_first=newest_first), shards=4, wanted=1)
    assert sorted(made) == [0, 1, 2, 3]
    assert [(line["shard"], line["attempt"], line["given_up"], line["worker"]) for line in lines] == [(0, 1, False, "host0:1")]
    assert lines[0]["reason"] == "ActorDiedError: killed" and lines[0]["recipe"] is None


def test_a_shard_that_kills_its_workers_is_given_up_and_the_rest_is_made(run):
    def make(worker, shard):
        if shard == 1:
            raise ActorDiedError("out of memory")

    made, dispatch, lines = run(FakeRay(room=2, make=make), shards=5, allowed=1)
    assert sorted(made) == [0, 2, 3, 4] and dispatch.given_up == {1: "ActorDiedError: out of memory"}
    assert [(line["attempt"], line["given_up"]) for line in lines] == [(1, False), (2, False), (3, True)]
    assert len({line["worker"] for line in lines}) == 3


@pytest.mark.parametrize("known", [True, False])
def test_nodes_that_leave_take_no_shard_down_whether_their_end_is_known_yet_or_not(run, known):
    ray = FakeRay(room=1)

    def make(worker, shard):
        if worker < 5:
            if known:
                ray.gone.add(f"node{worker}")
                raise ActorDiedError("its node has died")
            raise ActorUnavailableError("socket closed")

    ray.make = make
    made, dispatch, lines = run(ray, shards=2, wanted=1, attempts=1)
    assert sorted(made) == [0, 1] and dispatch.given_up == {} and len(lines) == 5


def test_a_poisoned_frame_is_tried_by_other_workers_and_written_down_with_its_recipe(run):
    def make(worker, shard):
        if shard == 1:
            raise SampleError("identity 3: not finite", 3, 1)

    made, dispatch, lines = run(FakeRay(room=3, make=make), shards=4, wanted=3, allowed=1)
    assert sorted(made) == [0, 2, 3] and dispatch.given_up == {1: "identity 3: not finite"}
    assert [line["attempt"] for line in lines] == [1, 2, 3] and len({line["worker"] for line in lines}) == 3
    assert all(
        (line["identity"], line["motion"], line["recipe"]["identity"], line["recipe"]["kind"]) == (3, 1, 3, "dynamic") for line in lines
    )
    assert len(lines[0]["recipe"]["condition_camera"]) == 25


def test_the_run_stops_once_more_shards_than_allowed_are_given_up(run):
    def make(worker, shard):
        raise SampleError("not finite", 0, 0)

    made, dispatch, _ = run(FakeRay(room=1, make=make), shards=9, wanted=1, attempts=1, allowed=2)
    assert made == [] and list(dispatch.given_up) == [0, 1, 2] and dispatch.unfinished == 6


def test_a_full_disk_stops_the_run_once_other_workers_have_met_it_too(run):
    def make(worker, shard):
        raise DataError("frames/000000.tar: could not be written: No space left on device")

    ray = FakeRay(room=2, make=make)
    with pytest.raises(DataError, match="No space left"):
        run(ray, allowed=4)
    assert len(ray.actors) == 2, "another process would not mend that"


def test_a_defect_reaches_the_user_with_its_remote_traceback(run):
    def make(worker, shard):
        raise ZeroDivisionError("defect")

    with pytest.raises(RayTaskError, match="remote traceback of defect"):
        run(FakeRay(room=2, make=make), allowed=4)


def test_a_process_in_which_everything_fails_is_replaced(run):
    def make(worker, shard):
        if worker == 0:
            raise SampleError("not finite", 0, 0)

    ray = FakeRay(room=1, make=make)
    made, _, lines = run(ray, shards=4, wanted=1, attempts=9)
    assert sorted(made) == [0, 1, 2, 3] and len(ray.actors) == 2 and len(lines) == FAILURES_IN_A_ROW


def test_workers_that_die_as_they_start_stop_the_run_but_not_if_some_live(run):
    def arrive(worker):
        if worker != 1:
            raise ActorDiedError("no module named datagen")

    with pytest.raises(DataError, match="5 in a row died as they started.*no module named datagen.*same version"):
        run(FakeRay(room=1, arrive=arrive, make=lambda worker, shard: arrive(0)), wanted=1)
    ray = FakeRay(room=1, arrive=lambda worker: arrive(1 if worker % FALSE_STARTS == FALSE_STARTS - 1 else 0))
    assert sorted(run(ray, wanted=1)[0]) == [0, 1, 2, 3]


def test_a_worker_that_is_refused_stops_the_run_at_its_start_and_keeps_idle_later(run, capsys):
    def accept(worker):
        if worker.name == "host2:1":
            raise ConfigError("another processor")

    tried = []
    ray = FakeRay(room=3, make=lambda worker, shard: tried.append(worker))
    made, _, _ = run(ray, shards=30, wanted=None, accept=accept)  # one, then three: the third comes when shards have been made
    assert sorted(made) == list(range(30)) and 2 not in tried and len(ray.actors) > 2
    assert "a worker that joined gets no shards: another processor" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="another processor"):
        run(FakeRay(room=3), wanted=3, accept=accept)


def test_what_is_waited_for_is_said_when_there_is_no_room(run, capsys, monkeypatch):
    clock = itertools.count(0, 40.0)
    monkeypatch.setattr(crew_module, "time", types.SimpleNamespace(monotonic=lambda: next(clock)))
    ray = FakeRay(room=0)
    waits = itertools.count()
    wait = ray.wait

    def joined_after_a_while(references, num_returns, timeout):
        ray.room = int(next(waits) > 4)
        return wait(references, num_returns, timeout)

    ray.wait = joined_after_a_while
    made, _, _ = run(ray)
    assert sorted(made) == [0, 1, 2, 3]
    said = capsys.readouterr().err
    assert said.count("waiting for a first worker: each needs 1 CPU and 0 GPU, the cluster has 0 CPU") == 1
