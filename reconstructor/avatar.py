"""Inference: everything that depends on the source alone is computed once, then one call a frame.

    Avatar.from_image   both encoders, background, de-expression blocks        once per source
    pose                re-enactment blocks, plane decoder, neck stage         once per motion
    view                rays and super-resolution                              once per camera
    surface             a mesh with colours                                    once per motion

Sampling is deterministic (no jitter), so equal inputs give equal frames and a video does not flicker.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from head3d.cameras import Camera
from head3d.deformation import PosedHead
from head3d.labels import MOTION_VECTOR_SIZE, SHAPE_SIZE, Motion
from head3d.networks.resample import resize_antialias
from head3d.rendering import HeadImages
from head3d.run.errors import ConfigError
from head3d.surface import SurfaceConfig, extract_surface
from reconstructor.architecture import Driver, SourceCode, repeat
from reconstructor.model import Reconstructor
from reconstructor.motion import IMAGE_MOTION_SIZE, flame_motion_vector

if TYPE_CHECKING:
    from trimesh import Trimesh


class DrivenHead(NamedTuple):
    """A head in B motions, ready to be seen from any camera."""

    planes: Tensor  # [B, 3, C, P, P]
    posed: PosedHead | None  # for the neck stage; None while every neck is at rest

    def repeat(self, views: int) -> DrivenHead:
        """Each motion `views` times, for as many cameras."""
        return DrivenHead(self.planes.repeat_interleave(views, 0), None if self.posed is None else self.posed.expand_views(views))


class Avatar:
    """One person from one picture. Make it with `from_image`."""

    def __init__(self, model: Reconstructor, source: SourceCode, shape: Tensor) -> None:
        self._model, self._source, self._shape = model, source, shape

    @classmethod
    @torch.no_grad()
    def from_image(
        cls,
        model: Reconstructor,
        image: Tensor,  # [1, 3, H, W] in [-1, 1], in the framing of the labels; resized to the model's input if need be
        *,
        shape: Tensor | None = None,  # [1, 300] for the neck stage; None = the mean head
        motion: Motion | None = None,  # of the picture; None = neutral
        vector: Tensor | None = None,  # [1, D] what the network's attention reads (`motion_vectors.py`); None = the FLAME motion's own
    ) -> Avatar:
        """Encode the source once.

        A photograph without a fitted label is taken as the mean shape and a neutral face; what its expression differs from
        neutral then stays in the avatar. Raises ConfigError if the network reads vectors of another length.
        """
        assert image.ndim == 4 and image.shape[:2] == (1, 3), f"source image must be [1, 3, H, W], got {tuple(image.shape)}"
        device = next(model.parameters()).device
        image = resize_antialias(image.to(device), model.architecture.config.image_resolution)
        vector = _vector(model, Motion.neutral(1) if motion is None else motion, vector)
        shape = (torch.zeros(1, SHAPE_SIZE) if shape is None else shape).to(device)
        return cls(model, model.encode_source(image, vector, torch.ones(1, device=device)), shape)

    @torch.no_grad()
    def pose(self, motion: Motion, vector: Tensor | None = None, image: Tensor | None = None) -> DrivenHead:
        """The head in B motions. vector [B, D]: as in `from_image`; the neck always turns as `motion` says.

        image [B, 3, H, W] in [-1, 1]: of the driver, for architectures that read it. Raises ConfigError if one does and it is None.
        """
        batch, device = motion.expression.shape[0], self._shape.device
        motion = motion.to(device)
        driver = Driver(_vector(self._model, motion, vector), None if image is None else image.to(device))
        planes, _ = self._model.driven_planes(repeat(self._source, batch), driver, torch.ones(batch, device=device))
        return DrivenHead(planes, self._model.pose(self._shape.expand(batch, -1), motion))

    @torch.no_grad()
    def view(self, head: DrivenHead, camera: Camera, *, resolution: int | None = None) -> HeadImages:
        """Pictures of B heads from B cameras, or of one head from B cameras. resolution: rays per side; None = the model's."""
        views = camera.c2w.shape[0]
        if head.planes.shape[0] == 1 and views > 1:
            head = head.repeat(views)
        background = self._source.background.expand(views, -1, -1, -1)
        return self._model.render(head.planes, background, head.posed, camera.to(head.planes.device), resolution=resolution)

    def surface(self, head: DrivenHead, config: SurfaceConfig) -> Trimesh:
        """The surface of one head (B = 1), the neck turned as it was posed, with the colours of the field."""
        assert head.planes.shape[0] == 1, f"one head at a time, got {head.planes.shape[0]}"

        def field(points: Tensor) -> tuple[Tensor, Tensor]:
            colors, density = self._model.field(head.planes, points[None], head.posed)
            return colors[0], density[0]

        return extract_surface(field, config, head.planes.device)

    def drive(
        self, motion: Motion, camera: Camera, *, vector: Tensor | None = None, image: Tensor | None = None, resolution: int | None = None
    ) -> HeadImages:
        """Pictures of B motions from B cameras, or of one motion from B cameras. vector, image: as in `pose`."""
        return self.view(self.pose(motion, vector, image), camera, resolution=resolution)


def _vector(model: Reconstructor, motion: Motion, vector: Tensor | None) -> Tensor:
    """What the attention of `model` reads, [B, D], on its device."""
    vector = flame_motion_vector(motion) if vector is None else vector
    expected = model.architecture.config.motion_dim
    if vector.shape[1] != expected:
        names = {MOTION_VECTOR_SIZE: "FLAME's expression, jaw and eyes", IMAGE_MOTION_SIZE: "read off pictures"}
        ours, theirs = (f"{size} numbers ({names.get(size, 'of another kind')})" for size in (expected, vector.shape[1]))
        remedy = "give those of a picture by MotionVectors" if expected == IMAGE_MOTION_SIZE else "use a network trained for them"
        raise ConfigError(f"this reconstructor reads motion vectors of {ours}, got {theirs}; {remedy}")
    return vector.to(next(model.parameters()).device)
