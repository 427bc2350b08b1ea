"""What the farm costs beside rendering, and what a second worker brings: shards of the published generator on this machine's CPU.

The weights are random; they do not change the time. A worker's first shard, for which it loads the generator, does not count.
"""

from __future__ import annotations

import collections
import json
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch

from datagen.generate import DatagenRun, generate
from datagen.members import ShardConfig
from datagen.recipes import RecipeConfig
from genhead.generator import EXPORT_KIND, GenHead, GenHeadConfig, GenHeadExport
from head3d.head_model import load_head_model
from head3d.run.checkpoint import export_model
from head3d.run.seeding import torch_generator, weights_drawn_from

VIEWS = 2  # of each identity; fewer than in practice, so planes, background and commit weigh more than they would


class FarmTime(NamedTuple):
    """A run with some workers, one torch thread each. Seconds are those of one picture."""

    workers: int
    seconds: float  # wall time of the whole farm, while all work
    render_s: float  # of one worker
    beside_s: float  # of one worker: draw, encode, hash, write, commit; most of it while the next identity is rendered


def measure_farm(config: GenHeadConfig, head_model: str, shards: int, workers: tuple[int, ...] = (1, 2)) -> list[FarmTime]:
    """Time runs with each number of workers (0: this process), each making `shards` shards of one identity and one that does not count."""
    head = load_head_model(head_model)
    draws = torch_generator(0, "farm speed")
    with weights_drawn_from(draws):
        genhead = GenHead(config, head)
    torch.nn.init.normal_(genhead.decoder.density.weight, std=3.0, generator=draws)  # it is zero in a new network
    times = []
    with tempfile.TemporaryDirectory() as folder:
        export = GenHeadExport(head_model, head.content_hash, config)
        generator = export_model(Path(folder) / "generator", genhead.weights(), export, EXPORT_KIND, images_seen=0)
        del genhead
        for count in workers:
            out = Path(folder) / f"{count}-workers"
            run = DatagenRun(
                out=str(out),
                generator=generator,
                identities=max(count, 1) * (shards + 1),
                workers=count,
                device="cpu",
                page=False,
                recipe=RecipeConfig(dynamic_share=0.0, motion_rich_share=0.0, static_views=VIEWS),
                shards=ShardConfig(identities_per_shard=1),
            )
            generate(run)
            times.append(farm_time([json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]))
    return times


def farm_time(reports: list[dict[str, Any]]) -> FarmTime:
    """From the lines of a run's log. A worker's pace is that from the end of its first shard to the end of its last; paces add up."""
    by_worker = collections.defaultdict(list)
    for report in sorted(reports, key=lambda report: report["ended"]):
        by_worker[report["worker"]].append(report)
    pace, counted = 0.0, []
    for first, *rest in by_worker.values():
        pace += sum(report["pictures"] for report in rest) / (rest[-1]["ended"] - first["ended"])
        counted += rest
    pictures = sum(report["pictures"] for report in counted)
    spent = {stage: sum(report["stages"][stage] for report in counted) / pictures for stage in counted[0]["stages"]}
    return FarmTime(len(by_worker), 1 / pace, spent.pop("render"), sum(spent.values()))
