"""How much a model changes: the size of its differences from the base, beside the base itself.

Coordinator and silos call the same function, so that a silo finds for itself what the report of an honest coordinator
would say of the model that it is given.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from gramfuse_protocol.contract.layout import Layout, delta_block
from gramfuse_protocol.errors import RefusalError

QUIETEST = 0.02
"""Root mean square that a tensor of the base counts as having at least: that of weights which transformers draws anew.

A bias that starts at zero would change by infinitely much otherwise.
"""

QUIETEST_BUFFER = 1.0
"""The same of a buffer: that of running variances which are drawn anew."""


def changes(model: nn.Module, differences: Mapping[str, NDArray[Any]]) -> dict[str, float]:
    """Return for each parameter how much it changes: the norm of its difference over that of the base's tensor.

    Args:
        model: the base.
        differences: from the base, by name of a parameter or buffer, in its own shape.

    Returns:
        Of each difference its root mean square, divided by that of the base's tensor or by QUIETEST, whichever is more;
        NaN or infinity if the difference holds that. Counters are left out: how far they count says nothing.
    """
    tensors, buffers = model.state_dict(), dict(model.named_buffers())
    found = {}
    for name, difference in differences.items():
        base, quietest = tensors[name].cpu().numpy(), QUIETEST_BUFFER if name in buffers else QUIETEST
        if np.issubdtype(base.dtype, np.floating):
            found[name] = _root_mean_square(difference) / max(_root_mean_square(base), quietest)
    return found


def check_changes(model: nn.Module, layout: Layout, arrays: Mapping[str, NDArray[Any]], limit: float) -> None:
    """Refuse a model that differs from the base by more than silos agreed on.

    Base, plan and what the coordinator sent decide it, and no data do, so the reason may travel.

    Args:
        model: the base.
        layout: the plan's.
        arrays: the other model's differences from the base, `delta:<parameter>`.
        limit: `merge.maximum-change` of the plan.

    Raises:
        RefusalError: naming the tensor that changes most.
    """
    found = changes(model, {tensor.name: arrays[delta_block(tensor.name)] for tensor in layout.tensors})
    worst = max(found, key=lambda name: np.nan_to_num(found[name], nan=np.inf))
    if not found[worst] <= limit:
        told = (
            f"the model that came changes tensor {worst!r} by {found[worst]:.3g} times the base's norm; the plan "
            f"allows {limit:g} (merge.maximum-change)"
        )
        raise RefusalError(
            f"{told}. A silo's training diverged, or a silo or the coordinator did not send what it measured: do not "
            "use this model",
            reason=told,
        )


def _root_mean_square(values: NDArray[Any]) -> float:
    with np.errstate(over="ignore", invalid="ignore"):  # what is no number is told as such
        return float(np.sqrt(np.mean(np.square(values, dtype=np.float64))))
