"""Which samples are measured, and their exact truth."""

import math

import pytest
import torch

from datagen.plan import open_plan
from datagen.reading import open_dataset
from head3d.cameras import Camera, orbit, project
from head3d.labels import Motion, pack_label, unpack_label
from head3d.run.errors import DataError
from reconstructor.evaluation_cases import (
    NOVEL_YAWS_DEG,
    TASKS,
    Case,
    Sample,
    Truths,
    bin_of,
    bins_of,
    draw_cases,
    head_yaw_deg,
    novel_camera,
)


@pytest.fixture(scope="module")
def dataset(world):
    return open_dataset(world.shards)


@pytest.fixture(scope="module")
def truths(world, dataset):
    return Truths(dataset, open_plan(world.shards), world.generator, "cpu")


@pytest.fixture(scope="module")
def cases(dataset):
    return draw_cases(dataset, "test", seed=0, identities=200, samples=2)


def test_cases_hold_out_identities_and_follow_their_task(dataset, cases):
    assert {case.task for case in cases} == set(TASKS) and cases == draw_cases(dataset, "test", 0, 200, 2)
    assert cases != draw_cases(dataset, "test", 1, 200, 2)
    few = ("static_lift", "cross_reenactment")
    assert draw_cases(dataset, "test", 0, 200, 2, few) == [case for case in cases if case.task in few]
    for case in cases:
        assert case.source.split == case.driver.split == "test" and (case.yaw_deg is None) == (case.task != "novel_view")
        match case.task:
            case "static_lift" | "novel_view":
                assert case.source is case.driver and case.source_view == case.driver_view
                assert case.yaw_deg is None or case.yaw_deg in NOVEL_YAWS_DEG
            case "self_reenactment":
                assert case.source.identity == case.driver.identity and case.source.motion != case.driver.motion
            case "cross_reenactment":
                assert case.source.identity != case.driver.identity and case.driver.kind == "dynamic"
            case "steadiness":
                assert case.source.identity != case.driver.identity == case.last.identity and case.driver.motion != case.last.motion
    assert sum(case.task == "steadiness" for case in cases) == len({case.source.identity for case in cases if case.task == "steadiness"})


def test_the_rendered_truth_of_a_frame_is_the_stored_picture(dataset, truths):
    """The identity put into its own motion at its own camera; the shard's is jittered along the rays and quantised."""
    frame = next(frame for frame in dataset.frames if frame.split == "test" and frame.kind == "dynamic")
    own = truths.sample(Case("cross_reenactment", frame, 0, frame, 1))
    stored = truths.sample(Case("self_reenactment", frame, 0, frame, 1))
    assert (own.truth - stored.truth).abs().mean() < 0.05
    assert (own.opacity - stored.opacity).abs().mean() < 0.05
    assert (own.depth - stored.depth).abs().mean() < 0.15  # an even fog: depth is a mean over the whole box
    assert torch.equal(own.target_label, stored.target_label)
    assert torch.equal(stored.rerendered.image, own.truth) and torch.equal(stored.rerendered.depth, own.depth) and own.rerendered is None


def test_the_target_has_the_source_s_shape_and_the_driver_s_motion_and_camera(dataset, truths, cases):
    case = next(case for case in cases if case.task == "cross_reenactment")
    sample = truths.sample(case)
    target, source = unpack_label(sample.target_label[None]), unpack_label(sample.source_label[None])
    driver = unpack_label(torch.from_numpy(dataset.read(case.driver, ["label"])["label"][case.driver_view][None].copy()))
    assert torch.equal(target.shape, source.shape) and not torch.equal(driver.shape, source.shape)
    assert torch.equal(target.motion.expression, driver.motion.expression) and torch.equal(target.camera.c2w, driver.camera.c2w)


def test_the_mean_head_moves_as_the_target_does_and_is_nobody(dataset, truths):
    ones = [frame for frame in dataset.frames if frame.kind == "dynamic"]
    others = [frame for frame in ones if frame.identity != ones[0].identity]
    first, second = (truths.sample(Case("cross_reenactment", source, 0, ones[0], 0)) for source in others[-3:-1])
    assert not torch.equal(first.truth, second.truth) and torch.equal(first.mean_head.image, second.mean_head.image)
    elsewhere = truths.sample(Case("cross_reenactment", others[-3], 0, ones[1], 1))
    assert not torch.equal(first.mean_head.image, elsewhere.mean_head.image) and first.mean_head.depth.shape == first.depth.shape
    assert truths.sample(Case("static_lift", ones[0], 0, ones[0], 0)).mean_head is None


def test_a_static_lift_s_truth_is_its_source_and_a_novel_view_differs_in_the_camera_alone(truths, cases):
    lift = truths.sample(next(case for case in cases if case.task == "static_lift"))
    assert torch.equal(lift.truth, lift.source_image) and torch.equal(lift.source_label, lift.target_label)
    case = next(case for case in cases if case.task == "novel_view")
    novel = truths.sample(case)
    assert torch.equal(novel.target_label[25:], novel.source_label[25:]) and torch.equal(
        novel.target_label[:25], novel_camera(case.yaw_deg)
    )
    assert bin_of(case, novel) == f"at {abs(case.yaw_deg)} deg" and bin_of(case, novel) in bins_of("novel_view")


def test_a_sequence_begins_in_the_driver_s_motion_and_ends_in_the_last_one_s_before_one_camera(dataset, truths, cases):
    case = next(case for case in cases if case.task == "steadiness")
    samples = truths.sequence(case, 3)
    labels = unpack_label(torch.stack([sample.target_label for sample in samples]))
    first, last = (
        unpack_label(torch.from_numpy(dataset.read(frame, ["label"])["label"][:1].copy())).motion for frame in (case.driver, case.last)
    )
    assert torch.allclose(labels.motion.expression[0], first.expression[0]) and torch.allclose(labels.motion.eye_pose[2], last.eye_pose[0])
    assert torch.allclose(labels.motion.jaw_pose[1], (first.jaw_pose[0] + last.jaw_pose[0]) / 2, atol=1e-6)
    assert torch.equal(labels.camera.c2w[0], labels.camera.c2w[2])
    own = unpack_label(samples[0].source_label[None]).shape
    assert torch.equal(labels.shape, own.expand(3, -1)) and not torch.equal(samples[0].truth, samples[2].truth)
    shown = torch.from_numpy(dataset.read(case.driver, [name := f"rgb.{case.driver_view}"])[name] / 127.5 - 1).permute(2, 0, 1)
    assert (samples[0].driver_image - shown).abs().mean() < 0.05  # the driver's own identity, rendered in its motion


def label_at(yaw_deg, neck=(0.0, 0.0, 0.0)):
    camera = orbit(torch.tensor([math.radians(yaw_deg)]), torch.tensor([0.2]), torch.tensor([4.0]), roll_rad=torch.tensor([0.1]))
    return pack_label(camera, torch.zeros(1, 300), Motion.neutral()._replace(neck_pose=torch.tensor([neck])))[0]


def test_the_yaw_of_a_head_counts_camera_and_neck():
    assert head_yaw_deg(label_at(40)) == pytest.approx(40, abs=1e-4) and head_yaw_deg(label_at(-170)) == pytest.approx(-170, abs=1e-3)
    assert head_yaw_deg(label_at(40, (0.0, math.radians(30), 0.0))) == pytest.approx(10, abs=1e-4)  # the head turned after the camera


@pytest.mark.parametrize(
    ("source", "target", "expected"),
    [
        (0, 14.9, "below 15 deg"),
        (-10, 5.1, "15 to 30 deg"),
        (20, -9.9, "15 to 30 deg"),
        (20, -10.1, "over 30 deg"),
        (175, -179, "below 15 deg"),
    ],
)
def test_self_reenactment_is_parted_by_the_yaw_between_source_and_target(source, target, expected):
    picture = torch.zeros(3, 4, 4)
    sample = Sample(picture, label_at(source), picture, label_at(target), picture, None, picture[:1])
    assert bin_of(Case("self_reenactment", None, 0, None, 0), sample) == expected
    assert bin_of(Case("cross_reenactment", None, 0, None, 0), sample) is None and bins_of("cross_reenactment") == []


def test_a_novel_camera_looks_at_the_middle_of_the_head_from_its_yaw():
    for yaw in NOVEL_YAWS_DEG:
        camera = Camera.from_label(novel_camera(yaw)[None])
        uv, depth = project(torch.tensor([[[0.0, 0.0, 0.09]]]), camera)
        assert torch.allclose(uv, torch.tensor(0.5), atol=1e-5) and depth.item() == pytest.approx(4.05, abs=1e-5)
        assert math.degrees(math.atan2(camera.c2w[0, 0, 2], camera.c2w[0, 2, 2])) == pytest.approx(yaw, abs=1e-4)


def test_a_split_without_identities_is_an_error_with_the_remedy(world):
    dataset = open_dataset(world.shards)
    dataset.frames = [frame for frame in dataset.frames if frame.split == "train"]
    with pytest.raises(DataError, match=r"no identity is in the split 'test'.*--recipe.test_share"):
        draw_cases(dataset, "test", 0, 200, 2)


def test_a_task_that_cannot_be_formed_is_left_out(world):
    dataset = open_dataset(world.shards)
    dataset.frames = [next(frame for frame in dataset.frames if frame.split == "test" and frame.kind == "static")]
    assert {case.task for case in draw_cases(dataset, "test", 0, 200, 2)} == {"static_lift", "novel_view"}
    with pytest.raises(DataError, match=r"'test' allow none of the tasks self_reenactment, steadiness.*--tasks"):
        draw_cases(dataset, "test", 0, 200, 2, ("self_reenactment", "steadiness"))
