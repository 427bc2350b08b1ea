"""The background of a generated portrait: an unconditional StyleGAN2 that paints a feature image behind the head."""

from __future__ import annotations

import dataclasses

from torch import Tensor, nn

from head3d.networks.stylegan2 import Mapping, Precision, Synthesis
from head3d.run.config import NonNegativeInt, PositiveFloat, PositiveInt


@dataclasses.dataclass(frozen=True)
class BackgroundConfig:
    """Defaults are the published run."""

    resolution: PositiveInt = 64  # px, a power of two; the renderer resizes the result to its own resolution
    channels: PositiveInt = 32  # feature channels, as many as the renderer's
    z_dim: PositiveInt = 512  # width of the latent, the same one that drives the head
    w_dim: PositiveInt = 512  # width of the intermediate latent
    mapping_layers: PositiveInt = 8  # depth of the mapping network
    channel_base: PositiveInt = 16384  # feature channels at size s are channel_base / s, at most channel_max
    channel_max: PositiveInt = 512  # most feature channels of any layer
    half_precision_blocks: NonNegativeInt = 4  # the last ... blocks in float16, on CUDA only
    conv_clamp: PositiveFloat | None = 256.0  # limit of every layer's output; keeps float16 finite, and acts in float32 too


class BackgroundGenerator(nn.Module):
    """z -> background features. Never truncated; knows neither camera nor shape."""

    def __init__(self, config: BackgroundConfig) -> None:
        super().__init__()
        self.config = config
        self.synthesis = Synthesis(
            config.w_dim,
            config.resolution,
            config.channels,
            channel_base=config.channel_base,
            channel_max=config.channel_max,
            half_precision_blocks=config.half_precision_blocks,
            conv_clamp=config.conv_clamp,
        )
        self.mapping = Mapping(config.z_dim, 0, config.w_dim, self.synthesis.num_ws, config.mapping_layers)

    def forward(self, z: Tensor, precision: Precision = "float32") -> Tensor:
        """z [B, z_dim] -> features [B, channels, resolution, resolution] in [0, 1]; the first three are the colours."""
        return self.synthesis(self.mapping(z), precision=precision).sigmoid()
