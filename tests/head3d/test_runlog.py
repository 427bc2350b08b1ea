"""The run log reads, after a resume, as if nothing had happened."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from head3d.run.errors import DataError
from head3d.run.runlog import Means, RunLog, progress, read_metrics

PICTURE = np.zeros((4, 6, 3), np.uint8)


def test_numbers_and_pictures_are_written_under_their_clock(tmp_path):
    with RunLog(tmp_path, 0) as log:
        log.scalars(8, {"loss/r1": torch.tensor(0.5), "rate": 1e-3})
        log.scalars(16, {"loss/r1": float("nan")})
        log.image(16, "samples/views", PICTURE)
    assert read_metrics(tmp_path) == [{"images_seen": 8, "loss/r1": 0.5, "rate": 0.001}, {"images_seen": 16, "loss/r1": None}]
    assert os.listdir(tmp_path / "pictures") == ["000000016_samples_views.png"]
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("rate")] == [(8, np.float32(1e-3))]
    assert events.Images("samples/views")[0].step == 16


def test_a_resume_drops_what_a_lost_state_had_written(tmp_path):
    with RunLog(tmp_path, 0) as log:
        for images in (8, 16, 24):
            log.scalars(images, {"loss": images})
            log.image(images, "views", PICTURE)
    with RunLog(tmp_path, 16) as log:
        log.scalars(24, {"loss": -1})
        log.image(24, "depth", PICTURE)
    assert [(line["images_seen"], line["loss"]) for line in read_metrics(tmp_path)] == [(8, 8), (16, 16), (24, -1)]
    assert sorted(os.listdir(tmp_path / "pictures")) == ["000000008_views.png", "000000016_views.png", "000000024_depth.png"]
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(8, 8), (16, 16), (24, -1)]


def test_a_line_cut_short_by_a_kill_is_left_out(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"images_seen": 8, "loss": 1.0}\n{"images_seen": 16, "lo')
    assert read_metrics(tmp_path) == [{"images_seen": 8, "loss": 1.0}]
    with RunLog(tmp_path, 99) as log:
        log.scalars(24, {"loss": 2.0})
    assert [line["images_seen"] for line in read_metrics(tmp_path)] == [8, 24]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's always full device")
def test_a_full_disk_is_a_data_error_that_names_the_file(tmp_path):
    with pytest.raises(DataError, match=r"metrics\.jsonl: could not be written: No space left on device"), RunLog(tmp_path, 0) as log:
        log._metrics.close()
        log._metrics = Path("/dev/full").open("a")  # noqa: SIM115 (the log closes it)
        log.scalars(8, {"loss": 1.0})


def test_a_run_that_has_not_logged_has_no_metrics(tmp_path):
    assert read_metrics(tmp_path) == []


def test_a_silent_log_writes_nothing(tmp_path):
    with RunLog(tmp_path / "run", 0, enabled=False) as log:
        log.scalars(8, {"loss": 1.0})
        log.image(8, "views", PICTURE)
    assert not (tmp_path / "run").exists()


def test_means_count_a_number_where_it_was_computed_and_outlive_a_stop():
    means = Means()
    means.add({"loss": 1.0, "r1": 0.1})
    means.add({"loss": 2.0})
    resumed = Means(json.loads(json.dumps(means.state())))
    for one in (means, resumed):
        one.add({"loss": 6.0, "r1": 0.2})
        assert one.take() == {"loss": 3.0, "r1": (0.1 + 0.2) / 2}
        assert one.state() == {} and one.take() == {}


def test_a_bar_counts_an_iterable_or_what_it_is_told(monkeypatch):
    monkeypatch.setattr("sys.stderr", io.StringIO())
    assert list(progress([1, 2, 3], "reading")) == [1, 2, 3]
    with progress(100, "training", "img", initial=40) as bar:
        bar.update(8)
        assert (bar.n, bar.total, bar.unit) == (48, 100, "img")
    assert list(progress([1], "silent", enabled=False)) == [1]
