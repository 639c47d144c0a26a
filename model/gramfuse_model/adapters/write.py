"""Writes a model with adapters: the adapter alone, in PEFT's format, or the model with the adapter folded in."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import TaskType
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel

from gramfuse_model.adapters.attach import NAME, Attached, adapters_of, is_adapter
from gramfuse_model.loading.auto_classes import FORMS
from gramfuse_protocol.contract.task import TaskName

WEIGHTS = "adapter_model.safetensors"

PREFIX = "base_model.model."
"""With what PEFT's names of a model's parameters begin."""

TASK_TYPES = {
    "AutoModelForSequenceClassification": TaskType.SEQ_CLS,
    "AutoModelForTokenClassification": TaskType.TOKEN_CLS,
    "AutoModelForCausalLM": TaskType.CAUSAL_LM,
    "AutoModelForSeq2SeqLM": TaskType.SEQ_2_SEQ_LM,
}
"""PEFT's names of tasks, by transformers' classes; it has none for images."""


def write_adapter(
    model: PreTrainedModel, attached: Attached, base: str, revision: str | None, task: TaskName, directory: Path
) -> None:
    """Write an adapter that `peft.PeftModel.from_pretrained` loads onto the base: A and B, and the whole modules.

    Args:
        model: with adapters.
        base, revision: hub id or path of the base, and its commit, for PEFT's automatic classes.
        directory: made if it does not exist.
    """
    config = attached.config
    config.base_model_name_or_path = base
    config.revision = revision
    config.task_type = TASK_TYPES.get(FORMS[task].auto)
    config.inference_mode = True
    config.save_pretrained(str(directory))
    save_file(adapter_tensors(model, attached), directory / WEIGHTS, metadata={"format": "pt"})


def adapter_tensors(model: nn.Module, attached: Attached) -> dict[str, torch.Tensor]:
    """Return the tensors of an adapter by PEFT's names, as in `adapter_model.safetensors`."""
    whole = tuple(f"{name}." for name in attached.saved)
    tensors = {}
    for name, tensor in model.state_dict().items():
        if is_adapter(name):
            tensors[PREFIX + name.replace(f".{NAME}.", ".")] = tensor.contiguous()
        elif name.startswith(whole):
            tensors[PREFIX + name] = tensor.contiguous()
    return tensors


def fold(model: nn.Module) -> None:
    """Add each adapter to the weight that it belongs to, in place; the model then has its original modules."""
    for name, layer in list(adapters_of(model)):
        layer.merge(safe_merge=True)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer.get_base_layer())
