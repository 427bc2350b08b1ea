"""Resampling: hand-computed rows, a direct-loop reference, adjoints and derivatives of both orders."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from head3d.networks.resample import (
    blur,
    downsample2,
    downsample2_conv,
    image_layout,
    resize_antialias,
    separable_filter,
    upsample2,
    upsample2_conv,
)

TAPS = (1 / 8, 3 / 8, 3 / 8, 1 / 8)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def filter_by_loops(x: Tensor, before: int, after: int, stride: int = 1, gain: float = 1.0) -> Tensor:
    """y[i, j] = gain * sum_ab taps[a] taps[b] x[i * stride + a - before, j * stride + b - before], zeros outside."""
    height, width = x.shape[-2:]
    rows, columns = ((n + before + after - 4) // stride + 1 for n in (height, width))
    y = torch.zeros(*x.shape[:2], rows, columns, dtype=x.dtype)
    for i in range(rows):
        for j in range(columns):
            for a in range(4):
                for b in range(4):
                    u, v = i * stride + a - before, j * stride + b - before
                    if 0 <= u < height and 0 <= v < width:
                        y[:, :, i, j] += gain * TAPS[a] * TAPS[b] * x[:, :, u, v]
    return y


def insert_zeros(x: Tensor) -> Tensor:
    y = torch.zeros(*x.shape[:2], 2 * x.shape[2], 2 * x.shape[3], dtype=x.dtype)
    y[:, :, ::2, ::2] = x
    return y


def test_upsampling_a_row_gives_the_bilinear_quarters() -> None:
    row = torch.tensor([0.0, 4.0, 0.0, 0.0]).expand(1, 1, 4, 4).contiguous()
    expected = torch.tensor([0.0, 1.0, 3.0, 3.0, 1.0, 0.0, 0.0, 0.0])
    torch.testing.assert_close(upsample2(row)[0, 0, 3], expected)


def test_downsampling_a_row_weighs_one_three_three_one() -> None:
    row = torch.tensor([0.0, 0.0, 8.0, 0.0, 0.0, 0.0]).expand(1, 1, 6, 6).contiguous()
    torch.testing.assert_close(downsample2(row)[0, 0, 1], torch.tensor([1.0, 3.0, 0.0]))


@pytest.mark.parametrize(
    ("before", "after", "stride", "gain"), [(2, 1, 1, 1.0), (1, 1, 2, 1.0), (2, 2, 1, 1.0), (1, 1, 1, 4.0), (0, 0, 1, 1.0)]
)
@pytest.mark.parametrize("size", [(6, 6), (5, 8)])
def test_blur_equals_the_direct_loops(before: int, after: int, stride: int, gain: float, size: tuple[int, int]) -> None:
    x = draw(2, 3, *size)
    torch.testing.assert_close(blur(x, (before, after), stride, gain), filter_by_loops(x, before, after, stride, gain))


def test_upsampling_is_zero_insertion_and_a_filter_of_gain_four() -> None:
    x = draw(2, 3, 5, 4)
    torch.testing.assert_close(upsample2(x), filter_by_loops(insert_zeros(x), 2, 1, gain=4.0))


def test_upsampling_convolution_is_zero_insertion_mirrored_kernel_filter() -> None:
    x, weight = draw(2, 3, 4, 4), draw(5, 3, 3, 3, seed=1)
    wide = functional.conv2d(functional.pad(insert_zeros(x), (2, 1, 2, 1)), weight.flip(2, 3))  # [.., 9, 9]: nothing cut before the filter
    torch.testing.assert_close(upsample2_conv(x, weight), filter_by_loops(wide, 1, 1, gain=4.0))


@pytest.mark.parametrize("size", [1, 3])
def test_downsampling_convolution_filters_then_strides(size: int) -> None:
    x, weight, bias = draw(2, 3, 6, 6), draw(4, 3, size, size, seed=1), draw(4, seed=2)
    wide = filter_by_loops(x, 2, 2) if size == 3 else filter_by_loops(x, 1, 1)
    torch.testing.assert_close(downsample2_conv(x, weight, bias), functional.conv2d(wide, weight, bias, stride=2))


def test_constants_survive_away_from_the_border() -> None:
    ones = torch.ones(1, 2, 12, 12)
    torch.testing.assert_close(upsample2(ones)[:, :, 2:-2, 2:-2], torch.ones(1, 2, 20, 20))
    torch.testing.assert_close(downsample2(ones)[:, :, 1:-1, 1:-1], torch.ones(1, 2, 4, 4))


def test_down_and_upsampling_are_adjoint_up_to_the_gain_of_four() -> None:
    x, y = draw(1, 2, 8, 6), draw(1, 2, 4, 3, seed=1)
    torch.testing.assert_close((4 * downsample2(x) * y).sum(), (x * upsample2(y)).sum())


@pytest.mark.parametrize("size", [4, 5])
def test_first_and_second_derivatives_are_right(size: int) -> None:
    x = draw(2, 2, size, size).requires_grad_()
    for operation in (upsample2, downsample2, lambda x: blur(x, (2, 2)), lambda x: blur(x, (2, 1))):
        squared = lambda x, operation=operation: operation(x).square()  # noqa: E731
        assert torch.autograd.gradcheck(squared, (x,))
        assert torch.autograd.gradgradcheck(squared, (x,))


def test_a_bias_is_added_last_and_has_derivatives_too() -> None:
    x, weight, bias = draw(2, 2, 3, 3).requires_grad_(), draw(4, 2, 3, 3, seed=1), draw(4, seed=2).requires_grad_()
    torch.testing.assert_close(upsample2_conv(x, weight, bias), upsample2_conv(x, weight) + bias[:, None, None])
    squared = lambda x, bias: upsample2_conv(x, weight, bias).square()  # noqa: E731
    assert torch.autograd.gradcheck(squared, (x, bias))
    assert torch.autograd.gradgradcheck(squared, (x, bias))


def test_memory_layout_changes_no_value() -> None:
    x = draw(2, 3, 6, 6).float()
    for operation in (upsample2, downsample2, blur):
        torch.testing.assert_close(operation(x.to(memory_format=torch.channels_last)), operation(x))
    assert torch.equal(image_layout(x), x)


def test_filters_differentiate_under_autocast() -> None:
    x = draw(1, 2, 4, 4).float().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = upsample2(x)
    y.float().sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == torch.float32
    torch.testing.assert_close(x.grad[:, :, 1:-1, 1:-1], torch.full((1, 2, 2, 2), 4.0))


def test_separable_filter_is_the_outer_product() -> None:
    x, taps = draw(1, 2, 7, 6), torch.tensor([0.25, 0.5, 0.25], dtype=torch.float64)
    kernel = torch.outer(taps, taps).expand(2, 1, 3, 3)
    torch.testing.assert_close(separable_filter(x, taps), functional.conv2d(x, kernel, padding=1, groups=2))


def test_antialiased_resizing_keeps_constants_and_fitting_images() -> None:
    x = draw(1, 3, 8, 8)
    assert resize_antialias(x, 8) is x
    torch.testing.assert_close(resize_antialias(torch.full((1, 1, 9, 9), 0.3), 4), torch.full((1, 1, 4, 4), 0.3))
    row = torch.tensor([0.0, 0, 0, 0, 8, 0, 0, 0])  # the kernel is a triangle of half-width 2: weights 1 3 3 1 over 8
    halved = resize_antialias(row.expand(1, 1, 8, 8), 4)
    torch.testing.assert_close(halved[0, 0, 0], torch.tensor([0.0, 1.0, 3.0, 0.0]))
