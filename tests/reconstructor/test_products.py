"""The faster products equal torch's own, and are left alone where they cannot be used."""

import pytest
import torch
import torch.nn.functional as F

from reconstructor import products
from reconstructor.blocks import to_map, to_tokens
from reconstructor.products import Linear, attention, linear

DRAWS = torch.Generator().manual_seed(0)


def draw(*shape):
    return torch.randn(*shape, generator=DRAWS)


@pytest.mark.parametrize("bias", [True, False])
def test_the_product_is_that_of_f_linear(bias):
    features, weight, offset = draw(2, 5, 12), draw(7, 12), draw(7) if bias else None
    expected = F.linear(features, weight, offset)
    with torch.no_grad():
        assert torch.allclose(linear(features, weight, offset), expected, atol=1e-5)
        assert torch.allclose(linear(features.transpose(0, 1), weight, offset), expected.transpose(0, 1), atol=1e-5)


@pytest.mark.parametrize("queries", [1, 7, 50])
def test_attention_in_chunks_of_queries_is_the_fused_attention(queries, monkeypatch):
    monkeypatch.setattr(products, "QUERIES_PER_CHUNK", 16)
    q, k, v = draw(2, 3, queries, 8), draw(2, 3, 11, 8), draw(2, 3, 11, 8)
    with torch.no_grad():
        mixed = attention(q, k, v)
    assert mixed.shape == q.shape and torch.allclose(mixed, F.scaled_dot_product_attention(q, k, v), atol=1e-5)
    by_hand = torch.softmax(q[1, 2] @ k[1, 2].T / 8**0.5, dim=-1) @ v[1, 2]
    assert torch.allclose(mixed[1, 2], by_hand, atol=1e-5)


def test_gradients_pass_where_they_are_asked_for():
    layer, features = Linear(4, 3), draw(2, 4).requires_grad_()
    layer(features).sum().backward()
    assert torch.allclose(features.grad, layer.weight.sum(0).expand(2, 4)) and layer.weight.grad is not None
    q = draw(1, 1, 3, 4).requires_grad_()
    attention(q, draw(1, 1, 5, 4), draw(1, 1, 5, 4)).sum().backward()
    assert q.grad.abs().max() > 0


def test_half_precision_stays_with_torch():
    layer = Linear(4, 3)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(draw(2, 4)).dtype == torch.bfloat16
    with torch.no_grad():
        assert layer.bfloat16()(draw(2, 4).bfloat16()).dtype == torch.bfloat16


def test_tokens_and_maps_are_views_that_convolutions_take_as_they_are():
    tokens = draw(1, 6, 4)
    features = to_map(tokens, (2, 3))
    assert features[0, 2, 1, 0] == tokens[0, 3, 2] and features.data_ptr() == tokens.data_ptr()
    assert to_tokens(features).data_ptr() == tokens.data_ptr() and torch.equal(to_tokens(features), tokens)
    convolved = F.conv2d(features, draw(4, 4, 3, 3), padding=1)
    assert convolved.is_contiguous(memory_format=torch.channels_last)
