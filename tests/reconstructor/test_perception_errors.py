"""What is said about the perception network's errors, by hand."""

import math

import pytest
import torch

from head3d.labels import Motion
from reconstructor.perception import Reading
from reconstructor.perception_errors import (
    identity_measures,
    linear_probe,
    motion_measures,
    nearest_probe,
    reading_errors,
    rotation_angle,
    separation,
    split_by_motion,
)


def turn_y(angle):
    return torch.tensor([[math.cos(angle), 0, math.sin(angle)], [0, 1, 0], [-math.sin(angle), 0, math.cos(angle)]])


@pytest.mark.parametrize("degrees", [0.0, 0.01, 10.0, 90.0, 180.0])
def test_the_angle_between_rotations_is_exact_from_nothing_to_a_half_turn(degrees):
    first = turn_y(0.7)
    assert rotation_angle(first, first @ turn_y(math.radians(degrees))).item() == pytest.approx(degrees, abs=1e-3)


def test_errors_are_in_the_units_that_they_name(built_in_head):
    head = built_in_head
    truth = Reading(torch.zeros(1, 100), torch.zeros(1, 3), torch.zeros(1, 6), torch.eye(3)[None], torch.full((1, 70, 2), 0.5))
    assert all(value.item() == 0 for value in reading_errors(truth, truth, torch.zeros(1, 300), head).values())
    expression = torch.zeros(1, 100)
    expression[0, 3] = 0.7
    wrong = Reading(
        expression,
        torch.tensor([[math.radians(20.0), 0, 0]]),
        torch.tensor([[0, math.radians(8.0), 0, math.radians(4.0), 0, 0.5]]),  # the roll of an eye is no direction
        turn_y(math.radians(3.0))[None],
        truth.landmarks + torch.tensor([0.03, 0.04]),
    )
    errors = {name: value.item() for name, value in reading_errors(wrong, truth, torch.zeros(1, 300), head).items()}
    assert errors["expression"] == pytest.approx(0.007) and errors["landmarks"] == pytest.approx(0.05)
    assert errors["jaw_deg"] == pytest.approx(20, abs=1e-3) and errors["rotation_deg"] == pytest.approx(3, abs=1e-3)
    assert errors["gaze_deg"] == pytest.approx(6, abs=0.05)
    moved = Motion(expression, torch.zeros(1, 3), wrong.jaw_pose, torch.zeros(1, 6))
    apart = head.vertices(torch.zeros(1, 300), moved) - head.vertices(torch.zeros(1, 300), Motion.neutral(1))
    assert errors["face_mm"] == pytest.approx(apart.norm(dim=2).mean().item() * 1000 / 3)


def test_separation_counts_pairs_in_the_right_order_and_ties_by_half():
    assert separation(torch.tensor([0.9, 0.5]), torch.tensor([0.5, 0.1])) == pytest.approx(3.5 / 4)
    assert separation(torch.tensor([0.1]), torch.tensor([0.5, 0.3])) == 0.0


def test_people_are_told_apart_over_pictures_of_different_motions():
    embedding = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.8, 0.6], [0.0, 1.0]])
    identity, frame = torch.tensor([1, 1, 1, 2]), torch.tensor([10, 10, 11, 20])  # the first two show one motion
    found = identity_measures(embedding, identity, frame)
    assert found["same"] == pytest.approx(0.8) and found["different"] == pytest.approx((0 + 0 + 0.6) / 3) and found["separation"] == 1.0
    assert identity_measures(embedding, torch.ones(4), frame)["separation"] is None


def test_the_classifier_is_tested_on_motions_that_it_was_not_fitted_on():
    identity = torch.tensor([1, 1, 1, 1, 2, 2, 3])
    frame = torch.tensor([10, 10, 11, 12, 20, 21, 30])
    fitted, tested = split_by_motion(identity, frame)
    assert sorted(fitted.tolist()) == [0, 1, 3, 4] and sorted(tested.tolist()) == [2, 5]  # identity 3 has one motion


def people_and_motions(people=6, motions=4, views=2):
    """Identity and frame numbers, and codes that tell just the motion, or just the person."""
    identity = torch.arange(people).repeat_interleave(motions * views)
    frame = torch.arange(people * motions).repeat_interleave(views)
    draws = torch.Generator().manual_seed(0)
    of_frames, of_people = (
        torch.nn.functional.normalize(torch.randn(count, 8, generator=draws), dim=1) for count in (people * motions, people)
    )
    return identity, frame, of_frames[frame], of_people[identity]


def test_a_code_of_the_motion_alone_is_found_and_names_nobody():
    identity, frame, moving, personal = people_and_motions()
    found = motion_measures(moving, moving, personal, identity, frame)
    assert found["rank"] == 0 and found["people"] == 6 and found["chance"] == pytest.approx(1 / 6)
    assert found["told_by_identity_embedding_nearest"] == found["told_by_identity_embedding_linear"] == 1.0
    assert found["told_by_motion_vector_nearest"] < 0.5


def test_a_code_of_the_person_finds_no_motion():
    identity, frame, moving, personal = people_and_motions()
    found = motion_measures(personal, moving, personal, identity, frame)
    assert found["told_by_motion_vector_linear"] == 1.0 and 0.3 < found["rank"] < 0.7
    assert motion_measures(personal, -personal, personal, identity, frame)["rank"] > 0.8  # what shows it lies farthest


def test_the_probes_name_people_by_direction_and_by_plane():
    fitted, people = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]]), torch.tensor([4, 7, 9])
    tested, truth = torch.tensor([[5.0, 1.0], [1.0, 9.0], [1.0, 0.1]]), torch.tensor([4, 7, 9])
    assert nearest_probe(fitted, people, tested, truth) == pytest.approx(2 / 3)
    assert linear_probe(fitted.repeat(20, 1), people.repeat(20), fitted, people) == 1.0
