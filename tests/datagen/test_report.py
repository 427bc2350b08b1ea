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
from datagen.storage import open_storage
from head3d.run.errors import DataError
from pipelines.__main__ import run_command


def test_the_page_shows_people_maps_turning_heads_and_distributions(made_set):
    text = report_text(open_dataset(made_set))
    for heading in ("What is here", "People", "Maps", "Turntable", "Distributions", "Outliers", "Sizes by field", "Throughput by worker"):
        assert f"<h2>{heading}</h2>" in text
    assert "3 of 3 shards are finished" in text and "measured on 7 frames of 3 shards" in text
    assert "<td>all</td><td></td><td>5</td><td>7</td><td>18</td>" in text  # people, frames, pictures
    for caption in ("colour", "opacity", "parts", "depth"):
        assert f"<figcaption>{caption}</figcaption>" in text
    assert "http" not in text.replace("http://cv.iptc.org", "") and "Synthetic" in text


def test_every_picture_is_inside_the_page_and_marked_as_synthetic(made_set):
    coded = re.findall(r"data:image/jpeg;base64,([A-Za-z0-9+/=]+)", report_text(open_dataset(made_set)))
    assert len(coded) > 10
    for text in coded:
        with Image.open(io.BytesIO(base64.b64decode(text))) as picture:
            assert "Synthetic" in json.loads(picture.info["comment"])["notice"]


def test_turning_heads_are_sorted_by_yaw(made_set):
    text = report_text(open_dataset(made_set))
    yaws = json.loads(re.search(r'id="yaws">(.*?)</script>', text)[1])
    assert [len(turn) for turn in yaws] == [6, 6]  # the two dynamic people, two motions of three views
    assert all(turn == sorted(turn) for turn in yaws) and yaws[0] != yaws[1]


def test_outliers_come_with_recipe_and_the_words_that_exclude_them(made_set):
    text = report_text(open_dataset(made_set))
    assert 'value="frame 0000000001"' in text and 'value="identity 1"' in text
    assert "&quot;condition_camera&quot;" in text and f"headfoundry survey {made_set} --exclude list.txt" in text


def test_the_same_set_gives_the_same_page(made_set):
    assert report_text(open_dataset(made_set)) == report_text(open_dataset(made_set))


def test_workers_are_listed_slowest_first(made_set):
    log = [
        {"shard": 0, "frames": 3, "bytes": 6_000_000, "seconds": 3.0, "worker": "quick:1"},
        {"shard": 1, "frames": 3, "bytes": 3_000_000, "seconds": 12.0, "worker": "slow:2"},
        {"shard": 2, "frames": 1, "bytes": 2_000_000, "seconds": 1.0, "worker": "quick:1"},
    ]
    (made_set / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log) + '{"shard": 9, "fra')
    text = report_text(open_dataset(made_set))
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


def test_a_set_without_a_finished_shard_says_so(made_set):
    for family in ("frames", "labels", "identities"):
        for path in (made_set / family).iterdir():
            path.unlink()
    (made_set / INDEX).unlink()
    assert "No shard is finished yet" in report_text(open_dataset(made_set))


def test_generation_writes_the_page_and_leaves_it_alone_when_nothing_is_new(tmp_path, run_of):
    page = tmp_path / "set" / "index.html"
    assert generate(run_of(tmp_path / "set", identities=2, page=True)) == 0
    stamp = page.stat().st_mtime_ns
    assert generate(run_of(tmp_path / "set", identities=2, page=True)) == 0
    assert page.stat().st_mtime_ns == stamp
    assert generate(run_of(tmp_path / "set", identities=3, page=True)) == 0
    assert page.stat().st_mtime_ns != stamp


def test_the_command_excludes_what_a_file_lists_and_writes_the_page(made_set, tmp_path, capsys):
    listed = tmp_path / "list.txt"
    listed.write_text("identity 3\nframe 0000000001\n")
    assert run_command("survey", [str(made_set), "--exclude", str(listed)]) == 0
    said = capsys.readouterr().out
    assert "1 identities and 1 frames are excluded" in said and str(made_set / "index.html") in said
    text = (made_set / "index.html").read_text()
    assert "3 frames are excluded" in text and 'value="identity 3"' not in text and 'value="frame 0000000001"' not in text
    assert ">identity 3\nframe 0000000001\n</textarea>" in text  # so that the next list goes on from this one
    with pytest.raises(DataError, match="list.txt, line 1"):
        listed.write_text("everybody\n")
        run_command("survey", [str(made_set), "--exclude", str(listed)])


def test_a_place_without_a_data_set_is_an_error(tmp_path):
    with pytest.raises(DataError, match="holds no data set"):
        write_report(tmp_path)


def test_a_set_at_a_url_is_surveyed_described_measured_and_verified(tmp_path, undisturbed, generator, capsys):
    place = open_storage(f"memory://{tmp_path}/set")
    for name, data in undisturbed.items():
        place.write(name, data)
    place.write("log.jsonl", '{"shard": 0, "frames": 3, "bytes": 1, "seconds": 4.0, "worker": "a:1"}\n')
    listed = tmp_path / "list.txt"
    listed.write_text("frame 0000000001\n")
    for command in (
        ["survey", place.address, "--exclude", str(listed)],
        ["describe", place.address],
        ["plan", "--measured", place.address],
    ):
        assert run_command(*command[:1], command[1:]) == 0
    assert run_command("verify", [place.address, "--rerender", "1", "--generator", str(generator)]) == 0
    said = capsys.readouterr().out
    assert "excluded: 0 identities, 1 frames" in said and "1 bit-exact" in said and "full first" in said
    assert b"1 frames are excluded" in place.read("index.html") and b"1 further frames" in place.read("README.md")
