"""Portraits encoded to z and rendered again from their own labels: a term for trainings of few images (not published).

    portrait --PortraitEncoder--> mean, log variance of z --draw--> z --GenHead, the portrait's shape, motion, camera--> some rays

A variational autoencoder (arXiv:1312.6114) beside the game, as in VAE-GAN (arXiv:1512.09300). A discriminator tells the generator only
whether heads look right, and needs millions of pictures until a lid or a lip is where the label says; the label and the portrait say it
in each picture. The divergence from N(0, 1) keeps the encoded people where fresh z are drawn. The published training has no such term.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genhead.losses import DiscriminatorParts
from head3d.cameras import Camera
from head3d.head_model import HeadModel
from head3d.networks.discriminator import DiscriminatorBlock, DiscriminatorConfig, EqualizedConv
from head3d.networks.stylegan2 import FullyConnected, block_channels, block_resolutions
from head3d.rasterize import rasterize
from head3d.rendering import HeadImages
from head3d.run.config import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

FEATURE_MARGIN = 32  # eyes and lips are widened by the picture's side over this on each side


@dataclasses.dataclass(frozen=True)
class AutoencoderConfig:
    """The term. Off by default, as published."""

    weight: NonNegativeFloat = 0.0  # of the rays' L1; 0 turns the term off
    divergence: NonNegativeFloat = 0.01  # of the divergence from N(0, 1), a mean over the numbers of z, beside an L1 of 1
    rays: PositiveInt = 768  # of the raw picture that are compared, a portrait
    features: NonNegativeFloat = 6.0  # a ray at eyes or lips is drawn 1 + this many times as often as another
    rate: PositiveFloat = 0.002  # Adam learning rate of generator and encoder, with the momentum that the game's optimisers lack
    alone_until: NonNegativeInt = 0  # images seen before which the generator learns from this term alone, without the game


class PortraitEncoder(nn.Module):
    """Pictures [B, 3, S, S] -> mean and log variance of z, each [B, z_dim]: the discriminator's residual blocks without its head."""

    def __init__(self, config: DiscriminatorConfig, z_dim: int) -> None:
        super().__init__()
        resolutions = block_resolutions(config.resolution, "encoder")[::-1]
        channels = [block_channels(size, config.channel_base, config.channel_max) for size in resolutions]
        self.from_image = EqualizedConv(3, channels[0], 1)
        self.blocks = nn.Sequential(*(DiscriminatorBlock(*pair, False, None) for pair in itertools.pairwise(channels)))
        self.hidden = FullyConnected(channels[-1] * 16, channels[-1], "leaky_relu")
        self.out = FullyConnected(channels[-1], 2 * z_dim)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_variance = self.out(self.hidden(self.blocks(self.from_image(images)).flatten(1))).chunk(2, dim=1)
        return mean, log_variance.clamp(-10.0, 4.0)


def divergence(mean: Tensor, log_variance: Tensor) -> Tensor:
    """KL(N(mean, variance) || N(0, 1)), the mean over batch and numbers: (m^2 + v - 1 - log v) / 2 (arXiv:1312.6114, appendix B)."""
    return (mean.square() + log_variance.exp() - 1 - log_variance).mean() / 2


def feature_weight(head: HeadModel, vertices: Tensor, camera: Camera, resolution: int, features: float) -> Tensor:
    """Weight [B, 1, S, S] of each pixel: 1 + features where eyeballs, lids or lips of posed meshes [B, V, 3] are seen or near, else 1."""
    raster = rasterize(vertices, head.faces, camera, resolution)
    chosen = torch.zeros(vertices.shape[1], dtype=torch.bool, device=vertices.device)
    for region in (head.regions.eyeballs, head.regions.eyelids, head.regions.lips):
        chosen[region] = True
    is_feature = torch.cat([chosen[head.faces].all(1), chosen.new_zeros(1)])  # the last entry serves face id -1
    margin = max(1, resolution // FEATURE_MARGIN)
    near = F.max_pool2d(is_feature[raster.face_ids][:, None].float(), 2 * margin + 1, stride=1, padding=margin)
    return 1 + features * near


def draw_rays(weight: Tensor, count: int, draws: Sequence[torch.Generator]) -> Tensor:
    """Numbers [B, min(count, R * R)] of different rays, drawn in proportion to weights [B, 1, R, R], those of sample b from draws[b]."""
    rows = weight.flatten(1)
    return torch.stack([torch.multinomial(row, min(count, len(row)), generator=one) for row, one in zip(rows, draws, strict=True)])


def ray_loss(rendered: HeadImages, real: DiscriminatorParts, chosen: Tensor) -> Tensor:
    """Mean L1 of colour plus mean L1 of opacity, both in [-1, 1], over the rendered rays `chosen` [B, n] of the real raw pictures."""

    def truth(picture: Tensor) -> Tensor:
        rays = picture.flatten(2)
        return rays.gather(2, chosen[:, None].expand(-1, rays.shape[1], -1))[:, :, None]

    color = (rendered.raw - truth(real.raw)).abs().mean()
    return color + (rendered.opacity * 2 - 1 - truth(real.opacity)).abs().mean()
