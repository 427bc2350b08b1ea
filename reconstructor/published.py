"""The published reconstructor's parameter names.

The table maps the published state dict onto Portrait4D's, one to one and without scaling. Its renderer (decoder, super-resolution, w_avg)
has GenHead's names and is not in the table; `adopt` takes both. The motion vectors that it was trained on are PD-FGC's, which is not
here: an export of it is driven by vectors that were computed elsewhere.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from genhead.published import GENHEAD_NAMES, HEAD_TABLES, Names, rename
from head3d.deformation import DeformationConfig
from head3d.run.errors import AssetError
from reconstructor.architectures.portrait4d import Portrait4D
from reconstructor.model import ReconstructorConfig

# As the published run left it: 128 rays a side (portrait4d, section 6.6)
PUBLISHED = ReconstructorConfig(render_resolution=128, deformation=DeformationConfig(published=True))


def _layers(pairs: Mapping[str, str]) -> Names:
    """Rules for single layers: published path -> our path, whose weight and bias keep their names."""
    return tuple((re.escape(published) + r"\.(weight|bias)", ours + r".\1") for published, ours in pairs.items())


def _attention(published: str, ours: str) -> Names:
    """Rules for one attention of every block of a stack; `published` holds one group, the block's number."""
    pairs = {"q": "query", "kv": "key_value", "proj": "output", "sr": "merge", "norm": "merge_norm"}
    return tuple((rf"{published}\.{theirs}\.(weight|bias)", rf"{ours}.{name}.\2") for theirs, name in pairs.items())


def _stack(published: str, ours: str, norms: Mapping[str, str]) -> Names:
    """Rules for the norms and the Mix-FFN of every block of a stack."""
    feed_forward = {r"mlp\.fc1": "expand", r"mlp\.dwconv\.dwconv": "depthwise", r"mlp\.fc2": "contract"}
    parts = {**norms, **{theirs: f"feed_forward.{name}" for theirs, name in feed_forward.items()}}
    return tuple((rf"{published}\.(\d+)\.{theirs}\.(weight|bias)", rf"{ours}.\1.{name}.\2") for theirs, name in parts.items())


def _motion_stack(published: str, ours: str) -> Names:
    return (
        *_stack(published, ours, {"norm1": "self_norm", "norm2": "cross_norm", "norm3": "feed_forward_norm"}),
        *_attention(published + r"\.(\d+)\.attn1", ours + r".\1.self_attention"),
        *_attention(published + r"\.(\d+)\.attn2", ours + r".\1.cross_attention"),
    )


GLOBAL_ENCODER_NAMES: Names = (
    *_layers(
        {
            "encoder_global.encoder.conv1": "global_encoder.stem",
            "encoder_global.decoder.0.convs.0.0": "global_encoder.pyramid.point",
            **{f"encoder_global.decoder.0.convs.{k}.0": f"global_encoder.pyramid.dilated.{k - 1}" for k in (1, 2, 3)},
            "encoder_global.decoder.0.convs.4.1": "global_encoder.pyramid.pooled",
            "encoder_global.decoder.0.project.0": "global_encoder.pyramid.join",
            "encoder_global.decoder.1": "global_encoder.pyramid.out",
        }
    ),
    *(
        (rf"encoder_global\.encoder\.layer{k}\.(\d+)\.{theirs}\.weight", rf"global_encoder.stages.{k - 1}.\1.{ours}.weight")
        for k in (1, 2, 3, 4)
        for theirs, ours in (("conv1", "conv1"), ("conv2", "conv2"), (r"downsample\.0", "shortcut"))
    ),
)
ENCODER_CANONICAL_NAMES: Names = (
    *_layers(
        {
            "encoder_canonical.patch_embed.proj": "patch_embed.projection",
            "encoder_canonical.patch_embed.norm": "patch_embed.norm",
            "encoder_canonical.maps_neutral.0": "source_motion.first",
            "encoder_canonical.maps_neutral.2": "source_motion.second",
            "encoder_canonical.proj_y_neutral": "source_motion.tokens",
            "encoder_canonical.maps.0": "driving_motion.first",
            "encoder_canonical.maps.2": "driving_motion.second",
            "encoder_canonical.proj_y": "driving_motion.tokens",
            "encoder_canonical.convs.1": "feature_head.convs.0",
            "encoder_canonical.convs.4": "feature_head.convs.1",
            "encoder_canonical.convs.6": "feature_head.out",
        }
    ),
    *_motion_stack(r"encoder_canonical\.trans_blocks_neutral", "deexpression"),
    *_motion_stack(r"encoder_canonical\.trans_blocks_motion", "reenactment"),
)
PLANE_DECODER_NAMES: Names = (
    *_layers(
        {
            **{f"generator_triplane.convs1.{k}": f"plane_decoder.merge.{k}" for k in (0, 2)},
            "generator_triplane.patch_embed.proj": "plane_decoder.patch_embed.projection",
            "generator_triplane.patch_embed.norm": "plane_decoder.patch_embed.norm",
            **{f"generator_triplane.convs2.{k}": f"plane_decoder.refine.{k}" for k in (0, 2, 4)},
            "generator_triplane.conv_last": "plane_decoder.out",
        }
    ),
    *_stack(r"generator_triplane\.trans_blocks", "plane_decoder.blocks", {"norm1": "self_norm", "norm2": "feed_forward_norm"}),
    *_attention(r"generator_triplane\.trans_blocks\.(\d+)\.attn", r"plane_decoder.blocks.\1.self_attention"),
)
BACKGROUND_NAMES: Names = _layers(
    {
        "background.input_conv.0": "background.stem",
        **{f"background.down_conv_{k}.0": f"background.down.{k - 1}" for k in (1, 2, 3)},
        **{f"background.down_conv_{k}.2.op": f"background.shrink.{k - 1}" for k in (1, 2, 3)},
        "background.middle.0": "background.middle",
        **{f"background.up_conv_{k}.0": f"background.up.{k - 1}" for k in (1, 2, 3, 4)},
        **{f"background.up_conv_{k}.2.conv": f"background.grow.{k - 1}" for k in (1, 2, 3, 4)},
        "background.out_conv": "background.out",
    }
)
PORTRAIT4D_NAMES: Names = (
    *GLOBAL_ENCODER_NAMES,
    *_layers({f"encoder_detail.encoder.{2 * k}": f"detail_encoder.convs.{k}" for k in range(5)}),
    *ENCODER_CANONICAL_NAMES,
    *PLANE_DECODER_NAMES,
    *BACKGROUND_NAMES,
)
RENDERER_PREFIXES = ("decoder.", "superresolution.", "w_avg")  # what a published state dict holds besides


def is_reconstructor(tensors: Mapping[str, Tensor]) -> bool:
    """Whether published tensors are a reconstructor's, and not a generator's."""
    return any(name.startswith("encoder_canonical.") for name in tensors)


def adopt(tensors: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """All weights of a `Reconstructor` from published tensors; those of the head model are left out.

    The published super-resolution takes the constant w_avg as its style w, ours ones: as W w = (W diag(w)) 1, w goes into the weights
    of its affine layers. Raises AssetError naming `where` and the tensor, if one is unknown or w_avg does not fit.
    """
    kept = {name: tensor for name, tensor in tensors.items() if not re.fullmatch(HEAD_TABLES, name)}
    style = kept.pop("w_avg", None)
    renderer = rename({name: tensor for name, tensor in kept.items() if name.startswith(RENDERER_PREFIXES)}, GENHEAD_NAMES, where)
    for name in [name for name in renderer if name.endswith("affine.weight")]:
        if style is None or renderer[name].shape[1:] != style.shape[-1:]:
            found = "none" if style is None else tuple(style.shape)
            raise AssetError(f"{where}: expected w_avg of the {renderer[name].shape[1]} numbers that {name} takes, got {found}")
        renderer[name] = renderer[name] * style.flatten()
    inside = rename({name: tensor for name, tensor in kept.items() if not name.startswith(RENDERER_PREFIXES)}, PORTRAIT4D_NAMES, where)
    return renderer | {f"architecture.{name}": tensor for name, tensor in inside.items()}


def load_published(model: Portrait4D, tensors: Mapping[str, Tensor], where: str) -> None:
    """Copy published tensors (published names) into `model`. Tensors of the renderer are left out; the others must fit exactly.

    Raises AssetError that names what is missing, unknown or of another shape, and leaves the model unchanged; `where` says where the
    tensors came from. A model built on the meta device takes the tensors themselves, without a copy.
    """
    ours = model.state_dict()
    renamed = rename({name: tensor for name, tensor in tensors.items() if not name.startswith(RENDERER_PREFIXES)}, PORTRAIT4D_NAMES, where)
    problems = [f"missing {name}" for name in ours if name not in renamed]
    for name, tensor in renamed.items():
        if name not in ours:
            problems.append(f"unknown {name}")
        elif tensor.shape != ours[name].shape:
            problems.append(f"{name} is {tuple(tensor.shape)}, expected {tuple(ours[name].shape)}")
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise AssetError(
            f"{where}: not a published reconstructor of this size: {'; '.join(problems[:5])}{more}; "
            "use the default Portrait4DConfig for the published network"
        )
    model.load_state_dict(renamed, assign=next(model.parameters()).is_meta)
