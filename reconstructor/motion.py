"""Motion vectors and the tokens that attention reads them as."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from head3d.labels import MOTION_VECTOR_SIZE, Motion

# Eyes 6, emotion 30, mouth features 512: what Portrait4D's motion encoder reads off a picture. FLAME's is labels.MOTION_VECTOR_SIZE.
IMAGE_MOTION_SIZE = 548
MotionKind = Literal["flame", "image"]  # where a motion vector comes from: a label, or a picture (`motion_vectors.py`)
MOTION_SIZES: dict[MotionKind, int] = {"flame": MOTION_VECTOR_SIZE, "image": IMAGE_MOTION_SIZE}
_ANGLE_UNIT = 0.1  # radians


def flame_motion_vector(motion: Motion) -> Tensor:
    """FLAME's motion vector [B, 109] as networks read it: expression coefficients, then jaw and eyes in tenths of a radian.

    In radians they would be small numbers beside a hundred expression coefficients of about 1, and be learned last. The neck is not in
    it: it moves rigidly. Our digest of the published variant is silent on units.
    """
    return torch.cat([motion.expression, motion.jaw_pose / _ANGLE_UNIT, motion.eye_pose / _ANGLE_UNIT], dim=1)


class MotionTokens(nn.Module):
    """Motion vector [B, motion_dim] -> tokens [B, count, width]: two linear layers with leaky ReLU (0.01), one linear to all tokens.

    Nothing is assumed about the vector except its length; it is not normalised here.
    """

    SLOPE = 0.01  # of the leaky ReLU

    def __init__(self, motion_dim: int, hidden: int, count: int, width: int):
        super().__init__()
        self.motion_dim, self.count = motion_dim, count
        self.first = nn.Linear(motion_dim, hidden)
        self.second = nn.Linear(hidden, hidden)
        self.tokens = nn.Linear(hidden, count * width)

    def forward(self, motion: Tensor) -> Tensor:
        assert motion.shape[1] == self.motion_dim, f"motion has {motion.shape[1]} numbers, this network reads {self.motion_dim}"
        hidden = F.leaky_relu(self.second(F.leaky_relu(self.first(motion), self.SLOPE)), self.SLOPE)
        return self.tokens(hidden).unflatten(1, (self.count, -1))
