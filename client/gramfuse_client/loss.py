"""The loss where a silo annotates only some labels: of the others it says nothing, and so they cost nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from gramfuse_protocol.task import Task

Loss = Callable[..., torch.Tensor]
"""(a model's outputs, labels) → mean over the batch; as the transformers Trainer takes it."""


def masked_loss(task: Task) -> Loss | None:
    """Return the loss over a silo's own labels, or None where the model's own loss is the right one.

    For `multi-label`, the mean of the binary cross-entropies of the labels that are not NaN; for `classification`, the
    cross-entropy of the softmax over its labels.
    """
    if task.task == "multi-label":
        return _annotated
    if not task.masked:
        return None
    own = torch.tensor(task.annotated)
    position = torch.full((len(task.labels),), -1)
    position[own] = torch.arange(len(own))

    def loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        columns = own.to(labels.device)
        return cross_entropy(outputs.logits[:, columns], position.to(labels.device)[labels])

    return loss


def _annotated(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
    real = ~labels.isnan()
    return binary_cross_entropy_with_logits(outputs.logits[real], labels[real])
