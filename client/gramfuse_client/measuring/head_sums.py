"""Collects what a head is fitted from in closed form: moments of the features that enter its last linear layer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from gramfuse_client.training.outputs import inputs_of
from gramfuse_model.heads import last_linear
from gramfuse_model.probing.hooks import observing
from gramfuse_protocol.errors import ContributionError, ModelError
from gramfuse_protocol.statistics.head_sums import HeadSums


def collect_head_sums(
    model: PreTrainedModel,
    batches: Iterable[Mapping[str, torch.Tensor]],
    labels: int,
    progress: Callable[[int], None] | None = None,
) -> HeadSums:
    """Run a model over batches, in evaluation mode and without autograd, and sum what enters its last linear layer.

    Args:
        model: of a kind with one label for each example.
        batches: keyword arguments of its forward, with `labels`, int (batch,).
        labels: how many there are.
        progress: called with the number of batches done.

    Returns:
        Sums over all examples, in float64. Features are taken as the model has them, and multiplied in float64.

    Raises:
        ModelError: if the head has no linear layer with one output for each label, or that layer's output is not what
            the model says of an example.
        ContributionError: if there are no batches, or a feature is NaN or infinite.
    """
    last = last_linear(model, labels)
    if last is None:
        raise ModelError(f"the head of {type(model).__name__} has no linear layer with {labels} outputs")
    received: list[torch.Tensor] = []

    def receive(_: nn.Module, x: torch.Tensor, __: tuple[object, ...]) -> None:
        received.append(x)

    sums: HeadSums | None = None
    with observing(model, [(last.module, receive)]):
        for number, batch in enumerate(batches, 1):
            received.clear()
            logits = model(**inputs_of(batch)).logits
            features = _features(model, last.module, received, logits).double().cpu().numpy()
            if not np.isfinite(features).all():
                raise ContributionError("what enters the head's last layer holds values that are NaN or infinite")
            one_hot = np.eye(labels)[batch["labels"].cpu().numpy()]
            of_batch = HeadSums(features.T @ features, features.T @ one_hot, one_hot.sum(axis=0))
            sums = of_batch if sums is None else sums + of_batch
            if progress is not None:
                progress(number)
    if sums is None:
        raise ContributionError("no example was measured: there are no batches")
    return sums


def _features(
    model: PreTrainedModel, module: nn.Module, received: list[torch.Tensor], logits: torch.Tensor
) -> torch.Tensor:
    """Return the rows of the last layer's input that the logits come from, one for each example: (batch, D)."""
    if len(received) != 1:
        raise ModelError(
            f"{type(model).__name__} runs its last layer {len(received)} times for one batch; expected once"
        )
    (x,) = received
    outputs = module(x)
    if outputs.shape == logits.shape:
        rows = x
    elif outputs.dim() == 3 and outputs.shape[::2] == logits.shape:  # of every token, and the model picks one
        place = (outputs - logits[:, None]).abs().amax(dim=2).argmin(dim=1)
        examples = torch.arange(len(logits), device=logits.device)
        rows, outputs = x[examples, place], outputs[examples, place]
    else:
        raise ModelError(
            f"the last layer of {type(model).__name__} gives {tuple(outputs.shape)} where the model gives "
            f"{tuple(logits.shape)}, so its head cannot be fitted in closed form"
        )
    if not torch.allclose(outputs, logits, rtol=1e-3, atol=1e-4):
        raise ModelError(
            f"what {type(model).__name__} gives is not what its last linear layer gives, so its head cannot be fitted "
            "in closed form"
        )
    return rows
