"""Reads columns of a row of a silo's data, for all kinds of task.

A label that is a whole number is identified by its digits; 1.0 is the same as 1. Any other value that is not text
(None, NaN, true) is not a label. In a format without lists, such as CSV, lists are written as JSON: `["a", "b"]`.
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
"""Matches a whole number written as a float, as in tables whose column has gaps."""

Input = str | tuple[str, ...] | Path | bytes
"""A text; words; an image, as a file or as the bytes of one."""

Target = int | float | tuple[int, ...] | str | None
"""The index of a label; a number; indices of labels, or of each word's tag; a target text; or no label."""


@dataclass(frozen=True)
class Reader:
    """Reads the rows of one source. All methods raise DataError, naming the row and what was expected.

    Args:
        columns: names of the columns to use.
        task: the examples' task.
        known: index of each label by its name in the data.
        folder: paths of images start here.
        words: names of settings in errors.
        labelled: whether each row must have a label. A label that is an input of the model is always required.
    """

    columns: Data
    task: Task
    known: Mapping[str, int]
    folder: Path
    words: SettingNames
    labelled: bool

    def value(self, row: Row, column: str, where: str) -> Any:
        """Return a row's value in a column.

        Args:
            where: file and line, for errors.
        """
        if column not in row:
            raise DataError(
                f"{where}: column {column!r} is missing; columns here: {listed(row, 20)}. {self.words.columns}"
            )
        return row[column]

    def text(self, row: Row, column: str, where: str) -> str:
        """Return a row's text in a column."""
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
                "the row out. The datasets library reads NA, null and empty fields of CSV as None, and true as True: "
                "name the .csv file itself to read them as text"
            )
        if name not in known and name not in labels and WHOLE.fullmatch(name):
            name = name.partition(".")[0]
        index = known.get(name)
        if index is not None:
            return index
        names = listed(known, 20)
        if name in labels:
            raise DataError(
                f"{where}: label {quoted(value)} is not among those {self.words.annotated} ({names}); "
                f"{self.words.foreign}"
            )
        raise DataError(
            f"{where}: unknown label {quoted(value)}; {self.words.labels} are {names}. {self.words.unknown}"
        )


def unpacked(value: Any) -> Any:
    """Parse a text that holds a JSON list; return any other value unchanged."""
    if not isinstance(value, str) or not value.lstrip().startswith("["):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def check_characters(text: str, column: str, where: str) -> None:
    """Raise DataError if a text holds an unpaired surrogate."""
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise DataError(
            f"{where}: column {column!r} holds half of a surrogate pair, which is not valid text: {quoted(text)}"
        )


def _name(value: Any) -> str | None:
    """Return a label's name; None if the value is not a label."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value) if isinstance(value, str | int) and not isinstance(value, bool) and value != "" else None
