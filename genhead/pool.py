"""What GenHead's training draws from: portraits replicated by how far the head is turned, and their mirror images.

The draw is uniform over the entries of the pool, for the real pictures and for the conditions of generated ones alike.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from torch import Tensor

from genhead.mirror import LabelMirror
from genhead.portraits import PortraitSet
from head3d.head_model import HeadModel
from head3d.run.config import PositiveFloat, PositiveInt


@dataclasses.dataclass(frozen=True)
class PortraitSampling:
    """How often which portrait is shown.

    The published set holds flipped photographs, fitted anew, and 1, 2, 4, 8 or 16 copies of a portrait by |yaw|; the bins are not
    published, so both are off until they are set.
    """

    mirror: bool = False  # show every portrait also flipped left to right, with the mirrored label
    yaw_bins_deg: tuple[PositiveFloat, ...] = ()  # rising limits of |yaw| between bins, e.g. 15 30 45 60; none = no rebalancing
    copies: tuple[PositiveInt, ...] = (1,)  # entries of a portrait by bin, one more than there are limits, e.g. 1 2 4 8 16

    def __post_init__(self) -> None:
        if len(self.copies) != len(self.yaw_bins_deg) + 1:
            raise ValueError(
                f"copies: expected one number for each of the {len(self.yaw_bins_deg) + 1} bins that yaw_bins_deg makes, "
                f"got {len(self.copies)}"
            )
        if list(self.yaw_bins_deg) != sorted(set(self.yaw_bins_deg)):
            raise ValueError(f"yaw_bins_deg: expected rising limits, got {self.yaw_bins_deg}")


class PortraitPool:
    """Entries of a set of portraits, in a fixed order: the portraits, each as often as its bin says; then all again, mirrored."""

    def __init__(self, portraits: PortraitSet, sampling: PortraitSampling, head: HeadModel) -> None:
        """Raises AssetError or DataError where labels cannot be mirrored."""
        labels = torch.from_numpy(portraits.labels())
        copies = np.asarray(sampling.copies)[np.searchsorted(sampling.yaw_bins_deg, absolute_yaw_deg(labels), side="right")]
        numbers = torch.from_numpy(np.repeat(np.arange(len(labels)), copies))
        self._portraits = portraits
        self.mirror_error = ""  # a sentence on how well labels were mirrored
        self._numbers, self._mirrored = numbers, torch.zeros(len(numbers), dtype=torch.bool)
        self.labels = labels if len(numbers) == len(labels) else labels[numbers]  # [entries, 437]
        if sampling.mirror:
            mirror = LabelMirror(head)
            self.mirror_error = mirror.check(labels)
            self._numbers, self._mirrored = numbers.repeat(2), torch.arange(2 * len(numbers)) >= len(numbers)
            self.labels = torch.cat([self.labels, mirror(labels)[numbers]])

    def __len__(self) -> int:
        return len(self._numbers)

    def batch(self, entries: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(images [B, 3, H, W] in [-1, 1], mattes [B, 1, H, W] in [0, 1], labels [B, 437]) of the numbered entries [B]."""
        images, mattes, _ = self._portraits.batch(self._numbers[entries])
        mirrored = self._mirrored[entries][:, None, None, None]
        return (
            torch.where(mirrored, images.flip(-1), images),
            torch.where(mirrored, mattes.flip(-1), mattes),
            self.labels[entries],
        )


def absolute_yaw_deg(labels: Tensor) -> np.ndarray:
    """Angle [N] in degrees, 0 to 180, between the face's forward axis and the viewing direction in the horizontal plane."""
    backward = labels[:, :16].reshape(-1, 4, 4)[:, :3, 2]  # from the scene to the camera
    return torch.rad2deg(torch.atan2(backward[:, 0], backward[:, 2])).abs().double().numpy()
