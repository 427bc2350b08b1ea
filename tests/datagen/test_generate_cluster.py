"""The farm on a real cluster of several nodes; the test itself is `nodes_come_and_go.py`."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


def test_nodes_come_and_go_during_a_run_and_the_bytes_stay():
    """In a process of its own, without the settings that a local Ray leaves in the environment: with them, workers die at once."""
    pytest.importorskip("ray")
    file = Path(__file__).with_name("nodes_come_and_go.py")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "RAY_"))}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", str(file)]
    result = subprocess.run(command, env=environment, cwd=file.parents[2], capture_output=True, text=True, check=False)
    assert result.returncode == 0 and "1 passed" in result.stdout, result.stdout[-5000:] + result.stderr[-2000:]
