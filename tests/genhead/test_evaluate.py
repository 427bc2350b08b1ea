"""Measuring a generator of a few thousand weights: what is written, what it depends on, and what is refused."""

import csv
import dataclasses
import json
import math

import numpy as np
import pytest
import torch

from genhead.evaluate import GEOMETRY_METRICS, GeneratorEvaluation, GeneratorMeasures, evaluate, evaluate_generator
from genhead.features import Features, random_convolution_features
from genhead.generator import EXPORT_KIND, GenHead, GenHeadExport
from genhead.portraits import Portrait, PortraitSet, write_portraits
from head3d.cameras import orbit
from head3d.head_model import load_head_model
from head3d.labels import Motion, pack_label
from head3d.run.checkpoint import export_model
from head3d.run.errors import ConfigError, DataError
from pipelines.__main__ import main
from pipelines.evaluate import OF_GENERATOR, OF_RECONSTRUCTOR, EvaluateRun

RANDOM = random_convolution_features()
MEASURES = GeneratorMeasures(pictures=4, identities=3, points=50, sheet_rows=2, resamples=20, batch=2)


def _write_portraits(folder, count=8, **metadata) -> PortraitSet:
    generator, rng = torch.Generator().manual_seed(0), np.random.default_rng(0)
    motion = Motion.neutral(count)._replace(jaw_pose=torch.rand(count, 3, generator=generator) * torch.tensor([0.3, 0, 0]))
    camera = orbit(torch.linspace(-0.4, 0.4, count), torch.zeros(count), torch.full((count,), 4.17))
    labels = pack_label(camera, torch.randn(count, 300, generator=generator), motion).numpy()
    pictures = [rng.integers(0, 255, (32, 32, 3), dtype=np.uint8) for _ in range(count)]
    full = np.full((32, 32), 255, np.uint8)
    write_portraits(folder, [Portrait(p, full, label) for p, label in zip(pictures, labels, strict=True)], 32, count, metadata)
    return PortraitSet(folder)


@pytest.fixture(scope="module")
def portraits(tmp_path_factory) -> PortraitSet:
    return _write_portraits(tmp_path_factory.mktemp("portraits") / "set")


@pytest.fixture(scope="module")
def genhead(tiny_genhead) -> GenHead:
    torch.manual_seed(0)
    genhead = GenHead(tiny_genhead(32), load_head_model(None)).eval()
    torch.nn.init.normal_(genhead.decoder.density.weight, std=20.0)  # a new decoder has no density anywhere
    torch.nn.init.constant_(genhead.decoder.density.bias, 20.0)  # and now there is some in every picture
    return genhead


@pytest.fixture(scope="module")
def export(tmp_path_factory, genhead):
    settings = GenHeadExport("procedural", genhead.head_model.content_hash, genhead.config)
    return export_model(tmp_path_factory.mktemp("export"), genhead.weights(), settings, EXPORT_KIND, images_seen=0)


def test_every_metric_has_its_rows_and_every_picture_a_record(genhead, portraits):
    found = evaluate_generator(genhead, portraits, RANDOM, MEASURES, seed=0, show_progress=False)
    assert found.scores.keys() == {"frechet"} | GEOMETRY_METRICS.keys()
    assert [sorted(rows) for rows in found.scores.values()] == [
        ["ceiling", "floor", "ours"],
        ["floor", "ours"],
        ["floor", "ours"],
        ["ceiling", "floor", "ours"],
        ["ceiling", "floor", "ours"],
        ["floor", "ours"],
        ["floor", "ours"],
        ["ours"],
    ]
    assert [(record["identity"], record["picture"]) for record in found.records] == [
        (who, picture) for who in range(3) for picture in ("first", "turned", "moved")
    ]
    for record in found.records:
        assert record["depth_percent"] == pytest.approx(100 * record["depth"] / 0.65, rel=0.3)  # the head is about 0.65 deep
        assert math.isnan(record["motion"]) == (record["picture"] != "moved") and math.isnan(record["view_share"]) == (
            record["picture"] != "turned"
        )
    assert found.scores["silhouette_recall"]["floor"]["mean"] == 1  # what is opaque everywhere misses nothing
    mean = np.mean([record["depth"] for record in found.records])
    assert found.scalars()["evaluation/depth"] == pytest.approx(mean, abs=1e-6)
    assert found.sheet.shape == (2 * 34 - 2, 7 * 34 - 2, 3)


def test_mattes_that_are_full_score_as_a_picture_that_is_opaque_everywhere(genhead, portraits):
    scores = evaluate_generator(genhead, portraits, RANDOM, dataclasses.replace(MEASURES, identities=8), 0, show_progress=False).scores
    assert scores["silhouette_recall"]["ceiling"]["mean"] == 1
    assert 0.2 < scores["silhouette_iou"]["ceiling"]["mean"] < 0.8


def test_the_batch_changes_nothing_and_the_seed_does(genhead, portraits):
    first, second, other = (
        evaluate_generator(genhead, portraits, RANDOM, dataclasses.replace(MEASURES, batch=batch), seed, show_progress=False)
        for batch, seed in ((2, 0), (3, 0), (2, 1))
    )
    for metric, rows in first.scores.items():
        for row, value in rows.items():
            assert second.scores[metric][row]["mean"] == pytest.approx(value["mean"], rel=1e-3, abs=1e-4), (metric, row)
    assert other.records[0]["depth"] != first.records[0]["depth"]


def test_own_features_take_the_place_of_the_built_in_ones(genhead, portraits):
    nothing = Features("fid", "nothing", lambda pictures: torch.zeros(len(pictures), 2))
    scores = evaluate_generator(genhead, portraits, nothing, MEASURES, 0, show_progress=False).scores
    assert [row["mean"] for row in scores["fid"].values()] == [0, 0, 0] and "frechet" not in scores


def test_the_command_writes_json_csv_and_a_sheet_and_does_not_measure_twice(export, portraits, tmp_path, capsys):
    settings = {
        "what": "generator",
        "out": str(tmp_path / "out"),
        "generator": str(export),
        "portraits": str(portraits.path),
        "measures": dataclasses.asdict(MEASURES),
    }
    (tmp_path / "settings.yaml").write_text(json.dumps(settings))  # JSON is YAML
    assert main(["evaluate", "--config", str(tmp_path / "settings.yaml")]) == 0
    printed = capsys.readouterr().out
    assert all(metric in printed for metric in ("frechet", *GEOMETRY_METRICS))
    out = tmp_path / "out"
    result = json.loads((out / "evaluation.json").read_text())
    assert {"generator", "portraits", "features", "settings", "scores", "rows"} <= result.keys()
    assert {"metric": "depth", "row": "ours"}.items() <= next(row for row in result["rows"] if row["metric"] == "depth").items()
    with (out / "samples.csv").open() as file:
        records = list(csv.DictReader(file))
    assert len(records) == 9 and records[0]["motion"] == "" and float(records[2]["motion"]) >= 0
    assert (out / "sheet_generator.png").exists() and len(list(out.glob("reference-*.npz"))) == 1

    written = (out / "samples.csv").stat().st_mtime_ns
    assert main(["evaluate", "--config", str(tmp_path / "settings.yaml"), "--measures.batch", "3"]) == 0
    assert "measured before" in capsys.readouterr().out and (out / "samples.csv").stat().st_mtime_ns == written
    assert main(["evaluate", "--config", str(tmp_path / "settings.yaml"), "--seed", "1"]) == 0
    assert (out / "samples.csv").stat().st_mtime_ns != written


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--what", "generator"], "--generator DIR"),
        (["--what", "generator", "--generator", "g", "--shards", "s"], "shards: no setting of a generator"),
        (["--portraits", "p", "--measures.pictures", "7"], "portraits, measures: no setting of a reconstructor"),
        (["--what", "generator", "--generator", "g", "--measures.pictures", "1"], "greater than or equal to 2"),
    ],
)
def test_settings_of_the_other_network_are_refused(arguments, says, capsys):
    assert main(["evaluate", *arguments]) == 2
    assert says in capsys.readouterr().err


def test_every_setting_belongs_to_one_network_or_to_both():
    every = [field.name for field in dataclasses.fields(EvaluateRun)]
    assert sorted(every) == sorted(["what", "out", "generator", "seed", *OF_GENERATOR, *OF_RECONSTRUCTOR])


def test_portraits_that_do_not_fit_the_generator_are_refused(export, genhead, portraits, tmp_path):
    _write_portraits(tmp_path / "other", head_model="flame.pkl")
    with pytest.raises(ConfigError, match=r"flame\.pkl"):
        evaluate(GeneratorEvaluation(tmp_path / "out", export, tmp_path / "other"))
    _write_portraits(tmp_path / "few", count=3)
    with pytest.raises(DataError, match="at least 4 portraits"):
        evaluate_generator(genhead, PortraitSet(tmp_path / "few"), RANDOM, MEASURES, 0)
    blank = [Portrait(np.zeros((16, 16, 3), np.uint8), np.zeros((16, 16), np.uint8), portraits[i].label) for i in range(4)]
    write_portraits(tmp_path / "small", blank, 16, 4, {})
    with pytest.raises(ConfigError, match="32 px pictures.*16 px"):
        evaluate(GeneratorEvaluation(tmp_path / "out", export, tmp_path / "small"))
    assert not (tmp_path / "out").exists()
