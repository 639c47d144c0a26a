"""A batch of a model's inputs: which of its places are real tokens, and each of its examples by itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from gramfuse_model.heads import answers

Batch = dict[str, torch.Tensor]

TARGETS = ("labels", "decoder_input_ids", "decoder_attention_mask")
"""What of a batch belongs to the target of a model with encoder and decoder."""


def masks_of(model: nn.Module, batch: Mapping[str, Any]) -> Batch:
    """Return where real tokens are, `input` and `target` as far as the batch has them: bool (examples, length).

    Args:
        batch: keyword arguments of the model's forward. Without `attention_mask` every input token is real. Target
            tokens are real where `decoder_attention_mask` says so, or else where `labels` are no negative numbers.
    """
    masks: Batch = {}
    if "input_ids" in batch:
        masks["input"] = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
    if answers(model):
        if "decoder_attention_mask" in batch:
            masks["target"] = batch["decoder_attention_mask"].bool()
        elif "labels" in batch:
            masks["target"] = batch["labels"] >= 0
        elif "decoder_input_ids" in batch:
            masks["target"] = torch.ones_like(batch["decoder_input_ids"]).bool()
    return masks


def alone(batch: Mapping[str, torch.Tensor], masks: Mapping[str, torch.Tensor], index: int) -> Batch:
    """Return one example of a batch as a batch of one, without padding.

    Args:
        masks: of `masks_of`.
    """
    found = {}
    for key, value in batch.items():
        mask = masks.get("target" if key in TARGETS else "input")
        padded = mask is not None and value.shape[:2] == mask.shape
        found[key] = (value[index, mask[index]] if padded else value[index]).unsqueeze(0)  # type: ignore[index]
    return found


def chosen(batch: Mapping[str, torch.Tensor], indices: Sequence[int]) -> Batch:
    """Return some of a batch's examples."""
    return {key: value[list(indices)] for key, value in batch.items()}
