"""`headfoundry parity DIR`: compare the published architecture with recorded reference numbers. The folder's name says which network."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro

from head3d.run.errors import AssetError


@dataclasses.dataclass(frozen=True)
class ParityRun:
    """Print quantity, error, limit, ok; exit status 0 only if all hold. About two minutes and 3 GB."""

    folder: Annotated[Path, tyro.conf.Positional]  # genhead or reconstructor: holds recipe.json and io.npz; head.npz lies above it


def main(config: ParityRun) -> int:
    """Run the comparison of the network that the folder's name says. Raises AssetError for another name or a missing file."""
    match config.folder.resolve().name:
        case "genhead":
            from genhead.parity import compare
        case "reconstructor":
            from reconstructor.parity import compare
        case name:
            raise AssetError(
                f"{config.folder}: expected a folder named genhead or reconstructor, got {name!r}; the name says which network to build"
            )
    rows = compare(config.folder)
    width = max(len(row.quantity) for row in rows)
    for row in rows:
        sign = ">=" if row.at_least else "<="
        print(f"{row.quantity:{width}}  {row.value:10.3g} {sign} {row.limit:<8g} {'ok' if row.ok else 'FAILS'}")
    failed = sum(not row.ok for row in rows)
    print(f"{len(rows) - failed} of {len(rows)} hold")
    return 1 if failed else 0


CONFIG = ParityRun
