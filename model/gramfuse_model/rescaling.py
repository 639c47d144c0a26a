"""Rescaled regression: a model learns (target − centre) / scale, and the written model predicts targets.

The output is linear in the last layer, so that layer's bias and weight absorb centre and scale. If the base model
already has a head, which predicts targets, the inverse is applied before training.
"""

from __future__ import annotations

from collections.abc import Container

import torch
from transformers import PreTrainedModel

from gramfuse_model.heads import last_linear
from gramfuse_model.layers import LinearModule
from gramfuse_model.parameters import clear_caches
from gramfuse_protocol.contract.task import Task
from gramfuse_protocol.errors import ModelError


def rescaled(task: Task) -> bool:
    """Return whether models of a task learn rescaled targets."""
    return (task.centre, task.scale) != (0.0, 1.0)


def fold(model: PreTrainedModel, task: Task) -> None:
    """Convert a model trained on rescaled targets to predict targets on the data's scale, in place.

    Raises:
        ModelError: if its head has no linear layer with one output, or that layer has no bias and the centre is not
            zero.
    """
    if not rescaled(task):
        return
    last = last_linear(model, 1)
    if last is None:
        raise ModelError(
            f"the head of {type(model).__name__} has no linear layer with one output that could absorb 'centre' and "
            "'scale'; use centre = 0 and scale = 1, with targets of about that size, or another base model"
        )
    weight, bias = _parameters(model, last, task)
    with torch.no_grad():
        weight.copy_(weight.double() * task.scale)
        if bias is not None:
            bias.copy_(bias.double() * task.scale + task.centre)
    clear_caches(model)


def unfold(model: PreTrainedModel, task: Task, fresh: Container[str]) -> None:
    """Convert a model whose head predicts targets on the data's scale to predict rescaled targets, in place.

    Args:
        fresh: newly initialised parameters. A new head is left unchanged.

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
    clear_caches(model)


def _parameters(
    model: PreTrainedModel, last: LinearModule, task: Task
) -> tuple[torch.nn.Parameter, torch.nn.Parameter | None]:
    """Return weight and bias of the last layer."""
    parameters = dict(last.module.named_parameters(recurse=False))
    bias = parameters.get("bias")
    if bias is None and task.centre != 0:
        raise ModelError(
            f"the last layer of {type(model).__name__} has no bias that could absorb 'centre'; use centre = 0"
        )
    return parameters["weight"], bias
