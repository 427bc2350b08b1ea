"""docs/cluster.md is true: scripts parse, commands are accepted, configurations fit Ray's schema, refusals are worded as Ray words them."""

import os
import re
import shlex
import subprocess
import textwrap
from pathlib import Path

import pytest
import yaml

from pipelines.__main__ import run_command

ROOT = Path(__file__).resolve().parent.parent
GUIDE = (ROOT / "docs" / "cluster.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```([a-z]+)\n(.*?)^```", GUIDE, flags=re.DOTALL | re.MULTILINE)
SCRIPTS = [text for kind, text in BLOCKS if kind == "bash"]
CLUSTERS = [yaml.safe_load(text) for kind, text in BLOCKS if kind == "yaml"]


def commands(program):
    """The arguments of every call of a program in scripts, configurations and what they quote; variables are left as they are."""
    lines = "\n".join(SCRIPTS).replace("\\\n", " ").splitlines()
    lines += [line for cluster in CLUSTERS for name, value in cluster.items() if name.endswith("commands") for line in value]
    return [call for line in lines for call in calls(line, program)]


def calls(line, program):
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    words = []
    for token in [*lexer, ";"]:
        if set(token) <= set("();<>|&"):  # what ends a call
            if program in words:
                yield words[words.index(program) + 1 :]
            words = []
        else:
            words.append(token)
            if " " in token:  # quoted for another shell
                yield from calls(token, program)


def test_the_guide_has_every_sort_of_cluster():
    assert [cluster["provider"]["type"] for cluster in CLUSTERS] == ["local", "aws"]
    assert any("#SBATCH" in script for script in SCRIPTS) and len(commands("headfoundry")) >= 8 and len(commands("ray")) >= 12


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.splitlines()[-1][:40])
def test_scripts_parse(script):
    assert subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True, check=False).stderr == ""


@pytest.mark.parametrize("words", commands("headfoundry"), ids=" ".join)
def test_our_commands_are_accepted_as_written(words, capsys):
    assert run_command(words[0], [*words[1:], "--dry-run"]) == 0
    assert capsys.readouterr().out.strip()


def test_rays_commands_are_accepted_as_written():
    from ray.scripts.scripts import cli

    for words in commands("ray"):
        command = cli.commands[words[0]]
        command.make_context(words[0], list(words[1:]), resilient_parsing=False)  # reads the options, runs nothing


@pytest.mark.parametrize("cluster", CLUSTERS, ids=lambda cluster: cluster["provider"]["type"])
def test_configurations_fit_rays_schema(cluster):
    from ray.autoscaler._private.util import prepare_config, validate_config

    validate_config(prepare_config(cluster))


def test_the_forecast_is_what_the_command_prints(capsys):
    words = next(words for words in commands("headfoundry") if words[0] == "plan" and "--measured" not in words)
    assert run_command("plan", words[1:]) == 0
    assert next(text for kind, text in BLOCKS if kind == "text") == capsys.readouterr().out


def test_refusals_are_worded_as_ray_words_them():
    from ray._private.authentication import authentication_constants, authentication_token_setup

    assert authentication_constants.TOKEN_AUTH_ENABLED_BUT_NO_TOKEN_FOUND_ERROR_MESSAGE in GUIDE
    assert authentication_token_setup.AUTH_MODE_ENV_VAR == "RAY_AUTH_MODE"
    native = (Path(authentication_token_setup.__file__).parents[2] / "_raylet.so").read_bytes()
    for text in ("InvalidAuthToken: Authentication token is missing or incorrect", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_TOKEN"):
        assert text.encode() in native and text in GUIDE


def test_the_slurm_script_starts_the_head_then_the_others_then_the_work_all_with_one_token(tmp_path):
    """With programs in the place of SLURM's and Ray's that write down how they are called."""
    script = next(script for script in SCRIPTS if "#SBATCH" in script)
    programs = tmp_path / "head-foundry" / ".venv" / "bin"
    programs.mkdir(parents=True)
    note = f'echo "$(basename "$0") $* [$RAY_AUTH_MODE $RAY_AUTH_TOKEN]" >> {tmp_path}/calls'
    for name, text in {
        "srun": f'{note}; while [ "${{1#--}}" != "$1" ]; do shift; done; "$@"',
        "ray": f'[ -e {tmp_path}/up ] || [ "$1" = start ]; {note}; touch {tmp_path}/up',
        "headfoundry": note,
        "hostname": "echo node1",
        "python": "echo secret",
    }.items():
        path = programs / name
        path.write_text(f"#!/bin/bash\nset -e\n{text}\n")
        path.chmod(0o755)
    environment = os.environ | {"HOME": str(tmp_path), "SLURM_JOB_NUM_NODES": "4", "HEADS_OUT": "/shared/heads"}
    done = subprocess.run(["bash", "-c", script + "wait\n"], env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    calls = (tmp_path / "calls").read_text().splitlines()
    assert all(call.endswith("[token secret]") for call in calls)
    starts = [call for call in calls if call.startswith("ray start")]
    assert starts[0].startswith("ray start --head --port=6379") and starts[1].startswith("ray start --address=node1:6379")
    assert any(call.startswith("srun --nodes=3 --ntasks=3 --exclude=node1 ray start") for call in calls)
    (work,) = (call for call in calls if call.startswith("headfoundry"))
    assert textwrap.shorten(work, 60).startswith("headfoundry datagen --generator") and "--out /shared/heads" in work
    assert "--address node1:6379 --workers auto" in work
