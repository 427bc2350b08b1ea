"""What the training loops share."""

import dataclasses
import os
import signal
from pathlib import Path

import pytest
import torch

from head3d.run import distributed
from head3d.run.checkpoint import Checkpoint, save_checkpoint
from head3d.run.errors import ConfigError
from head3d.run.training import Divergence, check_finite, open_run, part, refuse_changes, refuse_other_circumstances

SAVED = Checkpoint(Path("run/checkpoints/000000012"), 12, {}, {"circumstances": {"processes": 2}}, {})


@dataclasses.dataclass(frozen=True)
class Settings:
    out: Path
    total_images: int


def test_the_clock_strikes_once_per_multiple_and_at_the_end(tmp_path):
    silent, struck = distributed.Process(0, 1, torch.device("cpu"), is_main=False), []
    with open_run("run", Settings(tmp_path, 34), 4, "Try less.", None, 4, silent) as run:
        while run.goes_on:
            run.advance({"loss": run.images_seen})
            if run.due(10):
                struck.append((run.images_seen, run.means.take()["loss"]))
    assert struck == [(12, 6), (20, 14), (32, 24), (36, 32)] and not run.stopping


def test_after_a_signal_or_a_number_that_is_not_finite_the_loop_does_not_go_on(tmp_path):
    silent = distributed.Process(0, 1, torch.device("cpu"), is_main=False)
    with open_run("run", Settings(tmp_path, 34), 4, "Try less.", None, 4, silent) as run:
        with pytest.raises(Divergence, match="loss is not finite after 8 images.* Try less."):
            run.advance({"loss": float("nan")})
        os.kill(os.getpid(), signal.SIGTERM)
        run.advance({"loss": 1.0})
        assert run.stopping and not run.goes_on and run.images_seen == 12


def test_divergence_names_the_quantity_the_last_good_checkpoint_and_the_advice(tmp_path):
    save_checkpoint(tmp_path, 12, {"x": torch.zeros(1)}, {}, {}, keep=1)
    check_finite({"loss": 1.0}, 20, tmp_path, "")
    with pytest.raises(Divergence, match="generator/adversarial is not finite after 20 images") as caught:
        check_finite({"generator/adversarial": float("nan"), "x": 1.0}, 20, tmp_path, "Try less.")
    assert "000000012" in str(caught.value) and str(caught.value).endswith("Try less.")


@pytest.mark.parametrize("settings", [{"rate": 2, "out": "b"}, {"out": "b"}, {"rate": 1, "new": 0, "out": "b"}])
def test_a_changed_a_missing_and_a_new_setting_are_refused(settings):
    with pytest.raises(ConfigError, match="rate|new"):
        refuse_changes(SAVED, settings, {"rate": 1, "out": "a"}, {"out"})


def test_free_settings_may_change():
    refuse_changes(SAVED, {"rate": 1, "out": "b"}, {"rate": 1, "out": "a"}, {"out"})


def test_another_number_of_processes_is_refused():
    refuse_other_circumstances(SAVED, {"processes": 2})
    with pytest.raises(ConfigError, match="started with processes 2, now it is 1"):
        refuse_other_circumstances(SAVED, {"processes": 1})


def test_part_takes_the_names_below_a_prefix():
    assert set(part({"a/x": torch.zeros(1), "ab/x": torch.zeros(1)}, "a/")) == {"x"}
