"""headfoundry: the table of commands, help, dry runs and errors."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import types
from dataclasses import dataclass
from pathlib import Path

import pytest

from head3d.run.config import PositiveInt, load_yaml
from head3d.run.errors import ConfigError, DataError
from pipelines.__main__ import COMMANDS, Command, main, split_arguments

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted(path.name for path in (ROOT / "configs").glob("*.yaml"))


@dataclass(frozen=True)
class Settings:
    """Do nothing, in steps."""

    steps: PositiveInt = 3  # how many
    fail: str = ""  # what goes wrong


def run(config: Settings) -> int | None:
    match config.fail:
        case "data":
            raise DataError("shard.tar: damaged; make it again")
        case "interrupt":
            raise KeyboardInterrupt
    print("steps", config.steps)
    return 1 if config.fail == "status" else None


@pytest.fixture
def nothing(monkeypatch):
    """A command `nothing` in the table."""
    module = types.ModuleType("pipelines.nothing")
    module.CONFIG, module.main = Settings, run
    monkeypatch.setitem(sys.modules, "pipelines.nothing", module)
    monkeypatch.setitem(COMMANDS, "nothing", Command("pipelines.nothing", "does nothing"))


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_of_the_table_has_settings_and_a_main_function(name):
    module = importlib.import_module(COMMANDS[name].module)
    assert module.CONFIG.__dataclass_params__.frozen
    assert callable(module.main)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_file_in_configs_is_valid_for_its_command(name):
    command = max((c for c in COMMANDS if name.startswith(c.replace("-", "_") + "_")), key=len)
    load_yaml(importlib.import_module(COMMANDS[command].module).CONFIG, ROOT / "configs" / name)


@pytest.mark.parametrize("name", COMMANDS)
def test_the_help_of_every_command_explains_every_setting(name, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([name, "--help"])
    text = capsys.readouterr().out
    assert stopped.value.code == 0 and f"headfoundry {name}" in text
    rows = [row.strip(" │") for row in text.splitlines() if row.startswith("│")]
    settings = re.findall(r"^(?:--|[A-Z]).*(?:\n(?!--|─).+)*", "\n".join(rows), re.MULTILINE)
    bare = [setting for setting in settings if re.fullmatch(r"\S.*?(?:  +|\n)\((?:default|required)[^$]*", setting)]
    assert not bare, f"settings without a meaning: {bare}"


def test_help_is_quick_and_lists_every_command():
    program = (
        "import sys; from pipelines.__main__ import main; main(['--help']); "
        "sys.exit(any(name in sys.modules for name in ('torch', 'numpy', 'pydantic', 'tyro')))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, "something slow was imported"
    for name, command in COMMANDS.items():
        assert re.search(rf"^  {name} +{re.escape(command.summary)}$", done.stdout, re.MULTILINE)


def test_python_dash_m_pipelines_is_the_command_line():
    done = subprocess.run([sys.executable, "-m", "pipelines"], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 2 and done.stdout.startswith("usage: headfoundry COMMAND")


def test_a_command_gets_file_and_flags(nothing, tmp_path, capsys):
    (tmp_path / "a.yaml").write_text("steps: 5\n")
    assert main(["nothing"]) == 0
    assert main(["nothing", "--config", str(tmp_path / "a.yaml")]) == 0
    assert main(["nothing", f"--config={tmp_path / 'a.yaml'}", "--steps", "7"]) == 0
    assert capsys.readouterr().out.split("\n")[:3] == ["steps 3", "steps 5", "steps 7"]


def test_a_dry_run_prints_the_settings_and_does_nothing(nothing, tmp_path, capsys):
    assert main(["nothing", "--dry-run", "--steps", "4"]) == 0
    (tmp_path / "again.yaml").write_text(printed := capsys.readouterr().out)
    assert printed == "steps: 4\nfail: ''\n"
    assert load_yaml(Settings, tmp_path / "again.yaml") == Settings(steps=4)


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["nothing", "--fail", "data"], 2, "headfoundry: shard.tar: damaged; make it again\n"),
        (["nothing", "--fail", "status"], 1, ""),
        (["nothing", "--fail", "interrupt"], 130, "interrupted"),
        (["nothing", "--steps", "0"], 2, "the command line: steps: expected greater than 0, got 0"),
        (["nothing", "--config", "absent.yaml"], 2, "absent.yaml: there is no such configuration file"),
        (["nothing", "--config"], 2, "--config expects a YAML file"),
        (["nothing", "--config", "a.yaml", "--config", "b.yaml"], 2, "--config is given twice"),
        (["nothin"], 2, "there is no command 'nothin'; the commands are demo"),
    ],
)
def test_what_goes_wrong_is_one_message_and_an_exit_status(nothing, capsys, arguments, status, message):
    assert main(arguments) == status
    shown = capsys.readouterr().err
    assert message in shown
    assert "Traceback" not in shown


def test_the_file_and_the_dry_run_are_taken_out_wherever_they_stand():
    assert split_arguments(["a", "--config", "f.yaml", "--x", "1", "--dry-run"]) == (Path("f.yaml"), True, ["a", "--x", "1"])
    assert split_arguments([]) == (None, False, [])
    with pytest.raises(ConfigError, match="expects a YAML file"):
        split_arguments(["--config", "--dry-run"])


def test_make_help_lists_every_target():
    shown = subprocess.run(
        ["make", "help"], capture_output=True, text=True, cwd=ROOT, check=True, env=os.environ | {"MAKEFLAGS": ""}
    ).stdout
    targets = set(re.findall(r"^  make ([a-z-]+) +\S", shown, re.MULTILINE))
    assert targets == {
        "help", "install", "demo", "test", "test-gpu", "lint", "bench", "head-page", "portraits", "genhead", "plan", "datagen",
        "verify", "survey", "describe",
        "reconstructor", "perception", "evaluate", "ablation", "drive", "report", "import-published",
    }  # fmt: skip


def test_the_lock_pins_every_package_exactly_and_names_no_index():
    lines = [line for line in (ROOT / "requirements.lock").read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[a-z0-9-]+==[0-9][0-9a-z.]*", line) for line in lines)
    assert "torch==2.13.0" in lines
