import functools
import time

import numpy as np
import pytest
import torch
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from head3d.head_model import HeadModel
from head3d.labels import Motion
from head3d.procedural import surface
from head3d.procedural_head import BLINK_CLOSES_AT, EXPRESSIONS, SHAPES, build_procedural_head

EYEBALL_RADIUS = 0.012  # metres


@pytest.fixture(scope="module")
def arrays() -> dict[str, np.ndarray]:
    return build_procedural_head()


@pytest.fixture(scope="module")
def head(arrays) -> HeadModel:
    return HeadModel.from_arrays(arrays)


def expressed(arrays, **coefficients: float) -> np.ndarray:
    offset = sum(value * arrays["shapedirs"][:, :, 300 + EXPRESSIONS[name]] for name, value in coefficients.items())
    return arrays["v_template"] + offset


def posed(head: HeadModel, **motion: tuple[float, ...]) -> np.ndarray:
    """Vertices in metres."""
    values = {key: torch.tensor([value]) for key, value in motion.items()}
    return head.vertices(torch.zeros(1, 300), Motion.neutral()._replace(**values))[0].numpy() / 3.0


def components(faces: np.ndarray, count: int) -> np.ndarray:
    a, b = np.concatenate([faces[:, [0, 1]], faces[:, [1, 2]]]).T
    return connected_components(coo_matrix((np.ones(len(a)), (a, b)), (count, count)), directed=False)[1]


def volume(points: np.ndarray, faces: np.ndarray) -> float:
    a, b, c = (points[faces[:, i]].astype(float) for i in range(3))
    return float(np.einsum("ij,ij->", a, np.cross(b, c)) / 6.0)


def faces_of(arrays, ids: np.ndarray) -> np.ndarray:
    inside = np.zeros(len(arrays["v_template"]), bool)
    inside[ids] = True
    return arrays["f"][inside[arrays["f"]].all(1)]


def test_arrays_have_flames_keys_and_shapes(arrays):
    count = len(arrays["v_template"])
    assert 4000 <= count <= 6500
    assert arrays["shapedirs"].shape == (count, 3, 400)
    assert arrays["posedirs"].shape == (count, 3, 36)
    assert arrays["J_regressor"].shape == (5, count)
    assert arrays["weights"].shape == (count, 5)
    assert arrays["kintree_table"].tolist() == [[2**32 - 1, 0, 1, 1, 1], [0, 1, 2, 3, 4]]
    assert arrays["f"].min() == 0 and arrays["f"].max() == count - 1
    assert all(np.isfinite(values).all() for values in arrays.values() if values.dtype.kind == "f")


def test_names_match_the_tables(arrays):
    assert {name: i for i, name in enumerate(arrays["names_shape"])} == SHAPES
    assert {name: i for i, name in enumerate(arrays["names_expression"])} == EXPRESSIONS
    assert len(SHAPES) >= 12 and len(EXPRESSIONS) >= 12


def test_building_again_gives_the_same_bytes_within_seconds(arrays):
    start = time.process_time()
    again = build_procedural_head.__wrapped__()
    assert time.process_time() - start < 6.0
    assert again.keys() == arrays.keys()
    assert all(again[key].tobytes() == arrays[key].tobytes() for key in arrays)


def test_rows_of_weights_and_regressor_sum_to_one(arrays):
    np.testing.assert_allclose(arrays["weights"].sum(1), 1.0, atol=1e-5)
    assert arrays["weights"].min() >= 0.0
    np.testing.assert_allclose(arrays["J_regressor"].sum(1), 1.0, atol=1e-5)


def test_joints_are_where_anatomy_puts_them(arrays):
    root, neck, jaw, left, right = arrays["J_regressor"].astype(float) @ arrays["v_template"]
    np.testing.assert_allclose(neck, [0.0, 0.0, -0.014], atol=1e-5)
    assert root[1] < -0.08
    assert abs(jaw[0]) < 1e-5 and jaw[2] > neck[2]
    np.testing.assert_allclose(left - right, [0.062, 0.0, 0.0], atol=1e-5)
    for joint, name in ((left, "left"), (right, "right")):
        distance = np.linalg.norm(arrays["v_template"][arrays[f"mask_{name}_eyeball"]] - joint, axis=1)
        np.testing.assert_allclose(distance, EYEBALL_RADIUS, atol=1e-5)


def test_the_head_fills_the_published_frame(arrays):
    points = arrays["v_template"]
    assert 0.125 < points[:, 1].max() < 0.150  # crown; the frame shows 0.147 above and below the neck joint
    assert points[:, 1].min() < -0.160  # the neck leaves the picture
    chin = points[(np.abs(points[:, 0]) < 0.01) & (points[:, 2] > 0.07), 1].min()
    assert -0.085 < chin < -0.065
    skull = points[points[:, 1] > 0.06]
    assert 0.14 < np.ptp(skull[:, 0]) < 0.165 and 0.17 < np.ptp(skull[:, 2]) < 0.21


def test_every_piece_is_an_oriented_manifold_open_only_at_the_neck_and_behind_the_lids(arrays):
    faces, count = arrays["f"], len(arrays["v_template"])
    directed = np.concatenate([faces[:, [0, 1]], faces[:, [1, 2]], faces[:, [2, 0]]])
    assert len(np.unique(directed, axis=0)) == len(directed)  # two neighbours never run along an edge the same way
    codes = directed[:, 0] * count + directed[:, 1]
    open_edges = directed[~np.isin(codes, directed[:, 1] * count + directed[:, 0])]
    assert len(open_edges) == len(np.unique(open_edges[:, 0]))  # simple loops
    low = arrays["v_template"][open_edges[:, 0], 1] < -0.17
    assert low.sum() == 48
    joints = arrays["J_regressor"].astype(float) @ arrays["v_template"]
    pocket = arrays["v_template"][open_edges[~low, 0]]
    distance = np.minimum(*(np.linalg.norm(pocket - joint, axis=1) for joint in joints[3:]))
    assert len(pocket) == 60 and distance.max() < EYEBALL_RADIUS + 0.001 and pocket[:, 2].max() < joints[3, 2] + 0.005
    assert len(np.unique(faces)) == count  # no stray vertices


def test_no_face_is_degenerate(arrays):
    a, b, c = (arrays["v_template"][arrays["f"][:, i]].astype(float) for i in range(3))
    double_area = np.linalg.norm(np.cross(b - a, c - a), axis=1)
    assert double_area.min() > 1e-9  # square metres


def test_closed_pieces_face_outward(arrays):
    for name in ("left_eyeball", "right_eyeball", "upper_teeth", "lower_teeth", "tongue"):
        assert volume(arrays["v_template"], faces_of(arrays, arrays[f"mask_{name}"])) > 0.0, name
    sphere = volume(arrays["v_template"], faces_of(arrays, arrays["mask_left_eyeball"]))
    assert sphere == pytest.approx(4.0 / 3.0 * np.pi * EYEBALL_RADIUS**3, rel=0.03)


def test_skin_faces_look_away_from_the_middle_of_the_head(arrays):
    skin = np.setdiff1d(arrays["mask_scalp"], arrays["mask_ears"])
    faces = faces_of(arrays, skin)
    a, b, c = (arrays["v_template"][faces[:, i]].astype(float) for i in range(3))
    assert (np.einsum("ij,ij->i", np.cross(b - a, c - a), a - [0.0, 0.05, -0.01]) > 0.0).all()


def test_eyeballs_are_two_components_of_their_own_at_the_end(arrays):
    labels = components(arrays["f"], len(arrays["v_template"]))
    left, right = arrays["mask_left_eyeball"], arrays["mask_right_eyeball"]
    for ids in (left, right):
        assert len(np.unique(labels[ids])) == 1
        assert (labels == labels[ids[0]]).sum() == len(ids)
    assert labels[left[0]] != labels[right[0]]
    assert np.union1d(left, right).tolist() == list(range(len(labels) - len(left) - len(right), len(labels)))
    assert arrays["v_template"][left, 0].mean() > 0.0 > arrays["v_template"][right, 0].mean()


def test_the_head_is_mirror_symmetric(arrays):
    points = arrays["v_template"]
    mirrored = {tuple(p) for p in np.round(points * [-1e5, 1e5, 1e5]).astype(int).tolist()}
    found = [tuple(p) in mirrored for p in np.round(points * 1e5).astype(int).tolist()]
    assert np.mean(found) > 0.98


def test_jaw_moves_chin_and_lower_teeth_but_not_forehead_or_upper_teeth(arrays, head):
    moved = np.linalg.norm(posed(head, jaw_pose=(0.3, 0.0, 0.0)) - posed(head), axis=1)
    points = arrays["v_template"]
    chin = np.flatnonzero((np.abs(points[:, 0]) < 0.012) & (points[:, 2] > 0.085) & (points[:, 1] < -0.055) & (points[:, 1] > -0.07))
    assert moved[chin].min() > 0.02
    assert moved[arrays["mask_lower_teeth"]].min() > 0.01
    low, high = np.flatnonzero(points[:, 1] < -0.145), np.flatnonzero(points[:, 1] > 0.05)
    for ids in (low, high, arrays["mask_upper_teeth"], arrays["mask_left_eyeball"]):
        assert moved[ids].max() < 1e-5


def test_jaw_opens_a_gap_between_the_lips_that_shows_the_teeth(arrays, head):
    inner = slice(60, 68)  # inner lip landmarks: right corner, upper three, left corner, lower three

    def gap(vertices: np.ndarray) -> float:
        marks = head.landmarks(torch.from_numpy(vertices)[None])[0, inner].numpy()
        return float(marks[2, 1] - marks[6, 1])

    assert gap(posed(head)) < 0.001
    opened = posed(head, jaw_pose=(0.3, 0.0, 0.0))
    assert gap(opened) > 0.018
    front = opened[arrays["mask_upper_teeth"]]
    marks = head.landmarks(torch.from_numpy(opened)[None])[0].numpy()
    assert marks[66, 1] < front[:, 1].min() < marks[62, 1]  # the edge of the upper teeth hangs into the opening
    assert front[:, 2].max() < marks[62, 2]  # and lies behind the lip


def test_teeth_stay_behind_the_closed_lips(arrays):
    points = arrays["v_template"]
    teeth = points[np.concatenate([arrays["mask_upper_teeth"], arrays["mask_lower_teeth"]])]
    skin = points[np.setdiff1d(np.union1d(arrays["mask_face"], arrays["mask_lips"]), arrays["mask_mouth_cavity"])]
    for tooth in teeth[::5]:
        near = skin[np.hypot(skin[:, 0] - tooth[0], skin[:, 1] - tooth[1]) < 0.004]
        assert tooth[2] < near[:, 2].max() - 0.002


@pytest.mark.parametrize("side", ["left", "right"])
def test_blink_brings_the_lid_margins_together_and_leaves_the_other_eye(arrays, side):
    loop = lid_margin(side)
    top, bottom = loop[1 : len(loop) // 2], loop[len(loop) // 2 + 1 :][::-1]
    open_, closed = arrays["v_template"], expressed(arrays, **{f"blink_{side}": BLINK_CLOSES_AT})
    assert np.linalg.norm(open_[top] - open_[bottom], axis=1).max() > 0.009
    assert np.linalg.norm(closed[top] - closed[bottom], axis=1).max() < 0.0008
    other = lid_margin("left" if side == "right" else "right")
    np.testing.assert_array_equal(open_[other], closed[other])


@functools.cache
def cached_skin() -> surface.Skin:
    return surface.build_skin()


def lid_margin(side: str) -> np.ndarray:
    """The ordered loop around an eye opening: where the face's skin meets the lid rims."""
    skin = cached_skin()
    return skin.eye_left if side == "left" else skin.eye_right


@pytest.mark.parametrize("amount", [0.0, 0.25, 0.5, 0.75, 1.0])
def test_lids_never_cut_into_the_eyeball_while_they_close(arrays, amount):
    points = expressed(arrays, blink_left=amount * BLINK_CLOSES_AT, blink_right=amount * BLINK_CLOSES_AT)
    skin = np.intersect1d(arrays["mask_eyelids"], np.arange(arrays["mask_mouth_cavity"].min() - 6 * len(lid_margin("left"))))  # no rims
    faces = faces_of(arrays, skin)
    centres = (arrays["J_regressor"].astype(float) @ arrays["v_template"])[3:]
    middles = [0.5 * (points[faces[:, i]] + points[faces[:, i - 1]]) for i in range(3)]
    samples = np.concatenate([points[faces].mean(1), *middles, points[skin]])
    nearest = np.minimum(*(np.linalg.norm(samples - centre, axis=1) for centre in centres))
    assert nearest.min() > EYEBALL_RADIUS + 4e-4


def test_identity_moves_an_eyeball_together_with_its_lids(arrays):
    directions = arrays["shapedirs"][:, :, :300]
    margin = lid_margin("left")
    ball = arrays["mask_left_eyeball"]
    rigid = [i for i in range(300) if i != SHAPES["eye_size"]]
    travel = directions[ball].mean(0)[:, rigid]
    assert np.abs(directions[ball][:, :, rigid] - travel).max() < 1e-6
    assert np.abs(directions[margin][:, :, rigid] - travel).max() < 4e-5


def test_expressions_leave_eyeballs_and_teeth_alone(arrays):
    still = np.concatenate([arrays[f"mask_{name}"] for name in ("left_eyeball", "right_eyeball", "upper_teeth", "lower_teeth")])
    assert not arrays["shapedirs"][still, :, 300:].any()


def test_components_are_independent_and_their_tail_decays(arrays):
    for part in (slice(0, 300), slice(300, 400)):
        flat = arrays["shapedirs"][:, :, part].reshape(-1, part.stop - part.start).astype(float)
        size = np.linalg.norm(flat, axis=0)
        cosine = (flat.T @ flat) / np.outer(size, size) - np.eye(len(size))
        assert np.abs(cosine).max() < 0.9
        tail = np.delete(cosine[20:], SHAPES["eye_size"], axis=1)  # the random ones are orthogonal to the others, nearly so to each other
        assert np.abs(tail).max() < 0.35 and np.sqrt((tail**2).mean()) < 0.05
        assert (np.diff(size[20:]) < 0.0).all()


def test_a_thousand_random_heads_keep_their_lips_closed(arrays):
    generator = np.random.default_rng(0)
    inner = arrays["landmark_faces"][60:68]
    assert len(inner) == 8
    corners, weights = arrays["f"][inner], arrays["landmark_barycentric"][60:68]
    basis = np.einsum("lkcj,lk->lcj", arrays["shapedirs"][corners][..., :300], weights)
    base = np.einsum("lkc,lk->lc", arrays["v_template"][corners], weights)
    marks = base + np.einsum("lcj,nj->nlc", basis, generator.standard_normal((1000, 300)))
    gap = marks[:, 2, 1] - marks[:, 6, 1]
    assert np.abs(gap).max() < 0.0015


def test_landmarks_run_from_the_right_to_the_left_in_ibugs_order(arrays, head):
    marks = head.landmarks(torch.tensor(arrays["v_template"])[None])[0].numpy()
    assert marks.shape == (70, 3)
    for run in (range(17), range(17, 27), range(31, 36), range(48, 55), range(60, 65)):
        assert (np.diff(marks[list(run), 0]) > 0.0).all(), run
    assert (np.diff(marks[27:31, 1]) < 0.0).all()  # down the bridge of the nose
    assert marks[30, 2] == pytest.approx(arrays["v_template"][:, 2].max(), abs=0.004)  # its tip is the foremost point
    assert marks[[36, 45], 0].tolist() == pytest.approx([-marks[45, 0], marks[45, 0]])
    assert (marks[[37, 38, 43, 44], 1] > marks[[41, 40, 47, 46], 1]).all()
    assert (marks[[50, 51, 52], 1] > marks[[58, 57, 56], 1]).all()
    np.testing.assert_allclose(marks[68:, 0], [-0.031, 0.031], atol=1e-4)  # pupils, the right one first
    mirror = [*range(16, -1, -1), *range(26, 16, -1)]
    np.testing.assert_allclose(marks[:27] * [-1, 1, 1], marks[mirror], atol=0.003)


def test_vertex_sets_are_disjoint_where_they_must_be(arrays):
    def ids(name: str) -> set[int]:
        return set(arrays[f"mask_{name}"].tolist())

    inside = ids("upper_teeth") | ids("lower_teeth") | ids("tongue") | ids("mouth_cavity")
    assert not inside & ids("noinmouth")
    assert inside | ids("noinmouth") == set(range(len(arrays["v_template"])))
    for one, other in (("scalp", "face"), ("neck", "face"), ("ears", "face"), ("beard", "lips"), ("scalp", "neck"), ("brows", "scalp")):
        assert not ids(one) & ids(other), (one, other)
    assert ids("pupil") < ids("iris") < ids("left_eyeball") | ids("right_eyeball")
    for name in ("scalp", "neck", "ears", "nose", "brows", "beard", "eyelids", "lips", "tongue"):
        assert len(ids(name)) > 30, name


def test_gaze_turns_the_eyeball_and_nothing_else(arrays, head):
    moved = np.linalg.norm(posed(head, eye_pose=(0.0, 0.4, 0.0, 0.0, 0.0, 0.0)) - posed(head), axis=1)
    assert np.flatnonzero(moved > 1e-6).tolist() == sorted(set(np.flatnonzero(moved > 1e-6)) & set(arrays["mask_left_eyeball"].tolist()))
    pupil = np.intersect1d(arrays["mask_pupil"], arrays["mask_left_eyeball"])
    turned = posed(head, eye_pose=(0.0, 0.4, 0.0, 0.0, 0.0, 0.0))[pupil].mean(0) - posed(head)[pupil].mean(0)
    assert turned[0] > 0.004  # a positive turn about y looks to the head's own left


def test_neck_turns_the_head_and_keeps_its_lower_edge(arrays, head):
    moved = np.linalg.norm(posed(head, neck_pose=(0.0, 0.5, 0.0)) - posed(head), axis=1)
    lower_edge = arrays["v_template"][:, 1] < -0.17
    assert lower_edge.sum() >= 48
    assert moved[lower_edge].max() < 1e-5
    assert moved[arrays["mask_left_eyeball"]].min() > 0.03
