"""The running sums of a head that is fitted in closed form, and the model that it becomes part of."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from gramfuse_protocol.contract.head_layout import HeadLayout
from gramfuse_protocol.contract.layout import Layout, delta_block
from gramfuse_protocol.errors import ContributionError
from gramfuse_protocol.secure_sum.fixed_point import decode
from gramfuse_protocol.secure_sum.scales import scales
from gramfuse_protocol.statistics.contribution import Contribution, Float64, check_counts
from gramfuse_protocol.statistics.head_sums import HeadSums
from gramfuse_server.merging.accumulator import Merged
from gramfuse_server.merging.closed_form_head import Head, without_bias
from gramfuse_server.merging.head_solvers import SOLVERS

START_SCALE = 0.2
"""Factor on a classifier's head that training starts from.

A closed-form head is sure of its answers; with weights as large as that, the first steps of training would change the
body a lot for each example that it gets wrong.
"""


class HeadAccumulator:
    """Sums over silos of the moments of a head's inputs, in float64; an example counts the same at every silo.

    Args:
        layout: with a head.
        base: values of the base model's parameters by name, with at least those of the head.
        trains: whether training starts from the head.
        seen: whether the body was trained on the same examples.
    """

    def __init__(self, layout: Layout, base: Mapping[str, NDArray[np.float32]], *, trains: bool, seen: bool) -> None:
        assert layout.head is not None  # noqa: S101  # the caller asks for a head only if the plan has one
        self.layout = layout
        self.head: HeadLayout = layout.head
        self.base = base
        self.trains = trains
        self.seen = seen
        self._sums: dict[str, Float64] = {block.name: np.zeros(block.shape) for block in self.head.sums}

    @property
    def sums(self) -> HeadSums:
        """The sums."""
        return HeadSums.read(self.head, self._sums.__getitem__)

    @property
    def examples(self) -> int:
        """Rows of all silos together: training examples, or words (`TaskKind.fits_words`)."""
        return round(self.sums.examples)

    def fold(self, contribution: Contribution, source: str, *, silo: str | None = None) -> None:
        """Add one silo's contribution; its blocks must have been checked on arrival.

        Args:
            source: its origin, for errors.
            silo: its name; not needed here.

        Raises:
            ContributionError: if its count does not fit; the sums are then unchanged.
        """
        check_counts(self.head, contribution.examples, contribution.tokens, source)
        for block in self.head.sums:
            self._sums[block.name] += contribution.block(block.name)

    def load(self, words: NDArray[np.uint64], silos: int) -> None:
        """Load a whole secure sum.

        Args:
            words: the unmasked sum, uint64 (head.sum_entries,); its memory is reused.
            silos: number of silos in the plan's roster, which determines the scales.
        """
        start = 0
        for block, scale in scales(self.head, silos, "uniform"):
            part = words[start : start + block.entries].reshape(block.shape)
            self._sums[block.name] = decode(part, scale, out=part.view(np.float64))
            start += block.entries

    def fit(self) -> Head:
        """Fit the head to the sums, scaled as training needs it, or so that its probabilities are right.

        Raises:
            MergeError: if the sums allow no head (`gramfuse_server.merging.head_solvers`).
        """
        solver = SOLVERS[self.head.fit]
        head = solver.fit(self.sums, start=START_SCALE if self.trains else None, seen=self.seen)
        return without_bias(head, self.sums, relative=solver.relative) if self.head.bias is None else head

    def merge(self, start: Mapping[str, NDArray[np.float32]]) -> Merged:
        """Fit the head, and return the model with it.

        Args:
            start: the model whose features were summed, as differences from the base by block name, all tensors; empty
                if it is the base.

        Returns:
            Differences from the base.

        Raises:
            MergeError: if no head can be fitted.
            ContributionError: naming the tensor, if a value is too large for float32.
        """
        fitted = self.fit()
        deltas = {
            tensor.name: np.asarray(start[delta_block(tensor.name)] if start else np.zeros(tensor.shape), np.float64)
            for tensor in self.layout.tensors
        }
        for name, value in values_of(fitted, self.head).items():
            deltas[name] = value - self.base[name].astype(np.float64)
        return Merged(deltas, deltas, ())


def values_of(fitted: Head, head: HeadLayout) -> dict[str, Float64]:
    """Return the values of a layer's parameters, by name.

    Args:
        fitted: without a bias other than zero, if the layer has none.
        head: the layer.

    Raises:
        ContributionError: naming the tensor, if a value is too large for float32.
    """
    values = {head.weight: fitted.weight} | ({} if head.bias is None else {head.bias: fitted.bias})
    for name, value in values.items():
        if not (np.abs(value) <= np.finfo(np.float32).max / 2).all():
            raise ContributionError(
                f"tensor {name!r}: the fitted head exceeds float32: a silo's sums are wrong; fit heads of the silos "
                "alone to find out whose"
            )
    return values
