"""index.html of an evaluation: what was measured, in tables and pictures. The page needs no other file."""

from __future__ import annotations

import html
from typing import Any

import numpy as np

from head3d.pages import data_url, figure, page, section, table
from reconstructor.evaluation_tables import cell, left_out, metrics_of, size_of
from reconstructor.perception_errors import own_errors

_PICTURES = "source, driver, ours, truth, error (violet 0 to yellow 0.5 and more)"
SHEET_COLUMNS = {
    "static_lift": _PICTURES,
    "novel_view": _PICTURES,
    "self_reenactment": _PICTURES,
    "cross_reenactment": _PICTURES,
    "steadiness": "source and ours in time; below it driver and truth in time",
}
_NOTES = {
    "static_lift": "The source picture itself, lifted and rendered at its own camera.",
    "novel_view": "The source's motion from cameras that it was not seen from; the truth is rendered. Parts: the camera's yaw.",
    "self_reenactment": "Another motion of the same identity, a picture of the data set. Parts: yaw between source and target.",
    "cross_reenactment": "The source's identity in another identity's motion; the truth is rendered, which no recording can give.",
    "steadiness": "A short driven sequence from one motion to another, before one camera; the truth is rendered.",
}
_ROWS = (
    "ours: the reconstructor. copy source: the source picture. mean image: the mean of training pictures. mean head: the generator's "
    "mean person, rendered in the target's motion before its camera. rerendered: the generator's "
    "rendering of the target's recipe against the stored picture, which nothing can beat. truth: the truth itself as the perception "
    "network reads it. All are means over identities with a 95 % bootstrap interval over identities. Parts of a task are shown with the "
    "number of their samples."
)
_PARTED = ("ours", "copy_source")  # rows that are shown in parts; table.csv has all
_WIDTH_PX = 900  # of a sheet on the page, at most


def evaluation_page(result: dict[str, Any], sheets: dict[str, np.ndarray]) -> str:
    """The page of one evaluation.json's content and the pictures uint8 [H, W, 3] of its tasks."""
    made_up = f"held-out made-up people of data set {result['data']['hash']}"
    lead = f"Reconstructor {result['reconstructor']} on {made_up}. All pictures are synthetic."
    sections = [section("Rows", _ROWS, "")]
    for task, content in result["tasks"].items():
        note = f"{_NOTES[task]} {size_of(content)}."
        sections.append(section(_words(task).capitalize(), note, _tables(content) + _sheet(task, sheets[task])))
    if missing := left_out(result["tasks"], result["settings"]["tasks"]):
        note = f"The held-out identities do not allow: {', '.join(map(_words, missing))}."
        sections.append(section("Left out", note, ""))
    sections.append(section("Metrics", "Units and directions.", table(("metric", "unit"), result["metrics"].items())))
    if "perception_errors" in result:
        sections.append(
            section("The perception network", "Differences below its own error mean little.", own_error_html(result["perception_errors"]))
        )
    return page("Evaluation of a reconstructor", lead, "\n".join(sections))


def _tables(content: dict[str, Any]) -> str:
    """A line a metric: every row of the whole task, then the rows of _PARTED in its parts."""
    rows, bins = content["rows"], content["bins"]
    metrics = metrics_of(rows)
    lines = [(_words(metric), *(cell(values.get(metric), metric) for values in rows.values())) for metric in metrics]
    tables = [table(("", *map(_words, rows)), lines)]
    for row in _PARTED if bins else ():
        shown = [metric for metric in metrics if metric in rows[row]]
        lines = [(_words(metric), *(cell(part["rows"][row].get(metric), metric) for part in bins.values())) for metric in shown]
        tables.append(table((_words(row), *(f"{name} ({part['samples']})" for name, part in bins.items())), lines))
    return "".join(tables)


def _sheet(task: str, sheet: np.ndarray) -> str:
    shown = sheet.shape[1] * max(1, _WIDTH_PX // sheet.shape[1])  # whole factors, so that pixels stay square
    return figure(data_url(sheet, {"command": "evaluate", "task": task}), shown, SHEET_COLUMNS[task], _words(task))


def own_error_html(errors: dict[str, Any] | None) -> str:
    """How far the network is to be trusted that read identity, expression and pose off the pictures; and what a motion vector tells."""
    if errors is None:
        return ""
    note = (
        f"The perception network read what needs a network off the pictures. Its own error, on {errors['pictures']} pictures of "
        f"{errors['identities']} people of its own whom it had not seen, beside that of who does not look at the picture:"
    )
    lines = [(row.name, f"{row.network:.3f}", f"{row.blind:.3f} ({row.blind_is})", row.meaning) for row in own_errors(errors)]
    return f"<p>{html.escape(note)}</p>" + table(("measure", "network", "without looking", "what it is"), lines)


def _words(name: str) -> str:
    return name.replace("_", " ")
