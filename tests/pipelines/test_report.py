"""The page: it shows what the stages have written, and says what is missing."""

import json

import numpy as np
import pytest
from PIL import Image

from datagen.labels import DEFAULT_LABELS, members_of
from datagen.members import Scales, ShardConfig, encode_sample, member_entries
from datagen.shards import SCHEMA, write_shard
from head3d.run.errors import DataError
from pipelines.report import ReportRun, main

SIDE, RAYS, VIEWS = 16, 8, 2
SCALES = Scales(near=3.0, far=5.0, box_side=1.3)


def write_shards(folder, labels):
    """One shard of one frame, with or without the labels family."""
    folder.mkdir(parents=True)
    manifest = {
        "schema": SCHEMA,
        "config_hash": "0123456789abcdef",
        "plan": {"shards": 1},
        "depth": {"near": SCALES.near, "far": SCALES.far},
        "box_side": SCALES.box_side,
        "members": member_entries(members_of(DEFAULT_LABELS)),
        "settings": {"shards": {"image_format": "png"}},
    }
    (folder / "dataset.json").write_text(json.dumps(manifest))
    opacity = np.zeros((VIEWS, RAYS, RAYS))
    opacity[:, :, 4:] = 1
    depth = np.full((VIEWS, RAYS, RAYS), 3.5)
    depth[:, :4] = 4.5  # the upper half is far
    values = {
        "rgb": np.full((VIEWS, SIDE, SIDE, 3), 77, np.uint8),
        "opacity": opacity,
        "parts": np.zeros((VIEWS, RAYS, RAYS), np.uint8),
        "label": np.zeros((VIEWS, 437), np.float32),
        "background": np.zeros((RAYS, RAYS, 3), np.uint8),
        "json": {},
        "depth": depth,
        "foreground": np.zeros((VIEWS, 3, RAYS, RAYS)),
        "points": np.zeros((VIEWS, 1, 3)),
        "point_features": np.zeros((VIEWS, 1, 3)),
    }
    about = {"identity": 0, "motion": 0, "kind": "static", "split": "train", "views": VIEWS}
    for family in ("labels", "frames") if labels else ("frames",):
        with write_shard(folder, family, 0, {"config_hash": manifest["config_hash"]}) as writer:
            writer.add(
                "0000000000", encode_sample(members_of(DEFAULT_LABELS, family), values, SCALES, ShardConfig(image_format="png")), about
            )


def page(folder):
    assert main(ReportRun(folder)) == 0
    return (folder / "index.html").read_text()


def test_shards_are_shown_in_colour_with_near_depths_bright_and_with_opacity(tmp_path):
    write_shards(tmp_path / "shards", labels=True)
    assert "1 frames of 1 people; colour, depth, opacity" in page(tmp_path)
    sheet = np.asarray(Image.open(tmp_path / "report" / "shards.png")).astype(int)
    color, depth, opacity = (sheet[:SIDE, start : start + SIDE] for start in (0, SIDE + 2, 2 * (SIDE + 2)))
    assert (color == 77).all()
    assert (opacity[:, :8] == 0).all() and (opacity[:, 8:] == 255).all()
    near, far, nothing = depth[12, 12], depth[2, 12], depth[12, 2]
    assert near.sum() > far.sum() and not np.array_equal(nothing, near) and not np.array_equal(nothing, far)


def test_shards_without_labels_are_shown_without_depth(tmp_path):
    write_shards(tmp_path / "shards", labels=False)
    assert "1 frames of 1 people; colour, opacity" in page(tmp_path)


def test_stages_that_have_not_run_are_said_to_be_missing(tmp_path):
    text = page(tmp_path)
    assert text.count("not made yet") == 2 and text.count("not trained yet") == 2 and "not run yet" in text


def test_curves_numbers_and_the_video_are_taken_from_the_stages_folders(tmp_path):
    for folder in ("reconstructor", "evaluation", "drive"):
        (tmp_path / folder).mkdir()
    lines = ({"images_seen": seen, "loss/total": 1 / seen, "loss/depth": None} for seen in (10, 20))
    (tmp_path / "reconstructor" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    row = {"task": "novel_view", "bin": None, "row": "ours", "metric": "psnr", "mean": 21.23456, "low": 20.0, "high": 22.0}
    part = row | {"bin": "at 60 deg", "mean": 11.0}
    (tmp_path / "evaluation" / "evaluation.json").write_text(json.dumps({"rows": [row, part]}))
    (tmp_path / "drive" / "drive.mp4").write_bytes(b"")
    text = page(tmp_path)
    assert "own error" not in text  # no network has read these pictures
    assert "20 images seen." in text and ">loss/total<" in text and ">loss/depth<" not in text
    assert "<td>novel view</td><td>ours</td><td>21.235 [20.000, 22.000]</td>" in text and "11.000" not in text
    assert 'src="drive/drive.mp4"' in text


def test_what_a_network_read_stands_beside_how_wrong_it_is_and_who_can_be_told_by_a_motion_vector(tmp_path):
    (tmp_path / "evaluation").mkdir()
    told = {
        f"told_by_{name}_{probe}": value
        for probe in ("nearest", "linear")
        for name, value in (("motion_vector", 0.17), ("identity_embedding", 0.93))
    }
    errors = {
        "identities": 20,
        "pictures": 400,
        "reading": {"jaw_deg": {"unit": "degrees between jaw rotations", "network": 2.1234, "mean": 3.2}},
        "identity": {"same": 0.7, "different": 0.1, "separation": 0.97},
        "motion": {"rank": 0.35, "people": 20, "chance": 0.05} | told,
    }
    (tmp_path / "evaluation" / "evaluation.json").write_text(json.dumps({"rows": [], "perception_errors": errors}))
    text = page(tmp_path)
    assert "on 400 pictures of 20 people" in text
    assert "<td>jaw_deg</td><td>2.123</td><td>3.200 (mean)</td><td>degrees between jaw rotations</td>" in text
    assert "<td>identity</td><td>0.970</td><td>0.500 (chance)</td>" in text
    assert text.count("<td>person told</td><td>0.170</td><td>0.050 (chance)</td>") == 2
    assert "of 20, a linear classifier tells by the motion vector; by the identity embedding 0.9300" in text


def test_a_folder_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(DataError, match="nowhere: expected the folder of a demo run.*headfoundry demo --out"):
        main(ReportRun(tmp_path / "nowhere"))
