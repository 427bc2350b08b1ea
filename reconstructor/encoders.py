"""What reads a source image: a global encoder (DeepLabV3 on a ResNet, no normalisation) and a detail encoder (a few convolutions)."""

import dataclasses
import itertools
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from head3d.run.config import PositiveInt
from head3d.run.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class GlobalEncoderConfig:
    """The global encoder. Defaults are the published run: DeepLabV3 on ResNet-34, output stride 8."""

    base_width: PositiveInt = 64  # channels of the stem and first stage; each further stage doubles them
    stage_blocks: tuple[PositiveInt, ...] = (
        3,
        4,
        6,
        3,
    )  # residual blocks per stage; the second halves the size, later ones are dilated by 2, 4
    stem_pool: bool = True  # max-pool after the first convolution: output stride 8; without it 4, for small images
    pyramid_dilations: tuple[PositiveInt, ...] = (12, 24, 36)  # of the parallel 3x3 convolutions of the pyramid (ASPP)
    out_width: PositiveInt = 256  # channels of each pyramid branch and of the output

    def __post_init__(self) -> None:
        if len(self.stage_blocks) < 2:
            raise ConfigError(
                f"global_encoder: stage_blocks {self.stage_blocks}: expected at least two numbers (the second stage halves the size), "
                f"got {len(self.stage_blocks)}"
            )

    @property
    def output_stride(self) -> int:
        """Image pixels per feature pixel."""
        return 8 if self.stem_pool else 4


class ResidualBlock(nn.Module):
    """ResNet's basic block without normalisation: relu(shortcut(x) + conv(relu(conv(x))))."""

    def __init__(self, in_width: int, width: int, stride: int, dilation: int):
        super().__init__()
        self.conv1 = nn.Conv2d(in_width, width, 3, stride=stride, padding=dilation, dilation=dilation, bias=False)
        self.conv2 = nn.Conv2d(width, width, 3, padding=dilation, dilation=dilation, bias=False)
        self.shortcut = nn.Conv2d(in_width, width, 1, stride=stride, bias=False) if stride > 1 or in_width != width else nn.Identity()

    def forward(self, features: Tensor) -> Tensor:
        return F.relu(self.shortcut(features) + self.conv2(F.relu(self.conv1(features))))


class Pyramid(nn.Module):
    """Atrous spatial pyramid pooling (DeepLabV3, arXiv:1706.05587): 1x1, dilated 3x3 and pooled branches, joined by 1x1, then 3x3."""

    def __init__(self, in_width: int, out_width: int, dilations: tuple[int, ...]):
        super().__init__()
        self.point = nn.Conv2d(in_width, out_width, 1, bias=False)
        self.dilated = nn.ModuleList(nn.Conv2d(in_width, out_width, 3, padding=d, dilation=d, bias=False) for d in dilations)
        self.pooled = nn.Conv2d(in_width, out_width, 1, bias=False)
        self.join = nn.Conv2d((2 + len(dilations)) * out_width, out_width, 1, bias=False)
        self.out = nn.Conv2d(out_width, out_width, 3, padding=1, bias=False)

    def forward(self, features: Tensor) -> Tensor:
        pooled = self.pooled(features.mean(dim=(2, 3), keepdim=True)).expand(-1, -1, *features.shape[2:])
        branches = [self.point(features), *(conv(features) for conv in self.dilated), pooled]
        return F.relu(self.out(F.relu(self.join(F.relu(torch.cat(branches, dim=1))))))


class GlobalEncoder(nn.Module):
    """Image with coordinates [B, 5, H, W] -> features [B, out_width, H/stride, W/stride] >= 0. All convolutions are without bias."""

    def __init__(self, config: GlobalEncoderConfig, in_channels: int = 5):
        super().__init__()
        width = config.base_width
        self.stem = nn.Conv2d(in_channels, width, 7, stride=2, padding=3, bias=False)
        self.pool = nn.MaxPool2d(3, stride=2, padding=1) if config.stem_pool else nn.Identity()
        stages = []
        for index, blocks in enumerate(config.stage_blocks):
            in_width, width = width, config.base_width * 2**index
            stride, dilation = (2 if index == 1 else 1), max(1, 2 ** (index - 1))
            stages.append(
                nn.Sequential(*(ResidualBlock(width if k else in_width, width, 1 if k else stride, dilation) for k in range(blocks)))
            )
        self.stages = nn.ModuleList(stages)
        self.pyramid = Pyramid(width, config.out_width, config.pyramid_dilations)

    def forward(self, image: Tensor) -> Tensor:
        features = self.pool(F.relu(self.stem(image)))
        for stage in self.stages:
            features = stage(features)
        return self.pyramid(features)

    def temper_residuals(self) -> None:
        """Shrink each residual branch so that a freshly drawn network keeps its signal's size through all blocks.

        The published network starts from ImageNet weights. Without them and without normalisation, He-initialised branches would
        double the variance at each block.
        """
        branches = [block.conv2 for stage in self.stages for block in stage]
        for conv in branches:
            with torch.no_grad():
                conv.weight.mul_(1 / math.sqrt(len(branches)))


class DetailEncoder(nn.Module):
    """Image with coordinates [B, 5, H, W] -> fine features [B, width, H/2, W/2]: 7x7 of stride 2, 3x3s; leaky ReLU (0.01) after each."""

    def __init__(self, stem_width: int, width: int, layers: int, in_channels: int = 5):
        super().__init__()
        widths = [stem_width] + [width] * layers
        self.convs = nn.ModuleList([nn.Conv2d(in_channels, stem_width, 7, stride=2, padding=3)])
        self.convs.extend(nn.Conv2d(a, b, 3, padding=1) for a, b in itertools.pairwise(widths))

    def forward(self, image: Tensor) -> Tensor:
        features = image
        for conv in self.convs:
            features = F.leaky_relu(conv(features), 0.01)
        return features
