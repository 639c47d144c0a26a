"""What a head is fitted from in closed form: sums over examples, which add up over silos."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gramfuse_protocol.contract.head_layout import FIRST, SECOND, HeadLayout
from gramfuse_protocol.errors import ContributionError
from gramfuse_protocol.statistics.contribution import Float64


@dataclass(frozen=True, eq=False)
class HeadSums:
    """First and second moments of the features that enter a model's last linear layer.

    With x̃ = [x; 1], where x are the features of an example, (D,), and y its label as a one-hot vector, (C,), sums over
    examples. The last row and column of both count examples.

    Args:
        second: Σ x̃ x̃ᵀ, float64 (D + 1, D + 1), symmetric.
        first: Σ x̃ yᵀ, float64 (D + 1, C).
    """

    second: Float64
    first: Float64

    @staticmethod
    def of(features: Float64, labels: NDArray[Any], count: int) -> HeadSums:
        """Return the sums over examples.

        Args:
            features: float64 (examples, D).
            labels: the label of each, int (examples,), 0 ≤ label < count.
            count: number of labels, C.
        """
        extended = np.concatenate([features, np.ones((len(features), 1))], axis=1)
        return HeadSums(extended.T @ extended, extended.T @ np.eye(count)[labels])

    @staticmethod
    def read(layout: HeadLayout, block: Callable[[str], NDArray[Any]]) -> HeadSums:
        """Return sums from the blocks of a contribution, or of a sum over silos.

        Args:
            block: returns a block by name, in its shape.
        """
        (second,) = layout.packing.unpack(block(SECOND))
        return HeadSums(second[0], block(FIRST))

    def blocks(self, layout: HeadLayout) -> dict[str, Float64]:
        """Return the blocks of a contribution, by name.

        Raises:
            ContributionError: if the sums have other numbers of features or labels than the layout.
        """
        expected = (layout.features + 1, layout.labels)
        if self.first.shape != expected:
            raise ContributionError(f"sums of a head are {self.first.shape}, but the layout expects {expected}")
        return {SECOND: layout.packing.pack([self.second[None]]), FIRST: self.first}

    @property
    def counts(self) -> Float64:
        """Σ y: examples of each label, (C,)."""
        counts: Float64 = self.first[-1]
        return counts

    @property
    def examples(self) -> float:
        """How many examples there are."""
        return float(self.second[-1, -1])

    def __add__(self, other: HeadSums) -> HeadSums:
        """Return the sums over both sides' examples."""
        if self.first.shape != other.first.shape:
            raise ContributionError(f"sums of a head are {other.first.shape}, expected {self.first.shape}")
        return HeadSums(self.second + other.second, self.first + other.first)
