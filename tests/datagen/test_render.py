"""Rendering recipes: what an identity shares, what the labels mean."""

import dataclasses

import numpy as np
import pytest
import torch

from datagen.labels import SampleError
from datagen.recipes import RecipeConfig, draw_identity
from datagen.render import (
    IdentityRenderer,
    RenderConfig,
    dataset_scales,
    render_frame,
    render_identity,
    reproducible,
)
from genhead.generator import load_genhead
from head3d.cameras import Camera, ray_bounds
from head3d.labels import unpack_label

RECIPES = RecipeConfig(dynamic_share=1.0, dynamic_motions=2, dynamic_views=3)
MAPS = ("depth", "opacity", "foreground")


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
    assert rendered.shared["identity.background"].shape == (features, rays, rays)
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


def test_bfloat16_frames_differ_by_rounding_and_come_again_the_same(genhead, recipe, rendered):
    config = RenderConfig(points=20, precision="bfloat16")
    with reproducible():
        first, again = (render_identity(genhead, recipe, config) for _ in range(2))
    exact = rendered.frames[0]
    for name in ("rgb", "opacity", "foreground", "point_features", "depth"):
        np.testing.assert_array_equal(first.frames[0][name], again.frames[0][name], err_msg=name)
        assert 0 < np.abs(first.frames[0][name].astype(float) - exact[name]).mean() < 0.02 * exact[name].std(), name
    np.testing.assert_array_equal(first.frames[0]["parts"], exact["parts"])  # the mesh is always posed and drawn in float32


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
    render_identity(genhead, recipe, RenderConfig(labels=MAPS))
    assert calls == {"planes": 1, "background": 1, "pose": len(recipe.motions)}


def test_views_in_other_batches_differ_by_rounding_only_without_jitter(genhead, recipe):
    one, many = (
        render_identity(genhead, recipe, RenderConfig(labels=MAPS, jitter=False, views_at_once=count)).frames[0] for count in (1, 3)
    )
    for name in ("depth", "opacity", "foreground"):
        np.testing.assert_allclose(one[name], many[name], atol=2e-3)


def _in_motion(genhead, recipe, motion, cameras):
    renderer = IdentityRenderer(genhead, recipe)
    return renderer.render(renderer.pose(motion), cameras).images


def test_composited_features_follow_from_the_labels(genhead, recipe):
    frame = render_identity(genhead, recipe, RenderConfig(labels=(*MAPS, "background"), jitter=False))
    truth = _in_motion(genhead, recipe, recipe.motions[0].motion, recipe.motions[0].cameras)
    composited = frame.frames[0]["foreground"] + (1 - frame.frames[0]["opacity"][:, None]) * frame.shared["identity.background"]
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


def test_truth_of_another_motion_is_this_identity_in_that_motion(genhead, recipe):
    other = draw_identity(RECIPES, 0, 9).motions[0]
    truth = _in_motion(genhead, recipe, other.motion, other.cameras)
    swapped = recipe._replace(motions=(other,))
    frame = render_identity(genhead, swapped, RenderConfig(labels=MAPS, jitter=False)).frames[0]
    np.testing.assert_allclose(truth.depth[:, 0].numpy(), frame["depth"], atol=1e-4)


def test_numbers_that_are_not_finite_are_an_error_that_names_the_identity(generator, recipe):
    genhead = load_genhead(generator)
    with torch.no_grad():
        genhead.decoder.color.weight.fill_(float("nan"))
    with pytest.raises(SampleError, match="identity 3 of seed 0, motion 0, views 0 to 2: the generator's"):
        render_identity(genhead, recipe, RenderConfig(labels=MAPS))


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
