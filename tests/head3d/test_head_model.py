"""The head model: skinning against smplx, units and origin, regions and tables computed from the mesh."""

import pickle

import numpy as np
import pytest
import torch

from head3d import mesh_regions
from head3d.cameras import Camera, frontal, orbit, project
from head3d.head_model import HeadModel, load_head_model
from head3d.labels import Motion
from head3d.rasterize import correspondence_map, part_masks, rasterize
from head3d.rotations import axis_angle_to_matrix
from head3d.run.errors import AssetError


def random_motion(batch: int, seed: int = 0) -> tuple[torch.Tensor, Motion]:
    g = torch.Generator().manual_seed(seed)

    def draw(size: int, scale: float) -> torch.Tensor:
        return torch.randn(batch, size, generator=g) * scale

    return draw(300, 1.0), Motion(draw(100, 1.0), draw(3, 0.3), draw(3, 0.2), draw(6, 0.2))


def test_rotation_matrices_equal_scipys_and_the_zero_vector_is_exactly_the_identity():
    rotation = pytest.importorskip("scipy.spatial.transform").Rotation
    vectors = torch.randn(200, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2
    vectors[0] = 1e-9
    expected = torch.from_numpy(rotation.from_rotvec(vectors.numpy()).as_matrix())
    torch.testing.assert_close(axis_angle_to_matrix(vectors), expected, rtol=0, atol=1e-12)
    zero = torch.zeros(3, requires_grad=True)
    matrix = axis_angle_to_matrix(zero)
    assert torch.equal(matrix, torch.eye(3))
    matrix.sum().backward()
    assert zero.grad.isfinite().all()


def test_vertices_and_joints_equal_smplx(tmp_path, small_head_arrays, small_head):
    smplx = pytest.importorskip("smplx")
    (tmp_path / "FLAME_NEUTRAL.pkl").write_bytes(pickle.dumps(small_head_arrays))
    embedding = {"lmk_face_idx": np.zeros(51, np.int64), "lmk_b_coords": np.full((51, 3), 1 / 3)}
    (tmp_path / "flame_static_embedding.pkl").write_bytes(pickle.dumps(embedding))
    reference = smplx.FLAME(str(tmp_path), num_betas=300, num_expression_coeffs=100, use_face_contour=False, batch_size=3)
    shape, motion = random_motion(3)
    with torch.no_grad():
        output = reference(
            betas=shape, expression=motion.expression, global_orient=torch.zeros(3, 3), neck_pose=motion.neck_pose,
            jaw_pose=motion.jaw_pose, leye_pose=motion.eye_pose[:, :3], reye_pose=motion.eye_pose[:, 3:], transl=torch.zeros(3, 3),
        )  # fmt: skip
        origin = small_head_arrays["J_regressor"][1] @ small_head_arrays["v_template"]
        expected = (output.vertices - torch.from_numpy(origin)) * 3
        torch.testing.assert_close(small_head.vertices(shape, motion), expected, rtol=0, atol=2e-6)
        expected_joints = (output.joints[:, :5] - torch.from_numpy(origin)) * 3
        torch.testing.assert_close(small_head.joints(shape, motion), expected_joints, rtol=0, atol=2e-6)


def test_the_canonical_neck_joint_is_the_origin_and_lengths_are_three_times_metres(small_head, small_head_arrays):
    rest = small_head.joints(torch.zeros(1, 300), Motion.neutral(1))
    assert rest[0, 1].abs().max() < 1e-6
    size = np.ptp(small_head_arrays["v_template"], axis=0)
    vertices = small_head.vertices(torch.zeros(1, 300), Motion.neutral(1))[0]
    np.testing.assert_allclose((vertices.amax(0) - vertices.amin(0)).numpy(), size * 3, rtol=1e-5)
    jaw = Motion.neutral(1)._replace(jaw_pose=torch.tensor([[0.3, 0.0, 0.0]]))
    torch.testing.assert_close(small_head.canonical_vertices, small_head.vertices(torch.zeros(1, 300), jaw)[0], rtol=0, atol=1e-7)


def test_the_zero_pose_is_exact_and_each_joint_moves_only_what_it_carries(small_head):
    zero = Motion.neutral(1)
    rest = small_head.vertices(torch.zeros(1, 300), zero)
    assert torch.equal(rest[0], small_head.template)
    eyes = zero._replace(eye_pose=torch.tensor([[0.0, 0.4, 0.0, 0.0, 0.0, 0.0]]))
    moved = (small_head.vertices(torch.zeros(1, 300), eyes) - rest)[0]
    rotation = axis_angle_to_matrix(eyes.eye_pose[:, :3]) - torch.eye(3)
    corrective = torch.nn.functional.pad(rotation.flatten(), (18, 9)) @ small_head.basis[400:]  # features: neck, jaw, left eye, right eye
    right = small_head.regions.right_eyeball
    torch.testing.assert_close(moved[right], corrective.view(-1, 3)[right], rtol=0, atol=1e-6)
    assert moved[small_head.regions.left_eyeball].norm(dim=-1).max() > 0.01


def test_batched_skinning_equals_one_head_at_a_time_and_has_gradients(small_head):
    shape, motion = random_motion(4)
    together = small_head.vertices(shape, motion)
    for b in range(4):
        torch.testing.assert_close(small_head.vertices(shape[b : b + 1], motion.select(slice(b, b + 1)))[0], together[b], rtol=0, atol=1e-6)
    leaf = Motion(*(part.clone().requires_grad_() for part in Motion.neutral(1)))
    small_head.vertices(torch.zeros(1, 300), leaf).square().sum().backward()
    assert all(part.grad.isfinite().all() and part.grad.abs().sum() > 0 for part in leaf)


def test_no_tensor_of_the_model_enters_a_checkpoint(small_head):
    assert small_head.state_dict() == {}


def test_the_content_hash_depends_on_the_arrays_and_not_on_the_file(tmp_path, small_head, small_head_arrays):
    np.savez(tmp_path / "head.npz", **small_head_arrays)
    (tmp_path / "head.pkl").write_bytes(pickle.dumps(dict(reversed(small_head_arrays.items()))))
    assert load_head_model(tmp_path / "head.npz").content_hash == small_head.content_hash
    assert load_head_model(str(tmp_path / "head.pkl")).content_hash == small_head.content_hash
    changed = small_head_arrays | {"v_template": small_head_arrays["v_template"] * 1.0001}
    assert HeadModel.from_arrays(changed).content_hash != small_head.content_hash


def test_regions_of_a_mesh_without_vertex_sets(small_head):
    regions, count = small_head.regions, len(small_head.template)
    assert torch.equal(torch.cat([regions.head, regions.eyeballs]).sort().values, torch.arange(count))
    assert len(regions.left_eyeball) == len(regions.right_eyeball) == len(regions.eyeballs) / 2
    assert (small_head.template[regions.left_eyeball, 0] > 0).all() and (small_head.template[regions.right_eyeball, 0] < 0).all()
    lips, face = small_head.template[regions.lips], small_head.template[regions.face]
    assert lips[:, 0].abs().max() < 0.13 and (lips[:, 2] > 0).all()
    assert (face[:, 2] > 0.1).all() and not torch.isin(regions.face, regions.eyeballs).any()
    for ids in (regions.head, regions.face, regions.lips, regions.eyelids, regions.without_inner_mouth):
        assert len(ids) and (ids.diff() > 0).all()


def test_given_vertex_sets_are_used_as_they_are(small_head_arrays):
    given = {"mask_face": np.arange(30, 90), "mask_lips": np.array([8, 5, 5, 2]), "set_eyelids_idxs": np.arange(4)}
    regions = HeadModel.from_arrays(small_head_arrays | given).regions
    assert regions.face.tolist() == list(range(30, 90))
    assert regions.lips.tolist() == [2, 5, 8] and regions.eyelids.tolist() == [0, 1, 2, 3]


def test_a_mesh_whose_mouth_cannot_be_found_says_what_to_add(small_head_arrays):
    weights = small_head_arrays["weights"].copy()
    weights[:, 1] += weights[:, 2]
    weights[:, 2] = 0
    with pytest.raises(AssetError, match="my head.*no open mouth rim.*mask_lips and mask_noinmouth"):
        HeadModel.from_arrays(small_head_arrays | {"weights": weights}, "my head")
    weights = small_head_arrays["weights"].copy()
    weights[:, 1] += weights[:, 3]
    weights[:, 3] = 0
    with pytest.raises(AssetError, match="eye joint 3 and mask_left_eyeball is absent"):
        HeadModel.from_arrays(small_head_arrays | {"weights": weights}, "my head")


def test_the_ring_lists_each_vertex_and_its_neighbours_near_to_far():
    vertices = np.array([[0.0, 0, 0], [1, 0, 0], [0, 2, 0], [3, 3, 0]])
    ring = mesh_regions.ring_table(mesh_regions.edge_matrix(vertices, np.array([[0, 1, 2], [1, 3, 2]])))
    assert ring.tolist() == [[0, 1, 2, 4], [1, 0, 2, 3], [2, 0, 1, 3], [3, 2, 1, 4]]


def test_boundary_loops_and_their_caps_close_a_strip():
    # An open band of 2 x 4 vertices: two boundary loops of four; a cap of four corners has two faces.
    top, bottom = np.arange(4), np.arange(4, 8)
    faces = [f for i in range(4) for f in ((top[i], bottom[i], top[(i + 1) % 4]), (bottom[i], bottom[(i + 1) % 4], top[(i + 1) % 4]))]
    vertices = np.array([[np.cos(i), y, np.sin(i)] for y in (1.0, 0.0) for i in np.arange(4) * np.pi / 2])
    loops = mesh_regions.boundary_loops(np.array(faces))
    assert sorted(sorted(loop.tolist()) for loop in loops) == [top.tolist(), bottom.tolist()]
    caps = [mesh_regions.triangulate(loop, vertices) for loop in loops]
    assert [len(cap) for cap in caps] == [2, 2]
    assert mesh_regions.boundary_loops(np.concatenate([np.array(faces), *caps])) == []


def test_the_computed_coarse_mesh_lies_on_the_head_and_has_its_extent(small_head):
    coarse = small_head.simplified
    assert 300 < len(coarse.indices) <= 730 and coarse.faces.max() == len(coarse.indices) - 1
    rest = small_head.template[None]
    assert (coarse.apply(rest)[0].amax(0) - small_head.template.amax(0)).abs().max() < 0.03
    camera = orbit(torch.tensor([0.6]), torch.tensor([0.2]), torch.tensor([4.2]))
    fine = rasterize(rest, small_head.faces, camera, 128).face_ids >= 0
    rough = rasterize(coarse.apply(rest), coarse.faces, camera, 128).face_ids >= 0
    assert (fine & rough).sum() / (fine | rough).sum() > 0.97


def test_computed_landmarks_stand_where_a_face_has_them(small_head):
    points = small_head.landmarks(small_head.template[None])[0]
    assert points.shape == (70, 3)
    eyes = small_head.template[small_head.regions.left_eyeball].mean(0), small_head.template[small_head.regions.right_eyeball].mean(0)
    torch.testing.assert_close(points[69, :2], eyes[0][:2], rtol=0, atol=0.01)  # person's left pupil
    torch.testing.assert_close(points[68, :2], eyes[1][:2], rtol=0, atol=0.01)
    assert points[36:42].mean(0)[0] < 0 < points[42:48].mean(0)[0]
    assert points[0, 0] < points[8, 0] < points[16, 0] and points[:17, 1].argmin() == 8
    assert points[48, 0] < points[54, 0] and points[57, 1] < points[51, 1] < points[30, 1] < points[27, 1]
    assert (points[17:, 2] > 0).all()


# Part masks and the correspondence map, which need a head ----------------------------------------------------------------


def test_the_mouth_mask_is_the_open_mouth_and_never_the_neck_hole(small_head):
    motion = Motion.neutral(2)._replace(jaw_pose=torch.tensor([[0.0, 0, 0], [0.3, 0, 0]]))
    vertices = small_head.vertices(torch.zeros(2, 300), motion)
    masks = part_masks(small_head, vertices, frontal(2), 64, raster_resolution=128)
    closed, opened = masks.mouth.mean((1, 2, 3))
    assert opened > 2 * closed > 0
    rows = torch.arange(64.0)[:, None]
    mouth_v = project(small_head.template[small_head.regions.lips].mean(0).view(1, 1, 3), frontal(1))[0][0, 0, 1] * 64
    assert abs((masks.mouth[0, 0] * rows).sum() / masks.mouth[0, 0].sum() - mouth_v) < 2
    behind = orbit(torch.tensor([3.14, 0.0]), torch.tensor([-0.9, -1.4]), torch.tensor([4.2, 4.2]))
    inside = part_masks(small_head, vertices.flip(0), behind, 64, raster_resolution=128)
    assert inside.head[0].max() == 1 and inside.mouth[0].max() == 0  # the open mouth is seen from within, through the neck
    assert part_masks(small_head, vertices, behind, 64, published=True).mouth[0].max() == 1  # the released rule labels the hole


def test_eyes_are_masked_where_they_are_seen_and_not_from_behind(small_head):
    cameras = orbit(torch.tensor([0.0, 3.14]), torch.zeros(2), torch.full((2,), 4.2))
    masks = part_masks(small_head, small_head.template.expand(2, -1, -1), cameras, 64, raster_resolution=128)
    uv, _ = project(small_head.template[None, small_head.regions.eyeballs].mean(1, keepdim=True), frontal(1))
    assert masks.eye[0].mean() > 0.005 and masks.eye[1].max() == 0
    columns = torch.arange(64.0) + 0.5
    assert abs((masks.eye[0, 0] * columns).sum() / masks.eye[0].sum() - uv[0, 0, 0] * 64) < 0.5
    assert all(mask.min() >= 0 and mask.max() <= 1 for mask in masks)
    assert (masks.eye <= masks.head).all() and (masks.mouth <= masks.head).all()


def test_the_correspondence_map_holds_canonical_positions_and_shows_gaze(small_head):
    posed = small_head.template[None]
    picture = correspondence_map(small_head, posed, frontal(1), 96)
    faces = small_head.faces_within(torch.cat([small_head.regions.face, small_head.regions.eyeballs]))
    hit = rasterize(posed, faces, frontal(1), 96, cull_backfaces=True).face_ids[0]
    assert (picture[0][:, hit < 0] == 0).all()
    middle = picture[0, :, 60, 48] * 0.6
    assert hit[60, 48] >= 0 and abs(middle[0]) < 0.01 and middle[2] > 0.1
    on_eye = torch.isin(faces[hit.clamp(min=0)][..., 0], small_head.regions.eyeballs) & (hit >= 0)
    depth = small_head.canonical_vertices[small_head.regions.eyeballs, 2]
    assert (picture[0, 2][on_eye] <= depth.max() / 0.6 - 0.5 + 1e-5).all()


def test_published_masks_and_correspondence_map_equal_the_recorded_ones(parity):
    head = load_head_model(parity / "head.npz")
    with np.load(parity / "genhead" / "io.npz") as file:
        record = {key: torch.from_numpy(file[key]).float() for key in file.files if key not in ("planes_every16",)}
    motion = Motion(record["expression"], record["pose"][:, :3], record["pose"][:, 3:], record["eye_pose"])
    vertices, camera = head.vertices(record["shape"], motion), Camera.from_label(record["camera"])
    masks = part_masks(head, vertices, camera, 64, published=True)
    for name in ("eye", "mouth", "head"):
        assert ((getattr(masks, name) - record[f"out_{name}_mask"]).abs() < 1e-3).float().mean() > 0.999, name
    picture = correspondence_map(head, vertices, camera, 512)
    assert ((picture - record["uv"]).abs() < 1e-3).all(1).float().mean() > 0.999


def test_the_built_in_head_loads_like_any_other():
    head = load_head_model("procedural")
    regions = head.regions
    assert min(map(len, (regions.face, regions.lips, regions.eyelids, regions.left_eyeball))) > 50
    assert len(regions.without_inner_mouth) < len(head.template) and len(head.mouth_cap) > 4
    assert head.vertices(*random_motion(2)).isfinite().all()
