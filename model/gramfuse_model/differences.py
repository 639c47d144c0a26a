"""Adds differences to a model: the one way in which a merged model comes to be, at silos and at the coordinator."""

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

    Each sum is taken in float64 and rounded once to the tensor's dtype; that of a counter to the nearest integer.

    Args:
        deltas: by name of a parameter or buffer, any real dtype, in its shape.

    Raises:
        ModelError: if the model is no torch module, or the differences are no mapping.
        KeyError: if the model has no tensor of a name.
    """
    check_argument("add_differences: model", model, nn.Module, "a torch.nn.Module", ModelError)
    check_argument("add_differences: deltas", deltas, Mapping, "arrays by the name of a parameter", ModelError)
    tensors = model.state_dict()
    for name, delta in deltas.items():
        _add(tensors[name], delta)
    forget(model)


def set_values(model: nn.Module, values: Mapping[str, NDArray[Any] | torch.Tensor]) -> None:
    """Give parameters and buffers other values, in place, by name and in their shapes."""
    tensors = model.state_dict()
    for name, value in values.items():
        tensors[name].copy_(torch.as_tensor(value))
    forget(model)


@contextmanager
def applied(
    model: nn.Module, deltas: Mapping[str, NDArray[Any]], values: Mapping[str, NDArray[Any]] | None = None
) -> Iterator[None]:
    """Add differences to a model for as long as the block runs; afterwards it is as it was, bit for bit.

    Args:
        deltas: as `add_differences` takes them; those of tensors that training cannot change are left out.
        values: of tensors that differences are not added to.
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
        forget(model)
        yield
    finally:
        for name, tensor in tensors.items():
            tensor.data = kept[name]
        forget(model)


def forget(model: nn.Module) -> None:
    """Have a model forget what it keeps of weights that it had: LeViT does, until it is in training mode again."""
    modes = [(module, module.training) for module in model.modules()]
    model.train()
    for module, mode in modes:
        module.training = mode


def _add(tensor: torch.Tensor, difference: NDArray[Any]) -> None:
    total = tensor.detach().double() + torch.from_numpy(np.array(difference)).to(tensor.device).double()
    tensor.detach().copy_(total if tensor.is_floating_point() else total.round())
