"""The background generator."""

import torch

from genhead.background import BackgroundConfig, BackgroundGenerator
from head3d.networks.stylegan2 import block_channels

TINY = BackgroundConfig(resolution=16, channels=4, z_dim=6, w_dim=8, mapping_layers=2, channel_base=128, channel_max=8)


def test_features_lie_between_zero_and_one_and_follow_z() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = BackgroundGenerator(TINY)
    z = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))
    features = network(z)
    assert features.shape == (3, 4, 16, 16)
    assert features.min() > 0
    assert features.max() < 1
    assert torch.equal(features, network(z))
    torch.testing.assert_close(network(z[1:2]), features[1:2], rtol=1e-4, atol=1e-5)
    assert (features[0] - features[1]).abs().max() > 0.01


def test_the_defaults_are_the_published_sizes() -> None:
    config = BackgroundConfig()
    sizes = [block_channels(size, config.channel_base, config.channel_max) for size in (4, 8, 16, 32, 64)]
    assert (sizes, config.resolution, config.channels) == ([512, 512, 512, 512, 256], 64, 32)


def test_the_average_of_w_plays_no_part() -> None:
    network = BackgroundGenerator(TINY)
    z = torch.randn(2, 6, generator=torch.Generator().manual_seed(0))
    before = network(z)
    network.mapping.w_average.fill_(5.0)
    assert torch.equal(network(z), before)
