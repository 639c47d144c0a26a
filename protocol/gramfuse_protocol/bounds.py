"""How large a document that somebody else wrote may be, and how it is taken apart.

A parser's time and memory follow from how many values a document holds and how deep they lie, not from its bytes alone:
a megabyte of brackets takes hundreds of megabytes of objects, and each wrong value an error of a kilobyte. So all that
is counted before anything is parsed, and whatever checks a list or a mapping stops at the first thing that is wrong.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, FailFast, Field

PLAN_CHARACTERS = 2**19
"""Most of a plan or a silo file: a thousand silos with two keys each take two thirds of it."""

LAYOUT_CHARACTERS = 2**22
"""Most of a layout. Its exponents take the room: three characters for each feature of each group."""

HEADER_CHARACTERS = 2**22
"""Most of a message's header without a layout in it."""

VALUES = 2**17
"""Most keys, and most items, of a document."""

LISTS = 2**15
"""Most lists and objects of a document."""

KEYS = 2**14
"""Most keys of one object, and of a whole plan or silo file: each that is wrong is an error of its own."""

FEATURES = 2**21
"""Most items of a document that holds a layout."""

SILOS = 1024
"""Most silos of a plan: with secure aggregation, every message between two of them passes through the coordinator."""

TENSORS = 2**12
"""Most tensors, and most groups, of a layout."""

EXPERTS = 2**12
"""Most experts that one tensor holds."""

DIMENSIONS = 8
"""Most dimensions of a tensor."""

ENTRIES = 2**40
"""Most elements of a contribution: 4 TB."""

T = TypeVar("T")

Many = Annotated[tuple[T, ...], FailFast()]
"""A list that somebody else wrote; the first item that is wrong is the only one that is reported."""

Title = Annotated[str, Field(max_length=512)]
"""What somebody else calls something: a tensor, a group, a pattern."""


def check_size(text: str | bytes, characters: int, items: int = VALUES) -> None:
    """Raise ValueError if a JSON document is too large to be parsed.

    Args:
        characters: most that it may have.
        items: most items of its lists and objects together.
    """
    if len(text) > characters:
        raise ValueError(f"{len(text):,} characters are more than the {characters:,} that such a document may have")
    for marks, most, what in (((":",), VALUES, "keys"), (("[", "{"), LISTS, "lists"), ((",",), items, "items")):
        found = sum(text.count(mark) if isinstance(text, str) else text.count(mark.encode()) for mark in marks)
        if found > most:
            raise ValueError(f"about {found:,} {what} are more than the {most:,} that such a document may have")


def parse_json(text: str | bytes, characters: int, items: int = VALUES) -> Any:
    """Parse a JSON document that somebody else wrote.

    Args:
        text: if bytes, UTF-8.
        characters, items: as `check_size` has them.

    Raises:
        ValueError: if it is too large, nested too deep, no JSON, gives a key twice, or has a number that is none.
    """
    check_size(text, characters, items)
    try:
        return json.loads(
            text.decode("utf-8") if isinstance(text, bytes) else text,
            object_pairs_hook=_distinct,
            parse_constant=_no_number,
        )
    except RecursionError:
        raise ValueError("lists or objects are nested too deep") from None


def check_keys(document: Any, model: type[BaseModel]) -> None:
    """Raise ValueError unless a document has the keys of a model, and no others; of its values nothing is said.

    For each key that is missing, pydantic makes an error with a copy of the whole document in it.
    """
    if not isinstance(document, dict):
        raise ValueError("it is no object")
    fields = {field.alias or name: field for name, field in model.model_fields.items() if not field.exclude}
    if unknown := sorted(document.keys() - fields):
        raise ValueError(f"unknown key {unknown[0][:64]!r}")
    if missing := [key for key, field in fields.items() if field.is_required() and key not in document]:
        raise ValueError(f"{missing[0]!r} is missing")


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(pairs) > KEYS:
        raise ValueError(f"an object has {len(pairs):,} keys, more than the {KEYS:,} that it may have")
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key comes twice")
    return found


def _no_number(constant: str) -> Any:
    raise ValueError(f"{constant} is no number")
