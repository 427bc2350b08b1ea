"""Posed to canonical space: exact cases, properties, and the published networks' recorded points."""

import numpy as np
import pytest
import torch

from head3d.deformation import Deformation, DeformationConfig
from head3d.head_model import HeadModel, load_head_model
from head3d.labels import Motion
from head3d.neck_field import _fused_dot, nearest_triangle
from head3d.rotations import axis_angle_to_matrix

CANONICAL = Motion.neutral(1)._replace(jaw_pose=torch.tensor([[0.3, 0.0, 0.0]]))


def box_points(count: int, batch: int = 1, side: float = 1.2, seed: int = 0) -> torch.Tensor:
    return (torch.rand(batch, count, 3, generator=torch.Generator().manual_seed(seed)) - 0.5) * side


def random_motion(batch: int, neck: float = 0.0, seed: int = 1) -> tuple[torch.Tensor, Motion]:
    g = torch.Generator().manual_seed(seed)
    draws = [torch.randn(batch, size, generator=g) * scale for size, scale in ((300, 0.7), (100, 0.7), (3, neck), (3, 0.1), (6, 0.15))]
    return draws[0], Motion(*draws[1:])


@pytest.mark.parametrize("part", ["head", "eyes", "mouth"])
def test_the_canonical_motion_is_the_identity(small_head, part):
    deformation = Deformation(small_head)
    posed = deformation.prepare(torch.zeros(1, 300), CANONICAL)
    points = box_points(500)
    assert posed.neck_field is None
    assert deformation.remove_neck(points, posed) is points
    torch.testing.assert_close(deformation.to_canonical(points, posed, part), points, rtol=0, atol=1e-6)


def test_vertices_go_to_their_canonical_places(small_head):
    deformation = Deformation(small_head)
    shape, motion = random_motion(2)
    posed = deformation.prepare(shape, motion)
    regions = small_head.regions
    for part, ids, mesh in (
        ("head", regions.head, posed.vertices_without_neck),
        ("eyes", regions.eyeballs, posed.vertices_without_neck),
        ("mouth", regions.lips, posed.vertices_mouth),
    ):
        found = deformation.to_canonical(mesh[:, ids], posed, part)
        torch.testing.assert_close(found, small_head.canonical_vertices[ids].expand(2, -1, -1), rtol=0, atol=1e-5)


def slow_canonical(point, targets, canonical, subset, ring):
    """The definition, one point at a time in float64: nearest vertex, then its ring weighted by inverse squared distance."""
    targets, canonical, point = targets.double(), canonical.double(), point.double()
    nearest = subset[(targets[subset] - point).norm(dim=1).argmin()]
    total, offset = 0.0, torch.zeros(3, dtype=torch.float64)
    for j in ring[nearest].tolist():
        if j < len(targets):
            weight = 1 / ((point - targets[j]).square().sum() + 1e-10)
            total, offset = total + weight, offset + weight * (canonical[j] - targets[j])
    return (point + offset / total).float()


@pytest.mark.parametrize("part", ["head", "eyes", "mouth"])
def test_canonical_points_equal_the_definition_computed_slowly(small_head, part):
    deformation = Deformation(small_head)
    shape, motion = random_motion(2)
    posed = deformation.prepare(shape, motion)
    subset = {"head": small_head.regions.head, "eyes": small_head.regions.eyeballs, "mouth": small_head.regions.lips}[part]
    mesh = posed.vertices_mouth if part == "mouth" else posed.vertices_without_neck
    points = box_points(60, batch=2)
    found = deformation.to_canonical(points, posed, part)
    for b in range(2):
        expected = torch.stack([slow_canonical(p, mesh[b], small_head.canonical_vertices, subset, small_head.ring) for p in points[b]])
        torch.testing.assert_close(found[b], expected, rtol=0, atol=1e-5)


def test_chunks_change_nothing(small_head, monkeypatch):
    deformation = Deformation(small_head)
    posed = deformation.prepare(*random_motion(1))
    points = box_points(300)
    expected = deformation.to_canonical(points, posed, "head")
    monkeypatch.setattr("head3d.deformation.POINTS_PER_CHUNK_CPU", 7)
    assert torch.equal(deformation.to_canonical(points, posed, "head"), expected)


def test_a_rotated_jaw_moves_points_at_the_mouth_and_not_at_the_forehead(small_head):
    deformation = Deformation(small_head)
    posed = deformation.prepare(torch.zeros(1, 300), CANONICAL._replace(jaw_pose=torch.tensor([[0.05, 0.0, 0.0]])))
    weights = small_head.weights
    chin = (weights[:, 2] > 0.9).nonzero()[:, 0]
    forehead = (small_head.template[:, 1] > 0.25).nonzero()[:, 0]
    vertices = posed.vertices_without_neck
    moved = {
        name: (deformation.to_canonical(vertices[:, ids], posed, "head") - vertices[:, ids]).norm(dim=-1)
        for name, ids in (("chin", chin), ("forehead", forehead))
    }
    assert moved["chin"].min() > 0.02
    assert moved["forehead"].max() < 0.005  # pose correctives only


def test_gaze_turns_the_eye_part_and_leaves_the_skin(small_head):
    deformation = Deformation(small_head)
    gaze = Motion.neutral(1)._replace(jaw_pose=CANONICAL.jaw_pose, eye_pose=torch.tensor([[0.0, 0.3, 0.0, 0.0, 0.3, 0.0]]))
    still, turned = (deformation.prepare(torch.zeros(1, 300), motion) for motion in (CANONICAL, gaze))
    left = small_head.regions.left_eyeball
    centre = small_head.canonical_vertices[left].mean(0)
    pupil = torch.tensor([0.0, 0.0, 0.036])
    points = (centre + pupil)[None, None]
    carried = deformation.to_canonical(points, turned, "eyes")[0, 0]
    expected = centre + axis_angle_to_matrix(torch.tensor([0.0, -0.3, 0.0])) @ pupil  # looking left: what is in front was to the right
    assert (carried - expected).norm() < 0.004  # facets and pose correctives
    around = box_points(400, side=0.3) + centre
    difference = deformation.to_canonical(around, turned, "head") - deformation.to_canonical(around, still, "head")
    assert difference.abs().max() < 0.005


def test_the_mouth_part_ignores_expression_and_gaze(small_head):
    deformation = Deformation(small_head)
    shape, motion = random_motion(1)
    other = motion._replace(expression=motion.expression + 1, eye_pose=motion.eye_pose + 0.2)
    points = box_points(300, side=0.5)
    first, second = (deformation.to_canonical(points, deformation.prepare(shape, m), "mouth") for m in (motion, other))
    assert torch.equal(first, second)


def test_eye_boxes_are_as_wide_as_configured(small_head):
    deformation = Deformation(small_head, DeformationConfig(eye_box_scale=1.2))
    posed = deformation.prepare(*random_motion(2))
    for side, ids in enumerate((small_head.regions.left_eyeball, small_head.regions.right_eyeball)):
        eye = posed.vertices_without_neck[:, ids]
        centre, extent = eye.mean(1, keepdim=True), (eye.amax(1) - eye.amin(1))[:, None]
        assert deformation.inside_eye_boxes(eye, posed).float().mean() > 0.99
        step = torch.eye(3)[side] * extent
        assert deformation.inside_eye_boxes(centre + 0.59 * step, posed).all()
        assert not deformation.inside_eye_boxes(centre + 0.61 * step, posed).any()


def test_views_of_one_motion_share_the_trees_and_get_the_same_points(small_head):
    deformation = Deformation(small_head)
    posed = deformation.prepare(*random_motion(2, neck=0.2))
    views = posed.expand_views(3)
    assert views.parts["head"].index._trees[1] is posed.parts["head"].index._trees[0]
    points = box_points(200, batch=2)
    many = points.repeat_interleave(3, 0)
    expected = deformation.remove_neck(points, posed)
    found = deformation.remove_neck(many, views)
    assert torch.equal(found, expected.repeat_interleave(3, 0))
    for part in ("head", "eyes", "mouth"):
        one = deformation.to_canonical(expected, posed, part)
        assert torch.equal(deformation.to_canonical(found, views, part), one.repeat_interleave(3, 0))
    assert torch.equal(deformation.inside_eye_boxes(found, views), deformation.inside_eye_boxes(expected, posed).repeat_interleave(3, 0))
    alone = posed.select([1])
    assert torch.equal(deformation.to_canonical(points[1:], alone, "head"), deformation.to_canonical(points, posed, "head")[1:])


# Stage A: the neck -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rigid_head(small_head_arrays):
    """All skin hangs on the neck joint and nothing corrects for pose: a turned neck is a rigid motion."""
    weights = small_head_arrays["weights"].copy()
    weights[:, 1] += weights[:, 0]
    weights[:, 0] = 0
    return HeadModel.from_arrays(small_head_arrays | {"weights": weights, "posedirs": small_head_arrays["posedirs"] * 0})


@pytest.mark.parametrize("published", [False, True])
def test_a_rigid_turn_of_the_neck_is_undone_exactly_between_the_grids_centres(rigid_head, published):
    deformation = Deformation(rigid_head, DeformationConfig(published=published))
    turn = torch.tensor([[0.1, -0.5, 0.2]])
    posed = deformation.prepare(torch.zeros(1, 300), CANONICAL._replace(neck_pose=turn))
    near = posed.vertices_posed[:, rigid_head.regions.head]  # full trust in the fine grid
    expected = near @ axis_angle_to_matrix(turn)[0]  # row vectors: the inverse rotation about the neck joint, the origin
    torch.testing.assert_close(deformation.remove_neck(near, posed), expected, rtol=0, atol=2e-5)


def test_a_batch_with_one_turned_neck_leaves_the_other_heads_points(small_head):
    deformation = Deformation(small_head)
    shape, motion = random_motion(2)
    turned = motion._replace(neck_pose=torch.tensor([[0.0, 0.0, 0.0], [0.0, 0.4, 0.0]]))
    posed = deformation.prepare(shape, turned)
    points = box_points(300, batch=2)
    moved = (deformation.remove_neck(points, posed) - points).norm(dim=-1)
    assert moved[0].max() < 1e-5 and moved[1].mean() > 0.05


def test_turned_vertices_return_to_where_the_unturned_neck_has_them(small_head):
    deformation = Deformation(small_head)
    shape, motion = random_motion(1, neck=0.2)
    posed = deformation.prepare(shape, motion)
    skin = small_head.regions.head
    before = (posed.vertices_posed - posed.vertices_without_neck)[0, skin].norm(dim=-1)
    after = (deformation.remove_neck(posed.vertices_posed, posed) - posed.vertices_without_neck)[0, skin].norm(dim=-1)
    assert after.mean() < 0.05 * before.mean() and after.quantile(0.95) < 0.2 * before.mean()  # grid cells are 0.054 wide


def test_the_offset_continues_past_the_outermost_cells_by_default_and_fades_as_published(small_head):
    shape, motion = random_motion(1, neck=0.2)
    edge = torch.tensor([[[0.0, 0.1, 0.6]]])
    rim = 0.65 * (1 - 1 / 8)  # the coarse grid's outermost centre
    fields = {p: Deformation(small_head, DeformationConfig(published=p)) for p in (False, True)}
    offset = {
        (p, z): (d.remove_neck(at, d.prepare(shape, motion)) - at).norm()
        for p, d in fields.items()
        for z, at in (("rim", edge.clone().index_fill_(2, torch.tensor(2), rim)), ("edge", edge))
    }
    assert abs(offset[False, "edge"] / offset[False, "rim"] - 1) < 0.05
    assert offset[True, "edge"] < 0.9 * offset[True, "rim"]


def test_the_nearest_triangle_equals_a_dense_search_over_sampled_surface_points():
    g = torch.Generator().manual_seed(0)
    triangles = torch.randn(40, 1, 3, generator=g) + 0.3 * torch.randn(40, 3, 3, generator=g)
    points = torch.randn(100, 3, generator=g) * 1.5
    found = nearest_triangle(points, triangles)
    steps = torch.linspace(0, 1, 60)
    u, v = torch.meshgrid(steps, steps, indexing="ij")
    inside = (u + v) <= 1 + 1e-6
    weights = torch.stack([1 - u - v, u, v], -1)[inside]  # [s, 3]
    surface = torch.einsum("sk,fkc->fsc", weights, triangles)
    dense = torch.cdist(points, surface.flatten(0, 1)).amin(1)
    distance = found.distance_squared.sqrt()
    assert (distance <= dense + 1e-5).all() and (dense - distance).max() < 0.02
    closest = (found.closest[..., None] * triangles[found.face]).sum(1)
    torch.testing.assert_close((closest - points).norm(dim=-1), distance, rtol=1e-4, atol=1e-5)
    assert (found.closest >= -1e-6).all()


def test_small_triangles_are_measured_to_their_edges_when_asked():
    triangle = torch.tensor([[[0.0, 0, 0], [1, 0, 0], [0, 1, 0]]])
    above = torch.tensor([[0.25, 0.25, 0.5]])
    assert nearest_triangle(above, triangle).distance_squared.item() == pytest.approx(0.25)
    to_edges = nearest_triangle(above, triangle, min_area=0.6).distance_squared.item()  # the triangle's area is 0.5
    assert to_edges == pytest.approx(0.25 + 0.25**2)


def test_dot_products_of_the_published_stage_round_once_a_step_as_fused_operations_do():
    near_one, tiny = 1 + 2.0**-12, 2.0**-24  # near_one squared is 1 + 2^-11 + 2^-24, which float32 rounds to 1 + 2^-11
    square = 1 + 2.0**-11
    for a, b, expected in (
        ((near_one, 1, 0), (near_one, -1, 0), 2.0**-11 + tiny),  # x exact, y rounded before: y's product is exact here
        ((1, near_one, 0), (-1, near_one, 0), 2.0**-11),  # y's square is rounded
        ((0, -1, near_one), (0, 1, near_one), 2.0**-11 + tiny),  # z exact, added last
        ((near_one, 0, 1), (near_one, 0, -1), 2.0**-11),  # x's square is exact, but rounded before z is added
    ):
        assert _fused_dot(torch.tensor(a), torch.tensor(b)).item() == expected
    assert (torch.tensor(near_one) * torch.tensor(near_one)).item() == square


# The published networks' recorded points ---------------------------------------------------------------------------------

PARTS = (("head", "face"), ("eyes", "eye"), ("mouth", "mouth"))  # ours, theirs


def recorded(parity, pose_key):
    with np.load(parity / "genhead" / "io.npz") as file:
        names = [name for name in file.files if name.startswith(("shape", "expression", "pose", "eye_pose", "query", "deform_"))]
        record = {name: torch.from_numpy(file[name]).float() for name in names}
    pose = record[pose_key]
    return record, Motion(record["expression"], pose[:, :3], pose[:, 3:], record["eye_pose"])


def test_canonical_points_equal_the_recorded_ones(parity):
    record, motion = recorded(parity, "pose")
    deformation = Deformation(load_head_model(parity / "head.npz"))
    posed = deformation.prepare(record["shape"], motion)
    for part, name in PARTS:
        expected = record[f"deform_canonical_{name}"]
        error = (deformation.to_canonical(record["query"], posed, part) - expected).norm(dim=-1) / expected.norm(dim=-1)
        assert (error <= 1e-4).float().mean() >= 0.995, part
    assert torch.equal(deformation.inside_eye_boxes(record["query"], posed), record["deform_inside_bbox_eye"] > 0)


def canonical_agreement(parity, motion, record):
    """Share of points within 1e-4 (relative) of the recorded ones, for each part, and of equal eye-box tests."""
    deformation = Deformation(load_head_model(parity / "head.npz"), DeformationConfig(published=True))
    posed = deformation.prepare(record["shape"], motion)
    points = deformation.remove_neck(record["query"], posed)
    shares = {}
    for part, name in PARTS:
        expected = record[f"deform_neck_canonical_{name}"]
        error = (deformation.to_canonical(points, posed, part) - expected).norm(dim=-1) / expected.norm(dim=-1)
        shares[part] = (error <= 1e-4).float().mean().item()
    inside = deformation.inside_eye_boxes(points, posed) == (record["deform_neck_inside_bbox_eye"] > 0)
    return shares, inside.float().mean().item()


def test_the_published_neck_stage_equals_the_recorded_points(parity):
    record, motion = recorded(parity, "pose_neck")
    shares, inside = canonical_agreement(parity, motion, record)
    assert min(shares.values()) >= 0.995, shares
    assert inside >= 0.999


def test_the_recorded_points_tell_a_neck_turned_two_percent_too_far(parity):
    record, motion = recorded(parity, "pose_neck")
    shares, _ = canonical_agreement(parity, motion._replace(neck_pose=motion.neck_pose * 1.02), record)
    assert max(shares.values()) < 0.05, shares
