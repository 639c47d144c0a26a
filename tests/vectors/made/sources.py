"""Random bytes that are the same every time, and words as text."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import numpy as np

from gramfuse_protocol.secure_sum import masks
from gramfuse_protocol.secure_sum.shares import SHARE_BYTES

Json = dict[str, Any]


class Source:
    """Random bytes that are not: SHA-256 of a name and a counter, block after block."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.blocks = 0

    def __call__(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            data += hashlib.sha256(f"{self.name} {self.blocks}".encode()).digest()
            self.blocks += 1
        return data[:size]

    def integers(self, count: int, bound: int) -> list[int]:
        """Integers from -bound to bound."""
        return [int.from_bytes(self(4), "little") % (2 * bound + 1) - bound for _ in range(count)]


class Recorded:
    """A source that keeps what it gave."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.given = b""

    def __call__(self, size: int) -> bytes:
        data = self.source(size)
        self.given += data
        return data


def hex_of(words: masks.Words) -> str:
    return words.astype("<u8").tobytes().hex()


def replay(data: bytes) -> Callable[[int], bytes]:
    parts = iter([data[at : at + SHARE_BYTES] for at in range(0, len(data), SHARE_BYTES)])
    return lambda size: next(parts)


def stream(key: bytes, count: int, start: int = 0) -> masks.Words:
    words = np.zeros(count, np.uint64)
    masks.apply(words, [masks.Mask(key, 1)], start)
    return words
