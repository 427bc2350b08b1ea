"""Labels against the truth: what is stored is read again, and says of the mesh what the mesh says of itself."""

import dataclasses
import math
from typing import get_args

import numpy as np
import pytest
import torch
from scipy.spatial import cKDTree

import genhead.generator
from datagen.generate import generate
from datagen.labels import (
    DEFAULT_LABELS,
    LABELS,
    LabelName,
    SampleError,
    Seen,
    _normals,
    _planepoints,
    gaze_directions,
    label_of,
    members_of,
)
from datagen.members import ShardConfig, decode, dequantise, encode_sample, member_entries, quantise, read_member_entries
from datagen.reading import open_dataset
from datagen.recipes import RecipeConfig, draw_identity
from datagen.render import IdentityRenderer, RenderConfig, dataset_scales, render_frame, render_identity, render_shared, reproducible
from datagen.verify import VerifyRun, verify
from genhead.field import PartField
from genhead.generator import load_genhead
from genhead.mesh_truth import mesh_view
from head3d.cameras import Camera, camera_rays, orbit, project
from head3d.labels import Motion, unpack_label
from head3d.rasterize import interpolate, rasterize
from head3d.rendering import FieldSamples, RaySampling
from head3d.run.errors import ConfigError, DataError
from head3d.triplane import sample_planes

RECIPES = RecipeConfig(dynamic_share=1.0, dynamic_motions=2, dynamic_views=3)
EVERYTHING = RenderConfig(labels=tuple(LABELS), points=20)


@pytest.fixture(scope="module")
def tiny(generator):
    return load_genhead(generator)


@pytest.fixture(scope="module")
def recipe():
    return draw_identity(RECIPES, 0, 3)


@pytest.fixture(scope="module")
def rendered(tiny, recipe):
    with reproducible():
        return render_identity(tiny, recipe, EVERYTHING)


# The table --------------------------------------------------------------------------------------------------------------------


def test_the_table_holds_every_label_that_can_be_chosen_and_no_member_twice():
    assert set(LABELS) == set(get_args(LabelName)) and set(DEFAULT_LABELS) <= set(LABELS)
    members = members_of(LABELS)
    assert len({(member.family, member.name) for member in members}) == len(members) == len({member.asked for member in members})
    assert all(member.unit and member.note for member in members if member.kind == "array")
    assert {label_of(member.asked) for member in members} == {"", *LABELS} and label_of("identity.background") == "background"


def test_the_default_labels_are_the_members_that_a_set_always_had():
    assert sorted(member.asked for member in members_of(DEFAULT_LABELS)) == [
        "background", "depth", "foreground", "identity.background", "json", "label", "opacity", "parts", "point_features", "points",
        "rgb.{view}",
    ]  # fmt: skip


def test_the_member_table_comes_back_from_what_a_data_set_states():
    members = members_of(LABELS)
    assert list(read_member_entries(member_entries(members), "here").values()) == list(members)
    with pytest.raises(DataError, match="here: expected the table of members"):
        read_member_entries([{"name": "depth"}], "here")


def test_labels_are_chosen_once_each_and_in_any_order():
    assert RenderConfig(labels=("gaze", "depth")) == RenderConfig(labels=("depth", "gaze"))
    with pytest.raises(ValueError, match="labels: expected each label once, got depth depth"):
        RenderConfig(labels=("depth", "depth"))


@pytest.mark.parametrize("name", LABELS)
def test_a_label_has_its_stated_shape_and_comes_back_from_its_bytes(name, rendered, tiny):
    """To half a step of its stored numbers, and without one more member."""
    model, config = tiny.config, ShardConfig(image_format="png")
    sizes = {
        "V": 3, "S": model.image_resolution, "R": model.render_resolution, "C": model.feature_channels, "P": model.plane_channels,
        "T": model.plane_resolution, "N": 20,
    }  # fmt: skip
    scales = dataset_scales(RECIPES, model.sampling)
    for member in LABELS[name].members:
        values = (rendered.shared if member.family == "identities" else rendered.frames[1])[member.asked]
        assert values.shape == tuple(sizes.get(side, side) for side in member.shape)
        ((extension, data),) = encode_sample([member], {member.asked: values}, scales, config).items()
        stored = decode(data, extension)
        assert stored.dtype == member.dtype and extension == member.extension("png")
        if member.limits is not None:
            assert member.limits[0] <= stored.min() and stored.max() <= member.limits[1]
        if member.kind == "array":
            step = {"unit": 1 / 255, "signed": 1 / 127, "depth": (scales.far - scales.near) / 65535, "box": 1.3 / 65535}.get(
                member.scale, 0
            )
            rounding = 2**-11 * np.abs(values).max() if member.dtype == "float16" else 1e-6
            np.testing.assert_allclose(dequantise(stored, member, scales), values, atol=step / 2 + rounding, rtol=0)
        else:
            np.testing.assert_array_equal(stored, values)


def test_a_frame_has_the_labels_that_are_chosen_and_no_other(tiny, recipe):
    frame = render_identity(tiny, recipe, RenderConfig(labels=("gaze", "opacity"))).frames[0]
    assert set(frame) == {"rgb", "label", "json", "gaze", "gaze_camera", "opacity"}


def test_signed_numbers_keep_zero_and_both_ends_exact():
    member = members_of(["normals"], "labels")[0]
    values = np.array([-1.0, -0.5, 0.0, 1 / 127, 1.0])
    stored = quantise(values, member, None)
    assert stored.dtype == np.int8 and stored.tolist() == [-127, -64, 0, 1, 127]
    np.testing.assert_array_equal(dequantise(stored, member, None)[[0, 2, 4]], [-1, 0, 1])
    with pytest.raises(ValueError, match=r"normals must lie in \[-1, 1\]"):
        quantise(np.array([1.1]), member, None)


def test_a_set_with_every_label_is_read_and_verified(tmp_path, run_of):
    out = tmp_path / "set"
    assert generate(run_of(out, identities=2, render=dataclasses.replace(EVERYTHING, views_at_once=2))) == 0
    dataset = open_dataset(out)
    entry = dataset.frames[-1]
    data = dataset.read(entry, ["normals", "landmarks", "landmarks_2d", "gaze", "gaze_camera", "correspondence", "identity.planes"])
    assert data["normals"].dtype == np.float32 and data["landmarks_2d"].shape == (entry.views, 70, 3)
    lengths = np.linalg.norm(data["normals"], axis=1)
    assert np.logical_or(lengths == 0, np.abs(lengths - 1) < 0.01).all()
    assert verify(VerifyRun(out, rerender=1)) == 0


def test_without_any_label_a_set_is_pictures_and_numbers_alone(tmp_path, run_of):
    out = tmp_path / "set"
    assert generate(run_of(out, identities=2, render=RenderConfig(labels=()))) == 0
    dataset = open_dataset(out)
    assert set(dataset.frames[0].members) == {"rgb.0", "rgb.1", "label", "json"}
    assert not (out / "labels").exists() and not (out / "identities").exists()
    with pytest.raises(DataError, match=r"frame 0000000000 has no member 'depth'.*--render.labels"):
        dataset.read(dataset.frames[0], ["depth"])
    assert verify(VerifyRun(out, rerender=1)) == 0


def test_the_labels_are_part_of_what_a_set_is(tmp_path, run_of):
    out = tmp_path / "set"
    generate(run_of(out, identities=2, render=RenderConfig(labels=("depth",))))
    with pytest.raises(ConfigError, match=r"changed: render\.labels: \['depth'\] -> \['depth', 'opacity'\]"):
        generate(run_of(out, identities=2, render=RenderConfig(labels=("depth", "opacity"))))


# The mesh's own truth ---------------------------------------------------------------------------------------------------------


class MeshField(PartField):
    """A field whose density is that of the posed mesh: solid behind the nearest vertex's tangent plane."""

    def __call__(self, points):
        head, posed = self.deformation.head, self.posed.vertices_posed
        densities = []
        outside = head.regions.without_inner_mouth
        for vertices, at in zip(posed, points, strict=True):
            normals, skin = vertex_normals(vertices, head.faces)[outside], vertices[outside]
            nearest = torch.from_numpy(cKDTree(skin.numpy()).query(at.reshape(-1, 3).numpy())[1])
            distance = ((at.reshape(-1, 3) - skin[nearest]) * normals[nearest]).sum(-1)
            densities.append(-1e5 * distance.reshape(at.shape[:2]))
        return FieldSamples(torch.full((*points.shape[:3], 16), 0.5), torch.stack(densities))


def vertex_normals(vertices, faces):
    a, b, c = vertices[faces].unbind(1)
    face_normals = torch.linalg.cross(b - a, c - a)
    sums = torch.zeros_like(vertices)
    for corner in range(3):
        sums.index_add_(0, faces[:, corner], face_normals)
    return torch.nn.functional.normalize(sums, dim=-1)


@pytest.fixture(scope="module")
def mesh_frame(root):
    """A frame of the built-in head whose density is its own mesh, seen by two cameras at 32 x 32 rays: (renderer, frame, vertices)."""
    sampling = RaySampling(depth_samples=24, importance_samples=20)
    generator = load_genhead(root / "pretrained" / "genhead-tiny")
    generator.config = dataclasses.replace(generator.config, sampling=sampling)
    yaw = torch.tensor([0.0, 0.6])
    cameras = orbit(yaw, torch.tensor([0.0, 0.2]), torch.full((2,), 4.1), roll_rad=torch.tensor([0.0, 0.2])).label()
    recipe = draw_identity(RecipeConfig(source="studio", dynamic_share=0.0), 0, 0)
    eyes = torch.tensor([[0.05, 0.3, 0.0, -0.1, -0.2, 0.0]])
    motion = recipe.motions[0].motion._replace(eye_pose=eyes, expression=0.3 * recipe.motions[0].motion.expression)
    recipe = recipe._replace(motions=(recipe.motions[0]._replace(motion=motion, cameras=cameras),))
    renderer = IdentityRenderer(generator, recipe)
    labels = ("depth", "opacity", "parts", "normals", "correspondence", "landmarks", "gaze")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(genhead.generator, "PartField", MeshField)
        frame = render_frame(renderer, RenderConfig(labels=labels, jitter=False), 0)
    label = unpack_label(torch.from_numpy(frame["label"]))
    return renderer, frame, generator.head_model.vertices(label.shape, label.motion)


def on_the_face(renderer, frame, vertices):
    """(mask [V, R, R] of pixels well inside the face, camera, raster of the mesh)."""
    camera = Camera.from_label(torch.from_numpy(frame["label"][:, :25]))
    head, side = renderer.genhead.head_model, frame["depth"].shape[-1]
    face = mesh_view(head, vertices, camera, side).face[:, 0].float()
    inside = -torch.nn.functional.max_pool2d(-face, 3, 1, 1) > 0  # its neighbours are face too
    return inside & (torch.from_numpy(frame["opacity"]) > 0.9), camera, rasterize(vertices, head.faces, camera, side)


def test_depth_is_the_distance_of_the_mesh_along_the_ray(mesh_frame):
    renderer, frame, vertices = mesh_frame
    inside, camera, _ = on_the_face(renderer, frame, vertices)
    truth = mesh_view(renderer.genhead.head_model, vertices, camera, frame["depth"].shape[-1]).distance[:, 0]
    error = (torch.from_numpy(frame["depth"]) - truth)[inside].abs()
    assert inside.sum() > 200 and error.median() < 0.008 and error.quantile(0.8) < 0.012  # of rays that end 0.65 behind the head


def test_normals_are_the_meshs_outward_normals_in_world_axes(mesh_frame):
    renderer, frame, vertices = mesh_frame
    inside, _, raster = on_the_face(renderer, frame, vertices)
    head = renderer.genhead.head_model
    normals = torch.stack([vertex_normals(one, head.faces) for one in vertices])
    truth = torch.nn.functional.normalize(interpolate(raster, head.faces, normals), dim=1)
    angle = torch.rad2deg((torch.from_numpy(frame["normals"]) * truth).sum(1).clamp(-1, 1).acos())[inside]
    assert angle.median() < 4 and angle.quantile(0.7) < 12


def test_normals_of_a_ball_point_away_from_its_centre_and_are_zero_where_nothing_is(tiny, recipe):
    renderer, cameras = IdentityRenderer(tiny, recipe), recipe.motions[0].cameras
    output = renderer.render(renderer.pose(recipe.motions[0].motion), cameras)
    camera, side = Camera.from_label(cameras), tiny.config.render_resolution
    origins, directions = camera_rays(camera, side)
    middle = -(origins * directions).sum(-1)  # of the ray nearest to the origin
    reach = 0.3**2 - (origins.square().sum(-1) - middle.square())
    depth, hit = (middle - reach.clamp_min(0).sqrt()).view(-1, 1, side, side), (reach > 0).view(-1, 1, side, side)
    images = dataclasses.replace(output.images, depth=depth, opacity=hit.float())
    output = dataclasses.replace(output, images=images, field=lambda points: FieldSamples(points, -points.norm(dim=-1)))
    seen = Seen(renderer, 0, None, camera, 0, output, 0, "here")
    normals = _normals(seen)["normals"]
    radial = seen.surface().transpose(1, 2).unflatten(2, (side, side)) / 0.3
    torch.testing.assert_close(normals, torch.where(hit, radial, 0.0), atol=2e-3, rtol=0)
    assert 0.2 < hit.float().mean() < 0.9


def test_correspondence_is_the_canonical_position_of_the_visible_face_and_eyes(mesh_frame):
    renderer, frame, vertices = mesh_frame
    inside, _, raster = on_the_face(renderer, frame, vertices)
    head = renderer.genhead.head_model
    truth = interpolate(raster, head.faces, head.canonical_vertices)
    error = (torch.from_numpy(frame["correspondence"]) - truth).norm(dim=1)
    assert error[inside].median() < 0.006 and error[inside].quantile(0.7) < 0.012  # scene units: 2 and 4 mm
    empty = torch.from_numpy(frame["opacity"] < 0.5)
    assert (torch.from_numpy(frame["correspondence"]).movedim(1, -1)[empty] == -0.65).all() and empty.any()
    eyeball = torch.zeros(len(head.canonical_vertices), dtype=torch.bool)
    eyeball[head.regions.eyeballs] = True
    eye = (raster.face_ids >= 0) & eyeball[head.faces].all(1)[raster.face_ids] & torch.from_numpy(frame["parts"] == 2)
    assert eye.sum() >= 4 and error[eye].median() < 0.02


def test_landmarks_are_on_the_posed_mesh_and_their_projections_are_where_the_cameras_see_them(mesh_frame):
    renderer, frame, vertices = mesh_frame
    truth = renderer.genhead.head_model.landmarks(vertices)
    np.testing.assert_allclose(frame["landmarks"], truth[0].numpy(), atol=1e-5)
    camera = Camera.from_label(torch.from_numpy(frame["label"][:, :25]))
    np.testing.assert_allclose(frame["landmarks_2d"][..., :2], project(truth, camera)[0].numpy(), atol=1e-5)


def test_a_camera_on_the_left_sees_the_left_of_the_jaw_and_not_the_right(mesh_frame):
    """In the usual order landmark 0 is beside the person's right ear and 16 beside the left one; the left is +x, to the right in front."""
    _, frame, _ = mesh_frame
    seen = frame["landmarks_2d"][..., 2]
    assert set(np.unique(seen)) == {0.0, 1.0}
    assert seen[1, 10:16].all() and not seen[1, :4].any()
    assert frame["landmarks"][0, 0] < -0.1 < 0.1 < frame["landmarks"][16, 0]
    assert frame["landmarks_2d"][0, 0, 0] < 0.4 < 0.6 < frame["landmarks_2d"][0, 16, 0]


def test_gaze_points_from_each_eyes_centre_through_its_pupil(mesh_frame):
    renderer, frame, vertices = mesh_frame
    label = unpack_label(torch.from_numpy(frame["label"][:1]))
    centres = renderer.genhead.head_model.joints(label.shape, label.motion)[0, 3:]  # left, right
    pupils = torch.from_numpy(frame["landmarks"][[69, 68]])
    axis = torch.nn.functional.normalize(pupils - centres, dim=-1).numpy()
    angle = np.rad2deg(np.arccos((axis * frame["gaze"]).sum(-1)))
    assert angle.max() < 3 and np.rad2deg(np.arccos((axis[0] * frame["gaze"][1]).sum())) > 20
    np.testing.assert_allclose(frame["gaze_camera"][0], frame["gaze"], atol=1e-5)  # the first camera's axes are the world's


def test_gaze_turns_with_the_eye_then_with_the_neck_and_camera_axes_undo_the_camera(tiny, recipe):
    quarter = math.pi / 2
    motion = Motion.neutral(1)._replace(
        eye_pose=torch.tensor([[0.0, quarter, 0, -quarter, 0, 0]]), neck_pose=torch.tensor([[0, 0, quarter]])
    )
    np.testing.assert_allclose(gaze_directions(motion)[0], [[0, 1, 0], [-1, 0, 0]], atol=1e-6)  # left: +x, then +y; right: +y, then -x
    frame = render_frame(IdentityRenderer(tiny, recipe), RenderConfig(labels=("gaze",)), 0)
    for view, camera in enumerate(recipe.motions[0].cameras):
        rotation = camera[:16].reshape(4, 4)[:3, :3].numpy()
        np.testing.assert_allclose((rotation @ frame["gaze_camera"][view].T).T, frame["gaze"], atol=1e-5)


def test_planes_are_the_identitys_own(tiny, recipe):
    renderer = IdentityRenderer(tiny, recipe)
    shared = render_shared(renderer, RenderConfig(labels=("planes",)))
    assert set(shared) == {"identity.planes"}
    np.testing.assert_array_equal(shared["identity.planes"], renderer.planes[0].numpy())


# Plane points -----------------------------------------------------------------------------------------------------------------


def test_plane_points_lie_on_their_stored_steps_in_the_box(rendered, tiny):
    scales = dataset_scales(RECIPES, tiny.config.sampling)
    frame = rendered.frames[0]
    points = frame["points"]
    assert np.abs(points).max() <= scales.box_side / 2
    steps = (points.astype(np.float64) + scales.box_side / 2) / (scales.box_side / 65535)
    assert np.abs(steps - quantise(points, members_of(["planepoints"], "labels")[0], scales)).max() < 0.02  # float32 positions
    assert len(np.unique(points.reshape(-1, 3), axis=0)) == points.shape[0] * points.shape[1]


def test_plane_points_are_drawn_from_the_coarse_samples_without_part_weight_alone(tiny, recipe):
    """Of each view all samples but thirty are given to eyes and mouth; those thirty, as far as they lie in the box, are the candidates."""
    renderer, cameras = IdentityRenderer(tiny, recipe), recipe.motions[0].cameras
    posed = renderer.pose(recipe.motions[0].motion)
    output = renderer.render(posed, cameras)
    coarse = output.passes[0]
    samples, views = coarse.points.reshape(len(cameras), -1, 3), len(cameras)
    inside = (samples.abs() <= tiny.config.sampling.box_side / 2).all(-1)
    weight = torch.full(samples.shape[:2], 1e-3)
    free = [torch.nonzero(inside[view])[5 * view :: 7][:30, 0] for view in range(views)]
    for view in range(views):
        weight[view, free[view]] = 0
    output = dataclasses.replace(output, passes=(coarse._replace(part_weight=weight.reshape(coarse.part_weight.shape)),))
    seen = Seen(renderer, 0, posed, Camera.from_label(cameras), 0, output, 30, "here")
    points = _planepoints(seen)["points"].numpy()
    for view in range(views):
        away = np.abs(points[view][:, None] - samples[view, free[view]].numpy()[None]).max(-1)  # drawn, wanted
        assert away.min(1).max() < 1.1e-5 and sorted(away.argmin(1)) == list(range(30))  # half a step of 16 bits
    with pytest.raises(SampleError, match="here: only 30 ray samples .* 31 are asked for"):
        _planepoints(seen._replace(points=31))


def test_point_features_are_the_head_planes_at_the_canonical_position(rendered, tiny, recipe):
    renderer = IdentityRenderer(tiny, recipe)
    posed = renderer.pose(recipe.motions[1].motion)
    points = torch.from_numpy(rendered.frames[1]["points"][2:])
    canonical = tiny.deformation.to_canonical(points, posed, "head")
    expected = sample_planes(renderer.planes[:, 1], canonical, tiny.config.sampling.box_side)
    np.testing.assert_allclose(rendered.frames[1]["point_features"][2:], expected.numpy(), atol=1e-5)


def test_parts_show_skin_and_eyes(rendered):
    found = set(np.unique(np.concatenate([frame["parts"].ravel() for frame in rendered.frames])))
    assert {0, 1, 2} <= found <= {0, 1, 2, 3}


def test_more_points_than_ray_samples_is_an_error_with_a_remedy(tiny, recipe):
    with pytest.raises(SampleError, match="--render.points lower"):
        render_identity(tiny, recipe, RenderConfig(points=16 * 16 * 6 + 1))


@pytest.mark.gpu
def test_labels_made_on_a_gpu_are_those_of_the_cpu(generator, recipe):
    """Of the mesh to rounding; of the rendering as maps, without jitter, which each device draws for itself."""
    config = dataclasses.replace(EVERYTHING, jitter=False)
    with reproducible():
        frame, other = (render_identity(load_genhead(generator, device), recipe, config).frames[0] for device in ("cpu", "cuda"))
    assert {name: (value.shape, value.dtype) for name, value in other.items() if name != "json"} == {
        name: (value.shape, value.dtype) for name, value in frame.items() if name != "json"
    }
    for name in ("landmarks", "gaze", "gaze_camera", "label"):
        np.testing.assert_allclose(other[name], frame[name], atol=1e-4, err_msg=name)
    for name, allowed in (("opacity", 0.05), ("depth", 0.05), ("foreground", 0.05)):
        assert np.abs(other[name] - frame[name]).mean() < allowed, name


# Motion-rich identities -------------------------------------------------------------------------------------------------------


def test_motion_rich_frames_are_small_pictures_of_the_same_heads_with_labels_of_their_own(tmp_path, run_of):
    out = tmp_path / "set"
    recipe = RecipeConfig(dynamic_share=0.5, dynamic_motions=2, dynamic_views=2, motion_rich_share=0.5, motion_rich_motions=4)
    render = RenderConfig(points=20, motion_rich_side=16, motion_rich_labels=("gaze",))
    run = run_of(out, identities=4, recipe=recipe, render=render)
    assert generate(run) == 0
    dataset = open_dataset(out)
    rich = [frame for frame in dataset.frames if frame.kind == "motion-rich"]
    assert len(rich) == 8 and {frame.views for frame in rich} == {2}
    assert all(set(frame.members) == {"rgb.0", "rgb.1", "label", "json", "gaze", "gaze_camera"} for frame in rich)
    assert all("depth" in frame.members for frame in dataset.frames if frame.kind == "dynamic")
    assert dataset.read(rich[0], ["rgb.1"])["rgb.1"].shape == (16, 16, 3)
    assert verify(VerifyRun(out, rerender=6)) == 0


def test_a_motion_rich_picture_is_the_final_picture_reduced(tiny, recipe):
    """A reduction by two of a mean-preserving filter: the mean colour stays."""
    full, small = (
        render_identity(tiny, recipe._replace(kind=kind), RenderConfig(labels=(), motion_rich_side=16)).frames[0]["rgb"]
        for kind in ("dynamic", "motion-rich")
    )
    assert full.shape == (3, 32, 32, 3) and small.shape == (3, 16, 16, 3)
    halves = full.reshape(3, 16, 2, 16, 2, 3).mean((2, 4))
    assert np.abs(halves - small).mean() < 4 and np.abs(full.mean((1, 2)) - small.mean((1, 2))).max() < 1


def test_a_motion_rich_picture_larger_than_the_generators_is_refused(tmp_path, run_of):
    recipe = RecipeConfig(dynamic_share=0.0, motion_rich_share=1.0)
    with pytest.raises(ConfigError, match="render.motion_rich_side: expected at most 32 px, the generator's pictures, got 128"):
        generate(run_of(tmp_path / "set", recipe=recipe))
