"""What the shared model, trainer, evaluation and avatar need from a reconstructor architecture, and nothing more.

    source picture (and its motion) --encode_source--> code of the source, with the background      once per source
    driving motion or picture       --encode_driver--> code of the driver                           once per driven frame
    both codes, switch              --planes--> tri-planes of that head in that motion              once per driven frame

Decoder, neck stage, rays and super-resolution are one for all (model.py), as are the losses and the trainer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from head3d.cameras import Camera
from head3d.rendering import HeadImages
from reconstructor.batches import Batch
from reconstructor.motion import MotionKind
from reconstructor.stages import StageConfig

Input = Literal["source_motion", "driving_motion", "driver_image"]  # of `Batch`; the source's picture is always there
# (planes [B, 3, C, P, P], background [B, C, b, b] in [0, 1], camera) -> pictures, the neck at rest
Render = Callable[[Tensor, Tensor, Camera], HeadImages]


class Driver(NamedTuple):
    """What drives the head."""

    motion: Tensor | None = None  # [B, D] motion vector
    image: Tensor | None = None  # [B, 3, H, W] picture of somebody in that motion, in [-1, 1]


class SourceCode(Protocol):
    """What `encode_source` returns: a NamedTuple of tensors [B, ...], so that one source can serve many frames (`repeat`)."""

    @property
    def background(self) -> Tensor:
        """[B, C, b, b] in [0, 1]: features of what stands behind the head."""

    def __iter__(self) -> Iterator[Tensor]: ...


class ArchitectureConfig(Protocol):
    """What others read of an architecture's settings."""

    image_resolution: int  # of the source picture, px
    motion: MotionKind  # which motion vector it reads
    plane_channels: int  # of each of the three planes

    @property
    def motion_dim(self) -> int:
        """Length of that vector."""

    @property
    def background_channels(self) -> int: ...

    @property
    def stages(self) -> tuple[StageConfig, ...]:
        """Of its training, where a run does not give others."""


class Architecture(Protocol):
    """A torch module: pictures and motions -> tri-planes in the source's shape and the driver's expression, the neck at rest."""

    config: ArchitectureConfig
    needs: frozenset[Input]  # what it reads beside the source's picture; the rest comes as None
    groups: Mapping[str, tuple[str, ...]]  # name of a parameter group -> patterns of its parameters' names (see stages.py)

    def encode_source(self, image: Tensor, motion: Tensor | None, motion_scale: Tensor) -> SourceCode:
        """image [B, 3, H, W] in [-1, 1], motion vector [B, D], switch [B] -> all that depends on the source alone."""

    def encode_driver(self, driver: Driver, source: SourceCode, render: Render) -> Any:
        """All that depends on the driver and can be had before the planes. `render` draws planes of the architecture's own making."""

    def planes(self, source: SourceCode, driver: Any, motion_scale: Tensor) -> Tensor:
        """[B, 3, C, P, P] XY, YZ, ZX. motion_scale [B]: the switch; at 0 the driver has no influence."""

    def extra_losses(
        self, source: SourceCode, driver: Any, planes: Tensor, images: HeadImages, batch: Batch, render: Render
    ) -> Mapping[str, Tensor]:
        """Loss terms of this architecture's own, each multiplied by its weight; {} if the shared ones are all.

        images: of these planes, as the shared losses see them, so that a term may read again what was made.
        """

    def parameters(self) -> Iterator[torch.nn.Parameter]: ...


Code = TypeVar("Code", bound=SourceCode)


def repeat(source: Code, count: int) -> Code:
    """The code of one source for `count` frames; no copy."""
    return type(source)(*(part.expand(count, *part.shape[1:]) for part in source))
