"""Layouts of every structure, and what a silo contributes under them."""

from __future__ import annotations

from typing import Any

import numpy as np

from gramfuse_model.normal_equations import summands
from gramfuse_protocol.contract.layout import Group, Layout, Linear, SharedOutputs, Tensor
from gramfuse_protocol.secure_sum.scales import scales
from gramfuse_protocol.statistics.contribution import Statistics
from tests.vectors.made.sources import Json, Source

ALPHA = 0.75
"""Few bits, so that the summands are exact in float64 whatever the order in which they are added up."""


def exponent_list(layout: Layout, silos: int, weighting: Any) -> list[int]:
    """f of every word of the statistics."""
    found: list[int] = []
    for block, scale in scales(layout, silos, weighting):
        found += np.log2(np.broadcast_to(scale, block.shape)).astype(int).reshape(-1).tolist()
    return found


def first_layout() -> Layout:
    """One full group of two weights that share their input, stored both ways, and a bias."""
    linear = (Linear(weight="q.weight", d_out=1, transposed=True), Linear(weight="k.weight", d_out=2, transposed=False))
    return Layout(
        groups=(Group(name="q", d_in=2, structure="full", weights=linear, exponents=(-2, 1)),),
        tensors=(
            Tensor(name="q.weight", shape=(1, 2), merge="regmean"),
            Tensor(name="q.bias", shape=(2,), merge="mean"),
            Tensor(name="k.weight", shape=(2, 2), merge="regmean"),
        ),
        frozen=("embeddings.weight",),
    )


def second_layout() -> Layout:
    """A block with a rest, a diagonal, experts that are one tensor, and a scalar."""
    return Layout(
        groups=(
            Group(
                name="up",
                d_in=3,
                structure="block:2",
                weights=(Linear(weight="up.weight", d_out=2, transposed=True),),
                exponents=(3, -7, 0),
            ),
            Group(
                name="down",
                d_in=2,
                structure="diagonal",
                weights=(Linear(weight="down.weight", d_out=1, transposed=True),),
                exponents=(-40, -3),
            ),
            Group(
                name="experts.up",
                d_in=2,
                structure="full",
                weights=(Linear(weight="experts.up", d_out=1, transposed=True),),
                experts=2,
                exponents=(0, -5),
            ),
        ),
        tensors=(
            Tensor(name="up.weight", shape=(2, 3), merge="regmean"),
            Tensor(name="down.weight", shape=(1, 2), merge="regmean"),
            Tensor(name="experts.up", shape=(2, 1, 2), merge="regmean"),
            Tensor(name="scale", shape=(), merge="mean"),
        ),
        frozen=(),
    )


def third_layout() -> Layout:
    """A head of three labels, of which the first and the last are north's and east's alone, and a normalisation."""
    parts = (
        SharedOutputs(silos=("north", "east"), outputs=(0, 2)),
        SharedOutputs(silos=("north", "east", "west"), outputs=(1,)),
    )
    groups = tuple(
        Group(
            name=f"head[{n}]",
            d_in=2,
            structure="full",
            weights=(Linear(weight="head.weight", d_out=len(part.outputs), transposed=True),),
            rows=("all",),
            part=n,
            exponents=(0, -1),
        )
        for n, part in enumerate(parts)
    )
    return Layout(
        groups=groups,
        tensors=(
            Tensor(name="head.weight", shape=(3, 2), merge="regmean", parted=True),
            Tensor(name="head.bias", shape=(3,), merge="mean", parted=True),
            Tensor(name="norm.running_var", shape=(2,), merge="mean", buffer=True),
            Tensor(name="norm.num_batches_tracked", shape=(), merge="sum", buffer=True),
        ),
        frozen=(),
        parts=parts,
    )


def contribution(layout: Layout, source: Source) -> Statistics:
    """A silo's statistics: few bits where they are multiplied, any float32 where they are not."""
    blocks = {}
    for block in layout.blocks:
        name = block.name.partition(":")[2]
        if block.name.startswith("gram:"):
            group = next(group for group in layout.groups if group.name == name)
            bound = 2.0 ** (2 * min(group.exponents))
            values = np.array(source.integers(block.entries, 100), np.float64) / 64 * bound
        elif any(tensor.name == name and tensor.merge == "regmean" for tensor in layout.tensors):
            values = np.array(source.integers(block.entries, 100), np.float64) / 512
        elif any(tensor.name == name and tensor.merge == "sum" for tensor in layout.tensors):
            values = np.array(source.integers(block.entries, 100), np.float64)
        else:
            values = np.array(source.integers(block.entries, 10**6), np.float64) * 1e-9
        blocks[block.name] = values.astype(np.float32).reshape(block.shape)
    tokens = {group.name: abs(n) for group, n in zip(layout.groups, source.integers(9, 5000), strict=False)}
    return Statistics(300 + source.integers(1, 99)[0], tokens, blocks)


def contribution_json(statistics: Statistics) -> Json:
    return {
        "examples": statistics.examples,
        "tokens": dict(statistics.tokens),
        "blocks": {name: array.astype(np.float64).reshape(-1).tolist() for name, array in statistics.blocks.items()},
    }


def statistics_values(layout: Layout, statistics: Statistics, weighting: Any, silo: str) -> list[float]:
    found: list[float] = []
    for _, values in summands(layout, statistics, alpha=ALPHA, weighting=weighting, silo=silo):
        found += values.reshape(-1).tolist()
    return found
