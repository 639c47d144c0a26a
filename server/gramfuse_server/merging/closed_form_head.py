"""Fits the last layer of a classifier in closed form: a linear discriminant with a shrunk covariance.

For tasks with exactly one label for each example; `ridge_head` and `label_heads` are for others.

With N examples, n_c of label c, their means μ_c, the mean m of all, and Σ_w the covariance within labels,

    Σ_w = (Σ x xᵀ − Σ_c n_c μ_c μ_cᵀ) / N        Σ̃ = (Σ_w + λ · mean(diag Σ_w) · I) / (1 + λ)
    w_c = Σ̃⁻¹ (μ_c − m)                          b_c = −½ (μ_c − m)ᵀ w_c − mᵀ w_c + log(n_c / N)

This is Fisher's linear discriminant for features that are normal within labels with one covariance. It needs sums over
examples only, so silos' sums give the head of all examples together. λ is set by the oracle approximating shrinkage of
Chen, Wiesel, Eldar and Hero ("Shrinkage algorithms for MMSE covariance estimation", IEEE TSP 2010), which needs nothing
but Σ_w and N.

Such a head is too sure of itself: a mean of n_c examples is off by noise of covariance Σ_w / n_c, which adds about
p / n_c to the squared distances that its outputs are made of, with p the directions that shrinkage leaves free,
tr(Σ_w Σ̃⁻¹). Averaged over examples that is p C / N for C labels, and outputs are divided by 1 + p C / N. That is a
rule, not a theorem: normal features would allow more. On the untouched MiniLM, with 2 to 150 labels, the loss on
validation examples is then within 0.02 of the least over all factors (`benchmarks/accuracy/calibration.py`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from gramfuse_protocol.errors import MergeError
from gramfuse_protocol.statistics.contribution import Float64
from gramfuse_protocol.statistics.head_sums import HeadSums

ROUNDING = 1e-13
"""Variance of features, relative to their mean square, that can be rounding alone."""


@dataclass(frozen=True, eq=False)
class Head:
    """A last linear layer with C outputs.

    Args:
        weight: (C, D), float64.
        bias: (C,), float64.
        shrinkage: λ.
        absent: labels that no example tells anything about: their weights are zero, and their bias makes them unlikely.
        certainty: factor on its outputs, in (0, 1], with which its probabilities are neither too sure nor too unsure.
    """

    weight: Float64
    bias: Float64
    shrinkage: float
    absent: tuple[int, ...] = ()
    certainty: float = 1.0

    def scaled(self, factor: float) -> Head:
        """Return this head with outputs that are smaller or larger by a factor."""
        return replace(self, weight=factor * self.weight, bias=factor * self.bias)

    @property
    def calibrated(self) -> Head:
        """This head with the outputs that its certainty allows."""
        return replace(self.scaled(self.certainty), certainty=1.0)


def fit_head(sums: HeadSums, *, prior: bool) -> Head:
    """Return the closed-form head of the examples that the sums are over.

    Args:
        prior: whether labels count by how often they are (log n_c / N), or all the same.

    Raises:
        MergeError: if there are no examples of two labels, or the features do not vary within labels.
    """
    counts, present = sums.counts, sums.counts > 0.5
    total = float(counts[present].sum())
    second, first = sums.second[:-1, :-1], sums.first[:-1]
    if present.sum() < 2:
        raise MergeError(
            "a head is fitted from examples of two labels at least, and the silos' sums have fewer; check their "
            'labels, and limits.minimum-label-examples, or use model.head = "same"'
        )
    means = first[:, present] / counts[present]
    center = first[:, present].sum(axis=1) / total
    within = (second - (means * counts[present]) @ means.T) / total
    variance = float(np.trace(within)) / len(within)
    if not np.isfinite(variance) or variance <= ROUNDING * float(np.trace(second)) / total / len(within):
        raise MergeError("the features that enter the head do not vary within labels, so no head can be fitted to them")
    shrinkage = approximating_shrinkage(within, total)
    apart = means - center[:, None]
    regular = (within + shrinkage * variance * np.eye(len(within))) / (1 + shrinkage)
    solved = np.linalg.solve(regular, np.concatenate([apart, within], axis=1))
    directions, free = solved[:, : apart.shape[1]], float(np.trace(solved[:, apart.shape[1] :]))
    weight, bias = np.zeros((len(counts), len(within))), np.empty(len(counts))
    weight[present] = directions.T
    bias[present] = -0.5 * (apart * directions).sum(axis=0) - center @ directions
    if prior:
        bias[present] += np.log(counts[present] / total)
    bias[~present] = bias[present].min() - np.log(2 * total)
    certainty = 1 / (1 + free * int(present.sum()) / total)
    return Head(weight, bias, shrinkage, tuple(np.flatnonzero(~present).tolist()), certainty)


def without_bias(head: Head, sums: HeadSums, *, relative: bool) -> Head:
    """Return a head for a layer without bias: its bias as a linear function of the features.

    With Σ x xᵀ u ≈ Σ x, uᵀ x is 1 for an average example, so W + b uᵀ stands for W and b.

    Args:
        sums: those that the head was fitted from.
        relative: whether only differences of outputs count; a constant in all biases is then taken out first.
    """
    second, ones = sums.second[:-1, :-1], sums.second[:-1, -1]
    ridge = 1e-6 * float(np.trace(second)) / len(second)
    direction = np.linalg.solve(second + ridge * np.eye(len(second)), ones)
    bias = head.bias - head.bias.mean() if relative else head.bias
    return replace(head, weight=head.weight + bias[:, None] * direction, bias=np.zeros_like(bias))


def approximating_shrinkage(covariance: Float64, examples: float) -> float:
    """Return the λ of Σ + λ · mean(diag Σ) · I by oracle approximating shrinkage, 0 or more.

    With p features, n examples and ρ the share of the identity in (1 − ρ) Σ + ρ · mean(diag Σ) · I,
    ρ = min(1, ((1 − 2/p) tr Σ² + tr² Σ) / ((n + 1 − 2/p) (tr Σ² − tr² Σ / p))), and λ = ρ / (1 − ρ); of ρ = 1, 10⁶.

    Source: Chen et al. 2010, equation 23.
    """
    p = len(covariance)
    square, trace = float((covariance * covariance).sum()), float(np.trace(covariance))
    spread = (examples + 1 - 2 / p) * (square - trace * trace / p)
    rho = 1.0 if spread <= 0 else min(1.0, ((1 - 2 / p) * square + trace * trace) / spread)
    return min(1e6, rho / (1 - rho)) if rho < 1 else 1e6
