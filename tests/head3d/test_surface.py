"""Surfaces: a sphere has its radius, place, colours and outward normals, is closed, also where the box cuts it, and survives its files."""

import numpy as np
import pytest
import torch
import trimesh

from head3d.pictures import SYNTHETIC_NOTICE
from head3d.run.errors import DataError
from head3d.surface import SurfaceConfig, extract_surface, save_mesh

RADIUS, CENTRE = 0.4, (0.1, -0.05, 0.02)


def ball(points, radius=RADIUS, centre=CENTRE):
    """Raw density 25 at the radius, falling outwards; red, green and blue grow with the direction's x, y and z."""
    outward = points - torch.tensor(centre)
    away = outward.norm(dim=-1)
    return outward / away[:, None] / 2 + 0.5, 25 + 200 * (radius - away)


@pytest.fixture(scope="module")
def sphere():
    return extract_surface(ball, SurfaceConfig(resolution=40))


def test_a_sphere_has_its_radius_and_place_and_is_closed(sphere):
    away = np.linalg.norm(sphere.vertices - CENTRE, axis=1)
    assert np.abs(away - RADIUS).max() < 1e-3  # the raw density is linear along the radius
    assert sphere.is_watertight and sphere.is_winding_consistent and sphere.euler_number == 2
    assert sphere.volume == pytest.approx(4 / 3 * np.pi * RADIUS**3, rel=0.02)  # negative if the triangles were wound inwards


def test_normals_point_outwards(sphere):
    outward = (sphere.vertices - CENTRE) / RADIUS
    assert (sphere.vertex_normals * outward).sum(1).min() > 0.9


def test_vertices_have_the_colours_of_the_side_that_they_show(sphere):
    outward = (sphere.vertices - CENTRE) / np.linalg.norm(sphere.vertices - CENTRE, axis=1, keepdims=True)
    assert np.abs(sphere.visual.vertex_colors[:, :3] - (outward + 1) / 2 * 255).max() <= 3


def test_a_vertex_has_the_colour_that_a_ray_against_its_normal_sees():
    """Black around the ball and on its outermost 10 mm, white inside: a soft ball is seen through, a hard one is black."""

    def hollow(points, steepness):
        away = (points - torch.tensor(CENTRE)).norm(dim=-1)
        return (away < RADIUS - 0.03).float()[:, None].expand(-1, 3), 25 + steepness * (RADIUS - away)

    def brightness(steepness):
        mesh = extract_surface(lambda points: hollow(points, steepness), SurfaceConfig(resolution=24))
        return mesh.visual.vertex_colors[:, 0].mean() / 255

    assert brightness(5000) < 0.1 and brightness(0.1) == pytest.approx(seen_behind(), abs=0.05)


def seen_behind():
    """Share of the light from more than 0.03 behind the surface along a ray of density 24 between 0.03 before and 0.09 behind."""
    front, whole = 1 - np.exp(-24 * 0.06), 1 - np.exp(-24 * 0.12)
    return (whole - front) / whole


def test_the_axes_are_not_swapped():
    mesh = extract_surface(lambda points: ball(points * torch.tensor([1.0, 2.0, 0.5]), 0.2, (0.0, 0.0, 0.0)), SurfaceConfig(resolution=40))
    assert np.allclose(mesh.bounds, [[-0.2, -0.1, -0.4], [0.2, 0.1, 0.4]], atol=0.01)


def test_what_the_box_cuts_is_closed_at_its_side():
    mesh = extract_surface(lambda points: ball(points, 0.4, (0.0, -0.5, 0.0)), SurfaceConfig(resolution=40))
    assert mesh.is_watertight and mesh.volume > 0
    assert -0.65 - 1.3 / 39 < mesh.vertices[:, 1].min() <= -0.65


def test_the_threshold_is_a_density_after_the_activation():
    for threshold in (5.0, 24.0, 60.0):
        mesh = extract_surface(ball, SurfaceConfig(resolution=40, threshold=threshold))
        expected = RADIUS + (24 - np.log(np.expm1(threshold))) / 200  # raw = 1 + softplus^-1(threshold)
        assert np.linalg.norm(mesh.vertices - CENTRE, axis=1).mean() == pytest.approx(expected, abs=1e-3)


def test_the_field_is_asked_in_chunks(monkeypatch):
    monkeypatch.setattr("head3d.surface.POINTS_PER_CHUNK", 1000)
    asked = []
    mesh = extract_surface(lambda points: asked.append(len(points)) or ball(points), SurfaceConfig(resolution=20))
    assert max(asked) == 1000 and sum(asked) == 20**3 + 13 * len(mesh.vertices)


@pytest.mark.parametrize("raw", [0.0, float("nan")])
def test_a_field_without_surface_is_an_error_with_the_densities_found(raw):
    empty = SurfaceConfig(resolution=8, threshold=7.0)
    with pytest.raises(DataError, match=r"above the threshold, 7 per scene unit.*found .* to .*`threshold`"):
        extract_surface(lambda points: (points, torch.full((len(points),), raw)), empty)


@pytest.mark.parametrize("suffix", [".ply", ".obj"])
def test_a_mesh_file_holds_the_mesh_and_says_what_it_is(sphere, tmp_path, suffix):
    path = tmp_path / f"head{suffix}"
    save_mesh(path, sphere)
    loaded = trimesh.load(path, process=False)
    assert np.allclose(loaded.vertices, sphere.vertices, atol=1e-6) and (loaded.faces == sphere.faces).all()
    assert (loaded.visual.vertex_colors == sphere.visual.vertex_colors).all()
    text = path.read_bytes()[:500].decode("ascii", errors="ignore")
    start = "comment" if suffix == ".ply" else "#"
    assert f"{start} {SYNTHETIC_NOTICE}" in text and f"{start} Units: scene units, FLAME metres x 3" in text


def test_another_suffix_is_an_error(sphere, tmp_path):
    with pytest.raises(DataError, match=r"head.stl: expected a mesh file named .ply or .obj"):
        save_mesh(tmp_path / "head.stl", sphere)
    assert list(tmp_path.iterdir()) == []
