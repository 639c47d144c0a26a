"""The parameters of a model that training may change: which they are, and how differences from the base go in and out.

Silos and the coordinator build a merged model here; adapters are to plug in here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from gramfuse_model.buffers import is_count, saved_buffers
from gramfuse_protocol.arguments import check_argument
from gramfuse_protocol.contract.plan_sections import EMBEDDINGS
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


def embedding_parameters(model: nn.Module) -> frozenset[str]:
    """Return the names of the parameters that turn tokens, positions and patches into features.

    These are all tables (`nn.Embedding`), and all parameters in a module named `embeddings`, such as norms, patch
    projections and class tokens.
    """
    tables = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters(recurse=False)}
    return frozenset(
        name
        for name, parameter in model.named_parameters()
        if id(parameter) in tables or EMBEDDINGS in name.split(".")[:-1]
    )


def freeze(model: nn.Module, patterns: Iterable[str]) -> None:
    """Freeze every parameter whose name matches a pattern.

    The word EMBEDDINGS is not a pattern: it selects `embedding_parameters`, whatever their names.

    Raises:
        ModelError: if a pattern matches nothing, or no parameter is left to train.
    """
    parameters = dict(model.named_parameters())
    for pattern in patterns:
        if pattern == EMBEDDINGS:
            matches = [parameters[name] for name in embedding_parameters(model)]
        else:
            matches = [parameter for name, parameter in parameters.items() if fnmatchcase(name, pattern)]
        if not matches and pattern != EMBEDDINGS:
            raise ModelError(
                f"training.freeze: no parameter of the base model matches {pattern!r}; "
                f"its names look like {next(iter(parameters))!r}"
            )
        for parameter in matches:
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in parameters.values()):
        raise ModelError("training.freeze leaves no parameter to train")


def trainable(model: nn.Module) -> dict[str, NDArray[np.float32]]:
    """Return copies of all tensors that training may change, by name: parameters that are not frozen, and buffers.

    Example:
        >>> gramfuse.trainable(base)["classifier.bias"]
        array([0., 0.], dtype=float32)

    The copies are float32 on the CPU, whatever the model's dtype.

    Raises:
        ModelError: if the model is not a torch module.
    """
    check_argument("trainable: model", model, nn.Module, "a torch.nn.Module", ModelError)
    return {name: tensor.detach().cpu().float().numpy().copy() for name, tensor in learned(model).items()}


def learned(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return all tensors that training may change and a merge can combine, by name: the model's own tensors.

    These are the trainable parameters and the persistent buffers that are floating-point or a single integer.
    """
    buffers = {name: b for name, b in saved_buffers(model).items() if b.is_floating_point() or is_count(b)}
    return {name: p for name, p in model.named_parameters() if p.requires_grad} | buffers
