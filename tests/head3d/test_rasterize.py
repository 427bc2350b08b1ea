"""The rasteriser against a per-pixel loop, hand-computed pictures and its optional backends."""

import sys

import pytest
import torch

from head3d import rasterize as module
from head3d.cameras import Camera, default_intrinsics, frontal, look_at, orbit, project
from head3d.head_model import load_head_model
from head3d.labels import Motion
from head3d.rasterize import correspondence_map, interpolate, part_masks, rasterize
from head3d.run.errors import ConfigError


def soup(batch: int = 2, faces: int = 60, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Random triangles around the origin."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(batch, faces, 1, 3, generator=generator) * 0.2
    vertices = centres + torch.randn(batch, faces, 3, 3, generator=generator) * 0.15
    return vertices.flatten(1, 2), torch.arange(faces * 3).view(faces, 3)


def skewed_camera() -> Camera:
    intrinsics = default_intrinsics(2)
    intrinsics[0] = torch.tensor([[3.0, 0.2, 0.4], [0.0, 4.0, 0.6], [0.0, 0.0, 1.0]])
    return orbit(torch.tensor([0.3, -0.7]), torch.tensor([0.2, -0.1]), torch.tensor([4.1, 3.7]), intrinsics=intrinsics)


def per_pixel_reference(vertices, faces, camera, resolution, cull_backfaces):
    """One pixel, one face at a time, in float64."""
    uv, depths = project(vertices.double(), Camera(camera.c2w.double(), camera.intrinsics.double()))
    face_ids = torch.full((len(vertices), resolution, resolution), -1)
    nearest = torch.full(face_ids.shape, torch.inf, dtype=torch.float64)
    for b in range(len(vertices)):
        for f, corner_ids in enumerate(faces.tolist()):
            a, b_, c = (uv[b, corner_ids] * resolution).tolist()
            z = depths[b, corner_ids].tolist()
            area = (b_[0] - a[0]) * (c[1] - a[1]) - (b_[1] - a[1]) * (c[0] - a[0])
            if min(z) <= 0 or area == 0 or (cull_backfaces and area > 0):
                continue
            for i in range(resolution):
                for j in range(resolution):
                    p = (j + 0.5, i + 0.5)
                    cross = [(q[0] - p[0]) * (r[1] - p[1]) - (q[1] - p[1]) * (r[0] - p[0]) for q, r in ((b_, c), (c, a), (a, b_))]
                    weights = [value / area for value in cross]
                    if min(weights) < 0:
                        continue
                    depth = 1 / sum(w / d for w, d in zip(weights, z, strict=True))
                    if depth < nearest[b, i, j]:
                        nearest[b, i, j], face_ids[b, i, j] = depth, f
    return face_ids, nearest


@pytest.mark.parametrize("cull_backfaces", [False, True])
def test_face_ids_and_depth_equal_a_per_pixel_loop(cull_backfaces):
    vertices, faces = soup(faces=25)
    expected_ids, expected_depth = per_pixel_reference(vertices, faces, skewed_camera(), 20, cull_backfaces)
    raster = rasterize(vertices, faces, skewed_camera(), 20, cull_backfaces=cull_backfaces)
    assert (expected_ids >= 0).float().mean() > 0.2
    assert torch.equal(raster.face_ids, expected_ids)
    torch.testing.assert_close(raster.depth, expected_depth.float(), rtol=1e-5, atol=1e-5)


def test_a_triangle_facing_the_camera_covers_the_pixels_computed_by_hand():
    # fx = 1 at distance 1: the picture shows x, y in [-0.5, 0.5]. On 4 x 4 pixels the right angle at the top left
    # with legs of 2.2 pixels covers the centres (0.5, 0.5), (1.5, 0.5), (0.5, 1.5), because u + v <= 2.2.
    intrinsics = torch.tensor([[[1.0, 0.0, 0.5], [0.0, 1.0, 0.5], [0.0, 0.0, 1.0]]])
    camera = look_at(torch.tensor([[0.0, 0.0, 1.0]]), torch.zeros(1, 3), intrinsics=intrinsics)
    leg = 2.2 / 4
    vertices = torch.tensor([[[-0.5, 0.5, 0.0], [-0.5, 0.5 - leg, 0.0], [-0.5 + leg, 0.5, 0.0]]])  # counter-clockwise
    raster = rasterize(vertices, torch.tensor([[0, 1, 2]]), camera, 4, cull_backfaces=True)
    assert raster.face_ids[0].tolist() == [[0, 0, -1, -1], [0, -1, -1, -1], [-1] * 4, [-1] * 4]
    torch.testing.assert_close(raster.depth[0, 0, 0], torch.tensor(1.0))
    turned = rasterize(vertices, torch.tensor([[0, 2, 1]]), camera, 4, cull_backfaces=True)
    assert (turned.face_ids == -1).all() and turned.depth.isinf().all()


def test_interpolated_vertex_positions_lie_on_the_pixel_rays_at_the_reported_depth():
    vertices, faces = soup()
    camera = skewed_camera()
    raster = rasterize(vertices, faces, camera, 33)
    uv, depth = project(interpolate(raster, faces, vertices).flatten(2).transpose(1, 2), camera)
    hit = (raster.face_ids >= 0).flatten(1)
    centres = (torch.arange(33) + 0.5) / 33
    v, u = torch.meshgrid(centres, centres, indexing="ij")
    expected = torch.stack([u, v], -1).reshape(1, -1, 2).expand_as(uv)
    torch.testing.assert_close(uv[hit], expected[hit], rtol=0, atol=1e-5)
    torch.testing.assert_close(depth[hit], raster.depth.flatten(1)[hit], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(raster.barycentric.sum(-1).flatten(1)[hit], torch.ones(int(hit.sum())))


def test_attributes_shared_by_the_batch_and_attributes_per_mesh_agree():
    vertices, faces = soup()
    raster = rasterize(vertices, faces, frontal(2), 16)
    attributes = torch.randn(vertices.shape[1], 5, generator=torch.Generator().manual_seed(1))
    shared = interpolate(raster, faces, attributes)
    assert shared.shape == (2, 5, 16, 16)
    assert torch.equal(shared, interpolate(raster, faces, attributes.expand(2, -1, -1)))
    assert (shared.movedim(1, -1)[raster.face_ids < 0] == 0).all()


def test_result_does_not_depend_on_batch_or_chunk():
    vertices, faces = soup(batch=3, faces=80)
    camera = frontal(3)
    together = rasterize(vertices, faces, camera, 32)
    for b in range(3):
        alone = rasterize(vertices[b : b + 1], faces, camera.select(slice(b, b + 1)), 32)
        assert torch.equal(alone.face_ids[0], together.face_ids[b]) and torch.equal(alone.depth[0], together.depth[b])
    uv, depth = project(vertices, camera)
    corners = torch.cat([uv * 32, depth[..., None]], -1)[:, faces]
    for pairs in (1, 7, 1000):
        assert torch.equal(module._nearest_faces(corners, 32, False, pairs_per_chunk=pairs), together.face_ids)


def test_turning_world_and_camera_together_changes_nothing():
    vertices, faces = soup(batch=1)
    camera = frontal(1)
    turn = torch.linalg.matrix_exp(torch.tensor([[0.0, -0.4, 0.2], [0.4, 0.0, -0.3], [-0.2, 0.3, 0.0]]))
    c2w = camera.c2w.clone()
    c2w[:, :3] = turn @ c2w[:, :3]
    first = rasterize(vertices, faces, camera, 40)
    second = rasterize(vertices @ turn.T, faces, Camera(c2w, camera.intrinsics), 40)
    assert (first.face_ids == second.face_ids).float().mean() > 0.998  # rounding moves edges by parts of 1e-6 pixels


def test_a_pixel_centre_on_a_shared_edge_is_covered_and_equal_depths_go_to_the_lower_face():
    intrinsics = torch.tensor([[[1.0, 0.0, 0.5], [0.0, 1.0, 0.5], [0.0, 0.0, 1.0]]])
    camera = look_at(torch.tensor([[0.0, 0.0, 1.0]]), torch.zeros(1, 3), intrinsics=intrinsics)
    square = torch.tensor([[[-0.5, 0.5, 0.0], [-0.5, -0.5, 0.0], [0.5, -0.5, 0.0], [0.5, 0.5, 0.0]]])
    ids = rasterize(square, torch.tensor([[0, 1, 2], [0, 2, 3]]), camera, 4).face_ids[0]
    assert (ids >= 0).all() and ids.diagonal().tolist() == [0, 0, 0, 0]  # the diagonal runs through pixel centres
    assert (rasterize(square, torch.tensor([[0, 1, 2], [0, 1, 2]]), camera, 4).face_ids.unique() != 1).all()


def test_faces_behind_off_screen_and_degenerate_are_dropped():
    vertices = torch.tensor([[[0.0, 0, 9], [1, 0, 9], [0, 1, 9], [90, 0, 0], [91, 0, 0], [90, 1, 0], [0, 0, 0], [0, 0, 0], [0.1, 0, 0]]])
    raster = rasterize(vertices, torch.arange(9).view(3, 3), frontal(1), 16)
    assert (raster.face_ids == -1).all()


@pytest.mark.parametrize("backend", ["pytorch3d", "warp"])
@pytest.mark.parametrize("cull_backfaces", [False, True])
def test_optional_backend_finds_the_same_faces(backend, cull_backfaces):
    pytest.importorskip(backend)
    vertices, faces = soup(faces=200)
    expected = rasterize(vertices, faces, skewed_camera(), 64, cull_backfaces=cull_backfaces)
    raster = rasterize(vertices, faces, skewed_camera(), 64, cull_backfaces=cull_backfaces, backend=backend)
    same = raster.face_ids == expected.face_ids
    assert same.float().mean() >= 0.9999
    assert (raster.depth[same & (raster.face_ids >= 0)] - expected.depth[same & (raster.face_ids >= 0)]).abs().max() < 1e-4


@pytest.mark.parametrize(("backend", "remedy"), [("pytorch3d", "build it for your torch"), ("warp", r"pip install 'head-foundry\[warp\]'")])
def test_a_backend_that_is_not_installed_is_an_error_that_says_how_to_install_it(monkeypatch, backend, remedy):
    monkeypatch.setitem(sys.modules, backend, None)  # what Python takes for a package that is not there
    message = rf"rasterizer: {backend} is asked for, .*{remedy}.*, or set --rasterizer torch"
    vertices, faces = soup()
    with pytest.raises(ConfigError, match=message):
        rasterize(vertices, faces, frontal(2), 8, backend=backend)
    with pytest.raises(ConfigError, match=message):
        load_head_model(None, backend)
    assert load_head_model(None).rasterizer == "torch"


def test_masks_and_maps_are_drawn_by_the_head_s_rasterizer(small_head, monkeypatch):
    used, drawn = [], module.rasterize

    def recorded(*arguments, backend, **settings):
        used.append(backend)
        return drawn(*arguments, **settings)

    monkeypatch.setattr(module, "rasterize", recorded)
    monkeypatch.setattr(small_head, "rasterizer", "warp")
    vertices = small_head.vertices(torch.zeros(1, 300), Motion.neutral(1))
    for published in (False, True):
        part_masks(small_head, vertices, frontal(1), 8, raster_resolution=16, published=published)
    correspondence_map(small_head, vertices, frontal(1), 8)
    assert used == ["warp"] * 6


@pytest.mark.gpu
def test_cuda_finds_the_same_faces_as_the_cpu():
    vertices, faces = soup(faces=200)
    expected = rasterize(vertices, faces, skewed_camera(), 64)
    raster = rasterize(vertices.cuda(), faces.cuda(), skewed_camera().to("cuda"), 64)
    assert (raster.face_ids.cpu() == expected.face_ids).float().mean() >= 0.9999
