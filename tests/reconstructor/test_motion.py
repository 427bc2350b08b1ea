"""Motion vectors to tokens."""

import pytest
import torch

from head3d.labels import MOTION_VECTOR_SIZE, Motion
from reconstructor.motion import IMAGE_MOTION_SIZE, MotionTokens, flame_motion_vector


def test_the_motion_vector_of_flame_is_expression_jaw_and_eyes_with_a_tenth_of_a_radian_as_one():
    motion = Motion(torch.full((1, 100), 2.0), torch.full((1, 3), 9.0), torch.tensor([[0.3, 0.0, -0.1]]), torch.full((1, 6), 0.05))
    expected = torch.tensor([2.0] * 100 + [3.0, 0.0, -1.0] + [0.5] * 6)
    torch.testing.assert_close(flame_motion_vector(motion)[0], expected)


@pytest.mark.parametrize("size", [MOTION_VECTOR_SIZE, IMAGE_MOTION_SIZE, 3])
def test_any_length_of_motion_vector_becomes_the_asked_number_of_tokens(size):
    assert MotionTokens(size, hidden=8, count=5, width=12)(torch.zeros(2, size)).shape == (2, 5, 12)


@torch.no_grad()
def test_the_first_token_is_the_first_stretch_of_the_projection():
    module = MotionTokens(3, hidden=4, count=2, width=6)
    motion = torch.randn(1, 3, generator=torch.Generator().manual_seed(0))
    hidden = motion
    for layer in (module.first, module.second):
        hidden = layer(hidden)
        hidden = torch.where(hidden > 0, hidden, 0.01 * hidden)
    flat = hidden @ module.tokens.weight.T + module.tokens.bias
    torch.testing.assert_close(module(motion)[0], torch.stack((flat[0, :6], flat[0, 6:])))


def test_a_vector_of_another_length_is_refused_with_both_lengths():
    with pytest.raises(AssertionError, match=r"109.*548"):
        MotionTokens(548, hidden=4, count=2, width=6)(torch.zeros(1, 109))


def test_projection_has_the_published_size():
    with torch.device("meta"):
        module = MotionTokens(IMAGE_MOTION_SIZE, hidden=512, count=64, width=1024)
    assert sum(p.numel() for p in module.parameters()) == 33_619_968 + 543_744
