"""Finds context-free layers, which see single tokens or image patches, by running the base model on changed inputs.

The first layer after frozen embeddings is context-free: each row of its input is a function of one token and its
position, which anyone with the base model can compute for all tokens. Its Gram matrix is a sum over tokens and
positions, weighted by how often they occur, so these frequencies are easily reconstructed from it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from gramfuse_model.heads import is_encoder_decoder
from gramfuse_model.probing.batch import TOKENS, alone, masks_of
from gramfuse_model.probing.hooks import Hook, observing, run
from gramfuse_protocol.errors import ModelError

ROUNDING = 1e-5
"""A change of a row below this share of its norm counts as rounding."""

PATCH = 16
"""Height and width of an image patch, if a model's configuration does not specify them."""


def context_free(model: nn.Module, batch: Mapping[str, Any], modules: Mapping[str, nn.Module]) -> frozenset[str]:
    """Return the names of the modules in whose input most rows depend on at most one token or patch.

    A module that is called several times is context-free if one of its calls is, since its Gram matrix covers all
    calls. Rows that do not depend on the input, such as tables of relative positions, do not count.

    The positions of a text (except special tokens that every text has), or the patches of an image, are numbered. For
    each binary digit of these numbers, the model runs once with those positions replaced whose digit is 0, and once
    with those whose digit is 1. A row that depends on one position is unchanged in one run of each pair; a row that
    depends on two is not, since their numbers differ in some digit.

    Args:
        batch: as for `derive_layout`; the result is empty if inputs are neither tokens, embeddings nor pixels.
        modules: modules by name; the last dimension of their inputs must be features.

    Raises:
        ModelError: if the texts of the batch do not have two different tokens.
    """
    probes = _probes(model, batch)
    if probes is None:
        return frozenset()
    inputs, runs = probes
    names: set[str] = set()

    def record(name: str) -> Hook:
        def hook(_: nn.Module, x: torch.Tensor, __: tuple[Any, ...]) -> None:
            if _mostly_one_place(x, runs):
                names.add(name)

        return hook

    with observing(model, [(module, record(name)) for name, module in modules.items()]):
        run(model, inputs, "a changed text or image of that batch")
    return frozenset(names)


def _mostly_one_place(x: torch.Tensor, runs: int) -> bool:
    """Return whether most of the rows that depend on the input depend on a single position.

    Args:
        x: (runs, …, d_in), or flattened; the first run has the original input, the others follow in pairs.
        runs: 1 + 2 · digits.
    """
    if x.shape[0] != runs and x.dim() > 2 and x.shape[1] == runs:
        x = x.transpose(0, 1)
    if x.numel() // x.shape[-1] % runs:
        return False  # a table that all examples share
    rows = x.reshape(runs, -1, x.shape[-1]).double()
    moved = (rows[1:] - rows[0]).norm(dim=2)  # (2 · digits, rows)
    largest = moved.max(dim=0).values
    by_several = moved.view(-1, 2, moved.shape[1]).min(dim=1).values.max(dim=0).values
    rounding = ROUNDING * rows[0].norm(dim=1)
    depends = largest > rounding
    return bool(2 * (depends & (by_several <= rounding)).sum() > depends.sum())


def _probes(model: nn.Module, batch: Mapping[str, Any]) -> tuple[dict[str, torch.Tensor], int] | None:
    """Return one input stacked with its changed copies, and their number; None if its positions are unknown."""
    tokens = next((key for key in TOKENS if key in batch), None)
    if tokens is not None:
        masks = masks_of(model, batch)
        original = alone(batch, masks, int(masks["input"].sum(dim=1).argmax()))
        keys = [tokens]
        if is_encoder_decoder(model):
            keys += [key for key in ("decoder_input_ids", "labels") if key in batch][:1]
        changed = {key: _replacements(batch, key, original[key]) for key in keys}
        total, positions = 0, {}
        for key in keys:
            differs = changed[key] != original[key]
            if key == "inputs_embeds":
                differs = differs.any(dim=2, keepdim=True)
            positions[key] = torch.where(differs, differs.cumsum(dim=1) - 1 + total, -1)
            total += int(differs.sum())
    elif "pixel_values" in batch:
        images = batch["pixel_values"]
        original, changed = {"pixel_values": images[:1]}, {"pixel_values": images[-1:]}
        number, total = _patches(model, images)
        positions = {"pixel_values": number.expand_as(images[:1])}
    else:
        return None
    digits = max(1, (total - 1).bit_length())
    runs = 1 + 2 * digits
    stacked = {key: value.expand(runs, *value.shape[1:]).clone() for key, value in original.items()}
    for key, number in positions.items():
        for digit in range(digits):
            for bit in (0, 1):
                chosen = (number >= 0) & ((number >> digit) % 2 == bit)
                run = 1 + 2 * digit + bit
                stacked[key][run] = torch.where(chosen, changed[key], original[key])[0]
    return stacked, runs


def _replacements(batch: Mapping[str, Any], key: str, original: torch.Tensor) -> torch.Tensor:
    """Return a different token for each token, or the previous embedding for each embedding."""
    return original.roll(1, dims=1) if key == "inputs_embeds" else _other_tokens(batch, key, original)


def _other_tokens(batch: Mapping[str, Any], key: str, original: torch.Tensor) -> torch.Tensor:
    """Replace each token by a different one from the batch; tokens that all texts have stay.

    Args:
        key: the batch's key for the tokens.
        original: token ids, (1, length).
    """
    real = batch[key] >= 0
    if key == "input_ids" and "attention_mask" in batch:
        real = batch["attention_mask"].bool()
    texts = [set(ids[mask].tolist()) for ids, mask in zip(batch[key], real, strict=True)]
    common = set.intersection(*texts) if len(texts) > 1 else set()
    others = sorted(set.union(*texts) - common)
    if len(others) < 2:
        raise ModelError(
            f"the batch for deriving the layout does not have two different tokens in {key!r}, so context-free layers "
            "cannot be found; use texts with different words"
        )
    index = {token: n for n, token in enumerate(others)}
    return torch.tensor([[others[(index[t] + 1) % len(others)] if t in index else t for t in original[0].tolist()]])


def _patches(model: nn.Module, images: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Return the index of each pixel's patch, (1, 1, height, width), and the number of patches."""
    config = getattr(model, "config", None)
    config = getattr(config, "vision_config", config)
    size = getattr(config, "patch_size", PATCH)
    patch_height, patch_width = (size, size) if isinstance(size, int) else size
    height, width = images.shape[-2:]
    columns = -(-width // patch_width)
    y, x = torch.arange(height) // patch_height, torch.arange(width) // patch_width
    return (y.view(-1, 1) * columns + x).view(1, 1, height, width), -(-height // patch_height) * columns
