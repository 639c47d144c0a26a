"""Changes to bytes, texts and documents, drawn at random."""

from __future__ import annotations

import copy
import json
import random
import re
from collections.abc import Iterator
from typing import Any

from gramfuse_protocol.canonical import canonical_json

JUNK: list[Any] = [
    None, True, -1, 0, 1.5, 2**31, 2**53, 10**30, 10**400, float("nan"), float("inf"), "", "a", "A" * 5000,
    "\x00\n\x1b", "\ud800", "\u202e", [], {}, [[]], [1] * 300, {"a": 1}, [None], {"": {}}, "ab" * 32, "1" * 5000,
    [["x", "uint64", [2**60]]],
]  # fmt: skip

TOKENS = re.compile(r'"(?:[^"\\]|\\.)*"|-?\d+(?:\.\d+)?(?:e-?\d+)?|[\[\]{}:,=.]|[A-Za-z_-]+|\n')

WORDS = [
    "null", "true", "NaN", "-Infinity", "1e999", "-0", "9" * 5000, "0x" + "f" * 6000, '"\\ud800"', '"\\u0000"', "]",
    "}", "[" * 3000, "{" * 3000, '{"a":' * 1500, ",", ":", '"', "'", '"""', "#", "\n", "=", ".", "a.b.c", "[[silo]]",
    "inf", "1979-05-27", "", " ", "[]", "{}", '"' + "x" * 3000 + '"', ".".join("a" * 60), "\u2028", "é",
]  # fmt: skip


def changed_bytes(draw: random.Random, data: bytes, other: bytes) -> bytes:
    """Flip, cut, repeat, insert, splice, or edit what looks like a length."""
    changed = bytearray(data)
    for _ in range(draw.choice((1, 1, 1, 2, 5))):
        place = draw.randrange(len(changed) + 1)
        match draw.randrange(8):
            case 0 if changed:
                changed[place % len(changed)] ^= 1 << draw.randrange(8)
            case 1:
                del changed[place:]
            case 2:
                del changed[place : place + draw.choice((1, 2, 8, 100))]
            case 3:
                changed[place:place] = changed[place : place + draw.choice((1, 8, 100))]
            case 4:
                changed[place:place] = draw.randbytes(draw.choice((1, 4, 40)))
            case 5:
                start = draw.randrange(len(other) + 1)
                changed[place : place + 20] = other[start : start + draw.choice((1, 20, 200))]
            case 6:
                size = draw.choice((0, 1, 255, 2**16 - 1, 2**31, 2**32 - 1, 2**63, len(data), len(data) + 1))
                width = draw.choice((2, 4, 8))
                at = draw.choice((0, 0, 8, place))
                changed[at : at + width] = (size % 256**width).to_bytes(width, "little")
            case _:
                changed[place : place + 1] = bytes([draw.choice((0, 10, 0x1B, 0x80, 0xC0, 0xED, 0xFF))])
    return bytes(changed)


def changed_text(draw: random.Random, text: str, other: str) -> str:
    """Replace, repeat, drop and exchange tokens; what is left may or may not be of the language."""
    tokens = list(TOKENS.finditer(text))
    if not tokens:
        return draw.choice(WORDS)
    for _ in range(draw.choice((1, 1, 2, 4))):
        token, second = draw.choice(tokens), draw.choice(tokens)
        match draw.randrange(6):
            case 0 | 1:
                text = text[: token.start()] + draw.choice(WORDS) + text[token.end() :]
            case 2:
                text = text[: token.start()] + text[token.end() :]
            case 3:
                text = text[: token.end()] + text[token.start() :]
            case 4:
                first, last = sorted((token.start(), second.end()))
                text = text[:last] + "," * draw.randrange(2) + text[first:]
            case _:
                strange = draw.choice(list(TOKENS.finditer(other)) or tokens)
                text = text[: token.start()] + strange.group() + text[token.end() :]
    return text


def changed_document(draw: random.Random, document: Any) -> Any:
    """Put junk, or a part of the document itself, in the place of one of its parts; or add, drop and rename one."""
    document = copy.deepcopy(document)
    for _ in range(draw.choice((1, 1, 2, 3))):
        places = list(_places(document))
        if not places:
            return None
        holder, key = draw.choice(places)
        match draw.randrange(6):
            case 0 | 1 | 2:
                holder[key] = copy.deepcopy(draw.choice(JUNK))
            case 3:
                other, at = draw.choice(places)
                holder[key] = copy.deepcopy(other[at])
            case 4:
                del holder[key]
            case _ if isinstance(holder, dict):
                holder[draw.choice(("", "x", "phase", "arrays", "\ud800", "a" * 3000))] = copy.deepcopy(
                    draw.choice(JUNK)
                )
            case _:
                holder.extend(copy.deepcopy(holder))
    return document


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in keys:
        yield value, key
        yield from _places(value[key])


def written(draw: random.Random, document: Any) -> str:
    """Write a document as JSON: in canonical form where it has one, or in another."""
    if draw.random() < 0.7:
        try:
            return canonical_json(document).decode()
        except (ValueError, RecursionError):
            pass
    try:
        return json.dumps(document, ensure_ascii=draw.random() < 0.5)
    except (ValueError, RecursionError):
        return "[" * 2000
