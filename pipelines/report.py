"""`headfoundry report DIR`: one page from what a demo folder holds. It reads the stages' own files and computes nothing new."""

from __future__ import annotations

import dataclasses
import html
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro
from PIL import Image

from datagen.reading import open_dataset
from genhead.portraits import PortraitSet
from head3d.pictures import colorize, grid, save_png
from head3d.run.errors import DataError
from head3d.run.files import write_atomic
from head3d.run.runlog import read_metrics

CURVE_WIDTH_PX, CURVE_HEIGHT_PX = 420, 150
WIDE_ENOUGH_PX = 600  # smaller pictures are shown enlarged up to this


@dataclasses.dataclass(frozen=True)
class ReportRun:
    """Gather a run's pictures, curves and numbers into one page."""

    folder: Annotated[Path, tyro.conf.Positional] = Path("runs/demo")  # what the demo wrote; the page is index.html in it


def main(config: ReportRun) -> int:
    """Write FOLDER/index.html and print its path. Raises DataError if the folder is not there."""
    folder = config.folder
    if not folder.is_dir():
        raise DataError(f"{folder}: expected the folder of a demo run, there is none; run `headfoundry demo --out {folder}` first")
    sections = [head_section, portraits_section, genhead_section, shards_section, reconstructor_section, evaluation_section, drive_section]
    body = "\n".join(section(folder) for section in sections)
    write_atomic(folder / "index.html", PAGE.format(body=body))
    print((folder / "index.html").resolve())
    return 0


# ---- sections: each returns HTML, with a line instead where its stage has not run --------------------------------------


def head_section(folder: Path) -> str:
    return _section(
        "The built-in head", "Identity and expression components, gaze, jaw and neck of the head model.", _pictures(folder, ["head.png"])
    )


def portraits_section(folder: Path) -> str:
    record = folder / "portraits"
    if not (record / "data.mdb").exists():
        return _section("Portraits", "not made yet", "")
    portraits = PortraitSet(record)
    picked = [portraits[i] for i in range(min(24, len(portraits)))]
    sheet = np.concatenate([grid(np.stack([p.image for p in picked]), 12), grid(np.stack([_gray(p.matte) for p in picked]), 12)])
    save_png(folder / "report" / "portraits.png", sheet, {"source": "portraits"})
    note = f"{len(portraits)} made-up people, one picture each, with matte and label; the first {len(picked)} are shown."
    return _section("Portraits", note, _pictures(folder, ["report/portraits.png"]))


def genhead_section(folder: Path) -> str:
    run = folder / "genhead"
    names = ("truncation", "motions", "views", "depth")
    notes = {
        "truncation": "truncation 0, 0.35, 0.7, 1",
        "motions": "neutral, jaw, gaze left + smile, gaze right + pucker",
        "views": "yaw -40, -14, 14, 40 degrees",
        "depth": "depth, near is bright",
    }
    latest = [_latest_picture(run, name) for name in names]
    figures = "".join(_figure(folder, path, notes[name]) for name, path in zip(names, latest, strict=True) if path)
    metrics = read_metrics(run)
    names_of_curves = ["generator/adversarial", "discriminator/adversarial", "discriminator/r1", "generator/opacity"]
    return _section("Head generator", _clock(metrics), figures + _curves(metrics, names_of_curves))


def shards_section(folder: Path) -> str:
    if not (folder / "shards" / "dataset.json").exists():
        return _section("Shards", "not made yet", "")
    dataset = open_dataset(folder / "shards")
    labelled = [frame for frame in dataset.frames if "depth" in frame.members]  # the first shards may be the only ones
    frames = (labelled or dataset.frames)[:: max(1, len(labelled or dataset.frames) // 12)][:12]
    if not frames:
        return _section("Shards", "none is finished yet", "")
    near, far = dataset.scales.near, dataset.scales.far
    pictures = []
    for frame in frames:
        sample = dataset.read(frame, ["rgb.0", "opacity", *(["depth"] if labelled else [])])
        size = sample["rgb.0"].shape[0]
        opacity = _upscale(sample["opacity"][0], size)
        pictures.append(sample["rgb.0"])
        if labelled:
            depth = np.where(opacity > 0.5, -_upscale(sample["depth"][0], size), np.nan)  # near is bright
            pictures.append(colorize(depth, -(near + 0.75 * (far - near)), -(near + 0.25 * (far - near))))
        pictures.append(_gray((opacity * 255).astype(np.uint8)))
    save_png(folder / "report" / "shards.png", grid(np.stack(pictures), 12), {"source": "shards"})
    identities = len({frame.identity for frame in dataset.frames})
    note = f"{len(dataset.frames)} frames of {identities} people; colour, {'depth, ' if labelled else ''}opacity of a few."
    return _section("Shards", note, _pictures(folder, ["report/shards.png"]))


def reconstructor_section(folder: Path) -> str:
    run = folder / "reconstructor"
    metrics = read_metrics(run)
    losses = sorted({name for line in metrics for name in line if name.startswith("loss/")})
    latest = sorted((run / "pictures").glob("*.png"))[-1:]
    figures = "".join(_figure(folder, path, "source, driver, output, truth, depth, novel view") for path in latest)
    return _section("Reconstructor", _clock(metrics), figures + _curves(metrics, losses))


def evaluation_section(folder: Path) -> str:
    path = folder / "evaluation" / "evaluation.json"
    if not path.exists():
        return _section("Evaluation", "not run yet", "")
    result = json.loads(path.read_text(encoding="utf-8"))
    measured = {(row["task"], row["row"], row["metric"]): row for row in result["rows"]}
    metrics = list(dict.fromkeys(row["metric"] for row in result["rows"]))
    head = "".join(f"<th>{html.escape(name)}</th>" for name in ("task", "row", *metrics))
    lines = [
        "".join(
            f"<td>{cell}</td>" for cell in (_words(task), _words(row), *(_interval(measured.get((task, row, name))) for name in metrics))
        )
        for task, row in dict.fromkeys((row["task"], row["row"]) for row in result["rows"])
    ]
    table = f"<table><tr>{head}</tr>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"
    sheets = "".join(
        _figure(folder, sheet, f"{_words(sheet.stem.removeprefix('sheet_'))}: source, driver, ours, truth, copy")
        for sheet in sorted((folder / "evaluation").glob("*.png"))
    )
    note = "Against the generator's true rendering: mean and 95 % interval over people. PSNR in dB, depth error in scene units."
    return _section("Evaluation on people held out", note, table + sheets)


def drive_section(folder: Path) -> str:
    videos = sorted((folder / "drive").glob("*.mp4"))
    players = "".join(f'<video src="{_link(folder, video)}" controls loop muted autoplay></video>' for video in videos)
    sheets = "".join(_figure(folder, sheet, "") for sheet in sorted((folder / "drive").glob("*.png")))
    return _section("Driven head", "One picture in; synthetic video out.", players + sheets)


# ---- pieces ------------------------------------------------------------------------------------------------------------


def curve(points: list[tuple[float, float]], title: str) -> str:
    """One line chart as SVG. points: (images seen, value), at least two."""
    x, y = np.array(points, dtype=np.float64).T
    low, high = float(y.min()), float(y.max())
    span_x, span_y = max(x[-1] - x[0], 1e-9), max(high - low, 1e-9)
    px = 46 + (x - x[0]) / span_x * (CURVE_WIDTH_PX - 56)
    py = CURVE_HEIGHT_PX - 22 - (y - low) / span_y * (CURVE_HEIGHT_PX - 48)
    line = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(px, py, strict=True))
    texts = (
        (46, 16, html.escape(title)),
        (4, 32, f"{high:.3g}"),
        (4, CURVE_HEIGHT_PX - 22, f"{low:.3g}"),
        (46, CURVE_HEIGHT_PX - 6, f"{x[0]:.0f}"),
        (CURVE_WIDTH_PX - 70, CURVE_HEIGHT_PX - 6, f"{x[-1]:.0f} images"),
    )
    labels = "".join(f'<text x="{a}" y="{b}">{text}</text>' for a, b, text in texts)
    return f'<svg width="{CURVE_WIDTH_PX}" height="{CURVE_HEIGHT_PX}"><polyline points="{line}"/>{labels}</svg>'


def _curves(metrics: list[dict], names: Iterable[str]) -> str:
    charts = []
    for name in names:
        points = [(line["images_seen"], line[name]) for line in metrics if line.get(name) is not None]
        if len(points) > 1:
            charts.append(curve(points, name))
    return f"<div>{''.join(charts)}</div>"


def _clock(metrics: list[dict]) -> str:
    return f"{metrics[-1]['images_seen']} images seen." if metrics else "not trained yet"


def _latest_picture(run: Path, name: str) -> Path | None:
    found = sorted((run / "pictures").glob(f"*_{name}.png"))
    return found[-1] if found else None


def _pictures(folder: Path, names: Iterable[str]) -> str:
    return "".join(_figure(folder, folder / name, "") for name in names if (folder / name).exists())


def _figure(folder: Path, path: Path, caption: str) -> str:
    text = html.escape(caption)
    with Image.open(path) as picture:
        width = picture.width * max(1, WIDE_ENOUGH_PX // picture.width)  # whole factors, so that pixels stay square
    return f'<figure><img src="{_link(folder, path)}" width="{width}" alt="{text or path.stem}"><figcaption>{text}</figcaption></figure>'


def _link(folder: Path, path: Path) -> str:
    return html.escape(path.relative_to(folder).as_posix())


def _section(title: str, note: str, content: str) -> str:
    return f"<section><h2>{html.escape(title)}</h2><p>{html.escape(note)}</p>{content}</section>"


def _interval(row: dict | None) -> str:
    return f"{row['mean']:.3f} [{row['low']:.3f}, {row['high']:.3f}]" if row else "-"


def _words(name: str) -> str:
    return html.escape(name.replace("_", " "))


def _gray(values: np.ndarray) -> np.ndarray:
    return np.repeat(values[..., None], 3, axis=-1)


def _upscale(values: np.ndarray, size: int) -> np.ndarray:
    """Nearest-neighbour to size x size, by whole factors."""
    factor = size // values.shape[0]
    return values.repeat(factor, 0).repeat(factor, 1)


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Head Foundry</title><style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 1280px; margin: 2rem auto; padding: 0 1rem; color: #222; background: #fff }}
figure {{ display: inline-block; margin: 0 1rem 1rem 0 }} figcaption {{ color: #666; font-size: 14px }}
img {{ max-width: 100%; height: auto; image-rendering: pixelated }} video {{ width: 384px; image-rendering: pixelated }}
table {{ border-collapse: collapse; margin-bottom: 1rem }} td, th {{ border: 1px solid #ccc; padding: 3px 10px; text-align: right }}
svg polyline {{ fill: none; stroke: #2a6fb0; stroke-width: 1.5 }} svg text {{ font-size: 11px; fill: #555 }}
</style></head><body>
<h1>Head Foundry</h1>
<p>From made-up portraits to a head that can be driven.
Every picture and video on this page is synthetic, unless it shows a source photograph.</p>
{body}
</body></html>
"""

CONFIG = ReportRun
