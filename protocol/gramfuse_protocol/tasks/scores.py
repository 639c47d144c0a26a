"""Sums and metrics that several kinds of task share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Sums = NDArray[np.float64]

MACRO_F1 = "mean of the labels' F1, so that rare labels count as much as common ones"
PERPLEXITY = "how surprised the model is by the correct words; lower is better"


class Tokens(NamedTuple):
    """A model's predictions of the tokens of each example: arrays of shape (examples,).

    Args:
        targets: number of tokens to predict.
        loss: their negative log-likelihood.
        clipped: the same, clipped to [0, LOSS] for each token (`gramfuse_protocol.tasks.rows`); NaN counts as LOSS.
        correct: number of correctly predicted tokens.
    """

    targets: NDArray[np.float64]
    loss: NDArray[np.float64]
    clipped: NDArray[np.float64]
    correct: NDArray[np.float64]


def examples_in(sums: Sums) -> float:
    """Return the number of examples in sums: the first entry."""
    return float(sums[0])


def scores_by_name(names: Sequence[str], counts: Sums) -> dict[str, dict[str, float]]:
    """Return the scores of each label or entity type, as `by_label` does.

    Args:
        counts: true positives, predictions and true examples of each, shape (names, 3).
    """
    return {
        name: {
            "examples": max(0.0, float(truth)),
            "precision": share(hits, predicted),
            "recall": share(hits, truth),
            "f1": f1_of(hits, predicted, truth),
        }
        for name, (hits, predicted, truth) in zip(names, counts, strict=True)
        if predicted + truth > 0
    }


def share(part: float, total: float) -> float:
    """Return part / total clipped to [0, 1], since noisy counts can be out of range; 0 if the total is not positive."""
    return min(1.0, max(0.0, float(part / total))) if total > 0 else 0.0


def f1_of(hits: float, predicted: float, truth: float) -> float:
    """Return F1, the harmonic mean of precision and recall; 0 if nothing is true or predicted."""
    return share(2 * hits, predicted + truth)


def mean(values: Sequence[float]) -> float:
    """Return the mean, or 0 if there are no values."""
    return sum(values) / len(values) if values else 0.0


def perplexity(nll: float, tokens: float) -> float:
    """Return e to the mean negative log-likelihood, capped at e^709, near the largest float64."""
    return math.exp(min(nll / max(tokens, 1.0), 709.0))
