"""A silo's contribution: Gram matrices, weight differences and counts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from gramfuse_protocol.contract.form import Form, Slice
from gramfuse_protocol.errors import ContributionError

Array = NDArray[Any]
Float64 = NDArray[np.float64]


class Contribution(Protocol):
    """One silo's statistics, in memory or on disk."""

    @property
    def examples(self) -> int:
        """Training examples that the silo fine-tuned on, ≥ 1."""
        ...

    @property
    def tokens(self) -> Mapping[str, int]:
        """Number of token rows in each group's Gram matrix, ≥ 0."""
        ...

    def block(self, name: str) -> Array:
        """Return a block of the form in its shape, read-only."""
        ...


@dataclass(frozen=True, eq=False)
class Statistics:
    """A contribution in memory.

    Example:
        >>> statistics = gramfuse.collect_statistics(tuned, [batch], layout, base=start, examples=2)
        >>> statistics.tokens["classifier"]  # one row for each text
        2

    Args:
        examples: training examples, ≥ 1.
        tokens: number of token rows by group name.
        blocks: arrays by block name, in the form's dtype. `gram:<group>` is the packed mean G = XᵀX / tokens over real
            tokens (zeros if the group saw none); `delta:<parameter>` is W − W₀ in the parameter's shape.
    """

    examples: int
    tokens: Mapping[str, int]
    blocks: Mapping[str, Array]

    def block(self, name: str) -> Array:
        """Return a block by name."""
        return self.blocks[name]


def check_counts(form: Form, examples: int, tokens: Mapping[str, int], source: str) -> None:
    """Raise ContributionError unless the counts of a contribution fit its form.

    Args:
        source: the sender, for the error.
    """
    if isinstance(examples, bool) or not isinstance(examples, int) or examples < 1:
        raise ContributionError(f"{source}: reports {examples} training examples; expected a positive integer")
    expected = set(form.gram_names)
    if set(tokens) != expected:
        group = sorted(set(tokens) ^ expected)[0]
        raise ContributionError(f"{source}: token counts do not fit the layout; first difference at group {group!r}")
    for group, count in tokens.items():
        if count < 0:
            raise ContributionError(f"{source}: group {group!r} reports {count} tokens; expected zero or more")


def check_slices(slices: Iterable[Slice], arrays: Mapping[str, Array], source: str, dtype: str = "float32") -> None:
    """Raise ContributionError unless arrays match these slices of a contribution exactly and all values are finite.

    Args:
        slices: the expected slices.
        arrays: arrays by slice name; whole blocks in their shape, partial ones flat.
        source: the sender, for the error.
        dtype: the expected dtype of all arrays.
    """
    slices = tuple(slices)
    unknown = sorted(set(arrays) - {piece.name for piece in slices})
    if unknown:
        raise ContributionError(f"{source}: tensor {unknown[0]!r} is not in the layout; remove it and measure again")
    for piece in slices:
        array = arrays.get(piece.name)
        if array is None:
            raise ContributionError(f"{source}: tensor {piece.name!r} of the layout is missing")
        whole = piece.name == piece.block.name
        shape = piece.block.shape if whole else (piece.stop - piece.start,)
        if array.dtype != np.dtype(dtype) or array.shape != shape:
            raise ContributionError(
                f"{source}: tensor {piece.name!r} is {array.dtype} {array.shape}, but the layout expects {dtype} "
                f"{shape}; the silo's layout or base model differs from the plan's"
            )
        bad = array.size - int(np.count_nonzero(np.isfinite(array)))
        if bad:
            raise ContributionError(
                f"{source}: tensor {piece.name!r} has {bad} NaN or infinite values out of {array.size}; training "
                "diverged: lower training.learning-rate or check the silo's data"
            )
