"""Inception-v3 as the Frechet Inception distance uses it, filled from a file that the user has; nothing is downloaded.

Architecture: arXiv:1512.00567 under the names of torchvision's `inception_v3`. Two kinds of weights fit it, told apart by their classes:

    1008 classes   the network of 2015 that FID is defined with (arXiv:1706.08500), as converted by pytorch-fid under the name
                   pt_inception-2015-12-05. Average pooling leaves the border out, and the last block takes the maximum instead.
    1000 classes   torchvision's own training. Average pooling counts the border as zeros, everywhere.

The features are the 2048 means before the classes. Pictures: 8 bits, resized to 299 x 299 bilinearly (half-pixel centres, no
anti-aliasing), in [-1, 1]; so pytorch-fid has it. (The code of 2017 resized with corners aligned to the top left; numbers differ a little.)
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from head3d.run.checkpoint import fill_weights
from head3d.run.errors import AssetError
from head3d.run.pickles import read_state_dict

Network = Literal["fid", "torchvision"]
CLASSES: dict[Network, int] = {"fid": 1008, "torchvision": 1000}
SIDE_PX = 299
REMEDY = "give pytorch-fid's pt_inception-2015-12-05 weights, or torchvision's inception_v3, as .pth, .pt or .safetensors"

# A layer: name, channels, kernel (side or height, width), and stride where it is 2; of stride 1 it keeps the side, else it adds no border.
Layer = tuple[str, int, int | tuple[int, int]] | tuple[str, int, int, int]
# Pools, of 3 x 3 pixels; each stands in a path without weights.
AVERAGE, LARGEST, HALVED = "average", "largest", "halved"

STEM: tuple[tuple[Layer, int], ...] = (  # and the border of each
    (("Conv2d_1a_3x3", 32, 3, 2), 0),
    (("Conv2d_2a_3x3", 32, 3), 0),
    (("Conv2d_2b_3x3", 64, 3), 1),
    (("Conv2d_3b_1x1", 80, 1), 0),
    (("Conv2d_4a_3x3", 192, 3), 0),
)
HALVED_AFTER = ("Conv2d_2b_3x3", "Conv2d_4a_3x3")


def _fine(pooled: int) -> tuple[tuple[str | Layer, ...], ...]:
    """Paths at 35 x 35."""
    return (
        (("branch1x1", 64, 1),),
        (("branch5x5_1", 48, 1), ("branch5x5_2", 64, 5)),
        (("branch3x3dbl_1", 64, 1), ("branch3x3dbl_2", 96, 3), ("branch3x3dbl_3", 96, 3)),
        (AVERAGE, ("branch_pool", pooled, 1)),
    )


def _middle(width: int) -> tuple[tuple[str | Layer, ...], ...]:
    """Paths at 17 x 17, whose 7 x 7 kernels are rows and columns."""
    row, column = (1, 7), (7, 1)
    double = (("branch7x7dbl_1", width, 1), ("branch7x7dbl_2", width, column), ("branch7x7dbl_3", width, row))
    return (
        (("branch1x1", 192, 1),),
        (("branch7x7_1", width, 1), ("branch7x7_2", width, row), ("branch7x7_3", 192, column)),
        (*double, ("branch7x7dbl_4", width, column), ("branch7x7dbl_5", 192, row)),
        (AVERAGE, ("branch_pool", 192, 1)),
    )


def _coarse(pool: str) -> tuple[tuple[str | Layer, ...], ...]:
    """Paths at 8 x 8; two of them part after a common beginning."""
    row, column, double = (1, 3), (3, 1), (("branch3x3dbl_1", 448, 1), ("branch3x3dbl_2", 384, 3))
    return (
        (("branch1x1", 320, 1),),
        (("branch3x3_1", 384, 1), ("branch3x3_2a", 384, row)),
        (("branch3x3_1", 384, 1), ("branch3x3_2b", 384, column)),
        (*double, ("branch3x3dbl_3a", 384, row)),
        (*double, ("branch3x3dbl_3b", 384, column)),
        (pool, ("branch_pool", 192, 1)),
    )


def _blocks(network: Network) -> dict[str, tuple[tuple[str | Layer, ...], ...]]:
    """Name -> paths."""
    to_middle = (
        (("branch3x3", 384, 3, 2),),
        (("branch3x3dbl_1", 64, 1), ("branch3x3dbl_2", 96, 3), ("branch3x3dbl_3", 96, 3, 2)),
        (HALVED,),
    )
    row, column = (1, 7), (7, 1)
    to_coarse = (
        (("branch3x3_1", 192, 1), ("branch3x3_2", 320, 3, 2)),
        (("branch7x7x3_1", 192, 1), ("branch7x7x3_2", 192, row), ("branch7x7x3_3", 192, column), ("branch7x7x3_4", 192, 3, 2)),
        (HALVED,),
    )
    fine = {f"Mixed_5{letter}": _fine(pooled) for letter, pooled in zip("bcd", (32, 64, 64), strict=True)}
    middle = {f"Mixed_6{letter}": _middle(width) for letter, width in zip("bcde", (128, 160, 160, 192), strict=True)}
    coarse = {"Mixed_7b": _coarse(AVERAGE), "Mixed_7c": _coarse(LARGEST if network == "fid" else AVERAGE)}
    return fine | {"Mixed_6a": to_middle} | middle | {"Mixed_7a": to_coarse} | coarse


class Convolution(nn.Module):
    """Convolution without bias, batch normalisation by its running means (epsilon 0.001), ReLU."""

    def __init__(self, inputs: int, layer: Layer, border: int | tuple[int, int] | None = None) -> None:
        super().__init__()
        _, channels, kernel, stride = (*layer, 1)[:4]
        sides = (kernel, kernel) if isinstance(kernel, int) else kernel
        if border is None:
            border = (sides[0] // 2, sides[1] // 2) if stride == 1 else 0
        self.conv = nn.Conv2d(inputs, channels, sides, stride, border, bias=False)
        self.bn = nn.BatchNorm2d(channels, eps=0.001)

    def forward(self, values: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(values)))


class Block(nn.Module):
    """Paths side by side, joined by their channels."""

    def __init__(self, inputs: int, paths: tuple[tuple[str | Layer, ...], ...], count_border: bool) -> None:
        super().__init__()
        self.count_border, self.paths, self.outputs = count_border, [], 0
        for path in paths:
            channels, names = inputs, []
            for step in path:
                name = step if isinstance(step, str) else step[0]
                if not isinstance(step, str):
                    if not hasattr(self, name):
                        self.add_module(name, Convolution(channels, step))
                    channels = step[1]
                names.append(name)
            self.paths.append(names)
            self.outputs += channels

    def forward(self, values: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, outputs, H or (H - 1) / 2, ...]."""
        reached: dict[str, Tensor] = {}  # paths that begin alike share their beginning
        ends = []
        for names in self.paths:
            value = values
            for name in names:
                if name not in reached:
                    reached[name] = self._step(name, value)
                value = reached[name]
            ends.append(value)
        return torch.cat(ends, dim=1)

    def _step(self, name: str, values: Tensor) -> Tensor:
        match name:
            case "average":
                return F.avg_pool2d(values, 3, stride=1, padding=1, count_include_pad=self.count_border)
            case "largest":
                return F.max_pool2d(values, 3, stride=1, padding=1)
            case "halved":
                return F.max_pool2d(values, 3, stride=2)
            case _:
                return self.get_submodule(name)(values)


class Inception(nn.Module):
    """Pictures -> the 2048 features. The classes' layer is there because files have it; it is not used."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        channels = 3
        for layer, border in STEM:
            self.add_module(layer[0], Convolution(channels, layer, border))
            channels = layer[1]
        self.blocks = _blocks(network)
        for name, paths in self.blocks.items():
            block = Block(channels, paths, count_border=network == "torchvision")
            self.add_module(name, block)
            channels = block.outputs
        self.fc = nn.Linear(channels, CLASSES[network])
        self.eval()

    @torch.no_grad()
    def forward(self, pictures: Tensor) -> Tensor:
        """Pictures [B, 3, S, S] in [-1, 1] -> features [B, 2048]."""
        values = prepare(pictures)
        for (name, *_), _ in STEM:
            values = self.get_submodule(name)(values)
            if name in HALVED_AFTER:
                values = F.max_pool2d(values, 3, stride=2)
        for name in self.blocks:
            values = self.get_submodule(name)(values)
        return values.mean((2, 3))


def prepare(pictures: Tensor) -> Tensor:
    """Pictures [B, 3, S, S] in [-1, 1] (beyond is cut) as 8-bit files would hold them, at 299 x 299 px, in [-1, 1]."""
    levels = (pictures.float() * 127.5 + 127.5).round().clamp(0, 255)
    return F.interpolate(levels, (SIDE_PX, SIDE_PX), mode="bilinear", align_corners=False) / 127.5 - 1


def read_inception(path: Path) -> tuple[Network, Inception]:
    """The network that a file's tensors are of, filled with them. Raises AssetError naming the file and the tensors that do not fit."""
    tensors = read_state_dict(path, REMEDY)
    weights = {name: value for name, value in tensors.items() if not name.startswith("AuxLogits.")}  # which only training uses
    classes = weights["fc.bias"].numel() if "fc.bias" in weights else None
    network = next((name for name, count in CLASSES.items() if count == classes), None)
    if network is None:
        found = f"fc.bias of {classes} numbers" if classes is not None else f"{len(weights)} tensors without fc.bias"
        raise AssetError(f"{path}: expected Inception-v3 with 1008 or 1000 classes (fc.bias), got {found}; {REMEDY}")
    with torch.device("meta"):  # no random weights for what the file fills
        inception = Inception(network)
    own = inception.to_empty(device="cpu").state_dict()
    counters = {name: torch.zeros_like(value) for name, value in own.items() if name.endswith("num_batches_tracked")}  # not in old files
    fill_weights(inception, counters | weights, str(path), REMEDY)
    broken = [name for name, value in weights.items() if not value.isfinite().all()]
    if broken:
        raise AssetError(f"{path}: expected finite weights, got others in {', '.join(broken[:3])}; download the file again")
    return network, inception
