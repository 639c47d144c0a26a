"""Fits the last layer of a multi-label classifier in closed form: a two-class discriminant for each label.

A label l divides the N examples into n₁ that have it, n₀ that do not, and nᵤ of which it is not known, since their
silos do not annotate it; with μ₁, μ₀ and μᵤ their means, and Σ_l the covariance within these three,

    Σ_l = (Σ x xᵀ − n₁ μ₁ μ₁ᵀ − n₀ μ₀ μ₀ᵀ − nᵤ μᵤ μᵤᵀ) / N        Σ̃_l = Σ_l + λ · mean(diag S) · I
    w_l = Σ̃_l⁻¹ (μ₁ − μ₀)                                          b_l = −½ (μ₁ + μ₀)ᵀ w_l + log(n₁ / n₀)

so that σ(w_lᵀ x + b_l) is the probability of the label for features that are normal, with one covariance, around μ₁ and
μ₀. The prior log(n₁ / n₀) belongs to it: `threshold` is one on that probability. All labels share Σ x xᵀ, so one matrix
is solved for all of them: with S the covariance of all examples, Σ_l = S − U Uᵀ, where U has two columns,

    √(n₁ n₀ / ((n₁ + n₀) N)) (μ₁ − μ₀)        (√((n₁ + n₀) nᵤ) / N) (μₐ − μᵤ)        μₐ: the mean of both

and Σ̃_l⁻¹ follows from S̃⁻¹ by Woodbury's identity. λ is that of oracle approximating shrinkage for S and N.

Among the nᵤ examples are some that would have the label, so Σ_l is too large along μ₁ − μ₀. Where silos are alike, that
makes the label's outputs smaller, and leaves the direction of w_l as it is.

Before training, a label's output is its prior for an average example and varies little around it:
w = s · w_l and b = log(n₁ / n₀) − μₐᵀ w. Otherwise each silo would first have to teach its head how rare labels are.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from gramfuse_protocol.errors import MergeError
from gramfuse_protocol.statistics.contribution import Float64
from gramfuse_protocol.statistics.head_sums import HeadSums
from gramfuse_server.merging.closed_form_head import ROUNDING, Head, approximating_shrinkage


class _Groups(NamedTuple):
    """How each label divides the examples.

    Attributes:
        with_it, without_it, unknown: number of examples, (C,).
        apart: μ₁ − μ₀, (D, C); zero where one of them has no example.
        middle: (μ₁ + μ₀) / 2, (D, C).
        known: μₐ, (D, C).
        beyond: μₐ − μᵤ, (D, C); zero where all examples are annotated.
    """

    with_it: Float64
    without_it: Float64
    unknown: Float64
    apart: Float64
    middle: Float64
    known: Float64
    beyond: Float64


def fit_labels(sums: HeadSums, *, start: float | None) -> Head:
    """Return the closed-form head of the examples that the sums are over.

    A label that all annotated examples have, or none, has no weights, and the bias of its share of them with half an
    example more of each kind.

    Args:
        sums: `first` has two columns for each label: of the examples that have it, and of those annotated for it.
        start: factor s on the weights of a head that training starts from; None for a finished head.

    Raises:
        MergeError: if no example is annotated for a label, the features do not vary, or the sums are of no examples.
    """
    total, groups = sums.examples, _groups(sums)
    annotated = groups.with_it + groups.without_it
    center = sums.second[:-1, -1] / total
    covariance = sums.second[:-1, :-1] / total - np.outer(center, center)
    variance = float(np.trace(covariance)) / len(covariance)
    if not np.isfinite(variance) or variance <= ROUNDING * float(np.trace(sums.second[:-1, :-1])) / total / len(
        covariance
    ):
        raise MergeError("the features that enter the head do not vary, so no head can be fitted to them")
    shrinkage = approximating_shrinkage(covariance, total)
    one = groups.apart * np.sqrt(groups.with_it * groups.without_it / (annotated * total))
    other = groups.beyond * np.sqrt(annotated * groups.unknown) / total
    parts = np.stack([groups.apart, one, other])
    shrunk = covariance + shrinkage * variance * np.eye(len(covariance))
    solved = np.linalg.solve(shrunk, np.concatenate(list(parts), axis=1)).reshape(len(center), 3, -1)
    directions = _less(parts[1:].transpose(1, 0, 2), solved)
    divided = (groups.with_it > 0.5) & (groups.without_it > 0.5)
    more = np.where(divided, 0.0, 0.5)
    prior = np.log(groups.with_it + more) - np.log(groups.without_it + more)
    if start is None:
        bias = prior - (groups.middle * directions).sum(axis=0)
    else:
        directions *= start
        bias = prior - (groups.known * directions).sum(axis=0)
    return Head(directions.T.copy(), bias, shrinkage, tuple(np.flatnonzero(~divided).tolist()))


def _groups(sums: HeadSums) -> _Groups:
    """Return how each label divides the examples.

    Raises:
        MergeError: if no example is annotated for a label.
    """
    labels = sums.first.shape[1] // 2
    positive, annotated = sums.first[:, :labels], sums.first[:, labels:]
    unmarked = np.flatnonzero(annotated[-1] < 0.5)
    if len(unmarked):
        raise MergeError(
            f"no example of the silos in the sum is annotated for label {int(unmarked[0])} (counted from 0), so its "
            "part of the head cannot be fitted; a silo that annotates it must take part"
        )
    negative = annotated - positive
    unknown = sums.second[:, -1:] - annotated
    divided = (positive[-1] > 0.5) & (negative[-1] > 0.5)
    with_it, without_it, known, others = (_means(part) for part in (positive, negative, annotated, unknown))
    return _Groups(
        np.maximum(positive[-1], 0.0),
        np.maximum(negative[-1], 0.0),
        np.maximum(unknown[-1], 0.0),
        np.where(divided, with_it - without_it, 0.0),
        (with_it + without_it) / 2,
        known,
        np.where(unknown[-1] > 0.5, known - others, 0.0),
    )


def _means(part: Float64) -> Float64:
    """Return means of features, (D, C), from their sums with the counts below, (D + 1, C); zero without examples."""
    means: Float64 = part[:-1] / np.where(part[-1] > 0.5, part[-1], np.inf)
    return means


def _less(columns: Float64, solved: Float64) -> Float64:
    """Return (S̃ − U Uᵀ)⁻¹ d for each label, (D, C).

    Args:
        columns: U of each label, (D, 2, C).
        solved: S̃⁻¹ d and S̃⁻¹ U of each label, (D, 3, C).

    Raises:
        MergeError: if S̃ − U Uᵀ is not positive definite, so that the sums are of no examples.
    """
    inner = np.eye(2) - np.einsum("dul,dvl->luv", columns, solved[:, 1:])
    if not (np.linalg.eigvalsh(inner)[:, 0] > 0).all():
        raise MergeError(
            "the sums of the head are of no examples: a label's features vary more than all features do; a silo's sums "
            "are wrong: fit heads of the silos alone to find out whose"
        )
    factors = np.linalg.solve(inner, np.einsum("dul,dl->lu", columns, solved[:, 0])[..., None])[..., 0]
    directions: Float64 = solved[:, 0] + np.einsum("dul,lu->dl", solved[:, 1:], factors)
    return directions
