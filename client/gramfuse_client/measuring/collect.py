"""Puts together what a silo contributes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from gramfuse_client.measuring.gram import collect_grams
from gramfuse_model.loading.base_model import trainable
from gramfuse_protocol.arguments import check_argument, wrong_argument
from gramfuse_protocol.contract.layout import Layout, Slice, delta_block, gram_block
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
    """Measure a fine-tuned model: its Gram matrices on local data and its difference from the base.

    Example:
        >>> statistics = gramfuse.collect_statistics(tuned, [batch], layout, base=start, examples=2)
        >>> statistics.block("delta:classifier.weight").shape
        (2, 8)

    The model runs in the dtype that it has. What its layers receive is multiplied in float32, whatever that dtype is,
    and summed in float64; the differences are float32. Of a model in half precision the Gram matrices are those of what
    its layers receive in half precision.

    Args:
        model: the fine-tuned model.
        batches: its training data as keyword arguments of forward (see `gramfuse_client.measuring.gram.collect_grams`),
            in an order that was drawn: beyond the limit, nothing counts.
        layout: from `gramfuse_model.derive_layout`, made on the base model.
        base: of the base model, by name, float32, what training may change
            (`gramfuse_model.loading.base_model.trainable`); what is not in the layout is left out.
        examples: how many examples the model was fine-tuned on, ≥ 1.
        limit: most token rows for one Gram matrix.

    Raises:
        ContributionError: naming an argument of a wrong type; naming the tensor, if the model does not fit the layout
            or a value is NaN or infinite; if there are no batches, or they have no token.
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
            "no token was measured: there are no batches, or all that is in them is padding. A generator gives its "
            "batches once; make a new one for each model"
        )
    blocks = {gram_block(name): gram.mean() for name, gram in grams.items()}
    tuned = trainable(model)
    names = [tensor.name for tensor in layout.tensors if tensor.name in base and tensor.name in tuned]
    blocks |= {delta_block(name): np.asarray(tuned[name] - base[name]) for name in names}  # of one number, an array too
    tokens = {name: gram.tokens for name, gram in grams.items()}
    check_counts(layout, examples, tokens, "this silo")
    check_slices((Slice(block, 0, block.entries) for block in layout.blocks), blocks, "this silo")
    return Statistics(examples, tokens, blocks)
