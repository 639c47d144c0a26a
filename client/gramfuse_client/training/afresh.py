"""A model that is as it was before each example, so that what it says of one cannot depend on another.

A base model may keep what it saw: a rotary embedding of the kind "dynamic" remembers the longest text so far, and says
other things of all that come after it. Modules keep such things in buffers and in attributes of their own.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

_OF_EVERY_MODULE = vars(nn.Module()).keys() | {"config", "generation_config"}
_MUTABLE = (list, dict, set)
_KINDS = (int, float, bool, str, tuple, type(None), torch.dtype, torch.device, torch.Tensor, *_MUTABLE)


class Afresh:
    """What a model keeps beside its parameters, as it is now.

    Examples:
        >>> norm = nn.BatchNorm1d(2)
        >>> before = Afresh(norm)
        >>> _ = norm(torch.ones(3, 2))
        >>> before.restore()
        >>> norm.running_mean
        tensor([0., 0.])
    """

    def __init__(self, model: nn.Module) -> None:
        self._kept = [(module, _copied(module._buffers), _copied(_attributes(module))) for module in model.modules()]

    def restore(self) -> None:
        """Put back buffers and plain attributes of all modules; what was added since is taken away."""
        for module, buffers, attributes in self._kept:
            module._buffers.clear()
            module._buffers.update(_copied(buffers))
            for name in _attributes(module).keys() - attributes.keys():
                del vars(module)[name]
            vars(module).update(_copied(attributes))


def _attributes(module: nn.Module) -> dict[str, Any]:
    own = ((name, value) for name, value in vars(module).items() if name not in _OF_EVERY_MODULE)
    return {name: value for name, value in own if isinstance(value, _KINDS)}


def _copied(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: _copy(value) for name, value in values.items()}


def _copy(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    return copy.copy(value) if isinstance(value, _MUTABLE) else value
