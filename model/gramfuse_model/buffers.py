"""Persistent buffers of a model: running statistics that training changes, counters, and constants.

They are not parameters, but the model computes with them. Running the base model once in training mode, not the types
of its modules, decides which of them training changes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import nn

from gramfuse_model.probing.hooks import run
from gramfuse_protocol.errors import ModelError


def saved_buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return a model's persistent buffers by name: the model's own tensors, not copies."""
    saved = model.state_dict().keys()
    return {name: buffer for name, buffer in model.named_buffers() if name in saved}


def changed_by_training(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Literal["mean", "sum"]]:
    """Return the persistent buffers that a training step changes, and how they are merged.

    Floating-point buffers are averaged. A single integer that grows is a counter and is summed.

    Args:
        model: restored afterwards.
        batch: keyword arguments of its forward.

    Raises:
        ModelError: if a buffer of another kind changes; names it.
    """
    if not saved_buffers(model):
        return {}
    before = {name: buffer.clone() for name, buffer in saved_buffers(model).items()}
    with as_in_training(model), torch.random.fork_rng(), torch.no_grad():
        run(model, batch)
        after = {name: buffer.clone() for name, buffer in saved_buffers(model).items()}
    changed: dict[str, Literal["mean", "sum"]] = {}
    for name, buffer in before.items():
        if torch.equal(buffer, after[name]):
            continue
        if buffer.is_floating_point():
            changed[name] = "mean"
        elif is_count(buffer) and after[name] > buffer:
            changed[name] = "sum"
        else:
            raise ModelError(
                f"training changes the buffer {name!r}, {buffer.dtype} {tuple(buffer.shape)}, which is neither "
                "floating-point nor a counter, so gramfuse cannot merge it; choose another base model"
            )
    return changed


def first_difference(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> str | None:
    """Return the name of the first buffer in `one` that differs in `other`, or None."""
    return next((name for name in sorted(one) if not torch.equal(one[name].cpu(), other[name].cpu())), None)


def is_count(buffer: torch.Tensor) -> bool:
    """Return whether a buffer is a counter: a single integer."""
    return buffer.dim() == 0 and buffer.dtype in (torch.int64, torch.int32)


@contextmanager
def as_in_training(model: nn.Module) -> Iterator[None]:
    """Put a model in training mode; on exit, modes and all buffers, also non-persistent ones, are restored."""
    modes = [(module, module.training) for module in model.modules()]
    kept = [(module, name, b, b.clone()) for module in model.modules() for name, b in _own_buffers(module)]
    model.train()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        for module, name, buffer, values in kept:
            module._buffers[name] = buffer if torch.equal(buffer, values) else buffer.copy_(values)


def _own_buffers(module: nn.Module) -> list[tuple[str, torch.Tensor]]:
    return [(name, buffer) for name, buffer in module._buffers.items() if buffer is not None]
