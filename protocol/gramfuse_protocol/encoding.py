"""Real numbers as integers modulo 2^64, so that a sum of them is exact and masks are raw bits.

A value x is the integer q = round(x · 2^f) in two's complement, f being an exponent that all silos share; a sum of
integers is divided by 2^f again. Rounding is to the nearest, ties to even, so the same value always gives the same
word. With n silos every |q| is at most 2^(62 − ⌈log₂ n⌉): the sum is at most 2^62 and cannot wrap, and its error is
at most n/2 · 2^−f, to which `decode` adds the rounding of float64. A value beyond is an error, never a silent clip.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from gramfuse_protocol.errors import ContributionError

SUM_BITS = 62

Words = NDArray[np.uint64]
Floats = NDArray[np.float64]


def capacity(silos: int) -> int:
    """Return the K of |q| ≤ 2^K: what leaves room for the sum over that many silos."""
    return SUM_BITS - (silos - 1).bit_length()


def encode(values: Floats, scale: Floats | float, silos: int, name: str, out: Words | None = None) -> Words:
    """Turn values into words.

    Args:
        values: float64 (k,).
        scale: 2^f as float64, (k,) or one for all.
        silos: most silos that a sum is over.
        name: the tensor, for errors.
        out: where to, if not into a new array.

    Raises:
        ContributionError: naming the tensor and how many values are NaN, infinite or beyond the range.
    """
    scaled = np.empty(values.shape)
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        np.multiply(values, scale, out=scaled)
    np.rint(scaled, out=scaled)
    limit = 2.0 ** capacity(silos)
    if scaled.size and not max(scaled.max(), -scaled.min()) <= limit:
        _refuse(values, scaled, limit, name)
    words = scaled.astype(np.int64).view(np.uint64)
    if out is None:
        return words
    out[:] = words
    return out


def decode(words: Words, scale: Floats | float) -> Floats:
    """Return the values of words, or of their sum: float64 (k,). Exact where the integer has at most 53 bits."""
    values = words.view(np.int64).astype(np.float64)
    np.divide(values, scale, out=values)
    return values


def _refuse(values: Floats, scaled: Floats, limit: float, name: str) -> None:
    bad = values.size - int(np.count_nonzero(np.isfinite(values)))
    if bad:
        raise ContributionError(
            f"tensor {name!r} holds {bad} values that are NaN or infinite out of {values.size}; training diverged: "
            "lower training.learning-rate or look at the silo's data"
        )
    beyond = int(np.count_nonzero(~(np.abs(scaled) <= limit)))
    worst = float(np.abs(scaled).max() / limit)
    raise ContributionError(
        f"tensor {name!r} holds {beyond} values out of {values.size} beyond what the plan's fixed-point range takes, "
        f"the largest by a factor of {worst:.3g}; training diverged, or the silo's data are unlike anything that the "
        "base model knows: lower training.learning-rate, exclude the tensor (merge.exclude), or look at the data"
    )
