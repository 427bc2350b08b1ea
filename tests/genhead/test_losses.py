"""GenHead's losses against naive formulas."""

import types

import pytest
import torch

from genhead.losses import DiscriminatorParts, RegularizerConfig, density_smoothness, distortion, mesh_surface, part_regularizers
from genhead.mesh_truth import MeshView
from head3d.rendering import Rendered
from head3d.triplane import Decoder, sample_planes


def test_distortion_by_prefix_sums_equals_the_double_sum():
    generator = torch.Generator().manual_seed(0)
    depths = torch.rand(2, 3, 9, generator=generator, dtype=torch.float64).sort(-1).values
    weights = torch.rand(2, 3, 8, generator=generator, dtype=torch.float64)
    middle, width = (depths[..., 1:] + depths[..., :-1]) / 2, depths.diff(dim=-1)
    pairs = (weights[..., :, None] * weights[..., None, :] * (middle[..., :, None] - middle[..., None, :]).abs()).sum((-1, -2))
    assert torch.allclose(distortion(weights, depths), pairs + (weights.square() * width).sum(-1) / 3)


def test_distortion_of_one_narrow_interval_is_a_third_of_its_width():
    weights = torch.tensor([[[0.0, 1.0, 0.0]]])
    assert torch.allclose(distortion(weights, torch.tensor([[[0.0, 1.0, 1.3, 2.0]]])), torch.tensor([[0.1]]), atol=1e-6)


def test_the_discriminator_sees_final_raw_correspondence_opacity_in_this_order():
    image, raw = torch.full((1, 3, 8, 8), 0.1), torch.full((1, 3, 4, 4), 0.2)
    seen = DiscriminatorParts(image, raw, torch.full((1, 3, 8, 8), 0.3), torch.full((1, 1, 4, 4), 0.4)).stack()
    assert seen.shape == (1, 10, 8, 8)
    assert torch.allclose(seen[0, :, 4, 4], torch.tensor([0.1] * 3 + [0.2] * 3 + [0.3] * 3 + [0.4]), atol=1e-5)


def _output(eye: float, mouth: float, head_density: float, inside: float, transmittance: float):
    rays = Rendered(
        colors=torch.zeros(1, 4, 3),
        depth=torch.zeros(1, 4),
        transmittance=torch.full((1, 4), transmittance),
        weights=torch.tensor([0.0, 1.0, 0.0]).expand(1, 4, 3),
        depths=torch.tensor([0.0, 1.0, 1.3, 2.0]).expand(1, 4, 4),
        raw_density=torch.zeros(1, 4, 4),
    )
    images = types.SimpleNamespace(eye_mask=torch.full((1, 1, 2, 2), eye), mouth_mask=torch.full((1, 1, 2, 2), mouth), rays=rays)
    passes = (types.SimpleNamespace(head_density=torch.full((1, 4, 2), head_density), inside_eye=torch.full((1, 4, 2), inside)),) * 2
    return types.SimpleNamespace(images=images, passes=passes)


def test_part_regularizers_equal_the_published_formula():
    losses = part_regularizers(_output(eye=0.5, mouth=0.25, head_density=2.0, inside=1.0, transmittance=0.1), RegularizerConfig())
    softplus = torch.nn.functional.softplus
    expected = 10 * (softplus(torch.tensor(2.0)) * 0.5 + softplus(torch.tensor(0.5)) * 0.25)
    assert torch.allclose(losses["head_density"], expected)
    assert torch.allclose(losses["distortion"], torch.tensor(100 * 0.1 * 0.75), atol=1e-4)
    assert torch.allclose(losses["transmittance"], torch.tensor(100 * 0.1 * 0.75))


def _rays_and_mesh(distance: list[float], face: list[bool], eye: list[float]):
    """Four rays, half of whose light stops in [1.0, 1.3], a quarter in [1.3, 2.0], while a quarter goes on past 2.0."""
    images = types.SimpleNamespace(
        rays=Rendered(
            colors=torch.zeros(1, 4, 3),
            depth=torch.zeros(1, 4),
            transmittance=torch.full((1, 4), 0.25),
            weights=torch.tensor([0.0, 0.5, 0.25]).expand(1, 4, 3),
            depths=torch.tensor([0.0, 1.0, 1.3, 2.0]).expand(1, 4, 4),
            raw_density=torch.zeros(1, 4, 4),
        ),
        eye_mask=torch.tensor(eye).view(1, 1, 2, 2),
    )
    return images, MeshView(torch.tensor(distance).view(1, 1, 2, 2), torch.tensor(face).view(1, 1, 2, 2))


def test_the_surface_term_measures_both_sides_on_face_and_eyes_and_only_behind_elsewhere():
    # middles 1.15, 1.65 and the last sample 2.0; the mesh at 1.45: 0.3 before, 0.2 and 0.55 behind
    images, mesh = _rays_and_mesh([1.45] * 3 + [torch.inf], face=[True, False, False, True], eye=[0.0, 1.0, 0.0, 0.0])
    both = 0.5 * (0.3 - 0.02) + 0.25 * (0.2 - 0.02) + 0.25 * (0.55 - 0.02)
    behind = 0.25 * (0.2 - 0.02) + 0.25 * (0.55 - 0.02)
    expected = 10 * (both + both + behind) / 3  # face, eye, hair; the fourth ray misses the mesh
    assert torch.allclose(mesh_surface(images, mesh, RegularizerConfig(surface=10.0)), torch.tensor(expected))


def test_a_surface_within_the_slack_costs_nothing_and_no_mesh_is_no_error():
    images, mesh = _rays_and_mesh([1.16] * 4, face=[True] * 4, eye=[0.0] * 4)
    stops = images.rays._replace(weights=torch.tensor([0.0, 1.0, 0.0]).expand(1, 4, 3), transmittance=torch.zeros(1, 4))
    images.rays = stops
    assert mesh_surface(images, mesh, RegularizerConfig(surface=10.0)) == 0
    images, mesh = _rays_and_mesh([torch.inf] * 4, face=[False] * 4, eye=[0.0] * 4)
    assert mesh_surface(images, mesh, RegularizerConfig(surface=10.0)) == 0


def test_a_weight_of_zero_removes_its_term():
    config = RegularizerConfig(head_density=0.0, distortion=0.0)
    assert set(part_regularizers(_output(0.5, 0.5, 1.0, 1.0, 0.5), config)) == {"transmittance"}


def test_smoothness_is_zero_on_constant_planes_and_positive_on_rough_ones():
    decoder = Decoder(4, 8, 4)
    torch.nn.init.ones_(decoder.density.weight)
    sampling = types.SimpleNamespace(box_side=1.3)
    genhead = types.SimpleNamespace(config=types.SimpleNamespace(sampling=sampling, published=False), decoder=decoder)
    generator = torch.Generator().manual_seed(0)
    # Half a cell inside the border a constant plane samples constant; the random points reach the border, so only roughness is compared.
    rough = density_smoothness(genhead, torch.randn(1, 2, 3, 4, 16, 16, generator=generator), RegularizerConfig(), generator)
    even = density_smoothness(genhead, torch.zeros(1, 2, 3, 4, 16, 16), RegularizerConfig(), generator)
    assert even == 0 and rough > 0


@pytest.mark.parametrize(("published", "half"), [(False, 0.65), (True, 1.0)])
def test_smoothness_is_the_mean_over_eye_head_and_mouth_branches(published, half):
    config = types.SimpleNamespace(sampling=types.SimpleNamespace(box_side=1.3), published=published)
    genhead = types.SimpleNamespace(config=config, decoder=lambda features: (None, features[..., :1]))  # density is the first feature
    planes = torch.randn(2, 2, 3, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    draws = torch.Generator().manual_seed(2)
    points = (torch.rand(2, 1000, 3, generator=draws) * 2 - 1) * half
    near = points + torch.randn(2, 1000, 3, generator=draws) * 0.004 * 1.3
    eye, head = (
        (sample_planes(planes[:, i], points, 1.3)[..., 0] - sample_planes(planes[:, i], near, 1.3)[..., 0]).abs().mean() for i in (0, 1)
    )
    found = density_smoothness(genhead, planes, RegularizerConfig(), torch.Generator().manual_seed(2))
    torch.testing.assert_close(found, 0.25 * (eye + head + eye) / 3)
