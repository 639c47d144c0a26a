"""The running sums of a merge. Their size does not depend on the number of silos."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from gramfuse_model.normal_equations import one_by_one, side_by_side, summands, tensor_weight
from gramfuse_protocol.contract.layout import Group, Layout, delta_block
from gramfuse_protocol.errors import ContributionError
from gramfuse_protocol.secure_sum.fixed_point import decode
from gramfuse_protocol.secure_sum.scales import scales
from gramfuse_protocol.statistics.contribution import Contribution, Float64, check_counts
from gramfuse_server.merging.solve import solve
from gramfuse_server.report.schema import Step

Deltas = Mapping[str, Float64]
"""Differences from the base by parameter name, in the parameter's own shape."""


def rounded(deltas: Deltas) -> dict[str, NDArray[np.float32]]:
    """Return differences in float32, as they are sent, by parameter name."""
    return {name: np.asarray(delta, np.float32) for name, delta in deltas.items()}


@dataclass(frozen=True)
class Merged:
    """The result of a merge.

    Example:
        >>> statistics = gramfuse.collect_statistics(tuned, [batch], layout, base=start, examples=2)
        >>> merged = gramfuse.merge([statistics, statistics], layout)
        >>> sorted(merged.deltas) == sorted(start), len(merged.steps) == len(layout.groups)
        (True, True)

    Args:
        deltas: differences of the merged model from the base.
        mean: differences of the simple average, the fallback of the merge.
        steps: how each group was solved.
    """

    deltas: Deltas
    mean: Deltas
    steps: tuple[Step, ...]

    def rounded(self) -> dict[str, NDArray[np.float32]]:
        """Return the differences in float32, as they are sent to silos, by parameter name.

        The written model is base + these, so it is bit for bit the model that silos measured.
        """
        return rounded(self.deltas)

    def after(self, start: Mapping[str, NDArray[np.float32]]) -> Merged:
        """Return the merge relative to the base, if it is relative to the start model of a later round.

        Args:
            start: the start model's differences from the base, by block name; empty if it is the base.

        Raises:
            ContributionError: naming the tensor, if a value is too large for float32.
        """
        if not start:
            return self
        deltas, mean = (
            _representable({name: start[delta_block(name)] + delta for name, delta in relative.items()})
            for relative in (self.deltas, self.mean)
        )
        return Merged(deltas, mean, self.steps)


class Accumulator:
    """Sums over silos, in float64:

        S = Σ cᵢ Ĝᵢ    T = Σ cᵢ Ĝᵢ Δᵢ    M = Σ cᵢ Δᵢ    C = Σ cᵢ    with Ĝ = α G + (1 − α) diag(G)

    S and T belong to groups, M to every tensor (`gramfuse_model.normal_equations`). Open contributions are folded in
    one by one; a secure sum is decoded and loaded at once.
    """

    def __init__(self, layout: Layout, *, alpha: float, weighting: Literal["uniform", "examples"] = "uniform") -> None:
        self.layout = layout
        self.alpha = alpha
        self.weighting = weighting
        self._sums = {block.name: np.zeros(block.shape) for block in layout.sums}

    def between(self, one: Accumulator, alpha: float) -> Accumulator:
        """Return the sums for another α, interpolated between these, for α = 0, and `one`: S and T are linear in α.

        Args:
            one: the sums of the same silos for α = 1.
        """
        sums = self.copy()
        sums.alpha = alpha
        for name, values in sums._sums.items():
            if name.startswith(("s:", "t:")):
                values *= 1 - alpha
                values += alpha * one._sums[name]
        return sums

    def copy(self) -> Accumulator:
        """Return an independent copy."""
        sums = Accumulator(self.layout, alpha=self.alpha, weighting=self.weighting)
        for name, values in self._sums.items():
            sums._sums[name][...] = values
        return sums

    @property
    def weight(self) -> float:
        """C."""
        return float(self._sums["count"][0])

    @property
    def examples(self) -> int:
        """Training examples of all silos together."""
        return int(self._sums["count"][1])

    @property
    def counts(self) -> tuple[float, ...]:
        """C, examples, token rows of each group, and C of each part, in this order."""
        return tuple(self._sums["count"].tolist())

    def of_group(self, group: Group) -> tuple[Float64, Float64, float]:
        """Return a group's packed S, its T, (features, d_out), and the total weight C of its silos."""
        part = 0 if group.part is None else 2 + len(self.layout.groups) + group.part
        return self._sums[f"s:{group.name}"], self._sums[f"t:{group.name}"], self.counts[part]

    def fold(self, contribution: Contribution, source: str, *, silo: str | None = None, share: float = 1.0) -> None:
        """Add one silo's contribution; its blocks must have been checked on arrival.

        Args:
            source: its origin, for errors.
            silo: its name in the layout's parts; required if the layout has parts.
            share: factor on the silo's weight c, and so on everything added; −1 removes an earlier contribution.

        Raises:
            ContributionError: if its counts do not fit the layout; the sums are then unchanged.
        """
        check_counts(self.layout, contribution.examples, contribution.tokens, source)
        for block, values in summands(self.layout, contribution, alpha=self.alpha, weighting=self.weighting, silo=silo):
            self._sums[block.name] += values if share == 1 else share * values

    def load(self, words: NDArray[np.uint64], silos: int) -> None:
        """Load a whole secure sum.

        Args:
            words: the unmasked sum, uint64 (layout.sum_entries,); its memory is reused.
            silos: number of silos in the plan's roster, which determines the scales.
        """
        start = 0
        for block, scale in scales(self.layout, silos, self.weighting):
            part = words[start : start + block.entries].reshape(block.shape)
            self._sums[block.name] = decode(part, scale, out=part.view(np.float64))
            start += block.entries

    def mean(self) -> Deltas:
        """Return the weighted mean of the differences: the simple average. Outputs without silos stay unchanged.

        Raises:
            ContributionError: naming the tensor, if a value is too large for float32.
        """
        held = [weight or 1.0 for weight in self._sums["count"][2 + len(self.layout.groups) :]]
        return _representable(
            {
                t.name: np.asarray(self._sums[f"m:{t.name}"] / tensor_weight(self.layout, t, self.weight, held))
                for t in self.layout.tensors
            }
        )

    def merge(self) -> Merged:
        """Solve every group; all other tensors get the mean.

        Raises:
            ContributionError: if nothing was added; naming the tensor, if a value is too large for float32.
        """
        if not self.weight > 0:
            raise ContributionError(
                f"the silos' weights sum to {self.weight}: there is nothing to merge, or a silo sent forged statistics"
            )
        average = self.mean()
        deltas = dict(average)
        steps = []
        for group in self.layout.groups:
            mean = side_by_side(self.layout, group, average)
            s, t = self._sums[f"s:{group.name}"], torch.from_numpy(self._sums[f"t:{group.name}"])
            solution, step = solve(group, s, t, mean)
            steps.append(step)
            for name, solved in one_by_one(group, solution).items():
                if group.part is not None:
                    outputs = list(self.layout.parts[group.part].outputs)
                    deltas[name] = deltas[name].copy()
                    deltas[name][outputs] = solved
                else:
                    deltas[name] = solved
        return Merged(_representable(deltas), average, tuple(steps))


def _representable(deltas: dict[str, Float64]) -> Deltas:
    for name, delta in deltas.items():
        # Half of the range is reserved for the base, which is added later.
        if not (np.abs(delta) <= np.finfo(np.float32).max / 2).all():
            raise ContributionError(
                f"tensor {name!r}: the merged difference exceeds float32: a silo's training diverged, or its "
                "statistics are wrong. Measure the silos' own models to find out which"
            )
    return deltas
