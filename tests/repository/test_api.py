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


WRONG = {
    "derive_layout: model": "gramfuse.derive_layout('bert', batch)",
    "derive_layout: batch": "gramfuse.derive_layout(base, [batch])",
    "derive_layout: merge": "gramfuse.derive_layout(base, batch, {'*': 'full'})",
    "trainable: model": "gramfuse.trainable('bert')",
    "add_differences: model": "gramfuse.add_differences('bert', {})",
    "add_differences: deltas": "gramfuse.add_differences(base, gramfuse.merge([measured, measured], layout))",
    "collect_statistics: model": "gramfuse.collect_statistics(None, [batch], layout, base=start, examples=2)",
    "collect_statistics: batches": "gramfuse.collect_statistics(tuned, batch, layout, base=start, examples=2)",
    "collect_statistics: layout": "gramfuse.collect_statistics(tuned, [batch], '{}', base=start, examples=2)",
    "collect_statistics: base": "gramfuse.collect_statistics(tuned, [batch], layout, base=base, examples=2)",
    "collect_statistics: examples": "gramfuse.collect_statistics(tuned, [batch], layout, base=start, examples='2')",
    "merge: statistics": "gramfuse.merge(measured, layout)",
    "merge: statistics 2": "gramfuse.merge([measured, 'two.safetensors'], layout)",
    "merge: layout": "gramfuse.merge([measured], None)",
    "merge: alpha": "gramfuse.merge([measured], layout, alpha='0.9')",
    "read_statistics: path": "gramfuse.read_statistics(7)",
    "write_statistics: path": "gramfuse.write_statistics(None, measured, name='a', base=None, task=None, layout=None)",
    "write_statistics: base": "gramfuse.write_statistics('a', measured, name='a', base=base, task=None, layout=layout)",
}


def test_an_argument_of_a_wrong_type_is_refused_by_name(maker: ModuleType) -> None:
    names = set_up(maker)
    exec("measured = gramfuse.collect_statistics(tuned, [batch], layout, base=start, examples=2)", names)
    for name, call in WRONG.items():
        with pytest.raises(gramfuse.GramfuseError, match=f"^{name} is .*, expected ") as caught:
            eval(call, names)
        assert caught.value.exit_code > 1, "the root is never raised itself"


def test_import_gramfuse_loads_neither_torch_nor_flower() -> None:
    code = (
        "import sys, gramfuse; gramfuse.read_statistics, gramfuse.__version__; "
        "print([name for name in ('torch', 'transformers', 'flwr') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_readme_api_page_and_examples_use_only_the_public_face() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    texts = {"code in README.md": "\n".join(re.findall(r"^```.*?^```", readme, re.DOTALL | re.MULTILINE))}
    for page in (ROOT / "docs" / "api.md", *(path for path in (ROOT / "examples").rglob("*") if path.is_file())):
        texts[page.name] = page.read_text(encoding="utf-8")
    deep = [(name, line) for name, text in texts.items() for line in text.splitlines() if "gramfuse_" in line]
    assert deep == []
