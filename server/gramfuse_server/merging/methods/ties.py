"""Differences from the base, trimmed, and added where silos agree on the sign."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from gramfuse_protocol.statistics.contribution import Float64
from gramfuse_server.merging.methods.arithmetic import Differences, split_buffers, summed
from gramfuse_server.merging.methods.registry import MethodModel, Silos, method, number

DENSITY = 0.2
"""Share of each silo's differences to keep, by magnitude; Yadav et al., section 4."""


@method(
    name="ties",
    label="ties",
    words="differences from the base, trimmed, and added where silos agree on the sign",
    paper="Yadav et al., NeurIPS 2023",
    options=number("density", DENSITY, 1, f"the largest {DENSITY:g} of each silo's by default"),
    needs=("models",),
)
def trimmed(silos: Silos, density: float) -> MethodModel:
    """Return TIES of the parameters' differences, and the mean of the buffers'."""
    differences, buffers = split_buffers(silos)
    return MethodModel(ties(differences, density) | buffers, (f"density {density:g}",))


def ties(differences: Sequence[Differences], density: float = DENSITY, scale: float = 1.0) -> dict[str, Float64]:
    """Trim each silo's differences, elect a sign per element, and return λ times the mean of those with that sign.

    Args:
        density: share of a silo's differences to keep, over its whole model, in (0, 1].
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
        elected = np.sign(summed(kept))
        agreeing = [(np.sign(values) == elected) & (values != 0) for values in kept]
        count = summed([np.asarray(agrees, np.float64) for agrees in agreeing])
        total = summed([values * agrees for values, agrees in zip(kept, agreeing, strict=True)])
        merged[name] = scale * total / np.maximum(count, 1.0)
    return merged


def _threshold(difference: Differences, density: float) -> float:
    """Return the smallest magnitude to keep, over a silo's whole model."""
    magnitudes = np.concatenate([np.abs(values).ravel() for values in difference.values()])
    kept = max(1, round(density * magnitudes.size))
    return float(np.partition(magnitudes, magnitudes.size - kept)[magnitudes.size - kept])
