"""Size limits for untrusted documents, and JSON parsing within them.

A parser's time and memory depend on the number of values and on their nesting, not only on bytes: a megabyte of
brackets becomes hundreds of megabytes of objects, and each invalid value an error of a kilobyte. So values are counted
before anything is parsed, and validation of a list or a mapping stops at the first error.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, FailFast, Field

PLAN_CHARACTERS = 2**19
"""Maximum length of a plan or silo file: a thousand silos with two keys each take two thirds of it."""

LAYOUT_CHARACTERS = 2**22
"""Maximum length of a layout; most of it are exponents, three characters for each feature of each group."""

HEADER_CHARACTERS = 2**22
"""Maximum length of a message header that contains no layout."""

VALUES = 2**17
"""Maximum number of keys, and of items, in a document."""

LISTS = 2**15
"""Maximum number of lists and objects in a document."""

KEYS = 2**14
"""Maximum number of keys in one object, and in a whole plan or silo file: each invalid key yields an error."""

FEATURES = 2**21
"""Maximum number of items in a document that contains a layout."""

SILOS = 1024
"""Maximum number of silos in a plan: the coordinator relays a message for each pair in secure aggregation."""

TENSORS = 2**12
"""Maximum number of tensors, and of groups, in a layout."""

EXPERTS = 2**12
"""Maximum number of experts in one tensor."""

DIMENSIONS = 8
"""Maximum number of dimensions of a tensor."""

ENTRIES = 2**40
"""Maximum number of elements in a contribution: 4 TB."""

T = TypeVar("T")

Many = Annotated[tuple[T, ...], FailFast()]
"""An untrusted list; validation stops at the first invalid item."""

Title = Annotated[str, Field(max_length=512)]
"""An untrusted name of a tensor, group or pattern."""


def check_size(text: str | bytes, characters: int, items: int = VALUES) -> None:
    """Raise ValueError if a JSON document is too large to be parsed.

    Args:
        characters: maximum length.
        items: maximum number of items in all lists and objects together.
    """
    if len(text) > characters:
        raise ValueError(f"the document has {len(text):,} characters; the limit is {characters:,}")
    for marks, most, noun in (((":",), VALUES, "keys"), (("[", "{"), LISTS, "lists"), ((",",), items, "items")):
        count = sum(text.count(mark) if isinstance(text, str) else text.count(mark.encode()) for mark in marks)
        if count > most:
            raise ValueError(f"the document has about {count:,} {noun}; the limit is {most:,}")


def parse_json(text: str | bytes, characters: int, items: int = VALUES) -> Any:
    """Parse an untrusted JSON document.

    Args:
        text: the document; bytes are UTF-8.
        characters, items: see `check_size`.

    Raises:
        ValueError: if it is too large, nested too deeply, not JSON, repeats a key, or contains NaN or Infinity.
    """
    check_size(text, characters, items)
    try:
        return json.loads(
            text.decode("utf-8") if isinstance(text, bytes) else text,
            object_pairs_hook=_without_duplicates,
            parse_constant=_refuse_constant,
        )
    except RecursionError:
        raise ValueError("lists or objects are nested too deeply") from None


def check_keys(document: Any, model: type[BaseModel]) -> None:
    """Raise ValueError unless a document has exactly the keys of a model; values are not checked.

    Pydantic would copy the whole document into an error for each missing key.
    """
    if not isinstance(document, dict):
        raise ValueError("expected a JSON object")
    fields = {field.alias or name: field for name, field in model.model_fields.items() if not field.exclude}
    if unknown := sorted(document.keys() - fields):
        raise ValueError(f"unknown key {unknown[0][:64]!r}")
    if missing := [key for key, field in fields.items() if field.is_required() and key not in document]:
        raise ValueError(f"{missing[0]!r} is missing")


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(pairs) > KEYS:
        raise ValueError(f"an object has {len(pairs):,} keys; the limit is {KEYS:,}")
    distinct = dict(pairs)
    if len(distinct) != len(pairs):
        raise ValueError("an object repeats a key")
    return distinct


def _refuse_constant(constant: str) -> Any:
    raise ValueError(f"{constant} is not a JSON number")
