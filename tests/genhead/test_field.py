"""The part-wise field: evaluating the part branch only where it counts changes nothing."""

import pytest
import torch

from genhead.field import PartField, _padded_index
from head3d.deformation import Deformation
from head3d.head_model import load_head_model
from head3d.labels import Motion
from head3d.triplane import Decoder, sample_planes

BATCH, RAYS, SAMPLES, CHANNELS = 2, 6, 5, 4


@pytest.fixture(scope="module")
def scene():
    generator = torch.Generator().manual_seed(0)
    head = load_head_model(None)
    deformation = Deformation(head)
    shape = torch.randn(BATCH, 300, generator=generator) * 0.5
    motion = Motion.neutral(BATCH)._replace(jaw_pose=torch.tensor([[0.2, 0.0, 0.0], [0.0, 0.0, 0.0]]))
    posed = deformation.prepare(shape, motion)
    planes = torch.randn(BATCH, 2, 3, CHANNELS, 8, 8, generator=generator)
    decoder = Decoder(CHANNELS, 8, CHANNELS)
    torch.nn.init.normal_(decoder.density.weight, generator=generator)
    eyes = posed.eye_centres[:, :1, None]  # around the left eye, so that some points fall into its box
    points = eyes + torch.randn(BATCH, RAYS, SAMPLES, 3, generator=generator) * 0.05
    return deformation, posed, planes, decoder, points


def _field(scene, eye, mouth, fuse=False):
    deformation, posed, planes, decoder, _ = scene
    eye = torch.tensor(eye).expand(BATCH, RAYS)
    mouth = torch.tensor(mouth).expand(BATCH, RAYS)
    return PartField(planes, decoder, deformation, posed, eye, mouth, 1.3, fuse), eye, mouth


def _dense(scene, eye, mouth, fuse):
    """The formula of the specification, both branches everywhere."""
    deformation, posed, planes, decoder, points = scene
    flat = points.reshape(BATCH, -1, 3)
    inside = deformation.inside_eye_boxes(flat, posed).float().reshape(points.shape[:3])
    m_e, m_m = eye[..., None].expand_as(inside), mouth[..., None].expand_as(inside)

    def branch(index, part):
        colors, density = decoder(sample_planes(planes[:, index], deformation.to_canonical(flat, posed, part), 1.3))
        return colors.reshape(*points.shape[:3], -1), density.reshape(points.shape[:3])

    eye_colors, eye_density = branch(0, "eyes")
    mouth_colors, mouth_density = branch(0, "mouth")
    use_mouth = m_m > 0
    part_colors = torch.where(use_mouth[..., None], mouth_colors, eye_colors)
    part_density = torch.where(use_mouth, mouth_density, eye_density) * (inside + m_m)
    head_colors, head_density = branch(1, "head")
    w = m_e * inside + m_m
    density = part_density * w + head_density * (1 - w)
    colors = part_colors * w[..., None] + head_colors * (1 - w[..., None])
    if fuse:
        share = torch.softmax(torch.stack([part_density, head_density]), 0)[..., None]
        colors = torch.where(use_mouth[..., None], share[0] * part_colors + share[1] * head_colors, colors)
        density = torch.where(use_mouth, part_density + head_density, density)
    return colors, density


@pytest.mark.parametrize("fuse", [False, True])
@pytest.mark.parametrize(
    ("eye", "mouth"),
    [([0.0] * 6, [0.0] * 6), ([1.0, 0.5, 0.0, 0.0, 0.3, 0.0], [0.0, 0.0, 1.0, 0.4, 0.2, 0.0])],
)
def test_skipping_rays_without_parts_is_exact(scene, eye, mouth, fuse):
    field, eye, mouth = _field(scene, eye, mouth, fuse)
    ours, (colors, density) = field(scene[4]), _dense(scene, eye, mouth, fuse)
    assert torch.allclose(ours.colors, colors, atol=1e-5) and torch.allclose(ours.raw_density, density, atol=1e-5)
    seen = field.passes[0]
    assert seen.inside_eye.any(), "some points must lie in an eye box for this test to say anything"
    assert seen.points.shape == (BATCH, RAYS, SAMPLES, 3) and seen.part_weight.shape == (BATCH, RAYS, SAMPLES)


def test_a_sample_does_not_depend_on_its_batch_mates(scene):
    """Padding of the part points differs with the batch; results must not."""
    deformation, posed, planes, decoder, points = scene
    eye, mouth = torch.tensor([[1.0] * 6, [0.0] * 6]), torch.tensor([[0.0] * 6, [1.0] * 6])
    both = PartField(planes, decoder, deformation, posed, eye, mouth, 1.3)(points)
    for row in range(BATCH):
        alone = PartField(planes[row : row + 1], decoder, deformation, posed.select([row]), eye[row : row + 1], mouth[row : row + 1], 1.3)
        assert torch.allclose(alone(points[row : row + 1]).raw_density, both.raw_density[row : row + 1], atol=1e-6)


def test_gradients_reach_both_plane_sets_only_where_they_are_used(scene):
    deformation, posed, planes, decoder, points = scene
    for mouth, touched in (([0.0] * 6, False), ([1.0] * 6, True)):
        leaf = planes.clone().requires_grad_(True)
        mask = torch.tensor(mouth).expand(BATCH, RAYS)
        out = PartField(leaf, decoder, deformation, posed, torch.zeros_like(mask), mask, 1.3)(points)
        (out.colors.sum() + out.raw_density.sum()).backward()
        assert bool(leaf.grad[:, 0].abs().sum() > 0) == touched
        assert bool(leaf.grad[:, 1].abs().sum() > 0) != touched


def test_padded_index_lists_every_true_entry_first():
    mask = torch.tensor([[False, True, True], [False, False, True]])
    assert _padded_index(mask).tolist() == [[1, 2], [2, 0]]
    assert _padded_index(torch.zeros(2, 3, dtype=torch.bool)) is None
