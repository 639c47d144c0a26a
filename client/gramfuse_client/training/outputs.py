"""What goes into a model and what comes out of it, batch by batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from gramfuse_model.probing.batch import IGNORED
from gramfuse_protocol.tasks.rows import LOSS
from gramfuse_protocol.tasks.scores import Tokens

Batch = dict[str, torch.Tensor]

ANSWERS = ("labels", "words")
"""What of a batch is no input of a model."""


def inputs_of(batch: Mapping[str, torch.Tensor]) -> Batch:
    """Return what of a batch goes into a model."""
    return {key: value for key, value in batch.items() if key not in ANSWERS}


def at_tokens(batch: Batch, labels: Sequence[Sequence[int]]) -> Batch:
    """Return `labels` of a batch: one label for each token of its inputs, IGNORED at padding."""
    filled = torch.full_like(batch["input_ids"], IGNORED)
    filled[batch["attention_mask"].bool()] = torch.tensor([label for row in labels for label in row])
    return {"labels": filled}


class Outputs(NamedTuple):
    """What a model says of a batch.

    Args:
        logits: (batch, outputs), or (batch, positions, outputs) where there is one output for each position.
        texts: what it generates, for `sequence-to-sequence`; else empty.
    """

    logits: torch.Tensor
    texts: tuple[str, ...] = ()


def next_tokens(logits: torch.Tensor, truth: torch.Tensor) -> Tokens:
    """Return what a model said of each token that was to be predicted, by example."""
    found = []
    for said, true in zip(logits, truth, strict=True):
        real = true != IGNORED
        losses = cross_entropy(said[real].double(), true[real], reduction="none")
        clipped = losses.nan_to_num(nan=LOSS).clamp(0.0, LOSS)
        right = said[real].argmax(dim=-1) == true[real]
        found.append([float(of.sum()) for of in (real, losses, clipped, right)])
    return Tokens(*np.array(found, np.float64).T)
