"""The mean of the silos' parameters, weighted by their Fisher information."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from gramfuse_protocol.statistics.contribution import Float64
from gramfuse_server.merging.methods.arithmetic import Differences, Weights, averaged
from gramfuse_server.merging.methods.registry import MethodModel, Options, Silos, method

Norm = Literal["per tensor", "per model", "none"]

EXAMPLES = 256
VARIANTS = ("hard", "soft", "empirical")
NORMS: dict[str, Norm] = {"tensor": "per tensor", "model": "per model", "none": "none"}

FISHER_FLOOR = 1e-6
"""Constant added to every Fisher value, relative to the mean of its tensor over the silos; if all values are zero, the
result is the mean."""


def _options(values: Sequence[str]) -> dict[str, Any]:
    options: dict[str, Any] = {"variant": None, "norm": "per tensor", "examples": EXAMPLES}
    seen: dict[str, str] = {}
    for value in values:
        if value in VARIANTS:
            key, options["variant"] = "variant", value
        elif value in NORMS:
            key, options["norm"] = "norm", NORMS[value]
        elif value.isascii() and value.isdigit() and int(value):
            key, options["examples"] = "number of examples", int(value)
        else:
            raise ValueError(f"{value!r} is not a variant, a norm or a number of examples")
        if key in seen:
            raise ValueError(f"{seen[key]!r} and {value!r} are both a {key}")
        seen[key] = value
    return options


@method(
    name="fisher",
    label="fisher",
    words="the mean of the silos' parameters, weighted by their Fisher information",
    paper="Matena and Raffel, NeurIPS 2022",
    options=Options(
        "[:hard|soft|empirical][:tensor|model|none][:EXAMPLES]",
        "for the most likely label, all labels, or the true label; normalised per tensor, per model, or not at all; "
        f"over {EXAMPLES} examples of each silo by default",
        _options,
    ),
    needs=("fisher",),
)
def fisher(silos: Silos, variant: str | None, norm: Norm, examples: int) -> MethodModel:
    """Measure and normalise each silo's Fisher information, and return the mean weighted by it."""
    fishers = [silos.fisher(name, variant, examples) for name in silos.names]
    differences, weights = silos.parents()
    about = [*dict.fromkeys(chosen for chosen, _ in fishers), "not normalised" if norm == "none" else norm]
    if examples != EXAMPLES:
        about.append(f"{examples} examples")
    return MethodModel(fisher_mean(differences, [normalised(values, norm) for _, values in fishers], weights), about)


def normalised(fisher: Differences, norm: Norm) -> dict[str, Float64]:
    """Return a silo's Fisher values divided by their Euclidean norm, so that large gradients do not dominate.

    Args:
        norm: over each tensor, over the whole model, or none; zeros stay zero.

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
        fishers: each silo's diagonal Fisher information, ≥ 0, in the shapes of the differences; tensors without it,
            such as buffers, get the mean.

    Source: Matena and Raffel, "Merging Models with Fisher-Weighted Averaging", NeurIPS 2022, equation 4, applied to
    differences from a common base. FISHER_FLOOR replaces their constant against division by zero.
    """
    merged = {}
    for name in differences[0]:
        values = [np.asarray(fisher.get(name, 0.0), np.float64) for fisher in fishers]
        floor = FISHER_FLOOR * float(np.mean([value.mean() for value in values])) or 1.0
        merged[name] = averaged(
            [d[name] for d in differences], [w[name] * (f + floor) for w, f in zip(weights, values, strict=True)]
        )
    return merged
