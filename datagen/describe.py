"""`headfoundry describe DIR`: croissant.json and README.md of a data set, for machines and for people who have only the data.

README.md is a data card: provenance, seeds, licence, what the data is for and what not, and whom the draws cover. Both files are made
from dataset.json, the index and a bounded sample (see `datagen.survey`), so the same set gives the same files.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from datagen.croissant import croissant
from datagen.reading import ShardDataset, open_dataset
from datagen.report import count_rows, tone_rows
from datagen.storage import Storage
from datagen.survey import Survey, survey
from head3d.run.config import yaml_text
from head3d.run.errors import DataError

PURPOSES = (
    "Training and measuring methods that reconstruct, turn or animate heads, with people who do not exist.",
    "Studying such methods with what photographs do not have: exact depth, opacity, parts, camera and motion.",
)
FORBIDDEN = (
    "making pictures or videos of a real person without that person's consent, or presenting results as real",
    "identifying, tracking or judging people, or guessing anything about them: age, sex, origin, health, mood, character",
    "claiming that results hold for people unlike those whom the generator was shown",
)
LIMITS = (
    "The people are what the generator makes of those it was trained on, which its own card names. Whoever it was not shown is missing.",
    "Nobody drew or measured age, sex or origin. Skin tone is measured on rendered pictures with their light.",
    "Labels are exact for the generator's rendering, not for a camera of the real world.",
)


def describe(place: Storage | Path | str) -> list[str]:
    """Write croissant.json and README.md beside the shards; returns their addresses. Raises DataError if no shard is finished."""
    dataset = open_dataset(place)
    if not len(dataset.frames):
        raise DataError(f"{dataset.storage.where()}: no shard is finished yet, so there is nothing to describe; call datagen first")
    found = survey(dataset)
    record = croissant(dataset, title(dataset), statements(dataset, found))
    files = {"croissant.json": json.dumps(record, indent=1, ensure_ascii=False) + "\n", "README.md": data_card(dataset, found)}
    for name, text in files.items():
        dataset.storage.write(name, text)
    return [dataset.storage.where(name) for name in files]


def title(dataset: ShardDataset) -> str:
    """The name of the set, the same wherever it lies."""
    return f"head-foundry-{dataset.manifest['config_hash']}"


def statements(dataset: ShardDataset, found: Survey) -> dict[str, str | list[str]]:
    """What is said of the data, by the words of Croissant's responsible-AI vocabulary."""
    tones = ", ".join(f"{name} {share}" for name, _, share in tone_rows(found))
    return {
        "dataCollection": f"Rendered by a generative network (weights {dataset.manifest['generator']['hash']}) from random draws.",
        "dataCollectionType": ["Software Collection"],
        "dataUseCases": list(PURPOSES),
        "dataLimitations": [*LIMITS, *(f"Not for {use}." for use in FORBIDDEN)],
        "dataBiases": [LIMITS[0], f"Skin tones of rendered skin, share of frames: {tones}."],
        "personalSensitiveInformation": ["None: no picture shows a real person."],
        "dataReleaseMaintenancePlan": "dataset.json holds settings and seed, so that every file can be made again and compared.",
    }


def data_card(dataset: ShardDataset, found: Survey) -> str:
    """README.md, with the head that model and data hubs read."""
    manifest = dataset.manifest
    head = {
        "pretty_name": title(dataset),
        "license": "other",
        "license_name": "see-below",
        "tags": ["synthetic", "webdataset", "human-heads", "multi-view", "3d"],
    }
    sections = {
        "What is here": _table(("split", "kind", "people", "frames", "pictures"), count_rows(dataset.frames))
        + f"\n{dataset.excluded_count} further frames are in the tars but excluded in dataset.json; readers leave them out.\n\n"
        + _table(("member", "stored", "unit", "what"), map(_member_row, dataset.members.values()))
        + "\nV views, S picture side, R map side, C features, P plane features, T plane side, N points. Units: "
        + manifest["units"]
        + ".\n",
        "How it was made": _provenance(manifest),
        "Licence": manifest["licence"] + "\n",
        "What it is for": _list(PURPOSES),
        "What it must not be used for": _list(f"{use[0].upper()}{use[1:]}." for use in FORBIDDEN),
        "Whom it covers": _coverage(found),
        "Limits": _list(LIMITS),
        "Reading it": _READING.format(image=manifest["settings"]["shards"]["image_format"]),
    }
    text = "\n".join(f"## {name}\n\n{content}" for name, content in sections.items())
    return f"---\n{yaml_text(head)}---\n\n# {title(dataset)}\n\n**{manifest['notice']}**\n\n{text}"


def _member_row(member: Any) -> tuple[str, str, str, str]:
    stored = f"{member.dtype} {' x '.join(map(str, member.shape))}" if member.kind == "array" else member.kind
    return f"`{member.asked}`", stored, member.unit, member.note


def _provenance(manifest: dict[str, Any]) -> str:
    settings, plan = manifest["settings"], manifest["plan"]
    lines = (
        f"Program: Head Foundry, shards of schema {manifest['schema']}",
        f"Generator: weights {manifest['generator']['hash']}, given as `{manifest['generator']['folder']}`",
        f"Head model: {manifest['head_model']['hash']}, given as `{manifest['head_model']['source']}`",
        f"Seed: {settings['seed']}; every draw follows from it and from the number of the person, whoever renders",
        f"Planned: {plan['identities']} people in {plan['shards']} shards, labels for a share of {plan['labels_share']:g}",
        f"Settings: hash {manifest['config_hash']}; in full in dataset.json",
        f"Splits: by person; {manifest['split_rule']}",
        "Software of the first shards: " + ", ".join(f"{name} {version}" for name, version in manifest["versions"].items()),
        "Check: `headfoundry verify` hashes every file and renders samples again from their recipes",
    )
    return _list(lines) + "\n```yaml\n" + yaml_text({"recipe": settings["recipe"]}) + "```\n"


def _coverage(found: Survey) -> str:
    quantities = (
        ("camera yaw, degrees", found.yaw_deg),
        ("camera pitch, degrees", found.pitch_deg),
        ("norm of the expression", found.expression),
        ("jaw, degrees", found.jaw_deg),
        ("gaze up and down, degrees", found.gaze_pitch_deg),
        ("gaze to the sides, degrees", found.gaze_yaw_deg),
    )
    marks = (0, 5, 95, 100)
    rows = [(name, *(f"{value:.3g}" for value in (values.mean(), *np.percentile(values, marks)))) for name, values in quantities]
    return (
        f"Measured on {len(found.frames)} frames of {found.shards} shards.\n\n"
        + _table(("", "mean", "least", "5 %", "95 %", "most"), rows)
        + "\nSkin tone by the individual typology angle of rendered skin in the middle of the face:\n\n"
        + _table(("skin tone", "frames", "share"), tone_rows(found))
        + "\nNeither age nor sex nor origin was drawn, and none was measured.\n"
    )


def _table(header: tuple[str, ...], rows: Any) -> str:
    lines = [header, ("---",) * len(header), *rows]
    return "".join(f"| {' | '.join(str(cell).replace('|', chr(92) + '|') for cell in line)} |\n" for line in lines)


def _list(lines: Any) -> str:
    return "".join(f"- {line}\n" for line in lines)


_READING = """The tars are WebDataset shards; `frames` and `labels` have the same keys.

```python
import webdataset
for sample in webdataset.WebDataset("frames/000000.tar", shardshuffle=False).decode("rgb8"):
    picture = sample["rgb.0.{image}"]  # uint8 [S, S, 3]
```

Head Foundry's reader joins the families, restores units, checks every member and leaves out what is excluded:

```python
from datagen.reading import open_dataset
dataset = open_dataset("DIR")
sample = dataset.read(dataset.frames[0], ["rgb.0", "label"])
```
"""
