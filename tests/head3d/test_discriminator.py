"""The discriminator: minibatch spread by hand, projection, independence of groups, and the derivatives that R1 needs."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from head3d.networks.discriminator import Discriminator, DiscriminatorConfig, EqualizedConv, minibatch_deviation, split_batch
from head3d.run.errors import ConfigError


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(autouse=True)
def seeded_weights():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def tiny(**options) -> Discriminator:
    return Discriminator(DiscriminatorConfig(resolution=16, channel_base=128, channel_max=8, **options))


def test_deviation_channel_is_the_mean_spread_of_each_group() -> None:
    values = torch.tensor([1.0, 10.0, 5.0, 10.0])  # groups of two: samples {0, 2} and {1, 3}
    x = values[:, None, None, None].expand(4, 2, 3, 3)
    y = minibatch_deviation(x, 2)
    assert y.shape == (4, 3, 3, 3)
    assert torch.equal(y[:, :2], x)
    torch.testing.assert_close(y[:, 2, 0, 0], torch.tensor([2.0, 1e-4, 2.0, 1e-4]))
    assert torch.equal(y[:, 2], y[:, 2, :1, :1].expand(-1, 3, 3))


@pytest.mark.parametrize(("batch", "groups_of"), [(1, 1), (3, 1), (4, 2)])
def test_group_size_falls_to_a_divisor_of_the_batch(batch: int, groups_of: int) -> None:
    spread = minibatch_deviation(draw(batch, 2, 2, 2), 2)[:, 2].amax()
    assert (spread < 1e-3) == (groups_of == 1)


@pytest.mark.parametrize(
    ("batch", "parts", "group_size", "expected"),
    [
        (4, 1, 2, [[0, 1, 2, 3]]),
        (4, 2, 2, [[0, 2], [1, 3]]),
        (8, 2, 2, [[0, 1, 4, 5], [2, 3, 6, 7]]),
        (9, 3, 4, [[0, 3, 6], [1, 4, 7], [2, 5, 8]]),
        (4, 4, 1, [[0], [1], [2], [3]]),
    ],
)
def test_a_split_batch_keeps_groups_whole(batch: int, parts: int, group_size: int, expected: list[list[int]]) -> None:
    assert split_batch(batch, parts, group_size).tolist() == expected


@pytest.mark.parametrize("parts", [2, 3, 6])
def test_parts_of_a_split_batch_see_the_deviations_of_the_whole(parts: int) -> None:
    x = draw(12, 3, 2, 2)
    whole = minibatch_deviation(x, 2)
    for members in split_batch(12, parts, 2):
        torch.testing.assert_close(minibatch_deviation(x[members], 2), whole[members])


def test_equalized_convolution_scales_weights_bias_and_clamp() -> None:
    layer = EqualizedConv(4, 6, 3, gain=0.5, clamp=0.8)
    with torch.no_grad():
        layer.bias.normal_()
    x = draw(2, 4, 8, 8)
    sums = functional.conv2d(x, layer.weight / 6, layer.bias, padding=1)
    torch.testing.assert_close(layer(x), (functional.leaky_relu(sums, 0.2) * math.sqrt(2) * 0.5).clamp(-0.4, 0.4))


def test_logits_are_one_a_sample_and_depend_on_image_and_camera() -> None:
    network, images, camera = tiny(), draw(4, 10, 16, 16), draw(4, 25, seed=1)
    logits = network(images, camera)
    assert logits.shape == (4, 1)
    assert not torch.allclose(logits, network(images, camera.roll(1, 0)))
    assert not torch.allclose(logits, network(images.roll(1, 0), camera))


def test_the_camera_enters_by_projection_only() -> None:
    network, images = tiny(), draw(2, 10, 16, 16)
    camera = draw(2, 25, seed=1)
    features = []
    network.out.register_forward_hook(lambda module, inputs, output: features.append(output))
    logits = network(images, camera)
    embedded = network.mapping(None, camera)[:, 0]
    torch.testing.assert_close(logits[:, 0], (features[0] * embedded).sum(1) / math.sqrt(8))


def test_a_sample_sees_only_its_group() -> None:
    network, images, camera = tiny(), draw(4, 10, 16, 16), draw(4, 25, seed=1)
    changed = images.clone()
    changed[1] += 1.0  # groups {0, 2} and {1, 3}
    before, after = network(images, camera), network(changed, camera)
    torch.testing.assert_close(before[[0, 2]], after[[0, 2]])
    assert not torch.allclose(before[3], after[3])


def test_without_camera_it_gives_plain_logits() -> None:
    assert tiny(camera_dim=0, channels_in=3)(draw(2, 3, 16, 16)).shape == (2, 1)


def test_signal_keeps_its_size_through_the_published_depth() -> None:
    network = Discriminator(DiscriminatorConfig(resolution=64, channel_base=1024, channel_max=32, conv_clamp=None))
    seen = {}
    for name, block in network.blocks.items():
        block.register_forward_hook(lambda module, inputs, output, name=name: seen.__setitem__(name, output.square().mean().item()))
    network(draw(4, 10, 64, 64), draw(4, 25))
    assert len(seen) == 4
    assert all(0.1 < power < 10 for power in seen.values()), seen


def test_second_derivative_agrees_with_finite_differences() -> None:
    network = tiny(conv_clamp=None).double()
    images = draw(2, 10, 16, 16).double()

    def penalty() -> Tensor:
        x = images.clone().requires_grad_()
        # the network computes in float32; its parts are called in float64 here
        y = network.from_image(x)
        for block in network.blocks.values():
            y = block(y)
        y = network.hidden(network.conv(torch.cat([y, y[:, :1]], 1)).flatten(1))
        (gradient,) = torch.autograd.grad(network.out(y).square().sum(), x, create_graph=True)
        return gradient.square().sum()

    weight = network.blocks["16"].conv1.weight
    (analytic,) = torch.autograd.grad(penalty(), weight)
    for index in [(0, 0, 1, 1), (3, 2, 0, 2), (7, 7, 2, 0)]:
        step = 1e-6
        with torch.no_grad():
            weight[index] += step
        above = penalty().item()
        with torch.no_grad():
            weight[index] -= 2 * step
        below = penalty().item()
        with torch.no_grad():
            weight[index] += step
        assert (above - below) / (2 * step) == pytest.approx(analytic[index].item(), rel=1e-4, abs=1e-6)


def test_half_precision_changes_logits_and_penalty_by_rounding_only(monkeypatch: pytest.MonkeyPatch) -> None:
    network, camera = tiny(half_precision_blocks=1), draw(4, 25, seed=1)

    def logits_and_gradient() -> tuple[Tensor, Tensor]:
        images = draw(4, 10, 16, 16).requires_grad_()
        logits = network(images, camera)
        (gradient,) = torch.autograd.grad(logits.sum(), images, create_graph=True)
        gradient.square().sum().backward()
        return logits, gradient

    expected = logits_and_gradient()
    types = []
    monkeypatch.setattr("head3d.networks.discriminator.feature_type", lambda half, device: torch.float16 if half else torch.float32)
    network.blocks["8"].register_forward_hook(lambda module, inputs, output: types.append(output.dtype))
    network.blocks["16"].register_forward_hook(lambda module, inputs, output: types.append(output.dtype))
    for ours, full in zip(logits_and_gradient(), expected, strict=True):
        assert ours.dtype == torch.float32
        assert 0 < (ours - full).norm() / full.norm() < 0.02
    assert types == [torch.float16, torch.float32]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_in_half_precision_agrees_with_the_cpu() -> None:
    network, images, camera = tiny(half_precision_blocks=1), draw(4, 10, 16, 16), draw(4, 25, seed=1)
    expected = network(images, camera)
    assert (network.cuda()(images.cuda(), camera.cuda()).cpu() - expected).abs().max() < 0.02


def test_a_wrong_resolution_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"discriminator.*power of two.*48"):
        Discriminator(DiscriminatorConfig(resolution=48))
    with pytest.raises(AssertionError, match="16, 16"):
        tiny()(draw(2, 10, 8, 8), draw(2, 25))
