"""Truncates a merged adapter to a smaller rank, with the least loss in its outputs on the silos' data.

A merged adapter adds C Ā x to a layer's output, with Ā (k, d_in) the rows of all A and C (d_out, k) merged. Over the
silos' inputs, G = Σ c Ĝ is the second moment of Ā x, so an error E in C costs tr(E G Eᵀ). With G = L Lᵀ and the
singular value decomposition C L = U Σ Vᵀ, the best C of rank r is U_r Σ_r V_rᵀ L⁺ (Eckart & Young, 1936). It is split
evenly: B = U_r √Σ_r and A = √Σ_r V_rᵀ L⁺ Ā.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

SMALLEST = 1e-12
"""Smallest eigenvalue of G, relative to the largest, that counts: smaller ones are rounding."""

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Truncated:
    """An adapter of a smaller rank.

    Args:
        b: (d_out, rank).
        a: (rank, d_in).
        lost: share of the adapter's mean square output that the truncation loses, 0 to 1.
    """

    b: Array
    a: Array
    lost: float


def truncate(c: Array, rows: Array, second: Array | None, rank: int) -> Truncated:
    """Return the best adapter of a smaller rank.

    Args:
        c: C, (d_out, k).
        rows: Ā, (k, d_in).
        second: G, (k, k); by default that of uncorrelated inputs of equal size, which makes Ā Āᵀ of it.
        rank: r; at most k.
    """
    moment = rows @ rows.T if second is None else second
    values, vectors = np.linalg.eigh((moment + moment.T) / 2)
    kept = values > SMALLEST * max(values[-1], 0)
    roots = np.sqrt(values[kept])
    left, inverse = vectors[:, kept] * roots, vectors[:, kept] / roots
    u, sizes, v = np.linalg.svd(c @ left, full_matrices=False)
    some = min(rank, len(sizes))
    total = float((sizes**2).sum())
    b, a = np.zeros((len(c), rank)), np.zeros((rank, rows.shape[1]))
    balance = np.sqrt(sizes[:some])
    b[:, :some] = u[:, :some] * balance
    a[:some] = balance[:, None] * (v[:some] @ inverse.T @ rows)
    return Truncated(b, a, float((sizes[some:] ** 2).sum()) / total if total else 0.0)
