"""Which foreign text is accepted, and how foreign text is displayed.

Owners read a plan before they approve it, and operators read a run's output. Text that moves the cursor, reorders
letters or is invisible would let its author forge what they read. So documents and messages with unprintable text are
refused when they are parsed (`Legible`), and all other foreign text is displayed escaped (`one_line`).

Text is printable if each character is visible: `str.isprintable` accepts it, it is not one of the few blank characters
that `str.isprintable` accepts, and no character has more than `MOST_MARKS` combining marks. This excludes controls (C0,
DEL, C1), line and paragraph separators, invisible ordering and joining characters (bidirectional controls, zero-width
spaces and joiners, U+FEFF), every space but U+0020, surrogates, private use and unassigned code points. Letters of all
scripts and emoji are printable, including flags and skin tones; emoji and words that need a joiner are not.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, Field, ValidationInfo, field_validator

MOST_MARKS = 4
"""Maximum number of combining marks on one character: what any script needs; more would overlap other lines."""

QUOTE_LIMIT = 300
"""Maximum number of characters quoted from the other side."""

Word = Annotated[str, Field(pattern=r"^[^ ]+$", max_length=500)]
"""The name of a parameter or group, or a pattern for such names, without spaces."""

_BLANK = frozenset("\u034f\u115f\u1160\u17b4\u17b5\u180b\u180c\u180d\u180f\u2800\u3164\uffa0\U0001d159")
"""Characters that `str.isprintable` accepts but that are invisible."""

_MARKS = ("Mn", "Me")


def printable(text: str) -> bool:
    """Return whether every character of a text is visible, and the text is a single line."""
    return (text.isascii() and text.isprintable()) or all(len(shown) == 1 for shown in _characters(text))


def one_line(text: str, limit: int | None = None) -> str:
    """Return foreign text as one safely printable line; unprintable characters are escaped as in Python.

    Args:
        limit: maximum length; a longer text is cut, and the end says by how many characters.
    """
    if limit is None or len(text) <= limit:
        shown = text if text.isascii() and text.isprintable() else "".join(_characters(text))
        if limit is None or len(shown) <= limit:
            return shown
    kept, room = [], limit - len(_cut_note(len(text)))
    for character in _characters(text[:limit]):
        if len(character) > room:
            break
        kept.append(character)
        room -= len(character)
    return "".join(kept) + _cut_note(len(text) - len(kept))


def lines_of(text: str) -> str:
    """Apply `one_line` to each line of a text."""
    return "\n".join(map(one_line, text.split("\n")))


def quoted(value: object, limit: int = QUOTE_LIMIT) -> str:
    """Return the repr of a foreign value as a printable line (`one_line`)."""
    return one_line(repr(value), limit)


def listed(names: Iterable[str], most: int = 8, limit: int = 60) -> str:
    """Return foreign names `quoted` and comma-separated: the first `most`, then how many more there are."""
    names = list(names)
    shown = [quoted(name, limit) for name in names[:most]]
    return ", ".join(shown) + (f" and {len(names) - most:,} more" if len(names) > most else "")


def _cut_note(count: int) -> str:
    return f"… ({count:,} more characters)"


def _characters(text: str) -> Iterator[str]:
    """Yield each character if it is visible, or else its escape sequence, which is longer."""
    marks = MOST_MARKS  # a mark at the start would combine with whatever is printed before the text
    for character in text:
        marks = marks + 1 if unicodedata.category(character) in _MARKS else 0
        visible = character.isprintable() and character not in _BLANK and marks <= MOST_MARKS
        yield character if visible else character.encode("unicode_escape").decode("ascii")


def _check_printable(text: str) -> None:
    for position, character in enumerate(_characters(text), 1):
        if len(character) > 1:
            code = ord(text[position - 1])
            name = unicodedata.name(chr(code), "a control or unassigned character")
            raise ValueError(
                f"character {position} is U+{code:04X} ({name}), which is not visible; use printable characters only"
            )


class Legible(BaseModel):
    """A pydantic model that accepts printable text only, in all fields, including the keys of mappings.

    Attributes:
        documents: fields that contain a whole document, which may also have tabs and newlines; its own parser checks
            it.
    """

    documents: ClassVar[frozenset[str]] = frozenset()

    @field_validator("*", mode="after")
    @classmethod
    def _is_printable(cls, value: Any, info: ValidationInfo) -> Any:
        lines = value.replace("\t", " ").split("\n") if info.field_name in cls.documents else _texts(value)
        for text in lines:
            if not printable(text):
                _check_printable(text)
        return value


def _texts(value: Any) -> Iterator[str]:
    """Yield all text in a value; nested models have checked their own."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from _texts(tuple(value.keys()))
        yield from _texts(tuple(value.values()))
    elif isinstance(value, tuple | list) and not set(map(type, value)) <= {int, float, bool}:
        for item in value:
            yield from _texts(item)
