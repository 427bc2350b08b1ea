"""Pages: what stands in them is escaped, charts show the numbers, pictures say that they are synthetic."""

import base64
import io
import json
import re

import numpy as np
from PIL import Image

from head3d.pages import CHART_HEIGHT_PX, CHART_WIDTH_PX, data_url, figure, histogram, line_chart, page, section, table


def test_text_is_escaped_wherever_it_comes_from():
    text = page("<a>", "lead", section("<b>", "<c>", table(["<d>"], [["<e>", 1]]) + figure("f.png?x&y", 10, "<g>")))
    assert not re.search("<[abcdeg]>", text)
    for part in ("&lt;a&gt;", "&lt;b&gt;", "&lt;c&gt;", "<th>&lt;d&gt;</th>", "<td>&lt;e&gt;</td><td>1</td>", "f.png?x&amp;y", "&lt;g&gt;"):
        assert part in text


def test_a_page_needs_no_other_file_and_knows_dark_and_light():
    text = page("t", "lead", "body", "let a = 1;")
    assert "prefers-color-scheme: dark" in text and "<script>\nlet a = 1;</script>" in text and "synthetic media" in text
    assert "http" not in text and "src=" not in text


def test_a_histogram_has_a_bar_for_each_filled_bin_with_its_height():
    text = histogram(np.array([0.0, 0.1, 0.9, 1.0, 1.0, 1.0, np.nan]), "jaw", bins=4)
    bars = [tuple(map(float, bar)) for bar in re.findall(r'<rect x="([\d.]+)" y="([\d.]+)" width="[\d.]+" height="([\d.]+)"/>', text)]
    width, full = (CHART_WIDTH_PX - 56) / 4, CHART_HEIGHT_PX - 48
    assert bars == [(46.0, CHART_HEIGHT_PX - 22 - full / 2, full / 2), (46 + 3 * width, CHART_HEIGHT_PX - 22 - full, full)]
    assert ">4<" in text and "mean 0.667" in text and "1 without a value" in text and "nan" not in text


def test_a_histogram_of_nothing_says_so():
    assert "no values" in histogram(np.array([np.nan]), "depth") and "<rect" not in histogram(np.array([]), "depth")


def test_a_line_runs_from_corner_to_corner_of_its_axes():
    text = line_chart([(0, 5.0), (10, 1.0)], "loss")
    assert f'points="46.0,26.0 {CHART_WIDTH_PX - 10:.1f},{CHART_HEIGHT_PX - 22:.1f}"' in text and ">5<" in text and ">10 images<" in text


def test_a_picture_inside_a_page_is_marked_as_synthetic():
    url = data_url(np.full((8, 16, 3), 200, np.uint8), {"key": "0000000001"})
    with Image.open(io.BytesIO(base64.b64decode(url.removeprefix("data:image/jpeg;base64,")))) as picture:
        comment = json.loads(picture.info["comment"])
        assert picture.size == (16, 8)
    assert comment["notice"].startswith("Synthetic") and comment["provenance"] == {"key": "0000000001"}
