"""Regression on another scale than the targets': a model learns (target − centre) / scale, and is written so that it
gives targets.

What it gives is linear in the last layer, so centre and scale go into that layer's bias and weight. Out of a head that
a base model brings along, which gives targets, they are taken before it is trained.
"""

from __future__ import annotations

from collections.abc import Container

import torch
from transformers import PreTrainedModel

from gramfuse_model.differences import forget
from gramfuse_model.heads import last_linear
from gramfuse_model.layers import LinearModule
from gramfuse_protocol.contract.task import Task
from gramfuse_protocol.errors import ModelError


def rescaled(task: Task) -> bool:
    """Whether models of a task learn on another scale than that of the targets."""
    return (task.centre, task.scale) != (0.0, 1.0)


def fold(model: PreTrainedModel, task: Task) -> None:
    """Have a model that was trained for a task give targets as the data have them, in place.

    Raises:
        ModelError: if its head has no linear layer with one output, or that has no bias and the centre is not zero.
    """
    if not rescaled(task):
        return
    last = last_linear(model, 1)
    if last is None:
        raise ModelError(
            f"the head of {type(model).__name__} has no linear layer with one output that 'centre' and 'scale' could "
            "go into; use centre = 0 and scale = 1, with targets that are of about that size, or another base model"
        )
    weight, bias = _parameters(model, last, task)
    with torch.no_grad():
        weight.copy_(weight.double() * task.scale)
        if bias is not None:
            bias.copy_(bias.double() * task.scale + task.centre)
    forget(model)


def unfold(model: PreTrainedModel, task: Task, fresh: Container[str]) -> None:
    """Have a model whose head gives targets as the data have them give what is learned in their place, in place.

    Args:
        fresh: parameters that are not of the model's files. A head that is new knows no targets, and stays.

    Raises:
        ModelError: if the head has no bias and the centre is not zero.
    """
    last = last_linear(model, 1) if rescaled(task) else None
    if last is None or last.weight in fresh:
        return
    weight, bias = _parameters(model, last, task)
    with torch.no_grad():
        weight.copy_(weight.double() / task.scale)
        if bias is not None:
            bias.copy_((bias.double() - task.centre) / task.scale)
    forget(model)


def _parameters(
    model: PreTrainedModel, last: LinearModule, task: Task
) -> tuple[torch.nn.Parameter, torch.nn.Parameter | None]:
    """Return weight and bias of a last layer."""
    parameters = dict(last.module.named_parameters(recurse=False))
    bias = parameters.get("bias")
    if bias is None and task.centre != 0:
        raise ModelError(
            f"the last layer of {type(model).__name__} has no bias that 'centre' could go into; use centre = 0"
        )
    return parameters["weight"], bias
