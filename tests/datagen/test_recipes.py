"""Recipes: pure functions of (config, seed, identity), within the published ranges."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from datagen.recipes import (
    LookAtCameras,
    MotionDraws,
    PortraitCameras,
    RecipeConfig,
    camera_distances,
    draw_identity,
    frame_count,
    kind_of,
    split_of,
)
from head3d.cameras import Camera, ray_bounds, world_to_camera
from head3d.labels import check_label, pack_label


def flat(recipe):
    """Everything a recipe holds, as one array."""
    parts = [recipe.shape, recipe.condition_camera, recipe.latent(512)]
    for motion in recipe.motions:
        parts += [*motion.motion, motion.cameras]
    return torch.cat([part.flatten() for part in parts]).numpy()


@pytest.mark.parametrize("source", ["parametric", "studio"])
def test_an_identity_is_the_same_in_any_order_and_company(source):
    config = RecipeConfig(source=source)
    forward = [flat(draw_identity(config, 3, identity)) for identity in range(6)]
    backward = [flat(draw_identity(config, 3, identity)) for identity in reversed(range(6))]
    for one, other in zip(forward, reversed(backward), strict=True):
        np.testing.assert_array_equal(one, other)


def test_another_seed_or_identity_shares_no_number():
    config = RecipeConfig(dynamic_share=1.0)
    first, other_seed, other_identity = (flat(draw_identity(config, seed, identity)) for seed, identity in ((0, 5), (1, 5), (0, 6)))
    drawn = np.flatnonzero(first != other_seed)
    assert len(drawn) > 0.8 * len(first)  # the rest are constants: neck, jaw y and z, gaze roll, the last row of a camera, intrinsics
    assert not np.any(first[:300] == other_identity[:300])


def test_a_recipe_never_touches_the_global_generators():
    torch.manual_seed(1)
    np.random.seed(1)
    before = torch.get_rng_state().clone(), np.random.get_state()[1].copy()
    draw_identity(RecipeConfig(), 0, 0)
    assert torch.equal(before[0], torch.get_rng_state()) and np.array_equal(before[1], np.random.get_state()[1])


def test_a_changed_setting_of_one_aspect_leaves_the_others_alone():
    base = draw_identity(RecipeConfig(dynamic_share=1.0), 0, 4)
    wide = draw_identity(RecipeConfig(dynamic_share=1.0, motion=MotionDraws(expression_std=0.5)), 0, 4)
    more = draw_identity(RecipeConfig(dynamic_share=1.0, dynamic_motions=7), 0, 4)
    assert torch.equal(base.shape, wide.shape)
    assert torch.equal(base.motions[1].cameras, wide.motions[1].cameras)
    assert not torch.equal(base.motions[1].motion.expression, wide.motions[1].motion.expression)
    for one, other in zip(base.motions, more.motions, strict=False):
        assert torch.equal(one.cameras, other.cameras) and torch.equal(one.motion.expression, other.motion.expression)


def test_a_shorter_latent_begins_a_longer_one():
    recipe = draw_identity(RecipeConfig(), 0, 0)
    assert torch.equal(recipe.latent(64), recipe.latent(512)[:, :64])


@pytest.mark.parametrize("source", ["parametric", "studio"])
def test_every_label_is_well_formed_and_the_neck_is_at_rest(source):
    config = RecipeConfig(source=source)
    for identity in range(8):
        recipe = draw_identity(config, 0, identity)
        for drawn in recipe.motions:
            views = len(drawn.cameras)
            labels = pack_label(Camera.from_label(drawn.cameras), recipe.shape.expand(views, -1), drawn.motion.repeat_interleave(views))
            for label in labels.numpy():
                check_label(label, "a recipe")
            assert not drawn.motion.neck_pose.any()
            assert torch.equal(drawn.motion.eye_pose[:, :3], drawn.motion.eye_pose[:, 3:])


def test_the_condition_camera_is_the_first_view_of_the_first_motion():
    recipe = draw_identity(RecipeConfig(), 0, 1)
    assert torch.equal(recipe.condition_camera, recipe.motions[0].cameras[:1])


def angles(cameras):
    """Yaw, elevation and roll of camera labels, radians, from the matrices alone."""
    c2w = Camera.from_label(cameras).c2w.double()
    backward, right = c2w[:, :3, 2], c2w[:, :3, 0]
    yaw, elevation = torch.atan2(backward[:, 0], backward[:, 2]), torch.asin(backward[:, 1])
    level = torch.stack([yaw.cos(), torch.zeros_like(yaw), -yaw.sin()], dim=1)
    return yaw, elevation, torch.acos((right * level).sum(1).clamp(-1, 1))


def test_look_at_cameras_fill_the_published_ranges_and_stay_inside():
    config = RecipeConfig(look_at_probability=1.0, dynamic_share=0.0, static_views=40)
    cameras = torch.cat([draw_identity(config, 0, identity).motions[0].cameras for identity in range(30)])
    yaw, elevation, roll = angles(cameras)
    assert yaw.abs().max() <= 0.78 + 1e-5 and yaw.max() > 0.75 and yaw.min() < -0.75
    low, high = math.degrees(float(elevation.min())), math.degrees(float(elevation.max()))
    assert -9.16 <= low < -8.5 and 23.5 < high <= 24.45  # the published -9.2 to +24.4 degrees
    assert roll.max() <= 0.25 + 1e-3 and roll.max() > 0.24
    uniform = (torch.sin(elevation) * math.pi / 2 + 0.25) / 0.9  # p back from the elevation, to U(0, 1)
    assert abs(float(uniform.mean()) - 0.5) < 0.03 and abs(float(uniform.std()) - 12**-0.5) < 0.02


def test_half_of_the_cameras_are_look_at_cameras_and_half_of_the_dynamic_jaws_are_opened():
    recipes = [draw_identity(RecipeConfig(), 0, identity) for identity in range(200)]
    look_at = [flag for recipe in recipes for motion in recipe.motions for flag in motion.draws["look_at"]]
    opened = [motion.draws["jaw_opened"] for recipe in recipes if recipe.kind == "dynamic" for motion in recipe.motions]
    assert 0.46 < np.mean(look_at) < 0.54 and 0.42 < np.mean(opened) < 0.58
    assert not any(motion.draws["jaw_opened"] for recipe in recipes if recipe.kind == "static" for motion in recipe.motions)
    assert all(0 <= float(motion.motion.jaw_pose[0, 0]) <= 0.2 for recipe in recipes for motion in recipe.motions)


@pytest.mark.parametrize("source", ["parametric", "studio"])
@pytest.mark.parametrize("probability", [0.0, 1.0])
def test_no_camera_is_nearer_or_farther_than_the_stated_bounds(probability, source):
    config = RecipeConfig(source=source, look_at_probability=probability, look_at=LookAtCameras(target_xy=0.2, target_z=(-0.3, 0.1)))
    near, far = camera_distances(config)
    for identity in range(40):
        for motion in draw_identity(config, 0, identity).motions:
            camera = Camera.from_label(motion.cameras)
            distance = world_to_camera(torch.zeros(len(motion.cameras), 1, 3), camera)[:, 0, 2].abs()
            assert near <= distance.min() and distance.max() <= far
            assert torch.allclose(ray_bounds(camera, 1.3)[0], distance - 0.65)


def test_the_studio_draws_its_own_shapes_and_motions_and_the_published_jaw_augmentation_applies():
    recipes = [draw_identity(RecipeConfig(source="studio"), 0, identity) for identity in range(60)]
    shapes = torch.cat([recipe.shape for recipe in recipes])
    assert shapes[:, 200:].std() < 0.2 * shapes[:, :20].std()  # its components fade, the parametric ones do not
    jaws = {True: [], False: []}
    for recipe in recipes:
        for motion in recipe.motions:
            jaws[motion.draws["jaw_opened"]].append(float(motion.motion.jaw_pose[0, 0]))
    assert 0 < max(jaws[True]) <= 0.2 and 0.07 < np.mean(jaws[True]) < 0.13 and len(jaws[True]) > 40


@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 1.0])
def test_kinds_are_spread_evenly(share):
    config = RecipeConfig(dynamic_share=share)
    kinds = [kind_of(config, identity) for identity in range(100)]
    for count in (1, 7, 10, 50, 100):
        assert kinds[:count].count("dynamic") == math.floor(count * share + 1e-9)


def test_frame_count_needs_no_draw():
    config = RecipeConfig(dynamic_motions=3)
    for identity in range(6):
        assert frame_count(config, identity) == len(draw_identity(config, 0, identity).motions)


def test_hashed_splits_hold_their_shares_and_do_not_depend_on_the_set_size():
    config = RecipeConfig(val_share=0.1, test_share=0.2)
    splits = [split_of(config, 7, identity) for identity in range(2000)]
    assert abs(splits.count("val") / 2000 - 0.1) < 0.025 and abs(splits.count("test") / 2000 - 0.2) < 0.03
    assert splits != [split_of(config, 8, identity) for identity in range(2000)]


def test_modulo_splits_give_a_tiny_set_held_out_identities_of_both_kinds():
    config = RecipeConfig(val_share=0.25, test_share=0.25, split_rule="modulo")
    found = {(kind_of(config, identity), split_of(config, 0, identity)) for identity in range(8)}
    assert found == {(kind, split) for kind in ("static", "dynamic") for split in ("train", "val", "test")}
    splits = [split_of(config, 0, identity) for identity in range(80)]
    assert splits.count("val") == splits.count("test") == 20


def test_without_held_out_shares_everybody_is_in_training():
    config = RecipeConfig(val_share=0.0, test_share=0.0, split_rule="modulo")
    assert {split_of(config, 0, identity) for identity in range(50)} == {"train"}


def test_shares_that_exceed_the_whole_are_refused():
    with pytest.raises(ValueError, match="at most 1"):
        RecipeConfig(val_share=0.6, test_share=0.6)


@pytest.mark.parametrize(
    ("build", "name"),
    [
        (lambda: LookAtCameras(pitch=(-2.0, 0.5)), "pitch"),
        (lambda: LookAtCameras(target_z=(0.2, 0.1)), "target_z"),
        (lambda: LookAtCameras(radius=(0.3, 0.4)), "radius"),
        (lambda: PortraitCameras(radius=(5.0, 4.0)), "radius"),
        (lambda: MotionDraws(jaw_open_rad=(-0.1, 0.2)), "jaw_open_rad"),
    ],
)
def test_ranges_that_cannot_be_drawn_from_are_refused(build, name):
    with pytest.raises(ValueError, match=f"{name}: expected a smaller and a larger number between"):
        build()


def test_recipes_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        RecipeConfig().val_share = 0.5


# Motion-rich identities -------------------------------------------------------------------------------------------------------


def test_kinds_come_in_their_shares_evenly_and_no_motion_rich_one_moves_no_other():
    plain, rich = RecipeConfig(), RecipeConfig(dynamic_share=0.4, motion_rich_share=0.2)
    assert {kind_of(plain, identity) for identity in range(100)} == {"static", "dynamic"}
    kinds = [kind_of(rich, identity) for identity in range(100)]
    assert [kinds.count(kind) for kind in ("motion-rich", "dynamic", "static")] == [20, 40, 40]
    assert all(kinds[start : start + 5].count("motion-rich") == 1 for start in range(0, 100, 5))
    assert all(3 <= kinds[start : start + 10].count("dynamic") <= 5 for start in range(0, 100, 10))
    assert {kind_of(RecipeConfig(dynamic_share=0.0, motion_rich_share=1.0), identity) for identity in range(9)} == {"motion-rich"}
    with pytest.raises(ValueError, match="dynamic_share \\+ motion_rich_share: expected at most 1, got 1.1"):
        RecipeConfig(dynamic_share=0.8, motion_rich_share=0.3)


def test_motion_rich_identities_have_their_own_numbers_of_motions_and_views_and_dynamic_draws():
    config = RecipeConfig(dynamic_share=0.0, motion_rich_share=1.0)
    recipe = draw_identity(config, 0, 7)
    assert recipe.kind == "motion-rich" and len(recipe.motions) == frame_count(config, 7) == 16
    assert {len(drawn.cameras) for drawn in recipe.motions} == {2}
    assert len({drawn.motion.expression.numpy().tobytes() for drawn in recipe.motions}) == 16
    opened = [drawn.draws["jaw_opened"] for identity in range(20) for drawn in draw_identity(config, 0, identity).motions]
    assert 0.4 < np.mean(opened) < 0.6


def test_modulo_splits_hold_out_every_kind():
    config = RecipeConfig(dynamic_share=0.25, motion_rich_share=0.5, val_share=0.25, test_share=0.25, split_rule="modulo")
    found = {(kind_of(config, identity), split_of(config, 0, identity)) for identity in range(32)}
    assert len(found) == 9


@pytest.mark.parametrize("source", ["parametric", "studio"])
def test_no_latent_shape_motion_or_camera_is_shared_between_identities_and_so_between_splits(source):
    config = RecipeConfig(source=source, val_share=0.3, test_share=0.3, motion_rich_share=0.1, motion_rich_motions=3)
    seen: dict[bytes, int] = {}
    splits = set()
    for identity in range(40):
        recipe = draw_identity(config, 0, identity)
        splits.add(recipe.split)
        values = [recipe.latent(512), recipe.shape]
        for drawn in recipe.motions:
            values += [drawn.motion.expression, drawn.motion.eye_pose, *drawn.cameras]
        for value in values:
            assert seen.setdefault(value.numpy().tobytes(), identity) == identity
    assert splits == {"train", "val", "test"}


def test_normal_draws_are_cut_where_the_settings_say():
    for cut in (3.0, 0.5):
        config = RecipeConfig(dynamic_share=1.0, look_at_probability=0.0, cut_deviations=cut, motion=MotionDraws(jaw_open_probability=0.0))
        recipes = [draw_identity(config, 0, identity) for identity in range(20)]
        shapes = torch.cat([recipe.shape for recipe in recipes]).abs()
        expressions = torch.cat([drawn.motion.expression for recipe in recipes for drawn in recipe.motions]).abs()
        assert shapes.max() == pytest.approx(0.92 * cut) and expressions.max() == pytest.approx(2.1 * cut)
        yaw, elevation, _ = angles(torch.cat([drawn.cameras for recipe in recipes for drawn in recipe.motions]))
        assert yaw.abs().max() <= 0.25 * cut + 0.02 and elevation.abs().max() <= 0.12 * cut + 0.02  # the axis passes the origin at 0.02
