"""index.html of a data set: what is in it, how it was made, and what a person should look at before training on it.

The page needs no other file. It is made from a bounded sample (see `survey`), so that a large set costs what a small one does.
"""

from __future__ import annotations

import collections
import html
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from datagen.index import FrameEntry
from datagen.reading import ShardDataset, open_dataset
from datagen.storage import Storage
from datagen.survey import TONES, Survey, on_grid, survey, tone_name, unusualness
from head3d.pages import data_url, figure, histogram, page, section, table
from head3d.pictures import colorize, grid
from head3d.run.seeding import numpy_generator

TILE_PX = 128  # pictures are shown no larger than this
PEOPLE, MAPS, TURNING, TURN_VIEWS = 48, 12, 4, 15  # pictures: people, frames with their maps, people that turn and their views
OUTLIERS, OUTLYING = 6, 3.5  # frames shown for each measure; robust deviations from which one counts as an outlier
WORKERS = 40  # rows of the table of workers
PARTS = np.array([[40, 44, 48], [214, 168, 140], [90, 150, 220], [200, 70, 80]], np.uint8)  # none, skin, eye, mouth

# A map's first view as a picture [R, R, 3]; depth comes as nearness to the camera from the origin on, positions as shares of the box
MAP_PICTURES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "opacity": lambda values: np.repeat((values * 255).astype(np.uint8)[..., None], 3, axis=-1),
    "parts": lambda values: PARTS[values],
    "depth": lambda values: colorize(values, -0.5, 0.5),
    "normals": lambda values: _signed_colors(values),
    "correspondence": lambda values: _signed_colors(values),
}

_TURN_SCRIPT = """
const turns = JSON.parse(document.getElementById('yaws').textContent);
function turn() {
  const wanted = Number(document.getElementById('yaw').value);
  document.querySelectorAll('.turn').forEach((element, person) => {
    let best = 0;
    turns[person].forEach((yaw, i) => { if (Math.abs(yaw - wanted) < Math.abs(turns[person][best] - wanted)) best = i; });
    element.style.setProperty('--i', best);
  });
}
if (turns.length) { document.getElementById('yaw').addEventListener('input', turn); turn(); }
"""
_CHOICE_SCRIPT = """
function choose() {
  const ticked = [...document.querySelectorAll('.card input:checked')].map(box => box.value);
  const list = document.getElementById('list'), lines = new Set([...list.defaultValue.split('\\n').filter(Boolean), ...ticked]);
  list.value = [...lines].map(line => line + '\\n').join('');
}
document.querySelectorAll('.card input').forEach(box => box.addEventListener('change', choose));
choose();
"""


def write_report(place: Storage | Path | str) -> str:
    """Write index.html beside the shards of a data set and return its address. Raises DataError as reading does."""
    dataset = open_dataset(place)
    dataset.storage.write("index.html", report_text(dataset))
    return dataset.storage.where("index.html")


def report_text(dataset: ShardDataset) -> str:
    """The page. The same set gives the same text, but for the times in its log."""
    manifest = dataset.manifest
    title = f"Heads of {manifest['plan']['identities']} made-up people"
    if not dataset.frames:
        return page(title, html.escape(manifest["notice"]), section("Nothing to see", "No shard is finished yet.", ""))
    found = survey(dataset)
    sections = [
        _summary(dataset, found),
        _people(dataset, found),
        _maps(dataset, found),
        _turntable(dataset, found),
        _distributions(found),
        _outliers(dataset, found),
        _sizes(found),
        _throughput(dataset.storage),
    ]
    return page(title, html.escape(manifest["notice"]), "\n".join(sections), _TURN_SCRIPT + _CHOICE_SCRIPT)


# ---- sections ------------------------------------------------------------------------------------------------------------


def _summary(dataset: ShardDataset, found: Survey) -> str:
    manifest = dataset.manifest
    made = sum(name.startswith("frames/") for name in dataset.tars)
    note = (
        f"{made} of {manifest['plan']['shards']} shards are finished; {dataset.excluded_count} frames are excluded. Settings "
        f"{manifest['config_hash']}, generator {manifest['generator']['hash']}, licence: {manifest['licence']}. "
        f"What follows was measured on {len(found.frames)} frames of {found.shards} shards, drawn by the set's own hash."
    )
    return section("What is here", note, table(("split", "kind", "people", "frames", "pictures"), count_rows(dataset.frames)))


def count_rows(frames: Sequence[FrameEntry]) -> list[tuple[str, str, int, int, int]]:
    """(split, kind, people, frames, pictures), and a line for all."""
    people: dict[tuple[str, str], set[int]] = collections.defaultdict(set)
    counts, pictures = collections.Counter(), collections.Counter()
    for frame in frames:
        place = frame.split, frame.kind
        people[place].add(frame.identity)
        counts[place] += 1
        pictures[place] += frame.views
    rows = [(*place, len(people[place]), counts[place], pictures[place]) for place in sorted(counts)]
    return [*rows, ("all", "", sum(row[2] for row in rows), len(frames), sum(pictures.values()))]


def _people(dataset: ShardDataset, found: Survey) -> str:
    firsts = list({frame.identity: frame for frame in reversed(found.frames)}.values())[::-1]
    pictures = [_tile(dataset, dataset.read(frame, ["rgb.0"])["rgb.0"]) for frame in _spread(firsts, PEOPLE)]
    sheet = grid(np.stack(pictures), 12)
    return section("People", f"One picture of each of {len(pictures)} people.", _sheet(sheet, "people"))


def _maps(dataset: ShardDataset, found: Survey) -> str:
    names = set(MAP_PICTURES)
    most = max(len(names & frame.members.keys()) for frame in found.frames)  # the first shards may be the only ones with all labels
    chosen = _spread([frame for frame in found.frames if len(names & frame.members.keys()) == most], MAPS)
    columns = [_map_tiles(dataset, frame) for frame in chosen]
    shared = [name for name in columns[0] if all(name in tiles for tiles in columns)]
    rows = "".join(_sheet(grid(np.stack([tiles[name] for tiles in columns]), len(columns)), name) for name in shared)
    note = (
        f"The first view of {len(columns)} frames with what belongs to it, where the set has it. Parts are skin, eyes, mouth; near depths "
        "are bright; normals and canonical positions have x, y, z as red, green, blue."
    )
    return section("Maps", note, rows)


def _map_tiles(dataset: ShardDataset, frame: FrameEntry) -> dict[str, np.ndarray]:
    """Pictures [T, T, 3] of the first view and its maps by caption."""
    maps = [name for name in MAP_PICTURES if name in frame.members]
    sample = dataset.read(frame, ["rgb.0", "label", *maps])
    distance = float(np.linalg.norm(sample["label"][0, [3, 7, 11]]))
    tiles = {"colour": _tile(dataset, sample["rgb.0"])}
    for name in maps:
        values = sample[name][0]
        if name == "depth":
            values = np.where(values < dataset.scales.far * 0.999, distance - values, np.nan)
        if name == "correspondence":
            values = values / (dataset.scales.box_side / 2)
        tiles[name] = _tile(dataset, MAP_PICTURES[name](values))
    return tiles


def _turntable(dataset: ShardDataset, found: Survey) -> str:
    opened = {frame.shard for frame in found.frames if frame.kind != "motion-rich"}  # whose pictures are small
    views: dict[int, list[tuple[FrameEntry, int]]] = collections.defaultdict(list)
    for frame in dataset.frames:
        if frame.shard in opened and frame.kind != "motion-rich":
            views[frame.identity] += [(frame, view) for view in range(frame.views)]
    most = max(map(len, views.values()), default=0)  # of the people with the most views, some are drawn
    able = [identity for identity in sorted(views) if len(views[identity]) == most]
    rng = numpy_generator(dataset.manifest["config_hash"], "turntable")
    turning, yaws = [], []
    for identity in rng.permutation(able)[:TURNING].tolist() if most > 1 else []:
        labels = {frame.key: dataset.read(frame, ["label"])["label"] for frame, _ in views[identity]}
        angles = {(frame.key, view): _yaw_deg(labels[frame.key][view]) for frame, view in views[identity]}
        ordered = _spread(sorted(views[identity], key=lambda place: angles[place[0].key, place[1]]), TURN_VIEWS)
        tiles = np.stack([_tile(dataset, dataset.read(frame, [f"rgb.{view}"])[f"rgb.{view}"]) for frame, view in ordered])
        source = data_url(grid(tiles, len(tiles), 0), {"page": "turntable", "identity": identity})
        yaws.append([round(angles[frame.key, view], 1) for frame, view in ordered])
        turning.append(
            f'<div class="card" style="--strip: url({source}); --n: {len(tiles)}; --i: {len(tiles) // 2}">'
            f'<div class="turn" role="img" aria-label="person {identity} at the chosen yaw"></div>'
            f'<div class="strip" role="img" aria-label="{len(tiles)} views by yaw"></div>identity {identity}</div>'
        )
    slider = (
        f'<p><label>yaw <input id="yaw" type="range" min="-50" max="50" value="0"></label></p>'
        f'<script type="application/json" id="yaws">{json.dumps(yaws)}</script>'
    )
    note = (
        "People drawn at random: their own views of all motions, sorted by the camera's yaw, so the expression changes as the head turns."
    )
    return section("Turntable", note, slider + f'<div class="cards">{"".join(turning)}</div>')


def _distributions(found: Survey) -> str:
    charts = [
        histogram(found.yaw_deg, "camera yaw, degrees (+: the head's left side is seen)"),
        histogram(found.pitch_deg, "camera pitch, degrees (+: from above)"),
        histogram(found.expression, "norm of the expression"),
        histogram(found.jaw_deg, "jaw, degrees (+: open)"),
        histogram(found.gaze_pitch_deg, "gaze, degrees about x (+: down)"),
        histogram(found.gaze_yaw_deg, "gaze, degrees about y (+: to the head's left)"),
        histogram(found.tone_deg, "skin tone: typology angle of rendered skin, degrees (+: lighter)"),
    ]
    rows = tone_rows(found)
    note = (
        "Camera angles are counted by view, the rest by frame. The skin tone is that of a picture with its light, in the middle of the "
        "face; it says nothing of anybody's origin."
    )
    return section("Distributions", note, f"<div>{''.join(charts)}</div>" + table(("skin tone", "frames", "share"), rows))


def tone_rows(found: Survey) -> list[tuple[str, int, str]]:
    """(kind, frames, share) for each kind of skin tone, lightest first."""
    measured = found.tone_deg[np.isfinite(found.tone_deg)]
    counts = collections.Counter(tone_name(angle) for angle in measured)
    return [(name, counts[name], f"{counts[name] / max(1, len(measured)):.0%}") for name, _ in TONES]


def _outliers(dataset: ShardDataset, found: Survey) -> str:
    no_head = np.isnan(found.exposure)
    has_depth = np.array(["depth" in frame.members for frame in found.frames])[found.frame_of_view]
    parts = []
    for title, unit, values, measured in (
        ("Size of the head", "square scene units", found.silhouette, np.full(len(no_head), True)),
        ("Lightness of the head", "L*", found.exposure, ~no_head),
        ("Depth of the head", "scene units behind the origin", found.depth, has_depth & ~no_head),
    ):
        score = unusualness(np.where(measured, values, np.nan))
        chosen: dict[int, int] = {}  # frame -> its most unusual view
        for place in np.argsort(-score, kind="stable"):
            if len(chosen) < OUTLIERS and score[place] > 0:
                chosen.setdefault(int(found.frame_of_view[place]), int(place))
        cards = [
            _card(dataset, found.frames[frame], int(found.view[place]), f"{values[place]:.3g} {unit}, {score[place]:.1f} deviations")
            for frame, place in chosen.items()
        ]
        median = f"{np.median(values[measured]):.3g} {unit}" if measured.any() else "unknown"
        far = len(set(found.frame_of_view[score >= OUTLYING].tolist()))
        note = f"Median {median}; {far} frames have a view that is {OUTLYING} deviations or more away."
        parts.append(f'<h3>{title}</h3><p>{html.escape(note)}</p><div class="cards">{"".join(cards)}</div>')
    command = html.escape(f"headfoundry survey {dataset.storage.address} --exclude list.txt")
    parts.append(
        "<h3>Leave some out</h3><p>What is excluded already and what is ticked above is listed here. Save it as list.txt (add or remove "
        f"lines; notes stand after a #) and call <code>{command}</code>: readers then leave out what is listed, and nothing else. "
        "No tar is changed.</p>"
        f'<textarea id="list" readonly aria-label="list of what to exclude">{html.escape(dataset.excluded.text())}</textarea>'
    )
    note = "The most unusual views of the sample, in robust deviations from the median. Unusual is not wrong: look."
    return section("Outliers", note, "".join(parts))


def _card(dataset: ShardDataset, frame: FrameEntry, view: int, why: str) -> str:
    sample = dataset.read(frame, [f"rgb.{view}", "json"])
    source = data_url(_tile(dataset, sample[f"rgb.{view}"]), {"page": "outliers", "key": frame.key, "view": view})
    recipe = html.escape(json.dumps(sample["json"], indent=1))
    return (
        f'<div class="card"><img src="{source}" alt="frame {frame.key}, view {view}">{html.escape(why)}<br>'
        f'<label><input type="checkbox" value="frame {frame.key}"> frame {frame.key}</label>, view {view}<br>'
        f'<label><input type="checkbox" value="identity {frame.identity}"> identity {frame.identity}</label>, motion {frame.motion}'
        f"<details><summary>recipe</summary><pre>{recipe}</pre></details></div>"
    )


def _sizes(found: Survey) -> str:
    sizes: dict[str, int] = collections.Counter()
    seen = set()
    for frame in found.frames:
        for name, place in frame.members.items():
            if not name.startswith("identity.") or (frame.identity, name) not in seen:
                seen.add((frame.identity, name))
                sizes[name.partition(".")[0] if name.startswith("rgb.") else name] += place.size
    total = sum(sizes.values())
    rows = [(name, f"{size / len(found.frames) / 1e3:.2f}", f"{size / total:.1%}") for name, size in sizes.most_common()]
    rows.append(("all", f"{total / len(found.frames) / 1e3:.2f}", ""))
    note = "Without the tars' headers; pictures of all views together. What belongs to an identity is shared among its frames."
    return section("Sizes by field", note, table(("field", "kB a frame", "share"), rows))


def _throughput(storage: Storage) -> str:
    reports = read_log(storage)
    if not reports:
        return section("Throughput by worker", "log.jsonl holds nothing: who made what is not known.", "")
    workers: dict[str, list[dict[str, Any]]] = collections.defaultdict(list)
    for report in reports:
        workers[report["worker"]].append(report)
    rows = []
    for worker, made in workers.items():
        frames, seconds, size = (sum(report[name] for report in made) for name in ("frames", "seconds", "bytes"))
        rows.append(
            (worker, len(made), frames, f"{seconds:.0f}", f"{frames / max(seconds, 1e-9):.2f}", f"{size / max(seconds, 1e-9) / 1e6:.2f}")
        )
    rows.sort(key=lambda row: float(row[4]))
    note = f"{len(reports)} shards by {len(rows)} workers" + (
        f"; the slowest {WORKERS} are shown." if len(rows) > WORKERS else ", slowest first."
    )
    pace = histogram(
        np.array([report["seconds"] / report["frames"] for report in reports if report["frames"]]), "seconds a frame, by shard"
    )
    return section(
        "Throughput by worker", note, pace + table(("worker", "shards", "frames", "seconds", "frames/s", "MB/s"), rows[:WORKERS])
    )


def read_log(storage: Storage) -> list[dict[str, Any]]:
    """The shard reports in log.jsonl; [] if there is none. A last line cut short by a kill is left out."""
    try:
        whole, _, _ = storage.read("log.jsonl").decode().rpartition("\n")
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in whole.splitlines() if line]


# ---- pieces --------------------------------------------------------------------------------------------------------------


def _tile(dataset: ShardDataset, picture: np.ndarray) -> np.ndarray:
    """A square picture at the side that all tiles of this set have; small ones are enlarged pixel by pixel."""
    side = min(TILE_PX, dataset.manifest["settings"]["generator"]["model"]["image_resolution"])
    if picture.shape[0] <= side:
        return on_grid(picture, side)
    return np.asarray(Image.fromarray(picture).resize((side, side), Image.Resampling.BOX))


def _signed_colors(values: np.ndarray) -> np.ndarray:
    """Numbers [3, R, R] in [-1, 1] as red, green and blue [R, R, 3]."""
    return ((values.transpose(1, 2, 0) + 1) * 127.5).clip(0, 255).astype(np.uint8)


def _sheet(sheet: np.ndarray, name: str) -> str:
    shown = sheet.shape[1] * max(1, 1000 // sheet.shape[1])  # whole factors, so that pixels stay square
    return figure(data_url(sheet, {"page": name}), shown, name)


def _spread(items: list, count: int) -> list:
    """At most `count` of them, evenly spread."""
    return [items[index] for index in np.linspace(0, len(items) - 1, min(count, len(items))).round().astype(int)]


def _yaw_deg(label: np.ndarray) -> float:
    """Of one label [437]: the camera's yaw from its backward axis."""
    return float(np.degrees(np.arctan2(label[2], label[10])))
