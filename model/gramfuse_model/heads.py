"""The head of a model: the parameters that a task adds to the pretrained body."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

from gramfuse_model.layers import LinearModule, linear_modules
from gramfuse_protocol.errors import ModelError


def generates(model: PreTrainedModel) -> bool:
    """Return whether a model predicts tokens of its vocabulary, so its last layer is pretrained and it has no head."""
    return model.get_output_embeddings() is not None


def is_encoder_decoder(model: nn.Module) -> bool:
    """Return whether a model is an encoder-decoder model that generates a target from an input."""
    return isinstance(model, PreTrainedModel) and bool(model.config.is_encoder_decoder) and generates(model)


def head_parameters(model: PreTrainedModel) -> frozenset[str]:
    """Return the names of the parameters and buffers outside the body (`model.base_model`).

    A model that generates tokens has none.
    """
    body = model.base_model
    if body is model or generates(model):
        return frozenset()
    inside = {id(tensor) for tensor in (*body.parameters(), *body.buffers())}
    both = (*model.named_parameters(), *model.named_buffers())
    return frozenset(name for name, tensor in both if id(tensor) not in inside)


def last_linear(model: PreTrainedModel, outputs: int) -> LinearModule | None:
    """Return the head's last linear module with `outputs` outputs, or None."""
    head = head_parameters(model)
    matches = [linear for linear in linear_modules(model) if linear.weight in head and linear.d_out == outputs]
    return matches[-1] if matches else None


def pooler_parameters(model: PreTrainedModel) -> frozenset[str]:
    """Return the names of the parameters of the body's pooler, which a base model's files often lack.

    A masked language model is saved without a pooler; a model for a task then starts with a new one.
    """
    body, prefix = model.base_model, f"{model.base_model_prefix}.pooler."
    if body is model or generates(model):
        return frozenset()
    return frozenset(name for name, _ in model.named_parameters() if name.startswith(prefix))


def last_layer(model: PreTrainedModel, labels: int) -> frozenset[str]:
    """Return the names of the parameters with one row for each label: weight and bias of the head's last layer.

    Raises:
        ModelError: if the head has no linear layer with one output for each label.
    """
    head, last = head_parameters(model), last_linear(model, labels)
    if last is None or not last.kind.transposed:
        raise ModelError(
            f"the head of {type(model).__name__} has no linear layer with {labels} outputs, so it cannot be merged "
            "label by label: omit 'labels' from the [[silo]] sections, or use model.head = \"own\""
        )
    prefix = last.weight.removesuffix("weight")
    return frozenset(name for name in head if name in (f"{prefix}weight", f"{prefix}bias"))
