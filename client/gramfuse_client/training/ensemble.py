"""Several models asked together: the mean of their logits, and a vote on what they generate."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch

from gramfuse_client.training.outputs import Outputs


def together(found: Sequence[Outputs], annotated: Sequence[tuple[int, ...]]) -> Outputs:
    """Return what several models say of a batch as if it were one's.

    Args:
        found: of each model, for the same batch.
        annotated: indices of the labels that each model was trained with, empty if its outputs are no labels; a logit
            is the mean over the models that have its label.
    """
    logits = torch.stack([one.logits.float() for one in found])  # (models, batch, …, outputs)
    has = torch.ones(len(found), logits.shape[-1], device=logits.device)
    for row, indices in zip(has, annotated, strict=True):
        if indices:
            row.zero_()[list(indices)] = 1.0
    spread = has.view(len(found), *(1,) * (logits.dim() - 2), -1)
    mean = (logits * spread).sum(dim=0) / has.sum(dim=0).clamp_min(1.0)
    return Outputs(mean, tuple(most_voted(texts) for texts in zip(*(one.texts for one in found), strict=True)))


def most_voted(texts: Sequence[str]) -> str:
    """Return the text that most models generated; of several such texts, that of the first model among theirs."""
    return Counter(texts).most_common(1)[0][0]
