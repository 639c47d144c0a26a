"""The running sums of a merge. Their size does not depend on the number of silos."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from gramfuse_protocol.errors import ContributionError
from gramfuse_protocol.layout import Group, Layout, Linear, delta_block, gram_block
from gramfuse_protocol.statistics import Contribution, check_counts
from gramfuse_server.solve import Step, solve

Float64 = NDArray[np.float64]
Deltas = Mapping[str, Float64]
"""Differences from the base by parameter name, in the parameter's own shape."""


@dataclass(frozen=True)
class Merged:
    """What a merge gives.

    Args:
        deltas: differences of the merged model from the base.
        mean: those of the simple average, which the merge falls back to.
        steps: how each group was solved.
    """

    deltas: Deltas
    mean: Deltas
    steps: tuple[Step, ...]


class Accumulator:
    """Sums over silos, in float64:

        S = Σ cᵢ Ĝᵢ    T = Σ cᵢ Ĝᵢ Δᵢ    M = Σ cᵢ Δᵢ    C = Σ cᵢ    with Ĝ = α G + (1 − α) diag(G)

    S and T belong to groups, M to every tensor. cᵢ is 1 (`uniform`) or the number of examples (`examples`).

    Source: Jin et al., "Dataless Knowledge Fusion by Merging Weights of Language Models", ICLR 2023, equation 2
    and section 3.3, written for the differences from a common base.
    """

    def __init__(self, layout: Layout, *, alpha: float, weighting: Literal["uniform", "examples"] = "uniform") -> None:
        self.layout = layout
        self.alpha = alpha
        self.weighting = weighting
        self.weight = 0.0
        self._s = {group.name: np.zeros(group.blocks.entries) for group in layout.groups}  # packed
        self._t = {group.name: torch.zeros(group.d_in, _width(group), dtype=torch.float64) for group in layout.groups}
        self._m = {tensor.name: np.zeros(tensor.shape) for tensor in layout.tensors}

    def fold(self, contribution: Contribution, source: str) -> None:
        """Add one silo's contribution, whose blocks were checked when they came.

        Args:
            source: who it is from, for errors.

        Raises:
            ContributionError: if its counts do not fit the layout; the sums are then unchanged.
        """
        check_counts(self.layout, contribution.examples, contribution.tokens, source)
        c = float(contribution.examples) if self.weighting == "examples" else 1.0
        for tensor in self.layout.tensors:
            self._m[tensor.name] += c * contribution.block(delta_block(tensor.name))
        for group in self.layout.groups:
            parts = group.blocks.unpack(contribution.block(gram_block(group.name)).astype(np.float64))
            delta = torch.cat([_inward(w, contribution.block(delta_block(w.weight))) for w in group.weights], dim=1)
            for part, (first, count, width) in zip(parts, group.blocks.parts, strict=True):
                gram = torch.from_numpy(part)  # (count, width, width)
                diagonal = gram.diagonal(dim1=1, dim2=2).clone()
                gram *= self.alpha * c
                gram.diagonal(dim1=1, dim2=2).copy_(c * diagonal)
                rows = slice(first, first + count * width)
                self._t[group.name][rows] += (gram @ delta[rows].view(count, width, -1)).view(count * width, -1)
            self._s[group.name] += group.blocks.pack(parts)
        self.weight += c

    def mean(self) -> Deltas:
        """Return the weighted mean of the differences: the simple average.

        Raises:
            ContributionError: naming the tensor, if a value is beyond float32.
        """
        return _representable({name: total / self.weight for name, total in self._m.items()})

    def merge(self) -> Merged:
        """Solve every group; all other tensors get the mean.

        Raises:
            ValueError: if nothing was folded.
            ContributionError: naming the tensor, if a value is beyond float32.
        """
        if not self.weight:
            raise ValueError("nothing was folded")
        average = self.mean()
        deltas = dict(average)
        steps = []
        for group in self.layout.groups:
            mean = torch.cat([_inward(w, deltas[w.weight]) for w in group.weights], dim=1)
            solution, step = solve(group, self._s[group.name], self._t[group.name], mean)
            steps.append(step)
            start = 0
            for weight in group.weights:
                columns = solution[:, start : start + weight.d_out]
                deltas[weight.weight] = (columns.T if weight.transposed else columns).contiguous().numpy()
                start += weight.d_out
        return Merged(_representable(deltas), average, tuple(steps))


def _representable(deltas: dict[str, Float64]) -> Deltas:
    for name, delta in deltas.items():
        # Half of the range is left for the base that the difference is added to.
        if not (np.abs(delta) <= np.finfo(np.float32).max / 2).all():
            raise ContributionError(
                f"tensor {name!r}: the merged difference is beyond what float32 can hold; a silo's training diverged, "
                "or its statistics are wrong. Measure the silos' own models to find which"
            )
    return deltas


def _width(group: Group) -> int:
    return sum(weight.d_out for weight in group.weights)


def _inward(weight: Linear, array: NDArray[np.floating]) -> torch.Tensor:
    """Return a weight's difference as float64 (d_in, d_out)."""
    tensor = torch.from_numpy(np.array(array, np.float64))
    return tensor.T if weight.transposed else tensor
