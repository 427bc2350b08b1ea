"""The pool of entries that training draws from."""

import math

import numpy as np
import pytest
import torch

from genhead.mirror import LabelMirror
from genhead.pool import PortraitPool, PortraitSampling, absolute_yaw_deg
from genhead.portraits import Portrait, PortraitSet, write_portraits
from head3d.cameras import orbit
from head3d.head_model import load_head_model
from head3d.labels import Motion, pack_label

YAWS_DEG = (0.0, -20.0, 29.0, 31.0, -70.0)


@pytest.fixture(scope="module")
def head():
    return load_head_model("procedural")


@pytest.fixture(scope="module")
def portraits(tmp_path_factory) -> PortraitSet:
    count, path = len(YAWS_DEG), tmp_path_factory.mktemp("portraits") / "set"
    yaw = torch.tensor([math.radians(degrees) for degrees in YAWS_DEG])
    camera = orbit(yaw, torch.full((count,), 0.2), torch.full((count,), 4.17))
    labels = pack_label(camera, torch.randn(count, 300, generator=torch.Generator().manual_seed(0)), Motion.neutral(count)).numpy()
    rng = np.random.default_rng(0)
    pictures = [
        Portrait(rng.integers(0, 255, (16, 16, 3), dtype=np.uint8), rng.integers(0, 255, (16, 16), dtype=np.uint8), label)
        for label in labels
    ]
    write_portraits(path, pictures, 16, count, {})
    return PortraitSet(path)


def test_yaw_is_the_angle_to_the_side_whatever_the_pitch(portraits):
    np.testing.assert_allclose(absolute_yaw_deg(torch.from_numpy(portraits.labels())), np.abs(YAWS_DEG), atol=1e-3)


def test_turned_heads_have_as_many_entries_as_their_bin_says(portraits, head):
    pool = PortraitPool(portraits, PortraitSampling(yaw_bins_deg=(15.0, 30.0, 60.0), copies=(1, 2, 4, 16)), head)
    expected = [0] + [1] * 2 + [2] * 2 + [3] * 4 + [4] * 16
    assert len(pool) == len(expected)
    assert torch.equal(pool.labels, torch.from_numpy(portraits.labels())[expected])
    images, mattes, labels = pool.batch(torch.tensor([2, 9]))
    for ours, theirs in zip((images, mattes, labels), portraits.batch([1, 4]), strict=True):
        assert torch.equal(ours, theirs)


def test_without_settings_the_pool_is_the_set(portraits, head):
    pool = PortraitPool(portraits, PortraitSampling(), head)
    assert torch.equal(pool.labels, torch.from_numpy(portraits.labels())) and pool.mirror_error == ""


def test_mirrored_entries_follow_and_show_flipped_pictures_with_mirrored_labels(portraits, head):
    pool = PortraitPool(portraits, PortraitSampling(mirror=True, yaw_bins_deg=(60.0,), copies=(1, 2)), head)
    assert len(pool) == 12 and "differ from the mirrored meshes by" in pool.mirror_error
    images, mattes, labels = pool.batch(torch.tensor([3, 9]))
    picture, matte, label = portraits.batch([3])
    assert torch.equal(images, torch.cat([picture, picture.flip(-1)])) and torch.equal(mattes, torch.cat([matte, matte.flip(-1)]))
    torch.testing.assert_close(labels, torch.cat([label, LabelMirror(head)(label)]))


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"yaw_bins_deg": (15.0,), "copies": (1,)}, "expected one number for each of the 2 bins"),
        ({"yaw_bins_deg": (30.0, 15.0), "copies": (1, 2, 4)}, "expected rising limits"),
    ],
)
def test_bins_that_make_no_sense_are_named(settings, says):
    with pytest.raises(ValueError, match=says):
        PortraitSampling(**settings)
