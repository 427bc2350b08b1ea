"""One shard: encoding and writing go on while the next identity is rendered, and change nothing."""

import threading

import pytest

from datagen import worker
from datagen.generate import make_plan
from datagen.labels import SampleError
from datagen.storage import open_storage
from datagen.worker import OrderedThread, load_planned_generator, make_shard
from head3d.run.errors import DataError


def make(run, folder, shard=0):
    plan = make_plan(run)
    return make_shard(load_planned_generator(plan, run.generator, "cpu"), open_storage(folder), plan, shard)


class Inline:
    """Stands in for the thread: does each task at once."""

    def __init__(self, ahead):
        pass

    def put(self, task, *arguments):
        task(*arguments)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


def test_a_shard_has_the_same_bytes_with_and_without_the_thread(tmp_path, run_of, data_files, monkeypatch):
    run = run_of(tmp_path / "run")
    overlapped, inline = tmp_path / "overlapped", tmp_path / "inline"
    report = make(run, overlapped)
    monkeypatch.setattr(worker, "OrderedThread", Inline)
    again = make(run, inline)
    assert data_files(overlapped) == data_files(inline) and len(data_files(inline)) == 6
    assert (report.frames, report.bytes) == (again.frames, again.bytes) and report.frames == 3


def test_the_next_identity_is_rendered_while_the_one_before_is_not_yet_encoded(tmp_path, run_of, monkeypatch):
    """Encoding waits here until the second rendering has begun: without the overlap neither would go on."""
    rendering, encode, render, calls, overlapped = threading.Event(), worker.encode_sample, worker.render_identity, [], []

    def counted(genhead, recipe, config):
        calls.append(recipe.identity)
        if len(calls) == 2:
            rendering.set()
        return render(genhead, recipe, config)

    def waiting(*arguments):
        overlapped.append(rendering.wait(timeout=60) and threading.current_thread() is not threading.main_thread())
        return encode(*arguments)

    monkeypatch.setattr(worker, "render_identity", counted)
    monkeypatch.setattr(worker, "encode_sample", waiting)
    make(run_of(tmp_path / "run"), tmp_path / "set")
    assert calls == [0, 1] and overlapped and all(overlapped)


@pytest.mark.parametrize("failing", [0, 1])
def test_a_frame_that_cannot_be_encoded_is_the_shards_error_and_leaves_nothing(tmp_path, run_of, monkeypatch, failing):
    encode = worker.encode_sample

    def refuse(members, values, scales, config):
        if "json" in values and values["json"]["identity"] == failing:
            raise ValueError("depth must lie in [3, 5]")
        return encode(members, values, scales, config)

    monkeypatch.setattr(worker, "encode_sample", refuse)
    with pytest.raises(SampleError, match=f"identity {failing} of seed 0, motion 0: depth must lie in") as caught:
        make(run_of(tmp_path / "run"), tmp_path / "set")
    assert (caught.value.identity, caught.value.motion) == (failing, 0)
    assert not [path for path in (tmp_path / "set").rglob("*") if path.is_file()]


def test_tasks_are_done_in_order_and_at_most_so_many_wait():
    done, waiting = [], []
    with OrderedThread(2) as thread:
        for number in range(20):
            thread.put(done.append, number)
            waiting.append(len(thread._pending))
    assert done == list(range(20)) and max(waiting) <= 2


def test_an_error_ends_the_block_and_drops_the_tasks_behind_it():
    begun, done = threading.Event(), []

    def fail():
        begun.wait(timeout=60)
        raise DataError("the disk is full")

    with pytest.raises(DataError, match="the disk is full"), OrderedThread(1) as thread:
        thread.put(fail)
        begun.set()
        thread.put(done.append, 1)  # waits for the first, and raises its error
    assert done == []


def test_an_error_of_the_owner_is_not_hidden_by_one_of_a_task():
    def fail():
        raise DataError("the disk is full")

    with pytest.raises(SampleError, match="not finite"), OrderedThread(4) as thread:
        thread.put(fail)
        raise SampleError("not finite", 0, 0)
