"""Regression on another scale than the targets': a model learns (target − centre) / scale, and is written so that it
gives targets.

What it gives is linear in the last layer, so centre and scale go into that layer's bias and weight.
"""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from gramfuse_model.base import Base
from gramfuse_model.differences import forget
from gramfuse_model.heads import last_linear
from gramfuse_model.tracing import public_batch
from gramfuse_protocol.errors import ModelError
from gramfuse_protocol.task import Task

TOLERANCE = 1e-3
"""Of what a folded model gives, relative to the scale."""


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
    parameters = dict(last.module.named_parameters(recurse=False))
    bias = parameters.get("bias")
    if bias is None and task.centre != 0:
        raise ModelError(
            f"the last layer of {type(model).__name__} has no bias that 'centre' could go into; use centre = 0"
        )
    with torch.no_grad():
        parameters["weight"].mul_(task.scale)
        if bias is not None:
            bias.mul_(task.scale).add_(task.centre)
    forget(model)


def check_foldable(base: Base, task: Task) -> None:
    """Fold a base model's head, look whether what it gives is moved as it should be, and put it back.

    Raises:
        ModelError: as `fold`, and if it is not.
    """
    if not rescaled(task):
        return
    model = base.model
    batch = {key: value.to(model.device) for key, value in public_batch(base).items()}
    last = last_linear(model, 1)
    kept = {} if last is None else {name: value.clone() for name, value in last.module.state_dict().items()}
    with torch.no_grad():
        before = model(**batch).logits
        try:
            fold(model, task)
            after = model(**batch).logits
        finally:
            if last is not None:
                last.module.load_state_dict(kept)
    off = ((after.double() - task.centre) / task.scale - before).abs().max()
    rounding = TOLERANCE * max(1.0, abs(task.centre) / task.scale)
    if not off <= rounding:
        raise ModelError(
            f"what {type(model).__name__} gives is not linear in its last layer, so 'centre' and 'scale' cannot go "
            "into it; use centre = 0 and scale = 1, with targets that are of about that size, or another base model"
        )
