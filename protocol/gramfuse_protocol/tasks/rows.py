"""Rows of examples, shared by all kinds of task: their sum over examples leaves a silo with noise."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gramfuse_protocol.secure_sum.scales import METRICS_SCALE
from gramfuse_protocol.tasks.scores import Sums

Vector = NDArray[np.float64]

LOSS = 16.0
"""Upper bound on one token's negative log-likelihood; e^16 exceeds the size of any vocabulary."""


class RowGroup(NamedTuple):
    """Consecutive entries of the vector that share a sensitivity.

    Args:
        size: number of entries.
        sensitivity: maximum L2 change of the entries when one example is replaced.
        share: share of the privacy budget; a task's shares add up to 1.
        words: description of the entries.
    """

    name: str
    size: int
    sensitivity: float
    share: float
    words: str


EXAMPLES = RowGroup("examples", 1, 1.0, 1 / 10, "the number of held-out examples")

LABEL_COUNTS = "for each label, the numbers of true positives, false positives and false negatives"


def sum_rows(rows: Vector) -> Vector:
    """Return the sum of rows, each rounded to the fixed-point scale."""
    total: Vector = np.rint(rows * METRICS_SCALE).sum(axis=0) / METRICS_SCALE
    return total


def shares(limit: int, *counts: NDArray[Any], lengths: NDArray[Any] | None = None) -> list[Vector]:
    """Return token counts as shares of the maximum length of an example, or of the example's length if it is longer.

    Args:
        limit: maximum number of tokens in an example.
        counts: arrays of shape (examples,).
        lengths: number of tokens in each example; by default the first of the counts.
    """
    divisor = np.maximum(counts[0] if lengths is None else lengths, limit)
    return [count / divisor for count in counts]


def counts_of(entries: Vector) -> Sums:
    """Convert (true positives, false positives, false negatives) to (true positives, predictions, true examples).

    Args:
        entries: flat, three entries for each label.

    Returns:
        float64 (labels, 3).
    """
    hits, wrong, missed = entries.reshape(-1, 3).T
    return np.stack([hits, hits + wrong, hits + missed], axis=1)
