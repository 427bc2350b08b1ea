"""The order of training pictures, who sees whom, and what is done to a picture."""

import types

import numpy as np
import pytest
import torch

from head3d.run.errors import DataError
from reconstructor.perception_data import (
    AugmentConfig,
    PictureBatchConfig,
    PictureKey,
    PictureOrder,
    Pictures,
    augment,
    read_pictures,
    replace_background,
    role_of,
    training_frames,
)

NOTHING = AugmentConfig(gain=0, brightness=0, saturation=0, blur=0, zoom=0, shift=0, background_share=0)


def frames(people=40, motions=3, split="train"):
    """Every person in some motions, of two views each; those with an even number have one motion."""
    return [
        types.SimpleNamespace(identity=number, motion=motion, split=split, views=2)
        for number in range(people)
        for motion in range(motions if number % 2 else 1)
    ]


def order(all_frames, **changes):
    return PictureOrder(all_frames, training_frames(all_frames, "losses", "here"), PictureBatchConfig(**changes), seed=5)


def test_every_training_person_belongs_to_one_role_whatever_else_is_in_the_set():
    found = {role: set(training_frames(frames(), role, "here")) for role in ("losses", "evaluation")}
    assert found["losses"] | found["evaluation"] == set(range(40)) and not found["losses"] & found["evaluation"]
    assert found["losses"] == {n for n in training_frames(frames(60), "losses", "here") if n < 40}
    assert 400 < sum(role_of(number) == "losses" for number in range(1000)) < 600


@pytest.mark.parametrize("too_few", [frames(1), frames(40, 1), frames(split="test")], ids=["one person", "one motion each", "held out"])
def test_too_few_people_or_motions_are_an_error_that_counts_them(too_few):
    with pytest.raises(DataError, match=r"here: expected at least two training identities .*; got \d+, 0 with motions; generate more"):
        training_frames(too_few, "losses", "here")


def test_an_epoch_shows_everybody_once_and_a_person_in_as_many_motions_as_there_are():
    everything = frames()
    one = order(everything, identities=4, pictures=4)
    people = len(training_frames(everything, "losses", "here"))
    shown = [one.pictures_of(position) for position in range(people)]
    assert len({everything[keys[0].frame].identity for keys in shown}) == people
    for keys in shown:
        number = everything[keys[0].frame].identity
        assert {everything[key.frame].identity for key in keys} == {number} and len(keys) == 4
        assert len({key.frame for key in keys[:3]}) == (3 if number % 2 else 1)
    assert {key.view for keys in shown for key in keys} == {0, 1}


def test_the_order_depends_on_position_and_seed_alone_and_ranks_share_it_out():
    one = order(frames(), identities=4, pictures=2)
    assert one.batch(24) == order(frames(), identities=4, pictures=2).batch(24) != one.batch(32)
    first, second = one.batch(24, 0, 2), one.batch(24, 1, 2)
    assert first[:2] + second[:2] + first[2:] + second[2:] == one.batch(24)
    assert one.batch(24)[2:] == one.batch(26)[:6]  # the clock counts pictures, two of each person


def pictures(count=4, side=32):
    draws = torch.Generator().manual_seed(0)
    numbers = torch.arange(count)
    opacity = torch.zeros(count, 1, side, side)
    opacity[..., side // 4 : 3 * side // 4, side // 4 : 3 * side // 4] = 1
    return Pictures(torch.rand(count, 3, side, side, generator=draws) * 1.6 - 0.8, opacity, torch.zeros(count, 437), numbers, numbers)


def changed(given, config, seed=1):
    return augment(given, config, torch.Generator().manual_seed(seed), torch.arange(len(given.image)), len(given.image))


def test_without_any_change_the_picture_stays_as_it_is():
    seen = changed(pictures(), NOTHING)
    assert torch.allclose(seen.image, pictures().image, atol=1e-5)
    points = torch.rand(4, 7, 2)
    assert torch.equal(seen.move(points), points)


def test_points_move_with_the_picture():
    given = pictures()
    given.image.fill_(-1)
    given.image[:, :, 12, 21] = 1  # the pixel whose middle is at u = 21.5 / 32, v = 12.5 / 32
    seen = changed(given, AugmentConfig(gain=0, brightness=0, saturation=0, blur=0, zoom=0.2, shift=0.15, background_share=0))
    weights = (seen.image[:, 0] + 1) / (seen.image[:, 0] + 1).sum((1, 2), keepdim=True)
    centres = (torch.arange(32) + 0.5) / 32
    found = torch.stack([(weights.sum(1) * centres).sum(1), (weights.sum(2) * centres).sum(1)], dim=1)
    expected = seen.move(torch.tensor([[[21.5 / 32, 12.5 / 32]]]).expand(4, 1, 2))[:, 0]
    assert torch.allclose(found, expected, atol=0.5 / 32) and (expected - expected[:1]).abs().max() > 0.02


def test_what_happens_to_a_picture_does_not_depend_on_the_number_of_ranks():
    given, config = pictures(), AugmentConfig()
    whole = changed(given, config)
    rows = torch.tensor([1, 3])
    part = augment(Pictures(*(value[rows] for value in given)), config, torch.Generator().manual_seed(1), rows, 4)
    assert torch.allclose(part.image, whole.image[rows], atol=1e-6) and torch.equal(part.shift, whole.shift[rows])


def test_the_background_is_replaced_where_the_head_is_not():
    given = pictures()
    noise, where = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(2)), torch.tensor([True, True, True, False])
    replaced = replace_background(given.image, given.opacity, noise, where)
    other = replace_background(-given.image, given.opacity, noise, where)
    inside, corner = (..., slice(12, 20), slice(12, 20)), (..., slice(0, 4), slice(0, 4))
    assert torch.equal(replaced[inside], given.image[inside])
    assert torch.equal(replaced[:3][corner], other[:3][corner]) and not torch.equal(replaced[0][corner], replaced[1][corner])
    assert torch.equal(replaced[3], given.image[3])


def test_blur_keeps_flat_pictures_and_softens_others():
    config = AugmentConfig(gain=0, brightness=0, saturation=0, blur=0.1, zoom=0, shift=0, background_share=0)
    flat, rough = pictures(), pictures()
    flat.image.fill_(0.3)
    assert torch.allclose(changed(flat, config).image, flat.image, atol=1e-5)
    left = changed(rough, config).image.flatten(1).std(1) / rough.image.flatten(1).std(1)
    assert (left < 1.001).all() and left.min() < 0.3


def test_colours_change_and_stay_pictures():
    config = AugmentConfig(blur=0, zoom=0, shift=0, background_share=0)
    seen = changed(pictures(), config).image
    assert seen.abs().max() <= 1 and (seen - pictures().image).abs().mean() > 0.05


def test_pictures_of_different_sides_come_at_one():
    class Set:
        frames = frames(people=2)

        def read(self, frame, members):
            side = 8 if frame.identity else 16
            label = np.full((2, 437), frame.identity, np.float32)
            picture = np.full((side, side, 3), 255 * frame.identity, np.uint8)
            return {members[0]: picture, "opacity": np.full((2, side // 2, side // 2), 0.25, np.float32), "label": label}

    read = read_pictures(Set(), [PictureKey(0, 1), PictureKey(2, 0)], 12)
    assert read.image.shape == (2, 3, 12, 12) and read.image[:, 0, 5, 5].tolist() == pytest.approx([-1, 1], abs=1e-5)
    assert read.opacity.shape == (2, 1, 12, 12) and torch.allclose(read.opacity, torch.tensor(0.25))
    assert read.label[:, 0].tolist() == read.identity.tolist() == [0, 1] and read.frame.tolist() == [0, 2]
