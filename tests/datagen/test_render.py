"""Rendering recipes: what an identity shares, what the labels mean."""

import dataclasses

import numpy as np
import pytest
import torch

from datagen.members import MEMBERS, quantise
from datagen.recipes import RecipeConfig, draw_identity
from datagen.render import (
    IdentityRenderer,
    RenderConfig,
    SampleError,
    _plane_points,
    dataset_scales,
    render_frame,
    render_identity,
    reproducible,
)
from genhead.generator import load_genhead
from head3d.cameras import Camera, ray_bounds
from head3d.labels import unpack_label
from head3d.triplane import sample_planes

RECIPES = RecipeConfig(dynamic_share=1.0, dynamic_motions=2, dynamic_views=3)
POINT = {member.name: member for member in MEMBERS}["points"]


@pytest.fixture(scope="module")
def genhead(generator):
    return load_genhead(generator)


@pytest.fixture(scope="module")
def recipe():
    return draw_identity(RECIPES, 0, 3)


@pytest.fixture(scope="module")
def rendered(genhead, recipe):
    with reproducible():
        return render_identity(genhead, recipe, RenderConfig(points=20))


def test_a_frame_has_every_member_with_its_shape(rendered, genhead):
    model, views = genhead.config, 3
    side, rays, features = model.image_resolution, model.render_resolution, model.feature_channels
    assert rendered.background.shape == (features, rays, rays)
    shapes = {name: value.shape for name, value in rendered.frames[0].items() if name != "json"}
    assert shapes == {
        "rgb": (views, side, side, 3),
        "opacity": (views, rays, rays),
        "parts": (views, rays, rays),
        "label": (views, 437),
        "background": (rays, rays, 3),
        "depth": (views, rays, rays),
        "foreground": (views, features, rays, rays),
        "points": (views, 20, 3),
        "point_features": (views, 20, model.plane_channels),
    }


def test_the_same_frame_comes_again_alone_and_in_any_company(genhead, recipe, rendered):
    with reproducible():
        again = render_frame(IdentityRenderer(genhead, recipe), RenderConfig(points=20), 1)
    for name, value in rendered.frames[1].items():
        if name != "json":
            np.testing.assert_array_equal(again[name], value, err_msg=name)


def test_planes_and_background_are_made_once_for_all_motions_and_views(genhead, recipe, monkeypatch):
    calls = {"planes": 0, "background": 0, "pose": 0}
    for name in calls:
        original = getattr(genhead, name)

        def counted(*arguments, name=name, original=original, **settings):
            calls[name] += 1
            return original(*arguments, **settings)

        monkeypatch.setattr(genhead, name, counted)
    render_identity(genhead, recipe, RenderConfig(points=0))
    assert calls == {"planes": 1, "background": 1, "pose": len(recipe.motions)}


def test_views_in_other_batches_differ_by_rounding_only_without_jitter(genhead, recipe):
    one, many = (render_identity(genhead, recipe, RenderConfig(points=0, jitter=False, views_at_once=count)).frames[0] for count in (1, 3))
    for name in ("depth", "opacity", "foreground"):
        np.testing.assert_allclose(one[name], many[name], atol=2e-3)


def _in_motion(genhead, recipe, motion, cameras):
    renderer = IdentityRenderer(genhead, recipe)
    return renderer.render(renderer.pose(motion), cameras).images


def test_composited_features_follow_from_the_labels(genhead, recipe):
    frame = render_identity(genhead, recipe, RenderConfig(points=0, jitter=False))
    truth = _in_motion(genhead, recipe, recipe.motions[0].motion, recipe.motions[0].cameras)
    composited = frame.frames[0]["foreground"] + (1 - frame.frames[0]["opacity"][:, None]) * frame.background
    np.testing.assert_allclose(composited * 2 - 1, truth.features.numpy(), atol=1e-4)


def test_labels_say_what_was_drawn(rendered, recipe):
    label = unpack_label(torch.from_numpy(rendered.frames[1]["label"]))
    assert torch.equal(label.camera.label(), recipe.motions[1].cameras)
    assert torch.equal(label.shape[0], recipe.shape[0])
    assert torch.equal(label.motion.expression[2], recipe.motions[1].motion.expression[0])


def test_every_depth_fits_the_stated_range(rendered, genhead):
    scales = dataset_scales(RECIPES, genhead.config.sampling)
    for frame in rendered.frames:
        near, _ = ray_bounds(Camera.from_label(torch.from_numpy(frame["label"][:, :25])), genhead.config.sampling.box_side)
        assert scales.near <= float(near.min()) and (frame["depth"] >= near.numpy()[:, None, None] - 1e-5).all()
        assert frame["depth"].max() <= scales.far
    assert 2.8 < scales.near < 2.9 and 5.4 < scales.far < 5.8


def test_plane_points_lie_on_their_stored_steps_in_the_box_outside_eyes_and_mouth(rendered, genhead, recipe):
    scales = dataset_scales(RECIPES, genhead.config.sampling)
    frame = rendered.frames[0]
    points = frame["points"]
    assert np.abs(points).max() <= scales.box_side / 2
    steps = (points.astype(np.float64) + scales.box_side / 2) / (scales.box_side / 65535)
    assert np.abs(steps - quantise(points, POINT, scales)).max() < 0.02  # float32 positions
    assert len(np.unique(points.reshape(-1, 3), axis=0)) == points.shape[0] * points.shape[1]


def test_plane_points_are_drawn_from_the_coarse_samples_without_part_weight_alone(genhead, recipe):
    """Of each view all samples but thirty are given to eyes and mouth; those thirty, as far as they lie in the box, are the candidates."""
    renderer, cameras = IdentityRenderer(genhead, recipe), recipe.motions[0].cameras
    posed = renderer.pose(recipe.motions[0].motion)
    output = renderer.render(posed, cameras)
    coarse = output.passes[0]
    samples, views = coarse.points.reshape(len(cameras), -1, 3), len(cameras)
    inside = (samples.abs() <= genhead.config.sampling.box_side / 2).all(-1)
    weight = torch.full(samples.shape[:2], 1e-3)
    free = [torch.nonzero(inside[view])[5 * view :: 7][:30, 0] for view in range(views)]
    for view in range(views):
        weight[view, free[view]] = 0
    output = dataclasses.replace(output, passes=(coarse._replace(part_weight=weight.reshape(coarse.part_weight.shape)),))
    points, _ = _plane_points(renderer, RenderConfig(points=30), posed, output, 0, 0, "here")
    for view in range(views):
        away = np.abs(points[view][:, None] - samples[view, free[view]].numpy()[None]).max(-1)  # drawn, wanted
        assert away.min(1).max() < 1.1e-5 and sorted(away.argmin(1)) == list(range(30))  # half a step of 16 bits
    with pytest.raises(SampleError, match="here: only 30 ray samples .* 31 are asked for"):
        _plane_points(renderer, RenderConfig(points=31), posed, output, 0, 0, "here")


def test_point_features_are_the_head_planes_at_the_canonical_position(rendered, genhead, recipe):
    renderer = IdentityRenderer(genhead, recipe)
    posed = renderer.pose(recipe.motions[1].motion)
    points = torch.from_numpy(rendered.frames[1]["points"][2:])
    canonical = genhead.deformation.to_canonical(points, posed, "head")
    expected = sample_planes(renderer.planes[:, 1], canonical, genhead.config.sampling.box_side)
    np.testing.assert_allclose(rendered.frames[1]["point_features"][2:], expected.numpy(), atol=1e-5)


def test_parts_show_skin_and_eyes(rendered):
    found = set(np.unique(np.concatenate([frame["parts"].ravel() for frame in rendered.frames])))
    assert {0, 1, 2} <= found <= {0, 1, 2, 3}


def test_truth_of_another_motion_is_this_identity_in_that_motion(genhead, recipe):
    other = draw_identity(RECIPES, 0, 9).motions[0]
    truth = _in_motion(genhead, recipe, other.motion, other.cameras)
    swapped = recipe._replace(motions=(other,))
    frame = render_identity(genhead, swapped, RenderConfig(points=0, jitter=False)).frames[0]
    np.testing.assert_allclose(truth.depth[:, 0].numpy(), frame["depth"], atol=1e-4)


def test_numbers_that_are_not_finite_are_an_error_that_names_the_identity(generator, recipe):
    genhead = load_genhead(generator)
    with torch.no_grad():
        genhead.decoder.color.weight.fill_(float("nan"))
    with pytest.raises(SampleError, match="identity 3 of seed 0, motion 0, views 0 to 2: the generator's"):
        render_identity(genhead, recipe, RenderConfig(points=0))


def test_more_points_than_ray_samples_is_an_error_with_a_remedy(genhead, recipe):
    with pytest.raises(SampleError, match="--render.points lower"):
        render_identity(genhead, recipe, RenderConfig(points=16 * 16 * 6 + 1))


def test_reproducible_restores_what_it_changed():
    before = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    with reproducible():
        assert torch.get_num_threads() == 1 and torch.are_deterministic_algorithms_enabled()
    assert before == (
        torch.get_num_threads(),
        torch.are_deterministic_algorithms_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,
    )


def test_render_settings_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        RenderConfig().points = 3
