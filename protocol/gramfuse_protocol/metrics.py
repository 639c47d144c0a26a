"""Held-out metrics as sums that add up over silos.

A silo turns its predictions into one small float64 array; the arrays of several silos are added, and only the
sum is turned into numbers. So a joint metric over all silos is exact, and no single prediction leaves a silo.

* classification: the confusion matrix, shape (labels, labels), rows are the truth, columns the prediction.
* regression: (8,): n, Σt, Σp, Σt², Σp², Σtp, Σ|t−p|, Σ(t−p)² for truth t and prediction p.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

Sums = NDArray[np.float64]


def classification_sums(truth: NDArray[Any], predicted: NDArray[Any], labels: int) -> Sums:
    """Count (truth, prediction) pairs.

    Args:
        truth, predicted: label indices, shape (examples,), each in [0, labels).
    """
    sums = np.zeros((labels, labels), np.float64)
    np.add.at(sums, (truth, predicted), 1.0)
    return sums


def regression_sums(truth: NDArray[Any], predicted: NDArray[Any]) -> Sums:
    """Sum the moments of truth and prediction, each of shape (examples,)."""
    t, p = truth.astype(np.float64), predicted.astype(np.float64)
    return np.array([t.size, t.sum(), p.sum(), t @ t, p @ p, t @ p, np.abs(t - p).sum(), (t - p) @ (t - p)], np.float64)


def sums_shape(labels: int) -> tuple[int, ...]:
    """Shape of the sums for a plan with that many labels; none means regression."""
    return (labels, labels) if labels else (8,)


def metrics(sums: Sums) -> dict[str, float]:
    """Turn added sums into metrics.

    Returns:
        For a confusion matrix `examples`, `accuracy` and `macro-f1` (mean F1 over the labels that occur in the truth
        or among the predictions); for moments `examples`, `pearson`, `rmse` and `mae`. A Pearson correlation
        without variance on either side is 0.
    """
    if sums.ndim == 1:
        n, t, p, tt, pp, tp, absolute, squared = (float(value) for value in sums)
        spread = _spread(tt, t, n) * _spread(pp, p, n)
        pearson = min(1.0, max(-1.0, (tp - t * p / n) / math.sqrt(spread))) if spread > 0 else 0.0
        rmse = math.sqrt(squared / n)
        return {"examples": n, "pearson": pearson, "rmse": rmse, "mae": absolute / n}
    hits, truth, predicted = np.diag(sums), sums.sum(axis=1), sums.sum(axis=0)
    seen = truth + predicted > 0
    f1 = 2 * hits[seen] / (truth + predicted)[seen]
    n = float(sums.sum())
    return {"examples": n, "accuracy": float(hits.sum()) / n, "macro-f1": float(f1.mean())}


def _spread(squares: float, total: float, n: float) -> float:
    """Return the sum of squared deviations, or 0 where it is no more than what rounding leaves of none."""
    spread = squares - total * total / n
    return spread if spread > 1e-12 * squares else 0.0
