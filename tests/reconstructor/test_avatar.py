"""Driving: the cached source equals the whole network, frames do not flicker, the surface is closed."""

import numpy as np
import pytest
import torch

from head3d.cameras import frontal, orbit
from head3d.head_model import load_head_model
from head3d.labels import Motion
from head3d.run.errors import ConfigError
from head3d.surface import SurfaceConfig
from reconstructor.architecture import Driver
from reconstructor.avatar import Avatar
from reconstructor.model import Reconstructor
from reconstructor.motion import flame_motion_vector


@pytest.fixture(scope="module")
def model(world):
    """Untrained, with cross-attention and density awake."""
    config = world.run(world.shards)
    draws = torch.Generator().manual_seed(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Reconstructor(config.model, load_head_model(None)).eval().requires_grad_(False)
        for block in (*model.architecture.deexpression, *model.architecture.reenactment):
            block.cross_attention.output.weight.normal_(generator=draws)
        model.decoder.density.weight.normal_(generator=draws)
    return model


def motions(count, seed=0, neck=0.0):
    draws = torch.Generator().manual_seed(seed)
    return Motion(*(torch.randn(count, size, generator=draws) * scale for size, scale in ((100, 1.0), (3, neck), (3, 0.05), (6, 0.1))))


def picture(seed=0, side=32):
    return torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.mark.parametrize("neck", [0.0, 0.2])
def test_an_avatar_draws_what_the_whole_network_draws(model, neck):
    image, own, driving = picture(), motions(1, 1), motions(2, 2, neck)
    shape = torch.randn(1, 300, generator=torch.Generator().manual_seed(3)) * 0.1
    camera = orbit(torch.tensor([0.3, -0.2]), torch.zeros(2), torch.full((2,), 4.17))
    avatar = Avatar.from_image(model, image, shape=shape, motion=own)
    source = [part.expand(2, *part.shape[1:]) for part in (image, flame_motion_vector(own), shape)]
    whole = model(source[0], source[1], Driver(flame_motion_vector(driving)), torch.ones(2), source[2], driving, camera).images
    driven = avatar.drive(driving, camera)
    assert torch.allclose(driven.image, whole.image, atol=1e-4)
    assert torch.allclose(driven.depth, whole.depth, atol=1e-4)


def test_the_neck_moves_the_picture_and_the_motion_vector_does_not_know_it(model):
    avatar, still, turned = Avatar.from_image(model, picture()), motions(1), motions(1)
    turned.neck_pose[0, 1] = 0.5
    assert torch.equal(flame_motion_vector(still), flame_motion_vector(turned))
    assert not torch.allclose(avatar.drive(still, frontal()).image, avatar.drive(turned, frontal()).image, atol=1e-3)


def test_equal_calls_give_equal_frames_whatever_shares_the_batch(model):
    avatar, driving = Avatar.from_image(model, picture()), motions(3)
    together = avatar.drive(driving, frontal(3)).image
    assert torch.equal(together, avatar.drive(driving, frontal(3)).image)
    alone = avatar.drive(driving.select(slice(1, 2)), frontal(1)).image
    assert torch.allclose(together[1:2], alone, atol=1e-4)


def test_one_motion_is_seen_from_several_cameras_with_one_pass_of_the_network(model, monkeypatch):
    avatar, driving, calls = Avatar.from_image(model, picture()), motions(1, neck=0.2), []
    planes = model.architecture.planes
    monkeypatch.setattr(model.architecture, "planes", lambda *arguments: calls.append(1) or planes(*arguments))
    camera = orbit(torch.tensor([-0.4, 0.0, 0.4]), torch.zeros(3), torch.full((3,), 4.17))
    views = avatar.drive(driving, camera).image
    assert len(calls) == 1
    assert torch.allclose(views[2:], avatar.drive(driving, camera.select(slice(2, 3))).image, atol=1e-4)


def test_a_picture_of_another_size_is_resized(model):
    assert Avatar.from_image(model, picture(side=100)).drive(motions(1), frontal()).image.shape == (1, 3, 32, 32)


def test_a_little_motion_changes_the_picture_a_little(model):
    avatar, still, moved = Avatar.from_image(model, picture()), motions(1), motions(1)
    moved.jaw_pose[0, 0] += 1e-3
    moved.expression[0, 0] += 1e-3
    change = (avatar.drive(moved, frontal()).image - avatar.drive(still, frontal()).image).abs().max()
    assert 0 < change < 0.02  # jittered samples would change it by more


def test_a_motion_vector_may_come_from_elsewhere_and_must_fit_the_network(model):
    avatar, driving = Avatar.from_image(model, picture()), motions(2)
    rest = Motion.neutral(2)
    assert torch.equal(avatar.drive(rest, frontal(2), vector=flame_motion_vector(driving)).image, avatar.drive(driving, frontal(2)).image)
    with pytest.raises(ConfigError, match=r"vectors of 109 numbers \(FLAME's .*\), got 548 numbers \(read off pictures\)"):
        avatar.drive(rest, frontal(2), vector=torch.zeros(2, 548))
    with pytest.raises(ConfigError, match="109 numbers"):
        Avatar.from_image(model, picture(), vector=torch.zeros(1, 548))


def test_the_surface_is_closed_and_turns_with_the_neck(model):
    avatar, rest = Avatar.from_image(model, picture()), Motion.neutral(1)
    turned = rest._replace(neck_pose=torch.tensor([[0.0, 0.6, 0.0]]))
    density = torch.nn.functional.softplus(model.field(avatar.pose(rest).planes, torch.rand(1, 4000, 3) - 0.5)[1] - 1)
    config = SurfaceConfig(resolution=20, threshold=float(density.quantile(0.9)))
    meshes = [avatar.surface(avatar.pose(motion), config) for motion in (rest, turned)]
    assert all(mesh.is_watertight and mesh.volume > 0 for mesh in meshes)
    assert len(meshes[0].vertices) != len(meshes[1].vertices) or not np.allclose(meshes[0].vertices, meshes[1].vertices)
