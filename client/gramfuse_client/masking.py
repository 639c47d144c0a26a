"""Writes a silo's masked contribution: encoded and masked a few megabytes at a time, never as a whole in memory."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gramfuse_protocol.encoding import encode
from gramfuse_protocol.masks import Mask, Words, apply
from gramfuse_protocol.scales import Scale

BUFFER_WORDS = 2**21
"""Words that are masked and written at a time: 16 MiB."""


def write_masked(
    path: Path, blocks: Iterable[tuple[str, NDArray[np.float64], Scale]], silos: int, masks: Sequence[Mask]
) -> None:
    """Encode blocks one after the other, add the masks, and write the words, little-endian.

    The file is 0600 and appears under its name when it is complete.

    Args:
        blocks: name, values, and the scale that broadcasts to their shape.
        silos: in the plan's roster.

    Raises:
        ContributionError: naming the tensor, if a value has no place in the range; no file is left then.
    """
    temporary = path.with_name(path.name + ".partial")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        with os.fdopen(descriptor, "wb", buffering=0) as file:
            for start, words in _buffered(_encoded(blocks, silos)):
                apply(words, masks, start)
                _write(file, words)
            os.fsync(file.fileno())
    except BaseException:
        temporary.unlink()
        raise
    os.replace(temporary, path)


def read_masked(path: Path, start: int, count: int) -> Words:
    """Return `count` words from `start` on, or as many as are left."""
    return np.fromfile(path, "<u8", count=count, offset=8 * start)


def _encoded(blocks: Iterable[tuple[str, NDArray[np.float64], Scale]], silos: int) -> Iterable[Words]:
    for name, values, scale in blocks:
        yield encode(values, scale, silos, name).reshape(-1)


def _buffered(arrays: Iterable[Words]) -> Iterable[tuple[int, Words]]:
    """Yield (place of the first word, words) in one reused buffer; every place is even."""
    buffer = np.empty(BUFFER_WORDS, "<u8")
    start = filled = 0
    for array in arrays:
        while array.size:
            part, array = array[: BUFFER_WORDS - filled], array[BUFFER_WORDS - filled :]
            buffer[filled : filled + part.size] = part
            filled += part.size
            if filled == BUFFER_WORDS:
                yield start, buffer
                start, filled = start + filled, 0
    if filled:
        yield start, buffer[:filled]


def _write(file: Any, words: Words) -> None:
    data = words.view(np.uint8).data
    while data:
        data = data[file.write(data) :]
