"""The losses of the perception network, by hand."""

import math

import pytest
import torch
import torch.nn.functional as F

from head3d.head_model import SCENE_UNITS_PER_METRE
from head3d.labels import Motion
from reconstructor.perception import Perception, PerceptionConfig, Reading, TrunkConfig
from reconstructor.perception_losses import (
    PerceptionWeights,
    Scaffold,
    _Reversed,
    angular_margin_loss,
    motion_contrast_loss,
    reading_losses,
)


def direction(angle):
    return torch.tensor([math.cos(angle), math.sin(angle)])


def test_the_angular_margin_is_added_to_the_angle_of_the_right_person():
    centres = 3.0 * torch.stack([direction(0.0), direction(1.5)])  # their lengths do not count
    embedding = direction(0.4)[None]
    wrong = math.exp(10 * math.cos(1.1))
    for margin in (0.0, 0.3):
        right = math.exp(10 * math.cos(0.4 + margin))
        loss = angular_margin_loss(embedding, centres, torch.tensor([0]), 10.0, margin)
        assert loss.item() == pytest.approx(-math.log(right / (right + wrong)), rel=1e-4)


def test_beyond_the_half_turn_the_margin_goes_on_straight():
    centres, margin = torch.stack([direction(0.0), direction(1.5)]), 0.5
    angle = math.pi - 0.2  # with the margin, past the half turn
    right, wrong = math.exp(math.cos(angle) - margin * math.sin(margin)), math.exp(math.cos(angle - 1.5))
    loss = angular_margin_loss(direction(angle)[None], centres, torch.tensor([0]), 1.0, margin)
    assert loss.item() == pytest.approx(-math.log(right / (right + wrong)), rel=1e-4)


def test_a_motion_is_contrasted_with_the_same_persons_other_motions_alone():
    pictures = torch.stack([direction(0.1), direction(0.9), direction(0.2), direction(0.3)])
    motions = torch.stack([direction(0.0), direction(1.0), direction(0.0), direction(0.0)])
    frame, identity = torch.tensor([7, 8, 7, 20]), torch.tensor([1, 1, 1, 2])

    def term(right, others):
        exponents = [math.exp(math.cos(angle) / 0.5) for angle in (right, *others)]
        return -math.log(exponents[0] / sum(exponents))

    expected = [term(0.1, [0.9]), term(0.1, [0.9, 0.8]), term(0.2, [0.9]), 0.0]  # frame 7 has two pictures; identity 2 has one motion
    loss = motion_contrast_loss(pictures, motions, frame, identity, 0.5)
    assert loss.item() == pytest.approx(sum(expected) / 4, rel=1e-5)


def test_the_adversary_learns_and_the_encoder_unlearns():
    codes, weight = torch.tensor([[1.0, 2.0]], requires_grad=True), torch.tensor([[3.0, 4.0]], requires_grad=True)
    (_Reversed.apply(codes) * weight).sum().backward()
    assert torch.equal(weight.grad, torch.tensor([[1.0, 2.0]])) and torch.equal(codes.grad, torch.tensor([[-3.0, -4.0]]))


@pytest.fixture(scope="module")
def measured(built_in_head):
    """A network calibrated on 40 made-up readings, its scaffold, those readings and the head."""
    draws = torch.Generator().manual_seed(3)
    truth = Reading(
        expression=torch.randn(40, 100, generator=draws) * torch.linspace(2, 0.1, 100),
        jaw_pose=torch.randn(40, 3, generator=draws) * torch.tensor([0.1, 0.01, 0.0]),
        eye_pose=torch.randn(40, 6, generator=draws) * 0.1,
        rotation=torch.linalg.qr(torch.eye(3) + 0.3 * torch.randn(40, 3, 3, generator=draws)).Q,
        landmarks=torch.rand(40, 70, 2, generator=draws),
    )
    trunk = TrunkConfig(16, 8, (1, 1))
    config = PerceptionConfig(trunk=trunk, identity_size=4, hidden=4, motion_trunk=trunk, motion_directions=4, motion_hidden=4)
    network = Perception(config)
    network.calibrate(truth, built_in_head)
    scaffold = Scaffold(config, [3, 5])
    scaffold.calibrate(truth, network, built_in_head)
    return network, scaffold, truth, built_in_head


def test_who_always_says_the_mean_gets_a_loss_of_one_but_for_correlated_expressions(measured):
    network, scaffold, truth, _ = measured
    terms = reading_losses(PerceptionWeights(jaw=2.0), network, scaffold, network.mean_reading(40), truth)
    assert terms["jaw"].item() == pytest.approx(2.0, rel=1e-4)
    for name in ("gaze", "landmarks", "rotation"):
        assert terms[name].item() == pytest.approx(1.0, rel=1e-4)
    assert terms["expression"].item() == pytest.approx(1.0, rel=0.5)
    assert all(
        value.item() == pytest.approx(0, abs=1e-8)
        for value in reading_losses(PerceptionWeights(), network, scaffold, truth, truth).values()
    )


def test_wrong_expressions_count_by_how_far_they_move_the_mesh(measured):
    network, scaffold, truth, head = measured
    weights, shape = PerceptionWeights(), torch.zeros(1, 300)
    rest, losses, moved = truth._replace(expression=torch.zeros(40, 100)), [], []
    for component in (0, 40):
        expression = F.one_hot(torch.tensor([component]), 100).float()
        wrong = rest._replace(expression=expression.expand(40, 100))
        losses.append(reading_losses(weights, network, scaffold, wrong, rest)["expression"])
        meshes = [head.vertices(shape, Motion.neutral(1)._replace(expression=factor * expression)) for factor in (0.0, 1.0)]
        moved.append((meshes[1] - meshes[0]).square().sum(2).mean())
    assert SCENE_UNITS_PER_METRE == 3.0
    assert (losses[0] / losses[1]).item() == pytest.approx((moved[0] / moved[1]).item(), rel=1e-3)
