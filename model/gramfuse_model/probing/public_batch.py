"""The public batch on which every base model is tested: texts, pairs of texts, or images of waves."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from gramfuse_model.heads import is_encoder_decoder
from gramfuse_model.loading.base_model import Base
from gramfuse_model.probing.batch import IGNORED
from gramfuse_model.probing.lengths import room_of
from gramfuse_model.probing.public_images import public_images
from gramfuse_model.probing.public_text import PUBLIC_TEXT
from gramfuse_model.probing.rows import find_rows
from gramfuse_protocol.contract.plan import Plan
from gramfuse_protocol.errors import ModelError

LONGEST = 1024
"""Maximum number of tokens of the test text, however long examples can be."""

PUBLIC = {"input": "input_ids", "target": "labels"}
"""The batch keys of the public text."""


def public_batch(base: Base) -> dict[str, torch.Tensor]:
    """Return a batch of public data for a base model, as keyword arguments of its forward.

    Raises:
        ModelError: if the image processor does not produce images of one size.
    """
    if base.takes_images:
        return {"pixel_values": public_images(base.tokenizer)}
    texts = list(PUBLIC_TEXT)
    batch = dict(base.tokenizer(texts, padding=True, return_attention_mask=True, return_tensors="pt"))
    if is_encoder_decoder(base.model):
        batch |= _targets(base, texts[1:] + texts[:1])  # lengths must differ from the inputs'
    return batch


def check_long_texts(plan: Plan, base: Base) -> None:
    """Raise ModelError unless the base model's outputs for a text of maximum length are the same alone and in a batch.

    BigBird, for example, switches its attention above a certain length, and back for good once it sees a shorter text.
    If examples can be pairs of texts, pairs are tested.
    """
    if base.takes_images:
        return
    length = min(LONGEST, max(task.max_length for task in plan.tasks.values()))
    texts = [" ".join(PUBLIC_TEXT * (1 + length // 100)), min(PUBLIC_TEXT, key=len)]
    others = texts[::-1] if any(task.pair for task in plan.tasks.values()) else None
    settings = {"truncation": True, "max_length": length, "return_attention_mask": True, "return_tensors": "pt"}
    batch = dict(base.tokenizer(texts, others, padding=True, **settings))
    if others is None and bool(batch["attention_mask"].all()):
        return  # all texts are truncated to the same length
    if is_encoder_decoder(base.model):
        batch |= _targets(base, PUBLIC_TEXT[1:3])
    try:
        find_rows(base.model, batch, {})
    except ModelError as error:
        if error.__cause__ is None:
            raise
        raise ModelError(
            f"the base model cannot process a text of {batch['input_ids'].shape[1]} tokens, as model.max-length "
            f"allows: {error}; lower model.max-length"
        ) from error


@contextmanager
def trying(base: Base, batch: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """If a base model fails on the public batch, add to the error which of its files does not fit.

    Args:
        batch: the result of `public_batch`.
    """
    try:
        yield
    except ModelError as error:
        if error.__cause__ is None:
            raise
        raise ModelError(_misfit(base, batch, error) or str(error)) from error


def _misfit(base: Base, batch: Mapping[str, torch.Tensor], error: ModelError) -> str | None:
    """Describe the likely mismatch in a base model's files that made it fail on the public batch; None if unknown."""
    if base.takes_images:
        channels, height, width = batch["pixel_values"].shape[1:]
        return (
            f"{error}. The base model's image processor produces {channels} channels of {height} × {width} pixels: set "
            '"size" (and "image_mean" and "image_std" for another number of channels) in its preprocessor_config.json '
            "to what the model expects, or use another model"
        )
    lengths = {kind: batch[key].shape[1] for kind, key in PUBLIC.items() if key in batch}
    for kind, room in room_of(base, *(lengths.get(kind, 1) for kind in PUBLIC)).items():
        if room.tokens < lengths[kind]:
            return (
                f"the model {room.reason}, but its tokenizer converts the public test text to {lengths[kind]:,}; use a "
                "base model for longer texts"
            )
    return None


def _targets(base: Base, texts: Sequence[str]) -> dict[str, torch.Tensor]:
    ids = [torch.tensor(row) for row in base.tokenizer(text_target=list(texts))["input_ids"]]
    labels = nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=IGNORED)
    return {"labels": labels, "decoder_attention_mask": (labels != IGNORED).long()}
