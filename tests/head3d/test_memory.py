"""The allocator's settings take effect, and leave the user's own alone."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from head3d.run.memory import TUNABLES, tuned_environment

PROGRAM = """
import resource, torch
torch.set_num_threads(1)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
x = torch.ones(100_000, 32)
for _ in range(10):
    y = torch.cat([(x * 1.5).relu(), x], 1)
    y / (y * y).sum(1, keepdim=True).sqrt()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the settings are glibc's")


@pytest.fixture(autouse=True)
def untuned(monkeypatch):
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)


def output(command: list[str], environment: dict[str, str]) -> str:
    return subprocess.run([sys.executable, *command], env=environment, cwd=ROOT, capture_output=True, text=True, check=True).stdout


def test_tensors_that_come_and_go_need_few_new_pages():
    handed_back, kept = (int(output(["-c", PROGRAM], environment)) for environment in (dict(os.environ), tuned_environment()))
    assert kept < handed_back / 2


def test_what_the_user_has_set_stays(monkeypatch):
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.rtld.optional_static_tls=512")
    assert tuned_environment()["GLIBC_TUNABLES"] == f"glibc.rtld.optional_static_tls=512:{TUNABLES}"
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.tcache_count=0")
    assert tuned_environment() is None


def test_a_program_is_restarted_once_with_its_arguments(tmp_path):
    (tmp_path / "program.py").write_text(
        "import os, sys; print(os.getpid(), sys.argv[1:])\n"
        "from head3d.run.memory import restart_tuned; restart_tuned()\n"
        "print(os.environ['GLIBC_TUNABLES'])\n"
    )
    shown = output([str(tmp_path / "program.py"), "a", "--b=c d"], dict(os.environ) | {"PYTHONPATH": str(ROOT)})
    first, second, tunables = shown.splitlines()
    assert first == second and first.endswith("['a', '--b=c d']")  # the same process, the same arguments
    assert tunables == TUNABLES
