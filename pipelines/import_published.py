"""`headfoundry import-published FILE --out DIR --head_model FLAME`: a published GenHead checkpoint as our export."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from pathlib import Path
from typing import Annotated

import tyro

from genhead.generator import EXPORT_KIND, GenHead, GenHeadExport
from genhead.published import HEAD_TABLES
from genhead.published_config import adopt
from genhead.published_files import REMEDY, read_published
from head3d.head_model import BUILT_IN, load_head_model
from head3d.run.checkpoint import export_model, fill_weights
from head3d.run.errors import AssetError
from head3d.run.seeding import torch_generator, weights_drawn_from


@dataclasses.dataclass(frozen=True)
class ImportPublished:
    """Turn a published GenHead file into model.safetensors and config.yaml. Nothing inside the file is executed."""

    file: Annotated[Path, tyro.conf.Positional]  # .pkl as published, or .pt, .pth, .safetensors with its tensors by name
    head_model: str  # path of the FLAME file that the checkpoint was trained with; the built-in head has another mesh
    out: Path  # the export: use it wherever a setting is called generator


def main(config: ImportPublished) -> None:
    """Read, rename, check against a built network, write. Raises AssetError if anything does not fit."""
    if config.head_model == BUILT_IN:
        raise AssetError(
            "head_model: a published checkpoint gives its planes meaning through FLAME's mesh, got the built-in head; "
            "give the path of your FLAME file (.pkl or .npz)"
        )
    head = load_head_model(config.head_model)
    where = str(config.file)
    tensors, skipped = read_published(config.file)
    network = adopt(tensors, where)
    weights = {name: value.float() for name, value in network.weights.items()}
    broken = [name for name, value in weights.items() if not value.isfinite().all()]
    if broken:
        raise AssetError(f"{where}: expected finite weights, got others in {', '.join(broken[:3])}; download the file again")
    with weights_drawn_from(torch_generator("import-published")):
        genhead = GenHead(network.config, head)
    fill_weights(genhead, weights, where, REMEDY)
    export = GenHeadExport(head_model=config.head_model, head_model_hash=head.content_hash, model=network.config)
    export_model(config.out, genhead.weights(), export, EXPORT_KIND, images_seen=0)

    model = network.config
    count = sum(value.numel() for value in weights.values())
    print(
        f"{config.out}: {len(weights)} tensors, {count / 1e6:.1f} million numbers; "
        f"planes {model.plane_resolution} px x {model.plane_channels}, picture {model.image_resolution} px, "
        f"z {model.z_dim}, w {model.w_dim}"
    )
    tables = Counter(match[1] for name in tensors if (match := re.fullmatch(HEAD_TABLES, name)))
    for module, count in tables.items():
        print(f"left out: {module}, {count} tensors of the head model; {config.head_model} is used in their place")
    if skipped:
        print(f"skipped, not needed for making pictures: {', '.join(skipped)}" + (" (D is the discriminator)" if "D" in skipped else ""))


CONFIG = ImportPublished
