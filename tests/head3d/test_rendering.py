"""Volume rendering against hand-computed tables and properties."""

import math

import pytest
import torch

from head3d.rendering import (
    FieldSamples,
    RaySampling,
    compose_pictures,
    composite,
    importance_depths,
    render_rays,
    stratified_depths,
    to_picture,
)


def _raw(density: float) -> float:
    """Raw value whose softplus(x - 1) is `density`."""
    return math.log(math.expm1(density)) + 1


def test_two_intervals_integrate_as_computed_by_hand():
    # densities 1 and 2 on intervals of length 0.5: alpha = 1 - e^-0.5, 1 - e^-1
    depths = torch.tensor([[[1.0, 1.5, 2.0]]])
    a, b = _raw(1.0), _raw(2.0)
    raw = torch.tensor([[[a, a, 2 * b - a]]])  # midpoint means: a, b
    colors = torch.tensor([[[[0.0], [1.0], [0.5]]]])  # midpoints: 0.5, 0.75
    out = composite(colors, raw, depths)
    w0 = 1 - math.exp(-0.5)
    w1 = math.exp(-0.5) * (1 - math.exp(-1.0))
    assert torch.allclose(out.weights, torch.tensor([[[w0, w1]]]), atol=1e-6)
    assert abs(out.colors.item() - (w0 * 0.5 + w1 * 0.75)) < 1e-6
    assert abs(out.depth.item() - (w0 * 1.25 + w1 * 1.75) / (w0 + w1)) < 1e-6
    assert abs(out.transmittance.item() - math.exp(-1.5)) < 1e-6


def test_weights_and_the_last_transmittance_sum_to_one():
    generator = torch.Generator().manual_seed(0)
    depths = torch.rand(2, 7, 12, generator=generator).sort(-1).values
    out = composite(torch.rand(2, 7, 12, 3, generator=generator), torch.randn(2, 7, 12, generator=generator) * 5, depths)
    assert torch.allclose(out.weights.sum(-1) + out.transmittance, torch.ones(2, 7), atol=1e-6)


def test_a_ray_that_hits_nothing_has_the_far_depth():
    out = composite(torch.zeros(1, 1, 4, 1), torch.full((1, 1, 4), -80.0), torch.tensor([[[1.0, 2.0, 3.0, 4.0]]]), torch.tensor([4.0]))
    assert out.depth.item() == 4.0 and abs(out.transmittance.item() - 1) < 1e-6


def test_depth_of_one_sample_does_not_depend_on_its_batch_mates():
    generator = torch.Generator().manual_seed(0)
    depths = torch.rand(2, 3, 6, generator=generator).sort(-1).values * torch.tensor([1.0, 50.0])[:, None, None]
    raw, colors = torch.randn(2, 3, 6, generator=generator), torch.rand(2, 3, 6, 2, generator=generator)
    together = composite(colors, raw, depths)
    alone = composite(colors[:1], raw[:1], depths[:1])
    assert torch.equal(together.depth[:1], alone.depth)


def test_stratified_depths_without_a_generator_are_bin_centres():
    depths = stratified_depths(torch.tensor([1.0]), torch.tensor([2.0]), 2, 5, None)
    assert torch.allclose(depths, torch.tensor([1.125, 1.375, 1.625, 1.875, 2.125]).expand(1, 2, 5))


def test_stratified_depths_stay_in_their_bins():
    depths = stratified_depths(torch.tensor([1.0]), torch.tensor([2.0]), 50, 5, torch.Generator().manual_seed(0))
    low = torch.tensor([1.0, 1.25, 1.5, 1.75, 2.0])
    assert ((depths >= low) & (depths < low + 0.25)).all()


def test_importance_samples_gather_where_the_weight_is():
    depths = torch.linspace(0, 1, 21).expand(1, 1, 21)
    weights = torch.zeros(1, 1, 20)
    weights[..., 12] = 1.0  # the interval [0.60, 0.65]
    drawn = importance_depths(depths, weights, 200, None)
    assert ((drawn > 0.5) & (drawn < 0.75)).float().mean() > 0.75
    assert (drawn.diff(dim=-1) >= -1e-6).all()


def test_even_weights_give_even_importance_samples():
    depths = torch.linspace(0, 1, 11).expand(1, 1, 11)
    drawn = importance_depths(depths, torch.full((1, 1, 10), 0.1), 4, None)[0, 0]
    # Midpoints 0.05 .. 0.75 are the first eight edges (the published code drops the outermost weights): width 0.7 or 0.8.
    assert torch.allclose(drawn.diff(), drawn.diff()[:1].expand(3), atol=0.02) and drawn.min() > 0.05 and drawn.max() < 0.95


def _ball(center: torch.Tensor, radius: float):
    def field(points: torch.Tensor) -> FieldSamples:
        inside = (points - center).norm(dim=-1) < radius
        return FieldSamples(torch.ones(*points.shape[:3], 2), torch.where(inside, 60.0, -60.0))

    return field


@pytest.mark.parametrize("generator", [None, torch.Generator().manual_seed(0)])
def test_an_opaque_ball_is_seen_at_its_surface(generator):
    origins, directions = torch.tensor([[[0.0, 0.0, 4.0]]]), torch.tensor([[[0.0, 0.0, -1.0]]])
    sampling = RaySampling(depth_samples=48, importance_samples=48)
    out = render_rays(_ball(torch.zeros(3), 0.3), origins, directions, torch.tensor([3.35]), torch.tensor([4.65]), sampling, generator)
    assert abs(out.depth.item() - 3.7) < 0.03 and out.transmittance.item() < 1e-3
    assert (out.depths.diff(dim=-1) >= 0).all() and out.depths.shape[-1] == 96


def test_rendering_without_importance_samples_and_with_unequal_counts_works():
    origins, directions = torch.tensor([[[0.0, 0.0, 4.0]]]), torch.tensor([[[0.0, 0.0, -1.0]]])
    for extra in (0, 7):
        sampling = RaySampling(depth_samples=32, importance_samples=extra)
        out = render_rays(_ball(torch.zeros(3), 0.3), origins, directions, torch.tensor([3.35]), torch.tensor([4.65]), sampling, None)
        assert out.depths.shape[-1] == 32 + extra and abs(out.depth.item() - 3.7) < 0.06


def test_both_passes_are_composited_in_the_order_of_their_distances():
    """The colours are never sorted: the integral must still be the one over all samples in order."""

    def field(points: torch.Tensor) -> FieldSamples:
        colors = torch.stack([(9 * points[..., 2]).sin(), points[..., 2].square()], dim=-1)
        return FieldSamples(colors, 3 * (7 * points[..., 2]).cos())

    origins = torch.tensor([[[0.0, 0.0, 4.0], [0.0, 0.0, 3.9]]])
    directions = torch.tensor([[[0.0, 0.0, -1.0]]]).expand(1, 2, 3)
    near, far = torch.tensor([3.35]), torch.tensor([4.65])
    out = render_rays(field, origins, directions, near, far, RaySampling(9, 7), torch.Generator().manual_seed(0))
    sorted_samples = field(origins[:, :, None] + out.depths[..., None] * directions[:, :, None])
    expected = composite(sorted_samples.colors, sorted_samples.raw_density, out.depths, far)
    for name in ("colors", "depth", "transmittance", "weights", "raw_density"):
        torch.testing.assert_close(getattr(out, name), getattr(expected, name), rtol=1e-4, atol=1e-5)


def test_fewer_than_two_samples_are_refused():
    with pytest.raises(ValueError, match="at least 2"):
        RaySampling(depth_samples=1)


def test_rays_become_a_picture_row_by_row():
    picture = to_picture(torch.arange(4.0)[None], 2)
    assert picture.tolist() == [[[[0.0, 1.0], [2.0, 3.0]]]]


def test_pictures_are_composed_over_the_background():
    rendered = composite(torch.full((1, 4, 3, 3), 0.8), torch.full((1, 4, 3), _raw(1.0)), torch.tensor([0.0, 0.5, 1.0]).expand(1, 4, 3))
    images = compose_pictures(rendered, torch.full((1, 3, 2, 2), 0.25), 2, lambda raw, features: raw * 3)
    left = math.exp(-1.0)  # of the light
    feature = 2 * (0.8 * (1 - left) + 0.25 * left) - 1
    assert torch.allclose(images.features, torch.full((1, 3, 2, 2), feature), atol=1e-6)
    assert torch.allclose(images.image, images.raw * 3) and torch.allclose(images.background, torch.full((1, 3, 2, 2), -0.5))
    assert torch.allclose(images.opacity, torch.full((1, 1, 2, 2), 1 - left), atol=1e-6)
