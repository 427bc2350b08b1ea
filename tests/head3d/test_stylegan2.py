"""StyleGAN2's layers against per-sample references and their defining properties."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from head3d.networks.resample import upsample2, upsample2_conv
from head3d.networks.stylegan2 import (
    FullyConnected,
    Mapping,
    Synthesis,
    SynthesisLayer,
    block_channels,
    modulated_conv,
)
from head3d.run.errors import ConfigError


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture(autouse=True)
def seeded_weights():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def test_fully_connected_scales_by_fan_in_and_multiplier() -> None:
    layer = FullyConnected(4, 3, lr_multiplier=0.5, bias_init=2.0)
    x = draw(5, 4).float()
    torch.testing.assert_close(layer(x), x @ layer.weight.T * 0.5 / 2 + 2.0 * 0.5)
    bent = FullyConnected(4, 3, "leaky_relu")
    torch.testing.assert_close(bent(x), functional.leaky_relu(x @ bent.weight.T / 2, 0.2) * math.sqrt(2))


@pytest.mark.parametrize("multiplier", [0.01, 1.0])
def test_fully_connected_keeps_the_variance_at_any_learning_rate(multiplier: float) -> None:
    y = FullyConnected(256, 256, lr_multiplier=multiplier)(draw(500, 256).float())
    assert y.square().mean().item() == pytest.approx(1.0, abs=0.05)


def test_mapping_ignores_the_length_of_z_and_truncates_towards_the_average() -> None:
    mapping = Mapping(6, 4, 8, n_ws=5, layers=2)
    z, c = draw(3, 6).float(), draw(3, 4, seed=1).float()
    ws = mapping(z, c)
    mapping.move_average(ws[:, 0].mean(0))
    assert ws.shape == (3, 5, 8)
    assert torch.equal(ws[:, 0], ws[:, 4])
    torch.testing.assert_close(mapping(7 * z, c), ws, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(mapping.w_average, 0.002 * ws[:, 0].mean(0))
    mapping.w_average.normal_(generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(mapping(z, c, truncation_psi=0.0), mapping.w_average.expand(3, 5, 8))
    torch.testing.assert_close(mapping(z, c, truncation_psi=0.7), mapping.w_average + 0.7 * (ws - mapping.w_average))


def test_mapping_of_the_condition_alone_needs_no_latent() -> None:
    c = draw(2, 4).float()
    assert Mapping(0, 4, 8, 1, 2)(None, c).shape == (2, 1, 8)
    with pytest.raises(ConfigError, match="at least one input"):
        Mapping(0, 0, 8, 1, 2)


def convolve_per_sample(x: Tensor, weight: Tensor, styles: Tensor, demodulate: bool, upsample: bool) -> Tensor:
    """The definition: modulate the weights of each sample, normalise each output channel's, convolve."""
    rows = []
    for sample, style in zip(x, styles, strict=True):
        kernel = weight * style[None, :, None, None]
        if demodulate:
            kernel = torch.stack([k / (k.square().sum() + 1e-8).sqrt() for k in kernel])
        convolve = upsample2_conv if upsample else lambda x, w: functional.conv2d(x, w, padding=w.shape[-1] // 2)
        rows.append(convolve(sample[None], kernel))
    return torch.cat(rows)


@pytest.mark.parametrize("demodulate", [True, False])
@pytest.mark.parametrize(("size", "upsample"), [(1, False), (3, False), (3, True)])
@pytest.mark.parametrize("shared", [True, False])
def test_modulated_convolution_equals_modulated_weights(demodulate: bool, size: int, upsample: bool, shared: bool) -> None:
    x, weight = draw(3, 4, 5, 5), draw(6, 4, size, size, seed=1)
    styles = draw(1 if shared else 3, 4, seed=2)
    side = 10 if upsample else 5
    bias, noise = draw(6, seed=3), draw(3, 1, side, side, seed=4)
    expected = 1.7 * convolve_per_sample(x, weight, styles.expand(3, 4), demodulate, upsample)
    options = {"demodulate": demodulate, "upsample": upsample, "gain": 1.7}
    torch.testing.assert_close(modulated_conv(x, weight, styles, **options), expected)
    everything = modulated_conv(x, weight, styles, bias=bias, noise=noise, **options)
    torch.testing.assert_close(everything, expected + bias[:, None, None] + noise)


def test_one_input_serves_many_styles() -> None:
    x, weight, styles = draw(1, 4, 5, 5), draw(6, 4, 3, 3, seed=1), draw(3, 4, seed=2)
    torch.testing.assert_close(modulated_conv(x, weight, styles), modulated_conv(x.expand(3, -1, -1, -1), weight, styles))


def test_modulated_convolution_has_the_right_gradient() -> None:
    x, weight, styles = draw(2, 2, 3, 3).requires_grad_(), draw(2, 2, 3, 3, seed=1).requires_grad_(), draw(2, 2, seed=2).requires_grad_()
    assert torch.autograd.gradcheck(lambda *inputs: modulated_conv(*inputs, upsample=True), (x, weight, styles))
    assert torch.autograd.gradcheck(modulated_conv, (x, weight, styles))


def test_demodulation_makes_half_precision_safe_at_any_scale() -> None:
    x, weight, styles = draw(2, 8, 4, 4), draw(8, 8, 3, 3, seed=1), draw(2, 8, seed=2)
    expected = modulated_conv(x, weight, styles)
    half = modulated_conv(x.half(), 1e4 * weight.float(), 1e3 * styles.float())
    torch.testing.assert_close(half.double(), expected, rtol=2e-2, atol=2e-2)


def test_layer_adds_noise_and_bias_before_the_activation() -> None:
    layer = SynthesisLayer(4, 6, w_dim=5, resolution=8, clamp=1.5).double()
    with torch.no_grad():
        layer.noise_strength.fill_(0.3)
        layer.bias.normal_()
    x, w = draw(2, 4, 8, 8), draw(2, 5, seed=1)
    sums = convolve_per_sample(x, layer.weight, layer.affine(w), True, False) + layer.bias[:, None, None]
    bend = lambda y: (functional.leaky_relu(y, 0.2) * math.sqrt(2)).clamp(-1.5, 1.5)  # noqa: E731
    torch.testing.assert_close(layer(x, w, "none"), bend(sums))
    torch.testing.assert_close(layer(x, w, "constant"), bend(sums + 0.3 * layer.noise))
    assert layer(x, w, "none").abs().max() == 1.5
    draws = [layer(x, w, "random", torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def tiny_synthesis(**options) -> Synthesis:
    network = Synthesis(6, 16, 5, channel_base=64, channel_max=8, **options)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.ndim == 0:
                parameter.fill_(0.1)
    return network


def test_synthesis_takes_two_ws_for_each_resolution() -> None:
    assert Synthesis(2, 256, 1, channel_base=256).num_ws == 14
    network = tiny_synthesis()
    assert network.num_ws == 6
    assert network(draw(2, 6, 6).float()).shape == (2, 5, 16, 16)


def in_half_precision(half_precision: bool, device: torch.device) -> torch.dtype:
    """feature_type without its condition on the device: the float16 code runs on a CPU too, only slowly."""
    return torch.float16 if half_precision else torch.float32


def test_half_precision_blocks_change_the_image_by_rounding_only(monkeypatch: pytest.MonkeyPatch) -> None:
    network, ws = tiny_synthesis(half_precision_blocks=3, conv_clamp=256.0), draw(2, 6, 6).float()
    expected = network(ws)
    monkeypatch.setattr("head3d.networks.stylegan2.feature_type", in_half_precision)
    types = []
    for block in network.blocks.values():
        block.conv1.register_forward_hook(lambda module, inputs, output: types.append(output.dtype))
    image = network(ws)
    assert types == [torch.float32, torch.float16, torch.float16]  # the 4x4 block stays in float32
    assert image.dtype == torch.float32
    assert 0 < (image - expected).abs().max() < 0.02
    image.square().mean().backward()
    assert all(parameter.grad.isfinite().all() for parameter in network.parameters())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_in_half_precision_agrees_with_the_cpu() -> None:
    network, ws = tiny_synthesis(half_precision_blocks=2, conv_clamp=256.0), draw(2, 6, 6).float()
    expected = network(ws)
    assert (network.cuda()(ws.cuda()).cpu() - expected).abs().max() < 0.02


def test_a_later_w_leaves_the_earlier_layers_alone() -> None:
    network = tiny_synthesis()
    seen = {}
    names = ["4.conv1", "4.to_image", "8.conv0", "8.conv1", "8.to_image", "16.conv0", "16.conv1", "16.to_image"]
    taken = [0, 1, 1, 2, 3, 3, 4, 5]  # to_image shares its w with the next block's first convolution
    for name in names:
        block, layer = name.split(".")
        module = getattr(network.blocks[block], layer).affine
        module.register_forward_pre_hook(lambda module, inputs, name=name: seen.__setitem__(name, inputs[0]))
    ws = draw(2, 6, 6).float()
    network(ws)
    for name, index in zip(names, taken, strict=True):
        assert torch.equal(seen[name], ws[:, index]), name


def test_the_image_is_the_sum_of_the_upsampled_images_of_all_blocks() -> None:
    network = tiny_synthesis()
    images = []
    for block in network.blocks.values():
        block.to_image.register_forward_hook(lambda module, inputs, output: images.append(output.clone()))
    result = network(draw(2, 6, 6).float())
    torch.testing.assert_close(result, upsample2(upsample2(images[0]) + images[1]) + images[2])


def test_a_sample_does_not_depend_on_its_batch() -> None:
    network, ws = tiny_synthesis(), draw(3, 6, 6).float()
    torch.testing.assert_close(network(ws)[1:2], network(ws[1:2]), rtol=1e-4, atol=1e-5)


def test_noise_modes_differ_and_random_noise_needs_a_generator() -> None:
    network, ws = tiny_synthesis(), draw(2, 6, 6).float()
    assert not torch.allclose(network(ws, "none"), network(ws, "constant"))
    with pytest.raises(AssertionError, match="generator"):
        network(ws, "random")
    with pytest.raises(ValueError, match="noise"):
        network(ws, "loud")


def test_channels_follow_the_published_table() -> None:
    published = {4: 512, 8: 512, 16: 512, 32: 512, 64: 512, 128: 256, 256: 128}
    assert {size: block_channels(size, 32768, 512) for size in published} == published
    assert [block_channels(size, 16384, 512) for size in (32, 64)] == [512, 256]


@pytest.mark.parametrize("resolution", [2, 48])
def test_a_resolution_that_doubling_cannot_reach_is_refused(resolution: int) -> None:
    with pytest.raises(ConfigError, match=f"power of two.*{resolution}"):
        Synthesis(8, resolution, 3)
