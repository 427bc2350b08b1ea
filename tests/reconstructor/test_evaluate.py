"""Evaluation against exact truth on a tiny held-out set."""

import csv
import dataclasses
import json
import math

import pytest
import torch
from PIL import Image

from datagen.plan import open_plan
from datagen.reading import open_dataset
from head3d.labels import unpack_label
from head3d.run.errors import AssetError, DataError
from reconstructor import evaluate as evaluation
from reconstructor.evaluate import METRICS, ROWS, TASKS, Case, EvaluateRun, Truths, draw_cases, evaluate, mean_training_image, measure
from reconstructor.perception_errors import PICTURE_UNITS
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
        sheet_rows=3,
        batch=3,
        resamples=50,
    )


def test_cases_hold_out_identities_and_follow_their_task(config):
    dataset = open_dataset(config.shards)
    cases = draw_cases(dataset, config)
    assert {case.task for case in cases} == set(TASKS) and cases == draw_cases(dataset, config)
    assert cases != draw_cases(dataset, dataclasses.replace(config, seed=1))
    for case in cases:
        assert case.source.split == case.driver.split == "test"
        if case.task == "novel_view":
            assert case.source is case.driver and case.source_view != case.driver_view
        elif case.task == "self_reenactment":
            assert case.source.identity == case.driver.identity and case.source.motion != case.driver.motion
        else:
            assert case.source.identity != case.driver.identity and case.driver.kind == "dynamic"


def test_the_rendered_truth_of_a_frame_is_the_stored_picture(world, config):
    """The identity put into its own motion at its own camera; the shard's is jittered along the rays and quantised."""
    dataset, plan = open_dataset(world.shards), open_plan(world.shards)
    truths = Truths(dataset, plan, world.generator, "cpu")
    frame = next(frame for frame in dataset.frames if frame.split == "test" and frame.kind == "dynamic")
    own = truths.sample(Case("cross_reenactment", frame, 0, frame, 1))
    stored = truths.sample(Case("self_reenactment", frame, 0, frame, 1))
    assert (own.truth - stored.truth).abs().mean() < 0.05
    assert (own.opacity - stored.opacity).abs().mean() < 0.05
    assert (own.depth - stored.depth).abs().mean() < 0.15  # an even fog: depth is a mean over the whole box
    assert torch.equal(own.target_label, stored.target_label)


def test_the_target_has_the_source_s_shape_and_the_driver_s_motion_and_camera(world, config):
    dataset = open_dataset(world.shards)
    case = next(case for case in draw_cases(dataset, config) if case.task == "cross_reenactment")
    sample = Truths(dataset, open_plan(world.shards), world.generator, "cpu").sample(case)
    target, source = unpack_label(sample.target_label[None]), unpack_label(sample.source_label[None])
    driver = unpack_label(torch.from_numpy(dataset.read(case.driver, ["label"])["label"][case.driver_view][None].copy()))
    assert torch.equal(target.shape, source.shape) and not torch.equal(driver.shape, source.shape)
    assert torch.equal(target.motion.expression, driver.motion.expression) and torch.equal(target.camera.c2w, driver.camera.c2w)


def test_results_are_written_and_a_second_call_only_prints(config, capsys, monkeypatch):
    assert evaluate(config) == 0
    result = json.loads((config.out / "evaluation.json").read_text())
    assert set(result["tasks"]) == set(TASKS)
    for content in result["tasks"].values():
        assert set(content["rows"]) == set(ROWS)
        for row, metrics in content["rows"].items():
            assert set(metrics) == (set(METRICS) if row == "ours" else set(METRICS) - {"depth"})
            assert all(value["low"] <= value["mean"] <= value["high"] for value in metrics.values())
    with (config.out / "samples.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == sum(content["samples"] for content in result["tasks"].values()) * len(ROWS)
    mine = [float(line["psnr"]) for line in lines if line["task"] == "self_reenactment" and line["row"] == "ours"]
    assert sum(mine) / len(mine) == pytest.approx(result["tasks"]["self_reenactment"]["rows"]["ours"]["psnr"]["mean"], abs=1e-5)
    for task in TASKS:
        rows = min(config.sheet_rows, result["tasks"][task]["samples"])
        assert Image.open(config.out / f"sheet_{task}.png").size == (5 * 34 - 2, rows * 34 - 2)
    printed = capsys.readouterr().out
    assert "cross reenactment" in printed and "copy source" in printed
    monkeypatch.setattr(evaluation, "measure_all", None)
    assert evaluate(config) == 0
    assert "measured before" in capsys.readouterr().out


def test_a_perception_network_adds_what_it_sees_and_its_own_error(config, tiny_perception, tmp_path, capsys):
    tiny_perception(tmp_path / "judge", "evaluation")
    config = dataclasses.replace(config, out=tmp_path / "out", perception=tmp_path / "judge", samples=1)
    assert evaluate(config) == 0
    result = json.loads((config.out / "evaluation.json").read_text())
    assert result["metrics"].keys() == METRICS.keys() | PICTURE_UNITS.keys() and result["perception_errors"]["pictures"] == 9
    for content in result["tasks"].values():
        rows = content["rows"]
        assert content["identities"] <= len({frame.identity for frame in open_dataset(config.shards).frames if frame.split == "test"})
        assert list(rows) == [*ROWS, "truth"] and set(rows["truth"]) == set(PICTURE_UNITS)
        assert rows["truth"]["perceptual"]["mean"] == 0 < rows["copy_source"]["perceptual"]["mean"]
        assert rows["copy_source"]["identity_cosine"]["mean"] == pytest.approx(1, abs=1e-5)
    for _ in range(2):  # the second call only prints
        printed = capsys.readouterr().out
        assert evaluate(config) == 0
        assert "the perception network's own error on 9 pictures of 7 people held out" in printed and "jaw_deg" in printed
    tiny_perception(tmp_path / "judge", "losses")
    with pytest.raises(AssetError, match="trained with --role evaluation, got losses"):
        evaluate(dataclasses.replace(config, out=tmp_path / "other"))


def test_a_perfect_prediction_has_no_error_and_depth_counts_on_the_head_only(world, config):
    dataset = open_dataset(world.shards)
    samples = [Truths(dataset, open_plan(world.shards), world.generator, "cpu").sample(case) for case in draw_cases(dataset, config)[:2]]
    opacity = torch.zeros(1, 16, 16)
    opacity[:, :4] = 1
    samples = [sample._replace(opacity=opacity) for sample in samples]
    truth, depth = (torch.stack([getattr(sample, name) for sample in samples]) for name in ("truth", "depth"))
    off = depth.clone()
    off[:, :, :4] += 0.25
    off[:, :, 4:] += 9
    measured = measure(truth, off, samples)
    assert measured["psnr"].min() > 99 and torch.allclose(measured["ssim"], torch.ones(2), atol=1e-4)
    assert torch.allclose(measured["depth"], torch.full((2,), 0.25), atol=1e-5)
    assert all(math.isnan(value) for value in measure(truth, None, samples)["depth"].tolist())


def test_the_mean_image_is_the_mean_of_training_pictures(world):
    dataset = open_dataset(world.shards)
    pictures = [
        torch.from_numpy(dataset.read(frame, [f"rgb.{view}"])[f"rgb.{view}"].astype("float32") / 127.5 - 1).permute(2, 0, 1)
        for frame in dataset.frames
        if frame.split == "train"
        for view in range(frame.views)
    ]
    assert torch.allclose(mean_training_image(dataset, 1000, 0), torch.stack(pictures).mean(0), atol=1e-5)
    dataset.frames = [frame for frame in dataset.frames if frame.split == "test"]
    with pytest.raises(DataError, match=f"{dataset.storage.address}: no training frame"):
        mean_training_image(dataset, 1000, 0)


def test_a_split_without_identities_is_an_error_with_the_remedy(config):
    dataset = open_dataset(config.shards)
    dataset.frames = [frame for frame in dataset.frames if frame.split == "train"]
    with pytest.raises(DataError, match=r"no identity is in the split 'test'.*--recipe.test_share"):
        draw_cases(dataset, config)


def test_a_task_that_cannot_be_formed_is_left_out_and_named(config):
    dataset = open_dataset(config.shards)
    only = next(frame for frame in dataset.frames if frame.split == "test" and frame.kind == "static")
    dataset.frames = [only]
    assert {case.task for case in draw_cases(dataset, config)} == {"novel_view"}
    dataset.frames = [only._replace(views=1)]
    with pytest.raises(DataError, match="forms no task"):
        draw_cases(dataset, config)
    text = evaluation.table({"novel_view": {"samples": 2, "identities": 1, "rows": {}}})
    assert "left out" in text and "self_reenactment, cross_reenactment" in text
