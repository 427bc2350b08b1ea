"""The published network's parameter names and reference numbers, mapped onto ours.

The table renames the published state dict of the animatable reconstructor; the check fills our network with weights that anyone can regenerate and compares
what it computes with what the published network computed from the same weights.
"""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from head3d.run.errors import AssetError
from reconstructor.architectures.portrait4d import Portrait4D, Portrait4DConfig
from reconstructor.blocks import to_map, with_coordinates

STAGE_TOLERANCE = 1e-3  # relative error |a - b| / |b| up to which a stage counts as equal

# Published name -> ours, applied in order; each pattern is a regular expression for the beginning or a part of the name.
RENAMES: tuple[tuple[str, str], ...] = (
    (r"^encoder_global\.encoder\.conv1\.", "global_encoder.stem."),
    (r"^encoder_global\.encoder\.layer([1-4])\.", lambda m: f"global_encoder.stages.{int(m[1]) - 1}."),
    (r"\.downsample\.0\.", ".shortcut."),
    (r"^encoder_global\.decoder\.0\.convs\.0\.0\.", "global_encoder.pyramid.point."),
    (r"^encoder_global\.decoder\.0\.convs\.([1-3])\.0\.", lambda m: f"global_encoder.pyramid.dilated.{int(m[1]) - 1}."),
    (r"^encoder_global\.decoder\.0\.convs\.4\.1\.", "global_encoder.pyramid.pooled."),
    (r"^encoder_global\.decoder\.0\.project\.0\.", "global_encoder.pyramid.join."),
    (r"^encoder_global\.decoder\.1\.", "global_encoder.pyramid.out."),
    (r"^encoder_detail\.encoder\.(\d+)\.", lambda m: f"detail_encoder.convs.{int(m[1]) // 2}."),
    (r"patch_embed\.proj\.", "patch_embed.projection."),
    (r"^encoder_canonical\.patch_embed\.", "patch_embed."),
    (r"^encoder_canonical\.maps_neutral\.0\.", "source_motion.first."),
    (r"^encoder_canonical\.maps_neutral\.2\.", "source_motion.second."),
    (r"^encoder_canonical\.proj_y_neutral\.", "source_motion.tokens."),
    (r"^encoder_canonical\.maps\.0\.", "driving_motion.first."),
    (r"^encoder_canonical\.maps\.2\.", "driving_motion.second."),
    (r"^encoder_canonical\.proj_y\.", "driving_motion.tokens."),
    (r"^encoder_canonical\.trans_blocks_neutral\.", "deexpression."),
    (r"^encoder_canonical\.trans_blocks_motion\.", "reenactment."),
    (r"^((?:deexpression|reenactment)\.\d+)\.norm1\.", r"\1.self_norm."),
    (r"^((?:deexpression|reenactment)\.\d+)\.attn1\.", r"\1.self_attention."),
    (r"^((?:deexpression|reenactment)\.\d+)\.norm2\.", r"\1.cross_norm."),
    (r"^((?:deexpression|reenactment)\.\d+)\.attn2\.", r"\1.cross_attention."),
    (r"^((?:deexpression|reenactment)\.\d+)\.norm3\.", r"\1.feed_forward_norm."),
    (r"^encoder_canonical\.convs\.1\.", "feature_head.convs.0."),
    (r"^encoder_canonical\.convs\.4\.", "feature_head.convs.1."),
    (r"^encoder_canonical\.convs\.6\.", "feature_head.out."),
    (r"^generator_triplane\.convs1\.", "plane_decoder.merge."),
    (r"^generator_triplane\.convs2\.", "plane_decoder.refine."),
    (r"^generator_triplane\.conv_last\.", "plane_decoder.out."),
    (r"^generator_triplane\.trans_blocks\.(\d+)\.norm1\.", r"plane_decoder.blocks.\1.self_norm."),
    (r"^generator_triplane\.trans_blocks\.(\d+)\.attn\.", r"plane_decoder.blocks.\1.self_attention."),
    (r"^generator_triplane\.trans_blocks\.(\d+)\.norm2\.", r"plane_decoder.blocks.\1.feed_forward_norm."),
    (r"^generator_triplane\.trans_blocks\.(\d+)\.mlp\.", r"plane_decoder.blocks.\1.mlp."),
    (r"^generator_triplane\.", "plane_decoder."),
    (r"_attention\.q\.", "_attention.query."),
    (r"_attention\.kv\.", "_attention.key_value."),
    (r"_attention\.proj\.", "_attention.output."),
    (r"_attention\.sr\.", "_attention.merge."),
    (r"_attention\.norm\.", "_attention.merge_norm."),
    (r"\.mlp\.fc1\.", ".feed_forward.expand."),
    (r"\.mlp\.dwconv\.dwconv\.", ".feed_forward.depthwise."),
    (r"\.mlp\.fc2\.", ".feed_forward.contract."),
    (r"^background\.input_conv\.0\.", "background.stem."),
    (r"^background\.down_conv_(\d)\.0\.", lambda m: f"background.down.{int(m[1]) - 1}."),
    (r"^background\.down_conv_(\d)\.2\.op\.", lambda m: f"background.shrink.{int(m[1]) - 1}."),
    (r"^background\.middle\.0\.", "background.middle."),
    (r"^background\.up_conv_(\d)\.0\.", lambda m: f"background.up.{int(m[1]) - 1}."),
    (r"^background\.up_conv_(\d)\.2\.conv\.", lambda m: f"background.grow.{int(m[1]) - 1}."),
    (r"^background\.out_conv\.", "background.out."),
)
ARCHITECTURE_PREFIXES = ("encoder_global.", "encoder_detail.", "encoder_canonical.", "generator_triplane.", "background.")


def rename(published_name: str) -> str | None:
    """Our name of a published parameter; None when it belongs to the renderer (decoder, super-resolution, w_avg) and not to the architecture."""
    if not published_name.startswith(ARCHITECTURE_PREFIXES):
        return None
    name = published_name
    for pattern, replacement in RENAMES:
        name = re.sub(pattern, replacement, name)
    return name


def load_published(model: Portrait4D, tensors: Mapping[str, Tensor], where: str) -> None:
    """Copy published tensors (published names) into `model`. Tensors of the renderer are ignored; anything else must fit exactly.

    Raises AssetError that names what is missing, unknown or of another shape; `where` says where the tensors came from. The model is then unchanged.
    A model built on the meta device takes the tensors themselves, without a copy.
    """
    ours = model.state_dict()
    renamed = {name: tensor for published, tensor in tensors.items() if (name := rename(published)) is not None}
    problems = [f"missing {name}" for name in ours if name not in renamed]
    for name, tensor in renamed.items():
        if name not in ours:
            problems.append(f"unknown {name}")
        elif tensor.shape != ours[name].shape:
            problems.append(f"{name} is {tuple(tensor.shape)}, expected {tuple(ours[name].shape)}")
    if problems:
        raise AssetError(
            f"{where}: not a published reconstructor of this size: {'; '.join(problems[:5])}{f' and {len(problems) - 5} more' if len(problems) > 5 else ''}. "
            "Use the default Portrait4DConfig for the published 512 network."
        )
    model.load_state_dict(renamed, assign=next(model.parameters()).is_meta)


def regenerate(recipe: Path) -> Iterator[tuple[str, Tensor]]:
    """(published name, tensor) of each entry of a recipe.json: `constant`, or mean + std * randn(seed) drawn on the CPU."""
    for entry in json.loads(recipe.read_text()):
        if "constant" in entry:
            yield entry["key"], torch.tensor(entry["constant"]).reshape(entry["shape"])
        else:
            noise = torch.randn(entry["shape"], generator=torch.Generator().manual_seed(entry["seed"]))
            yield entry["key"], noise.mul_(entry["std"]).add_(entry["mean"])


class StageAgreement(NamedTuple):
    """How well one stage agrees with its reference."""

    stage: str
    error: float  # |ours - theirs| / |theirs|
    tolerance: float

    @property
    def passed(self) -> bool:
        return self.error <= self.tolerance


def check_stages(folder: Path) -> list[StageAgreement]:
    """Compare each stage of the published-size network with the reference numbers of `folder` (recipe.json, io.npz). About 2 GB and half a minute on one core.

    Raises AssetError when a file is missing or the recipe does not fit the network.
    """
    for name in ("recipe.json", "io.npz"):
        if not (folder / name).is_file():
            raise AssetError(f"{folder / name}: no such file; a reference folder holds recipe.json and io.npz")
    with torch.device("meta"):
        model = Portrait4D(Portrait4DConfig()).eval()
    load_published(model, dict(regenerate(folder / "recipe.json")), str(folder / "recipe.json"))
    with np.load(folder / "io.npz", allow_pickle=False) as archive:
        reference = {name: torch.from_numpy(archive[name].astype(np.float32)) for name in archive.files}
    return [StageAgreement(name, relative_error(ours, reference[name]), STAGE_TOLERANCE) for name, ours in _stages(model, reference)]


def relative_error(ours: Tensor, reference: Tensor) -> float:
    """|ours - reference| / |reference|, in the Euclidean norm over all numbers."""
    return float((ours - reference).norm() / reference.norm())


@torch.no_grad()
def _stages(model: Portrait4D, given: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """(reference name, our output at the reference's stride) of each stage."""
    always = torch.ones(1)
    source = model.encode_source(given["image"])
    yield "stage_encoder_global_every2", source.global_features[:, :, ::2, ::2]
    yield "stage_encoder_detail_every8", source.detail[:, :, ::8, ::8]
    yield "stage_background_every16", model.background.logits(with_coordinates(given["image"]))[:, :, ::16, ::16]
    canonical = model.deexpress(source, given["motion_source"], always)
    reenacted = []
    hook = model.reenactment[-1].register_forward_hook(lambda module, inputs, tokens: reenacted.append(tokens))
    planes = model.reenact(canonical, source, given["motion_driver"], always)
    hook.remove()
    shuffled = F.pixel_shuffle(to_map(reenacted[0], (32, 32)), 2)
    yield "stage_encoder_canonical_every2", shuffled[:, :, ::2, ::2]
    yield "stage_generator_triplane_every8", planes.flatten(1, 2)[:, :, ::8, ::8]
