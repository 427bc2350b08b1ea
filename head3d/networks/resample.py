"""Resampling of images and feature maps with the binomial filter [1, 3, 3, 1], and antialiased resizing; plain torch.

A filtered upsampling by 2 is "insert zeros, then filter with gain 4"; a filtered downsampling by 2 is "filter, then keep every
second sample". Both keep constants away from the border, use zeros beyond it, and keep pixel centres (half-pixel convention),
like StyleGAN2 (arXiv:1912.04958, section 4.1; the filter is that of arXiv:1904.11486). The filter runs as a depthwise
convolution, which measured fastest on CPUs, above all in channels-last layout.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.nn import functional

FILTER = (1.0, 3.0, 3.0, 1.0)
Padding = tuple[int, int]  # zeros before and after, in both image axes


@functools.lru_cache(maxsize=256)
def _depthwise_filter(channels: int, gain: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False), torch.no_grad():
        taps = torch.tensor(FILTER, dtype=torch.float64)
        kernel = torch.outer(taps, taps) * (gain / taps.sum() ** 2)
        return kernel.to(device=device, dtype=dtype).expand(channels, 1, 4, 4).contiguous()


def image_layout(x: Tensor) -> Tensor:
    """Return x [B, C, H, W] in channels-last memory where that is faster (CPU, half precision), else contiguous. Values are unchanged."""
    fast = x.device.type == "cpu" or x.dtype in (torch.float16, torch.bfloat16)
    return x.contiguous(memory_format=torch.channels_last if fast else torch.contiguous_format)


class _Depthwise(torch.autograd.Function):
    """Depthwise correlation with a constant kernel, or (`transposed`) its adjoint; each is the gradient of the other.

    torch's own second derivative of a grouped convolution loops over the channels for a weight gradient that nobody asked for.
    """

    @staticmethod
    def forward(
        context, x: Tensor, kernel: Tensor, bias: Tensor | None, stride: int, padding: int, transposed: bool, extra: tuple[int, int]
    ) -> Tensor:
        context.save_for_backward(kernel)
        context.arguments = stride, padding, transposed
        context.size = x.shape[-2:]
        if transposed:
            return functional.conv_transpose2d(x, kernel, bias, stride, padding, output_padding=extra, groups=x.shape[1])
        return functional.conv2d(x, kernel, bias, stride, padding, groups=x.shape[1])

    @staticmethod
    def backward(context, gradient: Tensor):
        (kernel,) = context.saved_tensors
        stride, padding, transposed = context.arguments
        # rows and columns at the far border that the strided filter never read, which its adjoint must return as zeros
        extra = tuple((size + 2 * padding - taps) % stride for size, taps in zip(context.size, kernel.shape[-2:], strict=True))
        kernel = kernel.to(gradient.dtype)  # differs under autocast
        of_bias = gradient.sum((0, 2, 3)) if context.needs_input_grad[2] else None
        gradient = _Depthwise.apply(gradient, kernel, None, stride, padding, not transposed, (0, 0) if transposed else extra)
        return gradient, None, of_bias, None, None, None, None


def blur(x: Tensor, padding: Padding = (2, 1), stride: int = 1, gain: float = 1.0, bias: Tensor | None = None) -> Tensor:
    """Filter x [B, C, H, W] with the 4-tap binomial kernel in both axes (sum = `gain`), then add `bias` [C].

    Returns [B, C, (H + before + after - 4) // stride + 1, ...]; beyond the border x is zero. The kernel has an even length, so
    padding (2, 1) keeps the size and shifts by half a pixel; the callers below choose paddings that do not shift.
    """
    before, after = padding
    kernel = _depthwise_filter(x.shape[1], gain, x.dtype, x.device)
    if before != after:
        x, before = functional.pad(x, (before, after, before, after)), 0
    return _Depthwise.apply(x, kernel, bias, stride, before, False, (0, 0))


def upsample2(x: Tensor) -> Tensor:
    """Double the size of x [B, C, H, W] -> [B, C, 2H, 2W]; bilinear weights (1/4, 3/4), zeros beyond the border."""
    kernel = _depthwise_filter(x.shape[1], 4.0, x.dtype, x.device)
    return _Depthwise.apply(x, kernel, None, 2, 1, True, (0, 0))


def downsample2(x: Tensor) -> Tensor:
    """Halve the size of x [B, C, H, W] -> [B, C, H/2, W/2] with the binomial filter, zeros beyond the border."""
    return blur(x, padding=(1, 1), stride=2)


def upsample2_conv(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Double the size by a 3x3 convolution, [B, Cin, H, W] -> [B, Cout, 2H, 2W]; `weight` [Cout, Cin, 3, 3].

    Insert zeros, convolve, filter. The convolution is a transposed one (StyleGAN2 does the same), so the kernel acts mirrored
    compared with the layers that keep the size.
    """
    return blur(functional.conv_transpose2d(x, weight.transpose(0, 1), stride=2), padding=(1, 1), gain=4.0, bias=bias)


def downsample2_conv(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Filter, then convolve with stride 2: [B, Cin, H, W] -> [B, Cout, H/2, W/2]; `weight` [Cout, Cin, k, k] with k = 1 or 3."""
    if weight.shape[-1] == 1:
        return functional.conv2d(downsample2(x), weight, bias)
    return functional.conv2d(blur(x, padding=(2, 2)), weight, bias, stride=2)


def separable_filter(x: Tensor, taps: Tensor) -> Tensor:
    """Filter both axes of x [B, C, H, W] with symmetric `taps` [2r + 1]; same size, zeros beyond the border."""
    kernel = taps.expand(x.shape[1], 1, 1, -1).contiguous()
    radius = len(taps) // 2
    for axis in (-1, -2):
        x = functional.conv2d(x, kernel, padding=(0, radius) if axis == -1 else (radius, 0), groups=x.shape[1])
        kernel = kernel.transpose(-1, -2)
    return x


def resize_antialias(image: Tensor, size: int) -> Tensor:
    """Resize image [B, C, H, W] -> [B, C, size, size], bilinear, the kernel widened when shrinking; itself where it fits."""
    if image.shape[-2:] == (size, size):
        return image
    return functional.interpolate(image, size=(size, size), mode="bilinear", align_corners=False, antialias=True)
