"""What kinds of task have in common in their sums and metrics."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Sums = NDArray[np.float64]

MACRO_F1 = "F1 of each label, averaged over labels, so that rare ones count as much as common ones"
PERPLEXITY = "how surprised the model is by the right words; lower is better"


class Tokens(NamedTuple):
    """What a model said of the tokens of each example: arrays of shape (examples,).

    Args:
        said: how many were to be predicted.
        loss: their negative log-likelihood.
        clipped: the same, each token's clipped to [0, LOSS] (`gramfuse_protocol.tasks.rows`); LOSS if it is no number.
        right: how many were predicted right.
    """

    said: NDArray[np.float64]
    loss: NDArray[np.float64]
    clipped: NDArray[np.float64]
    right: NDArray[np.float64]


def examples_in(sums: Sums) -> float:
    """Return how many examples sums are of: the entries of a confusion matrix together, or else the first entry."""
    return float(sums.sum() if sums.ndim == 2 else sums[0])


def of_names(names: Sequence[str], counts: Sums) -> dict[str, dict[str, float]]:
    """Return what `by_label` does.

    Args:
        counts: how often each was found, predicted, and true: shape (names, 3).
    """
    return {
        name: {
            "examples": max(0.0, float(truth)),
            "precision": share(found, predicted),
            "recall": share(found, truth),
            "f1": f1_of(found, predicted, truth),
        }
        for name, (found, predicted, truth) in zip(names, counts, strict=True)
        if predicted + truth > 0
    }


def share(found: float, of: float) -> float:
    """Return which share was found; 0 of nothing. Counts with noise may be below 0."""
    return min(1.0, max(0.0, float(found / of))) if of > 0 else 0.0


def f1_of(found: float, predicted: float, truth: float) -> float:
    """Return the harmonic mean of precision and recall; 0 where there is neither."""
    return share(2 * found, predicted + truth)


def mean(values: Sequence[float]) -> float:
    """Return the mean; 0 of nothing."""
    return sum(values) / len(values) if values else 0.0


def perplexity(nll: float, tokens: float) -> float:
    """Return e to the mean negative log-likelihood; of a model that is beyond all numbers, the largest there is."""
    return math.exp(min(nll / max(tokens, 1.0), 709.0))
