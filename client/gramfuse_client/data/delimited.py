"""Reads delimited text: a header and rows of fields.

In CSV, a field that begins with a quotation mark ends at the next single one. Tab- and bar-separated files may follow
that rule, or may contain quotation marks as plain text; then a field that begins with one would swallow all rows up to
the next. So such a file is parsed both ways. If the results differ, the file must contain something that only one kind
of writer produces; otherwise it is refused.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from gramfuse_protocol.errors import DataError
from gramfuse_protocol.text import listed

DELIMITERS = ",;\t|"
"""Possible delimiters of a .csv file; if two fit equally well, the first is used."""

QUOTING = ",;"
"""Delimiters with which quotation marks follow the CSV rule."""

LONGEST_FIELD = 2**31 - 1
"""Maximum number of characters in a CSV field."""

LONGEST_HEADER = 2**16
"""Number of characters to examine for the delimiter."""

SPREADSHEET = re.compile(r"sep=([^\r\n\"])(?:\r\n|\r|\n|\Z)", re.IGNORECASE)
"""Matches a line before the header that tells spreadsheets the delimiter."""

WHOLE = re.compile(r'"(?:[^"\\]|""|\\.)*"', re.DOTALL)
"""Matches a field in quotation marks, with inner ones doubled or after a backslash."""

INSIDE = re.compile(r'""|\\"')
"""Matches a quotation mark inside such a field."""


class _Record(NamedTuple):
    """A row: its first and last line, counted from 1, and its fields."""

    first: int
    last: int
    fields: list[str]


class _Reading(NamedTuple):
    """The result of parsing a table in one of the two ways.

    Args:
        records: all rows, starting with the header; without blank lines.
        error: why parsing stopped, if it did.
        line: the line at which it stopped.
    """

    records: list[_Record]
    error: str = ""
    line: int = 0


def delimited(
    path: Path, text: str, delimiters: str, columns: Collection[str]
) -> Iterator[tuple[str, dict[str, str] | DataError]]:
    """Yield (file and line, row) for the rows of a table; a row with a wrong number of fields is a DataError.

    Args:
        path: the file, for errors.
        delimiters: the possible delimiters; a spreadsheet's first line (`sep=;`) overrides them.
        columns: names of wanted columns, which decide between delimiters.

    Raises:
        DataError: naming the line, if the text is not a table, or is ambiguous.
    """
    sep = SPREADSHEET.match(text)
    limit = csv.field_size_limit(LONGEST_FIELD)  # a setting of the whole process
    try:
        delimiter = sep[1] if sep else _delimiter(text[:LONGEST_HEADER], delimiters, columns)
        records = _records(path, text[sep.end() :] if sep else text, 1 if sep is None else 2, delimiter)
    finally:
        csv.field_size_limit(limit)
    header = records[0].fields if records else []
    twice = sorted({name for name in header if header.count(name) > 1 and name in columns})
    if twice:
        raise DataError(f"{path}:{records[0].last}: has two columns called {listed(twice)}; rename one of them")
    for record in records[1:]:
        where = f"{path}:{record.last}"
        if len(record.fields) != len(header):
            yield where, DataError(f"{where}: has {len(record.fields)} fields, but the header has {len(header)}")
        else:
            yield where, dict(zip(header, record.fields, strict=True))


def _delimiter(text: str, delimiters: str, columns: Collection[str]) -> str:
    """Return the delimiter that gives the header most wanted columns; of a tie, the one that gives most fields."""

    def fit(delimiter: str) -> tuple[int, int]:
        header = next(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter), [])
        return len({*header} & {*columns}), len(header)

    return max(delimiters, key=fit)


def _parse(text: str, line: int, delimiter: str, *, quoted: bool) -> _Reading:
    """Parse a table, with or without the CSV rule for quotation marks; its first line has the number `line`."""
    reader = csv.reader(
        io.StringIO(text, newline=""),
        delimiter=delimiter,
        quoting=csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE,
        strict=quoted,
    )
    records: list[_Record] = []
    first = line
    try:
        for fields in reader:
            last = line + reader.line_num - 1
            if fields:
                records.append(_Record(first, last, fields))
            first = last + 1
    except csv.Error as error:
        return _Reading(records, str(error), first)
    return _Reading(records)


def _records(path: Path, text: str, line: int, delimiter: str) -> Sequence[_Record]:
    """Return the rows, parsed in the way that the writer meant."""
    quoted = _parse(text, line, delimiter, quoted=True)
    plain = _parse(text, line, delimiter, quoted=False) if '"' in text else quoted
    if quoted == plain:
        return quoted.records
    header = plain.records[0].fields
    if any(name.startswith('"') for name in header) or _is_csv(quoted, plain, delimiter):
        if quoted.error:
            raise DataError(f"{path}:{quoted.line}: not valid CSV: {quoted.error}")
        return quoted.records
    surely_text = _is_text(quoted, plain, delimiter) and not (_is_marked(plain) or _is_enclosed(plain))
    if delimiter not in QUOTING and _fits(plain) and surely_text:
        return plain.records
    raise DataError(
        f"{path}:{_difference(quoted, plain)}: quotation marks here could enclose a field, as in CSV, or be part of "
        "the text; write the file as .jsonl, or put all fields in quotation marks, including the header's (in Python: "
        "csv.QUOTE_ALL)"
    )


def _is_csv(quoted: _Reading, plain: _Reading, delimiter: str) -> bool:
    """Return whether quotation marks certainly follow the CSV rule."""
    if delimiter in QUOTING:
        several = _fits(plain) and _is_filled(quoted, plain) and _joins(quoted, delimiter)
        return bool(quoted.error) or _is_marked(plain) or not several
    if _is_text(quoted, plain, delimiter):
        return False
    return _is_marked(plain) or (not _fits(plain) and _is_needed(quoted, plain))


def _fits(plain: _Reading) -> bool:
    """Return whether each line has as many fields as the header, if quotation marks are text."""
    return all(len(record.fields) == len(plain.records[0].fields) for record in plain.records)


def _is_marked(plain: _Reading) -> bool:
    """Return whether a quoted field has inner quotation marks escaped the way CSV writers do."""
    fields = (field for record in plain.records for field in record.fields)
    return any(WHOLE.fullmatch(field) and INSIDE.search(field, 1, len(field) - 1) for field in fields)


def _is_enclosed(plain: _Reading) -> bool:
    """Return whether every field of some column is in quotation marks."""
    columns = zip(*(record.fields for record in plain.records[1:]), strict=False)
    return any(all(map(WHOLE.fullmatch, column)) for column in columns)


def _is_text(quoted: _Reading, plain: _Reading, delimiter: str) -> bool:
    """Return whether quotation marks are used as no CSV writer would, or a multi-line row is likely several rows."""
    fields = len(quoted.records[0].fields)
    torn = any(record.first < record.last and len(record.fields) != fields for record in quoted.records)
    return bool(quoted.error) or torn or _joins(quoted, delimiter) or _has_bare(quoted, plain)


def _joins(quoted: _Reading, delimiter: str) -> bool:
    """Return whether a field holds a delimiter and a line break, as if it had swallowed rows."""
    return any(
        delimiter in field and ("\n" in field or "\r" in field)
        for record in quoted.records
        if record.first < record.last
        for field in record.fields
    )


def _is_filled(quoted: _Reading, plain: _Reading) -> bool:
    """Return whether the lines of each multi-line row, split as text, have no empty field (as after `"Dear all,`)."""
    lines = {number for record in quoted.records for number in range(record.first, record.last)}
    return all(all(record.fields) for record in plain.records if record.last in lines)


def _has_bare(quoted: _Reading, plain: _Reading) -> bool:
    """Return whether an unquoted field contains a quotation mark."""
    as_text = {record.last: record.fields for record in plain.records}
    return any(
        '"' in field and field == as_text[record.last][number]
        for record in quoted.records
        if record.first == record.last and len(record.fields) == len(as_text[record.last])
        for number, field in enumerate(record.fields)
    )


def _is_needed(quoted: _Reading, plain: _Reading) -> bool:
    """Return whether a row has as many fields as the header only under the CSV rule."""
    as_text = {record.last: len(record.fields) for record in plain.records}
    fields = len(quoted.records[0].fields)
    return any(
        len(record.fields) == fields and (record.first < record.last or as_text[record.last] != fields)
        for record in quoted.records
    )


def _difference(quoted: _Reading, plain: _Reading) -> int:
    """Return the first line at which the two readings differ."""
    for one, other in zip(quoted.records, plain.records, strict=False):
        if one != other:
            return one.first
    return quoted.line
