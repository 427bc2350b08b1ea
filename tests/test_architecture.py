"""The shape of the project itself, read from its source."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ORDER = ("head3d", "genhead", "datagen", "reconstructor", "pipelines")
LINES_PER_FILE = 400
SOURCE = Path(__file__).resolve().parent.parent
FILES = sorted(path.relative_to(SOURCE) for package in ORDER for path in (SOURCE / package).rglob("*.py"))


def imported_packages(path: Path) -> Iterator[tuple[int, str]]:
    """(line, top-level package) of each import in a file, wherever it stands."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name.split(".")[0]) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.lineno, (node.module or "").split(".")[0] if node.level == 0 else path.relative_to(SOURCE).parts[0]


def test_there_are_files_in_every_package():
    assert {path.parts[0] for path in FILES} == set(ORDER)


@pytest.mark.parametrize("path", FILES, ids=str)
def test_imports_go_one_way_only(path):
    own = ORDER.index(path.parts[0])
    backwards = [(line, name) for line, name in imported_packages(SOURCE / path) if name in ORDER and ORDER.index(name) > own]
    assert not backwards, f"{path} imports later packages at (line, package) {backwards}; the order is {' -> '.join(ORDER)}"


@pytest.mark.parametrize("path", FILES, ids=str)
def test_ray_is_imported_by_the_generate_command_alone(path):
    lines = [line for line, name in imported_packages(SOURCE / path) if name == "ray"]
    assert not lines or path == Path("datagen/generate.py"), f"{path} imports ray at line {lines}"


@pytest.mark.parametrize("path", FILES, ids=str)
def test_no_file_is_longer_than_a_reader_can_hold(path):
    length = len((SOURCE / path).read_text(encoding="utf-8").splitlines())
    assert length <= LINES_PER_FILE, f"{path} has {length} lines; split it where a second purpose begins"


@pytest.mark.parametrize("path", [path for path in FILES if path.name == "__init__.py"], ids=str)
def test_package_files_hold_a_docstring_and_nothing_else(path):
    body = ast.parse((SOURCE / path).read_text(encoding="utf-8")).body
    assert len(body) == 1 and ast.get_docstring(ast.Module(body=body, type_ignores=[])), f"{path} does work at import"


@pytest.mark.parametrize("path", FILES, ids=str)
def test_file_names_say_what_is_inside(path):
    assert path.stem not in {"utils", "util", "misc", "helper", "helpers", "common"}
    assert not path.stem.endswith(("_v2", "_new", "_final", "_old"))
