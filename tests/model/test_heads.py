"""Heads: which parameters are of one, heads that silos keep, and heads whose labels not every silo annotates."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from gramfuse_model.derive_layout import plan_layout
from gramfuse_model.heads import head_parameters
from gramfuse_model.loading.base_model import Base, load_base
from gramfuse_model.normal_equations import summands
from gramfuse_protocol.contract.layout import Group, Layout, Linear, SharedOutputs, Tensor
from gramfuse_protocol.contract.plan import Plan
from gramfuse_protocol.errors import ModelError
from gramfuse_protocol.secure_sum.fixed_point import encode
from gramfuse_protocol.secure_sum.scales import scales
from gramfuse_protocol.statistics.contribution import Statistics
from gramfuse_server.merging.accumulator import Accumulator

SILOS = ("north", "east", "west")
HOLDERS = {0: ("north", "east"), 1: SILOS, 2: ("north", "east"), 3: ("west",)}
"""Who annotates each of four labels."""

PARTS = (
    SharedOutputs(silos=("north", "east"), outputs=(0, 2)),
    SharedOutputs(silos=SILOS, outputs=(1,)),
    SharedOutputs(silos=("west",), outputs=(3,)),
)
D = 5


def masked_layout() -> Layout:
    """A body layer, and a head of four labels in three parts."""
    body = Group(
        name="body",
        d_in=D,
        structure="full",
        weights=(Linear(weight="body.weight", d_out=3, transposed=True),),
        exponents=(2,) * D,
    )
    head = tuple(
        Group(
            name=f"head[{n}]",
            d_in=D,
            structure="block:2",
            weights=(Linear(weight="head.weight", d_out=len(part.outputs), transposed=True),),
            rows=("all",),
            part=n,
            exponents=(2,) * D,
        )
        for n, part in enumerate(PARTS)
    )
    tensors = (
        Tensor(name="body.weight", shape=(3, D), merge="regmean"),
        Tensor(name="head.weight", shape=(4, D), merge="regmean", parted=True),
        Tensor(name="head.bias", shape=(4,), merge="mean", parted=True),
    )
    return Layout(groups=(body, *head), tensors=tensors, frozen=(), parts=PARTS)


def contributions(layout: Layout) -> dict[str, Statistics]:
    """Each silo has one Gram matrix of the head's inputs, and differences in every row, those of others' labels too."""
    found = {}
    for n, silo in enumerate(SILOS):
        rng = np.random.default_rng(n)
        x = rng.standard_normal((40, D)) * rng.uniform(0.5, 2, D)
        gram = x.T @ x / len(x)
        blocks = {}
        for group in layout.groups:
            width = group.blocks.b
            packed = [gram[j, k] for j in range(D) for k in range(j, min(D, j - j % width + width))]
            blocks[f"gram:{group.name}"] = np.array(packed, np.float32)
        for tensor in layout.tensors:
            blocks[f"delta:{tensor.name}"] = rng.standard_normal(tensor.shape).astype(np.float32)
        found[silo] = Statistics(10 + 7 * n, {group.name: 40 for group in layout.groups}, blocks)
    return found


def row_by_definition(
    found: dict[str, Statistics], label: int, alpha: float, c: dict[str, float]
) -> tuple[np.ndarray, float]:
    """RegMean of one row of the head over the silos that have the label, and the mean of its bias over them."""
    row = np.zeros(D)
    holders = HOLDERS[label]
    for first, stop in ((0, 2), (2, 4), (4, 5)):
        left, right = np.zeros((stop - first,) * 2), np.zeros(stop - first)
        for silo in holders:
            gram = np.zeros((stop - first,) * 2)
            values = iter(found[silo].block("gram:head[0]").astype(float))
            for j in range(D):
                for k in range(j, min(D, j - j % 2 + 2)):
                    value = next(values)
                    if first <= j < stop:
                        gram[j - first, k - first] = gram[k - first, j - first] = value
            shrunk = alpha * gram + (1 - alpha) * np.diag(np.diag(gram))
            left += c[silo] * shrunk
            right += c[silo] * shrunk @ found[silo].block("delta:head.weight")[label, first:stop].astype(float)
        row[first:stop] = np.linalg.solve(left, right)
    bias = sum(c[silo] * float(found[silo].block("delta:head.bias")[label]) for silo in holders)
    return row, bias / sum(c[silo] for silo in holders)


@pytest.mark.parametrize("weighting", ["uniform", "examples"])
def test_each_row_of_a_masked_head_is_merged_over_the_silos_that_have_its_label(weighting: str) -> None:
    layout = masked_layout()
    found = contributions(layout)
    accumulator = Accumulator(layout, alpha=0.9, weighting=weighting)  # type: ignore[arg-type]
    for silo, statistics in found.items():
        accumulator.fold(statistics, silo, silo=silo)
    merged = accumulator.merge()
    c = {silo: float(s.examples) if weighting == "examples" else 1.0 for silo, s in found.items()}
    for label, holders in HOLDERS.items():
        row, bias = row_by_definition(found, label, 0.9, c)
        np.testing.assert_allclose(merged.deltas["head.weight"][label], row, rtol=1e-9)
        np.testing.assert_allclose(merged.deltas["head.bias"][label], bias, rtol=1e-9)
        rows = [c[silo] * found[silo].block("delta:head.weight")[label].astype(float) for silo in holders]
        mean = np.sum(rows, axis=0) / sum(c[silo] for silo in holders)
        np.testing.assert_allclose(merged.mean["head.weight"][label], mean, rtol=1e-9)
    assert [step.group for step in merged.steps] == ["body", "head[0]", "head[1]", "head[2]"]
    assert {step.outcome for step in merged.steps} == {"clean"}


@pytest.mark.parametrize("weighting", ["uniform", "examples"])
def test_a_secure_sum_of_a_masked_head_is_the_open_one(weighting: str) -> None:
    layout = masked_layout()
    sums = [Accumulator(layout, alpha=0.9, weighting=weighting) for _ in range(2)]  # type: ignore[arg-type]
    words = np.zeros(layout.sum_entries, np.uint64)
    for silo, statistics in contributions(layout).items():
        sums[0].fold(statistics, silo, silo=silo)
        values = summands(layout, statistics, alpha=0.9, weighting=weighting, silo=silo)  # type: ignore[arg-type]
        parts = [
            encode(value.reshape(-1), np.broadcast_to(scale, block.shape).reshape(-1), len(SILOS), block.name)
            for (block, value), (_, scale) in zip(values, scales(layout, len(SILOS), weighting), strict=True)  # type: ignore[arg-type]
        ]
        words += np.concatenate(parts)
    sums[1].load(words, len(SILOS))
    opened, secure = (accumulator.merge().deltas for accumulator in sums)
    for name, delta in opened.items():
        np.testing.assert_allclose(secure[name], delta, rtol=1e-5, atol=1e-7)


def test_a_silo_adds_only_zeros_to_a_part_that_it_does_not_have() -> None:
    layout = masked_layout()
    statistics = contributions(layout)["west"]
    values = {
        block.name: value for block, value in summands(layout, statistics, alpha=0.9, weighting="uniform", silo="west")
    }
    assert values["count"].tolist() == [1, 24, 40, 0, 40, 40, 0, 1, 1]
    assert not values["s:head[0]"].any()
    assert not values["t:head[0]"].any()
    assert not values["m:head.weight"][[0, 2]].any()
    assert not values["m:head.bias"][[0, 2]].any()
    assert values["m:head.weight"][[1, 3]].all()


def test_labels_whose_silos_are_all_lost_stay_as_they_were() -> None:
    layout = masked_layout()
    accumulator = Accumulator(layout, alpha=0.9)
    for silo, statistics in contributions(layout).items():
        if silo != "west":
            accumulator.fold(statistics, silo, silo=silo)
    merged = accumulator.merge()
    assert not merged.deltas["head.weight"][3].any()
    assert merged.deltas["head.bias"][3] == 0
    assert {step.group: step.outcome for step in merged.steps}["head[2]"] == "empty"


def a_plan(base: Path, model: str, silos: str, rest: str = "") -> Plan:
    return Plan.parse(
        f"""
        [plan]
        name = "heads"
        [model]
        base = "{base}"
        {model}
        [privacy]
        secure-aggregation = false
        metrics = "silo"
        {rest}
        {silos}
        """
    )


def roster(**silos: str) -> str:
    return "".join(f'\n[[silo]]\nname = "{name}"\n{keys}\n' for name, keys in silos.items())


LABELS = 'labels = ["a", "b", "c"]'


def layouts(plan: Plan) -> tuple[list[Base], list[Layout]]:
    bases = [load_base(plan, Path(), silo=name) for name in plan.names]
    return bases, [plan_layout(plan, base) for base in bases]


def test_a_plan_in_which_silos_annotate_different_labels_splits_the_last_layer_of_the_head(pico_bert: Path) -> None:
    model = f'task = "multi-label"\nmax-length = 16\n{LABELS}'
    plan = a_plan(pico_bert, model, roster(one='labels = ["c", "a"]', two='labels = ["b", "c"]', three=""))
    _, (layout, *others) = layouts(plan)
    assert all(other == layout for other in others)
    assert layout.parts == (
        SharedOutputs(silos=("one", "three"), outputs=(0,)),
        SharedOutputs(silos=("two", "three"), outputs=(1,)),
        SharedOutputs(silos=("one", "two", "three"), outputs=(2,)),
    )
    assert [(g.name, g.part, g.d_out) for g in layout.groups[-4:]] == [
        ("bert.pooler.dense", None, 16),
        ("classifier[0]", 0, 1),
        ("classifier[1]", 1, 1),
        ("classifier[2]", 2, 1),
    ]
    assert [t.name for t in layout.tensors if t.parted] == ["classifier.weight", "classifier.bias"]


def test_a_plan_in_which_all_silos_name_all_labels_has_no_parts(pico_bert: Path) -> None:
    plan = a_plan(
        pico_bert, f'task = "multi-label"\nmax-length = 16\n{LABELS}', roster(one='labels = ["c", "a", "b"]', two="")
    )
    assert layouts(plan)[1][0].parts == ()


def test_own_heads_are_in_no_layout(pico_bert: Path) -> None:
    same = a_plan(pico_bert, f'task = "classification"\nmax-length = 16\n{LABELS}', roster(one="", two=""))
    own = a_plan(pico_bert, f'task = "classification"\nmax-length = 16\n{LABELS}\nhead = "own"', roster(one="", two=""))
    (base, _), (whole, _) = layouts(same)
    _, (body, _) = layouts(own)
    head = head_parameters(base.model)
    assert head == {"classifier.weight", "classifier.bias"}
    assert {t.name for t in whole.tensors} - {t.name for t in body.tensors} == head
    assert body.groups == whole.groups[:-1]
    assert body.frozen == whole.frozen


def test_silos_with_different_tasks_derive_one_layout_of_what_all_their_models_have(pico_bert: Path) -> None:
    tasks = f"""
        [[task]]
        name = "topics"
        task = "classification"
        max-length = 16
        {LABELS}
        [[task]]
        name = "names"
        task = "token-classification"
        max-length = 16
        labels = ["O", "B-X", "I-X"]
        [[task]]
        name = "scores"
        task = "regression"
        max-length = 16
        """
    silos = roster(one='task = "topics"', two='task = "names"', three='task = "scores"')
    plan = a_plan(pico_bert, 'head = "own"', silos, tasks)
    bases, (layout, *others) = layouts(plan)
    assert [other.digest for other in others] == [layout.digest] * 2
    assert {base.pins for base in bases} == {bases[0].pins}
    names = {tensor.name for tensor in layout.tensors}
    assert "bert.encoder.layer.1.output.dense.weight" in names
    assert not any("classifier" in name or "pooler" in name for name in names)
    # A pattern means the shared body, whatever some task's model has beside it.
    with pytest.raises(ModelError, match="pooler"):
        plan_layout(plan.override(['merge.exclude=["*pooler*"]']), bases[0])


def test_a_head_without_a_layer_of_one_output_for_each_label_is_not_masked(pico_bert: Path) -> None:
    model = f'task = "multi-label"\nmax-length = 16\n{LABELS}'
    plan = a_plan(pico_bert, model, roster(one='labels = ["a", "b", "c"]', two='labels = ["b"]'))
    base = load_base(plan, Path())
    base.model.classifier = torch.nn.Linear(16, 5)
    with pytest.raises(ModelError, match="3 outputs"):
        plan_layout(plan, base)
