"""How linear modules are called when a model runs: with which tensors, and how large their features are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from gramfuse_model.experts import GATE_UP, hidden_units, is_understood
from gramfuse_model.layers import LinearModule
from gramfuse_model.probing.hooks import Hook, observing, run


@dataclass
class Calls:
    """How one module is called: identities of the tensors that it receives, and their power.

    The power is the largest mean square of each feature over all rows of a call, padding included: float64 (d_in,). Of
    experts it is the largest that any of them would have if all rows were routed to it, so that it is known of those
    that a public batch does not use.
    """

    keys: tuple[Any, ...]
    power: torch.Tensor


def calls_of(model: nn.Module, batch: Mapping[str, Any], linears: Mapping[str, LinearModule]) -> dict[str, Calls]:
    """Run a model once and return how each of these modules is called.

    Those that are not called are left out, and experts that compute something else than is thought.
    """
    calls: dict[str, Calls] = {}
    strange: set[str] = set()
    alive: list[torch.Tensor] = []  # an identity is only good while the tensor lives

    def record(weight: str) -> Hook:
        def hook(module: nn.Module, x: torch.Tensor, others: tuple[Any, ...]) -> None:
            if linears[weight].experts and not is_understood(module, (x, *others)):
                strange.add(weight)
                return
            alive.append(x)
            key = (x.data_ptr(), x.storage_offset(), tuple(x.shape), x.stride(), x._version)
            power = _power(linears[weight], x)
            before = calls.get(weight)
            if before is None:
                calls[weight] = Calls((key,), power)
            else:
                calls[weight] = Calls((*before.keys, key), torch.maximum(before.power, power))

        return hook

    with observing(model, [(linear.module, record(weight)) for weight, linear in linears.items()]):
        run(model, batch)
    return {weight: found for weight, found in calls.items() if weight not in strange}


def _power(linear: LinearModule, x: torch.Tensor) -> torch.Tensor:
    """Return the mean square of each feature that a weight is multiplied with, as `Calls` has it."""
    rows = x.reshape(-1, x.shape[-1])
    received = (
        (hidden_units(linear.module, expert, rows) for expert in range(linear.experts))
        if linear.experts and not linear.weight.endswith(GATE_UP)
        else (rows,)
    )
    return torch.stack([features.double().square().mean(dim=0).cpu() for features in received]).max(dim=0).values
