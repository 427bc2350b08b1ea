"""Mirrored labels: the mirrored mesh under the mirrored camera lies where the flipped picture shows it."""

import math

import numpy as np
import pytest
import torch

from genhead.mirror import ERROR_LIMIT, LabelMirror, mirror_camera
from head3d.cameras import Camera, look_at, project
from head3d.head_model import HeadModel, load_head_model
from head3d.labels import Motion, pack_label, unpack_label
from head3d.procedural_head import EXPRESSIONS, SHAPES, build_procedural_head
from head3d.run.errors import AssetError, DataError


@pytest.fixture(scope="module")
def mirror() -> LabelMirror:
    return LabelMirror(load_head_model("procedural"))


def _labels(count: int = 4) -> torch.Tensor:
    """Heads turned, open-mouthed, looking aside, with a shifted principal point and skew."""
    draws = torch.Generator().manual_seed(0)
    position = torch.tensor([[1.5, 0.4, 3.8]]) + 0.3 * torch.randn(count, 3, generator=draws)
    camera = look_at(position, 0.05 * torch.randn(count, 3, generator=draws), roll_rad=0.2 * torch.randn(count, generator=draws))
    camera.intrinsics[:, 0, 2], camera.intrinsics[:, 0, 1] = 0.46, 0.02
    motion = Motion(
        torch.randn(count, 100, generator=draws),
        0.2 * torch.randn(count, 3, generator=draws),
        torch.tensor([0.2, 0.05, 0.02]).expand(count, 3),
        0.2 * torch.randn(count, 6, generator=draws),
    )
    return pack_label(camera, torch.randn(count, 300, generator=draws), motion)


def test_every_vertex_of_the_built_in_head_has_a_partner(mirror):
    assert torch.equal(mirror.partners[mirror.partners], torch.arange(len(mirror.partners)))


def test_named_coefficients_mirror_as_their_names_say(mirror):
    label = torch.zeros(1, 437)
    label[0, :25] = _labels()[0, :25]
    label[0, 25 + SHAPES["nose_length"]] = 1.5
    label[0, 325 + EXPRESSIONS["blink_left"]] = 2.0
    _, shape, motion = unpack_label(mirror(label))
    expected_shape, expected = torch.zeros(300), torch.zeros(100)
    expected_shape[SHAPES["nose_length"]], expected[EXPRESSIONS["blink_right"]] = 1.5, 2.0
    torch.testing.assert_close(shape[0], expected_shape, atol=1e-4, rtol=0)
    torch.testing.assert_close(motion.expression[0], expected, atol=1e-4, rtol=0)


def test_poses_turn_the_other_way_and_the_eyes_change_places(mirror):
    label = torch.zeros(1, 437)
    label[0, :25] = _labels()[0, :25]
    label[0, 425:] = torch.arange(1.0, 13.0)
    expected = torch.tensor([1, -2, -3, 4, -5, -6, 10, -11, -12, 7, -8, -9.0])
    assert torch.equal(mirror(label)[0, 425:], expected)


def test_the_mirrored_mesh_projects_to_the_flipped_picture(mirror):
    labels = _labels()
    places = []
    for some in (labels, mirror(labels)):
        camera, shape, motion = unpack_label(some)
        places.append(project(mirror.head.vertices(shape, motion), camera)[0])
    flipped = torch.stack([1 - places[0][..., 0], places[0][..., 1]], dim=-1)[:, mirror.partners]
    distance = (places[1] - flipped).norm(dim=-1)
    assert distance.mean() < 1e-3 and distance.max() < 1e-2  # of the picture's side
    assert mirror.error(labels).mean() < ERROR_LIMIT / 3


def test_mirroring_twice_gives_the_label_back_where_the_model_can_say_it(mirror):
    labels = _labels()
    labels[:, 25 + len(SHAPES) : 325] = 0
    labels[:, 325 + len(EXPRESSIONS) : 425] = 0
    torch.testing.assert_close(mirror(mirror(labels)), labels, atol=1e-3, rtol=0)


def test_a_mirrored_camera_sees_a_mirrored_point_on_the_other_side():
    camera = look_at(torch.tensor([[1.0, 0.5, 4.0]]), torch.zeros(1, 3), roll_rad=torch.tensor([0.3]))
    camera = Camera(camera.c2w, camera.intrinsics + torch.tensor([[0.0, 0.03, 0.05], [0, 0, 0], [0, 0, 0]]))
    mirrored = mirror_camera(camera)
    assert math.isclose(float(torch.linalg.det(mirrored.c2w[0, :3, :3])), 1.0, abs_tol=1e-5)
    point = torch.tensor([[[0.2, 0.1, 0.3]]])
    (uv, depth), (uv_mirrored, depth_mirrored) = project(point, camera), project(point * torch.tensor([-1.0, 1, 1]), mirrored)
    torch.testing.assert_close(uv_mirrored, torch.stack([1 - uv[..., 0], uv[..., 1]], dim=-1))
    torch.testing.assert_close(depth_mirrored, depth)


def test_a_template_without_symmetry_is_refused():
    arrays = dict(build_procedural_head())
    template = np.array(arrays["v_template"])
    template[template[:, 0] > 0, 0] *= 1.3
    with pytest.raises(AssetError, match=r"left and right correspond.* train without --sampling.mirror"):
        LabelMirror(HeadModel.from_arrays(arrays | {"v_template": template}))


def test_a_model_that_cannot_show_its_heads_mirrored_is_refused():
    arrays = dict(build_procedural_head())
    directions = np.array(arrays["shapedirs"])
    directions[..., 0] = 0.01 * (arrays["v_template"][:, :1] > 0)  # one side of the head alone
    mirror = LabelMirror(HeadModel.from_arrays(arrays | {"shapedirs": directions}))
    label = torch.zeros(1, 437)
    label[0, :25], label[0, 25] = _labels()[0, :25], 3.0
    with pytest.raises(DataError, match=r"limit of the mean 0.003.*train without --sampling.mirror"):
        mirror.check(label)
