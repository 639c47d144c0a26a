"""The building blocks of a report's page; the template renders them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from markupsafe import Markup

WIDE = 3
"""Tables with more columns than this scroll on narrow screens."""


@dataclass(frozen=True)
class Bar:
    """A bar from zero.

    Args:
        start, length: position and length, in percent of the available width.
        strong: whether it belongs to the merged model.
    """

    start: float
    length: float
    strong: bool = False


@dataclass(frozen=True)
class Cell:
    """A cell of a table: text, with an optional bar under it."""

    text: str
    bar: Bar | None = None


@dataclass(frozen=True)
class Column:
    """A column of a table; numbers are right-aligned."""

    title: str
    number: bool = True


@dataclass(frozen=True)
class TableRow:
    """A row of a table.

    Args:
        head: text of the first column.
        cells: one for each other column.
        note: small print under the head.
        strong: whether it belongs to the merged model.
    """

    head: str
    cells: Sequence[Cell]
    note: str = ""
    strong: bool = False


@dataclass(frozen=True)
class Table:
    """A table with a caption; its first column heads the rows."""

    caption: str
    columns: Sequence[Column]
    rows: Sequence[TableRow]
    kind: str = field(default="table", init=False)

    @property
    def wide(self) -> bool:
        """Whether it is too wide for a phone."""
        return len(self.columns) > WIDE


@dataclass(frozen=True)
class Facts:
    """A list of names and values."""

    entries: Sequence[tuple[str, str | Markup]]
    kind: str = field(default="facts", init=False)


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str | Markup
    kind: str = field(default="text", init=False)


@dataclass(frozen=True)
class Code:
    """Lines to copy."""

    label: str
    text: str
    kind: str = field(default="code", init=False)


@dataclass(frozen=True)
class Dot:
    """A point of a curve: x in percent of the width, y in pixels, and its label on the x axis."""

    x: float
    y: float
    label: str
    strong: bool = False


@dataclass(frozen=True)
class Curve:
    """A line through points, in the order of x.

    Args:
        title, description: its caption, and a text for screen readers.
        axis: label of the x axis.
        dots: its points.
        ticks: (y in pixels, text) of each tick on the y axis.
    """

    title: str
    description: str
    axis: str
    dots: Sequence[Dot]
    ticks: Sequence[tuple[float, str]]
    kind: str = field(default="curve", init=False)


@dataclass(frozen=True)
class Folded:
    """Blocks that are folded until the reader opens them."""

    summary: str
    blocks: Sequence[Block]
    kind: str = field(default="folded", init=False)


@dataclass(frozen=True)
class Tile:
    """A figure in large print, with a bar."""

    title: str
    value: str
    note: str
    bar: Bar | None
    strong: bool = False


@dataclass(frozen=True)
class Tiles:
    """Figures side by side."""

    tiles: Sequence[Tile]
    kind: str = field(default="tiles", init=False)


@dataclass(frozen=True)
class Side:
    """What one side of a run could see, and what not."""

    name: str
    sees: str
    sees_not: str


@dataclass(frozen=True)
class Sides:
    """All sides of a run, each with its own heading."""

    sides: Sequence[Side]
    kind: str = field(default="sides", init=False)


@dataclass(frozen=True)
class Notice:
    """A warning or failure: a word for its severity, and a text."""

    word: str
    text: str
    grave: bool = False
    kind: str = field(default="notice", init=False)


Block = Table | Facts | Text | Code | Curve | Folded | Tiles | Sides | Notice


@dataclass(frozen=True)
class PageSection:
    """A section of the page; `name` is its anchor."""

    name: str
    title: str
    blocks: Sequence[Block]
