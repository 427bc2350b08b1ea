from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from head3d.head_model import load_head_model
from head3d.procedural_head import build_procedural_head
from head3d.run.errors import ConfigError
from pipelines import head_page


@pytest.fixture(scope="module")
def scene():
    head = load_head_model("procedural")
    return head, head_page.region_colors(head, build_procedural_head())


def test_a_picture_shows_skin_red_lips_below_it_and_is_mirror_symmetric(scene):
    picture = head_page.render(*scene, head_page.tiles(named=True)[0], 96).astype(int)
    forehead = picture[24, 48]
    assert forehead[0] > forehead[1] > forehead[2] > 60
    redness = picture[:, 48, 0] / picture[:, 48, 1]
    assert 58 <= redness.argmax() <= 72  # the lips, below the middle of the picture
    assert redness.max() > 1.3 * redness[24]
    assert (np.ptp(picture[0, 0]) < 10) and picture[0, 0].min() > 200  # background
    head = np.abs(picture - picture[0, 0]).sum(2) > 12
    assert (head ^ head[:, ::-1]).mean() < 0.01


def test_tiles_cover_both_extremes_of_twelve_components_of_each_kind():
    page = head_page.tiles(named=True)
    assert len({(tile.caption, tile.yaw_deg) for tile in page}) == len(page)
    shapes = [tile.shape.abs().sum() > 0 for tile in page]
    expressions = [tile.motion.expression.abs().sum() > 0 for tile in page]
    assert sum(shapes) == sum(expressions) == 2 * head_page.COMPONENTS


def test_jaw_tile_differs_from_the_neutral_one_below_the_nose_only(scene):
    by_caption = {tile.caption: tile for tile in head_page.tiles(named=True)[:6]}
    neutral, jaw = (head_page.render(*scene, by_caption[name], 96).astype(int) for name in ("front", "jaw 0.3 rad"))
    changed = np.abs(neutral - jaw).sum(2) > 30
    assert changed[60:].any() and not changed[:48].any()


def test_a_page_that_is_not_a_png_is_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match="expected the path of a .png file"):
        head_page.write_head_page(head_page.HeadPage(out=tmp_path / "head"))


def test_the_page_is_written_and_marked_as_synthetic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    few = head_page.tiles(named=True)[:2]
    monkeypatch.setattr(head_page, "tiles", lambda named: few)
    path = head_page.write_head_page(head_page.HeadPage(out=tmp_path / "made" / "head.png", size=32))
    assert "Synthetic" in Image.open(path).text["Comment"]
