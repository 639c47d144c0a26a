"""What text is taken from others, and how foreign text is shown.

Owners read a plan before they approve it, and operators read what a run says. Text that moves a cursor, turns letters
around or shows nothing would let its author write what they read. So documents and messages whose text is not
printable are refused where they are parsed (`Legible`), and whatever else comes from outside is shown escaped
(`one_line`).

Text is printable if each of its characters shows: all of `str.isprintable` but for the few that are blank all the same,
and no more than `MOST_MARKS` combining marks on one character. That leaves out controls (C0, DEL, C1), separators of
lines and paragraphs, all that orders text or joins it without being seen (bidirectional controls, zero-width spaces and
joiners, U+FEFF), every space but U+0020, surrogates, private use and what Unicode has not assigned. Letters of all
scripts and emoji are printable, flags and skin tones too; emoji and words that need a joiner are not.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, Field, ValidationInfo, field_validator

MOST_MARKS = 4
"""Combining marks on one character: as many as the scripts that use most; more would run into other lines."""

SAID = 300
"""Most characters that are shown of what another side says."""

Word = Annotated[str, Field(pattern=r"^[^ ]+$", max_length=500)]
"""The name of a parameter or group, or a pattern of such names: without spaces."""

_BLANK = frozenset("\u034f\u115f\u1160\u17b4\u17b5\u180b\u180c\u180d\u180f\u2800\u3164\uffa0\U0001d159")
"""Characters that Python calls printable and that show nothing."""

_MARKS = ("Mn", "Me")


def printable(text: str) -> bool:
    """Return whether every character of a text shows, on one line."""
    return (text.isascii() and text.isprintable()) or all(len(shown) == 1 for shown in _characters(text))


def one_line(text: str, limit: int | None = None) -> str:
    """Return foreign text as one line that can be printed anywhere: what is not printable is escaped as in Python.

    Args:
        limit: most characters; of a longer text the rest is cut, and how much that was stands in its place.
    """
    if limit is None or len(text) <= limit:
        shown = text if text.isascii() and text.isprintable() else "".join(_characters(text))
        if limit is None or len(shown) <= limit:
            return shown
    kept, room = [], limit - len(_rest(len(text)))
    for character in _characters(text[:limit]):
        if len(character) > room:
            break
        kept.append(character)
        room -= len(character)
    return "".join(kept) + _rest(len(text) - len(kept))


def lines_of(text: str) -> str:
    """Return text of several lines with each of them as `one_line` gives it."""
    return "\n".join(map(one_line, text.split("\n")))


def quoted(value: object, limit: int = SAID) -> str:
    """Return the repr of a foreign value, as `one_line` gives it."""
    return one_line(repr(value), limit)


def listed(names: Iterable[str], most: int = 8, limit: int = 60) -> str:
    """Return foreign names as `quoted` gives them, between commas; of more than `most` only how many they are."""
    names = list(names)
    shown = [quoted(name, limit) for name in names[:most]]
    return ", ".join(shown) + (f" and {len(names) - most:,} more" if len(names) > most else "")


def _rest(count: int) -> str:
    return f"… ({count:,} characters more)"


def _characters(text: str) -> Iterator[str]:
    """Yield each character as it is, or its escape, which is longer."""
    marks = MOST_MARKS  # a mark at the beginning would be on whatever stands before the text
    for character in text:
        marks = marks + 1 if unicodedata.category(character) in _MARKS else 0
        shows = character.isprintable() and character not in _BLANK and marks <= MOST_MARKS
        yield character if shows else character.encode("unicode_escape").decode("ascii")


def _check(text: str) -> None:
    for place, character in enumerate(_characters(text), 1):
        if len(character) > 1:
            code = ord(text[place - 1])
            name = unicodedata.name(chr(code), "a control character, or none of Unicode")
            raise ValueError(
                f"character {place} is U+{code:04X} ({name}), which a reader does not see; use printable "
                "characters only"
            )


class Legible(BaseModel):
    """A pydantic model all of whose text is printable, whatever its fields are: keys of mappings too.

    Attributes:
        documents: names of fields that hold a whole document; it may have tabs and ends of lines too. Whoever parses it
            checks what it says.
    """

    documents: ClassVar[frozenset[str]] = frozenset()

    @field_validator("*", mode="after")
    @classmethod
    def _is_printable(cls, value: Any, info: ValidationInfo) -> Any:
        lines = value.replace("\t", " ").split("\n") if info.field_name in cls.documents else _texts(value)
        for text in lines:
            if not printable(text):
                _check(text)
        return value


def _texts(value: Any) -> Iterator[str]:
    """Yield all text in a value; models in it have checked their own."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from _texts(tuple(value.keys()))
        yield from _texts(tuple(value.values()))
    elif isinstance(value, tuple | list) and not set(map(type, value)) <= {int, float, bool}:
        for item in value:
            yield from _texts(item)
