"""The public face: its names, the page that describes them, and every example in it."""

from __future__ import annotations

import doctest
import importlib.util
import inspect
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import gramfuse

ROOT = Path(__file__).parents[2]
ERRORS = {name for name in gramfuse.__all__ if name.endswith("Error")}


@pytest.fixture(scope="module")
def maker() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_api", ROOT / "docs" / "make_api.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def set_up(maker: ModuleType) -> dict[str, Any]:
    names: dict[str, Any] = {}
    exec(maker.SETUP, names)
    return names


def test_the_api_page_is_made_from_the_docstrings_as_they_are_and_has_all_public_names(maker: ModuleType) -> None:
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    assert page == maker.document(), "make api"
    assert {name for names in maker.SECTIONS.values() for name in names} | {"__version__"} == set(gramfuse.__all__)


def test_every_public_name_opens_with_an_example_that_runs(
    maker: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    finder, runner = doctest.DocTestFinder(recurse=False), doctest.DocTestRunner()
    for name in [name for names in maker.SECTIONS.values() for name in names]:
        documentation = inspect.getdoc(getattr(gramfuse, name)) or ""
        if name not in ERRORS or name == "GramfuseError":
            assert documentation.split("\n\n")[1].startswith("Example:"), name
        for test in finder.find(getattr(gramfuse, name), name, globs=set_up(maker)):
            assert runner.run(test).failed == 0, name
    for test in finder.find(gramfuse, "gramfuse", globs={}):
        assert runner.run(test).failed == 0


def test_import_gramfuse_loads_neither_torch_nor_flower() -> None:
    code = (
        "import sys, gramfuse; gramfuse.read_statistics, gramfuse.__version__; "
        "print([name for name in ('torch', 'transformers', 'flwr') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_readme_api_page_and_examples_use_only_the_public_face() -> None:
    pages = [ROOT / "README.md", ROOT / "docs" / "api.md", *(ROOT / "examples").glob("*.py")]
    deep = [
        (page.name, line)
        for page in pages
        for line in page.read_text(encoding="utf-8").splitlines()
        if re.match(r"\s*(>>> )?(from|import) gramfuse_", line)
    ]
    assert deep == []
