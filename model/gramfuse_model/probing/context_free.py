"""Which layers see tokens, or patches of an image, without context: found by running the base model on changed inputs.

The first layer behind frozen embeddings is such a layer: each row of its input is a function of one token and its
position, which anybody who has the base model can compute for all tokens. A Gram matrix of it is a sum over tokens and
positions, weighed by how often they occur, and so are easily told from it.
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
"""What moves a row by less than this share of its own length does not enter it."""

PATCH = 16
"""Height and width of a patch of an image, where a model's configuration names none."""


def context_free(model: nn.Module, batch: Mapping[str, Any], modules: Mapping[str, nn.Module]) -> frozenset[str]:
    """Return the names of the modules of whose input most rows depend on one token, or one patch, at most.

    A module that is called several times counts if one of its calls does: its Gram matrix is of all of them. Rows that
    depend on nothing, as those of a table of relative positions, do not count.

    The places of a text (all but special tokens that every text has), or of an image, are numbered. For each binary
    digit of the numbers, the model runs once with the places replaced that have a 0 there, and once with those that
    have a 1. A row that depends on one place stays as it is in one run of each pair; one that depends on two does not,
    since their numbers differ in a digit.

    Args:
        batch: as `derive_layout` takes it; of inputs that are neither tokens, nor their embeddings, nor pixels,
            nothing is found.
        modules: by name, whose inputs have features in their last dimension.

    Raises:
        ModelError: if the texts of the batch have but one token.
    """
    probes = _probes(model, batch)
    if probes is None:
        return frozenset()
    inputs, runs = probes
    found: set[str] = set()

    def record(name: str) -> Hook:
        def hook(_: nn.Module, x: torch.Tensor, __: tuple[Any, ...]) -> None:
            if _mostly_one_place(x, runs):
                found.add(name)

        return hook

    with observing(model, [(module, record(name)) for name, module in modules.items()]):
        run(model, inputs, "a changed text or image of that batch")
    return frozenset(found)


def _mostly_one_place(x: torch.Tensor, runs: int) -> bool:
    """Say whether most rows that depend on the input depend on one place of it.

    Args:
        x: (runs, …, d_in), or flattened; the first run is of the input as it was, then come pairs.
        runs: 1 + 2 · digits.
    """
    if x.shape[0] != runs and x.dim() > 2 and x.shape[1] == runs:
        x = x.transpose(0, 1)
    if x.numel() // x.shape[-1] % runs:
        return False  # rows that all examples share
    rows = x.reshape(runs, -1, x.shape[-1]).double()
    moved = (rows[1:] - rows[0]).norm(dim=2)  # (2 · digits, rows)
    most = moved.max(dim=0).values
    by_others = moved.view(-1, 2, moved.shape[1]).min(dim=1).values.max(dim=0).values
    rounding = ROUNDING * rows[0].norm(dim=1)
    depend = most > rounding
    return bool(2 * (depend & (by_others <= rounding)).sum() > depend.sum())


def _probes(model: nn.Module, batch: Mapping[str, Any]) -> tuple[dict[str, torch.Tensor], int] | None:
    """Return one input with its changed copies, stacked, and how many these are; None if its places are not known."""
    tokens = next((key for key in TOKENS if key in batch), None)
    if tokens is not None:
        masks = masks_of(model, batch)
        given = alone(batch, masks, int(masks["input"].sum(dim=1).argmax()))
        keys = [tokens]
        if is_encoder_decoder(model):
            keys += [key for key in ("decoder_input_ids", "labels") if key in batch][:1]
        changed = {key: _others(batch, key, given[key]) for key in keys}
        total, places = 0, {}
        for key in keys:
            differs = changed[key] != given[key]
            if key == "inputs_embeds":
                differs = differs.any(dim=2, keepdim=True)
            places[key] = torch.where(differs, differs.cumsum(dim=1) - 1 + total, -1)
            total += int(differs.sum())
    elif "pixel_values" in batch:
        images = batch["pixel_values"]
        given, changed = {"pixel_values": images[:1]}, {"pixel_values": images[-1:]}
        number, total = _patches(model, images)
        places = {"pixel_values": number.expand_as(images[:1])}
    else:
        return None
    digits = max(1, (total - 1).bit_length())
    runs = 1 + 2 * digits
    stacked = {key: value.expand(runs, *value.shape[1:]).clone() for key, value in given.items()}
    for key, number in places.items():
        for digit in range(digits):
            for bit in (0, 1):
                chosen = (number >= 0) & ((number >> digit) % 2 == bit)
                run = 1 + 2 * digit + bit
                stacked[key][run] = torch.where(chosen, changed[key], given[key])[0]
    return stacked, runs


def _others(batch: Mapping[str, Any], key: str, given: torch.Tensor) -> torch.Tensor:
    """Return other tokens, or embeddings, than those given: of embeddings, those that stand before them."""
    return given.roll(1, dims=1) if key == "inputs_embeds" else _other_tokens(batch, key, given)


def _other_tokens(batch: Mapping[str, Any], key: str, given: torch.Tensor) -> torch.Tensor:
    """Return tokens of the batch of which each is another than the one given; those that all texts have stay.

    Args:
        key: of the tokens in the batch.
        given: (1, length).
    """
    real = batch[key] >= 0
    if key == "input_ids" and "attention_mask" in batch:
        real = batch["attention_mask"].bool()
    texts = [set(ids[there].tolist()) for ids, there in zip(batch[key], real, strict=True)]
    common = set.intersection(*texts) if len(texts) > 1 else set()
    others = sorted(set.union(*texts) - common)
    if len(others) < 2:
        raise ModelError(
            f"the batch that a layout is made on has no two different tokens in {key!r}, so that it cannot be seen "
            "which layers see tokens without context; take texts with different words"
        )
    place = {token: n for n, token in enumerate(others)}
    return torch.tensor([[others[(place[t] + 1) % len(others)] if t in place else t for t in given[0].tolist()]])


def _patches(model: nn.Module, images: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Return the number of the patch of each pixel, (1, 1, height, width), and how many patches there are."""
    config = getattr(model, "config", None)
    config = getattr(config, "vision_config", config)
    size = getattr(config, "patch_size", PATCH)
    high, wide = (size, size) if isinstance(size, int) else size
    height, width = images.shape[-2:]
    columns = -(-width // wide)
    y, x = torch.arange(height) // high, torch.arange(width) // wide
    return (y.view(-1, 1) * columns + x).view(1, 1, height, width), -(-height // high) * columns
