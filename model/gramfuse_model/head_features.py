"""The features of each example that enter a model's last linear layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import nn
from transformers import PreTrainedModel

from gramfuse_model.heads import last_linear
from gramfuse_model.probing.batch import inputs_of
from gramfuse_model.probing.hooks import observing
from gramfuse_protocol.errors import ModelError

Pooling = Literal["head", "mean"]
"""The features of an example: what enters the head's last linear layer, or the mean of the body's outputs over real
tokens."""


def features_of(
    model: PreTrainedModel, batch: Mapping[str, torch.Tensor], outputs: int, pooling: Pooling
) -> torch.Tensor:
    """Return the features of a batch's examples, (batch, D), in evaluation mode and without autograd.

    Of a model with outputs for each token, they are those of the tokens, padding included: (batch, length, D).

    Args:
        outputs: number of outputs of the last layer.

    Raises:
        ModelError: if the head has no linear layer with so many outputs, or that layer's output is not the
            model's; or, for the mean, if the body gives no output for each token.
    """
    if pooling == "mean":
        return _mean_of_tokens(model, batch)
    last = last_linear(model, outputs)
    if last is None:
        raise ModelError(f"the head of {type(model).__name__} has no linear layer with {outputs} outputs")
    inputs: list[torch.Tensor] = []

    def receive(_: nn.Module, x: torch.Tensor, __: tuple[object, ...]) -> None:
        inputs.append(x)

    with observing(model, [(last.module, receive)]):
        logits = model(**inputs_of(batch)).logits
    if len(inputs) != 1:
        name = type(model).__name__
        raise ModelError(f"{name} runs its last layer {len(inputs)} times for one batch; expected once")
    with torch.no_grad():
        return _rows(model, last.module, inputs[0], logits)


def _rows(model: PreTrainedModel, module: nn.Module, x: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """Return the rows of the last layer's input that the logits come from, one for each example or token."""
    outputs = module(x)
    if outputs.shape == logits.shape:
        rows = x
    elif outputs.dim() == 3 and outputs.shape[::2] == logits.shape:  # one for each token, and the model picks one
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
            f"the output of {type(model).__name__} is not that of its last linear layer, so its head cannot be fitted "
            "in closed form"
        )
    return rows


def _mean_of_tokens(model: PreTrainedModel, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Return the mean of the body's outputs over real tokens, (batch, D)."""
    with observing(model, []):
        states = getattr(model.base_model(**inputs_of(batch)), "last_hidden_state", None)
    if states is None or states.dim() != 3:
        raise ModelError(
            f"the body of {type(model).__name__} gives no output for each token, so there is no mean of them"
        )
    mask = batch.get("attention_mask")
    weights = torch.ones(states.shape[:2], device=states.device) if mask is None else mask[:, : states.shape[1]].float()
    mean: torch.Tensor = (states * weights[..., None]).sum(dim=1) / weights.sum(dim=1, keepdim=True)
    return mean
