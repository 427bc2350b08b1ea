"""The published GenHead's tensor names, and the recipe that regenerates a set of reference weights under those names.

The published state dict has four trainable parts and constant filters. Ours map onto it one to one:

  published                            ours (GenHead module tree)
  backbone.mapping.embed | fc0 | fc1   mapping.embed | layers.0 | layers.1
  backbone.mapping.w_avg               mapping.w_average
  backbone.synthesis.b{res}.*          backbone.blocks.{res}.*            (res = 4, 8, ..., 256; const, conv0, conv1)
  ....torgb.*                          ....to_image.*                     (192 channels in the backbone: six planes of 32)
  ....noise_const                      ....noise
  background.mapping | synthesis       background_network.mapping | synthesis
  decoder.net.0.{weight,bias}          decoder.hidden.{weight,bias}       [64, 32], [64]   then softplus
  decoder.out_sigma.{weight,bias}      decoder.density.{weight,bias}      [1, 64], [1]     raw density
  decoder.out_rgb.{weight,bias}        decoder.color.{weight,bias}        [32, 64], [32]   then sigmoid * 1.002 - 0.001
  superresolution.block{i}.*           superresolution.blocks.{i}.*       (torgb -> to_image)
  *.resample_filter                    none: the fixed filter [1, 3, 3, 1], checked
  superresolution.*.noise_{const,strength}   none: the published super-resolution runs without noise
  constants of the head model and rasteriser none: ours come from the head model that the user gives

All tensors are stored as they are trained: the equalised layers' gains are applied in use (the decoder's: 1/sqrt(32) and
1/sqrt(64), learning-rate multiplier 1), so values are copied without scaling.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from head3d.networks.resample import FILTER
from head3d.run.errors import AssetError

Names = tuple[tuple[str, str | None], ...]  # (pattern of the whole published name, our name with its groups; None = left out)


def _synthesis(published: str, ours: str, noise: bool = True) -> Names:
    """Rules for the blocks of a synthesis network. `published` holds one group, the block's number."""
    return (
        (published + r"\.(const|conv[01]\.(?:affine\.)?(?:weight|bias))", ours + r".\2"),
        (published + r"\.torgb\.((?:affine\.)?(?:weight|bias))", ours + r".to_image.\2"),
        (published + r"\.(conv[01])\.noise_strength", ours + r".\2.noise_strength" if noise else None),
        (published + r"\.(conv[01])\.noise_const", ours + r".\2.noise" if noise else None),
    )


def _mapping(published: str, ours: str) -> Names:
    return (
        (published + r"\.embed\.(weight|bias)", ours + r".embed.\1"),
        (published + r"\.fc(\d+)\.(weight|bias)", ours + r".layers.\1.\2"),
        (published + r"\.w_avg", ours + ".w_average"),
    )


# Modules of the published generator that hold a head model's tables and no learned weight; which there are depends on the release.
HEAD_TABLES = r"(\w*(?:deform|flame|raster|renderer|ray_sampler|face_model|head_model|mesh)\w*)\..+"

GENHEAD_NAMES: Names = (
    *_mapping(r"backbone\.mapping", "mapping"),
    *_synthesis(r"backbone\.synthesis\.b(\d+)", r"backbone.blocks.\1"),
    *_mapping(r"background\.mapping", "background_network.mapping"),
    *_synthesis(r"background\.synthesis\.b(\d+)", r"background_network.synthesis.blocks.\1"),
    (r"decoder\.net\.0\.(weight|bias)", r"decoder.hidden.\1"),
    (r"decoder\.out_sigma\.(weight|bias)", r"decoder.density.\1"),
    (r"decoder\.out_rgb\.(weight|bias)", r"decoder.color.\1"),
    *_synthesis(r"superresolution\.block(\d+)", r"superresolution.blocks.\1", noise=False),
    (HEAD_TABLES, None),
)


def rename(tensors: Mapping[str, Tensor], names: Names, where: str) -> dict[str, Tensor]:
    """Published names -> ours; tensors without a counterpart are left out, the resampling filters after a check of their values.

    Raises AssetError if a name matches no rule or a filter is not the one this network is written for. `where` names the source
    in the message.
    """
    rules = [(re.compile(pattern), ours) for pattern, ours in names]
    taps = torch.tensor(FILTER)
    kernel = torch.outer(taps, taps) / taps.sum() ** 2
    renamed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name.split(".")[-1] == "resample_filter":
            if tensor.shape != kernel.shape or not torch.allclose(tensor.float().cpu(), kernel, atol=1e-6):
                raise AssetError(
                    f"{where}: {name}: expected the 4x4 filter [1, 3, 3, 1] x [1, 3, 3, 1] / 64, got {tuple(tensor.shape)} "
                    f"{tensor.flatten()[:4].tolist()}...; this network has no other filter"
                )
            continue
        for pattern, ours in rules:
            match = pattern.fullmatch(name)
            if match:
                if ours is not None:
                    renamed[match.expand(ours)] = tensor
                break
        else:
            raise AssetError(
                f"{where}: {name} {tuple(tensor.shape)}: expected a tensor of the published GenHead, got an unknown name; "
                "is this another network's file?"
            )
    return renamed


def read_recipe(folder: str | Path) -> dict[str, Tensor]:
    """Regenerate the reference weights that `folder`/recipe.json lists: published name -> tensor, in the file's order.

    Entry: {"key", "shape", "constant"} or {"key", "shape", "mean", "std", "seed"}, the latter mean + std * randn(shape) of a CPU
    generator seeded with seed. Raises AssetError if the file is missing or malformed.
    """
    path = Path(folder) / "recipe.json"
    if not path.is_file():
        raise AssetError(
            f"{path}: expected the recipe of the reference weights, found no such file; give the folder that holds recipe.json and io.npz"
        )
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        return {entry["key"]: _tensor(entry) for entry in entries}
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        raise AssetError(
            f"{path}: expected a list of entries with key, shape and constant or mean, std, seed; got {error!r}; is the file whole?"
        ) from error


def _tensor(entry: dict) -> Tensor:
    shape = tuple(entry["shape"])
    if "constant" in entry:
        return torch.tensor(entry["constant"], dtype=torch.float32).broadcast_to(shape).clone()
    generator = torch.Generator().manual_seed(entry["seed"])
    return entry["mean"] + entry["std"] * torch.randn(shape, generator=generator)
