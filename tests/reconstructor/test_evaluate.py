"""Evaluation against exact truth on a tiny held-out set: what is written, printed and left out."""

import csv
import dataclasses
import json
import math

import pytest
import torch
from PIL import Image

from datagen.reading import open_dataset
from head3d.run.errors import AssetError, ConfigError
from reconstructor import evaluate as evaluation
from reconstructor.evaluate import ROWS, EvaluateRun, evaluate, predict
from reconstructor.evaluation_cases import MEAN_HEAD_TASKS, STORED_TASKS, TASKS, Sample
from reconstructor.evaluation_measures import METRICS, STEADINESS_METRICS
from reconstructor.evaluation_tables import summarise, text_table
from reconstructor.model import load_reconstructor
from reconstructor.motion_vectors import MotionVectors
from reconstructor.perception_errors import PICTURE_UNITS
from reconstructor.published_perception import UNITS, PublishedNetworks
from reconstructor.train import train


@pytest.fixture(scope="module")
def trained(world, tmp_path_factory):
    config = world.run(tmp_path_factory.mktemp("trained") / "run", total_images=4)
    assert train(config) == 0
    return config.out / "export"


@pytest.fixture
def config(world, trained, tmp_path):
    return EvaluateRun(
        out=tmp_path / "evaluation",
        reconstructor=trained,
        shards=world.shards,
        generator=world.generator,
        samples=2,
        sequence_frames=3,
        sheet_rows=3,
        batch=3,
        resamples=50,
    )


def rows_of(task):
    return [*ROWS, *(["mean_head"] if task in MEAN_HEAD_TASKS else []), *(["rerendered"] if task in STORED_TASKS else [])]


def test_results_are_written_and_a_second_call_only_prints(config, capsys, monkeypatch):
    assert evaluate(config) == 0
    result = json.loads((config.out / "evaluation.json").read_text())
    assert list(result["tasks"]) == list(TASKS)
    for task, content in result["tasks"].items():
        assert list(content["rows"]) == rows_of(task)
        for row, metrics in content["rows"].items():
            of_picture = (
                set(METRICS) - {"opacity_iou"} - (set() if row in ("ours", "rerendered", "mean_head") else {"depth"})
            )  # all heads are a fog
            assert set(metrics) == (set(STEADINESS_METRICS) if task == "steadiness" else of_picture)
            assert all(value["low"] <= value["mean"] <= value["high"] for value in metrics.values())
        parts = content["bins"].values()
        assert not parts or sum(part["samples"] for part in parts) == content["samples"]
    stored = result["tasks"]["static_lift"]["rows"]
    assert stored["copy_source"]["psnr"]["mean"] == 100 and stored["copy_source"]["eye_l1"]["mean"] == 0  # it is the truth there
    assert stored["rerendered"]["psnr"]["mean"] > stored["ours"]["psnr"]["mean"]
    with (config.out / "samples.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == sum(content["samples"] * len(content["rows"]) for content in result["tasks"].values())
    mine = [float(line["psnr"]) for line in lines if line["task"] == "self_reenactment" and line["row"] == "ours"]
    assert sum(mine) / len(mine) == pytest.approx(result["tasks"]["self_reenactment"]["rows"]["ours"]["psnr"]["mean"], abs=1e-5)
    with (config.out / "table.csv").open() as file:
        table = {(line["task"], line["bin"], line["row"], line["metric"]): line for line in csv.DictReader(file)}
    assert len(table) == len(result["rows"])
    whole = result["tasks"]["novel_view"]["rows"]["ours"]["ssim"]
    assert float(table["novel_view", "", "ours", "ssim"]["low"]) == whole["low"]
    for task in TASKS:
        shown = min(config.sheet_rows, result["tasks"][task]["samples"])
        rows, columns = (2 * shown, 1 + config.sequence_frames) if task == "steadiness" else (shown, 5)
        assert Image.open(config.out / f"sheet_{task}.png").size == (columns * 34 - 2, rows * 34 - 2)
    page = (config.out / "index.html").read_text()
    assert all(f"<h2>{task.replace('_', ' ').capitalize()}</h2>" in page for task in TASKS)
    assert page.count("data:image/jpeg") == len(TASKS) and f"<td>{whole['mean']:.4f} [" in page
    printed = capsys.readouterr().out
    assert "cross reenactment" in printed and "copy source" in printed
    monkeypatch.setattr(evaluation, "measure_all", None)
    assert evaluate(config) == 0
    assert "measured before" in capsys.readouterr().out


def test_a_perception_network_adds_what_it_sees_and_its_own_error(config, tiny_perception, tmp_path, capsys):
    tiny_perception(tmp_path / "judge", "evaluation")
    tasks = ("static_lift", "cross_reenactment")
    config = dataclasses.replace(config, out=tmp_path / "out", perception=tmp_path / "judge", samples=1, tasks=tasks)
    assert evaluate(config) == 0
    result = json.loads((config.out / "evaluation.json").read_text())
    assert result["metrics"].keys() == METRICS.keys() | PICTURE_UNITS.keys() and result["perception_errors"]["pictures"] == 9
    page = (config.out / "index.html").read_text()
    assert list(result["tasks"]) == list(tasks) and "Left out" not in page
    assert "<h2>The perception network</h2>" in page and "9 pictures of 7 people" in page
    for task, content in result["tasks"].items():
        rows = content["rows"]
        assert content["identities"] <= len({frame.identity for frame in open_dataset(config.shards).frames if frame.split == "test"})
        assert list(rows) == [*rows_of(task), "truth"]
        assert set(rows["truth"]) == set(PICTURE_UNITS)
        assert rows["truth"]["perceptual"]["mean"] == 0 <= rows["copy_source"]["perceptual"]["mean"]
        assert (rows["copy_source"]["perceptual"]["mean"] == 0) == (task == "static_lift")
        assert rows["copy_source"]["identity_cosine"]["mean"] == pytest.approx(1, abs=1e-5)
    for _ in range(2):  # the second call only prints
        printed = capsys.readouterr().out
        assert evaluate(config) == 0
        assert "the perception network's own error on 9 pictures of 7 people held out" in printed and "jaw_deg" in printed
    tiny_perception(tmp_path / "judge", "losses")
    with pytest.raises(AssetError, match="trained with --role evaluation, got losses"):
        evaluate(dataclasses.replace(config, out=tmp_path / "other"))


def test_networks_that_the_user_has_are_asked_too_and_keep_their_names(config, tmp_path, monkeypatch):
    asked = []

    def load(lpips, arcface, head):
        asked.append((lpips, arcface))
        return PublishedNetworks(
            lambda pictures, truth: (pictures - truth).abs().mean((1, 2, 3)),
            lambda faces: torch.nn.functional.normalize(faces.flatten(1), dim=1),
            head,
        )

    monkeypatch.setattr(evaluation, "load_published_networks", load)
    (tmp_path / "alex.pth").write_bytes(b"weights")
    config = dataclasses.replace(config, lpips=(tmp_path / "alex.pth",), samples=1, tasks=("static_lift", "cross_reenactment"))
    assert evaluate(config) == 0 and asked == [((tmp_path / "alex.pth",), None)]
    result = json.loads((config.out / "evaluation.json").read_text())
    assert len(result["published_networks"]) == 1 and result["metrics"].keys() == METRICS.keys() | UNITS.keys()
    for content in result["tasks"].values():
        rows = content["rows"]
        assert set(rows["truth"]) == set(UNITS) and rows["truth"]["lpips"]["mean"] == 0 < rows["mean_image"]["lpips"]["mean"]
        assert rows["copy_source"]["arcface_cosine"]["mean"] == pytest.approx(1, abs=1e-5)  # cut out where the source has its face
        assert rows["mean_image"]["arcface_cosine"]["mean"] < 0.9999
    assert "LPIPS on AlexNet" in (config.out / "index.html").read_text()


def test_a_published_network_that_is_not_there_is_named(config, tmp_path):
    with pytest.raises(AssetError, match="absent.pth: there is no such file; give the state dict of one of insightface's"):
        evaluate(dataclasses.replace(config, arcface=tmp_path / "absent.pth"))


def test_the_switch_is_off_where_the_motion_stays_and_a_reconstructor_without_it_is_driven_by_the_source(config):
    model = load_reconstructor(str(config.reconstructor))
    scales = []
    forward = model.forward
    model.forward = lambda *arguments: scales.append(arguments[3].tolist()) or forward(*arguments)
    label = torch.from_numpy(open_dataset(config.shards).read(open_dataset(config.shards).frames[0], ["label"])["label"][0].copy())
    picture = torch.zeros(3, 32, 32)
    sample = Sample(picture, label, picture, label, picture, None, torch.ones(1, 16, 16))
    for task in TASKS:
        for switch in (True, False):
            predict(model, MotionVectors("flame"), [sample, sample], task, picture, switch)
    assert scales == [[0.0, 0.0], [1.0, 1.0]] * 2 + [[1.0, 1.0]] * 6


def test_a_mean_is_over_identities_in_whole_and_in_parts():
    def record(identity, part, psnr, row="ours"):
        return {"task": "self_reenactment", "bin": part, "row": row, "identity": identity, "psnr": psnr, "depth": math.nan}

    below, over = "below 15 deg", "over 30 deg"
    records = [record(1, below, 10.0), record(1, below, 20.0), record(1, over, 30.0), record(2, over, 50.0)]
    tasks = summarise(records, seed=0, resamples=20)
    content = tasks["self_reenactment"]
    assert (content["samples"], content["identities"]) == (4, 2)
    assert content["rows"]["ours"]["psnr"]["mean"] == 35.0 and "depth" not in content["rows"]["ours"]
    assert list(content["bins"]) == [below, over]
    assert content["bins"][below]["rows"]["ours"]["psnr"] == {"mean": 15.0, "low": 15.0, "high": 15.0}
    assert content["bins"][over]["rows"]["ours"]["psnr"]["mean"] == 40.0 and content["bins"][over]["samples"] == 2
    text = text_table(tasks)
    assert "35.00 [" in text and "left out" in text and "static_lift, novel_view, cross_reenactment, steadiness" in text


def test_a_sequence_needs_two_pictures():
    with pytest.raises((ConfigError, ValueError), match="sequence_frames: expected at least 2"):
        EvaluateRun(sequence_frames=1)
