"""The generator's time by stage: every stage is there, and the parts make the whole."""

import pytest

from genhead.background import BackgroundConfig
from genhead.generator import GenHeadConfig
from genhead.speed import _split, measure_stages
from head3d.head_model import load_head_model
from head3d.networks.superresolution import SuperResolutionConfig
from head3d.rendering import RaySampling

SMALL = GenHeadConfig(
    z_dim=8,
    w_dim=8,
    plane_resolution=8,
    plane_channels=4,
    feature_channels=4,
    channel_base=64,
    channel_max=8,
    render_resolution=8,
    image_resolution=16,
    mask_resolution=32,
    sampling=RaySampling(depth_samples=4, importance_samples=3),
    background=BackgroundConfig(resolution=8, channels=4, z_dim=8, w_dim=8, mapping_layers=1, channel_base=64, channel_max=8),
    superresolution=SuperResolutionConfig(input_resolution=8, feature_channels=4, channels=(8,), w_dim=8),
)


def test_stages_add_up_and_the_decoder_s_arithmetic_is_counted():
    rows = measure_stages(SMALL, load_head_model(None), batches=(1, 2), repeats=1)
    for batch in (1, 2):
        parts = {row.stage: row for row in rows if row.batch == batch and row.stage != "all" and " x " not in row.stage}
        (whole,) = (row for row in rows if row.batch == batch and row.stage == "all")
        assert whole.seconds_per_image == pytest.approx(sum(row.seconds_per_image for row in parts.values() if "images" not in row.stage))
        # 64 rays x 7 samples, each 4 x 64 + 64 x (1 + 4) multiply-adds in the head branch at least
        assert parts["rays"].gflop_per_image >= 2 * 64 * 7 * (4 * 64 + 64 * 5) / 1e9
    assert rows[-2].stage == "identity of 4 motions x 4 views" and rows[-2].seconds_per_image > 0


def test_queries_are_split_evenly_over_the_runs():
    assert _split([1.0, 2.0, 3.0, 4.0], 2) == [3.0, 7.0]
