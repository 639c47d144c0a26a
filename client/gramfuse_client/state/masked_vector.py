"""Encodes, masks and writes a silo's contribution, a few megabytes at a time."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gramfuse_protocol.files import replacing
from gramfuse_protocol.secure_sum.fixed_point import encode
from gramfuse_protocol.secure_sum.masks import Mask, Words, apply
from gramfuse_protocol.secure_sum.scales import Scale

BUFFER_WORDS = 2**21
"""Number of words to mask and write at a time: 16 MiB."""


def write_masked(
    path: Path, blocks: Iterable[tuple[str, NDArray[np.float64], Scale]], silos: int, masks: Sequence[Mask]
) -> None:
    """Encode blocks one after the other, add the masks, and write the words, little-endian.

    The file has mode 0600 and is written atomically.

    Args:
        blocks: (name, values, scale), for `gramfuse_protocol.secure_sum.fixed_point.encode`.
        silos: number of silos in the plan's roster.

    Raises:
        ContributionError: naming the tensor, if a value is out of range; then no file remains.
    """
    with _masking(path, masks) as masker:
        for name, values, scale in blocks:
            encode(values, scale, silos, name, masker.room)


def write_masked_words(path: Path, words: Words, masks: Sequence[Mask]) -> None:
    """Add the masks to encoded words, and write them like `write_masked`."""
    with _masking(path, masks) as masker:
        masker.room(words.size)[:] = words


@contextmanager
def _masking(path: Path, masks: Sequence[Mask]) -> Iterator[_Masker]:
    with (
        replacing(path, private=True) as temporary,
        temporary.open("r+b", buffering=0) as file,
        _Masker(file.fileno(), masks) as masker,
    ):
        yield masker


def read_masked(path: Path, start: int, count: int) -> Words:
    """Return up to `count` words from `start` on, memory-mapped."""
    count = min(count, path.stat().st_size // 8 - start)
    if count <= 0:
        return np.empty(0, "<u8")
    return np.asarray(np.memmap(path, "<u8", "r", 8 * start, (count,)))


class _Masker:
    """Masks words in order, and writes them in the background while the next ones are encoded."""

    def __init__(self, descriptor: int, masks: Sequence[Mask]) -> None:
        self._descriptor = descriptor
        self._masks = masks
        self._buffers = [np.empty(BUFFER_WORDS, "<u8") for _ in range(2)]
        self._start = 0  # index of the first buffered word in the vector; even, since masks start only at even words
        self._filled = 0
        self._writer = ThreadPoolExecutor(1)
        self._writing: Future[None] | None = None

    def __enter__(self) -> _Masker:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self._flush(self._filled)
                self._wait()
        finally:
            self._writer.shutdown()

    def room(self, count: int) -> Words:
        """Return a buffer for the next `count` words."""
        if self._filled + count > BUFFER_WORDS:
            self._flush(self._filled - self._filled % 2)
        if count > BUFFER_WORDS - self._filled:  # longer than the buffers
            self._buffers = [np.concatenate([self._buffers[0], np.empty(count, "<u8")]), np.empty(2 * count, "<u8")]
        self._filled += count
        return self._buffers[0][self._filled - count : self._filled]

    def _flush(self, count: int) -> None:
        """Mask the first `count` words and submit them for writing; keep the rest."""
        current, other = self._buffers
        apply(current[:count], self._masks, self._start)
        self._wait()
        self._writing = self._writer.submit(_write, self._descriptor, current[:count])
        rest = self._filled - count
        other[:rest] = current[count : self._filled]
        self._buffers = [other, current]
        self._start, self._filled = self._start + count, rest

    def _wait(self) -> None:
        if self._writing is not None:
            self._writing.result()


def _write(descriptor: int, words: Words) -> None:
    data = words.view(np.uint8).data
    while data:
        data = data[os.write(descriptor, data) :]
    os.fsync(descriptor)  # so that the disk works while the next words are encoded
