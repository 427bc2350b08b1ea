"""What all tests share. Tests use one thread and tiny sizes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent

torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A test marked `gpu` is skipped where there is no CUDA device."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


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
