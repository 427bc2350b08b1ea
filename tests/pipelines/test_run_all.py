"""The demo's chain, with every real stage, at the smallest size that exercises it; in one process."""

import dataclasses
import shutil
from pathlib import Path

import pytest
import yaml

from pipelines.__main__ import run_command
from pipelines.run_all import DemoRun, main, stages

ROOT = Path(__file__).resolve().parent.parent.parent
SMALL = {
    "portraits": {"count": 6, "resolution": 64, "workers": 0},
    "genhead": {"start_from": None, "total_images": 4, "log_every": 2, "pictures_every": 100, "checkpoint_every": 4, "game": {"batch": 2}},
    "datagen": {
        "identities": 8,
        "recipe": {"dynamic_motions": 2, "dynamic_views": 2, "static_views": 2, "val_share": 0.25, "test_share": 0.25},
        "render": {"points": 20},
        "shards": {"identities_per_shard": 4},
    },
    "reconstructor": {
        "start_from": None,
        "total_images": 4,
        "log_every": 2,
        "pictures_every": 100,
        "checkpoint_every": 4,
        "micro_batch": 2,
        "batches": {"size": 2},
    },
    "evaluate": {"samples": 1, "sequence_frames": 2, "mean_images": 2},
    "drive": {"frames_between": 1, "batch": 4},
}


def _merge(settings: dict, changes: dict) -> dict:
    return settings | {key: _merge(settings.get(key) or {}, value) if isinstance(value, dict) else value for key, value in changes.items()}


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> DemoRun:
    folder = tmp_path_factory.mktemp("demo")
    configs = folder / "configs"
    configs.mkdir()
    for name, changes in SMALL.items():
        settings = yaml.safe_load((ROOT / "configs" / f"{name}_tiny.yaml").read_text(encoding="utf-8"))
        (configs / f"{name}_micro.yaml").write_text(yaml.safe_dump(_merge(settings, changes)), encoding="utf-8")
    return DemoRun(out=folder / "out", configs=configs, size="micro", workers=0, processes=1)


def _run(demo: DemoRun) -> None:
    for stage in stages(demo):
        if stage.command == "head-page":
            continue  # tested on its own; half a minute on a busy core
        file = ["--config", str(demo.configs / f"{stage.command}_micro.yaml")] if stage.has_config else []
        assert run_command(stage.command, [*file, *stage.arguments]) == 0, stage.command


def _files(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def test_the_chain_runs_from_nothing_to_a_page_and_a_second_call_makes_nothing_again(demo, capsys):
    _run(demo)
    out = demo.out
    page = (out / "index.html").read_text(encoding="utf-8")
    for name in ("report/portraits.png", "report/shards.png", ".mp4", "genhead/pictures", "reconstructor/pictures", "<table>"):
        assert name in page, f"the page lacks {name}"
    assert "not made yet" not in page and "not run yet" not in page
    assert next((out / "drive").glob("*.mp4")).stat().st_size > 1000
    before = _files(out)
    _run(demo)
    renewed = [path for path, stamp in _files(out).items() if before.get(path) != stamp]
    rebuilt = ("report/portraits.png", "report/shards.png", "index.html", "shards/index.safetensors", "shards/.lock")  # from what is there
    assert [path for path in renewed if not path.endswith(rebuilt)] == []


def test_the_demo_stops_at_a_stage_that_fails(demo, tmp_path, capfd):
    configs = tmp_path / "configs"
    shutil.copytree(demo.configs, configs)
    (configs / "portraits_micro.yaml").write_text("cuont: 6\n", encoding="utf-8")
    failing = dataclasses.replace(demo, out=tmp_path / "out", configs=configs)
    (tmp_path / "out").mkdir()
    chain = [stage for stage in stages(failing) if stage.command != "head-page"]
    assert main(failing, chain) == 1
    said = capfd.readouterr().err
    assert "cuont" in said and "goes on from here" in said
    assert not (tmp_path / "out" / "genhead").exists()
