"""Sizes: a file has at most 500 lines, a function at most 80."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDERS = ("gramfuse", "protocol", "model", "client", "server", "simulation", "deployment", "cli", "tests")
FILE_LINES = 500
FUNCTION_LINES = 80


def sources() -> Iterator[Path]:
    return (path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py")))


def too_long(source: str) -> list[str]:
    """Return what is too long in a file: itself, or functions by name."""
    lines = len(source.splitlines())
    functions = [
        node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    return [f"{lines} lines"] * (lines > FILE_LINES) + [
        node.name for node in functions if (node.end_lineno or node.lineno) - node.lineno + 1 > FUNCTION_LINES
    ]


def test_no_file_and_no_function_is_too_long() -> None:
    found = {str(path.relative_to(ROOT)): too_long(path.read_text(encoding="utf-8")) for path in sources()}
    assert len(found) > 300
    assert {path: problems for path, problems in found.items() if problems} == {}


def test_what_is_too_long_is_found() -> None:
    body = "    pass\n"
    assert too_long("def short():\n" + body * (FUNCTION_LINES - 1)) == []
    assert too_long("async def long():\n" + body * FUNCTION_LINES) == ["long"]
    assert too_long("\n" * (FILE_LINES + 1)) == [f"{FILE_LINES + 1} lines"]
