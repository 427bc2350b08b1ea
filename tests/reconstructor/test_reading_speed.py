"""What is measured of reading is what training reads."""

import torch

from genhead.train import GenHeadRun
from head3d.run.config import load_yaml
from reconstructor import reading_speed
from reconstructor.batches import BatchStream
from reconstructor.losses import LossConfig, members_needed
from reconstructor.order import BatchConfig
from reconstructor.reading_speed import measure_reading, write_made_up


def test_a_made_up_set_is_read_as_a_rendered_one(tmp_path, tiny_genhead):
    config = tiny_genhead(32)
    dataset = write_made_up(tmp_path, config)
    with BatchStream(dataset, BatchConfig(size=4), 0, lambda seen: members_needed(LossConfig(), seen)) as batches:
        batch = next(batches)
    rays, channels = config.render_resolution, config.feature_channels
    assert batch.image.shape == (4, 3, 32, 32) and batch.depth.shape == (4, 1, rays, rays)
    assert batch.foreground.shape == (4, channels, rays, rays) and batch.point_features.shape == (4, 4000, config.plane_channels)
    assert batch.motion_scale.tolist() == [0, 0, 1, 1] and torch.isfinite(batch.points).all()


def test_reading_is_timed_beside_decoding_the_same_bytes_from_memory(tiny_genhead, monkeypatch):
    monkeypatch.setattr(reading_speed, "ROUNDS", 1)
    row = measure_reading(tiny_genhead(32), samples=4, step_s=0.01)
    assert min(row.memory_s, row.first_s, row.read_s, row.batch_s) > 0 and row.wait_s >= 0
    assert row.read_share == row.memory_s / row.read_s and row.side == 32
    assert 0.1 < row.megabytes < 1.5  # five views of 4000 points with their features are most of it


def test_what_is_decoded_from_memory_is_what_the_reader_gives(tmp_path, tiny_genhead):
    dataset = write_made_up(tmp_path, tiny_genhead(32))
    frame, names = dataset.frames[1], ["rgb.2", "label", "depth", "points", "identity.background", "background"]
    read = dataset.read(frame, names, view=2)
    for name, (data, member, extension) in zip(names, reading_speed._stored(dataset, frame, names), strict=True):
        torch.testing.assert_close(reading_speed._value(data, member, extension, dataset.scales, 2), read[name], rtol=0, atol=0)


def test_the_tiny_sizes_are_those_of_the_shipped_configuration():
    ours, shipped = reading_speed.TINY, load_yaml(GenHeadRun, "configs/genhead_tiny.yaml").model
    for name in ("image_resolution", "render_resolution", "feature_channels", "plane_channels"):
        assert getattr(ours, name) == getattr(shipped, name)
