"""The game's parts: losses and schedules by hand, the gradient penalty on a discriminator whose gradient is known."""

import math

import pytest
import torch
from torch import Tensor, nn

from head3d.adversarial import (
    Ema,
    R1Weights,
    blur_images,
    blur_sigma,
    discriminator_loss,
    gaussian_blur,
    generator_loss,
    lazy_adam,
    r1_penalty,
    sanitise_gradients,
)
from head3d.networks.discriminator import Discriminator, DiscriminatorConfig
from head3d.networks.resample import resize_antialias


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_undecided_logits_cost_the_logarithm_of_two() -> None:
    zero = torch.zeros(4, 1)
    assert generator_loss(zero).item() == pytest.approx(math.log(2))
    assert discriminator_loss(zero, zero).item() == pytest.approx(2 * math.log(2))


def test_each_player_pulls_the_logits_its_way() -> None:
    fake, real = torch.zeros(2, 1, requires_grad=True), torch.zeros(2, 1, requires_grad=True)
    generator_loss(fake).backward()
    assert torch.equal(fake.grad, torch.full((2, 1), -0.25))
    fake.grad = None
    discriminator_loss(fake, real).backward()
    assert torch.equal(fake.grad, torch.full((2, 1), 0.25))
    assert torch.equal(real.grad, torch.full((2, 1), -0.25))


def parts_of_input(seed: int = 0) -> tuple[Tensor, ...]:
    """Image, raw image, correspondence map and opacity of a discriminator at 8 x 8 with rendering at 4 x 4."""
    sizes = ((2, 3, 8, 8), (2, 3, 4, 4), (2, 3, 8, 8), (2, 1, 4, 4))
    return tuple(draw(*size, seed=seed + i).requires_grad_() for i, size in enumerate(sizes))


def test_penalty_of_a_linear_discriminator_is_its_squared_weights_by_input() -> None:
    parts, slopes = parts_of_input(), parts_of_input(seed=10)
    logits = sum((slope[:1] * part).sum(dim=(1, 2, 3)) for slope, part in zip(slopes, parts, strict=True))[:, None]
    penalty = r1_penalty(logits, parts, R1Weights(image=1.0, correspondence=10.0, opacity=3.0))
    powers = [slope[0].square().sum() for slope in slopes]
    torch.testing.assert_close(penalty, 0.5 * (powers[0] + powers[1] + 10 * powers[2] + 3 * powers[3]))
    torch.testing.assert_close(torch.autograd.grad(penalty, slopes[2])[0][0], 10 * slopes[2][0])


def test_penalty_trains_the_real_discriminator() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = Discriminator(DiscriminatorConfig(resolution=8, channel_base=64, channel_max=8))
    parts = parts_of_input()

    def penalty() -> Tensor:
        return r1_penalty(network(torch.cat([resize_antialias(part, 8) for part in parts], dim=1), draw(2, 25)), parts, R1Weights())

    before = penalty()
    before.backward()
    assert all(parameter.grad.abs().sum() > 0 for name, parameter in network.named_parameters() if name.endswith("weight"))
    moved = [parameter for parameter in network.parameters() if parameter.grad is not None]
    rate = (
        1e-3 * before.item() / sum(parameter.grad.square().sum() for parameter in moved).item()
    )  # lowers the penalty by 0.1 % to first order
    with torch.no_grad():
        for parameter in moved:
            parameter -= rate * parameter.grad
    assert 1 - (penalty() / before).item() == pytest.approx(1e-3, rel=0.2)


@pytest.mark.parametrize(("images_seen", "sigma"), [(0, 10.0), (50_000, 7.5), (200_000, 0.0), (10**7, 0.0)])
def test_blur_falls_linearly_to_none(images_seen: int, sigma: float) -> None:
    assert blur_sigma(images_seen, 10.0, 200_000) == pytest.approx(sigma)


def test_blur_of_a_point_has_the_published_shape() -> None:
    image = torch.zeros(1, 1, 15, 15)
    image[0, 0, 7, 7] = 1.0
    row = gaussian_blur(image, 2.0)[0, 0].sum(0)  # radius 6
    assert row[0] == 0
    assert row[1] > 0
    assert (row[9] / row[7]).item() == pytest.approx(0.5)
    assert (row[3] / row[7]).item() == pytest.approx(2.0**-4)
    assert row.sum().item() == pytest.approx(1.0)


def test_blur_touches_the_channels_it_should() -> None:
    images = draw(2, 10, 8, 8)
    assert blur_images(images, 0.3) is images
    fake, real = blur_images(images, 1.0), blur_images(images, 1.0, include_raw=True)
    assert [torch.equal(fake[:, i], images[:, i]) for i in range(10)] == [False] * 3 + [True] * 7
    assert [torch.equal(real[:, i], images[:, i]) for i in range(10)] == [False] * 6 + [True] * 3 + [False]
    torch.testing.assert_close(real[:, 3:6], gaussian_blur(images[:, 3:6], 1.0))


def test_adam_is_corrected_for_the_lazy_step() -> None:
    group = lazy_adam([nn.Parameter(torch.zeros(1))], 0.0025, 4).param_groups[0]
    assert group["lr"] == pytest.approx(0.002)
    assert group["betas"] == (0.0, pytest.approx(0.99**0.8))


def test_broken_gradients_are_mended_and_counted() -> None:
    parameters = [nn.Parameter(torch.zeros(4)) for _ in range(4)]
    nan, inf = float("nan"), float("inf")
    for parameter, values in zip(parameters[:3], ([1.0, 2, 3, 4], [nan, 1, 1, 1], [inf, -inf, nan, 2]), strict=True):
        parameter.grad = torch.tensor(values)
    assert sanitise_gradients(parameters) == 2
    assert [parameter.grad.tolist() for parameter in parameters[:3]] == [[1, 2, 3, 4], [0, 1, 1, 1], [1e5, -1e5, 0, 2]]
    assert sanitise_gradients(parameters) == 0
    assert sanitise_gradients([nn.Parameter(torch.zeros(1))]) == 0


def layer(value: float) -> nn.Module:
    module = nn.BatchNorm1d(1)
    for tensor in (*module.parameters(), module.running_mean):
        tensor.data.fill_(value)
    return module


def test_average_moves_half_way_in_a_half_life_and_buffers_at_once() -> None:
    average = layer(0.0)
    ema = Ema(average, half_life_images=1000, ramp=0.0)
    for _ in range(10):
        ema.update(layer(1.0), images_seen=10**6, batch=100)
    assert average.weight.item() == pytest.approx(0.5)
    assert average.running_mean.item() == 1.0


def test_early_averages_follow_the_ramp() -> None:
    ema = Ema(layer(0.0), half_life_images=10_000, ramp=0.05)
    assert ema.decay(0, 32) == 0.0
    assert ema.decay(32 * 20, 32) == pytest.approx(0.5)
    assert ema.decay(10**7, 10_000) == pytest.approx(0.5)
