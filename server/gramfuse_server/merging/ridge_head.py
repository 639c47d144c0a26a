"""Fits the last layer of a regression in closed form: ridge regression on centred features.

With N examples, the means m and ȳ of features and targets, and S = Σ x xᵀ / N − m mᵀ, the covariance of the features,

    w = (S + λ · mean(diag S) · I)⁻¹ (Σ x y / N − m ȳ)        b = ȳ − mᵀ w

Features are centred, so the intercept is not shrunk: the average example is predicted to have the average target,
whatever λ is. λ is set by the same oracle approximating shrinkage as that of the other heads. The error of w comes from
that of S, whose small eigenvalues are too small if there are few examples for the number of features; this rule is made
for the least expected error of S, and needs nothing but S and N: no sum of squared targets, and no validation data.

The head is the least-squares fit on the features as they are, so training that starts from it has no first steps to
make in the head; it is not scaled down, which would only bring the error back.
"""

from __future__ import annotations

import numpy as np

from gramfuse_protocol.errors import MergeError
from gramfuse_protocol.statistics.head_sums import HeadSums
from gramfuse_server.merging.closed_form_head import ROUNDING, Head, approximating_shrinkage


def fit_ridge(sums: HeadSums) -> Head:
    """Return the closed-form head of the examples that the sums are over, with an output for each column of y.

    Raises:
        MergeError: if there are fewer than two examples, or the features do not vary.
    """
    total = sums.examples
    if total < 1.5:
        raise MergeError("a head is fitted from two examples at least; there are fewer")
    center, average = sums.second[:-1, -1] / total, sums.counts / total
    covariance = sums.second[:-1, :-1] / total - np.outer(center, center)
    variance = float(np.trace(covariance)) / len(covariance)
    if not np.isfinite(variance) or variance <= ROUNDING * float(np.trace(sums.second[:-1, :-1])) / total / len(
        covariance
    ):
        raise MergeError("the features that enter the head do not vary, so no head can be fitted to them")
    shrinkage = approximating_shrinkage(covariance, total)
    together = sums.first[:-1] / total - np.outer(center, average)
    shrunk = covariance + shrinkage * variance * np.eye(len(covariance))
    slopes = np.asarray(np.linalg.solve(shrunk, together), np.float64)
    return Head(slopes.T.copy(), average - center @ slopes, shrinkage)
