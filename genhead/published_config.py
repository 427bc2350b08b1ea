"""A published generator's tensors under our names, with the configuration that their shapes tell.

Widths, depths and resolutions follow from shapes. What leaves no trace in them (rays per side, samples, box side, clamps, half
precision) is taken to be as published.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import NamedTuple, NoReturn

from torch import Tensor

from genhead.background import BackgroundConfig
from genhead.generator import GenHeadConfig
from genhead.published import GENHEAD_NAMES, rename
from head3d.deformation import DeformationConfig
from head3d.labels import SHAPE_SIZE
from head3d.networks.stylegan2 import block_channels
from head3d.networks.superresolution import SuperResolutionConfig
from head3d.run.errors import AssetError

CONDITION_SIZE = 25 + SHAPE_SIZE  # camera label and shape


class _Shapes:
    """Shapes by our names, with an error for each that is missing."""

    def __init__(self, weights: Mapping[str, Tensor], where: str) -> None:
        self._shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
        self._where = where

    def of(self, name: str, dimensions: int) -> tuple[int, ...]:
        shape = self._shapes.get(name)
        if shape is None or len(shape) != dimensions or 0 in shape:
            self.fail(f"expected a tensor {name} of {dimensions} dimensions, got {'none' if shape is None else shape}")
        return shape

    def numbers(self, pattern: str) -> list[int]:
        """The numbers that the group of `pattern` takes in the names, ascending."""
        return sorted({int(match[1]) for name in self._shapes if (match := re.fullmatch(pattern, name))})

    def fail(self, problem: str) -> NoReturn:
        raise AssetError(f"{self._where}: {problem}; this is no GenHead as published, or the file is not whole")


class PublishedNetwork(NamedTuple):
    """A network that can be built and filled."""

    config: GenHeadConfig
    weights: dict[str, Tensor]  # by our names


def adopt(tensors: Mapping[str, Tensor], where: str) -> PublishedNetwork:
    """Rename published `tensors` and infer the configuration. Raises AssetError naming `where` and the tensor in question."""
    weights = rename(tensors, GENHEAD_NAMES, where)
    shapes = _Shapes(weights, where)
    noise = tensors.get("superresolution.block0.conv1.noise_const")  # unused, but as large as the first block's output
    superresolution = _superresolution(shapes)
    if noise is not None and noise.ndim == 2:
        superresolution = dataclasses.replace(superresolution, input_resolution=max(1, noise.shape[0] // 2))
    return PublishedNetwork(_config(shapes, superresolution), weights)


def _config(shapes: _Shapes, superresolution: SuperResolutionConfig) -> GenHeadConfig:
    w_dim, condition = shapes.of("mapping.embed.weight", 2)
    if condition != CONDITION_SIZE:
        shapes.fail(f"expected a mapping conditioned on {CONDITION_SIZE} numbers (camera 25, shape {SHAPE_SIZE}), got {condition}")
    plane_resolution, plane_layers, channel_base, channel_max = _synthesis(shapes, "backbone")
    if plane_layers % 6:
        shapes.fail(f"expected a backbone of six planes, got {plane_layers} channels")
    decoder_hidden, plane_channels = shapes.of("decoder.hidden.weight", 2)
    if plane_channels * 6 != plane_layers:
        shapes.fail(f"expected a decoder of {plane_layers // 6} features (the backbone's {plane_layers} / 6), got {plane_channels}")
    z_dim = shapes.of("mapping.layers.0.weight", 2)[1] - w_dim
    if z_dim < 1:
        shapes.fail(f"expected a first mapping layer of more than {w_dim} inputs (z and the condition), got {z_dim + w_dim}")
    background_resolution, background_channels, background_base, background_max = _synthesis(shapes, "background_network.synthesis")
    background_w, background_z = shapes.of("background_network.mapping.layers.0.weight", 2)
    try:
        return GenHeadConfig(
            z_dim=z_dim,
            w_dim=w_dim,
            mapping_layers=len(shapes.numbers(r"mapping\.layers\.(\d+)\.weight")),
            plane_resolution=plane_resolution,
            plane_channels=plane_channels,
            feature_channels=shapes.of("decoder.color.weight", 2)[0],
            decoder_hidden=decoder_hidden,
            channel_base=channel_base,
            channel_max=channel_max,
            image_resolution=superresolution.output_resolution,
            deformation=DeformationConfig(published=True),
            background=BackgroundConfig(
                resolution=background_resolution,
                channels=background_channels,
                z_dim=background_z,
                w_dim=background_w,
                mapping_layers=len(shapes.numbers(r"background_network\.mapping\.layers\.(\d+)\.weight")),
                channel_base=background_base,
                channel_max=background_max,
            ),
            superresolution=superresolution,
            published=True,
        )
    except ValueError as error:  # what GenHeadConfig itself refuses
        shapes.fail(str(error))


def _synthesis(shapes: _Shapes, network: str) -> tuple[int, int, int, int]:
    """(resolution, image channels, channel_base, channel_max) of a skip generator."""
    sizes = shapes.numbers(re.escape(network) + r"\.blocks\.(\d+)\.conv1\.weight")
    if sizes != [4 * 2**index for index in range(len(sizes))] or not sizes:
        shapes.fail(f"expected blocks of {network} at 4, 8, 16, ..., got {sizes}")
    channels = {size: shapes.of(f"{network}.blocks.{size}.conv1.weight", 4)[0] for size in sizes}
    largest = sizes[-1]
    base, most = channels[largest] * largest, max(channels.values())
    if any(block_channels(size, base, most) != count for size, count in channels.items()):
        shapes.fail(f"expected channels min(base / size, most) in {network}, got {channels}")
    return largest, shapes.of(f"{network}.blocks.{largest}.to_image.weight", 4)[0], base, most


def _superresolution(shapes: _Shapes) -> SuperResolutionConfig:
    """Widths of the blocks; the side that features are resized to first is left as published."""
    blocks = shapes.numbers(r"superresolution\.blocks\.(\d+)\.conv1\.weight")
    if blocks != list(range(len(blocks))) or not blocks:
        shapes.fail(f"expected super-resolution blocks 0, 1, ..., got {blocks}")
    return dataclasses.replace(
        SuperResolutionConfig(),
        feature_channels=shapes.of("superresolution.blocks.0.conv0.weight", 4)[1],
        channels=tuple(shapes.of(f"superresolution.blocks.{block}.conv1.weight", 4)[0] for block in blocks),
        w_dim=shapes.of("superresolution.blocks.0.conv0.affine.weight", 2)[1],
    )
