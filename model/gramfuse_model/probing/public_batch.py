"""What every base model is tried on: public texts, pairs of them, and images of waves, as its own files make them."""

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
"""Most tokens of the text that a base model is tried on, however long examples may be."""

PUBLIC = {"input": "input_ids", "target": "labels"}
"""Where the public text stands in a batch."""


def public_batch(base: Base) -> dict[str, torch.Tensor]:
    """Return what a base model is traced on: keyword arguments of its forward, of nobody's data.

    Raises:
        ModelError: if the image processor does not make images of one size.
    """
    if base.takes_images:
        return {"pixel_values": public_images(base.tokenizer)}
    texts = list(PUBLIC_TEXT)
    batch = dict(base.tokenizer(texts, padding=True, return_attention_mask=True, return_tensors="pt"))
    if is_encoder_decoder(base.model):
        batch |= _targets(base, texts[1:] + texts[:1])  # of other lengths than the inputs, to tell their rows apart
    return batch


def check_long_texts(plan: Plan, base: Base) -> None:
    """Raise ModelError unless a text as long as examples may be is the same to the base model alone and beside others.

    BigBird, for one, computes something else from a certain length on, and never again once it saw a shorter text. If
    an example may be a pair of texts, it is tried on such.
    """
    if base.takes_images:
        return
    length = min(LONGEST, max(task.max_length for task in plan.tasks.values()))
    texts = [" ".join(PUBLIC_TEXT * (1 + length // 100)), min(PUBLIC_TEXT, key=len)]
    others = texts[::-1] if any(task.pair for task in plan.tasks.values()) else None
    settings = {"truncation": True, "max_length": length, "return_attention_mask": True, "return_tensors": "pt"}
    batch = dict(base.tokenizer(texts, others, padding=True, **settings))
    if others is None and bool(batch["attention_mask"].all()):
        return  # examples are so short that there is no difference
    if is_encoder_decoder(base.model):
        batch |= _targets(base, PUBLIC_TEXT[1:3])
    try:
        find_rows(base.model, batch, {})
    except ModelError as error:
        if error.__cause__ is None:
            raise
        raise ModelError(
            f"the base model cannot take a text of {batch['input_ids'].shape[1]} tokens, as model.max-length allows: "
            f"{error}; make model.max-length smaller"
        ) from error


@contextmanager
def trying(base: Base, batch: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Say of a base model that cannot compute what it is tried on what of its files does not fit.

    Args:
        batch: of `public_batch`.
    """
    try:
        yield
    except ModelError as error:
        if error.__cause__ is None:
            raise
        raise ModelError(_misfit(base, batch, error) or str(error)) from error


def _misfit(base: Base, batch: Mapping[str, torch.Tensor], error: ModelError) -> str | None:
    """Say what of a base model's files does not let it compute what it is tried on, if that is seen."""
    if base.takes_images:
        channels, height, width = batch["pixel_values"].shape[1:]
        return (
            f"{error}. The base model's image processor makes {channels} channels of {height} × {width} pixels: set "
            '"size" (and for another number of channels "image_mean" and "image_std") in its preprocessor_config.json '
            "to what the model takes, or take another model"
        )
    lengths = {kind: batch[key].shape[1] for kind, key in PUBLIC.items() if key in batch}
    for kind, room in room_of(base, *(lengths.get(kind, 1) for kind in PUBLIC)).items():
        if room.tokens < lengths[kind]:
            return (
                f"the model {room.reason}, and its tokenizer makes {lengths[kind]:,} of the public text that every "
                "base model is tried on; take a base for longer texts"
            )
    return None


def _targets(base: Base, texts: Sequence[str]) -> dict[str, torch.Tensor]:
    ids = [torch.tensor(row) for row in base.tokenizer(text_target=list(texts))["input_ids"]]
    labels = nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=IGNORED)
    return {"labels": labels, "decoder_attention_mask": (labels != IGNORED).long()}
