"""The background branch: a U-Net that completes what stands behind the head, from the source image alone."""

import dataclasses
import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from head3d.run.config import PositiveInt


@dataclasses.dataclass(frozen=True)
class BackgroundConfig:
    """The background U-Net. Defaults are the published run."""

    base_width: PositiveInt = 64  # channels at half the image's size; each level below doubles them
    levels: PositiveInt = 3  # halvings below that
    channels: PositiveInt = 32  # of the output: as many as the renderer's features


class BackgroundNetwork(nn.Module):
    """Image with coordinates [B, 5, H, W] -> background features [B, channels, H, W] in [0, 1], where features are composited.

    Convolutions are 3x3 with leaky ReLU (0.01), except those that only resize (stride 2 down; nearest x2 and a convolution up).
    """

    def __init__(self, config: BackgroundConfig, in_channels: int = 5):
        super().__init__()
        widths = [config.base_width * 2**level for level in range(config.levels + 1)]
        self.stem = nn.Conv2d(in_channels, widths[0], 3, stride=2, padding=1)
        self.down = nn.ModuleList(nn.Conv2d(w, w, 3, padding=1) for w in widths[:-1])
        self.shrink = nn.ModuleList(nn.Conv2d(a, b, 3, stride=2, padding=1) for a, b in itertools.pairwise(widths))
        self.middle = nn.Conv2d(widths[-1], widths[-1], 3, padding=1)
        ups = [(2 * widths[level], widths[max(level - 1, 0)]) for level in reversed(range(len(widths)))]
        self.up = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in ups)
        self.grow = nn.ModuleList(nn.Conv2d(b, b, 3, padding=1) for _, b in ups)
        self.out = nn.Conv2d(widths[0], config.channels, 3, padding=1)

    def forward(self, image: Tensor) -> Tensor:
        return torch.sigmoid(self.logits(image))

    def logits(self, image: Tensor) -> Tensor:
        """The features before the sigmoid."""
        features = F.leaky_relu(self.stem(image), 0.01)
        skips = [features]
        for conv, shrink in zip(self.down, self.shrink, strict=False):
            features = shrink(F.leaky_relu(conv(features), 0.01))
            skips.append(features)
        features = F.leaky_relu(self.middle(features), 0.01)
        for conv, grow in zip(self.up, self.grow, strict=False):
            features = F.leaky_relu(conv(torch.cat((features, skips.pop()), dim=1)), 0.01)
            features = grow(F.interpolate(features, scale_factor=2, mode="nearest"))
        return self.out(features)

    def temper_output(self) -> None:
        """Shrink the last convolution: a freshly drawn network then starts near grey, where the sigmoid has a slope, not saturated."""
        with torch.no_grad():
            self.out.weight.mul_(0.1)
