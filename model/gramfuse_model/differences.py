"""Adds differences to a model: how silos and the coordinator build a merged model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from gramfuse_model.buffers import learned
from gramfuse_protocol.arguments import check_argument
from gramfuse_protocol.errors import ModelError


def add_differences(model: nn.Module, deltas: Mapping[str, NDArray[Any]]) -> None:
    """Add differences to a model's parameters and buffers, in place.

    Example:
        >>> gramfuse.add_differences(base, {"classifier.bias": np.array([0.5, -0.5])})
        >>> base.classifier.bias.tolist()
        [0.5, -0.5]

    Sums are computed in float64 and rounded once to the tensor's dtype, for counters to the nearest integer.

    Args:
        deltas: differences by name of a parameter or buffer, in its shape, any real dtype.

    Raises:
        ModelError: if the model is not a torch module, or the differences are not a mapping.
        KeyError: if the model has no tensor with one of the names.
    """
    check_argument("add_differences: model", model, nn.Module, "a torch.nn.Module", ModelError)
    check_argument("add_differences: deltas", deltas, Mapping, "arrays by the name of a parameter", ModelError)
    tensors = model.state_dict()
    for name, delta in deltas.items():
        _add(tensors[name], delta)
    clear_caches(model)


def set_values(model: nn.Module, values: Mapping[str, NDArray[Any] | torch.Tensor]) -> None:
    """Set parameters and buffers to new values, in place, by name."""
    tensors = model.state_dict()
    for name, value in values.items():
        tensors[name].copy_(torch.as_tensor(value))
    clear_caches(model)


@contextmanager
def applied(
    model: nn.Module, deltas: Mapping[str, NDArray[Any]], values: Mapping[str, NDArray[Any]] | None = None
) -> Iterator[None]:
    """Add differences to a model temporarily; on exit it is restored bit for bit.

    Args:
        deltas: differences as for `add_differences`; entries for tensors that training cannot change are ignored.
        values: new values for tensors that get no difference.
    """
    values = values or {}
    tensors = learned(model)
    kept = {name: tensor.data for name, tensor in tensors.items()}
    try:
        for name, tensor in tensors.items():
            tensor.data = kept[name].clone()
            if name in values:
                tensor.data.copy_(torch.from_numpy(np.array(values[name], np.float32)))
            elif name in deltas:
                _add(tensor, deltas[name])
        clear_caches(model)
        yield
    finally:
        for name, tensor in tensors.items():
            tensor.data = kept[name]
        clear_caches(model)


def clear_caches(model: nn.Module) -> None:
    """Clear values that a model caches from earlier weights, by a switch to training mode and back: LeViT does."""
    modes = [(module, module.training) for module in model.modules()]
    model.train()
    for module, mode in modes:
        module.training = mode


def _add(tensor: torch.Tensor, difference: NDArray[Any]) -> None:
    total = tensor.detach().double() + torch.from_numpy(np.array(difference)).to(tensor.device).double()
    tensor.detach().copy_(total if tensor.is_floating_point() else total.round())
