"""The discriminator: a residual network (StyleGAN2, arXiv:1912.04958, section 4.1) with projection (arXiv:1802.05637)."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from head3d.networks.resample import downsample2_conv, image_layout
from head3d.networks.stylegan2 import (
    Activation,
    FullyConnected,
    Mapping,
    activate,
    activation_gain,
    block_channels,
    block_resolutions,
    feature_type,
)
from head3d.run.config import NonNegativeInt, PositiveFloat, PositiveInt


@dataclasses.dataclass(frozen=True)
class DiscriminatorConfig:
    """Defaults are the published run."""

    resolution: PositiveInt = 512  # px, a power of two; the side of the images it judges
    channels_in: PositiveInt = 10  # final image 3, raw image 3, correspondence map 3, opacity 1
    channel_base: PositiveInt = 32768  # feature channels at size s are channel_base / s, at most channel_max
    channel_max: PositiveInt = 512  # most feature channels of any layer
    camera_dim: NonNegativeInt = 25  # length of the camera label it is conditioned on; 0 = unconditional
    mapping_layers: PositiveInt = 8  # depth of the network that embeds the camera
    group_size: PositiveInt = 2  # samples whose spread is shown to the last block; a batch it does not divide uses the next smaller divisor
    half_precision_blocks: NonNegativeInt = 4  # the first (largest) ... blocks in float16, on CUDA only
    conv_clamp: PositiveFloat | None = 256.0  # limit of every layer's output; keeps float16 finite, and acts in float32 too


class EqualizedConv(nn.Module):
    """Convolution with equalised learning rate, optional bias, activation and halving of the size: [B, Cin, H, W] -> [B, Cout, H', W']."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,  # 1 or 3
        activation: Activation = "leaky_relu",
        bias: bool = True,
        downsample: bool = False,
        gain: float = 1.0,  # multiplies the output and the clamp
        clamp: float | None = None,
    ) -> None:
        super().__init__()
        self.activation: Activation = activation
        self.downsample = downsample
        self.clamp = None if clamp is None else clamp * gain
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, kernel_size, kernel_size))
        self.bias = nn.Parameter(torch.zeros(out_channels)) if bias else None
        self.bias_gain = gain * activation_gain(activation)
        self.weight_gain = self.bias_gain / math.sqrt(in_channels * kernel_size**2)

    def forward(self, x: Tensor) -> Tensor:
        weight = (self.weight * self.weight_gain).to(x.dtype)
        bias = None if self.bias is None else (self.bias * self.bias_gain).to(x.dtype)
        if self.downsample:
            y = downsample2_conv(x, weight, bias)
        else:
            y = functional.conv2d(x, weight, bias, padding=weight.shape[-1] // 2)
        return activate(y, self.activation, self.clamp)


class DiscriminatorBlock(nn.Module):
    """Residual block that halves the size: [B, C, H, W] -> [B, C', H/2, W/2]. Scaling by sqrt(1/2) keeps the variance."""

    def __init__(self, channels: int, channels_out: int, half_precision: bool, clamp: float | None) -> None:
        super().__init__()
        self.half_precision = half_precision
        gain = math.sqrt(0.5)
        self.conv0 = EqualizedConv(channels, channels, 3, clamp=clamp)
        self.conv1 = EqualizedConv(channels, channels_out, 3, downsample=True, gain=gain, clamp=clamp)
        self.skip = EqualizedConv(channels, channels_out, 1, "linear", bias=False, downsample=True, gain=gain)

    def forward(self, x: Tensor) -> Tensor:
        return self.skip(x) + self.conv1(self.conv0(x))


def deviation_group(batch: int, group_size: int) -> int:
    """Samples in a group of `minibatch_deviation`: the largest divisor of the batch that is at most group_size."""
    return next(g for g in range(min(group_size, batch), 0, -1) if batch % g == 0)


def split_batch(batch: int, parts: int, group_size: int) -> Tensor:
    """Sample numbers [parts, batch / parts] of a batch that is judged part by part, so that no group of `minibatch_deviation` is torn.

    Part k gets the k-th run of whole groups, in the order in which `minibatch_deviation` finds the same groups again; one part is the
    batch as it is. With g the group, `parts` must divide batch / g.
    """
    group = deviation_group(batch, group_size)
    assert batch // group % parts == 0, f"{batch} samples in groups of {group} cannot be split into {parts} parts"
    return torch.arange(batch).view(group, parts, -1).transpose(0, 1).reshape(parts, -1)


def minibatch_deviation(x: Tensor, group_size: int) -> Tensor:
    """Append one channel: the standard deviation within a group of samples, averaged (arXiv:1710.10196, section 3).

    x [B, C, H, W] -> [B, C+1, H, W]. A group is samples n, n + B/g, n + 2B/g, ... with g = deviation_group(B, group_size). The
    average is over channels and pixels; g = 1 gives ~0.
    """
    batch, _, height, width = x.shape
    size = deviation_group(batch, group_size)
    groups = x.float().reshape(size, batch // size, -1)
    deviation = (groups.var(dim=0, unbiased=False) + 1e-8).sqrt().mean(dim=1)
    return torch.cat([x, deviation.to(x.dtype).repeat(size)[:, None, None, None].expand(-1, 1, height, width)], dim=1)


class Discriminator(nn.Module):
    """Images and the camera they claim -> one logit a sample; > 0 means real.

    The camera label is embedded as wide as the features at 4x4 and multiplies the last layer's output (projection).
    """

    def __init__(self, config: DiscriminatorConfig) -> None:
        super().__init__()
        self.config = config
        resolutions = block_resolutions(config.resolution, "discriminator")[::-1]
        channels = [block_channels(size, config.channel_base, config.channel_max) for size in resolutions]
        self.from_image = EqualizedConv(config.channels_in, channels[0], 1, clamp=config.conv_clamp)
        self.blocks = nn.ModuleDict(
            {
                str(size): DiscriminatorBlock(channels[i], channels[i + 1], i < config.half_precision_blocks, config.conv_clamp)
                for i, size in enumerate(resolutions[:-1])
            }
        )
        width = channels[-1]
        self.conv = EqualizedConv(width + 1, width, 3, clamp=config.conv_clamp)
        self.hidden = FullyConnected(width * 16, width, "leaky_relu")
        self.out = FullyConnected(width, width if config.camera_dim else 1)
        self.mapping = Mapping(0, config.camera_dim, width, 1, config.mapping_layers) if config.camera_dim else None

    def forward(
        self,
        images: Tensor,  # [B, channels_in, resolution, resolution] in [-1, 1]
        camera_label: Tensor | None = None,  # [B, camera_dim]; None where camera_dim is 0
    ) -> Tensor:
        """Return logits [B, 1], float32."""
        expected = (self.config.channels_in, self.config.resolution, self.config.resolution)
        assert images.shape[1:] == expected, f"images: expected [B, {expected}], got {tuple(images.shape)}"
        half_precision = self.config.half_precision_blocks > 0
        x = self.from_image(image_layout(images.to(feature_type(half_precision, images.device))))
        for block in self.blocks.values():
            x = block(x.to(feature_type(block.half_precision, x.device)))
        x = self.conv(minibatch_deviation(x.float(), self.config.group_size))
        x = self.out(self.hidden(x.flatten(1)))
        if self.mapping is None:
            return x
        embedded = self.mapping(None, camera_label)[:, 0]
        return (x * embedded).sum(dim=1, keepdim=True) / math.sqrt(x.shape[1])
