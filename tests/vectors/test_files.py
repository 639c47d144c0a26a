"""The files of vectors themselves, and the page about them."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import pytest

from gramfuse_protocol.messages.phases import REPLIES, REQUESTS
from gramfuse_protocol.secure_sum.keys import Purpose
from tests.vectors import make
from tests.vectors.replaying import VECTORS


def test_the_script_makes_the_files_that_are_checked_in() -> None:
    made = make.documents()
    assert {path.name for path in VECTORS.glob("*.json")} == set(made)
    for name, text in made.items():
        assert (VECTORS / name).read_bytes() == text.encode("ascii"), f"{name}: run tests/vectors/make.py"


def test_the_script_says_when_a_file_differs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(make, "HERE", tmp_path)
    assert make.main(["--check"]) == 1
    assert make.main([]) == 0
    assert make.main(["--check"]) == 0
    text = (tmp_path / "parts.json").read_text(encoding="ascii")
    (tmp_path / "parts.json").write_text(text.replace("0", "1", 1), encoding="ascii")
    assert make.main(["--check"]) == 1


def test_the_files_stay_small() -> None:
    assert sum(path.stat().st_size for path in VECTORS.glob("*.json")) < 430_000


def test_the_independent_implementation_imports_nothing_of_gramfuse() -> None:
    tree = ast.parse((VECTORS / "independent.py").read_text(encoding="utf-8"))
    names = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    names += [str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    assert {name.partition(".")[0] for name in names} <= sys.stdlib_module_names | {"cryptography"}


def test_the_protocol_page_names_every_label_and_every_field() -> None:
    page = (VECTORS.parents[1] / "docs" / "protocol.md").read_text(encoding="utf-8")
    assert {label.value for label in Purpose} == set(re.findall(r"gramfuse/1 [a-z ]+[a-z]", page))
    rows = {row.split("|")[1].strip(): row.split("|")[2:4] for row in page.splitlines() if row.count("|") == 4}
    for phase, request in REQUESTS.items():
        for cell, kind in zip(rows[phase], (request, REPLIES[phase]), strict=True):
            fields = set(kind.model_fields) - {"protocol", "plan", "session", "round", "silo", "arrays"}
            assert set(re.findall(r"`([a-z_]+)`", cell)) - {"hex", "masked", "sums"} == fields, phase
