"""Super-resolution of rendered features: StyleGAN2 blocks on top of the neural rendering (EG3D, arXiv:2112.07945, section 4.2)."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Literal

import torch
from torch import Tensor, nn

from head3d.networks.resample import resize_antialias
from head3d.networks.stylegan2 import Precision, SynthesisBlock
from head3d.run.config import NonNegativeInt, PositiveFloat, PositiveInt


@dataclasses.dataclass(frozen=True)
class SuperResolutionConfig:
    """Defaults are the published run: 128 -> 512 pixels."""

    input_resolution: PositiveInt = 128  # px; raw image and features are resized to this before the first block
    feature_channels: PositiveInt = 32  # channels of the rendered features
    channels: tuple[PositiveInt, ...] = (
        256,
        128,
    )  # feature channels of each block, which doubles the size; (): raw is final
    w_dim: PositiveInt = 512  # width of the style vector
    style: Literal["ones", "given"] = "ones"  # ones: w = 1, as the published generator was trained; given: the last ws passed in
    half_precision_blocks: NonNegativeInt = 2  # the last ... blocks in float16, on CUDA only
    conv_clamp: PositiveFloat | None = 256.0  # limit of every layer's output; keeps float16 finite, and acts in float32 too

    @property
    def output_resolution(self) -> int:
        """Side of the final image in px."""
        return self.input_resolution * 2 ** len(self.channels)


class SuperResolution(nn.Module):
    """Raw image and features as rendered -> final image. No noise; a style of ones folds into plain convolutions."""

    def __init__(self, config: SuperResolutionConfig) -> None:
        super().__init__()
        self.config = config
        widths = (config.feature_channels, *config.channels)
        n = len(config.channels)
        self.blocks = nn.ModuleList(
            SynthesisBlock(
                widths[i],
                widths[i + 1],
                config.w_dim,
                config.input_resolution * 2 ** (i + 1),
                channels_out=3,
                noise=False,
                half_precision=i >= n - config.half_precision_blocks,
                clamp=config.conv_clamp,
            )
            for i in range(n)
        )

    def forward(
        self,
        raw: Tensor,  # [B, 3, R, R] in [-1, 1]
        features: Tensor,  # [B, C, R, R] in [-1, 1]
        ws: Tensor | None = None,  # [B or 1, w_dim] or [B or 1, n, w_dim]; used with style 'given' only
        precision: Precision = "float32",
    ) -> Tensor:
        """Return the image [B, 3, output_resolution, output_resolution], in about [-1, 1], not limited."""
        match self.config.style:
            case "ones":
                w = torch.ones(1, self.config.w_dim, device=raw.device)
            case "given":
                assert ws is not None, "style 'given' needs ws"
                w = ws if ws.ndim == 2 else ws[:, -1]
            case _:
                raise ValueError(f"style: expected 'ones' or 'given', got {self.config.style!r}")
        if raw.device.type == "cpu" and not torch.is_grad_enabled():  # one picture at a time takes as long and a fraction of the memory
            rows = zip(raw.split(1), features.split(1), w.split(1) if len(w) > 1 else itertools.repeat(w), strict=False)
            return torch.cat([self._paint(*row, precision) for row in rows])
        return self._paint(raw, features, w, precision)

    def _paint(self, raw: Tensor, features: Tensor, w: Tensor, precision: Precision) -> Tensor:
        """The image of raw image, features and styles w [B or 1, w_dim]."""
        styles = w[:, None].expand(-1, 3, -1)
        image = resize_antialias(raw.float(), self.config.input_resolution)
        x = resize_antialias(features.float(), self.config.input_resolution)
        for block in self.blocks:
            x, image = block(x, image, styles, noise="none", precision=precision)
        return image.contiguous()
