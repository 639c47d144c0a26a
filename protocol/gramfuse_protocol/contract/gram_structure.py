"""The structure of a Gram matrix: which entries are kept.

A Gram matrix of d features is kept as a block diagonal of symmetric blocks, each of b consecutive features; if b does
not divide d, the last block is smaller. `full` is one block of d, `diagonal` is d blocks of one. Packed, each block is
its upper triangle row by row (b(b+1)/2 entries), blocks in order. The Gram matrices of several experts follow one
another, each in such blocks.

Everything that depends on the structure is here: to add one, extend `parse_structure`, `describe` and `Blocks`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[Any]


def parse_structure(text: str) -> int | None:
    """Parse a plan's Gram structure into a block width: None for `full`, 1 for `diagonal`.

    Raises:
        ValueError: unless the text is `full`, `diagonal`, or `block:<b>` with b ≥ 1.
    """
    if text == "full":
        return None
    if text == "diagonal":
        return 1
    name, _, width = text.partition(":")
    if name == "block" and width.isascii() and width.isdigit() and int(width) >= 1:
        return int(width)
    raise ValueError(f"{text!r} is not a Gram structure; expected 'full', 'block:<width>' or 'diagonal'")


def describe(structure: str, d: int, experts: int | None = None) -> str:
    """Describe the Gram matrices that a structure keeps, for people.

    Args:
        d: number of features.
        experts: number of experts with a matrix each, if there are any.
    """
    square, whose = f"{d:,} × {d:,}", f" of each of {experts} experts" if experts else ""
    width = parse_structure(structure)
    if width is None:
        return f"Gram matrix{whose}, {square}, upper half"
    if width == 1:
        return f"Gram matrix{whose}, diagonal of {square}"
    return f"Gram matrix{whose}, {square}, in blocks of {width}, upper halves"


@dataclass(frozen=True)
class Blocks:
    """The blocks of one Gram matrix, or of one for each of several experts.

    Args:
        d: number of features, ≥ 1.
        b: block width, 1 ≤ b ≤ d.
        experts: number of matrices of d features.
    """

    d: int
    b: int
    experts: int = 1

    @staticmethod
    def of(structure: str, d: int, experts: int = 1) -> Blocks:
        """Return the blocks of a plan's structure over d features."""
        width = parse_structure(structure)
        return Blocks(d, d if width is None else min(width, d), experts)

    @property
    def each(self) -> tuple[tuple[int, int, int], ...]:
        """(first feature, number of blocks, width) of one matrix: the equal blocks, then a smaller last one if any."""
        count, rest = divmod(self.d, self.b)
        equal = ((0, count, self.b),)
        return equal if not rest else (*equal, (count * self.b, 1, rest))

    @property
    def parts(self) -> tuple[tuple[int, int, int], ...]:
        """The same for all matrices; the features of each matrix continue the numbering of the one before."""
        return tuple(
            (e * self.d + first, count, width) for e in range(self.experts) for first, count, width in self.each
        )

    @property
    def entries(self) -> int:
        """Number of packed entries."""
        return self.experts * sum(count * _triangle(width) for _, count, width in self.each)

    def pack(self, parts: Iterable[Floats]) -> Floats:
        """Pack blocks into one vector.

        Args:
            parts: for each of `self.parts` a symmetric array (count, width, width); the upper triangle is read.

        Returns:
            (entries,) of the same dtype.
        """
        packed = [
            blocks[(slice(None), *_indices(width))].reshape(-1)
            for blocks, (_, _, width) in zip(parts, self.parts, strict=True)
        ]
        return packed[0] if len(packed) == 1 else np.concatenate(packed)

    def outer(self, vector: NDArray[np.float64], factor: float) -> NDArray[np.float64]:
        """Return factor · v vᵀ packed, without forming the whole matrix.

        Args:
            vector: (experts · d,).
        """
        packed = np.empty(self.entries)
        start = 0
        for first, count, width in self.parts:
            for row in range(first, first + count * width):
                stop = first + ((row - first) // width + 1) * width  # the end of the row's block
                np.multiply(vector[row:stop], factor * vector[row], out=packed[start : start + stop - row])
                start += stop - row
        return packed

    def unpack(self, packed: Floats) -> Iterator[Floats]:
        """Yield one symmetric array (count, width, width) for each of `self.parts`; the inverse of `pack`."""
        start = 0
        for _, count, width in self.parts:
            stop = start + count * _triangle(width)
            rows, columns = _indices(width)
            values = packed[start:stop].reshape(count, -1)
            block = np.empty((count, width, width), packed.dtype)
            block[:, rows, columns] = values
            block[:, columns, rows] = values
            yield block
            start = stop


def _triangle(width: int) -> int:
    return width * (width + 1) // 2


@lru_cache(maxsize=4)
def _indices(width: int) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    return np.triu_indices(width)
