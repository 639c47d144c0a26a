"""What the page of a report is made of; the template says what each looks like."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from markupsafe import Markup

WIDE = 3
"""A table with more columns than this scrolls in itself where the page is narrow."""


@dataclass(frozen=True)
class Bar:
    """A bar from zero.

    Args:
        start, length: where it begins and how long it is, in percent of its room.
        strong: whether it is that of the merged model.
    """

    start: float
    length: float
    strong: bool = False


@dataclass(frozen=True)
class Cell:
    """A cell of a table: text, perhaps with a bar under it."""

    text: str
    bar: Bar | None = None


@dataclass(frozen=True)
class Column:
    """A column of a table; numbers stand to the right."""

    title: str
    number: bool = True


@dataclass(frozen=True)
class Row:
    """A row of a table.

    Args:
        head: what it is about.
        cells: one for each column but the first.
        note: small print under the head.
        strong: whether it is that of the merged model.
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
    rows: Sequence[Row]
    kind: str = field(default="table", init=False)

    @property
    def wide(self) -> bool:
        """Whether it needs more room than a phone has."""
        return len(self.columns) > WIDE


@dataclass(frozen=True)
class Facts:
    """Names and what they are."""

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
    """A point of a curve, x in percent of the width and y in pixels; the label of the x axis stands under it."""

    x: float
    y: float
    label: str
    strong: bool = False


@dataclass(frozen=True)
class Curve:
    """A line through points, in the order of x.

    Args:
        title, description: what it shows, and what there is to see, for those who do not see it.
        axis: what the x axis is.
        dots: its points.
        ticks: y in pixels and text of each tick of the y axis.
    """

    title: str
    description: str
    axis: str
    dots: Sequence[Dot]
    ticks: Sequence[tuple[float, str]]
    kind: str = field(default="curve", init=False)


@dataclass(frozen=True)
class Folded:
    """Blocks that are shown when they are asked for."""

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
    """A side of a run: what it could see, and what not."""

    name: str
    sees: str
    sees_not: str


@dataclass(frozen=True)
class Sides:
    """All sides of a run; each has a heading of its own."""

    sides: Sequence[Side]
    kind: str = field(default="sides", init=False)


@dataclass(frozen=True)
class Notice:
    """Something that went wrong, or nearly: a word that says how bad it is, and what it is."""

    word: str
    text: str
    grave: bool = False
    kind: str = field(default="notice", init=False)


Block = Table | Facts | Text | Code | Curve | Folded | Tiles | Sides | Notice


@dataclass(frozen=True)
class PageSection:
    """A part of the page under a heading of its own; `name` is what links go to."""

    name: str
    title: str
    blocks: Sequence[Block]
