"""What is measured of a data set, against numbers computed by hand."""

import math

import numpy as np
import pytest
import torch

from datagen.reading import open_dataset
from datagen.survey import measure_frame, on_grid, skin_tone, survey, tone_name, unusualness
from head3d.cameras import orbit
from head3d.labels import Motion, pack_label


@pytest.fixture
def members():
    """Two views of one frame, 2 x 2 maps: from 30 degrees to the left, 10 above, 4 away; and frontal, 3 away."""
    yaw, pitch, radius = (torch.tensor(values) for values in ((math.radians(30), 0.0), (math.radians(10), 0.0), (4.0, 3.0)))
    motion = Motion.neutral(2)
    motion.expression[:, :2] = torch.tensor([3.0, 4.0])
    motion.jaw_pose[:, 0] = math.radians(6)
    motion.eye_pose[:] = torch.tensor([math.radians(degrees) for degrees in (2, 10, 0, 4, 20, 0)])
    white, black = np.full((4, 4, 3), 255, np.uint8), np.zeros((4, 4, 3), np.uint8)
    return {
        "label": pack_label(orbit(yaw, pitch, radius), torch.zeros(2, 300), motion).numpy(),
        "opacity": np.array([[[1.0, 0.0], [1.0, 0.0]], [[0.0, 0.0], [0.0, 0.0]]]),
        "parts": np.zeros((2, 2, 2), np.uint8),
        "rgb.0": np.concatenate([white[:, :2], black[:, :2]], axis=1),
        "rgb.1": black,
        "depth": np.array([[[4.25, 9.0], [3.95, 9.0]], [[9.0, 9.0], [9.0, 9.0]]]),
    }


def test_cameras_motion_size_light_and_depth_of_a_frame(members):
    found = measure_frame(members)
    assert found["yaw_deg"] == pytest.approx([30, 0], abs=1e-3) and found["pitch_deg"] == pytest.approx([10, 0], abs=1e-3)
    assert found["expression"] == pytest.approx([5]) and found["jaw_deg"] == pytest.approx([6], abs=1e-4)
    assert found["gaze_pitch_deg"] == pytest.approx([3], abs=1e-4) and found["gaze_yaw_deg"] == pytest.approx([15], abs=1e-4)
    # Half of a picture whose side covers 2 * 4 * tan(6 degrees) at a distance of 4
    assert found["silhouette"] == pytest.approx([0.5 * (8 * math.tan(math.radians(6))) ** 2, 0], rel=1e-5)
    assert found["exposure"][0] == pytest.approx(100, abs=0.01) and math.isnan(found["exposure"][1])  # only the white half is head
    assert found["depth"][0] == pytest.approx(0.1, abs=1e-5) and math.isnan(found["depth"][1])
    assert math.isnan(found["tone_deg"][0])  # the most frontal view has no skin


def test_a_frame_without_depth_is_measured_without(members):
    del members["depth"]
    found = measure_frame(members)
    assert np.isnan(found["depth"]).all() and found["exposure"][0] == pytest.approx(100, abs=0.01)


def test_skin_tone_is_the_angle_of_lightness_over_yellow_in_the_middle_of_the_skin():
    lab, skin = np.zeros((9, 9, 3)), np.zeros((9, 9), bool)
    skin[:, :] = True
    lab[3:6, 3:6] = (70, 15, 20)
    assert skin_tone(lab, skin) == pytest.approx(45)
    lab[3:6, 3:6] = (30, 15, 20)
    assert skin_tone(lab, skin) == pytest.approx(-45)
    skin[:3] = skin[6:] = False  # now the box is three rows high, and its middle third is row 4
    lab[3:6] = (50, 0, 9)
    lab[4, 3:6] = (70, 15, 20)
    assert skin_tone(lab, skin) == pytest.approx(45)
    assert math.isnan(skin_tone(lab, np.zeros((9, 9), bool)))


@pytest.mark.parametrize(("angle", "name"), [(56, "very light"), (55, "light"), (30, "intermediate"), (0, "brown"), (-30, "dark")])
def test_tones_have_the_published_limits(angle, name):
    assert tone_name(angle) == name


def test_unusualness_is_counted_in_robust_deviations():
    score = unusualness(np.array([1.0, 2.0, 3.0, 4.0, 100.0, np.nan]))  # median 3; distances 2 1 0 1 97, median 1
    assert score == pytest.approx([2 / 1.4826, 1 / 1.4826, 0, 1 / 1.4826, 97 / 1.4826, 0])
    assert unusualness(np.array([1.0, 1.0, 1.0, 2.0])).tolist() == [0, 0, 0, math.inf]
    assert unusualness(np.array([np.nan])).tolist() == [0]


def test_the_grid_takes_the_pixel_at_the_centre_of_each_cell():
    pixels = np.arange(16).reshape(4, 4)
    assert on_grid(pixels, 2).tolist() == [[5, 7], [13, 15]]
    assert on_grid(pixels[:2, :2], 4).tolist() == [[0, 0, 1, 1], [0, 0, 1, 1], [4, 4, 5, 5], [4, 4, 5, 5]]


def test_a_sample_is_bounded_and_the_same_each_time(made_set):
    dataset = open_dataset(made_set)
    everything, some, again = survey(dataset), survey(dataset, frames=2, shards=1), survey(dataset, frames=2, shards=1)
    assert len(everything.frames) == 7 and everything.shards == 3 and everything.yaw_deg.shape == (18,)
    assert everything.view[:5].tolist() == [0, 1, 0, 1, 2] and everything.frame_of_view[:5].tolist() == [0, 0, 1, 1, 1]
    assert len(some.frames) <= 2 and len({frame.shard for frame in some.frames}) == 1
    assert some.frames == again.frames and np.array_equal(some.yaw_deg, again.yaw_deg)
