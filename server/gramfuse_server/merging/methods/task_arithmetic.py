"""The base plus the scaled sum of the silos' differences from it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from gramfuse_protocol.statistics.contribution import Float64
from gramfuse_server.merging.methods.arithmetic import Differences, split_buffers, summed
from gramfuse_server.merging.methods.registry import MethodModel, Silos, method, number

SCALE = 0.3
"""λ that works for any number of tasks according to Ilharco et al., if it cannot be chosen on held-out data."""


@method(
    name="task-arithmetic",
    label="task arithmetic",
    words="the base model plus the scaled sum of the silos' differences from it",
    paper="Ilharco et al., ICLR 2023",
    options=number("scale", SCALE, 100, f"times {SCALE:g} by default"),
    needs=("models",),
)
def scaled_sum(silos: Silos, scale: float) -> MethodModel:
    """Return the scaled sum of the parameters' differences, and the mean of the buffers'."""
    differences, buffers = split_buffers(silos)
    return MethodModel(task_arithmetic(differences, scale) | buffers, (f"scale {scale:g}",))


def task_arithmetic(differences: Sequence[Differences], scale: float = SCALE) -> dict[str, Float64]:
    """Return λ Σ Δᵢ.

    Args:
        scale: λ.

    Source: Ilharco et al., "Editing Models with Task Arithmetic", ICLR 2023, section 2: θ_new = θ_pre + λ Σ τᵢ.
    """
    return {name: np.asarray(scale * summed([d[name] for d in differences])) for name in differences[0]}
