"""Measures against the mesh, where the answer is known: planes, painted points, and the mesh itself in place of a renderer."""

import math
from types import SimpleNamespace

import pytest
import torch

from genhead.mesh_truth import (
    HeadView,
    MeshView,
    SurfacePoints,
    depth_error,
    face_points,
    flat_face,
    head_depth,
    mesh_view,
    motion_difference,
    ray_distance,
    silhouette_scores,
    view_difference,
    visible,
    warped_view,
)
from head3d.cameras import camera_rays, default_intrinsics, frontal, orbit
from head3d.head_model import load_head_model
from head3d.labels import Motion

HALF_WIDTH = 0.3


def _square(z: float, half: float = HALF_WIDTH) -> torch.Tensor:
    """Corners of a square that faces +z, [1, 4, 3]."""
    return torch.tensor([[[-half, half, z], [-half, -half, z], [half, -half, z], [half, half, z]]])


def _mesh(squares: int, face: list[int]) -> SimpleNamespace:
    """What the measures read of a head: squares of two triangles, of which the vertices in `face` are the face."""
    faces = torch.tensor([[0, 1, 2], [0, 2, 3]])
    ids = torch.tensor(face)
    inside = torch.zeros(4 * squares, dtype=torch.bool)
    inside[ids] = True
    every = torch.cat([faces + 4 * i for i in range(squares)])
    regions = SimpleNamespace(face=ids, head=torch.arange(4 * squares))
    return SimpleNamespace(faces=every, regions=regions, faces_within=lambda _: every[inside[every].all(1)])


def test_ray_distance_of_a_plane_by_hand():
    # Two pixels a side, centres at 1/4 and 3/4: |x| = |y| = 0.25 / f at z-depth 1, so rays are sqrt(1 + 2 (0.25 / f)^2) longer.
    camera = frontal(1)
    focal = float(default_intrinsics(1)[0, 0, 0])
    found = ray_distance(torch.full((1, 2, 2), 4.17), camera)
    torch.testing.assert_close(found, torch.full((1, 2, 2), 4.17 * math.sqrt(1 + 2 * (0.25 / focal) ** 2)))


def test_the_mesh_is_met_where_the_rays_cross_it_and_only_its_face_is_face():
    camera = orbit(torch.tensor([0.4]), torch.tensor([-0.2]), torch.tensor([4.0]))
    vertices = torch.cat([_square(0.1), _square(-0.2, half=0.5)], dim=1)
    seen = mesh_view(_mesh(2, face=[0, 1, 2, 3]), vertices, camera, 24)
    origins, directions = camera_rays(camera, 24)
    points = (origins + seen.distance.flatten(1)[..., None] * directions)[seen.silhouette.flatten(1)]
    in_face = seen.face[seen.silhouette]
    assert 20 < in_face.sum() < len(in_face)
    torch.testing.assert_close(points[:, 2], torch.where(in_face, 0.1, -0.2), rtol=0, atol=1e-5)


def test_depth_error_is_the_median_over_the_face_alone():
    distance = torch.tensor([3.0, 4.0, 5.0, 6.0, math.inf]).view(1, 1, 1, 5)
    truth = MeshView(distance, torch.tensor([True, True, True, False, False]).view(1, 1, 1, 5))
    depth = torch.tensor([3.1, 3.7, 5.9, 0.0, 0.0]).view(1, 1, 1, 5)
    assert depth_error(depth, truth).item() == pytest.approx(0.3, abs=1e-6)
    assert flat_face(truth)[0, 0, 0].tolist() == [4.0] * 5
    assert depth_error(flat_face(truth), truth).item() == pytest.approx(1.0)
    assert depth_error(depth, truth._replace(face=torch.zeros_like(truth.face))).isnan().all()


def test_head_depth_is_the_extent_toward_the_face():
    assert head_depth(_mesh(2, face=[0]), torch.cat([_square(0.25), _square(-0.5)], 1)).item() == pytest.approx(0.75)


def test_silhouette_scores_by_hand():
    # Mesh on pixels 0-3 of 8, opaque on 2-7: two in common, eight in either.
    distance = torch.tensor([1.0] * 4 + [math.inf] * 4).view(1, 1, 1, 8)
    truth = MeshView(distance, distance.isfinite())
    iou, recall = silhouette_scores(torch.tensor([0, 0.5, 0.6, 1, 1, 1, 1, 1]).view(1, 1, 1, 8), truth)
    assert (iou.item(), recall.item()) == (pytest.approx(2 / 8), pytest.approx(2 / 4))


def test_what_lies_behind_beside_the_mesh_or_outside_the_picture_is_not_visible():
    head, vertices, camera = _mesh(1, face=[0, 1, 2, 3]), _square(0.0), frontal(1)
    points = torch.tensor([[[0.1, 0.1, 0.0], [0.1, 0.1, -0.01], [0.1, 0.1, -0.1], [0.35, 0.0, 0.0], [0.9, 0.0, 0.0]]])
    assert visible(points, head, vertices, camera)[0].tolist() == [True, True, False, False, False]


def test_points_ride_on_the_mesh_and_cover_its_face():
    head = _mesh(2, face=[4, 5, 6, 7])
    points = face_points(head, 4000, torch.Generator().manual_seed(0))
    at = points.on(torch.cat([_square(5.0), _square(0.2)], 1))[0]
    assert (at[:, 2] - 0.2).abs().max() < 1e-6 and at[:, :2].abs().max() <= HALF_WIDTH
    assert at.mean(0)[:2].abs().max() < 0.02  # uniform in the square: its standard deviation is 0.6 / sqrt(12)
    assert at.std(0)[:2].tolist() == pytest.approx([2 * HALF_WIDTH / math.sqrt(12)] * 2, rel=0.03)
    moved = points.on(torch.cat([_square(5.0), _square(0.2) + 1.0], 1))[0]
    torch.testing.assert_close(moved, at + 1.0)


def _painted(points: torch.Tensor, resolution: int = 64) -> torch.Tensor:
    """A picture [1, 3, S, S] of the plane z = 0 as the frontal camera sees it, coloured by position relative to `points`' shift."""
    origins, directions = camera_rays(frontal(1), resolution)
    at = origins - directions * (origins[..., 2:] / directions[..., 2:]) - points
    return (2 * at).transpose(1, 2).reshape(1, 3, resolution, resolution)


def test_colours_that_ride_with_the_mesh_do_not_change_and_colours_that_stay_do():
    shift, camera = torch.tensor([0.05, -0.03, 0.0]), frontal(1)
    corners = SurfacePoints(torch.tensor([[0, 1, 2]]).expand(500, 3), torch.rand(500, 3, generator=torch.Generator().manual_seed(1)))
    points = SurfacePoints(corners.corners, corners.barycentric / corners.barycentric.sum(1, keepdim=True))
    places = points.on(_square(0.0)), points.on(_square(0.0) + shift)
    seen, order = torch.ones(1, 500, dtype=torch.bool), torch.randperm(500, generator=torch.Generator().manual_seed(2))
    still, moving = _painted(torch.zeros(3)), _painted(shift)
    follows = motion_difference(still, moving, places, seen, (camera, camera), order)
    assert follows.difference.item() < 1e-5 and follows.unmatched.item() > 0.05 and follows.share.item() == 1
    # A painting that stays behind: the colour at a point changes by 2 x shift, so |a - b| / 2 is the mean of |shift|.
    stays = motion_difference(still, still, places, seen, (camera, camera), order)
    assert stays.difference.item() == pytest.approx(float(shift.abs().mean()), abs=1e-5)


def test_random_pairs_join_only_points_that_are_seen_and_none_with_itself():
    # Black, white and, unseen, grey: two seen points, so each meets the other and the difference is 1.
    image = torch.tensor([-1.0, 1.0, 0.0, 0.0]).view(1, 1, 1, 4).expand(1, 3, 4, 4)
    camera = frontal(1)
    width = 4.17 / float(default_intrinsics(1)[0, 0, 0])
    points = torch.tensor([[[(u - 0.5) * width, 0.0, 0.0] for u in (0.125, 0.375, 0.625)]])
    seen = torch.tensor([[True, True, False]])
    found = motion_difference(image, image, (points, points), seen, (camera, camera), torch.tensor([2, 0, 1]))
    assert found.difference.item() == 0 and found.unmatched.item() == pytest.approx(1.0) and found.share.item() == pytest.approx(2 / 3)
    nothing = motion_difference(image, image, (points, points), seen & False, (camera, camera), torch.tensor([2, 0, 1]))
    assert nothing.difference.isnan().all() and nothing.unmatched.isnan().all()


def _view_of_plane(yaw: float, off: float = 0.0, resolution: int = 48) -> HeadView:
    """The square z = 0, coloured by world position; its depth wrong by `off`."""
    camera = orbit(torch.tensor([yaw]), torch.zeros(1), torch.tensor([4.0]))
    mesh = mesh_view(_mesh(1, face=[0, 1, 2, 3]), _square(0.0), camera, resolution)
    origins, directions = camera_rays(camera, resolution)
    distance = torch.where(mesh.silhouette, mesh.distance, 4.6)
    at = origins + distance.flatten(1)[..., None] * directions
    image = (3 * at).transpose(1, 2).reshape(1, 3, resolution, resolution)
    return HeadView(image, distance + off, mesh.silhouette.float(), camera)


def test_views_of_one_surface_agree_when_warped_by_its_depth():
    first, second = _view_of_plane(-0.3), _view_of_plane(0.3)
    found = view_difference(first, second)
    assert found.difference.item() < 0.005 and found.unmatched.item() > 5 * found.difference.item()
    assert found.share.item() > 0.9
    warped = warped_view(first, second)
    inside = warped[:, :1] > -1
    assert (warped - first.image)[inside.expand_as(warped)].abs().mean() < 0.01


def test_a_wrong_depth_shows_as_a_difference_and_depths_that_disagree_share_nothing():
    right = view_difference(_view_of_plane(-0.3), _view_of_plane(0.3))
    wrong = view_difference(_view_of_plane(-0.3, 0.04), _view_of_plane(0.3, 0.04))
    assert wrong.difference.item() > 3 * right.difference.item()
    apart = view_difference(_view_of_plane(-0.3, 0.2), _view_of_plane(0.3, -0.2))
    assert apart.share.item() == 0 and apart.difference.isnan().all()


def test_the_mesh_in_place_of_a_renderer_has_no_error():
    head = load_head_model(None)
    shape, motion = torch.zeros(1, 300), Motion.neutral(1)
    vertices, camera = head.vertices(shape, motion), orbit(torch.tensor([0.3]), torch.tensor([0.1]), torch.tensor([4.17]))
    truth = mesh_view(head, vertices, camera, 32)
    assert 100 < truth.face.sum() < truth.silhouette.sum()
    assert depth_error(truth.distance, truth).item() == 0
    assert depth_error(truth.distance + 0.07, truth).item() == pytest.approx(0.07, abs=1e-5)
    iou, recall = silhouette_scores(truth.silhouette.float(), truth)
    assert iou.item() == recall.item() == 1
    assert 0.02 < depth_error(flat_face(truth), truth).item() < 0.15 and 0.5 < head_depth(head, vertices).item() < 0.8
    points = face_points(head, 300, torch.Generator().manual_seed(0)).on(vertices)
    share = visible(points, head, vertices, camera).float().mean().item()
    assert 0.5 < share < 1  # some of the face is turned away
