"""One silo's summands of a merge, computed by the silo itself or by the coordinator."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from gramfuse_protocol.contract.form import Block
from gramfuse_protocol.contract.layout import Group, Layout, Linear, Tensor, delta_block, gram_block
from gramfuse_protocol.statistics.contribution import Contribution, Float64


def summands(
    layout: Layout,
    contribution: Contribution,
    *,
    alpha: float,
    weighting: Literal["uniform", "examples"],
    silo: str | None = None,
    counted: bool = True,
) -> Iterator[tuple[Block, Float64]]:
    """Yield the blocks of `layout.sums` for one silo, in order, float64 in the block's shape.

    With c = 1 (`uniform`) or the number of examples (`examples`), and Ĝ = α G + (1 − α) diag(G), these are: c,
    examples, token rows, and c for each part; c·Ĝ; c·Ĝ·Δ; c·Δ, or Δ for counters. In parts that the silo does not
    train, c and token rows are 0.

    Args:
        silo: the silo's name; required if the layout has parts.
        counted: whether to count examples and token rows; if not, these are 0, and so are counters.

    Source: Jin et al., "Dataless Knowledge Fusion by Merging Weights of Language Models", ICLR 2023, equation 2
    and section 3.3, written for the differences from a common base.
    """
    c = float(contribution.examples) if weighting == "examples" else 1.0
    held = [c if holds else 0.0 for holds in layout.held(silo)]
    weights = [c if group.part is None else held[group.part] for group in layout.groups]
    blocks = iter(layout.sums)
    tokens = [contribution.tokens[group.name] if w else 0 for group, w in zip(layout.groups, weights, strict=True)]
    counts = (contribution.examples, *tokens) if counted else (0,) * (1 + len(tokens))
    yield next(blocks), np.array([c, *counts, *held], np.float64)
    for group, weight in zip(layout.groups, weights, strict=True):
        yield next(blocks), group.blocks.pack(part.numpy() for part in _weighted(group, contribution, alpha, weight))
    for group, weight in zip(layout.groups, weights, strict=True):
        deltas = {linear.weight: contribution.block(delta_block(linear.weight)) for linear in group.weights}
        delta = side_by_side(layout, group, deltas)
        t = torch.empty(group.features, group.d_out, dtype=torch.float64)
        for gram, (first, count, width) in zip(
            _weighted(group, contribution, alpha, weight), group.blocks.parts, strict=True
        ):
            rows = slice(first, first + count * width)
            t[rows] = (gram @ delta[rows].view(count, width, -1)).view(count * width, -1)
        yield next(blocks), t.numpy()
    for tensor in layout.tensors:
        values = contribution.block(delta_block(tensor.name)).astype(np.float64)
        if tensor.merge == "sum" and not counted:
            values = np.zeros_like(values)  # a counter of batches counts examples too
        yield next(blocks), np.asarray(tensor_weight(layout, tensor, c, held) * values)


def tensor_weight(layout: Layout, tensor: Tensor, c: float, held: Sequence[float]) -> Float64:
    """Return a silo's weight, or the total weight, in a tensor's mean, in a shape that broadcasts to the tensor.

    For a counter it is 1: counters are summed.

    Args:
        c: the weight.
        held: the weight in each part.
    """
    if not tensor.parted:
        return np.array(1.0 if tensor.merge == "sum" else c, np.float64)
    return layout.by_output(held).reshape(-1, *(1,) * (len(tensor.shape) - 1))


def side_by_side(layout: Layout, group: Group, deltas: Mapping[str, NDArray[Any]]) -> torch.Tensor:
    """Concatenate the differences of a group's weights, restricted to its part: float64 (d_in, d_out).

    Experts are stacked: (experts · d_in, d_out).
    """
    part = None if group.part is None else list(layout.parts[group.part].outputs)
    return torch.cat([_as_columns(linear, deltas[linear.weight], part) for linear in group.weights], dim=1)


def one_by_one(group: Group, columns: torch.Tensor) -> dict[str, Float64]:
    """Split columns into the differences of a group's weights, as stored: the inverse of `side_by_side`."""
    differences, start = {}, 0
    for weight in group.weights:
        values = columns[:, start : start + weight.d_out]
        if group.experts:
            values = values.reshape(group.experts, group.d_in, weight.d_out)
        differences[weight.weight] = (values.mT if weight.transposed else values).contiguous().numpy()
        start += weight.d_out
    return differences


def _as_columns(weight: Linear, array: NDArray[Any], part: list[int] | None) -> torch.Tensor:
    tensor = torch.from_numpy(np.array(array if part is None else array[part], np.float64))
    return (tensor.mT if weight.transposed else tensor).flatten(0, -2)


def _weighted(group: Group, contribution: Contribution, alpha: float, c: float) -> Iterator[torch.Tensor]:
    """Yield c·Ĝ, one array (count, width, width) for each part of the group's blocks."""
    for part in group.blocks.unpack(contribution.block(gram_block(group.name)).astype(np.float64)):
        gram = torch.from_numpy(part)
        diagonal = gram.diagonal(dim1=1, dim2=2).clone()
        gram *= alpha * c
        gram.diagonal(dim1=1, dim2=2).copy_(c * diagonal)
        yield gram
