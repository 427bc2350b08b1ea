"""Portrait4D's animatable tri-plane reconstructor (arXiv:2311.18729, section 3.3): image and two motion vectors -> tri-planes, background.

The planes hold the source's identity with the driver's expression and a straight neck; the renderer bends the neck.
"""

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from head3d.networks.resample import image_layout
from head3d.rendering import HeadImages
from head3d.run.config import NonNegativeInt, PositiveInt
from head3d.run.errors import ConfigError
from reconstructor.architecture import Driver, Input, Render
from reconstructor.background import BackgroundConfig, BackgroundNetwork
from reconstructor.batches import Batch
from reconstructor.blocks import FeatureHead, MotionBlock, PatchEmbed, PlaneDecoder, initialize, with_coordinates
from reconstructor.encoders import DetailEncoder, GlobalEncoder, GlobalEncoderConfig
from reconstructor.motion import MOTION_SIZES, MotionKind, MotionTokens
from reconstructor.stages import StageConfig


@dataclasses.dataclass(frozen=True)
class Portrait4DConfig:
    """Widths and depths of the reconstructor. Defaults are the published run (512 x 512 images, planes of 256 x 256)."""

    image_resolution: PositiveInt = 512  # of the source image, pixels; planes have half of it
    # what says how a face moves: image, 548 numbers that a frozen encoder reads off a picture; flame, the 109 of a label (the paper's
    # ablation F, worse there)
    motion: MotionKind = "image"
    global_encoder: GlobalEncoderConfig = GlobalEncoderConfig()  # reads the whole image at low resolution
    detail_stem_width: PositiveInt = 64  # channels of the detail encoder's first convolution
    detail_width: PositiveInt = 96  # channels of the detail features
    detail_layers: PositiveInt = 4  # 3x3 convolutions of the detail encoder
    token_width: PositiveInt = 1024  # channels of a token in every transformer block
    heads: PositiveInt = 4  # attention heads of the motion blocks
    feed_forward_ratio: PositiveInt = 2  # hidden width of the Mix-FFN over the token width
    motion_hidden: PositiveInt = 512  # hidden width of the two motion projections
    motion_tokens: PositiveInt = 64  # tokens a motion vector becomes
    deexpression_blocks: NonNegativeInt = 4  # blocks that take the source's own expression out; 0: the source's motion is not used
    reenactment_blocks: PositiveInt = 4  # blocks that put the driver's expression in
    feature_hidden: PositiveInt = 128  # channels between tokens and features
    feature_width: PositiveInt = 96  # channels of the reenacted features
    decoder_hidden: PositiveInt = 128  # channels of the plane decoder's convolutions (the first of each group has twice as many)
    decoder_blocks: PositiveInt = 1  # transformer blocks of the plane decoder
    decoder_heads: PositiveInt = 2  # their attention heads
    decoder_reduction: PositiveInt = 2  # their keys are merged this many times per axis
    plane_channels: PositiveInt = 32  # channels of each of the three planes
    plane_upscale: PositiveInt = 1  # their side over half the image's; more (not published) where there are as many rays as pixels
    background: BackgroundConfig = BackgroundConfig()  # completes what is behind the head

    def __post_init__(self) -> None:
        for name, heads in (("heads", self.heads), ("decoder_heads", self.decoder_heads)):
            if self.token_width % (4 * heads):
                raise ConfigError(
                    f"portrait4d: token_width {self.token_width} cannot be split into 4 x {name} ({heads}); "
                    f"choose a multiple of {4 * heads} (4 for the pixel shuffle)"
                )
        need = max(2 * self.global_encoder.output_stride, 4 * self.decoder_reduction, 2 ** (1 + self.background.levels))
        if self.image_resolution % need:
            raise ConfigError(
                f"portrait4d: image_resolution {self.image_resolution} must be a multiple of {need} "
                "(patches of the global encoder, key reduction of the plane decoder, levels of the background U-Net)"
            )

    @property
    def motion_dim(self) -> int:
        """Length of a motion vector."""
        return MOTION_SIZES[self.motion]

    @property
    def background_channels(self) -> int:
        """Of the background's features."""
        return self.background.channels

    @property
    def stages(self) -> tuple[StageConfig, ...]:
        """One, as published: everything trains."""
        return (StageConfig(),)

    @property
    def plane_resolution(self) -> int:
        """Side of a plane, in pixels."""
        return self.image_resolution // 2 * self.plane_upscale


class ImageFeatures(NamedTuple):
    """What both encoders and the background branch read off the source picture."""

    global_features: Tensor  # [B, G, H/stride, W/stride] >= 0
    detail: Tensor  # [B, D, H/2, W/2]
    background: Tensor  # [B, C, H, W] in [0, 1]


class SourceCode(NamedTuple):
    """What is computed once per source."""

    tokens: Tensor  # [B, T, token_width] canonical: the source's own expression is taken out
    detail: Tensor  # [B, D, H/2, W/2]
    background: Tensor  # [B, C, H, W] in [0, 1]


class Portrait4D(nn.Module):
    """source image, source motion, driving motion, switch -> planes.

    image -> encode_image -> ImageFeatures -> deexpress(source motion) -> canonical tokens     once per source
                                              reenact(driving motion)  -> planes               once per frame

    The switch `motion_scale` [B] multiplies the residual of every cross-attention of its sample: 1 reenacts; 0 reconstructs the picture
    as it is, and then neither motion vector has any effect.
    """

    needs: frozenset[Input] = frozenset({"source_motion", "driving_motion"})
    groups: Mapping[str, tuple[str, ...]] = {
        "cross_attention": ("source_motion.*", "driving_motion.*", "*.cross_norm.*", "*.cross_attention.*"),
        "background": ("background.*",),
    }

    def __init__(self, config: Portrait4DConfig, generator: torch.Generator | None = None):
        """`generator` draws the initial weights (None: torch's global generator)."""
        super().__init__()
        self.config = c = config
        self.global_encoder = GlobalEncoder(c.global_encoder)
        self.detail_encoder = DetailEncoder(c.detail_stem_width, c.detail_width, c.detail_layers)
        self.patch_embed = PatchEmbed(c.global_encoder.out_width, c.token_width)
        if c.deexpression_blocks:
            self.source_motion = MotionTokens(c.motion_dim, c.motion_hidden, c.motion_tokens, c.token_width)
        self.driving_motion = MotionTokens(c.motion_dim, c.motion_hidden, c.motion_tokens, c.token_width)
        self.deexpression = nn.ModuleList(MotionBlock(c.token_width, c.heads, c.feed_forward_ratio) for _ in range(c.deexpression_blocks))
        self.reenactment = nn.ModuleList(MotionBlock(c.token_width, c.heads, c.feed_forward_ratio) for _ in range(c.reenactment_blocks))
        side = c.image_resolution // (2 * c.global_encoder.output_stride)
        self.grid = (side, side)  # of the motion blocks' tokens
        doublings = {8: 2, 4: 1}[c.global_encoder.output_stride]  # from there to half the image
        self.feature_head = FeatureHead(c.token_width, c.feature_hidden, c.feature_width, doublings)
        self.plane_decoder = PlaneDecoder(
            feature_width=c.feature_width,
            detail_width=c.detail_width,
            hidden=c.decoder_hidden,
            token_width=c.token_width,
            plane_channels=c.plane_channels,
            blocks=c.decoder_blocks,
            heads=c.decoder_heads,
            ratio=c.feed_forward_ratio,
            reduction=c.decoder_reduction,
            upscale=c.plane_upscale,
        )
        self.background = BackgroundNetwork(c.background)
        initialize(self, c.token_width, generator)
        self.global_encoder.temper_residuals()
        self.background.temper_output()

    def encode_image(self, image: Tensor) -> ImageFeatures:
        """image [B, 3, H, W] in [-1, 1], H = W = config.image_resolution."""
        side = self.config.image_resolution
        assert image.shape[1:] == (3, side, side), f"source image is {tuple(image.shape)}, expected [B, 3, {side}, {side}]"
        placed = image_layout(with_coordinates(image))
        return ImageFeatures(self.global_encoder(placed), self.detail_encoder(placed), self.background(placed))

    def deexpress(self, features: ImageFeatures, source_motion: Tensor, motion_scale: Tensor) -> Tensor:
        """Take the source's expression out (Phi_de): -> canonical tokens [B, T, token_width].

        source_motion [B, motion_dim]; motion_scale [B].
        """
        tokens, grid = self.patch_embed(features.global_features)
        if not self.config.deexpression_blocks:
            return tokens
        motion_tokens = self.source_motion(source_motion)
        for block in self.deexpression:
            tokens = block(tokens, grid, motion_tokens, motion_scale)
        return tokens

    def encode_source(self, image: Tensor, motion: Tensor, motion_scale: Tensor) -> SourceCode:
        """image as in `encode_image`, motion [B, motion_dim], motion_scale [B]."""
        features = self.encode_image(image)
        return SourceCode(self.deexpress(features, motion, motion_scale), features.detail, features.background)

    def encode_driver(self, driver: Driver, source: SourceCode, render: Render) -> Tensor:
        """The driving motion's tokens [B, M, token_width]."""
        return self.driving_motion(driver.motion)

    def reenact_tokens(self, canonical_tokens: Tensor, motion_tokens: Tensor, motion_scale: Tensor) -> Tensor:
        """Put the driver's expression in (Phi_re): canonical tokens -> driven tokens, [B, T, token_width]."""
        tokens = canonical_tokens
        for block in self.reenactment:
            tokens = block(tokens, self.grid, motion_tokens, motion_scale)
        return tokens

    def decode_planes(self, tokens: Tensor, detail: Tensor) -> Tensor:
        """G_T: driven tokens [B, T, token_width] and the source's detail -> planes [B, 3, C, P, P]."""
        return self.plane_decoder(self.feature_head(tokens, self.grid), detail)

    def planes(self, source: SourceCode, driver: Tensor, motion_scale: Tensor) -> Tensor:
        """Planes [B, 3, C, P, P] of the source with the driver's expression."""
        return self.decode_planes(self.reenact_tokens(source.tokens, driver, motion_scale), source.detail)

    def extra_losses(
        self, source: SourceCode, driver: Tensor, planes: Tensor, images: HeadImages, batch: Batch, render: Render
    ) -> dict[str, Tensor]:
        """None: the shared terms are the published ones."""
        return {}
