"""Tri-planes: axes, scale and the decoder's start."""

import torch

from head3d.triplane import PLANE_AXES, Decoder, sample_planes


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
    assert inside.tolist() == [1.0, 1.0] and outside.tolist() == [0.0, 0.0]


def test_the_decoder_starts_as_an_even_fog():
    colors, density = Decoder(4, 8, 6)(torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(0)))
    assert colors.shape == (2, 5, 6) and density.shape == (2, 5, 1)
    assert (density == 0).all() and (colors > -0.001).all() and (colors < 1.001).all()
