"""Arithmetic shared by methods: sums and means of the silos' differences from their common base.

All arithmetic is in float64. Differences are by parameter name, in the parameter's shape; a silo's weight for a
parameter is a scalar or an array that broadcasts to it, with 0 in rows that the silo did not train.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gramfuse_protocol.statistics.contribution import Float64

if TYPE_CHECKING:
    from gramfuse_server.merging.methods.registry import Silos

Differences = Mapping[str, NDArray[Any]]
Weights = Mapping[str, Float64]


def summed(arrays: Sequence[NDArray[Any]]) -> Float64:
    """Return the sum of arrays of one shape."""
    total = np.zeros(arrays[0].shape)
    for array in arrays:
        total += array
    return total


def averaged(values: Sequence[NDArray[Any]], weights: Sequence[NDArray[np.float64]]) -> Float64:
    """Return the weighted mean, and 0 where all weights are 0."""
    total = summed([np.asarray(weight * value, np.float64) for weight, value in zip(weights, values, strict=True)])
    weight = np.zeros(values[0].shape)
    for one in weights:
        weight += one
    return np.asarray(np.divide(total, weight, out=np.zeros_like(total), where=weight != 0))


def weighted_mean(differences: Sequence[Differences], weights: Sequence[Weights]) -> dict[str, Float64]:
    """Return Σ cᵢ Δᵢ / Σ cᵢ.

    Source: McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized Data", AISTATS 2017,
    algorithm 1, with one round.
    """
    return {name: averaged([d[name] for d in differences], [w[name] for w in weights]) for name in differences[0]}


def split_buffers(silos: Silos) -> tuple[list[Differences], dict[str, Float64]]:
    """Return the silos' differences in parameters, and their mean difference in buffers.

    Buffers such as running means are not weights: scaling or trimming their differences makes no sense.
    """
    differences, weights = silos.parents()
    names = {tensor.name for tensor in silos.layout.tensors if tensor.buffer}
    buffers = [{name: delta for name, delta in each.items() if name in names} for each in differences]
    parameters: list[Differences] = [
        {name: delta for name, delta in each.items() if name not in names} for each in differences
    ]
    return parameters, weighted_mean(buffers, weights)
