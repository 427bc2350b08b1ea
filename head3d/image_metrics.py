"""Image measures with exact truth: PSNR, SSIM and masked means, one number a sample so that intervals can be taken over identities."""

from __future__ import annotations

import math

import torch
from torch import Tensor

PSNR_CEILING_DB = 100.0  # what identical pictures get, so that a mean over samples stays finite


def masked_mean(
    values: Tensor,  # [B, C, H, W]
    mask: Tensor | None = None,  # [B, 1, H, W] weights >= 0; None = every pixel counts once
) -> Tensor:
    """Mean over channels and pixels, weighted by the mask; NaN [B] entries where the mask is empty."""
    if mask is None:
        return values.flatten(1).mean(1)
    weights = mask.expand_as(values).flatten(1)
    return (values.flatten(1) * weights).sum(1) / weights.sum(1)


def psnr(
    image: Tensor,  # [B, C, H, W] in [-1, 1]
    truth: Tensor,  # same shape
    mask: Tensor | None = None,  # [B, 1, H, W]; only these pixels are compared
) -> Tensor:
    """Peak signal-to-noise ratio [B] in dB: 10 log10(2^2 / mean squared error), at most PSNR_CEILING_DB; both are clamped to [-1, 1]."""
    assert image.shape == truth.shape, f"{tuple(image.shape)} against {tuple(truth.shape)}"
    error = masked_mean((image.clamp(-1, 1) - truth.clamp(-1, 1)).square(), mask)
    floor = 4.0 / 10.0 ** (PSNR_CEILING_DB / 10.0)
    return 10.0 * torch.log10(4.0 / error.clamp(min=floor))


def _window(size: int, sigma: float, like: Tensor) -> Tensor:
    x = torch.arange(size, device=like.device, dtype=like.dtype) - (size - 1) / 2
    weights = torch.exp(-x.square() / (2 * sigma * sigma))
    return weights / weights.sum()


def ssim(
    image: Tensor,  # [B, C, H, W] in [-1, 1]; H, W >= 11
    truth: Tensor,  # same shape
    mask: Tensor | None = None,  # [B, 1, H, W]; weights of the window centres
) -> Tensor:
    """Structural similarity [B] (Wang et al. 2004): 11x11 Gaussian window of sigma 1.5, valid positions only, K = 0.01 and 0.03.

    The mean over channels and window centres; biased (window-weighted) variances as in the paper.
    """
    assert image.shape == truth.shape, f"{tuple(image.shape)} against {tuple(truth.shape)}"
    size, sigma, peak = 11, 1.5, 2.0
    assert min(image.shape[-2:]) >= size, f"SSIM needs pictures of at least {size} px, got {tuple(image.shape[-2:])}"
    x, y = image.clamp(-1, 1), truth.clamp(-1, 1)
    channels = x.shape[1]
    window = _window(size, sigma, x)

    def blur(values: Tensor) -> Tensor:
        values = torch.nn.functional.conv2d(values, window.view(1, 1, size, 1).expand(channels, 1, -1, -1), groups=channels)
        return torch.nn.functional.conv2d(values, window.view(1, 1, 1, size).expand(channels, 1, -1, -1), groups=channels)

    mean_x, mean_y = blur(x), blur(y)
    variance_x = blur(x * x) - mean_x.square()
    variance_y = blur(y * y) - mean_y.square()
    covariance = blur(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * peak) ** 2, (0.03 * peak) ** 2
    similarity = ((2 * mean_x * mean_y + c1) * (2 * covariance + c2)) / (
        (mean_x.square() + mean_y.square() + c1) * (variance_x + variance_y + c2)
    )
    margin = size // 2
    return masked_mean(similarity, None if mask is None else mask[..., margin:-margin, margin:-margin])


def bootstrap_interval(
    values: Tensor,  # [N] one number a sample
    groups: Tensor,  # [N] int: samples of one group (identity) are drawn together
    generator: torch.Generator,
    resamples: int = 2000,
    coverage: float = 0.95,
) -> tuple[float, float, float]:
    """Mean over groups of the mean within the group, and its percentile bootstrap interval over groups: (mean, low, high).

    With one group the interval is the mean itself. NaN entries (empty masks) are left out; all three are NaN if nothing remains.
    """
    keep = ~values.isnan()
    values, groups = values[keep].double(), groups[keep]
    if values.numel() == 0:
        return (math.nan,) * 3
    _, index = torch.unique(groups, return_inverse=True)
    count = int(index.max()) + 1
    sums = torch.zeros(count, dtype=torch.float64).index_add_(0, index, values)
    means = sums / torch.bincount(index, minlength=count)
    draws = means[torch.randint(count, (resamples, count), generator=generator)].mean(1)
    tail = (1 - coverage) / 2
    low, high = torch.quantile(draws, torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return float(means.mean()), low, high
