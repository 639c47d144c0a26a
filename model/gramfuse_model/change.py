"""How much a model changed: the size of its differences relative to the base.

Coordinator and silos call the same function, so each silo computes for itself what an honest coordinator's report would
say about the model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from gramfuse_model.adapters.attach import NAME, is_adapter
from gramfuse_protocol.contract.head_layout import HeadLayout
from gramfuse_protocol.contract.layout import Layout, delta_block
from gramfuse_protocol.errors import RefusalError

QUIETEST = 0.02
"""Lower bound on the root mean square of a base tensor: that of weights newly initialised by transformers.

Otherwise the relative change of a bias that starts at zero would be infinite.
"""

QUIETEST_BUFFER = 1.0
"""The same for a buffer: that of newly initialised running variances."""


def changes(
    model: nn.Module,
    differences: Mapping[str, NDArray[Any]],
    head: HeadLayout | None = None,
    start: Mapping[str, NDArray[Any]] | None = None,
) -> dict[str, float]:
    """Return the relative change of each tensor: the norm of its difference over the norm of the base's tensor.

    Args:
        model: the base.
        differences: differences from the base by name of a parameter or buffer, in its shape.
        head: the head that is fitted in closed form. It is compared with the start instead, because the base's random
            head says nothing about its size, and omitted without one.
        start: the model that silos trained from, as differences from the base by block name.

    Returns:
        The root mean square of each difference, divided by the larger of QUIETEST and that of the base's tensor; NaN or
        infinity if the difference contains either. Counters are omitted. An adapter's B starts at zero; it counts by
        what it adds to the weight that it belongs to, compared with that weight.
    """
    tensors, buffers = model.state_dict(), dict(model.named_buffers())
    relative = {}
    for name, difference in differences.items():
        fitted = head is not None and name in head.tensors
        if fitted and not start:
            continue
        if is_adapter(name):
            relative[name] = _change_by_adapter(model, name, difference)
            continue
        base, quietest = tensors[name].cpu().numpy(), QUIETEST_BUFFER if name in buffers else QUIETEST
        if fitted and start:
            begun = start[delta_block(name)]
            base, difference = base + begun, difference - begun
        if np.issubdtype(base.dtype, np.floating):
            relative[name] = _root_mean_square(difference) / max(_root_mean_square(base), quietest)
    return relative


def _change_by_adapter(model: nn.Module, name: str, difference: NDArray[Any]) -> float:
    """Return the relative change of a layer's weight, s B A, from the difference of its adapter's B."""
    layer: Any = model.get_submodule(name.rpartition(".lora_B.")[0])
    a = layer.lora_A[NAME].weight.detach().cpu().double().numpy()
    weight = layer.get_base_layer().weight.detach().cpu().float().numpy()
    with np.errstate(over="ignore", invalid="ignore"):  # NaN and infinity are results
        b = np.asarray(difference, np.float64)
        squares = float(np.sum((b.T @ b) * (a @ a.T)))  # of all entries of B A
        added = layer.scaling[NAME] * np.sqrt(squares / weight.size)
    return float(added / max(_root_mean_square(weight), QUIETEST))


def check_changes(
    model: nn.Module,
    layout: Layout,
    arrays: Mapping[str, NDArray[Any]],
    limit: float,
    start: Mapping[str, NDArray[Any]] | None = None,
) -> None:
    """Refuse a model that differs from the base by more than the plan allows.

    The result depends on the base, the plan and the coordinator's message, not on data, so the reason may be sent.

    Args:
        model: the base.
        layout: the plan's layout.
        arrays: the received model's differences from the base, `delta:<parameter>`.
        limit: the plan's `merge.maximum-change`.
        start: as for `changes`.

    Raises:
        RefusalError: if a tensor changes more than that; names the one that changes most.
    """
    differences = {tensor.name: arrays[delta_block(tensor.name)] for tensor in layout.tensors}
    relative = changes(model, differences, layout.head, start)
    worst = max(relative, key=lambda name: np.nan_to_num(relative[name], nan=np.inf), default=None)
    if worst is not None and not relative[worst] <= limit:
        reason = (
            f"the received model changes tensor {worst!r} by {relative[worst]:.3g} times the base's norm; the plan "
            f"allows {limit:g} (merge.maximum-change)"
        )
        raise RefusalError(
            f"{reason}. A silo's training diverged, or a silo or the coordinator did not send what it measured: do not "
            "use this model",
            reason=reason,
        )


def check_only_head(
    layout: Layout, arrays: Mapping[str, NDArray[Any]], start: Mapping[str, NDArray[Any]] | None = None
) -> None:
    """Refuse a model that differs in anything but its head from the one whose features the head was fitted to.

    Args:
        layout: with a head.
        arrays: the received model's differences from the base, `delta:<parameter>`.
        start: those of the model whose features were summed, all tensors; by default it is the base.

    Raises:
        RefusalError: naming the first such tensor.
    """
    head = () if layout.head is None else layout.head.tensors
    body = [tensor.name for tensor in layout.tensors if tensor.name not in head]
    before = {name: start[delta_block(name)] if start else 0 for name in body}
    other = next((name for name in body if np.any(arrays[delta_block(name)] != before[name])), None)
    if other is not None:
        reason = (
            f"the model with the fitted head differs in tensor {other!r} from the one that it was fitted to; only the "
            "head may differ"
        )
        raise RefusalError(f"{reason}. The coordinator sent a model of its own making", reason=reason)


def _root_mean_square(values: NDArray[Any]) -> float:
    with np.errstate(over="ignore", invalid="ignore"):  # NaN and infinity are results
        return float(np.sqrt(np.mean(np.square(values, dtype=np.float64))))
