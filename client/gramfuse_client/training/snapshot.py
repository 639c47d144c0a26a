"""Snapshots of a model's non-parameter state, so that its output for one example cannot depend on earlier examples.

A base model can remember its inputs: a "dynamic" rotary embedding stores the longest text so far, which changes its
output for every later one. Modules keep such state in buffers and in their own attributes.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

_STANDARD = vars(nn.Module()).keys() | {"config", "generation_config"}
_MUTABLE = (list, dict, set)
_PLAIN_TYPES = (int, float, bool, str, tuple, type(None), torch.dtype, torch.device, torch.Tensor, *_MUTABLE)


class Snapshot:
    """A copy of a model's buffers and plain attributes, but not of its parameters.

    Examples:
        >>> norm = nn.BatchNorm1d(2)
        >>> snapshot = Snapshot(norm)
        >>> _ = norm(torch.ones(3, 2))
        >>> snapshot.restore()
        >>> norm.running_mean
        tensor([0., 0.])
    """

    def __init__(self, model: nn.Module) -> None:
        self._modules = [(module, _copied(module._buffers), _copied(_attributes(module))) for module in model.modules()]

    def restore(self) -> None:
        """Restore the buffers and plain attributes of all modules, and remove any added since."""
        for module, buffers, attributes in self._modules:
            module._buffers.clear()
            module._buffers.update(_copied(buffers))
            for name in _attributes(module).keys() - attributes.keys():
                del vars(module)[name]
            vars(module).update(_copied(attributes))


def _attributes(module: nn.Module) -> dict[str, Any]:
    """Return a module's own attributes of plain types."""
    return {
        name: value for name, value in vars(module).items() if name not in _STANDARD and isinstance(value, _PLAIN_TYPES)
    }


def _copied(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: _copy(value) for name, value in values.items()}


def _copy(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    return copy.copy(value) if isinstance(value, _MUTABLE) else value
