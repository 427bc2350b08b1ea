"""Layers that every reconstructor architecture shares: patches to tokens, attention blocks, tokens back to feature maps and planes.

The trunk is that of LP3D (Trevithick et al., SIGGRAPH 2023) with SegFormer blocks (Xie et al., arXiv:2105.15203); Portrait4D
(arXiv:2311.18729) adds the cross-attention to motion tokens. Shapes: B batch, T tokens, C channels, H W the token grid.
"""

import itertools
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reconstructor.motion import MotionTokens
from reconstructor.products import Linear, attention

PUBLISHED_WIDTH = 1024  # token width at which the published initialisation (0.02) was chosen


def with_coordinates(image: Tensor) -> Tensor:
    """Append x (to the right) and y (downwards), from -1 at the first pixel to 1 at the last: [B, C, H, W] -> [B, C + 2, H, W]."""
    batch, _, height, width = image.shape
    x = torch.linspace(-1, 1, width, device=image.device, dtype=image.dtype).view(1, 1, 1, width)
    y = torch.linspace(-1, 1, height, device=image.device, dtype=image.dtype).view(1, 1, height, 1)
    return torch.cat((image, x.expand(batch, 1, height, width), y.expand(batch, 1, height, width)), dim=1)


def to_map(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """Lay tokens [B, H*W, C] out row by row as a map [B, C, H, W]; no copy, so the map is channels-last and what follows stays so."""
    return tokens.unflatten(1, grid).permute(0, 3, 1, 2)  # transposing first would leave strides that convolutions copy


def to_tokens(features: Tensor) -> Tensor:
    """Inverse of to_map: [B, C, H, W] -> [B, H*W, C]; no copy of a channels-last map."""
    return features.permute(0, 2, 3, 1).flatten(1, 2)


class PatchEmbed(nn.Module):
    """Overlapping patches: 3x3 convolution of stride 2, then LayerNorm. [B, in, H, W] -> tokens [B, (H/2)(W/2), width]."""

    def __init__(self, in_channels: int, width: int):
        super().__init__()
        self.projection = nn.Conv2d(in_channels, width, 3, stride=2, padding=1)
        self.norm = nn.LayerNorm(width)

    def forward(self, features: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Returns the tokens and their grid (height, width)."""
        patches = self.projection(features)
        return self.norm(to_tokens(patches)), (patches.shape[2], patches.shape[3])


class Attention(nn.Module):
    """Multi-head attention with biases (products.py says through which kernel).

    Keys and values come from `context`, which is the sequence itself (self-attention) or another one (cross-attention). With
    `reduction` r > 1 the context is first merged r x r to r*r times fewer keys (SegFormer eq. 2), which makes 128x128 tokens affordable.
    """

    def __init__(self, width: int, heads: int, reduction: int = 1):
        super().__init__()
        self.heads = heads
        self.query = Linear(width, width)
        self.key_value = Linear(width, 2 * width)
        self.output = Linear(width, width)
        self.merge = nn.Conv2d(width, width, reduction, stride=reduction) if reduction > 1 else None
        self.merge_norm = nn.LayerNorm(width) if reduction > 1 else None

    def forward(
        self,
        tokens: Tensor,  # [B, T, C]
        context: Tensor,  # [B, S, C] what is attended to
        grid: tuple[int, int] | None = None,  # of the context; needed when reduction > 1
    ) -> Tensor:
        if self.merge is not None:
            context = self.merge_norm(to_tokens(self.merge(to_map(context, grid))))
        queries = self._split(self.query(tokens))
        keys, values = map(self._split, self.key_value(context).chunk(2, dim=-1))
        mixed = attention(queries, keys, values)
        return self.output(mixed.transpose(1, 2).flatten(2))

    def _split(self, tokens: Tensor) -> Tensor:
        return tokens.unflatten(2, (self.heads, -1)).transpose(1, 2)


class MixFeedForward(nn.Module):
    """SegFormer's Mix-FFN: linear, 3x3 depthwise convolution over the grid (it tells tokens where they are), GELU, linear."""

    def __init__(self, width: int, ratio: int):
        super().__init__()
        hidden = ratio * width
        self.expand = Linear(width, hidden)
        self.depthwise = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.contract = Linear(hidden, width)

    def forward(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        hidden = to_tokens(self.depthwise(to_map(self.expand(tokens), grid)))
        return self.contract(F.gelu(hidden))


class TransformerBlock(nn.Module):
    """Pre-norm block: self-attention, then Mix-FFN. [B, T, C] -> [B, T, C]."""

    def __init__(self, width: int, heads: int, ratio: int, reduction: int = 1):
        super().__init__()
        self.self_norm = nn.LayerNorm(width)
        self.self_attention = Attention(width, heads, reduction)
        self.feed_forward_norm = nn.LayerNorm(width)
        self.feed_forward = MixFeedForward(width, ratio)

    def forward(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        normed = self.self_norm(tokens)
        tokens = tokens + self.self_attention(normed, normed, grid)
        return tokens + self.feed_forward(self.feed_forward_norm(tokens), grid)


class MotionBlock(TransformerBlock):
    """A TransformerBlock that first looks at motion tokens: x += s * CrossAttention(LN x, motion); then self-attention and Mix-FFN.

    s is Portrait4D's disentangling switch, one number per sample: at 0 the sample is reconstructed without any motion. The output
    projection of the cross-attention starts at zero, so that an untrained block is the static block. (The published code means this
    too, but re-initialises the projection afterwards.) While it is zero no gradient reaches the queries, keys, values and motion
    tokens; they begin to learn one step later.
    """

    def __init__(self, width: int, heads: int, ratio: int):
        super().__init__(width, heads, ratio)
        self.cross_norm = nn.LayerNorm(width)
        self.cross_attention = Attention(width, heads)

    def forward(
        self,
        tokens: Tensor,  # [B, T, C]
        grid: tuple[int, int],
        motion_tokens: Tensor,  # [B, M, C], used as they are, without a norm
        motion_scale: Tensor,  # [B] the switch
    ) -> Tensor:
        tokens = tokens + motion_scale.view(-1, 1, 1) * self.cross_attention(self.cross_norm(tokens), motion_tokens)
        return super().forward(tokens, grid)


class FeatureHead(nn.Module):
    """Tokens -> a smooth feature map: pixel shuffle x2, `doublings` times (bilinear x2, 3x3 convolution, ReLU), a 3x3 convolution.

    [B, H*W, C] -> [B, out, 2^(1 + doublings) H, ...].
    """

    def __init__(self, token_width: int, hidden: int, out_channels: int, doublings: int):
        super().__init__()
        widths = [token_width // 4] + [hidden] * doublings
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in itertools.pairwise(widths))
        self.out = nn.Conv2d(widths[-1], out_channels, 3, padding=1)

    def forward(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        features = F.pixel_shuffle(to_map(tokens, grid), 2)
        for conv in self.convs:
            features = F.interpolate(features, scale_factor=2, mode="bilinear", align_corners=True)
            features = F.relu(conv(features))
        return self.out(features)


class PlaneDecoder(nn.Module):
    """Merge low-frequency features with image detail into tri-planes (G_T): convolutions, attention at half resolution, convolutions.

    features [B, F, P, P], detail [B, D, P, P] -> planes [B, 3, C, U P, U P]; the last convolution has U * U sub-pixels (published: 1).
    """

    def __init__(
        self,
        feature_width: int,
        detail_width: int,
        hidden: int,
        token_width: int,
        plane_channels: int,
        blocks: int,
        heads: int,
        ratio: int,
        reduction: int,
        upscale: int = 1,
    ):
        super().__init__()
        self.upscale = upscale
        wide, shuffled = 2 * hidden, token_width // 4
        self.merge = _convolutions(feature_width + detail_width, wide, hidden)
        self.patch_embed = PatchEmbed(hidden, token_width)
        self.blocks = nn.ModuleList(TransformerBlock(token_width, heads, ratio, reduction) for _ in range(blocks))
        self.refine = _convolutions(shuffled + feature_width, wide, hidden, hidden)
        self.out = nn.Conv2d(hidden, 3 * plane_channels * upscale**2, 3, padding=1)

    def forward(self, features: Tensor, detail: Tensor) -> Tensor:
        tokens, grid = self.patch_embed(self.merge(torch.cat((features, detail), dim=1)))
        for block in self.blocks:
            tokens = block(tokens, grid)
        shuffled = F.pixel_shuffle(to_map(tokens, grid), 2)
        planes = self.out(self.refine(torch.cat((shuffled, features), dim=1)))
        return F.pixel_shuffle(planes, self.upscale).unflatten(1, (3, -1))


def _convolutions(*widths: int) -> nn.Sequential:
    """3x3 convolutions from each width to the next, each followed by a leaky ReLU (slope 0.01)."""
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(widths):
        layers += [nn.Conv2d(before, after, 3, padding=1), nn.LeakyReLU(0.01)]
    return nn.Sequential(*layers)


def initialize(root: nn.Module, token_width: int, generator: torch.Generator | None = None) -> None:
    """Draw the weights of `root` and everything below it.

    Linear: truncated normal, std 0.02 at the published width of 1024, scaled with 1/sqrt(width) so that narrow networks pass signals
    equally well. Convolution: He normal, fan-out. Biases zero. Cross-attention output projections zero (MotionBlock). The last
    convolution of a PlaneDecoder starts small: std 0.015 at 128 channels in, scaled likewise.

    Motion tokens start as large as the tokens that look at them (He normal, fan-in). By the rule for linear layers, which the published
    code follows here too, they would be 0.02 to 0.05: too small to be told from the biases, which then learn in their place.
    """
    linear_std = 0.02 * math.sqrt(PUBLISHED_WIDTH / token_width)
    for module in root.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=linear_std, a=-2, b=2, generator=generator)
        elif isinstance(module, nn.Conv2d):
            fan_out = module.out_channels * math.prod(module.kernel_size) // module.groups
            nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out), generator=generator)
        if isinstance(module, (nn.Linear, nn.Conv2d)) and module.bias is not None:
            nn.init.zeros_(module.bias)
    for module in root.modules():
        if isinstance(module, MotionBlock):
            nn.init.zeros_(module.cross_attention.output.weight)
        elif isinstance(module, MotionTokens):
            for linear in (module.first, module.second):
                nn.init.kaiming_normal_(linear.weight, a=MotionTokens.SLOPE, generator=generator)
            nn.init.kaiming_normal_(module.tokens.weight, nonlinearity="linear", generator=generator)
        elif isinstance(module, PlaneDecoder):
            nn.init.normal_(module.out.weight, std=0.015 * math.sqrt(128 / module.out.in_channels), generator=generator)
