"""Tri-planes: axes, scale and the decoder's start."""

import pytest
import torch

from head3d.triplane import PLANE_AXES, Decoder, _sample_grid, _sample_rows, sample_planes


def test_planes_cover_each_axis_pair_once():
    assert {frozenset(pair) for pair in PLANE_AXES} == {frozenset({0, 1}), frozenset({1, 2}), frozenset({2, 0})}


def test_each_plane_reads_its_first_axis_along_the_width():
    """A plane that rises linearly along its width gives back the first coordinate of its pair."""
    side, box = 16, 1.3
    ramp = ((torch.arange(side) + 0.5) / side * 2 - 1) * box / 2
    point = torch.tensor([[[0.11, -0.23, 0.31]]])
    for index, (width_axis, height_axis) in enumerate(PLANE_AXES):
        for axis, ramp_plane in ((width_axis, ramp.expand(side, side)), (height_axis, ramp[:, None].expand(side, side))):
            planes = torch.zeros(1, 3, 1, side, side)
            planes[0, index, 0] = ramp_plane
            assert torch.allclose(sample_planes(planes, point, box) * 3, point[..., axis : axis + 1], atol=1e-5)


def test_points_outside_the_box_read_zero_and_three_planes_are_averaged():
    planes = torch.ones(1, 3, 2, 8, 8)
    inside, outside = sample_planes(planes, torch.tensor([[[0.0, 0.0, 0.0], [5.0, 5.0, 5.0]]]), 1.3)[0]
    torch.testing.assert_close(inside, torch.ones(2), rtol=0, atol=1e-6)
    assert outside.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "shared by views"])
def test_rows_of_texels_give_what_grid_sample_gives(layout: str):
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(2, 2 * 3 * 5, 7, 7, generator=generator)  # part and head planes as a network makes them
    if layout != "contiguous":
        image = image.contiguous(memory_format=torch.channels_last)
    planes = image.reshape(2, 2, 3, 5, 7, 7)[:, 1]
    if layout == "shared by views":
        planes = planes[1:].expand(2, *planes.shape[1:])
    points = torch.rand(2, 400, 3, generator=generator) * 1.6 - 0.8  # of a box from -0.65 to 0.65
    points[:, 0], points[:, 1] = 1e30, torch.tensor([0.65, -0.65, 0.65 - 1.3 / 14])  # far outside, on the border, on the last centre
    found = _sample_rows(planes, points, 1.3)
    torch.testing.assert_close(found, _sample_grid(planes, points, 1.3), rtol=0, atol=2e-6)
    assert (found[:, 0] == 0).all() and found.is_contiguous()


def test_gradients_reach_planes_and_points():
    planes = torch.randn(1, 3, 2, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    points = torch.tensor([[[0.1, -0.2, 0.3], [0.9, 0.0, 0.1]]], dtype=torch.float64)
    inputs = (planes.requires_grad_(True), points.requires_grad_(True))
    assert torch.autograd.gradcheck(lambda a, b: sample_planes(a, b, 1.3), inputs)


def test_the_decoder_starts_as_an_even_fog():
    colors, density = Decoder(4, 8, 6)(torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(0)))
    assert colors.shape == (2, 5, 6) and density.shape == (2, 5, 1)
    assert (density == 0).all() and (colors > -0.001).all() and (colors < 1.001).all()
