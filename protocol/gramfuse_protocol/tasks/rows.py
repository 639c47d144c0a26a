"""What kinds of task have in common in the rows of examples: what leaves with noise, as a sum over all examples."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gramfuse_protocol.secure_sum.scales import METRICS_SCALE
from gramfuse_protocol.tasks.scores import Sums

Vector = NDArray[np.float64]

LOSS = 16.0
"""What the negative log-likelihood of one token is clipped to; e^16 is more than any vocabulary has tokens."""


class RowGroup(NamedTuple):
    """Entries of the vector that share a sensitivity.

    Args:
        size: how many entries.
        sensitivity: by how much replacing one example moves them, in L2.
        share: of the privacy budget; those of a task add up to 1.
        words: what the entries say.
    """

    name: str
    size: int
    sensitivity: float
    share: float
    words: str


EXAMPLES = RowGroup("examples", 1, 1.0, 1 / 10, "how many held-out examples there are")

OF_LABELS = "for each label, how many held-out examples got it rightly, wrongly, or lack it"


def added(rows: Vector) -> Vector:
    """Return the sum of rows, each on the grid of the fixed-point scale."""
    total: Vector = np.rint(rows * METRICS_SCALE).sum(axis=0) / METRICS_SCALE
    return total


def shares(most: int, *counts: NDArray[Any], of: NDArray[Any] | None = None) -> list[Vector]:
    """Return counts of tokens as shares of the most that an example may have; of a longer one, as if it had so many.

    Args:
        of: how many tokens each example has; by default the first of the counts.
    """
    long = np.maximum(counts[0] if of is None else of, most)
    return [count / long for count in counts]


def counts_of(entries: Vector) -> Sums:
    """Return how often each was found, predicted, and true, from found, too much and missed: shape (…, 3)."""
    found, wrong, missed = entries.reshape(-1, 3).T
    return np.stack([found, found + wrong, found + missed], axis=1)
