"""Numbers of samples as tables: means with intervals over identities, of whole tasks and of their parts; as text, JSON and CSV."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch

from head3d.image_metrics import bootstrap_interval
from head3d.run.seeding import torch_generator
from reconstructor.evaluation_cases import TASKS, bins_of
from reconstructor.evaluation_measures import METRICS, STEADINESS_METRICS
from reconstructor.perception_errors import PICTURE_UNITS
from reconstructor.published_perception import UNITS

ALL_METRICS = METRICS | STEADINESS_METRICS | PICTURE_UNITS | UNITS
Scores = dict[str, dict[str, dict[str, float]]]  # row -> metric -> mean, low, high


def summarise(records: list[dict[str, Any]], seed: int, resamples: int) -> dict[str, dict[str, Any]]:
    """task -> {samples, identities, rows: Scores, bins: {bin: {samples, identities, rows}}}; what does not apply is left out.

    records: `task`, `bin`, `row`, `identity` and metrics, one for each row of a sample. Every row and part uses the same resamples.
    """
    tasks = {}
    for task in TASKS:
        mine = [record for record in records if record["task"] == task]
        if mine:
            parts = {name: [record for record in mine if record["bin"] == name] for name in bins_of(task)}
            bins = {name: _scored(part, task, seed, resamples) for name, part in parts.items() if part}
            tasks[task] = _scored(mine, task, seed, resamples) | {"bins": bins}
    return tasks


def _scored(records: list[dict[str, Any]], task: str, seed: int, resamples: int) -> dict[str, Any]:
    rows: Scores = {}
    for row in dict.fromkeys(record["row"] for record in records):
        of_row = [record for record in records if record["row"] == row]
        identities = torch.tensor([record["identity"] for record in of_row])
        rows[row] = {}
        for metric in (name for name in ALL_METRICS if name in of_row[0]):
            draws = torch_generator(seed, "bootstrap", task)
            values = torch.tensor([record[metric] for record in of_row])
            mean, low, high = bootstrap_interval(values, identities, draws, resamples)
            if not math.isnan(mean):
                rows[row][metric] = {"mean": mean, "low": low, "high": high}
    return {"samples": len(records) // len(rows), "identities": len({record["identity"] for record in records}), "rows": rows}


def flat_rows(tasks: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """One entry a number: task, bin (None: the whole task), row, metric, mean, low, high, samples, identities."""
    return [
        {"task": task, "bin": name, "row": row, "metric": metric, **interval, "samples": part["samples"], "identities": part["identities"]}
        for task, content in tasks.items()
        for name, part in parts_of(content)
        for row, metrics in part["rows"].items()
        for metric, interval in metrics.items()
    ]


def parts_of(content: dict[str, Any]) -> Iterator[tuple[str | None, dict[str, Any]]]:
    """The whole of a task, then its parts by name."""
    yield None, content
    yield from content["bins"].items()


def metrics_of(rows: Scores) -> list[str]:
    """The metrics that any row has, in their order."""
    return [name for name in ALL_METRICS if any(name in metrics for metrics in rows.values())]


def size_of(part: dict[str, Any]) -> str:
    """How much was measured, as text."""
    return f"{part['samples']} samples of {part['identities']} identities"


def cell(interval: dict[str, float] | None, metric: str) -> str:
    """A mean with its interval as text."""
    if interval is None:
        return "-"
    digits = 2 if metric.startswith("psnr") or metric.endswith(("deg", "mm")) else 4
    return f"{interval['mean']:.{digits}f} [{interval['low']:.{digits}f}, {interval['high']:.{digits}f}]"


def text_table(tasks: dict[str, dict[str, Any]], asked: Sequence[str] = TASKS) -> str:
    """The summary as text, without the parts of tasks; `asked` are the tasks that should be in it."""
    lines = []
    for task, content in tasks.items():
        lines.append(f"{task.replace('_', ' ')}: {size_of(content)}; mean [95 % interval over identities]")
        shown = metrics_of(content["rows"])
        for start in range(0, len(shown), 4):
            lines += _block(content["rows"], shown[start : start + 4])
    missing = left_out(tasks, asked)
    if missing:
        lines.append(f"left out, because the held-out identities do not allow it: {', '.join(missing)}")
    return "\n".join(lines)


def left_out(tasks: Collection[str], asked: Sequence[str]) -> list[str]:
    """Tasks that the held-out identities do not allow."""
    return [task for task in asked if task not in tasks]


def _block(rows: Scores, metrics: list[str]) -> list[str]:
    """Some columns of a task's table."""
    lines = [f"  {'':12}" + "".join(f"{metric:>28}" for metric in metrics)]
    for row, values in rows.items():
        cells = [cell(values.get(metric), metric) for metric in metrics]
        if any(text != "-" for text in cells):
            lines.append(f"  {row.replace('_', ' '):12}" + "".join(f"{text:>28}" for text in cells))
    return lines
