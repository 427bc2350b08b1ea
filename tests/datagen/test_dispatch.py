"""Who makes which shard, and again, and when one is given up."""

import pickle

from datagen.dispatch import LOSSES, Dispatch
from datagen.labels import SampleError

EVERYBODY = ["a:1", "a:2", "b:1"]


def test_shards_are_handed_out_once_and_in_order():
    dispatch = Dispatch([4, 7, 9], attempts=3, allowed_failures=0)
    assert [dispatch.take("a:1", EVERYBODY) for _ in range(4)] == [4, 7, 9, None]
    assert (dispatch.unfinished, dispatch.waiting) == (3, 0)
    dispatch.made(7)
    assert dispatch.unfinished == 2 and not dispatch.stopped


def test_a_failed_shard_goes_to_another_machine_then_to_another_worker_then_to_any():
    dispatch = Dispatch([0, 1], attempts=9, allowed_failures=0)
    assert dispatch.take("a:1", EVERYBODY) == 0
    assert dispatch.failed(0, "a:1", "not finite") is False
    assert dispatch.take("a:2", EVERYBODY) == 1, "0 waits for machine b"
    assert dispatch.take("a:2", EVERYBODY) is None
    assert dispatch.take("b:1", EVERYBODY) == 0
    dispatch.failed(0, "b:1", "not finite")
    assert [dispatch.take(worker, EVERYBODY) for worker in ("a:1", "b:1")] == [None, None], "both have failed on it"
    assert dispatch.take("a:2", EVERYBODY) == 0
    dispatch.failed(0, "a:2", "not finite")
    assert dispatch.take("a:1", EVERYBODY) is None, "machine a failed twice, b once"
    assert dispatch.take("b:1", EVERYBODY) == 0


def test_a_single_worker_tries_again_itself():
    dispatch = Dispatch([0], attempts=2, allowed_failures=0)
    assert dispatch.take("a:1", ["a:1"]) == 0 and dispatch.attempt(0) == 1
    assert dispatch.failed(0, "a:1", "first") is False
    assert dispatch.take("a:1", ["a:1"]) == 0 and dispatch.attempt(0) == 2
    assert dispatch.failed(0, "a:1", "second") is True
    assert dispatch.given_up == {0: "second"} and dispatch.unfinished == 0


def test_more_given_up_than_allowed_stops_the_run():
    dispatch = Dispatch(range(5), attempts=1, allowed_failures=1)
    dispatch.failed(dispatch.take("a:1", ["a:1"]), "a:1", "")
    assert not dispatch.stopped
    assert dispatch.take("a:1", ["a:1"]) == 1
    dispatch.failed(1, "a:1", "")
    assert dispatch.stopped and dispatch.take("a:1", ["a:1"]) is None and dispatch.unfinished == 3


def test_a_lost_machine_is_not_held_against_a_shard_but_not_for_ever():
    dispatch = Dispatch([0], attempts=1, allowed_failures=0)
    for loss in range(LOSSES):
        assert dispatch.take("a:1", ["a:1"]) == 0 and dispatch.attempt(0) == loss + 1
        assert dispatch.lost(0, "gone") is (loss == LOSSES - 1)
    assert dispatch.given_up == {0: "gone"}


def test_a_shard_that_was_never_begun_is_the_next_again():
    dispatch = Dispatch([0, 1], attempts=1, allowed_failures=0)
    dispatch.take("a:1", ["a:1"])
    dispatch.put_back(0)
    assert dispatch.take("a:1", ["a:1"]) == 0 and dispatch.attempt(0) == 1


def test_the_frame_to_blame_travels_with_the_error():
    error = pickle.loads(pickle.dumps(SampleError("not finite", 3, 1)))
    assert (str(error), error.identity, error.motion) == ("not finite", 3, 1)
