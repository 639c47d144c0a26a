"""A batch of a model's inputs: masks of its real tokens, and its examples one by one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from gramfuse_model.heads import is_encoder_decoder
from gramfuse_protocol.errors import ModelError

Batch = dict[str, torch.Tensor]

IGNORED = -100
"""The label of positions without a target, such as padding; transformers' losses ignore it."""

SHORTEST = 3
"""Minimum length of a text from whose middle a token can be removed."""

TOKENS = ("input_ids", "inputs_embeds")
"""Inputs with one position for each token, with or without a mask."""

PLACED = (*TOKENS, "input_values", "input_features")
"""Inputs whose padding a model should ignore."""

TARGETS = ("labels", "decoder_input_ids", "decoder_attention_mask")
"""Inputs that belong to the target of an encoder-decoder model."""

ANSWERS = ("labels", "words")
"""Keys of a batch that are not inputs of a model with a head."""


def inputs_of(batch: Mapping[str, torch.Tensor]) -> Batch:
    """Return a batch's inputs for a model with a head, without ANSWERS."""
    return {key: value for key, value in batch.items() if key not in ANSWERS}


def masks_of(model: nn.Module, batch: Mapping[str, Any]) -> Batch:
    """Return the masks of real tokens, `input` and `target` if the batch has them: bool (examples, length).

    Args:
        batch: keyword arguments of the model's forward. `attention_mask` marks the real tokens, embeddings or audio
            samples; without it every input token is real. Target tokens are real according to
            `decoder_attention_mask`, or else where `labels` are not negative.

    Raises:
        ModelError: if `attention_mask` is not (examples, length), or no input matches it; or if there is no mask and
            only some of the texts begin or end with the configuration's pad token.
    """
    masks: Batch = {}
    mask = batch.get("attention_mask")
    if mask is not None:
        others = (value for key, value in batch.items() if key not in ("attention_mask", *TARGETS))
        if mask.dim() != 2 or not any(has_places(value, mask) for value in others):
            sizes = ", ".join(f"{key} {tuple(value.shape)}" for key, value in batch.items())
            raise ModelError(
                f"the attention_mask of a batch does not match its inputs, so padding could not be excluded: {sizes}; "
                "expected attention_mask (examples, length), and an input with the same first dimensions"
            )
        masks["input"] = mask.bool()
    else:
        tokens = next((batch[key] for key in TOKENS if key in batch), None)
        if tokens is not None:
            _check_unpadded(model, batch)
            masks["input"] = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
    if is_encoder_decoder(model):
        if "decoder_attention_mask" in batch:
            masks["target"] = batch["decoder_attention_mask"].bool()
        elif "labels" in batch:
            masks["target"] = batch["labels"] >= 0
        elif "decoder_input_ids" in batch:
            masks["target"] = torch.ones_like(batch["decoder_input_ids"]).bool()
    return masks


def _check_unpadded(model: nn.Module, batch: Mapping[str, Any]) -> None:
    """Raise ModelError if tokens without a mask seem to be padded."""
    ids, padding = batch.get("input_ids"), getattr(getattr(model, "config", None), "pad_token_id", None)
    if ids is None or ids.dim() != 2 or not isinstance(padding, int):
        return
    for place in (0, -1):
        padded = ids[:, place] == padding
        if bool(padded.any()) and not bool(padded.all()):
            raise ModelError(
                f"a batch has no attention_mask, but some of its texts {'end' if place else 'begin'} with the model's "
                f"pad token {padding}, so padding would count as tokens; pass the tokenizer's attention_mask too"
            )


def has_places(value: torch.Tensor, mask: torch.Tensor) -> bool:
    """Return whether the first dimensions of a value are those of a mask, (examples, length)."""
    return value.shape[:2] == mask.shape


def alone(batch: Mapping[str, torch.Tensor], masks: Mapping[str, torch.Tensor], index: int) -> Batch:
    """Return one example as a batch of one, without padding.

    Args:
        masks: the result of `masks_of`.
    """
    example = {}
    for key, value in batch.items():
        mask = masks.get("target" if key in TARGETS else "input")
        padded = mask is not None and has_places(value, mask)
        example[key] = (value[index, mask[index]] if padded else value[index]).unsqueeze(0)  # type: ignore[index]
    return example


def with_shorter(batch: Mapping[str, torch.Tensor], masks: Mapping[str, torch.Tensor], config: Any) -> Batch:
    """Extend a batch of texts of equal length by a copy of each without its middle token.

    Texts of fewer than three tokens are returned unchanged.

    Args:
        masks: the result of `masks_of`.
        config: the model's configuration or None; it names the pad token.
    """
    mask = masks["input"]
    length = int(mask[0].sum())
    if length < SHORTEST:
        return dict(batch)
    texts = {
        key: value[mask].view(len(mask), length, *value.shape[2:])
        for key, value in batch.items()
        if has_places(value, mask) and key not in TARGETS
    }
    texts["attention_mask"] = torch.ones(len(mask), length, dtype=torch.long, device=mask.device)
    left = bool(mask[:, -1].all()) and not bool(mask[:, 0].all())
    extended = {key: torch.cat([value, value]) for key, value in batch.items() if key not in texts}
    for key, whole in texts.items():
        filler = (getattr(config, "pad_token_id", None) or 0) if key == "input_ids" else 0
        ends = [whole[:, : length // 2], whole[:, length // 2 + 1 :]]
        padding = torch.full_like(whole[:, :1], filler)
        cut = torch.cat([padding, *ends] if left else [*ends, padding], dim=1)
        extended[key] = torch.cat([whole, cut])
    return extended


def chosen(batch: Mapping[str, torch.Tensor], indices: Sequence[int]) -> Batch:
    """Return the examples of a batch with these indices."""
    return {key: value[list(indices)] for key, value in batch.items()}
