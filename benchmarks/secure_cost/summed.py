"""The layout of a given size, and what a silo contributes under it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from gramfuse_protocol.contract.form import Block
from gramfuse_protocol.contract.layout import Group, Layout, Linear, Tensor
from gramfuse_protocol.secure_sum.scales import Scale, scales

Floats = NDArray[np.float64]
WEIGHTING: Literal["uniform"] = "uniform"
COLLUDING = 1
HIDDEN = 768
EXAMPLES = 1000


def layout_of(elements: int) -> Layout:
    """Return a layout whose sums have exactly that many elements."""
    hidden = HIDDEN
    while sum_entries(one := layer(0, hidden)) > elements - 3:
        hidden //= 2
    count = (elements - 3) // sum_entries(one)
    groups = [group for number in range(count) for group in layer(number, hidden)]
    tensors = [
        Tensor(name=weight.weight, shape=(weight.d_out, group.d_in), merge="regmean")
        for group in groups
        for weight in group.weights
    ]
    rest = Tensor(name="rest", shape=(elements - 2 - count * sum_entries(one),), merge="mean")
    return Layout(groups=tuple(groups), tensors=(*tensors, rest), frozen=())


def layer(number: int, hidden: int) -> list[Group]:
    """Return the groups of one encoder layer: attention's input and output, the two linear maps of the MLP."""
    sizes = {
        "qkv": (hidden, (hidden, hidden, hidden)),
        "attention": (hidden, (hidden,)),
        "up": (hidden, (4 * hidden,)),
        "down": (4 * hidden, (hidden,)),
    }
    groups = []
    for name, (d_in, outputs) in sizes.items():
        name = f"{number}.{name}"
        weights = tuple(Linear(weight=f"{name}.{at}", d_out=d_out, transposed=True) for at, d_out in enumerate(outputs))
        exponents = tuple(j % 8 - 4 for j in range(d_in))
        groups.append(Group(name=name, d_in=d_in, structure="full", weights=weights, exponents=exponents))
    return groups


def sum_entries(groups: Sequence[Group]) -> int:
    """Return how many elements groups add to `Layout.sums`: s, t, m and a count of token rows."""
    return sum(group.blocks.entries + 2 * group.d_in * group.d_out + 1 for group in groups)


def values(layout: Layout, silo: int) -> Iterator[tuple[Block, Floats]]:
    """Yield one silo's blocks; its weight is 1, its other counts are EXAMPLES, all else is taken from `noise`."""
    random_values = noise(silo, max(block.entries for block in layout.sums))
    for block in layout.sums:
        if block.name == "count":
            yield block, np.array([1, *[EXAMPLES] * (block.entries - 1)], np.float64)
        else:
            yield block, random_values[: block.entries].reshape(block.shape)


@lru_cache(maxsize=1)
def noise(silo: int, entries: int) -> Floats:
    """Return the random values of which every block of a silo is a part."""
    return np.random.default_rng(silo).standard_normal(entries)


def contribution(layout: Layout, silos: int, silo: int) -> Iterator[tuple[str, Floats, Scale]]:
    """Yield what `write_masked` takes, block by block."""
    for (block, found), (_, scale) in zip(values(layout, silo), scales(layout, silos, WEIGHTING), strict=True):
        yield block.name, found, scale
