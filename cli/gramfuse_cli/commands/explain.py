"""`gramfuse explain`: explains an exit code, and what to do."""

from __future__ import annotations

from pathlib import Path

import click

from gramfuse_cli.options import as_json as json_option
from gramfuse_deployment.terminal import say_text, show_json

PLACES = (Path(__file__).parents[1] / "exit_codes", Path(__file__).parents[3] / "docs" / "exit-codes")
"""Directories of the pages: in the installed package, or in the source tree."""

ALL = "README"
"""The page that lists all codes."""

ON_ALL = (0, 1, 2, 130)
"""Codes that only this page explains."""


@click.command()
@click.argument("code", type=click.IntRange(0, 255), required=False)
@json_option
def explain(code: int | None, as_json: bool) -> None:
    """Explain the exit code CODE: what it means, what causes it, and what to do. Without CODE, list all codes.

    Error messages end with the exit code. For 'exit code 11', run: gramfuse explain 11
    """
    name, text = ALL if code is None or code in ON_ALL else str(code), None
    for place in PLACES:
        if (place / f"{name}.md").exists():
            text = (place / f"{name}.md").read_text(encoding="utf-8")
            break
    if text is None:
        raise click.UsageError(f"exit code {name} has no page; all codes: gramfuse explain")
    if as_json:
        show_json({"code": code, "page": text})
        return
    say_text(text.rstrip("\n"))
