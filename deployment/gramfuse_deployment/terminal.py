"""The one way to a terminal. Whatever is printed goes through here, and nothing in it is obeyed.

Much of what gramfuse prints was written by others: names, labels, reasons, logs. So nothing is markup, an emoji code or
a control, each line that is said is one line (`gramfuse_protocol.text.one_line`), and a line that a terminal has to
fold shows that it goes on: text cannot move the cursor over other text, begin a line, or push the rest out of sight.
A test sees to it that nothing is printed past this module.
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
"""Most characters of a line or of a table's cell."""
PIPE_COLUMNS = 160
"""A pipe has no width, and lines that are folded in one are of no use to grep."""
FOLD = "│ "
"""Stands where a folded line goes on."""


def console(*, err: bool = False) -> Console:
    """Return a console that takes no markup and no emoji codes, and colours nothing by itself."""
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
    """Print lines, each on one line of its own, folded only on a terminal that is too narrow.

    Args:
        err: on standard error.
        style: of all of it.
        lead: words of ours before the first line, and their style.
        indent: where a line that is folded goes on.
        copied: for lines that are copied from the terminal, which are whole: none may hold free text of others.
        on: the console that bars are drawn on, where there are some; `err` does not count then.
    """
    here = on or console(err=err)
    for number, line in enumerate(lines):
        text = Text.assemble(lead if number == 0 else "", one_line(line, None if copied else LINE), style=style)
        parts = [text]
        if not copied and here.is_terminal and cell_len(text.plain) > here.width:
            fold = " " * min(indent, here.width // 2) + FOLD
            first, *_ = text.wrap(here, here.width)
            rest = text[len(first.plain) :]
            parts = [first, *(Text.assemble(fold, part) for part in _left(rest).wrap(here, here.width - len(fold)))]
        here.print(Text("\n").join(parts), soft_wrap=True)


def _left(text: Text) -> Text:
    """Return text without the spaces at its beginning."""
    return text[len(text.plain) - len(text.plain.lstrip()) :]


def say_text(text: str, **options: Any) -> None:
    """Print text of several lines that is ours, as `say` prints them; what it quotes is one line already."""
    say(*text.split("\n"), **options)


def uncoloured(text: str) -> str:
    """Return what a program that we run wrote to its log, without its colours."""
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


def show_json(document: Any) -> None:
    """Print one JSON object, in visible ASCII."""
    click.echo(json.dumps(document).replace("\x7f", "\\u007f"))


def ask_secret(what: str, *, twice: bool = False) -> str:
    """Ask for a secret on the terminal, on standard error, and show none of it; `twice` has it typed again."""
    return str(click.prompt(one_line(what), hide_input=True, confirmation_prompt=twice, err=True))


class Table(table.Table):
    """A table whose text is plain: a cell is one line, or several that are given one by one.

    Args:
        title: over it, to the left.
        plain: without borders but for a line under the heads.
        footer: whether columns have something at their foot.
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
        """Add a column; one that folds gives way where the table is too wide."""
        self.add_column(
            Text(one_line(head, LINE)),
            Text(one_line(foot, LINE)),
            justify=justify,
            overflow="fold" if fold else "ellipsis",
            no_wrap=not fold,
        )

    def row(self, *cells: str | tuple[str, ...], style: str = "") -> None:
        """Add a row; a cell that is a tuple has several lines."""
        parts = ((cell,) if isinstance(cell, str) else cell for cell in cells)
        self.add_row(*(Text("\n".join(one_line(line, LINE) for line in part)) for part in parts), style=style)

    def show(self) -> None:
        """Print it on standard output."""
        console().print(self)


def say_list(lines: Iterable[str]) -> None:
    """Print lines as a list; a line that is folded goes on where it began."""
    grid = table.Table.grid(padding=(0, 1, 0, 0))
    for line in lines:
        grid.add_row("  •", Text(one_line(line, LINE)))
    console().print(grid)


def bars(*fields: str) -> Progress:
    """Return bars on standard error, which are drawn only on a terminal.

    Args:
        fields: what stands before each bar, as formats of its task.
    """
    here = console(err=True)
    return Progress(
        *(TextColumn(field, markup=False) for field in fields),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=here,
        transient=True,
        disable=not here.is_terminal,
    )
