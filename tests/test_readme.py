"""The README is true: its commands are accepted as written, its tree names every module, its pictures exist."""

import re
import shlex
from pathlib import Path

import pytest

from datagen.labels import DEFAULT_LABELS, LABELS
from pipelines.__main__ import COMMANDS, run_command

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)
COMMAND_LINES = [line.partition("headfoundry ")[2] for block in BLOCKS for line in block.splitlines() if "bin/headfoundry " in line]
PACKAGES = ("head3d", "genhead", "datagen", "reconstructor", "pipelines")


def test_the_readme_shows_every_stage():
    assert {line.split()[0] for line in COMMAND_LINES} >= {
        "portraits",
        "genhead",
        "datagen",
        "verify",
        "reconstructor",
        "evaluate",
        "drive",
    }


@pytest.mark.parametrize("line", COMMAND_LINES)
def test_every_command_is_accepted_as_written(line, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    command, *arguments = shlex.split(line)
    assert command in COMMANDS and run_command(command, [*arguments, "--dry-run"]) == 0
    assert capsys.readouterr().out.strip()


def test_every_make_target_that_is_named_exists():
    targets = set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))
    named = set(re.findall(r"`make ([a-z][a-z-]*)", README)) | {
        line.split()[1] for block in BLOCKS for line in block.splitlines() if line.startswith("make ")
    }
    assert {"demo", "test"} <= named <= targets


def test_the_tree_names_every_module():
    tree = next(block for block in BLOCKS if "head3d/ " in block)
    listed = set(re.findall(r"[a-z0-9_*/]+\.py", tree))
    folders = set(re.findall(r"^  ([a-z]+)/ |  ([a-z_]+)/    ", tree, flags=re.MULTILINE))
    folders = {name for pair in folders for name in pair if name}
    missing = []
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            inside = path.relative_to(ROOT / package)
            if path.name == "__init__.py" or package == "pipelines" or inside.parts[0] in folders:
                continue
            if not any(Path(inside).match(pattern) for pattern in listed):
                missing.append(str(path.relative_to(ROOT)))
    assert missing == []


def test_the_table_of_labels_names_every_label_and_marks_the_default_ones():
    table = README.partition("## What a frame carries")[2].partition("\n\n\\*")[0]
    named = re.findall(r"`([a-z]+)`( \*)?", table.partition("|---")[2])
    assert sorted(name for name, _ in named) == sorted(LABELS)
    assert sorted(name for name, star in named if star) == sorted(DEFAULT_LABELS)


def test_its_pictures_and_files_exist():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("http") or (ROOT / target).exists(), target
