"""One row of data becomes an example.

What the columns of a source hold, by kind of task (`text`, `text-pair`, `image`, `label` as [data] names them):

| kind                 | input                                     | label                                            |
|----------------------|-------------------------------------------|--------------------------------------------------|
| classification       | `text` (and `text-pair`): text            | a label of the plan: text, or a whole number     |
| regression           | `text` (and `text-pair`): text            | a finite number; in the plan's range, if results |
|                      |                                           | leave in a secure sum                            |
| multi-label          | `text` (and `text-pair`): text            | a list of labels, [] if none applies; or one     |
| token-classification | `text`: a list of words, or words between | a list of tags, or tags between spaces; as many  |
|                      | white space                               | as words                                         |
| sequence-to-sequence | `text`: text                              | text                                             |
| causal-lm            | `text`: text                              | none                                             |
| image-classification | `image`: a path from where the source is, | a label of the plan                              |
|                      | or bytes of an image file                 |                                                  |

A label that is a whole number is known by its digits, 1.0 by those of 1. Whatever else is no text (nothing, NaN, true)
is no label. Where a format has no lists, as CSV, they are written as in JSON: `["a", "b"]`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gramfuse_client.images import check_image
from gramfuse_client.silo import Data
from gramfuse_client.sources import Row
from gramfuse_client.words import Words
from gramfuse_protocol.errors import DataError
from gramfuse_protocol.task import Task
from gramfuse_protocol.text import listed, quoted

WHOLE = re.compile(r"-?[0-9]+\.0+")
"""A whole number as tables write it whose column has gaps."""

SEVERAL = re.compile(r"[,;|]|^\s*\[")
"""What is in a text that may stand for several labels."""

PRINTED = re.compile(r"\s*\[\s*['\"].*\]\s*", re.DOTALL)
"""A list of texts as Python or numpy prints it."""

Input = str | tuple[str, ...] | Path | bytes
"""A text; words; an image, as a file or as what is in one."""

Label = int | float | tuple[int, ...] | str | None
"""Index of a label; a number; indices of labels, or of a tag for each word; a target text; nothing."""


@dataclass(frozen=True)
class Reader:
    """Reads the rows of one source; all methods raise DataError, which names the row and what was expected.

    Args:
        columns: which of them count.
        task: of the examples.
        known: index of each label by what the data call it.
        folder: where paths of images start.
        words: what errors call settings.
        labelled: whether each row must have a label; a target text it must have in any case.
    """

    columns: Data
    task: Task
    known: Mapping[str, int]
    folder: Path
    words: Words
    labelled: bool

    def example(self, row: Row, where: str) -> tuple[Input, str, Label]:
        """Return the input, its second text and the label in a row.

        Args:
            where: the file and the line, for errors.
        """
        given = self._input(row, where)
        second = self.columns.text_pair
        pair = self._text(row, second, where) if self.task.pair and second is not None else ""
        if not self.labelled and self.task.task != "sequence-to-sequence" and row.get(self.columns.label) is None:
            return given, pair, None
        return given, pair, self._label(row, given, where)

    def _input(self, row: Row, where: str) -> Input:
        match self.task.task:
            case "token-classification":
                return _words(self._column(row, self.columns.text, where), self.columns.text, where)
            case "image-classification":
                column = self.columns.image
                return _image(self._column(row, column, where), column, self.folder, where)
            case _:
                return self._text(row, self.columns.text, where)

    def _label(self, row: Row, given: Input, where: str) -> Label:
        column = self.columns.label
        if self.task.task == "causal-lm":
            return None
        if self.task.task == "sequence-to-sequence":
            return self._text(row, column, where)
        value = self._column(row, column, where)
        match self.task.task:
            case "regression":
                return self._target(value, where)
            case "multi-label":
                return self._labels(value, where)
            case "token-classification":
                assert isinstance(given, tuple)  # noqa: S101
                return self._tags(value, given, where)
            case _:
                return self._index(value, where)

    def _column(self, row: Row, column: str, where: str) -> Any:
        if column not in row:
            raise DataError(
                f"{where}: column {column!r} is missing; columns here: {listed(row, 20)}. {self.words.columns}"
            )
        return row[column]

    def _text(self, row: Row, column: str, where: str) -> str:
        value = self._column(row, column, where)
        if not isinstance(value, str) or not value.strip():
            raise DataError(f"{where}: column {column!r} must hold text, found {quoted(value)}")
        _check_characters(value, column, where)
        return value

    def _index(self, value: Any, where: str) -> int:
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

    def _labels(self, value: Any, where: str) -> tuple[int, ...]:
        """Return the indices of all labels that apply, in the plan's order."""
        column = self.columns.label
        if value is None or value == "":
            raise DataError(
                f"{where}: column {column!r} is empty; write [] if none of the labels applies, or leave the example "
                "out if nobody looked"
            )
        found = _listed(value)
        if isinstance(value, str):
            single = value in self.known or value in self.task.labels
            if single and isinstance(found, list):
                raise DataError(
                    f"{where}: column {column!r} holds {quoted(value)}, which is a label and a list of labels; write "
                    f"{json.dumps([value], ensure_ascii=False)} for that label"
                )
            if not single and found is value and SEVERAL.search(value):
                raise DataError(
                    f"{where}: unknown label {quoted(value)}; several labels are a list as in JSON: "
                    f'["a", "b"], or [] if none applies. {self.words.labels.capitalize()} are {listed(self.known, 20)}'
                )
        values = found if isinstance(found, list) else [value]
        indices = [self._index(one, where) for one in values]
        if len(set(indices)) < len(indices):
            raise DataError(f"{where}: column {column!r} has a label twice: {quoted(value)}")
        return tuple(sorted(indices))

    def _tags(self, value: Any, words: tuple[str, ...], where: str) -> tuple[int, ...]:
        """Return the index of each word's tag. An I-X with no B-X before it begins an entity, as metrics have it."""
        tags = _listed(value)
        if isinstance(tags, str):
            tags = tags.split()
        if not isinstance(tags, list) or len(tags) != len(words):
            many = f"{len(tags)}" if isinstance(tags, list) else quoted(value)
            raise DataError(
                f"{where}: column {self.columns.label!r} must hold one tag for each of the {len(words)} words, found "
                f"{many}"
            )
        return tuple(self._index(tag, where) for tag in tags)

    def _target(self, value: Any, where: str) -> float:
        try:
            target = math.nan if isinstance(value, bool) or "_" in str(value) else float(value)
        except (TypeError, ValueError, OverflowError):
            target = math.nan
        if not math.isfinite(target):
            raise DataError(f"{where}: the target must be a finite number, found {quoted(value)}")
        if self.task.range is not None and not self.task.range[0] <= target <= self.task.range[1]:
            low, high = self.task.range
            raise DataError(
                f"{where}: the target {target:g} is outside of {self.words.range} of {low:g} to {high:g}; "
                f"{self.words.beyond}"
            )
        return target


def _listed(value: Any) -> Any:
    """Return the list that a text holds as JSON, and any other value as it is."""
    if not isinstance(value, str) or not value.lstrip().startswith("["):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def _name(value: Any) -> str | None:
    """Return what a label is called; None if it is none."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value) if isinstance(value, str | int) and not isinstance(value, bool) and value != "" else None


def _words(value: Any, column: str, where: str) -> tuple[str, ...]:
    words = _listed(value)
    if isinstance(words, str):
        if PRINTED.fullmatch(words):
            raise DataError(
                f"{where}: column {column!r} holds a list as Python prints it: {quoted(value)}; write it as in JSON, "
                '["a", "b"], or words between spaces'
            )
        words = words.split()
    if not isinstance(words, list) or not words:
        raise DataError(
            f"{where}: column {column!r} must hold a list of words, or words between spaces, found {quoted(value)}"
        )
    for position, word in enumerate(words, 1):
        if not isinstance(word, str) or not word.strip():
            raise DataError(f"{where}: column {column!r}: word {position} must be text, found {quoted(word)}")
        _check_characters(word, column, where)
    return tuple(words)


def _check_characters(text: str, column: str, where: str) -> None:
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise DataError(f"{where}: column {column!r} holds half of a surrogate pair, which is no text: {quoted(text)}")


def _image(value: Any, column: str, folder: Path, where: str) -> Path | bytes:
    """Return an image after a look at its first bytes; a dataset's column holds `bytes` or `path`, or both."""
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if not isinstance(value, str | bytes) or not value:
        raise DataError(f"{where}: column {column!r} must hold the path of an image, found {quoted(value)}")
    image = folder / value if isinstance(value, str) else value
    if isinstance(image, Path) and not image.is_file():
        raise DataError(f"{where}: column {column!r}: no such file {image}")
    check_image(image, f"{where}: column {column!r}")
    return image
