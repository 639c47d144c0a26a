"""Collects the sums that a head is fitted from in closed form: moments of the features of each example."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import numpy as np
import torch
from transformers import PreTrainedModel

from gramfuse_model.head_features import Pooling, features_of
from gramfuse_model.probing.batch import IGNORED
from gramfuse_protocol.contract.task import Task
from gramfuse_protocol.errors import ContributionError, ModelError
from gramfuse_protocol.statistics.head_sums import HeadSums
from gramfuse_protocol.tasks.registry import kind_of


def collect_head_sums(
    model: PreTrainedModel,
    batches: Iterable[Mapping[str, torch.Tensor]],
    task: Task,
    *,
    pooling: Pooling = "head",
    progress: Callable[[int], None] | None = None,
) -> HeadSums:
    """Run a model over batches, in evaluation mode and without autograd, and sum the moments of its features.

    Args:
        batches: keyword arguments of the model's forward, including `labels`: the task's training targets.
        task: the silo's, of a kind whose head can be fitted.
        progress: called with the number of batches done.

    Returns:
        Sums over all examples, or over their words (`TaskKind.fits_words`), in float64.

    Raises:
        ModelError: as `features_of`, and for a mean over words that each have a target.
        ContributionError: if there are no batches, or a feature is NaN or infinite.
    """
    kind = kind_of(task)
    if kind.fits_words and pooling == "mean":
        raise ModelError(f"each word has a target in {kind.name}, so there are no features of their mean")
    sums: HeadSums | None = None
    for done, batch in enumerate(batches, 1):
        features, labels = features_of(model, batch, kind.outputs(task), pooling), batch["labels"]
        if kind.fits_words:
            first = labels != IGNORED  # the first token of each word
            features, labels = features[first], labels[first]
        rows = features.double().cpu().numpy()
        if not np.isfinite(rows).all():
            raise ContributionError("the features of the head have NaN or infinite values")
        of_batch = HeadSums.of(rows, kind.targets(task, labels.cpu().numpy()))
        sums = of_batch if sums is None else sums + of_batch
        if progress is not None:
            progress(done)
    if sums is None:
        raise ContributionError("no example was measured: there are no batches")
    return sums
