"""`headfoundry describe DIR`: croissant.json and a data card for a data set."""

from __future__ import annotations

import dataclasses

import tyro

from datagen.describe import describe


@dataclasses.dataclass(frozen=True)
class DescribeRun:
    """Write croissant.json and README.md (a data card) into a data set."""

    folder: tyro.conf.Positional[str]  # data set: a folder, or a URL that fsspec opens


def main(config: DescribeRun) -> None:
    """Write both and print where they are."""
    print("\n".join(describe(config.folder)))


CONFIG = DescribeRun
