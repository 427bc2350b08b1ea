"""The page of a data set: what it shows, what it says is not there, and the list of what to leave out."""

import base64
import io
import json
import re

import pytest
from PIL import Image

from datagen.generate import generate
from datagen.index import INDEX
from datagen.reading import open_dataset
from datagen.render import RenderConfig
from datagen.report import report_text, write_report
from head3d.run.errors import DataError
from pipelines.__main__ import run_command


@pytest.fixture
def folder(tmp_path, undisturbed):
    out = tmp_path / "set"
    for name, data in undisturbed.items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_bytes(data)
    return out


def test_the_page_shows_people_maps_turning_heads_and_distributions(folder):
    text = report_text(open_dataset(folder))
    for heading in ("What is here", "People", "Maps", "Turntable", "Distributions", "Outliers", "Sizes by field", "Throughput by worker"):
        assert f"<h2>{heading}</h2>" in text
    assert "3 of 3 shards are finished" in text and "measured on 7 frames of 3 shards" in text
    assert "<td>all</td><td></td><td>5</td><td>7</td><td>18</td>" in text  # people, frames, pictures
    for caption in ("colour", "opacity", "parts", "depth"):
        assert f"<figcaption>{caption}</figcaption>" in text
    assert "http" not in text.replace("http://cv.iptc.org", "") and "Synthetic" in text


def test_every_picture_is_inside_the_page_and_marked_as_synthetic(folder):
    coded = re.findall(r"data:image/jpeg;base64,([A-Za-z0-9+/=]+)", report_text(open_dataset(folder)))
    assert len(coded) > 10
    for text in coded:
        with Image.open(io.BytesIO(base64.b64decode(text))) as picture:
            assert "Synthetic" in json.loads(picture.info["comment"])["notice"]


def test_turning_heads_are_sorted_by_yaw(folder):
    text = report_text(open_dataset(folder))
    yaws = json.loads(re.search(r'id="yaws">(.*?)</script>', text)[1])
    assert [len(turn) for turn in yaws] == [6, 6]  # the two dynamic people, two motions of three views
    assert all(turn == sorted(turn) for turn in yaws) and yaws[0] != yaws[1]


def test_outliers_come_with_recipe_and_the_words_that_exclude_them(folder):
    text = report_text(open_dataset(folder))
    assert 'value="frame 0000000001"' in text and 'value="identity 1"' in text
    assert "&quot;condition_camera&quot;" in text and f"headfoundry survey {folder} --exclude list.txt" in text


def test_the_same_set_gives_the_same_page(folder):
    assert report_text(open_dataset(folder)) == report_text(open_dataset(folder))


def test_workers_are_listed_slowest_first(folder):
    log = [
        {"shard": 0, "frames": 3, "bytes": 6_000_000, "seconds": 3.0, "worker": "quick:1"},
        {"shard": 1, "frames": 3, "bytes": 3_000_000, "seconds": 12.0, "worker": "slow:2"},
        {"shard": 2, "frames": 1, "bytes": 2_000_000, "seconds": 1.0, "worker": "quick:1"},
    ]
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log) + '{"shard": 9, "fra')
    text = report_text(open_dataset(folder))
    slow = "<td>slow:2</td><td>1</td><td>3</td><td>12</td><td>0.25</td><td>0.25</td>"
    quick = "<td>quick:1</td><td>2</td><td>4</td><td>4</td><td>1.00</td><td>2.00</td>"
    assert text.index(slow) < text.index(quick) and "3 shards by 2 workers" in text


@pytest.mark.parametrize(
    ("labels", "shown"),
    [((), []), (("opacity", "normals", "correspondence", "depth"), ["opacity", "depth", "normals", "correspondence"])],
)
def test_the_page_shows_the_maps_that_there_are(tmp_path, run_of, labels, shown):
    assert generate(run_of(tmp_path / "set", identities=2, render=RenderConfig(labels=labels))) == 0
    text = report_text(open_dataset(tmp_path / "set"))
    assert re.findall("<figcaption>([a-z]+)</figcaption>", text) == ["people", "colour", *shown]
    assert ("no values" in text) == ("parts" not in shown) and ("unknown" in text) == (not shown)


def test_a_set_without_a_finished_shard_says_so(folder):
    for family in ("frames", "labels", "identities"):
        for path in (folder / family).iterdir():
            path.unlink()
    (folder / INDEX).unlink()
    assert "No shard is finished yet" in report_text(open_dataset(folder))


def test_generation_writes_the_page_and_leaves_it_alone_when_nothing_is_new(tmp_path, run_of):
    page = tmp_path / "set" / "index.html"
    assert generate(run_of(tmp_path / "set", identities=2, page=True)) == 0
    stamp = page.stat().st_mtime_ns
    assert generate(run_of(tmp_path / "set", identities=2, page=True)) == 0
    assert page.stat().st_mtime_ns == stamp
    assert generate(run_of(tmp_path / "set", identities=3, page=True)) == 0
    assert page.stat().st_mtime_ns != stamp


def test_the_command_excludes_what_a_file_lists_and_writes_the_page(folder, tmp_path, capsys):
    listed = tmp_path / "list.txt"
    listed.write_text("identity 3\nframe 0000000001\n")
    assert run_command("survey", [str(folder), "--exclude", str(listed)]) == 0
    said = capsys.readouterr().out
    assert "1 identities and 1 frames are excluded" in said and str(folder / "index.html") in said
    text = (folder / "index.html").read_text()
    assert "3 frames are excluded" in text and 'value="identity 3"' not in text and 'value="frame 0000000001"' not in text
    with pytest.raises(DataError, match="list.txt, line 1"):
        listed.write_text("everybody\n")
        run_command("survey", [str(folder), "--exclude", str(listed)])


def test_a_place_without_a_data_set_is_an_error(tmp_path):
    with pytest.raises(DataError, match="holds no data set"):
        write_report(tmp_path)
