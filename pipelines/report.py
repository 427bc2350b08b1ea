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
from head3d.pages import figure, line_chart, page, section, table
from head3d.pictures import colorize, grid, save_png
from head3d.run.errors import DataError
from head3d.run.files import write_atomic
from head3d.run.runlog import read_metrics
from reconstructor.evaluation_page import SHEET_COLUMNS, own_error_html

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
    body = "\n".join(make(folder) for make in sections)
    lead = (
        "From made-up portraits to a head that can be driven. "
        "Every picture and video on this page is synthetic, unless it shows a source photograph."
    )
    write_atomic(folder / "index.html", page("Head Foundry", lead, body))
    print((folder / "index.html").resolve())
    return 0


# ---- sections: each returns HTML, with a line instead where its stage has not run --------------------------------------


def head_section(folder: Path) -> str:
    return section(
        "The built-in head", "Identity and expression components, gaze, jaw and neck of the head model.", _pictures(folder, ["head.png"])
    )


def portraits_section(folder: Path) -> str:
    record = folder / "portraits"
    if not (record / "data.mdb").exists():
        return section("Portraits", "not made yet", "")
    portraits = PortraitSet(record)
    picked = [portraits[i] for i in range(min(24, len(portraits)))]
    sheet = np.concatenate([grid(np.stack([p.image for p in picked]), 12), grid(np.stack([_gray(p.matte) for p in picked]), 12)])
    save_png(folder / "report" / "portraits.png", sheet, {"source": "portraits"})
    note = f"{len(portraits)} made-up people, one picture each, with matte and label; the first {len(picked)} are shown."
    return section("Portraits", note, _pictures(folder, ["report/portraits.png"]))


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
    return section("Head generator", _clock(metrics), figures + _curves(metrics, names_of_curves))


def shards_section(folder: Path) -> str:
    if not (folder / "shards" / "dataset.json").exists():
        return section("Shards", "not made yet", "")
    dataset = open_dataset(folder / "shards")
    shown = [frame for frame in dataset.frames if frame.kind != "motion-rich"]  # pictures of one size
    for maps in (("depth", "opacity"), ("opacity",), ()):  # the first shards may be the only ones with labels
        frames = [frame for frame in shown if all(name in frame.members for name in maps)]
        if frames:
            break
    frames = frames[:: max(1, len(frames) // 12)][:12]
    if not frames:
        return section("Shards", "none is finished yet", "")
    near, far = dataset.scales.near, dataset.scales.far
    pictures = []
    for frame in frames:
        sample = dataset.read(frame, ["rgb.0", *maps])
        size = sample["rgb.0"].shape[0]
        pictures.append(sample["rgb.0"])
        if not maps:
            continue
        opacity = _upscale(sample["opacity"][0], size)
        if "depth" in maps:
            depth = np.where(opacity > 0.5, -_upscale(sample["depth"][0], size), np.nan)  # near is bright
            pictures.append(colorize(depth, -(near + 0.75 * (far - near)), -(near + 0.25 * (far - near))))
        pictures.append(_gray((opacity * 255).astype(np.uint8)))
    save_png(folder / "report" / "shards.png", grid(np.stack(pictures), 12), {"source": "shards"})
    identities = len({frame.identity for frame in dataset.frames})
    note = f"{len(dataset.frames)} frames of {identities} people; {', '.join(('colour', *maps))} of a few."
    more = '<p><a href="shards/index.html">More of the shards: distributions, outliers, throughput</a></p>'
    content = _pictures(folder, ["report/shards.png"]) + (more if (folder / "shards" / "index.html").exists() else "")
    return section("Shards", note, content)


def reconstructor_section(folder: Path) -> str:
    run = folder / "reconstructor"
    metrics = read_metrics(run)
    losses = sorted({name for line in metrics for name in line if name.startswith("loss/")})
    latest = sorted((run / "pictures").glob("*.png"))[-1:]
    figures = "".join(_figure(folder, path, "source, driver, output, truth, depth, novel view") for path in latest)
    return section("Reconstructor", _clock(metrics), figures + _curves(metrics, losses))


def evaluation_section(folder: Path) -> str:
    path = folder / "evaluation" / "evaluation.json"
    if not path.exists():
        return section("Evaluation", "not run yet", "")
    result = json.loads(path.read_text(encoding="utf-8"))
    whole = [row for row in result["rows"] if row["bin"] is None]
    measured = {(row["task"], row["row"], row["metric"]): row for row in whole}
    metrics = list(dict.fromkeys(row["metric"] for row in whole))
    lines = [
        (_words(task), _words(row), *(_interval(measured.get((task, row, name))) for name in metrics))
        for task, row in dict.fromkeys((row["task"], row["row"]) for row in whole)
    ]
    sheets = "".join(
        _figure(folder, sheet, f"{_words(task)}: {columns}")
        for task, columns in SHEET_COLUMNS.items()
        if (sheet := folder / "evaluation" / f"sheet_{task}.png").exists()
    )
    note = "Against the generator's true rendering: mean and 95 % interval over people. PSNR in dB, depth error in scene units."
    content = table(("task", "row", *metrics), lines) + sheets + own_error_html(result.get("perception_errors"))
    more = '<p><a href="evaluation/index.html">More of the evaluation: by yaw, units, how near the truth anything could come</a></p>'
    return section("Evaluation on people held out", note, content + more)


def drive_section(folder: Path) -> str:
    videos = sorted((folder / "drive").glob("*.mp4"))
    players = "".join(f'<video src="{_link(folder, video)}" controls loop muted autoplay></video>' for video in videos)
    sheets = "".join(_figure(folder, sheet, "") for sheet in sorted((folder / "drive").glob("*.png")))
    return section("Driven head", "One picture in; synthetic video out.", players + sheets)


# ---- pieces ------------------------------------------------------------------------------------------------------------


def _curves(metrics: list[dict], names: Iterable[str]) -> str:
    charts = []
    for name in names:
        points = [(line["images_seen"], line[name]) for line in metrics if line.get(name) is not None]
        if len(points) > 1:
            charts.append(line_chart(points, name))
    return f"<div>{''.join(charts)}</div>"


def _clock(metrics: list[dict]) -> str:
    return f"{metrics[-1]['images_seen']} images seen." if metrics else "not trained yet"


def _latest_picture(run: Path, name: str) -> Path | None:
    found = sorted((run / "pictures").glob(f"*_{name}.png"))
    return found[-1] if found else None


def _pictures(folder: Path, names: Iterable[str]) -> str:
    return "".join(_figure(folder, folder / name, "") for name in names if (folder / name).exists())


def _figure(folder: Path, path: Path, caption: str) -> str:
    with Image.open(path) as picture:
        width = picture.width * max(1, WIDE_ENOUGH_PX // picture.width)  # whole factors, so that pixels stay square
    return figure(path.relative_to(folder).as_posix(), width, caption, path.stem)


def _link(folder: Path, path: Path) -> str:
    return html.escape(path.relative_to(folder).as_posix())


def _interval(row: dict | None) -> str:
    return f"{row['mean']:.3f} [{row['low']:.3f}, {row['high']:.3f}]" if row else "-"


def _words(name: str) -> str:
    return name.replace("_", " ")


def _gray(values: np.ndarray) -> np.ndarray:
    return np.repeat(values[..., None], 3, axis=-1)


def _upscale(values: np.ndarray, size: int) -> np.ndarray:
    """Nearest-neighbour to size x size, by whole factors."""
    factor = size // values.shape[0]
    return values.repeat(factor, 0).repeat(factor, 1)


CONFIG = ReportRun
