"""Records with which tensors linear modules are called when a model runs, and the scale of their features."""

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
    """The calls of one module: keys that identify the tensors it receives, and the tensors' power.

    The power of a feature is its largest mean square, over all calls, of all rows, including padding: float64 (d_in,).
    For experts it is the largest that any expert would have if all rows were routed to it, so it is known also for
    experts that a public batch does not use.
    """

    keys: tuple[Any, ...]
    power: torch.Tensor


def calls_of(model: nn.Module, batch: Mapping[str, Any], linears: Mapping[str, LinearModule]) -> dict[str, Calls]:
    """Run a model once and record the calls of these modules.

    Omits modules that are not called, and experts that do not compute the expected formula (`is_understood`).
    """
    calls: dict[str, Calls] = {}
    unknown: set[str] = set()
    alive: list[torch.Tensor] = []  # a key is unique only while its tensor exists

    def record(weight: str) -> Hook:
        def hook(module: nn.Module, x: torch.Tensor, others: tuple[Any, ...]) -> None:
            if linears[weight].experts and not is_understood(module, (x, *others)):
                unknown.add(weight)
                return
            alive.append(x)
            key = (x.data_ptr(), x.storage_offset(), tuple(x.shape), x.stride(), x._version)
            power = _power(linears[weight], x)
            previous = calls.get(weight)
            if previous is None:
                calls[weight] = Calls((key,), power)
            else:
                calls[weight] = Calls((*previous.keys, key), torch.maximum(previous.power, power))

        return hook

    with observing(model, [(linear.module, record(weight)) for weight, linear in linears.items()]):
        run(model, batch)
    return {weight: recorded for weight, recorded in calls.items() if weight not in unknown}


def _power(linear: LinearModule, x: torch.Tensor) -> torch.Tensor:
    """Return the mean square of each feature that is multiplied with a weight; for experts see `Calls`."""
    rows = x.reshape(-1, x.shape[-1])
    inputs = (
        (hidden_units(linear.module, expert, rows) for expert in range(linear.experts))
        if linear.experts and not linear.weight.endswith(GATE_UP)
        else (rows,)
    )
    return torch.stack([features.double().square().mean(dim=0).cpu() for features in inputs]).max(dim=0).values
