"""What a head is fitted from in closed form: sums over examples, which add up over silos."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from gramfuse_protocol.errors import ContributionError
from gramfuse_protocol.statistics.contribution import Float64


@dataclass(frozen=True, eq=False)
class HeadSums:
    """First and second moments of the features that enter a model's last linear layer.

    With x the features of an example, (D,), and y its label as a one-hot vector, (C,), sums over examples.

    Args:
        second: Σ x xᵀ, float64 (D, D), symmetric.
        first: Σ x yᵀ, float64 (D, C).
        counts: Σ y, float64 (C,): examples of each label.
    """

    second: Float64
    first: Float64
    counts: Float64

    @staticmethod
    def zeros(features: int, labels: int) -> HeadSums:
        """Return the sums over no examples."""
        return HeadSums(np.zeros((features, features)), np.zeros((features, labels)), np.zeros(labels))

    @property
    def examples(self) -> int:
        """How many examples there are."""
        return round(float(self.counts.sum()))

    def __add__(self, other: HeadSums) -> HeadSums:
        """Return the sums over both sides' examples."""
        if self.first.shape != other.first.shape:
            raise ContributionError(f"sums of a head are {other.first.shape}, expected {self.first.shape}")
        return HeadSums(self.second + other.second, self.first + other.first, self.counts + other.counts)
