"""Collects the statistics that a silo contributes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from gramfuse_client.measuring.gram import collect_grams
from gramfuse_model.parameters import trainable
from gramfuse_protocol.arguments import check_argument, wrong_argument
from gramfuse_protocol.contract.form import Slice
from gramfuse_protocol.contract.layout import Layout, delta_block, gram_block
from gramfuse_protocol.contract.plan_sections import Merge
from gramfuse_protocol.errors import ContributionError
from gramfuse_protocol.statistics.contribution import Statistics, check_counts, check_slices


def collect_statistics(
    model: nn.Module,
    batches: Iterable[Mapping[str, torch.Tensor]],
    layout: Layout,
    *,
    base: Mapping[str, NDArray[np.float32]],
    examples: int,
    limit: int = Merge().tokens,
    progress: Callable[[int], None] | None = None,
) -> Statistics:
    """Measure a fine-tuned model: its Gram matrices on local data, and its difference from the base.

    Example:
        >>> statistics = gramfuse.collect_statistics(tuned, [batch], layout, base=start, examples=2)
        >>> statistics.block("delta:classifier.weight").shape
        (2, 8)

    The model runs in its own dtype. Its layers' inputs are multiplied in float32 and summed in float64, whatever that
    dtype is; differences are float32. The Gram matrices of a half-precision model are those of its half-precision
    activations.

    Args:
        model: the fine-tuned model.
        batches: its training data as keyword arguments of forward, in random order, because rows beyond the limit are
            not used.
        layout: from `gramfuse.derive_layout`, made on the base model.
        base: the base model's trainable values by name, float32 (`gramfuse.trainable`); values that are not in the
            layout are ignored.
        examples: how many examples the model was fine-tuned on, ≥ 1.
        limit: maximum token rows for one Gram matrix.
        progress: called with the number of batches done.

    Raises:
        ContributionError: if an argument has the wrong type, the model does not fit the layout, a value is NaN or
            infinite, or the batches contain no token. Names the argument or the tensor.
    """
    check_argument("collect_statistics: model", model, nn.Module, "a torch.nn.Module", ContributionError)
    if isinstance(batches, Mapping) or not isinstance(batches, Iterable):
        raise wrong_argument("collect_statistics: batches", batches, "several batches, as [batch]", ContributionError)
    check_argument("collect_statistics: layout", layout, Layout, "a gramfuse.Layout", ContributionError)
    check_argument(
        "collect_statistics: base", base, Mapping, "arrays by name, of gramfuse.trainable", ContributionError
    )
    check_argument("collect_statistics: examples", examples, int, "a whole number", ContributionError)
    grams = collect_grams(model, batches, layout, limit=limit, progress=progress)
    if grams and not any(gram.tokens for gram in grams.values()):
        raise ContributionError(
            "no token was measured: there are no batches, or they contain only padding. A generator yields its batches "
            "only once; make a new one for each model"
        )
    blocks = {gram_block(name): gram.mean() for name, gram in grams.items()}
    tuned = trainable(model)
    names = [tensor.name for tensor in layout.tensors if tensor.name in base and tensor.name in tuned]
    blocks |= {delta_block(name): np.asarray(tuned[name] - base[name]) for name in names}  # scalars become 0-d arrays
    tokens = {name: gram.tokens for name, gram in grams.items()}
    check_counts(layout, examples, tokens, "this silo")
    check_slices((Slice(block, 0, block.entries) for block in layout.blocks), blocks, "this silo")
    return Statistics(examples, tokens, blocks)
