"""The form of what silos contribute in one session: blocks, which are sent in pieces and summed over silos."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from functools import cached_property
from itertools import accumulate
from typing import Annotated, ClassVar, NamedTuple

import numpy as np
from pydantic import Field

PIECE_BYTES = 128 * 2**20
"""Maximum number of bytes of statistics in one piece."""

EXPONENT = 40
Exponent = Annotated[int, Field(ge=-EXPONENT, le=EXPONENT)]
"""A power of two: the scale of a feature's amplitude."""


class Block(NamedTuple):
    """One array of a contribution."""

    name: str
    shape: tuple[int, ...]

    @property
    def entries(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


class Slice(NamedTuple):
    """The flattened elements [start, stop) of a block, as sent in one piece."""

    block: Block
    start: int
    stop: int

    @property
    def name(self) -> str:
        """Key of this slice on the wire."""
        whole = self.start == 0 and self.stop == self.block.entries
        return self.block.name if whole else f"{self.block.name}[{self.start}:{self.stop}]"


class Form(ABC):
    """What silos contribute in one session: a layout, or the sums of a head.

    Attributes:
        dtype: numpy's name of the dtype of a contribution's blocks; they are sent as little-endian.
    """

    dtype: ClassVar[str]

    @property
    @abstractmethod
    def digest(self) -> str:
        """SHA-256 of the canonical form."""

    @property
    @abstractmethod
    def blocks(self) -> tuple[Block, ...]:
        """All blocks of a contribution, in order."""

    @property
    @abstractmethod
    def sums(self) -> tuple[Block, ...]:
        """All blocks that are summed over silos, in order."""

    @property
    @abstractmethod
    def gram_names(self) -> tuple[str, ...]:
        """Names of the groups whose numbers of token rows belong to a contribution."""

    @cached_property
    def sum_entries(self) -> int:
        """Number of elements that are summed over silos."""
        return sum(block.entries for block in self.sums)

    @property
    def contribution_bytes(self) -> int:
        """Number of bytes of one silo's contribution, without the few hundred bytes of headers."""
        return self._item * sum(block.entries for block in self.blocks)

    def upload_bytes(self, *, masked: bool) -> int:
        """Return the number of bytes that one silo uploads: masked words of a secure sum, or blocks in the clear."""
        return 8 * self.sum_entries if masked else self.contribution_bytes

    def pieces(self, limit: int = PIECE_BYTES) -> tuple[tuple[Slice, ...], ...]:
        """Cut the contribution into pieces of at most `limit` bytes; a block larger than that spans several."""
        return tuple(self.piece(number, limit) for number in range(self.piece_count(limit)))

    def piece_count(self, limit: int = PIECE_BYTES) -> int:
        """Return the number of pieces."""
        return -(-self.contribution_bytes // self._item // self._capacity(limit))

    def piece(self, number: int, limit: int = PIECE_BYTES) -> tuple[Slice, ...]:
        """Return one piece, without computing the others.

        Args:
            number: 0 ≤ number < `piece_count`.
        """
        capacity, slices = self._capacity(limit), []
        first, last = number * capacity, (number + 1) * capacity
        for block, begins in zip(self.blocks, self._begins, strict=True):
            start, stop = max(0, first - begins), min(block.entries, last - begins)
            if start < stop:
                slices.append(Slice(block, start, stop))
        return tuple(slices)

    @property
    def _item(self) -> int:
        return np.dtype(self.dtype).itemsize

    def _capacity(self, limit: int) -> int:
        """Return the number of elements in a piece of at most `limit` bytes."""
        return max(1, limit // self._item)

    @cached_property
    def _begins(self) -> tuple[int, ...]:
        """The offset of each block in a contribution, in elements."""
        return (0, *accumulate(block.entries for block in self.blocks[:-1]))
