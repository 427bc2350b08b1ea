"""Cameras: labels, rays and projection agree with each other and with hand-computed values."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from head3d.cameras import Camera, camera_rays, default_intrinsics, frontal, look_at, orbit, project, ray_bounds, world_to_camera

angles = st.floats(-1.2, 1.2)


def _orbit(yaw: float, pitch: float, radius: float = 4.17, roll: float = 0.0) -> Camera:
    return orbit(torch.tensor([yaw]), torch.tensor([pitch]), torch.tensor([radius]), roll_rad=torch.tensor([roll]))


def test_focal_length_of_twelve_degrees_is_the_published_constant():
    assert abs(default_intrinsics(1)[0, 0, 0].item() - 4.7572) < 1e-4


def test_frontal_camera_sits_on_plus_z_and_looks_along_minus_z():
    camera = frontal(radius=4.0)
    assert torch.allclose(camera.c2w[0], torch.tensor([[1.0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 4], [0, 0, 0, 1]]), atol=1e-6)
    _, directions = camera_rays(camera, 65)
    assert torch.allclose(directions[0, 32 * 65 + 32], torch.tensor([0.0, 0.0, -1.0]), atol=1e-6)


def test_the_first_pixel_is_top_left():
    _, directions = camera_rays(frontal(), 8)
    assert directions[0, 0, 0] < 0 < directions[0, 0, 1]


@settings(max_examples=25, deadline=None)
@given(angles, angles, angles)
def test_rays_pass_through_the_pixels_their_points_project_to(yaw, pitch, roll):
    camera, resolution = _orbit(yaw, pitch, roll=roll), 6
    camera = camera._replace(intrinsics=torch.tensor([[[4.5, 0.1, 0.52], [0.0, 4.8, 0.47], [0.0, 0.0, 1.0]]]))
    origins, directions = camera_rays(camera, resolution)
    uv, depth = project(origins + 3.0 * directions, camera)
    centres = (torch.arange(resolution) + 0.5) / resolution
    expected = torch.stack(torch.meshgrid(centres, centres, indexing="xy"), dim=-1).reshape(1, -1, 2)
    assert torch.allclose(uv, expected, atol=1e-5)
    assert torch.allclose(directions.norm(dim=-1), torch.ones(1, 36), atol=1e-6) and (depth > 0).all()


def test_positive_yaw_moves_the_camera_to_plus_x_and_positive_pitch_up():
    position = _orbit(math.pi / 2, 0.0, 2.0).c2w[0, :3, 3]
    assert torch.allclose(position, torch.tensor([2.0, 0.0, 0.0]), atol=1e-6)
    assert _orbit(0.0, 0.5).c2w[0, 1, 3] > 0


def test_a_point_above_the_target_appears_higher_in_the_picture():
    uv, _ = project(torch.tensor([[[0.0, 0.1, 0.0]]]), frontal())
    assert uv[0, 0, 1] < 0.5 and abs(uv[0, 0, 0] - 0.5) < 1e-6


def test_label_round_trip_keeps_every_number():
    camera = _orbit(0.3, -0.2, roll=0.1)
    back = Camera.from_label(camera.label())
    assert torch.equal(back.c2w, camera.c2w) and torch.equal(back.intrinsics, camera.intrinsics)
    assert camera.label()[0, 3] == camera.c2w[0, 0, 3], "row-major: the fourth number is the x of the camera centre"


def test_rotating_world_and_camera_together_changes_nothing():
    camera, angle = _orbit(0.2, 0.1), 0.7
    turn = torch.eye(4)
    turn[0, 0], turn[0, 2], turn[2, 0], turn[2, 2] = math.cos(angle), math.sin(angle), -math.sin(angle), math.cos(angle)
    points = torch.randn(1, 20, 3, generator=torch.Generator().manual_seed(0)) * 0.3
    turned = Camera(turn @ camera.c2w, camera.intrinsics)
    assert torch.allclose(project(points, camera)[0], project(points @ turn[:3, :3].T, turned)[0], atol=1e-5)


def test_bounds_are_half_a_box_around_the_depth_of_the_origin():
    camera = look_at(torch.tensor([[0.0, 0.0, 4.0]]), torch.tensor([[0.0, 0.0, 0.1]]))
    near, far = ray_bounds(camera, 1.3)
    assert torch.allclose(torch.stack([near, far]), torch.tensor([[3.35], [4.65]]))
    assert world_to_camera(torch.zeros(1, 1, 3), camera)[0, 0, 2] < 0


def test_roll_turns_the_picture_clockwise():
    uv, _ = project(torch.tensor([[[0.0, 0.1, 0.0]]]), _orbit(0.0, 0.0, roll=0.3))
    assert uv[0, 0, 0] > 0.5 and uv[0, 0, 1] < 0.5  # what was straight up now leans to the right


@pytest.mark.parametrize(("height", "up"), [(4.0, -1.0), (-4.0, 1.0)])
def test_a_camera_straight_above_or_below_has_x_to_its_right_as_its_neighbours_in_front_have(height, up):
    camera = look_at(torch.tensor([[0.0, height, 0.0], [0.0, height, 1e-3]]), torch.zeros(2, 3))
    # From above the top of the picture shows what lies behind the head (-z), from below what lies before it.
    expected = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, up], [0.0, height / 4, 0.0]]).T
    torch.testing.assert_close(camera.c2w[0, :3, :3], expected)
    torch.testing.assert_close(camera.c2w[1, :3, :3], expected, atol=1e-3, rtol=0)
