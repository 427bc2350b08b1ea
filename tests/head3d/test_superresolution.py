"""Super-resolution: sizes, the style of ones, the skip path."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import conv2d

from head3d.networks.resample import resize_antialias, upsample2, upsample2_conv
from head3d.networks.superresolution import SuperResolution, SuperResolutionConfig


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def tiny(channels: tuple[int, ...] = (8, 6), **options) -> SuperResolution:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = SuperResolution(SuperResolutionConfig(input_resolution=8, feature_channels=4, channels=channels, w_dim=5, **options))
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return network


@pytest.mark.parametrize(("channels", "side"), [((8,), 16), ((8, 6), 32), ((8, 6, 4), 64)])
@pytest.mark.parametrize("rendered", [4, 8, 12])
def test_each_block_doubles_the_input_resolution(channels: tuple[int, ...], side: int, rendered: int) -> None:
    network = tiny(channels)
    assert network.config.output_resolution == side
    assert network(draw(2, 3, rendered, rendered), draw(2, 4, rendered, rendered)).shape == (2, 3, side, side)


def test_the_published_sizes_are_the_defaults() -> None:
    assert SuperResolutionConfig().output_resolution == 512


def test_style_of_ones_is_the_given_style_one_and_ignores_ws() -> None:
    ones, given = tiny(), tiny(style="given")
    raw, features = draw(2, 3, 8, 8), draw(2, 4, 8, 8, seed=1)
    expected = ones(raw, features)
    assert torch.equal(ones(raw, features, draw(2, 9, 5)), expected)
    torch.testing.assert_close(given(raw, features, torch.ones(2, 9, 5)), expected, rtol=1e-4, atol=1e-5)  # unfolded: one style a sample
    assert not torch.allclose(given(raw, features, torch.zeros(2, 5)), expected)
    with pytest.raises(AssertionError, match="needs ws"):
        given(raw, features)


def test_the_raw_image_passes_through_upsampled() -> None:
    network = tiny()
    raw, features = draw(1, 3, 4, 4), draw(1, 4, 4, 4, seed=1)
    for parameters in (block.to_image for block in network.blocks):
        torch.nn.init.zeros_(parameters.weight)
        torch.nn.init.zeros_(parameters.bias)
    torch.testing.assert_close(network(raw, features), upsample2(upsample2(resize_antialias(raw, 8))))


def test_samples_are_independent_and_every_call_is_the_same() -> None:
    network, raw, features = tiny(), draw(3, 3, 8, 8), draw(3, 4, 8, 8, seed=1)
    image = network(raw, features)
    assert torch.equal(image, network(raw, features))
    torch.testing.assert_close(network(raw[1:2], features[1:2]), image[1:2], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("style", ["ones", "given"])
def test_painting_one_by_one_without_gradients_is_painting_the_batch(style: str) -> None:
    network, raw, features, ws = tiny(style=style), draw(3, 3, 8, 8), draw(3, 4, 8, 8, seed=1), draw(3, 5, seed=2)
    batch = network(raw, features, ws)  # with style 'given' modulated and demodulated sample by sample
    with torch.no_grad():
        one_by_one, shared = network(raw, features, ws), network(raw, features, ws[:1])
    torch.testing.assert_close(one_by_one, batch, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(shared, network(raw, features, ws[:1]), rtol=1e-4, atol=1e-5)


def test_a_style_of_ones_is_modulation_and_demodulation_written_out() -> None:
    """Plain convolutions with the folded weights against the definition: scale the input channels, convolve, divide by |s W|."""
    network, x = tiny((8,)), draw(2, 4, 8, 8, seed=1)
    block = network.blocks[0]
    w = torch.ones(1, 5)

    def convolved(layer, x: Tensor) -> Tensor:
        styles = layer.affine(w)[0]
        scaled = x * styles[:, None, None]
        y = upsample2_conv(scaled, layer.weight) if layer.upsample else conv2d(scaled, layer.weight, padding=1)
        norm = ((layer.weight * styles[:, None, None]).square().sum((1, 2, 3)) + 1e-8).sqrt()
        y = y / norm[:, None, None] + layer.bias[:, None, None]
        return torch.where(y > 0, y, 0.2 * y) * 2**0.5

    hidden, last = convolved(block.conv1, convolved(block.conv0, x)), block.to_image
    colors = conv2d(hidden * last.affine(w)[0][:, None, None] / 8**0.5, last.weight, last.bias)
    expected = upsample2(x[:, :3]) + colors
    torch.testing.assert_close(network(x[:, :3], x), expected, rtol=1e-4, atol=1e-5)


def test_bfloat16_changes_the_picture_by_rounding_only() -> None:
    network, raw, features = tiny((16, 16)), draw(2, 3, 8, 8), draw(2, 4, 8, 8, seed=1)
    seen = []
    network.blocks[0].conv1.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    with torch.no_grad():
        exact, rounded = network(raw, features), network(raw, features, precision="bfloat16")
    assert seen == [torch.float32] * 2 + [torch.bfloat16] * 2 and rounded.dtype == torch.float32
    error = (exact - rounded).square().mean().sqrt() / exact.std()
    assert 0 < error < 0.01


def test_no_noise_is_kept() -> None:
    assert not [name for name in tiny().state_dict() if "noise" in name]


def test_without_blocks_the_picture_is_the_raw_one() -> None:
    network = SuperResolution(SuperResolutionConfig(input_resolution=8, feature_channels=4, channels=()))
    raw = draw(2, 3, 8, 8)
    assert network.config.output_resolution == 8 and torch.equal(network(raw, draw(2, 4, 8, 8, seed=1)), raw)
