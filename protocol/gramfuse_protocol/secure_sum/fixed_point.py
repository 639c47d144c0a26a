"""Real numbers as integers modulo 2^64, so that a sum of them is exact and masks are raw bits.

A value x is the integer q = round(x · 2^f) in two's complement, f being an exponent that all silos share; a sum of
integers is divided by 2^f again. Rounding is to the nearest, ties to even, so the same value always gives the same
word. With n silos every |q| is at most 2^(62 − ⌈log₂ n⌉): the sum is at most 2^62 and cannot wrap, and its error is
at most n/2 · 2^−f, to which `decode` adds the rounding of float64. A value beyond is an error, never a silent clip.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

from gramfuse_protocol.errors import ContributionError
from gramfuse_protocol.secure_sum.masks import Words

SUM_BITS = 62

PART = 2**16
"""Values that are worked on at a time, so that they stay in the processor's cache."""

Floats = NDArray[np.float64]


def capacity(silos: int) -> int:
    """Return the K of |q| ≤ 2^K: what leaves room for the sum over that many silos."""
    return SUM_BITS - (silos - 1).bit_length()


def encode(
    values: Floats, scale: Floats | float, silos: int, name: str, room: Callable[[int], Words] | None = None
) -> Words:
    """Turn values into words.

    Args:
        values: float64, of any shape.
        scale: 2^f as float64: one for all, one for each, or one for each row of two-dimensional values, (rows, 1).
        silos: most silos that a sum is over.
        name: the tensor, for errors.
        room: asked, for each part in order, for a flat array of so many words to write into; by default the parts
            of one new array.

    Returns:
        The new array, in the values' shape; empty if `room` is given.

    Raises:
        ContributionError: naming the tensor and how many values are NaN, infinite or beyond the range.
    """
    words = np.empty(values.size if room is None else 0, np.uint64)
    limit = 2.0 ** capacity(silos)
    scratch = np.empty(0)
    start = 0
    for part, factor in _parts(values, scale):
        if part.size > scratch.size:  # the first part is the largest; a row may be longer than PART
            scratch = np.empty(part.size)
        scaled = scratch[: part.size]
        with np.errstate(over="ignore", invalid="ignore", under="ignore"):
            np.multiply(part, factor, out=scaled.reshape(part.shape))
        np.rint(scaled, out=scaled)
        if not max(scaled.max(), -scaled.min()) <= limit:
            _refuse(values, scale, limit, name)
        target = words[start : start + part.size] if room is None else room(part.size)
        target.view(np.int64)[:] = scaled
        start += part.size
    return words.reshape(values.shape) if room is None else words


def decode(words: Words, scale: Floats | float, out: Floats | None = None) -> Floats:
    """Return the values of words, or of their sum: float64. Exact where the integer has at most 53 bits.

    Args:
        scale: as `encode` has it.
        out: where to, if not into a new array; it may be the words' own memory.
    """
    values = np.empty(words.shape) if out is None else out
    flat = values.reshape(-1)
    start = 0
    for part, factor in _parts(words, scale):
        target = flat[start : start + part.size].reshape(part.shape)
        target[:] = part.view(np.int64)
        np.divide(target, factor, out=target)
        start += part.size
    return values


def _parts(array: NDArray[np.generic], scale: Floats | float) -> Iterator[tuple[NDArray[np.generic], Floats | float]]:
    """Cut an array into parts of at most PART elements, or single rows, each with its scale."""
    if isinstance(scale, np.ndarray) and scale.shape != array.shape:
        rows = max(1, PART // array.shape[1])
        for row in range(0, array.shape[0], rows):
            yield array[row : row + rows], scale[row : row + rows]
        return
    flat = array.reshape(-1)
    factors = scale.reshape(-1) if isinstance(scale, np.ndarray) else None
    for start in range(0, flat.size, PART):
        yield flat[start : start + PART], scale if factors is None else factors[start : start + PART]


def _refuse(values: Floats, scale: Floats | float, limit: float, name: str) -> None:
    bad = values.size - int(np.count_nonzero(np.isfinite(values)))
    if bad:
        raise ContributionError(
            f"tensor {name!r} holds {bad} values that are NaN or infinite out of {values.size}; training diverged: "
            "lower training.learning-rate or look at the silo's data"
        )
    with np.errstate(over="ignore"):
        share = np.abs(np.rint(values * scale)) / limit
    beyond = int(np.count_nonzero(share > 1))
    raise ContributionError(
        f"tensor {name!r} holds {beyond} values out of {values.size} beyond what the plan's fixed-point range takes, "
        f"the largest by a factor of {float(share.max()):.3g}; training diverged, or the silo's data are unlike "
        "anything that the base model knows: lower training.learning-rate, exclude the tensor (merge.exclude), or look "
        "at the data"
    )
