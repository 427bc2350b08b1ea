"""StyleGAN2's layers and generator in plain torch: equalised layers, mapping, modulated convolution, skip synthesis.

Sources: progressive growing (arXiv:1710.10196, section 4.1, equalised learning rate), StyleGAN2 (arXiv:1912.04958, section 2, weight demodulation,
and section 4.1, skip generator). Initial weights come from torch's own generator, as in every `torch.nn` layer: seed it before building.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

Activation = Literal["linear", "leaky_relu"]
SLOPE = 0.2
LEAKY_RELU_GAIN = math.sqrt(2.0)  # keeps the second moment of a normal input


def activate(x: Tensor, activation: Activation, gain: float = 1.0, clamp: float | None = None) -> Tensor:
    """Apply the activation with its variance-keeping gain times `gain`, then limit to +-clamp * gain."""
    match activation:
        case "linear":
            x = x if gain == 1.0 else x * gain
        case "leaky_relu":
            x = functional.leaky_relu(x, SLOPE) * (LEAKY_RELU_GAIN * gain)
        case _:
            raise ValueError(f"activation: expected 'linear' or 'leaky_relu', got {activation!r}")
    return x if clamp is None else x.clamp(-clamp * gain, clamp * gain)


class FullyConnected(nn.Module):
    """Linear layer with equalised learning rate: weights are stored with unit variance and scaled by 1/sqrt(fan-in) in use.

    forward: [..., in_features] -> [..., out_features]. `lr_multiplier` m stores the weight as N(0, 1/m^2) and multiplies weight and bias by m in use,
    so Adam's steps are m times as large; the stored bias starts at `bias_init`.
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
        self.weight_gain = lr_multiplier / math.sqrt(in_features)
        self.bias_gain = lr_multiplier

    def forward(self, x: Tensor) -> Tensor:
        bias = self.bias if self.bias_gain == 1.0 else self.bias * self.bias_gain
        x = functional.linear(x, (self.weight * self.weight_gain).to(x.dtype), bias.to(x.dtype))
        return activate(x, self.activation)
