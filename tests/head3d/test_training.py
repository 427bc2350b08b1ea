"""What both training loops share."""

from pathlib import Path

import pytest
import torch

from head3d.run.checkpoint import Checkpoint, save_checkpoint
from head3d.run.errors import ConfigError
from head3d.run.training import Divergence, check_finite, crossed, part, refuse_changes, refuse_other_circumstances

SAVED = Checkpoint(Path("run/checkpoints/000000012"), 12, {}, {"circumstances": {"processes": 2}}, {})


def test_crossed_fires_once_per_multiple():
    assert [seen for seen in range(4, 41, 4) if crossed(seen, 4, 10)] == [12, 20, 32, 40]


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
