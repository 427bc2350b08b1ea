"""Measurement without downloads: a network that reads a head off a picture, trained on shards with exact labels.

    picture --trunk--> identity embedding                                        ArcFace margin over made-up people
                       expression, jaw, gaze, head rotation, landmarks           regression on the shard's labels
                       features of its layers --> perceptual distance            LPIPS's formula without learned weights
    picture --motion.trunk--> motion vector of 548 numbers                       contrastive over the motions of one identity (CLeBS)
    FLAME motion ------------> the same vector, without a picture

`perception_training.py` trains it; `perception_errors.py` says how wrong it is on people whom it has not seen.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from head3d.cameras import project
from head3d.head_model import HeadModel
from head3d.labels import EXPRESSION_SIZE, MOTION_VECTOR_SIZE, SHAPE_SIZE, Motion, unpack_label
from head3d.networks.resample import resize_antialias
from head3d.rotations import axis_angle_to_matrix
from head3d.run.checkpoint import fill_weights, load_exported
from head3d.run.config import PositiveInt
from head3d.run.errors import AssetError, ConfigError
from reconstructor.motion import IMAGE_MOTION_SIZE

EXPORT_KIND = "perception"
ERRORS_FILE = "errors.json"  # beside the exported weights: the network's own error on people whom it has not seen
LANDMARKS = 70  # 68 of the face, right and left pupil
SCALARS = (EXPRESSION_SIZE, 3, 6, 2 * LANDMARKS)  # expression, jaw, eyes, landmarks
_GROUPS = 8  # of the group normalisation

Role = Literal["losses", "evaluation"]


@dataclasses.dataclass(frozen=True)
class TrunkConfig:
    """A small residual network. Features of a sample never depend on its batch mates (group normalisation)."""

    resolution: PositiveInt = 128  # pictures of any side are resized to this one
    base_width: PositiveInt = 48  # channels of the stem and the first stage; each further stage doubles them
    stage_blocks: tuple[PositiveInt, ...] = (2, 2, 2, 2)  # residual blocks of each stage; stem and every stage halve the side

    def __post_init__(self) -> None:
        need = 2 ** (1 + len(self.stage_blocks))
        if self.resolution % need or self.base_width % _GROUPS:
            raise ConfigError(
                f"trunk: expected a resolution that is a multiple of {need} (stem and {len(self.stage_blocks)} stages halve it) and a "
                f"base_width that is a multiple of {_GROUPS}, got {self.resolution} and {self.base_width}"
            )

    @property
    def feature_count(self) -> int:
        """Numbers in the last layer of one picture."""
        side = self.resolution // 2 ** (1 + len(self.stage_blocks))
        return self.base_width * 2 ** (len(self.stage_blocks) - 1) * side * side


@dataclasses.dataclass(frozen=True)
class PerceptionConfig:
    """Widths of the measurement network and of the motion encoder."""

    trunk: TrunkConfig = TrunkConfig()  # of the measurements
    identity_size: PositiveInt = 256  # numbers of the identity embedding
    hidden: PositiveInt = 512  # hidden units of the regression
    motion_trunk: TrunkConfig = TrunkConfig()  # of the motion encoder, which shares nothing with the measurements
    motion_directions: PositiveInt = 32  # dimensions of the subspace that the motion vector lies in: a bottleneck
    motion_hidden: PositiveInt = 256  # hidden units from FLAME motion to the motion vector

    def __post_init__(self) -> None:
        if self.motion_directions > IMAGE_MOTION_SIZE:
            raise ConfigError(f"motion_directions: expected at most {IMAGE_MOTION_SIZE}, got {self.motion_directions}")

    @property
    def resolution(self) -> int:
        """Side of the pictures that both trunks can be given without loss, px."""
        return max(self.trunk.resolution, self.motion_trunk.resolution)


class Reading(NamedTuple):
    """What a picture shows of a head: read by the network, or true."""

    expression: Tensor  # [B, 100] FLAME coefficients
    jaw_pose: Tensor  # [B, 3] axis-angle, radians
    eye_pose: Tensor  # [B, 6] axis-angle, radians, left and right eye, relative to the head
    rotation: Tensor  # [B, 3, 3] head axes -> camera axes (OpenGL: x right, y up, looks down -z)
    landmarks: Tensor  # [B, 70, 2] in [0, 1] from the top-left corner, x right, y down

    def scalars(self) -> Tensor:
        """All but the rotation, [B, 249]."""
        return torch.cat([self.expression, self.jaw_pose, self.eye_pose, self.landmarks.flatten(1)], dim=1)


def true_reading(label: Tensor, head: HeadModel) -> Reading:
    """What a picture with this label [B, 437] shows. The head's rotation is the camera's and the neck's together: R_c2w^T R_neck."""
    camera, shape, motion = unpack_label(label)
    points, _ = project(head.landmarks(head.vertices(shape, motion)), camera)
    rotation = camera.c2w[:, :3, :3].transpose(1, 2) @ axis_angle_to_matrix(motion.neck_pose)
    return Reading(motion.expression, motion.jaw_pose, motion.eye_pose, rotation, points)


def orthonormal(columns: Tensor) -> Tensor:
    """[..., 3, 2] -> rotation [..., 3, 3] by Gram-Schmidt; a representation without jumps (Zhou et al., arXiv:1812.07035, eq. 15)."""
    first = F.normalize(columns[..., 0], dim=-1)
    second = columns[..., 1] - (first * columns[..., 1]).sum(-1, keepdim=True) * first
    second = F.normalize(second, dim=-1)
    return torch.stack([first, second, torch.linalg.cross(first, second)], dim=-1)


class Block(nn.Module):
    """ResNet's basic block with group normalisation: relu(shortcut(x) + norm(conv(relu(norm(conv(x)))))); begins as its shortcut.

    Where size or width changes, the shortcut is a mean over 2 x 2 pixels, a 1 x 1 convolution and a norm.
    """

    def __init__(self, in_width: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_width, width, 3, stride=stride, padding=1, bias=False)
        self.norm1 = nn.GroupNorm(_GROUPS, width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm2 = nn.GroupNorm(_GROUPS, width)
        changes = [nn.AvgPool2d(2, ceil_mode=True)] * (stride > 1)
        if changes or in_width != width:
            changes += [nn.Conv2d(in_width, width, 1, bias=False), nn.GroupNorm(_GROUPS, width)]
        self.shortcut = nn.Sequential(*changes)
        nn.init.zeros_(self.norm2.weight)

    def forward(self, features: Tensor) -> Tensor:
        inner = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(features)))))
        return F.relu(self.shortcut(features) + inner)


class Trunk(nn.Module):
    """Pictures [B, 3, H, W] in [-1, 1] -> features of the stem and of every stage, [B, C, H / 2^k, W / 2^k], all >= 0."""

    def __init__(self, config: TrunkConfig) -> None:
        super().__init__()
        self.config, width = config, config.base_width
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, stride=2, padding=1), nn.GroupNorm(_GROUPS, width), nn.ReLU())
        self.stages = nn.ModuleList()
        for index, blocks in enumerate(config.stage_blocks):
            in_width, width = width, config.base_width * 2**index
            self.stages.append(nn.Sequential(*(Block(width if k else in_width, width, 1 if k else 2) for k in range(blocks))))

    def forward(self, pictures: Tensor) -> list[Tensor]:
        """Pictures of any side: what the perceptual distance compares."""
        layers = [self.stem(pictures)]
        for stage in self.stages:
            layers.append(stage(layers[-1]))
        return layers

    def summary(self, pictures: Tensor) -> Tensor:
        """The last layer [B, config.feature_count] of the pictures, resized to config.resolution (antialiased)."""
        return self(resize_antialias(pictures, self.config.resolution))[-1].flatten(1)


class MotionEncoder(nn.Module):
    """A picture, or FLAME motion -> the motion vector [B, 548] that a reconstructor reads.

    Contrastive learning of a basis (CLeBS; Export3D, ECCV 2024; variants, section 3.1): the vector is sqrt(548) V lambda with V [548, n]
    orthonormal and lambda on the unit sphere of few dimensions, so that its entries are of the order 1. Two differences: the picture's
    encoder is kept for use, and that of FLAME motion serves where there is motion but no picture; and V is drawn once instead of
    learned, since the loss sees only cosines, which are the same for every V.
    """

    basis: Tensor  # [548, n] V
    scale: Tensor  # [109] what FLAME motion is multiplied with: how far each number moves the mesh

    def __init__(self, config: PerceptionConfig) -> None:
        super().__init__()
        directions, hidden = config.motion_directions, config.motion_hidden
        self.trunk = Trunk(config.motion_trunk)
        self.from_features = nn.Linear(config.motion_trunk.feature_count, directions)
        self.from_flame = nn.Sequential(
            nn.Linear(MOTION_VECTOR_SIZE, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, directions)
        )
        self.register_buffer("scale", torch.ones(MOTION_VECTOR_SIZE))
        self.register_buffer("basis", torch.linalg.qr(torch.randn(IMAGE_MOTION_SIZE, directions)).Q)

    def coefficients(self, pictures: Tensor) -> Tensor:
        """lambda [B, n], unit length, of pictures [B, 3, H, W] in [-1, 1]."""
        return F.normalize(self.from_features(self.trunk.summary(pictures)), dim=1)

    def flame_coefficients(self, motion: Motion) -> Tensor:
        """lambda [B, n] of FLAME motion; the neck has no part in it."""
        return F.normalize(self.from_flame(motion.vector() * self.scale), dim=1)

    def calibrate(self, spread: Tensor, head: HeadModel) -> None:
        """Let each number of FLAME motion count by what can be seen of it; spread [109] are their deviations in training.

        The scale is how far a unit of it moves the vertex that moves most, over all numbers such that their mean square becomes 1.
        Otherwise a hundred expressions that hardly show would hide the jaw, whose radians are small numbers.
        """
        step, shape = 0.05, torch.zeros(MOTION_VECTOR_SIZE, SHAPE_SIZE)
        expression, jaw, eyes = (step * torch.eye(MOTION_VECTOR_SIZE)).split((EXPRESSION_SIZE, 3, 6), dim=1)
        moved = head.vertices(shape, Motion(expression, torch.zeros_like(jaw), jaw, eyes)) - head.vertices(shape[:1], Motion.neutral(1))
        reach = moved.norm(dim=2).amax(1) / step
        self.scale.copy_(reach / (reach * spread).square().mean().sqrt().clamp(min=1e-8))

    def vector(self, coefficients: Tensor) -> Tensor:
        """lambda [B, n] -> motion vector [B, 548]; lengths and angles are kept but for the factor sqrt(548)."""
        return IMAGE_MOTION_SIZE**0.5 * coefficients @ self.basis.T

    def forward(self, pictures: Tensor) -> Tensor:
        return self.vector(self.coefficients(pictures))


class Perception(nn.Module):
    """The measurement network and, beside it, the motion encoder."""

    centre: Tensor  # [249] means of the training labels, which the regression adds to
    spread: Tensor  # [249] their standard deviations, which it multiplies with
    mean_rotation: Tensor  # [3, 3] mean head rotation of the training pictures

    def __init__(self, config: PerceptionConfig) -> None:
        super().__init__()
        self.config = config
        self.trunk = Trunk(config.trunk)
        self.to_identity = nn.Linear(config.trunk.feature_count, config.identity_size)
        self.regress = nn.Sequential(
            nn.Linear(config.trunk.feature_count, config.hidden), nn.ReLU(), nn.Linear(config.hidden, sum(SCALARS) + 6)
        )
        self.motion = MotionEncoder(config)
        self.register_buffer("centre", torch.zeros(sum(SCALARS)))
        self.register_buffer("spread", torch.ones(sum(SCALARS)))
        self.register_buffer("mean_rotation", torch.eye(3))
        with torch.no_grad():
            self.regress[2].weight.mul_(0.1)  # begins near the mean
            self.regress[2].bias.zero_()

    def calibrate(self, truth: Reading, head: HeadModel) -> None:
        """Take centre, spread, mean rotation and the scale of motions from the labels of N >= 2 training pictures and their head."""
        numbers = truth.scalars()
        self.centre.copy_(numbers.mean(0))
        self.spread.copy_(numbers.std(0, correction=0))
        left, _, right = torch.linalg.svd(truth.rotation.mean(0))  # nearest rotation to the mean matrix
        sign = torch.ones(3, device=left.device)
        sign[2] = torch.det(left @ right)
        self.mean_rotation.copy_(left * sign @ right)
        self.motion.calibrate(self.spread[:MOTION_VECTOR_SIZE], head)

    def mean_reading(self, count: int) -> Reading:
        """What somebody says who has seen the training labels but not the picture: the trivial predictor, `count` times."""
        return self._reading(self.centre.expand(count, -1), self.mean_rotation.expand(count, 3, 3))

    def identity(self, pictures: Tensor) -> Tensor:
        """Unit vectors [B, identity_size]: their scalar product says how much two pictures [B, 3, H, W] show one person."""
        return F.normalize(self.to_identity(self.trunk.summary(pictures)), dim=1)

    def read(self, pictures: Tensor) -> Reading:
        """Expression, jaw, gaze, head rotation and landmarks of pictures [B, 3, H, W] in [-1, 1]."""
        return self.read_features(self.trunk.summary(pictures))

    def read_features(self, features: Tensor) -> Reading:
        """As `read`, from `trunk.summary`."""
        numbers, columns = self.regress(features).split((sum(SCALARS), 6), dim=1)
        rotation = orthonormal(self.mean_rotation[:, :2] + columns.unflatten(1, (3, 2)))
        return self._reading(self.centre + self.spread * numbers, rotation)

    @staticmethod
    def _reading(numbers: Tensor, rotation: Tensor) -> Reading:
        expression, jaw, eyes, points = numbers.split(SCALARS, dim=1)
        return Reading(expression, jaw, eyes, rotation, points.unflatten(1, (LANDMARKS, 2)))

    def perceptual_distance(self, pictures: Tensor, truth: Tensor) -> Tensor:
        """Distance [B] >= 0 of pictures [B, 3, H, W] at their own resolution, on the trunk's layers; see `feature_distance`."""
        return feature_distance(self.trunk(pictures), self.trunk(truth))


def feature_distance(first: Sequence[Tensor], second: Sequence[Tensor]) -> Tensor:
    """LPIPS's distance (arXiv:1801.03924, eq. 1) with all its weights w = 1: sum over layers of the spatial mean of |a/|a| - b/|b||^2.

    first, second: features [B, C, h, w] of every layer; each pixel's channels are scaled to unit length. Returns [B]; a layer gives at
    most 2 where features are >= 0.
    """
    total = 0.0
    for a, b in zip(first, second, strict=True):
        apart = unit_channels(a) - unit_channels(b)
        total = total + apart.square().sum(1).mean((1, 2))
    return total


def unit_channels(features: Tensor) -> Tensor:
    """Features [B, C, h, w] with the channels of every pixel scaled to unit length; what is zero stays zero, with a finite gradient."""
    return features * torch.rsqrt(features.square().sum(1, keepdim=True) + 1e-10)


@dataclasses.dataclass(frozen=True)
class PerceptionExport:
    """What config.yaml beside exported weights holds."""

    role: Role = "losses"  # which half of the people it has seen; a network never judges what it was a loss of
    seed: int = 0  # of its training
    data_hash: str = ""  # of the data set that it was trained on
    network: PerceptionConfig = PerceptionConfig()  # widths


def load_perception(folder: Path | str, role: Role | None, device: torch.device | str = "cpu") -> Perception:
    """The exported network in `folder`, in evaluation mode without gradients into its weights; role None takes either.

    Raises AssetError if a file is missing, damaged or does not fit, or the network was trained for another role.
    """
    weights, config = load_exported(folder, PerceptionExport, EXPORT_KIND)
    if role is not None and config.role != role:
        raise AssetError(
            f"{folder}: expected a perception network trained with --role {role}, got {config.role}; what a reconstructor was trained "
            f"to please must not judge it. Train the other one with `headfoundry perception --role {role} --out DIR`"
        )
    network = Perception(config.network)
    fill_weights(network, weights, str(folder))
    return network.to(device).eval().requires_grad_(False)


def load_errors(folder: Path | str) -> dict[str, Any]:
    """The network's own error, as `perception_errors.held_out_errors` gives it. Raises AssetError if the file is missing or damaged."""
    path = Path(folder) / ERRORS_FILE
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise AssetError(
            f"{path}: expected the errors of the network beside it as JSON: {error}; call its perception command again, which measures them"
        ) from error
