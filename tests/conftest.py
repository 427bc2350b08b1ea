"""What all tests share. Tests use one thread and tiny sizes."""

from __future__ import annotations

from pathlib import Path

import hypothesis
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent

torch.set_num_threads(1)
hypothesis.settings.register_profile("project", deadline=None, derandomize=True, max_examples=50)  # the same on every machine, however slow
hypothesis.settings.load_profile("project")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A test marked `gpu` is skipped without a CUDA device, and one that is skipped without a CUDA device is marked `gpu`."""
    for item in items:
        if any("CUDA" in mark.kwargs.get("reason", "") for mark in item.iter_markers("skipif")):
            item.add_marker(pytest.mark.gpu)
        elif item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"))


@pytest.fixture
def root() -> Path:
    """The repository's folder."""
    return ROOT


@pytest.fixture
def parity() -> Path:
    """The folder of reference numbers of the published networks, which lies beside the repository where it is available."""
    folder = ROOT.parent / "shared" / "parity"
    if not folder.is_dir():
        pytest.skip(f"the published networks' reference numbers are not in {folder}")
    return folder
