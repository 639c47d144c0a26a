"""Collects the sums that a head is fitted from in closed form: moments of the features of each example."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping

import numpy as np
import torch
from transformers import PreTrainedModel

from gramfuse_client.data.examples import Examples
from gramfuse_model.head_features import Pooling, features_of
from gramfuse_protocol.errors import ContributionError, DataError
from gramfuse_protocol.statistics.head_sums import HeadSums


def collect_head_sums(
    model: PreTrainedModel,
    batches: Iterable[Mapping[str, torch.Tensor]],
    labels: int,
    *,
    pooling: Pooling = "head",
    progress: Callable[[int], None] | None = None,
) -> HeadSums:
    """Run a model over batches, in evaluation mode and without autograd, and sum the moments of its features.

    Args:
        model: with exactly one label for each example.
        batches: keyword arguments of its forward, including `labels`, int (batch,).
        labels: number of labels.
        progress: called with the number of batches done.

    Returns:
        Sums over all examples, in float64.

    Raises:
        ModelError: as `features_of`.
        ContributionError: if there are no batches, or a feature is NaN or infinite.
    """
    sums: HeadSums | None = None
    for done, batch in enumerate(batches, 1):
        features = features_of(model, batch, labels, pooling).double().cpu().numpy()
        if not np.isfinite(features).all():
            raise ContributionError("the features of the head have NaN or infinite values")
        of_batch = HeadSums.of(features, batch["labels"].cpu().numpy(), labels)
        sums = of_batch if sums is None else sums + of_batch
        if progress is not None:
            progress(done)
    if sums is None:
        raise ContributionError("no example was measured: there are no batches")
    return sums


def frequent(examples: Examples, least: int, setting: str) -> list[int]:
    """Return the indices of the examples whose label at least so many different texts or images have.

    Args:
        setting: name of the setting with this minimum, for the error.

    Raises:
        DataError: if there are none.
    """
    counts = Counter(label for _, label in {*zip(examples.input_keys, examples.labels, strict=True)})
    indices = [index for index, label in enumerate(examples.labels) if counts[label] >= least]
    if not indices:
        raise DataError(
            f"no label has {least} different training examples or more ({setting}), so none can be in the sums that a "
            "head is fitted from"
        )
    return indices
