"""Tables as text: a header and rows, with fields between delimiters.

In a .csv file a field that begins with a quotation mark ends with the next single one; that is what CSV means. Between
tabs or bars people write that as well as text with quotation marks of its own, and a sentence that begins with one
would swallow all rows up to the next. So such a file is read in both ways. Where they differ, it must be plain which
way was meant, by what no writer does who means the other; or else the file is refused.
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
"""What may stand between the fields of a .csv file; of two that fit alike, the first."""

QUOTING = ",;"
"""Delimiters with which quotation marks are those of CSV."""

LONGEST_FIELD = 2**31 - 1
"""Most characters of a field in CSV."""

LONGEST_HEADER = 2**16
"""So many characters are looked at for the delimiter."""

SPREADSHEET = re.compile(r"sep=([^\r\n\"])(?:\r\n|\r|\n|\Z)", re.IGNORECASE)
"""A line before the header that tells a spreadsheet the delimiter."""

WHOLE = re.compile(r'"(?:[^"\\]|""|\\.)*"', re.DOTALL)
"""A field in quotation marks with those inside doubled, or after a backslash."""

INSIDE = re.compile(r'""|\\"')
"""A quotation mark inside of such a field."""


class _Record(NamedTuple):
    """A row: its first and its last line, from 1 on, and its fields."""

    first: int
    last: int
    fields: list[str]


class _Reading(NamedTuple):
    """A table as it is in one of the two ways.

    Args:
        records: all rows, the header first; blank lines are none.
        error: why there are no further ones, if so.
        line: where that is.
    """

    records: list[_Record]
    error: str = ""
    line: int = 0


def delimited(
    path: Path, text: str, delimiters: str, columns: Collection[str]
) -> Iterator[tuple[str, dict[str, str] | DataError]]:
    """Yield the rows of a table.

    Args:
        path: of the file, for errors.
        delimiters: that may be; a first line as spreadsheets have it (`sep=;`) goes before.
        columns: names that are looked for, by which the delimiter is told.

    Raises:
        DataError: naming the line, if it is no table, or can be read in two ways.
    """
    told = SPREADSHEET.match(text)
    before = csv.field_size_limit(LONGEST_FIELD)  # one for the whole process
    try:
        delimiter = told[1] if told else _delimiter(text[:LONGEST_HEADER], delimiters, columns)
        records = _records(path, text[told.end() :] if told else text, 1 if told is None else 2, delimiter)
    finally:
        csv.field_size_limit(before)
    header = records[0].fields if records else []
    twice = sorted({name for name in header if header.count(name) > 1 and name in columns})
    if twice:
        raise DataError(f"{path}:{records[0].last}: has two columns called {listed(twice)}; rename one of them")
    for record in records[1:]:
        where = f"{path}:{record.last}"
        if len(record.fields) != len(header):
            yield where, DataError(f"{where}: has not as many fields as the header's {len(header)}")
        else:
            yield where, dict(zip(header, record.fields, strict=True))


def _delimiter(text: str, delimiters: str, columns: Collection[str]) -> str:
    """Return the delimiter by which the header has most of the columns, or else most fields."""

    def fit(delimiter: str) -> tuple[int, int]:
        header = next(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter), [])
        return len({*header} & {*columns}), len(header)

    return max(delimiters, key=fit)


def _parse(text: str, line: int, delimiter: str, *, quoted: bool) -> _Reading:
    """Read a table in one way; its first line has the number `line`."""
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
    """Return the rows in the way that was meant."""
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
        f"{path}:{_difference(quoted, plain)}: quotation marks can be read here as those of CSV, around a field, or as "
        "part of the text, and nothing says which is meant; write the file as .jsonl, or put all fields in quotation "
        "marks, the header's too (in Python: csv.QUOTE_ALL)"
    )


def _is_csv(quoted: _Reading, plain: _Reading, delimiter: str) -> bool:
    """Whether quotation marks are those of CSV for certain."""
    if delimiter in QUOTING:
        several = _fits(plain) and _is_filled(quoted, plain) and _joins(quoted, delimiter)
        return bool(quoted.error) or _is_marked(plain) or not several
    if _is_text(quoted, plain, delimiter):
        return False
    return _is_marked(plain) or (not _fits(plain) and _is_needed(quoted, plain))


def _fits(plain: _Reading) -> bool:
    """Whether each line has as many fields as the header, if quotation marks are text."""
    return all(len(record.fields) == len(plain.records[0].fields) for record in plain.records)


def _is_marked(plain: _Reading) -> bool:
    """Whether a field in quotation marks has others inside as CSV writers have them."""
    fields = (field for record in plain.records for field in record.fields)
    return any(WHOLE.fullmatch(field) and INSIDE.search(field, 1, len(field) - 1) for field in fields)


def _is_enclosed(plain: _Reading) -> bool:
    """Whether all of a column is in quotation marks."""
    columns = zip(*(record.fields for record in plain.records[1:]), strict=False)
    return any(all(map(WHOLE.fullmatch, column)) for column in columns)


def _is_text(quoted: _Reading, plain: _Reading, delimiter: str) -> bool:
    """Whether there are quotation marks that no CSV writer makes, or a row over lines that is likely to be several."""
    fields = len(quoted.records[0].fields)
    torn = any(record.first < record.last and len(record.fields) != fields for record in quoted.records)
    return bool(quoted.error) or torn or _joins(quoted, delimiter) or _has_bare(quoted, plain)


def _joins(quoted: _Reading, delimiter: str) -> bool:
    """Whether a field holds a delimiter and the end of a line, as if rows had been swallowed."""
    return any(
        delimiter in field and ("\n" in field or "\r" in field)
        for record in quoted.records
        if record.first < record.last
        for field in record.fields
    )


def _is_filled(quoted: _Reading, plain: _Reading) -> bool:
    """Whether no field of the lines that one row takes up is empty, as after `"Dear all,`, if they are several."""
    lines = {number for record in quoted.records for number in range(record.first, record.last)}
    return all(all(record.fields) for record in plain.records if record.last in lines)


def _has_bare(quoted: _Reading, plain: _Reading) -> bool:
    """Whether there is a quotation mark in a field that is in none."""
    as_text = {record.last: record.fields for record in plain.records}
    return any(
        '"' in field and field == as_text[record.last][number]
        for record in quoted.records
        if record.first == record.last and len(record.fields) == len(as_text[record.last])
        for number, field in enumerate(record.fields)
    )


def _is_needed(quoted: _Reading, plain: _Reading) -> bool:
    """Whether a row has the header's fields only if quotation marks are those of CSV."""
    as_text = {record.last: len(record.fields) for record in plain.records}
    fields = len(quoted.records[0].fields)
    return any(
        len(record.fields) == fields and (record.first < record.last or as_text[record.last] != fields)
        for record in quoted.records
    )


def _difference(quoted: _Reading, plain: _Reading) -> int:
    """Return the first line that the two ways do not have alike."""
    for one, other in zip(quoted.records, plain.records, strict=False):
        if one != other:
            return one.first
    return quoted.line
