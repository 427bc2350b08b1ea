"""Nearest vertices: the KD-tree and the voxel lists against exhaustive search in float64."""

import pytest
import torch

from head3d.nearest import VertexIndex, nearest_by_voxels


def scene(points: int = 3000, vertices: int = 700, seed: int = 0):
    g = torch.Generator().manual_seed(seed)
    surface = torch.nn.functional.normalize(torch.randn(2, vertices, 3, generator=g), dim=-1) * torch.tensor([0.2, 0.3, 0.25])
    return torch.rand(2, points, 3, generator=g) * 1.3 - 0.65, surface


def distances(points, vertices, found):
    return (points - vertices[found]).double().norm(dim=-1)


@pytest.mark.parametrize("method", ["tree", "voxels"])
def test_the_found_vertex_is_the_nearest(method):
    points, vertices = scene()
    points = torch.cat([points, vertices[:, :50], vertices[:, :50] * 30], dim=1)  # on vertices, and far outside
    found = VertexIndex(vertices).query(points) if method == "tree" else torch.stack(list(map(nearest_by_voxels, points, vertices)))
    for b in range(2):
        best = torch.cdist(points[b].double(), vertices[b].double()).amin(1)
        torch.testing.assert_close(distances(points[b], vertices[b], found[b]), best, rtol=1e-6, atol=1e-7)
        assert found[b, 3000:3050].tolist() == list(range(50))


@pytest.mark.parametrize("voxels_per_side", [1, 7, 64])
def test_the_number_of_voxels_changes_nothing(voxels_per_side):
    points, vertices = scene(500)
    assert torch.equal(nearest_by_voxels(points[0], vertices[0], voxels_per_side), nearest_by_voxels(points[0], vertices[0]))


def test_chunks_change_nothing(monkeypatch):
    points, vertices = scene(400)
    expected = nearest_by_voxels(points[0], vertices[0])
    for budget in (1, 100, 5000):
        monkeypatch.setattr("head3d.nearest.PAIRS_PER_CHUNK_CPU", budget)
        assert torch.equal(nearest_by_voxels(points[0], vertices[0]), expected)


def test_one_point_one_vertex_and_no_points():
    assert nearest_by_voxels(torch.zeros(1, 3), torch.ones(1, 3)).tolist() == [0]
    assert nearest_by_voxels(torch.zeros(5, 3), torch.ones(3, 3)).tolist() == [0] * 5  # equal points, equal vertices: lowest index
    assert nearest_by_voxels(torch.zeros(0, 3), torch.ones(3, 3)).shape == (0,)


def test_selected_images_share_trees_and_answer_alike():
    points, vertices = scene(200)
    index = VertexIndex(vertices)
    chosen = index.select([1, 1, 0])
    assert torch.equal(chosen.query(points[[1, 1, 0]]), index.query(points)[[1, 1, 0]])
    assert chosen._trees[0] is chosen._trees[1] is index._trees[1]


@pytest.mark.gpu
def test_cuda_finds_vertices_as_near_as_the_tree_even_with_tf32():
    points, vertices = scene(20000, 4000)
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        found = VertexIndex(vertices.cuda()).query(points.cuda()).cpu()
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False
    expected = VertexIndex(vertices).query(points)
    for b in range(2):
        torch.testing.assert_close(
            distances(points[b], vertices[b], found[b]), distances(points[b], vertices[b], expected[b]), rtol=1e-5, atol=1e-6
        )
