"""`gramfuse explain`: what an exit code means, and what to do."""

from __future__ import annotations

from pathlib import Path

import click

from gramfuse_cli.options import as_json as json_option
from gramfuse_deployment.terminal import say_text, show_json

PLACES = (Path(__file__).parents[1] / "exit_codes", Path(__file__).parents[3] / "docs" / "exit-codes")
"""Where the pages are: in the package that was installed, or in the sources."""

ALL = "README"
"""The page of all codes."""

ON_ALL = (0, 1, 2, 130)
"""Codes that have a line there, and no page of their own."""


@click.command()
@click.argument("code", type=click.IntRange(0, 255), required=False)
@json_option
def explain(code: int | None, as_json: bool) -> None:
    """Say what the exit code CODE means, what causes it, and what to do; without CODE, list all of them.

    An error ends with its exit code: 'exit code 11' is explained by: gramfuse explain 11
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
