"""The game between a generator and a discriminator: losses, gradient penalty, blur, lazily corrected Adam, averaged weights.

Sources: non-saturating logistic loss (arXiv:1406.2661), R1 (arXiv:1801.04406, eq. 9), lazy regularisation (arXiv:1912.04958,
section 3.1), averaged weights (arXiv:1710.10196), blur and dual discrimination (arXiv:2112.07945, sections 4.3 and 5; portrait4d
section 3).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from head3d.networks.resample import separable_filter
from head3d.run.config import NonNegativeFloat

GRADIENT_LIMIT = 1e5  # what an infinite gradient is replaced by


def generator_loss(logits: Tensor) -> Tensor:
    """softplus(-D(fake)), the batch mean; logits [B, 1]."""
    return functional.softplus(-logits).mean()


def discriminator_loss(fake_logits: Tensor, real_logits: Tensor) -> Tensor:
    """softplus(D(fake)) + softplus(-D(real)), batch means; logits [B, 1]."""
    return functional.softplus(fake_logits).mean() + functional.softplus(-real_logits).mean()


@dataclasses.dataclass(frozen=True)
class R1Weights:
    """Gradient penalty by input of the discriminator. Defaults are the published run; smaller batches want larger ones."""

    image: NonNegativeFloat = 1.0  # final and raw picture
    correspondence: NonNegativeFloat = 10.0  # correspondence map
    opacity: NonNegativeFloat = 1.0  # opacity


def r1_penalty(
    logits: Tensor,  # [B, 1] of real samples, computed from `inputs`
    inputs: Sequence[Tensor],  # image, raw image, correspondence map, opacity, each [B, C, H, W] at its own size; they require grad
    weights: R1Weights,
) -> Tensor:
    """R1 with one weight per input: the batch mean of 1/2 sum_g weight_g |d logit / d input_g|^2, a scalar; differentiable.

    Raw image and opacity count at the rendering resolution R, as published: by the stacked input of size S, which holds them
    enlarged, a smooth gradient of theirs would count (R/S)^2 times as much.
    """
    gradients = torch.autograd.grad(logits.sum(), list(inputs), create_graph=True)
    factors = (weights.image, weights.image, weights.correspondence, weights.opacity)
    total = sum(factor * gradient.square().sum() for factor, gradient in zip(factors, gradients, strict=True))
    return total / (2 * len(logits))


def blur_sigma(images_seen: int, start_px: float, fade_images: int) -> float:
    """Standard deviation in px of the discriminator's blur: linearly from start_px to 0 over fade_images."""
    return start_px * max(0.0, 1.0 - images_seen / fade_images)


def gaussian_blur(x: Tensor, sigma_px: float) -> Tensor:
    """Blur x [B, C, H, W] with the published kernel 2^-(d / sigma)^2, |d| <= floor(3 sigma); unchanged below sigma = 1/3.

    Beyond the border x is zero. With base 2, the true standard deviation is sigma / sqrt(2 ln 2) = 0.85 sigma.
    """
    radius = int(3 * sigma_px)
    if radius < 1:
        return x
    taps = torch.exp2(-((torch.arange(-radius, radius + 1, dtype=torch.float32) / sigma_px) ** 2))
    return separable_filter(x, (taps / taps.sum()).to(x.device, x.dtype))


def blur_images(images: Tensor, sigma_px: float, include_raw: bool = False) -> Tensor:
    """Blur the final picture in the discriminator's input [B, 10, S, S]; for reals also raw picture and opacity (`include_raw`).

    Raw picture and opacity are blurred as they lie in that input, enlarged to S x S: sigma is in pixels of the final picture for all, so
    at the rendering resolution R it amounts to sigma R / S. Fakes' raw pictures stay sharp, as published: they start blurred by themselves.
    """
    if int(3 * sigma_px) < 1:
        return images
    parts = list(images.split((3, 3, 3, 1), dim=1))
    for i in (0, 1, 3) if include_raw else (0,):
        parts[i] = gaussian_blur(parts[i], sigma_px)
    return torch.cat(parts, dim=1)


def lazy_adam(
    parameters: Iterable[nn.Parameter],
    learning_rate: float,
    regularize_every: int,  # steps between regularisation
    betas: tuple[float, float] = (0.0, 0.99),
    epsilon: float = 1e-8,
) -> torch.optim.Adam:
    """Adam corrected for a regulariser with a step of its own after every k-th: c = k / (k + 1), rate * c, betas ** c."""
    c = regularize_every / (regularize_every + 1)
    return torch.optim.Adam(parameters, lr=learning_rate * c, betas=(betas[0] ** c, betas[1] ** c), eps=epsilon)


@torch.no_grad()
def sanitise_gradients(parameters: Iterable[nn.Parameter]) -> int:
    """Replace NaN by 0 and +-infinity by +-1e5 in every gradient, in place. Returns how many parameters were touched."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not gradients:
        return 0
    largest = torch.stack([norm.float() for norm in torch._foreach_norm(gradients, float("inf"))])
    broken = (~largest.isfinite()).nonzero().flatten().tolist()
    for index in broken:
        gradients[index].nan_to_num_(nan=0.0, posinf=GRADIENT_LIMIT, neginf=-GRADIENT_LIMIT)
    return len(broken)


class Ema:
    """Running average of a network's parameters, by half-life in images; buffers are copied."""

    def __init__(
        self,
        averaged: nn.Module,  # a copy of the network; overwritten by update
        half_life_images: float,
        ramp: float = 0.05,  # the half-life is at most this share of the images seen, so that early averages forget the start; 0 = no ramp
    ) -> None:
        self.averaged, self.half_life_images, self.ramp = averaged, half_life_images, ramp

    def decay(self, images_seen: int, batch: int) -> float:
        """The factor that the average keeps in an update of `batch` images."""
        half_life = self.half_life_images if self.ramp == 0 else min(self.half_life_images, images_seen * self.ramp)
        return 0.5 ** (batch / max(half_life, 1e-8))

    @torch.no_grad()
    def update(self, network: nn.Module, images_seen: int, batch: int) -> None:
        """averaged <- decay * averaged + (1 - decay) * network, after `images_seen` images, `batch` of them since the last update."""
        weight = 1.0 - self.decay(images_seen, batch)
        for average, current in zip(self.averaged.parameters(), network.parameters(), strict=True):
            average.lerp_(current.to(average.dtype), weight)
        for average, current in zip(self.averaged.buffers(), network.buffers(), strict=True):
            if average is not current:  # what both share, like the head model, needs no copy
                average.copy_(current)
