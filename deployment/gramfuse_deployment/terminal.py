"""The only way to the terminal: everything is printed through this module, as plain text.

Much of what gramfuse prints was written by others: names, labels, reasons, logs. So markup, emoji codes and control
characters have no effect, each printed line stays one line (`gramfuse_protocol.text.one_line`), and a mark shows where
a terminal folds it: text cannot move the cursor over other text, start a new line, or push the rest out of sight.
A test checks that nothing bypasses this module.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable
from typing import Any, Literal

import click
from rich import table
from rich.box import HEAVY_HEAD, SIMPLE_HEAD
from rich.cells import cell_len
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

from gramfuse_protocol.text import one_line

LINE = 2000
"""Maximum number of characters in a line or a table cell."""
PIPE_COLUMNS = 160
"""Width to assume for a pipe, which has none; grep needs unfolded lines."""
FOLD = "│ "
"""Marks the continuation of a folded line."""


def console(*, err: bool = False) -> Console:
    """Return a console without markup, emoji codes and automatic highlighting."""
    stream = sys.stderr if err else sys.stdout
    return Console(
        stderr=err, width=None if stream.isatty() else PIPE_COLUMNS, markup=False, emoji=False, highlight=False
    )


def say(
    *lines: str,
    err: bool = False,
    style: str = "",
    lead: tuple[str, str] = ("", ""),
    indent: int = 0,
    copied: bool = False,
    on: Console | None = None,
) -> None:
    """Print each line on a line of its own, folded only if the terminal is too narrow.

    Args:
        err: print on standard error.
        style: rich style of all lines.
        lead: our own text before the first line, and its style.
        indent: column at which a folded line continues.
        copied: print lines whole and unfolded, because users copy them from the terminal. Such a line must not contain
            free text from others.
        on: the console that shows progress bars, if there are any; overrides `err`.
    """
    target = on or console(err=err)
    for number, line in enumerate(lines):
        text = Text.assemble(lead if number == 0 else "", one_line(line, None if copied else LINE), style=style)
        parts = [text]
        if not copied and target.is_terminal and cell_len(text.plain) > target.width:
            fold = " " * min(indent, target.width // 2) + FOLD
            first, *_ = text.wrap(target, target.width)
            rest = _lstrip(text[len(first.plain) :])
            parts = [first, *(Text.assemble(fold, part) for part in rest.wrap(target, target.width - len(fold)))]
        target.print(Text("\n").join(parts), soft_wrap=True)


def _lstrip(text: Text) -> Text:
    """Return text without leading white space."""
    return text[len(text.plain) - len(text.plain.lstrip()) :]


def say_text(text: str, **options: Any) -> None:
    """Print our own text of several lines with `say`. Whatever it quotes must already be one line."""
    say(*text.split("\n"), **options)


def uncoloured(text: str) -> str:
    """Strip ANSI colours from the log of a program that we run."""
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


def show_json(document: Any) -> None:
    """Print one JSON object, in printable ASCII."""
    click.echo(json.dumps(document).replace("\x7f", "\\u007f"))


def ask_secret(prompt: str, *, twice: bool = False) -> str:
    """Prompt for a secret on standard error without echo; with `twice`, ask for it again to confirm."""
    return str(click.prompt(one_line(prompt), hide_input=True, confirmation_prompt=twice, err=True))


class Table(table.Table):
    """A table of plain text. A cell is one line, or a tuple of lines.

    Args:
        title: printed above the table, left-aligned.
        plain: draw only a line under the column heads, no borders.
        footer: whether columns have footers.
    """

    def __init__(self, title: str = "", *, plain: bool = True, footer: bool = False) -> None:
        super().__init__(
            title=Text(one_line(title, LINE), "bold") if title else None,
            title_justify="left",
            box=SIMPLE_HEAD if plain else HEAVY_HEAD,
            show_footer=footer,
        )

    def column(
        self, head: str, foot: str = "", *, justify: Literal["left", "right"] = "left", fold: bool = False
    ) -> None:
        """Add a column; with `fold`, it wraps if the table is too wide."""
        self.add_column(
            Text(one_line(head, LINE)),
            Text(one_line(foot, LINE)),
            justify=justify,
            overflow="fold" if fold else "ellipsis",
            no_wrap=not fold,
        )

    def row(self, *cells: str | tuple[str, ...], style: str = "") -> None:
        """Add a row; a tuple is a cell of several lines."""
        parts = ((cell,) if isinstance(cell, str) else cell for cell in cells)
        self.add_row(*(Text("\n".join(one_line(line, LINE) for line in part)) for part in parts), style=style)

    def show(self) -> None:
        """Print the table on standard output."""
        console().print(self)


def say_list(lines: Iterable[str]) -> None:
    """Print lines as a bulleted list with hanging indent."""
    grid = table.Table.grid(padding=(0, 1, 0, 0))
    for line in lines:
        grid.add_row("  •", Text(one_line(line, LINE)))
    console().print(grid)


def bars(*fields: str) -> Progress:
    """Return progress bars on standard error; they are drawn only on a terminal.

    Args:
        fields: rich format strings of the columns before each bar.
    """
    target = console(err=True)
    return Progress(
        *(TextColumn(field, markup=False) for field in fields),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=target,
        transient=True,
        disable=not target.is_terminal,
    )
