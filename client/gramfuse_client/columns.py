"""What kinds of task have in common in how they read a row of a silo's data.

A label that is a whole number is known by its digits, 1.0 by those of 1. Whatever else is no text (nothing, NaN, true)
is no label.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gramfuse_client.sources import Row
from gramfuse_protocol.errors import DataError
from gramfuse_protocol.task import Task
from gramfuse_protocol.text import listed, quoted

WHOLE = re.compile(r"-?[0-9]+\.0+")
"""A whole number as tables write it whose column has gaps."""

Input = str | tuple[str, ...] | Path | bytes
"""A text; words; an image, as a file or as what is in one."""

Label = int | float | tuple[int, ...] | str | None
"""Index of a label; a number; indices of labels, or of a tag for each word; a target text; nothing."""


def column_of(row: Row, column: str, where: str) -> Any:
    """Return what a row has in a column, or raise DataError naming those that it has."""
    if column not in row:
        raise DataError(
            f"{where}: column {column!r} is missing; columns here: {listed(row, 20)}. "
            "Name yours in [data] of the silo file (text, text-pair, image, label)"
        )
    return row[column]


def text_of(row: Row, column: str, where: str) -> str:
    """Return the text in a column, or raise DataError."""
    value = column_of(row, column, where)
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{where}: column {column!r} must hold text, found {quoted(value)}")
    check_characters(value, column, where)
    return value


def check_characters(text: str, column: str, where: str) -> None:
    """Raise DataError if a text holds what no text is made of."""
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise DataError(f"{where}: column {column!r} holds half of a surrogate pair, which is no text: {quoted(text)}")


def index_of(value: Any, task: Task, known: Mapping[str, int], where: str) -> int:
    """Return the index of a label.

    Args:
        known: indices by what the data call them.

    Raises:
        DataError: if it is none of them.
    """
    name = _name(value)
    if name is None:
        raise DataError(
            f"{where}: a label must be text or a whole number, found {quoted(value)}; write it as text, or leave the "
            "row out. The datasets library makes None of NA, null and empty fields of CSV, and True of true: name the "
            ".csv file itself to have them as they are"
        )
    if name not in known and name not in task.labels and WHOLE.fullmatch(name):
        name = name.partition(".")[0]
    index = known.get(name)
    if index is not None:
        return index
    if name in task.labels:
        raise DataError(
            f"{where}: label {quoted(value)} is not among those that the plan says this silo annotates "
            f"({_few(known)}); leave the example out, or agree on a plan that lists the label in this silo's 'labels'"
        )
    raise DataError(
        f"{where}: unknown label {quoted(value)}; the plan's labels are {_few(known)}. "
        "All silos must use the plan's labels: rename it here, or agree on a plan that has it. Where a silo annotates "
        "only some of them, the plan lists those as 'labels' of its [[silo]]"
    )


def _name(value: Any) -> str | None:
    """Return what a label is called; None if it is none."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value) if isinstance(value, str | int) and not isinstance(value, bool) and value != "" else None


def _few(labels: Mapping[str, int]) -> str:
    return listed(labels, 20)
