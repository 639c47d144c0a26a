"""Measures a model on a silo's held-out examples."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from gramfuse_client.batches import Batch
from gramfuse_protocol.metrics import Sums, classification_sums, regression_sums


def evaluate(model: nn.Module, batches: Iterable[Batch], labels: int) -> Sums:
    """Return the held-out sums of a model (`gramfuse_protocol.metrics`).

    Args:
        batches: as `gramfuse_client.batches.batches` yields them, `labels` included.
        labels: number of labels; 0 for regression.
    """
    model.eval()
    truth, predicted = [], []
    with torch.no_grad():
        for batch in batches:
            logits = model(**{key: value for key, value in batch.items() if key != "labels"}).logits  # (batch, outputs)
            predicted.append((logits.argmax(dim=-1) if labels else logits.squeeze(-1)).cpu())
            truth.append(batch["labels"].cpu())
    t, p = torch.cat(truth).numpy(), torch.cat(predicted).numpy()
    return classification_sums(t, p, labels) if labels else regression_sums(t, p)
