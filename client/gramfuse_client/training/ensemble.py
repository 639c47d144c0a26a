"""An ensemble of models: the mean of their logits, and a vote on their generated texts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch

from gramfuse_client.training.outputs import Outputs


def combine(outputs: Sequence[Outputs], annotated: Sequence[tuple[int, ...]]) -> Outputs:
    """Combine the outputs of several models for the same batch.

    Args:
        outputs: each model's outputs, logits (batch, …, outputs).
        annotated: indices of the labels that each model was trained with; empty if its outputs are not labels. A logit
            is averaged over the models that have its label.

    Returns:
        Mean logits, float32 (batch, …, outputs), and the text that most models generated for each example.
    """
    logits = torch.stack([each.logits.float() for each in outputs])  # (models, batch, …, outputs)
    has_label = torch.ones(len(outputs), logits.shape[-1], device=logits.device)
    for row, indices in zip(has_label, annotated, strict=True):
        if indices:
            row.zero_()[list(indices)] = 1.0
    weights = has_label.view(len(outputs), *(1,) * (logits.dim() - 2), -1)
    mean = (logits * weights).sum(dim=0) / has_label.sum(dim=0).clamp_min(1.0)
    return Outputs(mean, tuple(most_voted(texts) for texts in zip(*(each.texts for each in outputs), strict=True)))


def most_voted(texts: Sequence[str]) -> str:
    """Return the text that most models generated; of a tie, the one that appears first."""
    return Counter(texts).most_common(1)[0][0]
