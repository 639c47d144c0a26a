"""A batch of a model's inputs: which of its places are real tokens, and each of its examples by itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from gramfuse_model.heads import is_encoder_decoder
from gramfuse_protocol.errors import ModelError

Batch = dict[str, torch.Tensor]

IGNORED = -100
"""The label of a position of which nothing is to be predicted, as padding is; as transformers' losses have it."""

SHORTEST = 3
"""Tokens of a text that one can be taken out of the middle of."""

TOKENS = ("input_ids", "inputs_embeds")
"""Inputs that have a place for each token, whether a mask says so or not."""

PLACED = (*TOKENS, "input_values", "input_features")
"""Inputs whose padding a model should not look at."""

TARGETS = ("labels", "decoder_input_ids", "decoder_attention_mask")
"""What of a batch belongs to the target of a model with encoder and decoder."""


def masks_of(model: nn.Module, batch: Mapping[str, Any]) -> Batch:
    """Return where real tokens are, `input` and `target` as far as the batch has them: bool (examples, length).

    Args:
        batch: keyword arguments of the model's forward. `attention_mask` marks the real ones of whatever it goes with:
            tokens, embeddings, or samples of a sound. Without it every input token is real. Target tokens are real
            where `decoder_attention_mask` says so, or else where `labels` are no negative numbers.

    Raises:
        ModelError: if `attention_mask` is no (examples, length), or nothing in the batch has such places; if there is
            none, and some of the texts begin or end with the token that the model's configuration has for padding.
    """
    masks: Batch = {}
    mask = batch.get("attention_mask")
    if mask is not None:
        others = (value for key, value in batch.items() if key not in ("attention_mask", *TARGETS))
        if mask.dim() != 2 or not any(has_places(value, mask) for value in others):
            sizes = ", ".join(f"{key} {tuple(value.shape)}" for key, value in batch.items())
            raise ModelError(
                f"the mask of a batch does not go with its inputs, so padding could not be left out: {sizes}; "
                "expected attention_mask (examples, length), and an input with as many places"
            )
        masks["input"] = mask.bool()
    else:
        given = next((batch[key] for key in TOKENS if key in batch), None)
        if given is not None:
            _check_unpadded(model, batch)
            masks["input"] = torch.ones(given.shape[:2], dtype=torch.bool, device=given.device)
    if is_encoder_decoder(model):
        if "decoder_attention_mask" in batch:
            masks["target"] = batch["decoder_attention_mask"].bool()
        elif "labels" in batch:
            masks["target"] = batch["labels"] >= 0
        elif "decoder_input_ids" in batch:
            masks["target"] = torch.ones_like(batch["decoder_input_ids"]).bool()
    return masks


def _check_unpadded(model: nn.Module, batch: Mapping[str, Any]) -> None:
    """Raise ModelError if tokens that come without a mask seem to be padded."""
    ids, padding = batch.get("input_ids"), getattr(getattr(model, "config", None), "pad_token_id", None)
    if ids is None or ids.dim() != 2 or not isinstance(padding, int):
        return
    for place in (0, -1):
        padded = ids[:, place] == padding
        if bool(padded.any()) and not bool(padded.all()):
            raise ModelError(
                f"a batch has no attention_mask, and some of its texts {'end' if place else 'begin'} with the token "
                f"{padding}, which is padding by the model's configuration, so padding would be counted as tokens; "
                "give attention_mask too, as tokenizers make it"
            )


def has_places(value: torch.Tensor, mask: torch.Tensor) -> bool:
    """Whether the first dimensions of a value are the examples and places of a mask."""
    return value.shape[:2] == mask.shape


def alone(batch: Mapping[str, torch.Tensor], masks: Mapping[str, torch.Tensor], index: int) -> Batch:
    """Return one example of a batch as a batch of one, without padding.

    Args:
        masks: of `masks_of`.
    """
    found = {}
    for key, value in batch.items():
        mask = masks.get("target" if key in TARGETS else "input")
        padded = mask is not None and has_places(value, mask)
        found[key] = (value[index, mask[index]] if padded else value[index]).unsqueeze(0)  # type: ignore[index]
    return found


def with_shorter(batch: Mapping[str, torch.Tensor], masks: Mapping[str, torch.Tensor], config: Any) -> Batch:
    """Return a batch of texts that are all of one length, and each of them without the token in its middle.

    Texts of less than three tokens stay as they are.

    Args:
        masks: of `masks_of`.
        config: the model's, if it has one: with which token it is padded.
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
    found = {key: torch.cat([value, value]) for key, value in batch.items() if key not in texts}
    for key, whole in texts.items():
        filler = (getattr(config, "pad_token_id", None) or 0) if key == "input_ids" else 0
        ends = [whole[:, : length // 2], whole[:, length // 2 + 1 :]]
        padding = torch.full_like(whole[:, :1], filler)
        cut = torch.cat([padding, *ends] if left else [*ends, padding], dim=1)
        found[key] = torch.cat([whole, cut])
    return found


def chosen(batch: Mapping[str, torch.Tensor], indices: Sequence[int]) -> Batch:
    """Return some of a batch's examples."""
    return {key: value[list(indices)] for key, value in batch.items()}
