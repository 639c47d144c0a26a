"""Inputs and outputs of a model, batch by batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from gramfuse_model.probing.batch import IGNORED, Batch
from gramfuse_protocol.tasks.rows import LOSS
from gramfuse_protocol.tasks.scores import Tokens


def at_tokens(batch: Batch, labels: Sequence[Sequence[int]]) -> Batch:
    """Return `labels` of a batch, int64 (batch, length): one label for each input token, IGNORED at padding."""
    filled = torch.full_like(batch["input_ids"], IGNORED)
    filled[batch["attention_mask"].bool()] = torch.tensor([label for row in labels for label in row])
    return {"labels": filled}


class Outputs(NamedTuple):
    """A model's outputs for a batch.

    Args:
        logits: (batch, outputs), or (batch, positions, outputs) if there is one output for each position.
        texts: generated texts for `sequence-to-sequence`; otherwise empty.
    """

    logits: torch.Tensor
    texts: tuple[str, ...] = ()


def next_tokens(logits: torch.Tensor, truth: torch.Tensor) -> Tokens:
    """Return each example's sums over the tokens to predict: their number, losses, clipped losses and hits.

    Args:
        logits: (batch, positions, vocabulary).
        truth: (batch, positions), IGNORED where there is nothing to predict.
    """
    rows = []
    for predicted, true in zip(logits, truth, strict=True):
        real = true != IGNORED
        losses = cross_entropy(predicted[real].double(), true[real], reduction="none")
        clipped = losses.nan_to_num(nan=LOSS).clamp(0.0, LOSS)
        correct = predicted[real].argmax(dim=-1) == true[real]
        rows.append([float(values.sum()) for values in (real, losses, clipped, correct)])
    return Tokens(*np.array(rows, np.float64).T)
