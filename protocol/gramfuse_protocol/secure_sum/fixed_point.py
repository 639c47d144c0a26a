"""Fixed-point encoding of real numbers as integers modulo 2^64, so that sums are exact and masks are raw bits.

A value x becomes the integer q = round(x · 2^f) in two's complement, where all silos share the exponent f; the sum of
integers is divided by 2^f. Rounding is to nearest, ties to even, so the same value always gives the same word. With n
silos, |q| ≤ 2^(62 − ⌈log₂ n⌉): the sum is at most 2^62 and cannot wrap, and its error is at most n/2 · 2^−f plus the
float64 rounding in `decode`. A value out of range is an error; it is never clipped silently.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

from gramfuse_protocol.errors import ContributionError
from gramfuse_protocol.secure_sum.masks import Words

SUM_BITS = 62

PART = 2**16
"""Number of values processed at a time, so that they stay in the CPU cache."""

Floats = NDArray[np.float64]


def capacity(silos: int) -> int:
    """Return the K in |q| ≤ 2^K that leaves room for the sum over `silos` silos."""
    return SUM_BITS - (silos - 1).bit_length()


def encode(
    values: Floats, scale: Floats | float, silos: int, name: str, room: Callable[[int], Words] | None = None
) -> Words:
    """Encode values as words.

    Args:
        values: float64, any shape.
        scale: 2^f as float64: a scalar, one for each value, or one for each row of two-dimensional values, (rows, 1).
        silos: maximum number of silos in the sum.
        name: the tensor, for errors.
        room: called for each part in order with its number of words; returns a flat array to write them to. By default
            a new array is allocated.

    Returns:
        The new array, in the values' shape; empty if `room` is given.

    Raises:
        ContributionError: if values are NaN, infinite or out of range; names the tensor and counts them.
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
    """Decode words, or a sum of words, as float64; exact if the integer has at most 53 bits.

    Args:
        scale: as in `encode`.
        out: array to write to instead of a new one; it may share the words' memory.
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
            f"tensor {name!r} has {bad} NaN or infinite values out of {values.size}; training diverged: lower "
            "training.learning-rate or check the silo's data"
        )
    with np.errstate(over="ignore"):
        share = np.abs(np.rint(values * scale)) / limit
    beyond = int(np.count_nonzero(share > 1))
    raise ContributionError(
        f"tensor {name!r} has {beyond} of {values.size} values outside the plan's fixed-point range, the largest by a "
        f"factor of {float(share.max()):.3g}; training diverged, or the silo's data are unlike anything that the base "
        "model knows: lower training.learning-rate, exclude the tensor (merge.exclude), or check the data"
    )
