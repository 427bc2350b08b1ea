"""The numbers of a picture and of a sequence, by hand."""

import math

import pytest
import torch

from datagen.plan import open_plan
from datagen.reading import open_dataset
from head3d.cameras import frontal, project
from head3d.labels import Motion, pack_label
from head3d.run.errors import DataError
from reconstructor.evaluation_cases import Pictured, Truths, draw_cases
from reconstructor.evaluation_measures import METRICS, feature_boxes, mean_training_image, measure, overlap, steadiness


@pytest.fixture(scope="module")
def samples(world):
    dataset = open_dataset(world.shards)
    truths = Truths(dataset, open_plan(world.shards), world.generator, "cpu")
    opacity = torch.zeros(1, 16, 16)
    opacity[:, :4] = 1
    return [truths.sample(case)._replace(opacity=opacity) for case in draw_cases(dataset, "test", 0, 200, 2)[:2]]


def test_a_perfect_prediction_has_no_error_and_depth_counts_on_the_head_only(samples, built_in_head):
    truth, depth, opacity = (torch.stack([getattr(sample, name) for sample in samples]) for name in ("truth", "depth", "opacity"))
    off = depth.clone()
    off[:, :, :4] += 0.25
    off[:, :, 4:] += 9
    measured = measure(Pictured(truth, off, opacity), samples, built_in_head)
    assert measured.keys() == METRICS.keys()
    assert measured["psnr"].min() > 99 and torch.allclose(measured["ssim"], torch.ones(2), atol=1e-4)
    assert torch.allclose(measured["depth"], torch.full((2,), 0.25), atol=1e-5)
    assert measured["opacity_iou"].tolist() == [1, 1] and measured["eye_l1"].tolist() == measured["mouth_l1"].tolist() == [0, 0]
    without = measure(Pictured(truth), samples, built_in_head)
    assert all(math.isnan(value) for name in ("depth", "opacity_iou") for value in without[name].tolist())


def test_eye_and_mouth_errors_count_their_boxes_alone(samples, built_in_head):
    truth, label = (torch.stack([getattr(sample, name) for sample in samples]) for name in ("truth", "target_label"))
    truth = truth.clamp(-0.5, 0.5)
    fixed = [sample._replace(truth=image) for sample, image in zip(samples, truth, strict=True)]
    eyes, mouth = feature_boxes(label, built_in_head, truth.shape[-1])
    measured = measure(Pictured(truth + 0.2 * eyes + 0.4 * mouth * (1 - eyes)), fixed, built_in_head)
    assert torch.allclose(measured["eye_l1"], torch.full((2,), 0.1), atol=1e-6)  # 0.2 of a scale of length 2
    assert (measured["mouth_l1"] > 0.1).all() and (measured["mouth_l1"] <= 0.2 + 1e-6).all()
    outside = measure(Pictured(truth + 0.3 * (1 - eyes) * (1 - mouth)), fixed, built_in_head)
    assert outside["eye_l1"].max() == outside["mouth_l1"].max() == 0 < outside["psnr"].min() < 30


def test_the_boxes_hold_the_pixels_around_the_landmarks_and_the_mouth_is_below_the_eyes(built_in_head):
    camera, motion = frontal(), Motion.neutral()
    label = pack_label(camera, torch.zeros(1, 300), motion)
    points = project(built_in_head.landmarks(built_in_head.vertices(torch.zeros(1, 300), motion)), camera)[0][0]
    side = 200
    eyes, mouth = feature_boxes(label, built_in_head, side)
    assert eyes.shape == mouth.shape == (1, 1, side, side) and set(eyes.unique().tolist()) == {0.0, 1.0}
    corners = points[48:68]
    low, high = corners.amin(0), corners.amax(0)
    reach = 0.25 * (high - low).max()
    rows, columns = (mouth[0, 0].any(dim).nonzero().flatten() for dim in (1, 0))
    for found, axis in ((columns, 0), (rows, 1)):
        assert (found.min() / side - (low - reach)[axis]).abs() <= 1 / side
        assert ((found.max() + 1) / side - (high + reach)[axis]).abs() <= 1 / side
    assert all(eyes[0, 0, int(y * side), int(x * side)] == 1 for x, y in points[[68, 69, *range(36, 48)]].tolist())
    between = points[27]  # top of the nose's bridge
    assert rows.min() > eyes[0, 0].any(1).nonzero().max() and mouth[0, 0, int(between[1] * side), int(between[0] * side)] == 0


def test_overlap_is_intersection_over_union_and_undefined_for_two_empty_masks():
    first, second = torch.zeros(3, 1, 2, 2, dtype=torch.bool), torch.zeros(3, 1, 2, 2, dtype=torch.bool)
    first[0, 0, 0], second[0, 0, :, 0] = True, True  # 2 and 2 pixels, one in common
    first[1] = True
    values = overlap(first, second).tolist()
    assert values[0] == pytest.approx(1 / 3) and values[1] == 0 and math.isnan(values[2])


def test_a_still_sequence_flickers_by_what_the_truth_moves_and_a_shift_of_all_pictures_does_not_count():
    truth = torch.zeros(3, 3, 2, 2)
    truth[1] = 0.4  # up by 0.2 of the scale of length 2, then down again
    still = steadiness(torch.zeros(3, 3, 2, 2), truth)
    assert still == {"flicker": pytest.approx(0.2), "change": pytest.approx(-0.2)}
    assert steadiness(truth - 0.5, truth) == {"flicker": pytest.approx(0, abs=1e-7), "change": pytest.approx(0, abs=1e-7)}
    noisy = truth.clone()
    noisy[1, :, 0] = 0.8
    assert steadiness(noisy, truth) == {"flicker": pytest.approx(0.1), "change": pytest.approx(0.1)}


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
