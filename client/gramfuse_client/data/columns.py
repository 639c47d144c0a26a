"""What kinds of task have in common in how they read a row of a silo's data.

A label that is a whole number is known by its digits, 1.0 by those of 1. Whatever else is no text (nothing, NaN, true)
is no label. Where a format has no lists, as CSV, they are written as in JSON: `["a", "b"]`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gramfuse_client.data.formats import Row
from gramfuse_client.data.setting_names import SettingNames
from gramfuse_client.silo_file import Data
from gramfuse_protocol.contract.task import Task
from gramfuse_protocol.errors import DataError
from gramfuse_protocol.text import listed, quoted

WHOLE = re.compile(r"-?[0-9]+\.0+")
"""A whole number as tables write it whose column has gaps."""

Input = str | tuple[str, ...] | Path | bytes
"""A text; words; an image, as a file or as what is in one."""

Label = int | float | tuple[int, ...] | str | None
"""Index of a label; a number; indices of labels, or of a tag for each word; a target text; nothing."""


@dataclass(frozen=True)
class Reader:
    """Reads what is in the rows of one source; all methods raise DataError, which names the row and what was expected.

    Args:
        columns: which of them count.
        task: of the examples.
        known: index of each label by what the data call it.
        folder: where paths of images start.
        words: what errors call settings.
        labelled: whether each row must have a label; one that is an input of the model it must have in any case.
    """

    columns: Data
    task: Task
    known: Mapping[str, int]
    folder: Path
    words: SettingNames
    labelled: bool

    def value(self, row: Row, column: str, where: str) -> Any:
        """Return what a row has in a column.

        Args:
            where: the file and the line, for errors.
        """
        if column not in row:
            raise DataError(
                f"{where}: column {column!r} is missing; columns here: {listed(row, 20)}. {self.words.columns}"
            )
        return row[column]

    def text(self, row: Row, column: str, where: str) -> str:
        """Return the text in a column."""
        value = self.value(row, column, where)
        if not isinstance(value, str) or not value.strip():
            raise DataError(f"{where}: column {column!r} must hold text, found {quoted(value)}")
        check_characters(value, column, where)
        return value

    def index(self, value: Any, where: str) -> int:
        """Return the index of a label."""
        name, known, labels = _name(value), self.known, self.task.labels
        if name is None:
            raise DataError(
                f"{where}: a label must be text or a whole number, found {quoted(value)}; write it as text, or leave "
                "the row out. The datasets library makes None of NA, null and empty fields of CSV, and True of true: "
                "name the .csv file itself to have them as they are"
            )
        if name not in known and name not in labels and WHOLE.fullmatch(name):
            name = name.partition(".")[0]
        index = known.get(name)
        if index is not None:
            return index
        few = listed(known, 20)
        if name in labels:
            raise DataError(
                f"{where}: label {quoted(value)} is not among those {self.words.annotated} ({few}); "
                f"{self.words.foreign}"
            )
        raise DataError(f"{where}: unknown label {quoted(value)}; {self.words.labels} are {few}. {self.words.unknown}")


def unpacked(value: Any) -> Any:
    """Return the list that a text holds as JSON, and any other value as it is."""
    if not isinstance(value, str) or not value.lstrip().startswith("["):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def check_characters(text: str, column: str, where: str) -> None:
    """Raise DataError if a text holds what no text is made of."""
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise DataError(f"{where}: column {column!r} holds half of a surrogate pair, which is no text: {quoted(text)}")


def _name(value: Any) -> str | None:
    """Return what a label is called; None if it is none."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value) if isinstance(value, str | int) and not isinstance(value, bool) and value != "" else None
