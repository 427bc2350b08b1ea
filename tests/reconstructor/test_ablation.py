"""Variants of one run: what each changes, how they are compared, and what is not done twice."""

import dataclasses
import json
from pathlib import Path

import pytest

from head3d.run.config import from_dict, read_settings
from head3d.run.errors import AssetError, ConfigError, DataError
from head3d.run.files import write_csv
from reconstructor import ablation
from reconstructor.ablation import COLUMNS, AblationRun, evaluation_of, order, overlaid, row_settings, run_ablation, scores, text_table

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
RUN = AblationRun(base=CONFIGS / "ablation" / "base_tiny.yaml", rows=CONFIGS / "ablation", total_images=8, seed=3)


def test_an_overlay_changes_what_it_names_at_any_depth_and_nothing_else():
    base = {"a": 1, "b": {"c": 2, "d": {"e": 3}}}
    assert overlaid(base, {"b": {"d": {"f": 4}}, "g": {"h": 5}}) == {"a": 1, "b": {"c": 2, "d": {"e": 3, "f": 4}}, "g": {"h": 5}}
    assert base == {"a": 1, "b": {"c": 2, "d": {"e": 3}}}


def test_the_rows_that_come_with_the_project_differ_as_their_files_say():
    runs = {name: row_settings(RUN, name) for name in RUN.names}
    assert all(run.total_images == 8 and run.seed == 3 and run.out == RUN.out / name for name, run in runs.items())
    found = {
        name: (
            run.model.architecture.deexpression_blocks,
            run.model.architecture.reenactment_blocks,
            run.batches.static_share,
            run.batches.swap_probability,
            run.batches.switch,
        )
        for name, run in runs.items()
    }
    assert found == {
        "A": (0, 4, 0.5, 0.0, False),
        "B": (2, 2, 0.0, 0.5, True),
        "C": (2, 2, 0.5, 0.0, False),
        "D": (2, 2, 0.0, 0.0, True),
        "E": (2, 2, 0.5, 0.0, True),
    }
    learned = {name: evaluation_of(RUN, run).switch for name, run in runs.items()}
    assert learned == {"A": False, "B": True, "C": False, "D": False, "E": True}
    assert evaluation_of(RUN, runs["E"]).tasks == ("static_lift", "cross_reenactment")
    same = [dataclasses.replace(run, out=Path(), batches=runs["E"].batches) for name, run in runs.items() if name != "A"]
    assert same == [same[-1]] * 4


def test_a_wrong_key_in_a_row_is_named_with_its_file(tmp_path):
    (tmp_path / "X.yaml").write_text("batches: {statik_share: 0}")
    with pytest.raises(ConfigError, match=r"X\.yaml: unknown key batches\.statik_share"):
        row_settings(dataclasses.replace(RUN, rows=tmp_path), "X")
    with pytest.raises(ValueError, match="the reference E among them, got A B"):
        AblationRun(names=("A", "B"))


def line(identity, psnr, cosine=None, source="s"):
    told = {} if cosine is None else {"identity_cosine": str(cosine)}
    common = {"task": "cross_reenactment", "bin": "", "row": "ours", "identity": str(identity), "source": source, "driver": "d"}
    return common | {"psnr": str(psnr)} | told


def test_differences_are_taken_sample_by_sample_and_are_means_over_identities():
    mine, reference = [line(1, 20), line(1, 22), line(2, 30)], [line(1, 19), line(1, 19), line(2, 28)]
    found = scores(RUN, mine, reference)
    assert list(found) == ["PSNR, cross"]
    score = found["PSNR, cross"]
    assert score["mean"] == 25.5 and score["difference"] == {"mean": 2.0, "low": 2.0, "high": 2.0}  # (1 + 3) / 2 and 2
    assert (score["low"], score["high"]) == (21.0, 30.0)
    with pytest.raises(ConfigError, match="not measured on the same samples"):
        scores(RUN, mine, [line(1, 19), line(1, 19, source="t"), line(2, 28)])


def test_the_best_row_stands_first_whatever_is_better_and_the_paper_s_order_is_beside_identity():
    identity, jaw = COLUMNS[1], COLUMNS[4]
    means = {"A": (0.1, 3.0), "B": (0.4, 2.0), "E": (0.3, 1.0)}
    rows = {
        name: {
            "published_identity": ablation.PUBLISHED_IDENTITY.get(name),
            "scores": {identity.title: {"mean": one}, jaw.title: {"mean": two}},
        }
        for name, (one, two) in means.items()
    }
    assert order({"rows": rows}, identity) == "B > E > A (paper: E > A)"
    assert order({"rows": rows}, jaw) == "E > B > A"


@pytest.fixture
def faked(monkeypatch):
    """Training and measuring stand-ins; returns what was called."""
    called = []

    def train(run):
        if not (run.out / "export").exists():
            called.append(("train", run.out.name, run.batches.static_share))
            (run.out / "export").mkdir(parents=True)
        return 0

    def evaluate(run):
        if not run.out.exists():
            called.append(("evaluate", run.out.parent.name, run.switch))
            run.out.mkdir()
            psnr = {"D": 20, "E": 21}[run.out.parent.name]
            write_csv(run.out / "samples.csv", [line(1, psnr, 0.5), line(2, psnr + 1, 0.25), line(1, 0) | {"row": "copy_source"}])
            record = {"reconstructor": "r", "generator": "g", "data": {"hash": "h", "identities": 2}, "perception": None}
            (run.out / "evaluation.json").write_text(json.dumps(record))
        return 0

    monkeypatch.setattr(ablation, "check_measurable", lambda config, run: None)
    monkeypatch.setattr(ablation, "train", train)
    monkeypatch.setattr(ablation, "evaluate", evaluate)
    return called


def test_rows_are_trained_and_measured_once_and_compared(faked, tmp_path, capsys):
    config = dataclasses.replace(RUN, out=tmp_path, names=("D", "E"))
    assert run_ablation(config) == 0
    assert faked == [("train", "D", 0.0), ("evaluate", "D", False), ("train", "E", 0.5), ("evaluate", "E", True)]
    result = json.loads((tmp_path / "ablation.json").read_text())
    assert result["rows"]["D"]["scores"]["PSNR, cross"]["difference"] == {"mean": -1.0, "low": -1.0, "high": -1.0}
    assert result["rows"]["D"]["changes"] == "batches.static_share 0.0" and result["rows"]["E"]["changes"] == "the base as it is"
    assert (result["identities"], result["samples"]) == (2, 2)
    page = (tmp_path / "index.html").read_text()
    assert "<td>-1.00 [-1.00, -1.00]</td>" in page and "batches.static_share 0.0" in page and "0.441" in page
    printed = capsys.readouterr().out
    assert "PSNR, cross: E > D" in printed and "need a perception network" in printed and text_table(result) in printed
    assert run_ablation(config) == 0 and len(faked) == 4


def test_a_row_that_was_stopped_is_not_measured(faked, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(ablation, "train", lambda run: 0)
    assert run_ablation(dataclasses.replace(RUN, out=tmp_path, names=("D", "E"))) == 0
    assert faked == [] and "row D is not finished" in capsys.readouterr().out and not (tmp_path / "ablation.json").exists()


def test_what_could_not_be_measured_is_refused_before_a_row_is_trained(world, tiny_perception, tmp_path, monkeypatch):
    monkeypatch.setattr(ablation, "train", None)
    tiny_perception(tmp_path / "losses", "losses")
    config = dataclasses.replace(RUN, out=tmp_path / "out", shards=str(world.shards))
    with pytest.raises(AssetError, match="trained with --role evaluation, got losses"):
        run_ablation(dataclasses.replace(config, perception=tmp_path / "losses"))
    with pytest.raises(DataError, match="absent holds no data set"):
        run_ablation(dataclasses.replace(config, shards=str(tmp_path / "absent")))


def test_the_tiny_settings_name_files_that_are_there(monkeypatch):
    monkeypatch.chdir(CONFIGS.parent)
    config = from_dict(AblationRun, read_settings(CONFIGS / "ablation_tiny.yaml"), "ablation_tiny")
    assert config.base.is_file() and all((config.rows / f"{name}.yaml").is_file() for name in config.names)
