"""Pages for people: one HTML file that needs nothing else, light or dark as the reader's system is. Charts are SVG."""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from head3d.pictures import jpeg_bytes

CHART_WIDTH_PX, CHART_HEIGHT_PX = 420, 150
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 10, 26, 22  # margins of a chart, pixels


def page(title: str, lead: str, body: str, script: str = "") -> str:
    """A whole page. `lead` and `body` are HTML, `script` is JavaScript that runs when the page is there."""
    return _PAGE.format(title=html.escape(title), lead=lead, body=body, script=f"<script>\n{script}</script>" if script else "")


def section(title: str, note: str, content: str) -> str:
    """A heading with a line of plain text and HTML below."""
    return f"<section><h2>{html.escape(title)}</h2><p>{html.escape(note)}</p>{content}</section>"


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table of plain values; it scrolls by itself where the window is narrow."""
    head = "".join(f"<th>{html.escape(name)}</th>" for name in header)
    lines = "".join(f"<tr>{''.join(f'<td>{html.escape(str(cell))}</td>' for cell in row)}</tr>" for row in rows)
    return f'<div class="scroll"><table><tr>{head}</tr>{lines}</table></div>'


def figure(source: str, width_px: int, caption: str, description: str = "") -> str:
    """A picture by its address, at most `width_px` wide."""
    text = html.escape(caption)
    return (
        f'<figure><img src="{html.escape(source)}" width="{width_px}" alt="{html.escape(description) or text}">'
        f"<figcaption>{text}</figcaption></figure>"
    )


def data_url(picture: np.ndarray, provenance: Mapping[str, Any]) -> str:
    """A uint8 [H, W, 3] picture as an address that holds it, marked as synthetic."""
    return "data:image/jpeg;base64," + base64.b64encode(jpeg_bytes(picture, provenance)).decode()


def line_chart(points: Sequence[tuple[float, float]], title: str) -> str:
    """One line. points: (images seen, value), at least two."""
    x, y = np.array(points, dtype=np.float64).T
    low, high = float(y.min()), float(y.max())
    span_x, span_y = max(x[-1] - x[0], 1e-9), max(high - low, 1e-9)
    px = _LEFT + (x - x[0]) / span_x * (CHART_WIDTH_PX - _LEFT - _RIGHT)
    py = CHART_HEIGHT_PX - _BOTTOM - (y - low) / span_y * (CHART_HEIGHT_PX - _TOP - _BOTTOM)
    line = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(px, py, strict=True))
    return _chart(title, f'<polyline points="{line}"/>', (f"{high:.3g}", f"{low:.3g}"), (f"{x[0]:.0f}", f"{x[-1]:.0f} images"))


def histogram(values: np.ndarray, title: str, bins: int = 30) -> str:
    """How often which value occurs, with mean and the middle 90 %; what is not finite is left out and counted."""
    finite = values[np.isfinite(values)]
    if not finite.size:
        return _chart(title, "", ("", ""), ("no values", ""))
    counts, edges = np.histogram(finite, bins)
    width, bottom = (CHART_WIDTH_PX - _LEFT - _RIGHT) / bins, CHART_HEIGHT_PX - _BOTTOM
    heights = counts / counts.max() * (CHART_HEIGHT_PX - _TOP - _BOTTOM)
    bars = "".join(
        f'<rect x="{_LEFT + index * width:.1f}" y="{bottom - height:.1f}" width="{width - 1:.1f}" height="{height:.1f}"/>'
        for index, height in enumerate(heights)
        if height
    )
    low, high = np.percentile(finite, [5, 95])
    missing = f", {values.size - finite.size} without a value" if finite.size < values.size else ""
    summary = f"mean {finite.mean():.3g}, 90 % in {low:.3g} to {high:.3g}{missing}"
    return _chart(title, bars, (str(counts.max()), "0"), (f"{edges[0]:.3g}", f"{edges[-1]:.3g}"), summary)


def _chart(title: str, marks: str, vertical: tuple[str, str], horizontal: tuple[str, str], summary: str = "") -> str:
    """Axes' ends around what is drawn: `vertical` from the top, `horizontal` from the left."""
    bottom = CHART_HEIGHT_PX - _BOTTOM
    texts = (
        (_LEFT, 16, "start", title),
        (_LEFT - 4, _TOP + 8, "end", vertical[0]),
        (_LEFT - 4, bottom, "end", vertical[1]),
        (_LEFT, CHART_HEIGHT_PX - 6, "start", horizontal[0]),
        ((_LEFT + CHART_WIDTH_PX - _RIGHT) / 2, CHART_HEIGHT_PX - 6, "middle", summary),
        (CHART_WIDTH_PX - _RIGHT, CHART_HEIGHT_PX - 6, "end", horizontal[1]),
    )
    labels = "".join(f'<text x="{x}" y="{y}" text-anchor="{anchor}">{html.escape(text)}</text>' for x, y, anchor, text in texts if text)
    return (
        f'<svg viewBox="0 0 {CHART_WIDTH_PX} {CHART_HEIGHT_PX}" role="img" aria-label="{html.escape(f"{title} {summary}".strip())}">'
        f'<path d="M{_LEFT} {bottom}H{CHART_WIDTH_PX - _RIGHT}"/>{marks}{labels}</svg>'
    )


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="generator" content="Head Foundry; synthetic media"><style>
:root {{ color-scheme: light dark; --ink: #20262b; --soft: #5d6770; --paper: #fff; --rule: #d3d9dd; --mark: #2a6fb0; --panel: #f3f5f7 }}
@media (prefers-color-scheme: dark) {{
:root {{ --ink: #e2e7ea; --soft: #9ba6ae; --paper: #14181b; --rule: #363e44; --mark: #6aaae4; --panel: #1d2327 }} }}
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 1280px; margin: 2rem auto; padding: 0 1rem;
color: var(--ink); background: var(--paper) }}
figure {{ display: inline-block; margin: 0 1rem 1rem 0; max-width: 100% }} figcaption, section > p {{ color: var(--soft) }}
figcaption {{ font-size: 14px }} h2 {{ margin: 2rem 0 0.25rem }} section > p {{ margin: 0 0 0.75rem }}
img {{ max-width: 100%; height: auto; image-rendering: pixelated }} video {{ width: 384px; max-width: 100%; image-rendering: pixelated }}
.scroll {{ overflow-x: auto }} table {{ border-collapse: collapse; margin-bottom: 1rem; font-variant-numeric: tabular-nums }}
td, th {{ border: 1px solid var(--rule); padding: 3px 10px; text-align: right }} td:first-child, th:first-child {{ text-align: left }}
svg {{ width: 420px; max-width: 100%; vertical-align: top }} svg text {{ font-size: 11px; fill: var(--soft) }}
svg path {{ stroke: var(--rule) }} svg rect {{ fill: var(--mark) }} svg polyline {{ fill: none; stroke: var(--mark); stroke-width: 1.5 }}
pre, textarea {{ font: 13px/1.4 ui-monospace, monospace; background: var(--panel); color: var(--ink); border: 1px solid var(--rule) }}
pre {{ padding: 0.5rem; overflow-x: auto; white-space: pre-wrap; overflow-wrap: anywhere }}
textarea {{ width: 100%; box-sizing: border-box; min-height: 6rem; padding: 0.5rem }}
.cards {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(11rem, 1fr)); gap: 1rem }}
.card {{ background: var(--panel); border: 1px solid var(--rule); padding: 0.5rem; font-size: 14px; min-width: 0 }}
.card img {{ width: 100% }}
.turn {{ background: var(--strip) calc(var(--i) * 100% / (var(--n) - 1)) 0 / calc(var(--n) * 100%) 100%; aspect-ratio: 1 }}
.strip {{ background: var(--strip) 0 0 / 100% 100%; aspect-ratio: var(--n) }} .turn, .strip {{ image-rendering: pixelated }}
input[type=range] {{ width: 100%; max-width: 40rem; accent-color: var(--mark) }}
</style></head><body>
<h1>{title}</h1>
<p>{lead}</p>
{body}
{script}
</body></html>
"""
