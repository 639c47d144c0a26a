"""The fixed-point scales of all blocks that are summed over silos.

The layout has each feature's amplitude on public text, 2^e (`Group.exponents`). With K bits for one silo's integer
(`gramfuse_protocol.secure_sum.fixed_point.capacity`), w bits for its weight c, and 10 bits by which an amplitude may
exceed that on public text, an element is multiplied by 2^f with

    s, features j and k    f = K − w − 20 − e_j − e_k
    t, row j               f = K − w − 20 − e_j − g      g: the smallest with 4^g ≥ Σ 4^e over the group's features
    m                      f = K − w − 8                 a weight that moves by more than 256 is an error
    m of a buffer          f = K − w − 24                running variances and counters move further
    count                  f = 0

and, for the sums of a head, in which the silo's examples add up and the last feature is 1, so that e = 0:

    second, features j and k    f = K − 18 − 12 − e_j − e_k
    first, feature j            f = K − 18 − 12 − e_j      a target is about 1 in size, so that its e is 0 too

The features of a head are bounded, as those of a pooler are, or normalised: 6 bits are enough. They need the precision:
a covariance is a small difference of large sums.

where w is 0 under `uniform` and 18 under `examples`. A t is at most the product of a feature's amplitude and the
amplitude by which the weight difference changes an output; it fits if the latter is at most 2^(g + 10). The experts of
a group share their scales.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from gramfuse_protocol.contract.form import Block, Form
from gramfuse_protocol.contract.head_layout import HeadLayout
from gramfuse_protocol.contract.layout import Group, Layout
from gramfuse_protocol.secure_sum.fixed_point import capacity

AMPLITUDE_BITS = 10
HEAD_BITS = 6
DELTA_BITS = 8
BUFFER_BITS = 24
MOST_BITS = 18
WEIGHT_BITS = {"uniform": 0, "examples": MOST_BITS}
MOST_WEIGHED = 2**MOST_BITS
"""Most examples of a silo that a secure sum can weigh, or add up for a head."""

METRICS_SCALE = 2.0**20
"""Scale of held-out results (`gramfuse_protocol.held_out.sums`): fine enough for noise and losses."""

Scale = NDArray[np.float64] | float


def scales(form: Form, silos: int, weighting: Literal["uniform", "examples"]) -> Iterator[tuple[Block, Scale]]:
    """Yield each block of `form.sums` with its scale 2^f, which broadcasts to the block's shape.

    Raises:
        ValueError: if a layout has no exponents.
    """
    match form:
        case HeadLayout():
            yield from _scales_of_head(form, silos)
        case Layout():
            yield from _scales_of_layout(form, silos, weighting)


def _scales_of_head(head: HeadLayout, silos: int) -> Iterator[tuple[Block, Scale]]:
    product = 2.0 ** (capacity(silos) - MOST_BITS - 2 * HEAD_BITS)
    second, first = head.sums
    powers = np.exp2(-np.array((*head.exponents, 0), np.float64))
    yield second, head.packing.outer(powers, product)
    yield first, product * powers[:, None]


def _scales_of_layout(
    layout: Layout, silos: int, weighting: Literal["uniform", "examples"]
) -> Iterator[tuple[Block, Scale]]:
    if any(len(group.exponents) != group.d_in for group in layout.groups):
        raise ValueError("the layout has no exponents; derive it with gramfuse_model.derive_layout")
    room = capacity(silos) - WEIGHT_BITS[weighting]
    product = 2.0 ** (room - 2 * AMPLITUDE_BITS)
    blocks = iter(layout.sums)
    yield next(blocks), 1.0
    for group in layout.groups:
        yield next(blocks), group.blocks.outer(np.tile(_powers(group), group.experts or 1), product)
    for group in layout.groups:
        yield next(blocks), product * _rows(group)
    for block, tensor in zip(blocks, layout.tensors, strict=True):
        yield block, 2.0 ** (room - (BUFFER_BITS if tensor.buffer else DELTA_BITS))


def spread(group: Group) -> int:
    """Return the smallest g with 4^g ≥ Σ 4^e over a group's features."""
    lowest = min(group.exponents)
    total = sum(1 << 2 * (e - lowest) for e in group.exponents)
    return lowest + ((total - 1).bit_length() + 1) // 2


def _rows(group: Group) -> NDArray[np.float64]:
    """Return 2^(−e_j−g) for each row, (features, 1)."""
    return np.tile(_powers(group) * 2.0 ** -spread(group), group.experts or 1)[:, None]


def _powers(group: Group) -> NDArray[np.float64]:
    return np.exp2(-np.array(group.exponents, np.float64))
