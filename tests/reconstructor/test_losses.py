"""Each loss term against numbers computed by hand."""

import dataclasses
import math

import pytest
import torch

from head3d.rendering import HeadImages
from head3d.run.errors import ConfigError
from reconstructor.batches import Batch
from reconstructor.frozen_networks import FrozenNetworks, IdentityNetwork, PerceptualNetwork, frozen_network_losses
from reconstructor.losses import (
    TERM_MEMBERS,
    LossConfig,
    SmoothnessConfig,
    TermConfig,
    check_labels,
    labels_at,
    members_needed,
    reconstruction_losses,
    smoothness_loss,
)

B, S, R, C, N = 2, 8, 4, 5, 6


def full(value, *shape):
    return torch.full((B, *shape), float(value))


def rendered(**changes):
    images = HeadImages(
        image=full(0.5, 3, S, S),
        raw=full(0.25, 3, R, R),
        features=full(0, C, R, R),
        foreground=full(0.5, C, R, R),
        background=full(-0.5, C, R, R),
        depth=full(4.5, 1, R, R),
        opacity=full(0.75, 1, R, R),
        rays=None,
    )
    return dataclasses.replace(images, **changes)


def batch(**changes):
    opacity = full(0, 1, R, R)
    opacity[..., :2] = 1  # the left half is head
    labels = Batch(
        source_image=full(0, 3, S, S),
        source_motion=full(0, 109),
        driving_motion=full(0, 109),
        motion_scale=full(0),
        label=full(0, 437),
        identity=torch.zeros(B, dtype=torch.long),
        image=full(0.4, 3, S, S),
        opacity=opacity,
        depth=full(4.0, 1, R, R),
        foreground=full(0.3, C, R, R),
        background=full(-0.2, 3, R, R),
        background_features=full(-0.1, C, R, R),
        points=full(0, N, 3),
        point_features=full(1.0, N, C),
    )
    return dataclasses.replace(labels, **changes)


def losses(config=None, images=None, labels=None, seen=0):
    features = lambda points: torch.full((B, points.shape[1], C), 3.0)  # noqa: E731
    return reconstruction_losses(config or LossConfig(), images or rendered(), labels or batch(), features, seen)


def test_terms_have_the_published_weights_and_the_values_computed_by_hand():
    terms = losses()
    assert {name: round(value.item(), 5) for name, value in terms.items()} == {
        "image_final": 0.1,  # |0.5 - 0.4|
        "image_raw": 0.15,  # |0.25 - 0.4|
        "image_foreground": 0.7,  # 0.7 on the head, nothing beside it: 2 * mean(0.2 on half, 0.5 on half) on the scale of [-1, 1]
        "image_background": 0.3,  # |-0.5 + 0.2|
        "features": 0.8,  # 2 * |0.5 - 0.3| + |-0.5 + 0.1|
        "points": 0.2,  # 0.1 * |3 - 1|
        "depth": 0.25,  # |4.5 - 4| on half of the pixels
        "opacity": 0.3,  # 0.3 * 2 * mean(0.25 on half, 0.75 on half)
    }


def test_the_raw_target_is_the_picture_reduced_with_antialiasing():
    stripes = full(0, 3, S, S)
    stripes[..., ::2] = 1.0  # every other column: a filtered reduction sees their mean inside
    term = losses(images=rendered(raw=full(0.5, 3, R, R)), labels=batch(image=stripes))["image_raw"]
    assert term.item() < 0.1


def test_terms_follow_their_ranges():
    early, late = set(losses(seen=399_999)), set(losses(seen=400_000))
    assert early - late == {"features", "points", "depth"} and late < early
    config = LossConfig(image=TermConfig(0.0), opacity=TermConfig(1.0, since=10, until=20))
    assert "image_final" not in losses(config) and "opacity" not in losses(config, seen=9)
    assert "opacity" in losses(config, seen=10) and "opacity" not in losses(config, seen=20)


def test_a_perfect_rendering_has_no_loss():
    """Half-covered pixels: foreground 0.3 before a background of 0.45 shows 0.3 + 0.5 * 0.45 = 0.525, which is 0.05 in [-1, 1]."""
    labels = batch(image=full(0.05, 3, S, S), opacity=full(0.5, 1, R, R), background=full(-0.1, 3, R, R), point_features=full(3.0, N, C))
    images = rendered(
        image=labels.image,
        raw=full(0.05, 3, R, R),
        foreground=labels.foreground,
        background=labels.background_features,
        depth=labels.depth,
        opacity=labels.opacity,
    )
    assert all(value.item() == pytest.approx(0, abs=1e-6) for value in losses(images=images, labels=labels).values())


@pytest.mark.parametrize(
    ("picture", "opacity", "background", "expected"),
    [
        (0.0, 0.5, -0.5, 0.375),  # 0.5 - 0.5 * 0.25
        (0.0, 0.25, 1.0, 0.0),  # 0.5 - 0.75 * 1: nothing is darker than black
        (1.0, 0.25, -1.0, 0.25),  # 1 - 0: a quarter of a pixel is at most a quarter bright
        (0.6, 0.0, -0.6, 0.0),  # a picture that differs from the background where nothing is
    ],
)
def test_the_foreground_target_is_what_the_picture_leaves_in_front_of_the_background(picture, opacity, background, expected):
    labels = batch(image=full(picture, 3, S, S), opacity=full(opacity, 1, R, R), background=full(background, 3, R, R))
    images = rendered(foreground=full(0.5, C, R, R))
    assert losses(images=images, labels=labels)["image_foreground"].item() == pytest.approx(2 * abs(0.5 - expected))


def test_frozen_networks_compare_the_four_pictures_and_the_person_in_the_final_one():
    """The distance is ten times L1, the embedding a point of the unit circle at the angle of the picture's mean."""
    distance = lambda picture, truth: 10 * (picture - truth).abs().mean((1, 2, 3))  # noqa: E731
    angle = lambda pictures, labels: torch.stack([f(pictures.mean((1, 2, 3))) for f in (torch.cos, torch.sin)], dim=1)  # noqa: E731
    networks = FrozenNetworks(PerceptualNetwork("ours", distance, ""), IdentityNetwork("who", angle, ""))
    terms = frozen_network_losses(LossConfig(), networks, rendered(), batch(), 400_000)
    assert {name: round(value.item(), 5) for name, value in terms.items()} == {
        "ours_final": 1.0,  # ten times the values of the image term
        "ours_raw": 1.5,
        "ours_foreground": 7.0,
        "ours_background": 3.0,
        "who": 0.005,  # 1 - cos(0.5 - 0.4)
    }
    assert "who" not in frozen_network_losses(LossConfig(), networks, rendered(), batch(), 399_999)
    late = LossConfig(perceptual=TermConfig(0.5, since=10, until=20), identity=TermConfig(3.0, since=10))
    assert frozen_network_losses(late, networks, rendered(), batch(), 9) == {}
    terms = frozen_network_losses(late, networks, rendered(), batch(), 10)
    assert terms["ours_raw"].item() == pytest.approx(0.75) and terms["who"].item() == pytest.approx(3 * (1 - math.cos(0.1)), rel=1e-3)
    assert set(frozen_network_losses(late, networks, rendered(), batch(), 20)) == {"who"}


def test_depth_counts_on_the_head_only():
    labels = batch()
    images = rendered(depth=labels.depth + 5 * (1 - labels.opacity))
    assert losses(images=images, labels=labels)["depth"].item() == 0


def test_gradients_reach_every_rendered_quantity():
    images = rendered()
    parts = {
        name: getattr(images, name).clone().requires_grad_() for name in ("image", "raw", "foreground", "background", "depth", "opacity")
    }
    sum(losses(images=rendered(**parts)).values()).backward()
    assert all(part.grad.abs().sum() > 0 for part in parts.values())


def test_only_the_members_of_active_terms_are_asked_for():
    assert members_needed(LossConfig(), 0) == {
        "foreground", "background", "identity.background", "points", "point_features", "depth", "opacity"
    }  # fmt: skip
    assert members_needed(LossConfig(), 400_000) == {"background", "opacity"}  # which every frame has by default
    assert set(TERM_MEMBERS) | {"smoothness"} == {field.name for field in dataclasses.fields(LossConfig)}


def test_a_term_without_labels_is_an_error_that_names_term_member_and_remedy():
    everything = dict.fromkeys(("foreground", "background", "identity.background", "points", "point_features", "depth", "opacity"), 10)
    assert check_labels(LossConfig(), everything, 10, "runs/data") == []
    message = r"runs/data: the loss losses.depth .* 'depth', but none of the 10 .* the label depth .* --losses.depth.weight 0"
    with pytest.raises(ConfigError, match=message):
        check_labels(LossConfig(), {name: count for name, count in everything.items() if name != "depth"}, 10, "runs/data")
    with pytest.raises(ConfigError, match=r"losses.features .* 'identity.background', but none .* the label background "):
        check_labels(LossConfig(), everything | {"identity.background": 0}, 10, "runs/data")
    assert check_labels(LossConfig(points=TermConfig(0.0)), everything | {"points": 0}, 10, "runs/data") == []


def test_a_term_with_labels_for_some_frames_says_which_images_they_are():
    everything = dict.fromkeys(("foreground", "background", "identity.background", "points", "point_features", "depth", "opacity"), 10)
    config = LossConfig(depth=TermConfig(1.0, since=5))
    assert check_labels(config, everything | {"point_features": 4, "depth": 3}, 10, "here") == [
        "losses.points: from 0 images to 400000, targets are the 4 of 10 frames with 'point_features'",
        "losses.depth: from 5 images to the end, targets are the 3 of 10 frames with 'depth'",
    ]


def test_smoothness_is_the_mean_difference_to_a_jittered_neighbour_inside_the_box():
    config, seen = SmoothnessConfig(weight=0.25, every=4, points=4000, jitter=0.1), []

    def ramp(points):
        seen.append(points)
        return 10 * points[..., 0]

    value = smoothness_loss(config, ramp, torch.zeros(2), 1.3, torch.Generator().manual_seed(0))
    here, there = seen[0].split(4000, dim=1)
    assert here.shape == (2, 4000, 3) and here.abs().max() <= 0.65 and here.abs().max() > 0.64
    assert (there - here).std().item() == pytest.approx(0.1, rel=0.05)
    # mean |N(0, 0.1^2)| = 0.1 sqrt(2 / pi); times slope 10, weight 0.25, every 4
    assert value.item() == pytest.approx(0.0797885 * 10, rel=0.05)
    again = smoothness_loss(config, ramp, torch.zeros(2), 1.3, torch.Generator().manual_seed(0))
    assert torch.equal(value, again)


def test_labels_are_enlarged_to_the_rays(world, tmp_path, first_batch):
    batch = first_batch(world.run(tmp_path))
    enlarged = labels_at(batch, 32)
    assert enlarged.opacity.shape[-1] == enlarged.background_features.shape[-1] == enlarged.depth.shape[-1] == 32
    assert torch.equal(enlarged.image, batch.image) and torch.equal(enlarged.points, batch.points)
    left, right = batch.opacity[..., 0, 4], batch.opacity[..., 0, 5]  # pixel centres of 32 lie at quarters between those of 16
    assert torch.allclose(enlarged.opacity[..., 0, 9], 0.75 * left + 0.25 * right)
    assert torch.allclose(enlarged.opacity[..., 0, 10], 0.25 * left + 0.75 * right)
    same = labels_at(batch, 16)
    assert torch.equal(same.depth, batch.depth)
