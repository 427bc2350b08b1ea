"""What the perception network and the motion encoder learn from: margins between people, exact labels, contrasts between motions."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from head3d.head_model import HeadModel
from head3d.labels import EXPRESSION_SIZE, SHAPE_SIZE, unpack_label
from head3d.run.config import NonNegativeFloat, PositiveFloat
from reconstructor.perception import SCALARS, Perception, PerceptionConfig, Reading, true_reading
from reconstructor.perception_data import Augmented, Pictures


@dataclasses.dataclass(frozen=True)
class PerceptionWeights:
    """What the loss terms count. Every regression is 1 for who always says the mean."""

    identity: NonNegativeFloat = 0.2  # additive angular margin
    margin_rad: NonNegativeFloat = 0.3  # m: angle by which the right person must win
    margin_scale: PositiveFloat = 24.0  # s: what cosines are multiplied with
    expression: NonNegativeFloat = 1.0  # mean squared distance that the wrong expression moves the mesh
    jaw: NonNegativeFloat = 1.0  # squared difference of axis-angles
    gaze: NonNegativeFloat = 1.0  # squared difference of axis-angles
    rotation: NonNegativeFloat = 1.0  # squared difference of matrices
    landmarks: NonNegativeFloat = 1.0  # squared distance
    motion: NonNegativeFloat = 1.0  # contrastive loss of the motion encoder
    motion_temperature: PositiveFloat = 0.1  # tau: what its cosines are divided by
    adversary: NonNegativeFloat = 0.3  # of who tells people by their motion vectors; the encoder gets its gradient reversed


class Scaffold(nn.Module):
    """What is needed to train and is thrown away: a centre for every training person, the adversary, and scales of the losses."""

    people: Tensor  # [N] identity numbers, ascending
    expression_gram: Tensor  # [100, 100] G: e^T G e is the mean squared distance that expression e moves a vertex, scene units
    rotation_variance: Tensor  # [] mean squared distance (Frobenius) of training rotations from their mean

    def __init__(self, config: PerceptionConfig, people: Sequence[int]) -> None:
        """people: identity numbers, ascending."""
        super().__init__()
        self.centres = nn.Parameter(torch.randn(len(people), config.identity_size))
        self.adversary = nn.Sequential(nn.Linear(config.motion_directions, 128), nn.ReLU(), nn.Linear(128, len(people)))
        self.register_buffer("people", torch.tensor(people), persistent=False)
        self.register_buffer("expression_gram", torch.eye(EXPRESSION_SIZE), persistent=False)
        self.register_buffer("rotation_variance", torch.ones(()), persistent=False)

    def calibrate(self, truth: Reading, network: Perception, head: HeadModel) -> None:
        """Take the scales from the head model and from the labels of training pictures; `network` is calibrated with them already."""
        directions = head.basis[SHAPE_SIZE : SHAPE_SIZE + EXPRESSION_SIZE]
        self.expression_gram.copy_(directions @ directions.T / len(head.template))
        self.rotation_variance.copy_((truth.rotation - network.mean_rotation).square().sum((1, 2)).mean().clamp(min=1e-6))


def angular_margin_loss(embeddings: Tensor, centres: Tensor, target: Tensor, scale: float, margin_rad: float) -> Tensor:
    """Additive angular margin (ArcFace, arXiv:1801.07698, eq. 3), mean over the batch.

    -log [ e^(s cos(t_y + m)) / (e^(s cos(t_y + m)) + sum_(j != y) e^(s cos t_j)) ], t_j the angle between embedding [B, E] (unit
    length) and centre j [N, E]; target [B] int64 is y. Beyond t_y = pi - m, where the cosine would rise again, it goes on straight:
    cos t_y - m sin m, as in the authors' code.
    """
    cosines = embeddings @ F.normalize(centres, dim=1).T
    right = cosines.gather(1, target[:, None])
    sine = (1 - right.square()).clamp(min=1e-8).sqrt()
    moved = torch.where(
        right > -math.cos(margin_rad), right * math.cos(margin_rad) - sine * math.sin(margin_rad), right - margin_rad * math.sin(margin_rad)
    )
    return F.cross_entropy(scale * cosines.scatter(1, target[:, None], moved), target)


def motion_contrast_loss(pictures: Tensor, motions: Tensor, frame: Tensor, identity: Tensor, temperature: float) -> Tensor:
    """Which picture of this person shows this motion? (CLeBS; variants, section 3.1, with the usual InfoNCE denominator.)

    mean over k of -log [ e^(cos(X_k, m_k) / tau) / (e^(cos(X_k, m_k) / tau) + sum_j e^(cos(X_j, m_k) / tau)) ], j over the pictures of
    the same identity in other motions, so that who it is helps nothing. X = pictures [B, n], m = motions [B, n], both unit vectors;
    frame [B] numbers (identity, motion). A picture without such j counts as 0.
    """
    cosines = motions @ pictures.T / temperature  # [k, j]
    other = (identity[:, None] == identity[None]) & (frame[:, None] != frame[None])
    right = cosines.diagonal()
    candidates = torch.cat([right[:, None], cosines.masked_fill(~other, -math.inf)], dim=1)
    return (candidates.logsumexp(1) - right).mean()


class _Reversed(torch.autograd.Function):
    """The identity, whose gradient comes back with the other sign (Ganin & Lempitsky, arXiv:1409.7495)."""

    @staticmethod
    def forward(context: Any, values: Tensor) -> Tensor:
        return values.view_as(values)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:
        return -gradient


def loss_terms(
    weights: PerceptionWeights, network: Perception, scaffold: Scaffold, head: HeadModel, pictures: Pictures, seen: Augmented
) -> dict[str, Tensor]:
    """The terms, each already multiplied by its weight; their sum is what training minimises. Means over the batch."""
    truth = true_reading(pictures.label, head)
    truth = truth._replace(landmarks=seen.move(truth.landmarks))
    people = torch.searchsorted(scaffold.people, pictures.identity)
    features = network.trunk.summary(seen.image)
    embeddings = F.normalize(network.to_identity(features), dim=1)
    codes = network.motion.coefficients(seen.image)
    true_codes = network.motion.flame_coefficients(unpack_label(pictures.label).motion)
    margin = angular_margin_loss(embeddings, scaffold.centres, people, weights.margin_scale, weights.margin_rad)
    contrast = motion_contrast_loss(codes, true_codes, pictures.frame, pictures.identity, weights.motion_temperature)
    told = F.cross_entropy(scaffold.adversary(_Reversed.apply(codes)), people)
    return reading_losses(weights, network, scaffold, network.read_features(features), truth) | {
        "identity": weights.identity * margin,
        "motion": weights.motion * contrast,
        "adversary": weights.adversary * told,
    }


def reading_losses(
    weights: PerceptionWeights, network: Perception, scaffold: Scaffold, reading: Reading, truth: Reading
) -> dict[str, Tensor]:
    """Squared errors over what the mean of the training labels would get, times their weights."""
    expression, jaw, eyes, landmarks = network.spread.square().split(SCALARS)
    wrong, gram = reading.expression - truth.expression, scaffold.expression_gram
    moved = ((wrong @ gram) * wrong).sum(1).mean() / (gram.diagonal() * expression).sum().clamp(min=1e-12)

    def relative(value: Tensor, target: Tensor, variance: Tensor) -> Tensor:
        return (value - target).flatten(1).square().sum(1).mean() / variance.sum().clamp(min=1e-12)

    return {
        "expression": weights.expression * moved,
        "jaw": weights.jaw * relative(reading.jaw_pose, truth.jaw_pose, jaw),
        "gaze": weights.gaze * relative(reading.eye_pose, truth.eye_pose, eyes),
        "landmarks": weights.landmarks * relative(reading.landmarks, truth.landmarks, landmarks),
        "rotation": weights.rotation * (reading.rotation - truth.rotation).square().sum((1, 2)).mean() / scaffold.rotation_variance,
    }
