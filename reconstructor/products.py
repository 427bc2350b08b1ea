"""Matrix products of the transformer blocks. On a CPU, in float32 and without gradients, they run in oneDNN instead of the BLAS that torch
was built with.

Torch gives convolutions to oneDNN but float32 matrix products to BLAS (MKL in its wheels), which on AMD processors does not use the widest
instructions: 16,384 tokens from 1024 to 2048 channels took 0.37 s there and 0.17 s in oneDNN on two cores, and the attention of 8,192
queries to 4,096 keys 0.83 s fused and 0.39 s as below. Results differ by rounding (1e-6).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

QUERIES_PER_CHUNK = 1024  # attention: the scores of a chunk stay in the cache


class Linear(nn.Linear):
    """`nn.Linear` with the faster product where there is one."""

    def forward(self, features: Tensor) -> Tensor:
        """features [..., in] -> [..., out]."""
        return linear(features, self.weight, self.bias)


def linear(
    features: Tensor,  # [..., in]
    weight: Tensor,  # [out, in]
    bias: Tensor | None = None,  # [out]
) -> Tensor:
    """features weight^T + bias, [..., out], as F.linear."""
    if _in_onednn(features):
        return torch.ops.mkldnn._linear_pointwise(features, weight, bias, "none", [], "")  # what torch.compile calls too
    return F.linear(features, weight, bias)


def attention(
    queries: Tensor,  # [B, heads, T, D]
    keys: Tensor,  # [B, heads, S, D]
    values: Tensor,  # [B, heads, S, D]
) -> Tensor:
    """softmax(queries keys^T / sqrt(D)) values, [B, heads, T, D]: torch's fused kernel, or two products a chunk of queries."""
    if not _in_onednn(queries):
        return F.scaled_dot_product_attention(queries, keys, values)
    batch, heads, count, width = queries.shape
    mixed = queries.new_empty(batch, count, heads, width).transpose(1, 2)  # as the fused kernel lays its result out
    for b in range(batch):
        for h in range(heads):
            scaled, across = keys[b, h] * (1 / math.sqrt(width)), values[b, h].T.contiguous()
            for start in range(0, count, QUERIES_PER_CHUNK):
                chunk = slice(start, start + QUERIES_PER_CHUNK)
                mixed[b, h, chunk] = linear(linear(queries[b, h, chunk], scaled).softmax(dim=-1), across)
    return mixed


def _in_onednn(features: Tensor) -> bool:
    return (
        features.device.type == "cpu"
        and features.dtype == torch.float32
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and torch.backends.mkldnn.is_available()
    )
