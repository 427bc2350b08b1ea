"""The measurement network: what it reads, its distance, the motion vector, and who may load it."""

import math

import pytest
import torch

from head3d.cameras import frontal, orbit
from head3d.labels import Motion, pack_label
from head3d.run.checkpoint import export_model
from head3d.run.errors import AssetError, ConfigError
from head3d.run.seeding import torch_generator, weights_drawn_from
from reconstructor.perception import (
    EXPORT_KIND,
    Perception,
    PerceptionConfig,
    PerceptionExport,
    Reading,
    TrunkConfig,
    feature_distance,
    load_errors,
    load_perception,
    orthonormal,
    true_reading,
)

TINY = PerceptionConfig(
    trunk=TrunkConfig(16, 8, (1, 1)),
    identity_size=6,
    hidden=8,
    motion_trunk=TrunkConfig(16, 8, (1, 1)),
    motion_directions=5,
    motion_hidden=8,
)


@pytest.fixture
def network():
    with weights_drawn_from(torch_generator("test perception")):
        return Perception(TINY)


def pictures(count, side=16):
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1


def turned(yaw, **motion):
    """A label seen from a camera moved by `yaw` radians toward +x."""
    value = torch.tensor([yaw])
    camera = orbit(value, torch.zeros(1), torch.full((1,), 4.17))
    return pack_label(camera, torch.zeros(1, 300), Motion.neutral(1)._replace(**motion))


def test_two_columns_become_the_rotation_that_gram_schmidt_gives():
    columns = torch.tensor([[[2.0, 1.0], [0.0, 3.0], [0.0, 0.0]], [[0.0, 5.0], [0.0, 0.0], [1.0, 4.0]]])  # x, y and z, x
    expected = torch.tensor([[[1.0, 0, 0], [0, 1, 0], [0, 0, 1]], [[0.0, 1, 0], [0, 0, 1], [1, 0, 0]]])
    assert torch.allclose(orthonormal(columns), expected, atol=1e-6)
    assert torch.allclose(
        torch.det(orthonormal(torch.randn(4, 3, 2, generator=torch.Generator().manual_seed(0)))), torch.ones(4), atol=1e-5
    )


def test_a_head_that_looks_at_the_camera_has_no_rotation_in_camera_axes(built_in_head):
    neck = torch.tensor([[0.0, 0.4, 0.0]])  # toward +x, where the camera is
    assert torch.allclose(true_reading(turned(0.4, neck_pose=neck), built_in_head).rotation, torch.eye(3)[None], atol=1e-6)
    cosine, sine = math.cos(0.4), math.sin(0.4)
    seen = true_reading(turned(0.4), built_in_head).rotation[0]  # the camera moved to +x sees the face turned to its left, -x
    assert torch.allclose(seen @ torch.tensor([0.0, 0, 1]), torch.tensor([-sine, 0, cosine]), atol=1e-6)


def test_landmarks_stand_where_the_picture_shows_them(built_in_head):
    label = pack_label(frontal(1), torch.zeros(1, 300), Motion.neutral(1))
    points = true_reading(label, built_in_head).landmarks[0]
    nose = built_in_head.landmarks(built_in_head.vertices(torch.zeros(1, 300), Motion.neutral(1)))[0, 30]
    focal = 1 / (2 * math.tan(math.radians(6)))
    expected = torch.stack([0.5 + focal * nose[0] / (4.17 - nose[2]), 0.5 - focal * nose[1] / (4.17 - nose[2])])
    assert torch.allclose(points[30], expected, atol=1e-5)
    assert points[68, 0] < 0.5 < points[69, 0] and points[8, 1] > points[30, 1]  # the right pupil is left in the picture, the chin below


def test_the_feature_distance_is_lpips_with_unit_weights():
    first = torch.tensor([[[[3.0, 0.0]], [[4.0, 2.0]]]])  # two pixels with two channels: (3, 4), (0, 2)
    second = torch.tensor([[[[4.0, 0.0]], [[3.0, 7.0]]]])  # (4, 3), (0, 7)
    per_pixel = 2 * (0.8 - 0.6) ** 2  # of the first; the second points the same way
    assert feature_distance([first], [second]).item() == pytest.approx(per_pixel / 2)
    assert feature_distance([first, 5 * first], [second, second]).item() == pytest.approx(per_pixel)
    nothing = torch.zeros(1, 2, 1, 1, requires_grad=True)
    feature_distance([nothing], [torch.zeros(1, 2, 1, 1)]).sum().backward()
    assert nothing.grad.isfinite().all()


@pytest.mark.parametrize("side", [16, 37])
def test_the_perceptual_distance_is_zero_for_the_same_picture_and_grows_with_noise(network, side):
    images, noise = pictures(2, side), torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(1))
    distances = [network.perceptual_distance(images + strength * noise, images) for strength in (0.0, 0.05, 0.5)]
    assert torch.equal(distances[0], torch.zeros(2)) and (distances[0] < distances[1]).all() and (distances[1] < distances[2]).all()
    assert torch.allclose(distances[2], network.perceptual_distance(images, images + 0.5 * noise))


def test_what_is_read_does_not_depend_on_batch_mates(network):
    images = pictures(3)
    for function in (network.identity, network.motion, lambda x: network.read(x).scalars(), lambda x: network.read(x).rotation.flatten(1)):
        assert torch.allclose(function(images)[1:2], function(images[1:2]), atol=1e-6)


def test_pictures_of_any_side_are_read(network):
    assert network.identity(pictures(2, 40)).shape == (2, 6) and network.read(pictures(2, 9)).landmarks.shape == (2, 70, 2)


def test_calibration_takes_means_deviations_and_the_mean_rotation(network, built_in_head):
    truth = [true_reading(turned(yaw, expression=torch.full((1, 100), value)), built_in_head) for yaw, value in ((0.3, 1.0), (-0.5, 3.0))]
    truth = Reading(*(torch.cat(column) for column in zip(*truth, strict=True)))
    network.calibrate(truth, built_in_head)
    mean = network.mean_reading(4)
    assert torch.allclose(mean.expression, torch.full((4, 100), 2.0)) and torch.allclose(network.spread[:100], torch.ones(100))
    assert torch.allclose(mean.landmarks[0], truth.landmarks.mean(0))
    half_way = true_reading(turned(-0.1), built_in_head).rotation
    assert torch.allclose(mean.rotation, half_way.expand(4, 3, 3), atol=1e-6)
    read = network.read(pictures(4))
    assert torch.equal(read.jaw_pose, mean.jaw_pose)  # which never changed


def test_the_motion_vector_has_548_numbers_of_order_one_and_keeps_angles(network):
    codes = network.motion.coefficients(pictures(3))
    vectors = network.motion(pictures(3))
    assert vectors.shape == (3, 548)
    assert torch.allclose(vectors @ vectors.T / 548, codes @ codes.T, atol=1e-5)
    assert torch.allclose(vectors.norm(dim=1), torch.full((3,), 548**0.5), atol=1e-3)


def test_the_neck_has_no_part_in_the_motion_vector_and_the_jaw_has(network):
    encode, rest = network.motion.flame_coefficients, Motion.neutral(1)
    assert torch.equal(encode(rest), encode(rest._replace(neck_pose=torch.ones(1, 3))))
    assert not torch.equal(encode(rest), encode(rest._replace(jaw_pose=torch.ones(1, 3))))


def test_flame_motion_counts_by_how_far_it_moves_the_mesh(network, built_in_head):
    spread = torch.ones(109)
    network.motion.calibrate(spread, built_in_head)
    scale = network.motion.scale.clone()
    assert scale.square().mean().item() == pytest.approx(1, rel=1e-4)
    vertices = [
        built_in_head.vertices(torch.zeros(1, 300), motion)
        for motion in (
            Motion.neutral(1),
            Motion.neutral(1)._replace(jaw_pose=torch.tensor([[0.05, 0, 0]])),
            Motion.neutral(1)._replace(expression=torch.nn.functional.one_hot(torch.tensor([7]), 100) * 0.05),
        )
    ]
    jaw, smile = ((moved - vertices[0]).norm(dim=2).max() for moved in vertices[1:])
    assert (scale[100] / scale[7]).item() == pytest.approx((jaw / smile).item(), rel=1e-3)
    network.motion.calibrate(2 * spread, built_in_head)
    assert torch.allclose(network.motion.scale, scale / 2)


def test_an_export_is_loaded_for_its_own_role_alone(network, tmp_path):
    export_model(tmp_path, network.state_dict(), PerceptionExport(role="losses", network=TINY), EXPORT_KIND, 1)
    loaded = load_perception(tmp_path, "losses")
    assert torch.equal(loaded.identity(pictures(2)), network.identity(pictures(2)))
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    with pytest.raises(AssetError, match=r"expected a perception network trained with --role evaluation, got losses"):
        load_perception(tmp_path, "evaluation")
    with pytest.raises(AssetError, match=r"errors.json: expected the errors of the network"):
        load_errors(tmp_path)


@pytest.mark.parametrize(("resolution", "width"), [(20, 8), (16, 12)])
def test_sides_that_cannot_be_halved_and_widths_that_cannot_be_grouped_are_refused(resolution, width):
    with pytest.raises(ConfigError, match=rf"multiple of 8 .*multiple of 8, got {resolution} and {width}"):
        TrunkConfig(resolution, width, (1, 1))
