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

    With x̃ = [x; 1], where x are the features of an example, (D,), and y what the kind of task makes of its target,
    (K,), sums over examples. The last row and column of `second` count examples.

    Args:
        second: Σ x̃ x̃ᵀ, float64 (D + 1, D + 1), symmetric.
        first: Σ x̃ yᵀ, float64 (D + 1, K).
    """

    second: Float64
    first: Float64

    @staticmethod
    def of(features: Float64, targets: Float64) -> HeadSums:
        """Return the sums over examples.

        Args:
            features: float64 (examples, D).
            targets: y of each, float64 (examples, K), as `gramfuse_protocol.tasks.registry.TaskKind.targets` has them.
        """
        extended = np.concatenate([features, np.ones((len(features), 1))], axis=1)
        return HeadSums(extended.T @ extended, extended.T @ targets)

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
            ContributionError: if the sums have other numbers of features or columns than the layout.
        """
        expected = (layout.features + 1, layout.columns)
        if self.first.shape != expected:
            raise ContributionError(f"sums of a head are {self.first.shape}, but the layout expects {expected}")
        return {SECOND: layout.packing.pack([self.second[None]]), FIRST: self.first}

    @property
    def counts(self) -> Float64:
        """Σ y: for a classifier, the examples of each label, (K,)."""
        counts: Float64 = self.first[-1]
        return counts

    @property
    def examples(self) -> float:
        """How many examples there are."""
        return float(self.second[-1, -1])

    def scaled(self, factors: Float64) -> HeadSums:
        """Return the sums of features that are multiplied by a factor each, (D,)."""
        extended = np.append(factors, 1.0)
        return HeadSums(self.second * np.outer(extended, extended), self.first * extended[:, None])

    def __add__(self, other: HeadSums) -> HeadSums:
        """Return the sums over both sides' examples."""
        if self.first.shape != other.first.shape:
            raise ContributionError(f"sums of a head are {other.first.shape}, expected {self.first.shape}")
        return HeadSums(self.second + other.second, self.first + other.first)
