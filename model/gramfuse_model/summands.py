"""What one silo adds to the sums of a merge, whether it does so itself or the coordinator does it for it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from gramfuse_protocol.layout import Block, Group, Layout, Linear, delta_block, gram_block
from gramfuse_protocol.statistics import Contribution

Float64 = NDArray[np.float64]


def summands(
    layout: Layout, contribution: Contribution, *, alpha: float, weighting: Literal["uniform", "examples"]
) -> Iterator[tuple[Block, Float64]]:
    """Yield the blocks of `layout.sums` for one silo, in order, float64 in the block's shape.

    With c = 1 (`uniform`) or the number of examples (`examples`) and Ĝ = α G + (1 − α) diag(G), these are c, examples
    and token rows; c·Ĝ; c·Ĝ·Δ; c·Δ.

    Source: Jin et al., "Dataless Knowledge Fusion by Merging Weights of Language Models", ICLR 2023, equation 2
    and section 3.3, written for the differences from a common base.
    """
    c = float(contribution.examples) if weighting == "examples" else 1.0
    blocks = iter(layout.sums)
    tokens = [contribution.tokens[group.name] for group in layout.groups]
    yield next(blocks), np.array([c, contribution.examples, *tokens], np.float64)
    for group in layout.groups:
        yield next(blocks), group.blocks.pack([part.numpy() for part in _weighted(group, contribution, alpha, c)])
    for group in layout.groups:
        delta = torch.cat([inward(w, contribution.block(delta_block(w.weight))) for w in group.weights], dim=1)
        t = torch.empty(group.d_in, group.d_out, dtype=torch.float64)
        for gram, (first, count, width) in zip(
            _weighted(group, contribution, alpha, c), group.blocks.parts, strict=True
        ):
            rows = slice(first, first + count * width)
            t[rows] = (gram @ delta[rows].view(count, width, -1)).view(count * width, -1)
        yield next(blocks), t.numpy()
    for tensor in layout.tensors:
        yield next(blocks), np.asarray(c * contribution.block(delta_block(tensor.name)).astype(np.float64))


def inward(weight: Linear, array: NDArray[Any]) -> torch.Tensor:
    """Return a weight's difference as float64 (d_in, d_out)."""
    tensor = torch.from_numpy(np.array(array, np.float64))
    return tensor.T if weight.transposed else tensor


def _weighted(group: Group, contribution: Contribution, alpha: float, c: float) -> list[torch.Tensor]:
    """Return c·Ĝ, one (count, width, width) for each part of the group's blocks."""
    grams = []
    for part in group.blocks.unpack(contribution.block(gram_block(group.name)).astype(np.float64)):
        gram = torch.from_numpy(part)
        diagonal = gram.diagonal(dim1=1, dim2=2).clone()
        gram *= alpha * c
        gram.diagonal(dim1=1, dim2=2).copy_(c * diagonal)
        grams.append(gram)
    return grams
