"""`headfoundry import-published FILE --out DIR --head_model FLAME`: a published GenHead or reconstructor checkpoint as our export."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import tyro
from torch import Tensor, nn

import genhead.generator
import reconstructor.model
from genhead.generator import GenHead, GenHeadExport
from genhead.published import HEAD_TABLES
from genhead.published_config import adopt
from genhead.published_files import REMEDY, read_published
from head3d.head_model import BUILT_IN, HeadModel, load_head_model
from head3d.run.checkpoint import export_model, fill_weights
from head3d.run.errors import AssetError
from head3d.run.seeding import torch_generator, weights_drawn_from
from reconstructor.model import Reconstructor, ReconstructorExport
from reconstructor.published import PUBLISHED, is_reconstructor
from reconstructor.published import adopt as adopt_reconstructor


@dataclasses.dataclass(frozen=True)
class ImportPublished:
    """Turn a published GenHead or reconstructor file into model.safetensors and config.yaml. Nothing inside the file is executed."""

    file: Annotated[Path, tyro.conf.Positional]  # .pkl as published, or .pt, .pth, .safetensors with its tensors by name
    head_model: str  # path of the FLAME file that the checkpoint was trained with; the built-in head has another mesh
    out: Path  # the export: use it wherever a setting is called generator, or reconstructor


def main(config: ImportPublished) -> None:
    """Read, rename, check against a built network, write. Raises AssetError if anything does not fit."""
    if config.head_model == BUILT_IN:
        raise AssetError(
            "head_model: a published checkpoint gives its planes meaning through FLAME's mesh, got the built-in head; "
            "give the path of your FLAME file (.pkl or .npz)"
        )
    head = load_head_model(config.head_model)
    tensors, skipped = read_published(config.file)
    with weights_drawn_from(torch_generator("import-published")):
        write = _write_reconstructor if is_reconstructor(tensors) else _write_generator
        weights, summary = write(config, tensors, head)
    print(f"{config.out}: {len(weights)} tensors, {sum(value.numel() for value in weights.values()) / 1e6:.1f} million numbers; {summary}")
    tables = Counter(match[1] for name in tensors if (match := re.fullmatch(HEAD_TABLES, name)))
    for module, count in tables.items():
        print(f"left out: {module}, {count} tensors of the head model; {config.head_model} is used in their place")
    if skipped:
        print(f"skipped, not needed for making pictures: {', '.join(skipped)}" + (" (D is the discriminator)" if "D" in skipped else ""))


def _write_generator(config: ImportPublished, tensors: dict[str, Tensor], head: HeadModel) -> tuple[dict[str, Tensor], str]:
    network = adopt(tensors, str(config.file))
    model = network.config
    export = GenHeadExport(head_model=config.head_model, head_model_hash=head.content_hash, model=model)
    _write(config, GenHead(model, head), network.weights, export, genhead.generator.EXPORT_KIND)
    sizes = f"picture {model.image_resolution} px, z {model.z_dim}, w {model.w_dim}"
    return network.weights, f"a generator: planes {model.plane_resolution} px x {model.plane_channels}, {sizes}"


def _write_reconstructor(config: ImportPublished, tensors: dict[str, Tensor], head: HeadModel) -> tuple[dict[str, Tensor], str]:
    weights = adopt_reconstructor(tensors, str(config.file))
    export = ReconstructorExport(head_model=config.head_model, model=PUBLISHED)
    _write(config, Reconstructor(PUBLISHED, head), weights, export, reconstructor.model.EXPORT_KIND)
    size = PUBLISHED.architecture.motion_dim
    return weights, f"a reconstructor; it is driven by motion vectors of {size} numbers in files (README, Driving a picture)"


def _write(config: ImportPublished, network: nn.Module, weights: dict[str, Tensor], export: Any, kind: str) -> None:
    """Check, fill the network, export it."""
    weights = {name: value.float() for name, value in weights.items()}
    broken = [name for name, value in weights.items() if not value.isfinite().all()]
    if broken:
        raise AssetError(f"{config.file}: expected finite weights, got others in {', '.join(broken[:3])}; download the file again")
    fill_weights(network, weights, str(config.file), REMEDY)
    export_model(config.out, network.weights(), export, kind, images_seen=0)


CONFIG = ImportPublished
