"""Skinning in the published order of operations: our vertices up to rounding, smplx's to the last bit."""

import pytest
import torch

from head3d.labels import Motion
from head3d.published_skinning import published_vertices


def drawn(batch: int) -> tuple[torch.Tensor, Motion]:
    g = torch.Generator().manual_seed(3)
    draws = [torch.randn(batch, size, generator=g) * scale for size, scale in ((300, 0.7), (100, 0.7), (3, 0.3), (3, 0.2), (6, 0.2))]
    return draws[0], Motion(*draws[1:])


def test_the_published_order_of_operations_gives_the_same_vertices(small_head):
    shape, motion = drawn(3)
    torch.testing.assert_close(published_vertices(small_head, shape, motion), small_head.vertices(shape, motion), rtol=0, atol=3e-6)
    still = motion.without_neck()
    torch.testing.assert_close(published_vertices(small_head, shape, still), small_head.vertices(shape, still), rtol=0, atol=3e-6)


def test_every_bit_is_smplx(small_head, small_head_arrays):
    lbs = pytest.importorskip("smplx.lbs").lbs
    shapedirs, posedirs, regressor, weights = (
        torch.as_tensor(small_head_arrays[name]).float() for name in ("shapedirs", "posedirs", "J_regressor", "weights")
    )
    parents = torch.tensor([-1, 0, 1, 1, 1])

    def skin(coefficients, pose, template):
        posedirs_rows = (posedirs * 3).reshape(-1, 36).T
        return lbs(coefficients, pose, template.expand(len(pose), -1, -1), shapedirs * 3, posedirs_rows, regressor, parents, weights)

    template = torch.as_tensor(small_head_arrays["v_template"]).float() * 3
    canonical_pose = torch.zeros(1, 15)
    canonical_pose[0, 6] = 0.3
    _, joints = skin(torch.zeros(1, 400), canonical_pose, template)
    shape, motion = drawn(2)
    pose = torch.cat([torch.zeros(2, 3), *motion[1:]], dim=1)
    expected, _ = skin(torch.cat([shape, motion.expression], dim=1), pose, template - joints[0, 1])
    assert torch.equal(published_vertices(small_head, shape, motion), expected)
