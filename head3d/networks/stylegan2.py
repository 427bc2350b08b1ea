"""StyleGAN2's layers and generator in plain torch: equalised layers, mapping, modulated convolution, skip synthesis.

Sources: progressive growing (arXiv:1710.10196, section 4.1, equalised learning rate), StyleGAN2 (arXiv:1912.04958, section 2,
weight demodulation, and section 4.1, skip generator). Initial weights and noise images come from torch's own generator, as in
every `torch.nn` layer: seed it before building.

Two identities make it fast without a compiled operator. Leaky ReLU is positively homogeneous, g * lrelu(x) = lrelu(g * x) for
g > 0, so its gain moves into the demodulation factors, the noise strength and the bias. Demodulation needs only sum_k W[o,i,k]^2:
sum_{i,k} (s_i W[o,i,k])^2 = (W^2 summed over k) s^2.
"""

from __future__ import annotations

import itertools
import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from head3d.networks.resample import image_layout, upsample2, upsample2_conv
from head3d.run.errors import ConfigError
from head3d.run.seeding import Draws, normal

Activation = Literal["linear", "leaky_relu"]
Noise = Literal["constant", "random", "none"]
Precision = Literal["float32", "bfloat16"]  # float32: every block as it is configured; bfloat16: the features of all, on any device
SLOPE = 0.2
LEAKY_RELU_GAIN = math.sqrt(2.0)  # keeps the second moment of a normal input


def activation_gain(activation: Activation) -> float:
    """The factor that keeps the variance of a normal input."""
    match activation:
        case "linear":
            return 1.0
        case "leaky_relu":
            return LEAKY_RELU_GAIN
        case _:
            raise ValueError(f"activation: expected 'linear' or 'leaky_relu', got {activation!r}")


def activate(x: Tensor, activation: Activation, clamp: float | None = None) -> Tensor:
    """Bend x, which already carries the activation's gain and is overwritten, then limit it to +-clamp."""
    if activation == "leaky_relu":
        x = functional.leaky_relu_(x, SLOPE)
    if clamp is None:
        return x
    return x.clamp(-clamp, clamp) if x.requires_grad else x.clamp_(-clamp, clamp)


class FullyConnected(nn.Module):
    """Linear layer with equalised learning rate: weights are stored with unit variance and scaled by 1/sqrt(fan-in) in use.

    forward: [..., in_features] -> [..., out_features]. `lr_multiplier` m stores the weight as N(0, 1/m^2) and multiplies weight
    and bias by m in use, so Adam's steps are m times as large; the stored bias starts at `bias_init`. 'leaky_relu' has slope 0.2
    and gain sqrt(2).
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        activation: Activation = "linear",
        lr_multiplier: float = 1.0,
        bias_init: float = 0.0,
    ) -> None:
        super().__init__()
        self.activation: Activation = activation
        self.weight = nn.Parameter(torch.randn(out_features, in_features) / lr_multiplier)
        self.bias = nn.Parameter(torch.full((out_features,), float(bias_init)))
        gain = activation_gain(activation)
        self.weight_gain = gain * lr_multiplier / math.sqrt(in_features)
        self.bias_gain = gain * lr_multiplier

    def forward(self, x: Tensor) -> Tensor:
        bias = self.bias if self.bias_gain == 1.0 else self.bias * self.bias_gain
        return activate(functional.linear(x, (self.weight * self.weight_gain).to(x.dtype), bias.to(x.dtype)), self.activation)


def normalize_second_moment(x: Tensor) -> Tensor:
    """Scale each row of x [..., D] to a mean square of one ("pixel norm", arXiv:1710.10196, section 4.2)."""
    return x * (x.square().mean(dim=-1, keepdim=True) + 1e-8).rsqrt()


class Mapping(nn.Module):
    """The mapping network: latent z and condition c -> one w per sample, repeated for every layer of the synthesis network.

    z and the embedded c are normalised, concatenated and passed through `layers` leaky-ReLU layers with a small learning rate.
    z_dim 0 or c_dim 0 leave that input out. `w_average` is the running mean of w that truncation pulls towards.
    """

    def __init__(
        self,
        z_dim: int,
        c_dim: int,
        w_dim: int,
        n_ws: int,
        layers: int,
        lr_multiplier: float = 0.01,
        average_decay: float = 0.998,
    ) -> None:
        super().__init__()
        if z_dim + c_dim == 0:
            raise ConfigError("mapping network: z_dim and c_dim are both 0; expected at least one input")
        self.z_dim, self.c_dim, self.n_ws, self.average_decay = z_dim, c_dim, n_ws, average_decay
        self.embed = FullyConnected(c_dim, w_dim) if c_dim else None
        widths = [z_dim + (w_dim if c_dim else 0)] + [w_dim] * layers
        self.layers = nn.ModuleList(FullyConnected(a, b, "leaky_relu", lr_multiplier=lr_multiplier) for a, b in itertools.pairwise(widths))
        self.register_buffer("w_average", torch.zeros(w_dim))

    def forward(
        self,
        z: Tensor | None,  # [B, z_dim] standard normal; None where z_dim is 0
        c: Tensor | None = None,  # [B, c_dim]; None where c_dim is 0
        truncation_psi: float = 1.0,  # w <- w_average + psi * (w - w_average)
    ) -> Tensor:
        """Return ws [B, n_ws, w_dim]."""
        inputs = []
        if self.z_dim:
            assert z is not None
            assert z.shape[1:] == (self.z_dim,)
            inputs.append(normalize_second_moment(z.float()))
        if self.embed is not None:
            assert c is not None
            assert c.shape[1:] == (self.c_dim,)
            inputs.append(normalize_second_moment(self.embed(c.float())))
        x = inputs[0] if len(inputs) == 1 else torch.cat(inputs, dim=1)
        for layer in self.layers:
            x = layer(x)
        ws = x[:, None].expand(-1, self.n_ws, -1)
        if truncation_psi == 1.0:
            return ws
        return self.w_average.lerp(ws, truncation_psi)

    @torch.no_grad()
    def move_average(self, mean: Tensor) -> None:
        """Move w_average towards the mean w [w_dim] of a whole batch, by 1 - average_decay; once for each step of the generator."""
        self.w_average.lerp_(mean.to(self.w_average.dtype), 1.0 - self.average_decay)


def modulated_conv(
    x: Tensor,  # [B, Cin, H, W]; or [1, Cin, H, W], shared by all styles
    weight: Tensor,  # [Cout, Cin, k, k]
    styles: Tensor,  # [B, Cin] factors of the input channels; [1, Cin] = one style for all samples
    *,
    demodulate: bool = True,  # scale each output channel so that unit-variance input gives unit-variance output
    upsample: bool = False,  # k = 3 only: doubles the size
    gain: float = 1.0,  # multiplies the result; not `bias` and `noise`
    bias: Tensor | None = None,  # [Cout], added last
    noise: Tensor | None = None,  # [B or 1, 1, H', W'], added last
) -> Tensor:
    """Modulated convolution (StyleGAN2, arXiv:1912.04958, eqs. 1 and 3): W'[o,i,k] = s_i W[o,i,k] / |s W[o]|, applied per sample.

    Returns [B, Cout, H', W'] in x's dtype. The styles scale the activations and not the weights ("unfused"), so one ordinary
    convolution serves the batch; a single style is folded into the weights instead, which is the same up to rounding and leaves a
    plain convolution.
    """
    styles = styles.to(weight.dtype)
    half = x.dtype == torch.float16
    if half and demodulate:  # demodulation forgets the scale of weights and styles; bring both near one, where float16 cannot overflow
        weight = weight * weight.square().mean(dim=(1, 2, 3), keepdim=True).add(1e-8).rsqrt()
        styles = styles / styles.abs().amax(dim=1, keepdim=True).clamp_min(1e-8)
    factors = None  # [B, Cout]
    if demodulate:
        factors = (styles.square() @ weight.square().sum(dim=(2, 3)).T + 1e-8).rsqrt() * gain
    shared = len(styles) == 1
    if shared:
        kernel = weight * styles[0, :, None, None] * (gain if factors is None else factors[0, :, None, None, None])
    else:
        x = x * styles.to(x.dtype)[:, :, None, None]
        kernel = weight if factors is not None or gain == 1.0 else weight * gain
    kernel = kernel.to(x.dtype)
    bias = None if bias is None else bias.to(x.dtype)
    inner_bias = bias if shared or factors is None else None
    if upsample:
        y = upsample2_conv(x, kernel, inner_bias)
    else:
        y = functional.conv2d(x, kernel, inner_bias, padding=kernel.shape[-1] // 2)
    if shared or factors is None:
        return y if noise is None else y + noise.to(y.dtype)
    factors = factors.to(y.dtype)[:, :, None, None]
    offset = None if bias is None else bias[:, None, None]
    if noise is not None:
        offset = noise.to(y.dtype) if offset is None else noise.to(y.dtype) + offset
    return y * factors if offset is None else torch.addcmul(offset, y, factors)


class SynthesisLayer(nn.Module):
    """Modulated 3x3 convolution, noise, bias, leaky ReLU: [B, Cin, H, W], w [B, w_dim] -> [B, Cout, resolution, resolution]."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        w_dim: int,
        resolution: int,  # of the output
        upsample: bool = False,
        noise: bool = True,  # False: the layer has neither noise image nor strength
        clamp: float | None = None,
    ) -> None:
        super().__init__()
        self.resolution, self.upsample, self.clamp = resolution, upsample, clamp
        self.affine = FullyConnected(w_dim, in_channels, bias_init=1.0)
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, 3, 3))
        self.bias = nn.Parameter(torch.zeros(out_channels))
        self.noise_strength = nn.Parameter(torch.zeros(())) if noise else None
        if noise:
            self.register_buffer("noise", torch.randn(resolution, resolution))

    def forward(self, x: Tensor, w: Tensor, noise: Noise = "constant", generator: Draws | None = None) -> Tensor:
        styles = self.affine(w)
        y = modulated_conv(
            x,
            self.weight,
            styles,
            upsample=self.upsample,
            gain=LEAKY_RELU_GAIN,
            bias=self.bias * LEAKY_RELU_GAIN,
            noise=self._noise(max(len(x), len(styles)), noise, generator),
        )
        return activate(y, "leaky_relu", self.clamp)

    def _noise(self, batch: int, noise: Noise, generator: Draws | None) -> Tensor | None:
        if self.noise_strength is None:
            return None
        match noise:
            case "none":
                return None
            case "constant":
                image = self.noise[None, None]
            case "random":
                assert generator is not None, "random noise needs a generator"
                image = normal((batch, 1, self.resolution, self.resolution), generator, self.noise)
            case _:
                raise ValueError(f"noise: expected 'constant', 'random' or 'none', got {noise!r}")
        return image * (self.noise_strength * LEAKY_RELU_GAIN)


class ToImage(nn.Module):
    """Modulated 1x1 convolution without demodulation, to the image's channels: [B, Cin, H, W], w [B, w_dim] -> [B, channels_out, H, W]."""

    def __init__(self, in_channels: int, channels_out: int, w_dim: int, clamp: float | None = None) -> None:
        super().__init__()
        self.clamp = clamp
        self.affine = FullyConnected(w_dim, in_channels, bias_init=1.0)
        self.weight = nn.Parameter(torch.randn(channels_out, in_channels, 1, 1))
        self.bias = nn.Parameter(torch.zeros(channels_out))
        self.weight_gain = 1.0 / math.sqrt(in_channels)

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        styles = self.affine(w) * self.weight_gain
        return activate(modulated_conv(x, self.weight, styles, demodulate=False, bias=self.bias), "linear", self.clamp)


def feature_type(half_precision: bool, device: torch.device) -> torch.dtype:
    """Number format of a block's features: float16 where the block asks for it and the device is CUDA, else float32."""
    return torch.float16 if half_precision and device.type == "cuda" else torch.float32


class SynthesisBlock(nn.Module):
    """One resolution of the skip generator: (upsampling) convolution, convolution, and an addition to the upsampled image.

    `in_channels` 0 makes the first block: a learned constant replaces the input and the upsampling convolution. half_precision
    computes the features in float16, on CUDA only; precision "bfloat16" goes before it; the image is always float32.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        w_dim: int,
        resolution: int,
        channels_out: int,
        noise: bool = True,
        half_precision: bool = False,
        clamp: float | None = None,
    ) -> None:
        super().__init__()
        self.half_precision = half_precision
        self.const = None if in_channels else nn.Parameter(torch.randn(out_channels, resolution, resolution))
        self.conv0 = SynthesisLayer(in_channels, out_channels, w_dim, resolution, True, noise, clamp) if in_channels else None
        self.conv1 = SynthesisLayer(out_channels, out_channels, w_dim, resolution, False, noise, clamp)
        self.to_image = ToImage(out_channels, channels_out, w_dim, clamp)
        self.n_convs = 2 if in_channels else 1

    def forward(
        self,
        x: Tensor | None,  # [B, in_channels, H/2, W/2]; None in the first block
        image: Tensor | None,  # [B, channels_out, H/2, W/2] float32; None in the first block
        ws: Tensor,  # [B or 1, n_convs + 1, w_dim]: the convolutions' and, last, to_image's
        noise: Noise = "constant",
        generator: Draws | None = None,
        precision: Precision = "float32",
    ) -> tuple[Tensor, Tensor]:
        """Return features [B, out_channels, H, W] and image [B, channels_out, H, W]."""
        w = iter(ws.unbind(dim=1))
        if self.const is not None:
            x = self.const[None]
        assert x is not None
        x = image_layout(x.to(torch.bfloat16 if precision == "bfloat16" else feature_type(self.half_precision, x.device)))
        if self.conv0 is not None:
            x = self.conv0(x, next(w), noise, generator)
        x = self.conv1(x, next(w), noise, generator)
        added = self.to_image(x, next(w)).float()
        return x, added if image is None else upsample2(image_layout(image)).add_(added)


def block_resolutions(resolution: int, where: str) -> list[int]:
    """Return 4, 8, ..., resolution. Raises ConfigError unless resolution is a power of two of at least 4."""
    if resolution < 4 or resolution & (resolution - 1):
        raise ConfigError(f"{where}: resolution must be a power of two of at least 4, got {resolution}; use 4, 8, 16, ...")
    return [2**i for i in range(2, resolution.bit_length())]


def block_channels(resolution: int, channel_base: int, channel_max: int) -> int:
    """Feature channels of the block at `resolution`: channel_base / resolution, at most channel_max."""
    return max(1, min(channel_base // resolution, channel_max))


class Synthesis(nn.Module):
    """StyleGAN2's synthesis network, skip architecture: ws -> an image of any channels (tri-planes, features, colours).

    Layer i of the network takes ws[:, i]; to_image of a block shares its w with the next block's first convolution. There are
    `num_ws` = 2 log2(resolution) - 2 of them.
    """

    def __init__(
        self,
        w_dim: int,
        resolution: int,
        channels_out: int,
        channel_base: int = 32768,
        channel_max: int = 512,
        half_precision_blocks: int = 0,  # the last ... blocks in float16 on CUDA; the 4x4 block never is
        conv_clamp: float | None = None,  # limit of every layer's output; keeps float16 finite, and acts in float32 too
    ) -> None:
        super().__init__()
        resolutions = block_resolutions(resolution, "synthesis network")
        self.w_dim, self.resolution, self.channels_out = w_dim, resolution, channels_out
        self.num_ws = 2 * len(resolutions)
        blocks: dict[str, SynthesisBlock] = {}
        in_channels = 0
        for index, size in enumerate(resolutions):
            channels = block_channels(size, channel_base, channel_max)
            half = size > 4 and index >= len(resolutions) - half_precision_blocks
            blocks[str(size)] = SynthesisBlock(in_channels, channels, w_dim, size, channels_out, half_precision=half, clamp=conv_clamp)
            in_channels = channels
        self.blocks = nn.ModuleDict(blocks)

    def forward(
        self,
        ws: Tensor,  # [B, num_ws, w_dim]
        noise: Noise = "constant",
        generator: Draws | None = None,  # for noise 'random'
        precision: Precision = "float32",
    ) -> Tensor:
        """Return the image [B, channels_out, resolution, resolution], float32, unbounded.

        It is channels-last in memory on a CPU: `reshape` it, `view` may fail.
        """
        assert ws.shape[1:] == (self.num_ws, self.w_dim), f"ws: expected [B, {self.num_ws}, {self.w_dim}], got {tuple(ws.shape)}"
        x = image = None
        first = 0
        for block in self.blocks.values():
            x, image = block(x, image, ws[:, first : first + block.n_convs + 1].float(), noise, generator, precision)
            first += block.n_convs
        assert image is not None
        return image
