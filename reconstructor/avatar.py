"""Inference: everything that depends on the source alone is computed once, then one call a frame.

    Avatar.from_image   both encoders, background, de-expression blocks        once per source
    drive               re-enactment blocks, plane decoder, neck stage         once per motion
    view                rays and super-resolution                              once per camera

Sampling is deterministic (no jitter), so equal inputs give equal frames and a video does not flicker.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from head3d.cameras import Camera
from head3d.deformation import PosedHead
from head3d.labels import SHAPE_SIZE, Motion
from head3d.networks.resample import resize_antialias
from head3d.rendering import HeadImages
from reconstructor.architectures.portrait4d import SourceCode
from reconstructor.model import Reconstructor


class DrivenHead(NamedTuple):
    """A head in B motions, ready to be seen from any camera."""

    planes: Tensor  # [B, 3, C, P, P]
    posed: PosedHead | None  # for the neck stage; None while every neck is at rest

    def repeat(self, views: int) -> DrivenHead:
        """Each motion `views` times, for as many cameras."""
        return DrivenHead(self.planes.repeat_interleave(views, 0), None if self.posed is None else self.posed.expand_views(views))


class Avatar:
    """One person from one picture. Make it with `from_image`."""

    def __init__(self, model: Reconstructor, source: SourceCode, tokens: Tensor, shape: Tensor) -> None:
        self._model, self._source, self._tokens, self._shape = model, source, tokens, shape

    @classmethod
    @torch.no_grad()
    def from_image(
        cls,
        model: Reconstructor,
        image: Tensor,  # [1, 3, H, W] in [-1, 1], in the framing of the labels; resized to the model's input if need be
        *,
        shape: Tensor | None = None,  # [1, 300] for the neck stage; None = the mean head
        motion: Motion | None = None,  # of the picture; None = neutral
    ) -> Avatar:
        """Encode the source once.

        A photograph without a fitted label is taken as the mean shape and a neutral face; what its expression differs from
        neutral then stays in the avatar.
        """
        assert image.ndim == 4 and image.shape[:2] == (1, 3), f"source image must be [1, 3, H, W], got {tuple(image.shape)}"
        parameter = next(model.parameters())
        device, architecture = parameter.device, model.architecture
        image = resize_antialias(image.to(device), architecture.config.image_resolution)
        motion = (Motion.neutral(1) if motion is None else motion).to(device)
        shape = (torch.zeros(1, SHAPE_SIZE) if shape is None else shape).to(device)
        source = architecture.encode_source(image)
        tokens = architecture.deexpress(source, motion.vector(), torch.ones(1, device=device))
        return cls(model, source, tokens, shape)

    @torch.no_grad()
    def pose(self, motion: Motion) -> DrivenHead:
        """The head in B motions."""
        batch, device = motion.expression.shape[0], self._tokens.device
        motion = motion.to(device)
        source = SourceCode(*(part.expand(batch, *part.shape[1:]) for part in self._source))
        tokens = self._tokens.expand(batch, -1, -1)
        planes = self._model.architecture.reenact(tokens, source, motion.vector(), torch.ones(batch, device=device))
        return DrivenHead(planes, self._model.pose(self._shape.expand(batch, -1), motion))

    @torch.no_grad()
    def view(self, head: DrivenHead, camera: Camera, *, resolution: int | None = None) -> HeadImages:
        """Pictures of B heads from B cameras, or of one head from B cameras. resolution: rays per side; None = the model's."""
        views = camera.c2w.shape[0]
        if head.planes.shape[0] == 1 and views > 1:
            head = head.repeat(views)
        background = self._source.background.expand(views, -1, -1, -1)
        return self._model.render(head.planes, background, head.posed, camera.to(head.planes.device), resolution=resolution)

    def drive(self, motion: Motion, camera: Camera, *, resolution: int | None = None) -> HeadImages:
        """Pictures of B motions from B cameras, or of one motion from B cameras."""
        return self.view(self.pose(motion), camera, resolution=resolution)
