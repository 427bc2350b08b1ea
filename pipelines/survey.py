"""`headfoundry survey DIR`: index.html of a data set, and leaving out what somebody saw there."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import tyro

from datagen.exclusion import read_exclusion
from datagen.plan import exclude
from datagen.report import write_report


@dataclasses.dataclass(frozen=True)
class SurveyRun:
    """Measure a bounded sample of a data set and write index.html into it."""

    folder: tyro.conf.Positional[str]  # data set: a folder, or a URL that fsspec opens
    exclude: Path | None = None  # text file of identities and frames that readers shall leave out, and no others; the tars stay


def main(config: SurveyRun) -> None:
    """Take the list over into dataset.json if there is one, then write the page and print where it is."""
    if config.exclude is not None:
        exclusion = read_exclusion(config.exclude)
        exclude(config.folder, exclusion)
        print(f"{config.folder}: {len(exclusion.identities)} identities and {len(exclusion.frames)} frames are excluded")
    print(write_report(config.folder))


CONFIG = SurveyRun
