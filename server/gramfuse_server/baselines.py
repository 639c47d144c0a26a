"""Other ways to merge fine-tuned models than RegMean: functions of the silos' differences from their common base.

Everything is float64. Differences are by parameter name, in the parameter's own shape; a silo's weight for a parameter
is a number, or an array that broadcasts to the parameter: a row that a silo has no part in has the weight 0 there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Float64 = NDArray[np.float64]
Differences = Mapping[str, NDArray[Any]]
Weights = Mapping[str, NDArray[np.float64]]
Norm = Literal["per tensor", "per model", "none"]

FISHER_FLOOR = 1e-6
"""What is added to every Fisher value, relative to the mean of its tensor over the silos: where all are zero, the
result is the mean."""

TASK_ARITHMETIC_SCALE = 0.3
"""λ that Ilharco et al. found to do well for any number of tasks, where it cannot be chosen on held-out data."""

TIES_DENSITY = 0.2
"""Share of each silo's differences that is kept, of the largest magnitude; Yadav et al., section 4."""


def weighted_mean(differences: Sequence[Differences], weights: Sequence[Weights]) -> dict[str, Float64]:
    """Return Σ cᵢ Δᵢ / Σ cᵢ.

    Source: McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized Data", AISTATS 2017,
    algorithm 1, with one round.
    """
    return {name: _mean([d[name] for d in differences], [w[name] for w in weights]) for name in differences[0]}


def normalised(fisher: Differences, norm: Norm) -> dict[str, Float64]:
    """Return a silo's Fisher values divided by their Euclidean norm, so that no silo counts for its gradients' size.

    Args:
        norm: over each tensor, over the whole model, or not at all; what is all zero stays so.

    Source: the code of Jin et al., "Dataless Knowledge Fusion by Merging Weights of Language Models", ICLR 2023.
    """
    exact = {name: np.asarray(values, np.float64) for name, values in fisher.items()}
    if norm == "none":
        return exact
    norms = {name: float(np.linalg.norm(values)) for name, values in exact.items()}
    whole = float(np.linalg.norm(list(norms.values())))
    return {name: values / ((whole if norm == "per model" else norms[name]) or 1.0) for name, values in exact.items()}


def fisher_mean(
    differences: Sequence[Differences], fishers: Sequence[Differences], weights: Sequence[Weights]
) -> dict[str, Float64]:
    """Return Σ cᵢ Fᵢ Δᵢ / Σ cᵢ Fᵢ, element by element.

    Args:
        fishers: each silo's diagonal Fisher information, ≥ 0, in the shapes of the differences; what has none, as
            buffers have, gets the mean.

    Source: Matena and Raffel, "Merging Models with Fisher-Weighted Averaging", NeurIPS 2022, equation 4, written for
    the differences from a common base. FISHER_FLOOR stands for what they add to avoid a division by zero.
    """
    merged = {}
    for name in differences[0]:
        values = [np.asarray(fisher.get(name, 0.0), np.float64) for fisher in fishers]
        floor = FISHER_FLOOR * float(np.mean([value.mean() for value in values])) or 1.0
        merged[name] = _mean(
            [d[name] for d in differences], [w[name] * (f + floor) for w, f in zip(weights, values, strict=True)]
        )
    return merged


def task_arithmetic(differences: Sequence[Differences], scale: float = TASK_ARITHMETIC_SCALE) -> dict[str, Float64]:
    """Return λ Σ Δᵢ.

    Args:
        scale: λ.

    Source: Ilharco et al., "Editing Models with Task Arithmetic", ICLR 2023, section 2: θ_new = θ_pre + λ Σ τᵢ.
    """
    return {name: np.asarray(scale * _sum([d[name] for d in differences])) for name in differences[0]}


def ties(differences: Sequence[Differences], density: float = TIES_DENSITY, scale: float = 1.0) -> dict[str, Float64]:
    """Trim each silo's differences, elect a sign for each element, and return λ times the mean of those that have it.

    Args:
        density: share of a silo's differences, over its whole model, that is kept, in (0, 1].
        scale: λ.

    Source: Yadav et al., "TIES-Merging: Resolving Interference When Merging Models", NeurIPS 2023, algorithm 1.
    """
    thresholds = [_threshold(d, density) for d in differences]
    merged = {}
    for name in differences[0]:
        kept = [
            np.where(np.abs(d[name]) >= least, d[name], 0.0).astype(np.float64)
            for d, least in zip(differences, thresholds, strict=True)
        ]
        elected = np.sign(_sum(kept))
        agreeing = [(np.sign(values) == elected) & (values != 0) for values in kept]
        count = _sum([np.asarray(agrees, np.float64) for agrees in agreeing])
        total = _sum([values * agrees for values, agrees in zip(kept, agreeing, strict=True)])
        merged[name] = scale * total / np.maximum(count, 1.0)
    return merged


def _threshold(difference: Differences, density: float) -> float:
    """Return the magnitude from which on an element is among the largest of a silo's whole model."""
    magnitudes = np.concatenate([np.abs(values).ravel() for values in difference.values()])
    kept = max(1, round(density * magnitudes.size))
    return float(np.partition(magnitudes, magnitudes.size - kept)[magnitudes.size - kept])


def _sum(arrays: Sequence[NDArray[Any]]) -> Float64:
    total = np.zeros(arrays[0].shape)
    for array in arrays:
        total += array
    return total


def _mean(values: Sequence[NDArray[Any]], weights: Sequence[NDArray[np.float64]]) -> Float64:
    """Return the weighted mean, and 0 where nothing has a weight."""
    total = _sum([np.asarray(weight * value, np.float64) for weight, value in zip(weights, values, strict=True)])
    weight = np.zeros(values[0].shape)
    for one in weights:
        weight += one
    return np.asarray(np.divide(total, weight, out=np.zeros_like(total), where=weight != 0))
