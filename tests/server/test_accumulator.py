"""The merge as a whole against least squares over the pooled inputs, and against values worked out by hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest

from gramfuse_model.normal_equations import summands
from gramfuse_protocol.contract.layout import Group, Layout, Linear, Tensor
from gramfuse_protocol.errors import ContributionError
from gramfuse_protocol.secure_sum.fixed_point import encode
from gramfuse_protocol.secure_sum.scales import scales
from gramfuse_protocol.statistics.contribution import Statistics
from gramfuse_server.merging.accumulator import Accumulator, Merged

D, OUTS = 12, (5, 3)


def a_layout(structure: str = "full", d: int = D) -> Layout:
    """A group of an nn.Linear (stored transposed) and a Conv1D, one lone Linear, and a bias."""
    return Layout(
        groups=(
            Group(
                name="pair",
                d_in=d,
                structure=structure,
                weights=(
                    Linear(weight="linear.weight", d_out=OUTS[0], transposed=True),
                    Linear(weight="conv.weight", d_out=OUTS[1], transposed=False),
                ),
            ),
            Group(
                name="lone",
                d_in=d,
                structure=structure,
                weights=(Linear(weight="lone.weight", d_out=2, transposed=True),),
            ),
        ),
        tensors=(
            Tensor(name="linear.weight", shape=(OUTS[0], d), merge="regmean"),
            Tensor(name="linear.bias", shape=(OUTS[0],), merge="mean"),
            Tensor(name="conv.weight", shape=(d, OUTS[1]), merge="regmean"),
            Tensor(name="lone.weight", shape=(2, d), merge="regmean"),
        ),
        frozen=(),
    )


def deltas_of(layout: Layout, rng: np.random.Generator) -> dict[str, np.ndarray]:
    return {tensor.name: rng.standard_normal(tensor.shape) for tensor in layout.tensors}


def statistics(
    layout: Layout,
    inputs: Mapping[str, np.ndarray],
    deltas: Mapping[str, np.ndarray],
    *,
    examples: int = 10,
    dtype: type = np.float64,
) -> Statistics:
    """What a silo with these inputs (tokens, d_in) of each group sends, but in float64 if nothing else is said."""
    blocks = {f"delta:{name}": delta.astype(dtype) for name, delta in deltas.items()}
    for group in layout.groups:
        x = inputs[group.name]
        gram = x.T @ x / max(1, len(x))
        parts = [
            np.stack([gram[i : i + width, i : i + width] for i in range(first, first + count * width, width)])
            for first, count, width in group.blocks.parts
        ]
        blocks[f"gram:{group.name}"] = group.blocks.pack(parts).astype(dtype)
    return Statistics(examples, {group.name: len(inputs[group.name]) for group in layout.groups}, blocks)


def inputs_of(layout: Layout, rng: np.random.Generator, tokens: int) -> dict[str, np.ndarray]:
    """Inputs whose second moments differ from call to call, as silos do."""
    return {g.name: rng.standard_normal((tokens, g.d_in)) * rng.uniform(0.5, 2, g.d_in) for g in layout.groups}


def merge(
    layout: Layout, silos: Sequence[Statistics], *, alpha: float = 1.0, weighting: str = "uniform"
) -> tuple[Merged, Accumulator]:
    accumulator = Accumulator(layout, alpha=alpha, weighting=weighting)  # type: ignore[arg-type]
    for number, silo in enumerate(silos):
        accumulator.fold(silo, f"silo {number}")
    return accumulator.merge(), accumulator


def assert_same(one: Mapping[str, np.ndarray], other: Mapping[str, np.ndarray]) -> None:
    assert set(one) == set(other)
    for name in one:
        np.testing.assert_array_equal(one[name], other[name], err_msg=name)


@pytest.mark.parametrize("weighting", ["uniform", "examples"])
def test_the_merge_is_least_squares_over_the_pooled_inputs_and_outputs(weighting: str) -> None:
    rng = np.random.default_rng(1)
    layout = a_layout()
    base = deltas_of(layout, rng)
    tuned = [{name: w + 0.1 * rng.standard_normal(w.shape) for name, w in base.items()} for _ in range(3)]
    inputs = [inputs_of(layout, rng, tokens) for tokens in (40, 90, 60)]
    examples = (7, 30, 11)
    silos = [
        statistics(layout, x, {name: w[name] - base[name] for name in base}, examples=e)
        for x, w, e in zip(inputs, tuned, examples, strict=True)
    ]
    merged, _ = merge(layout, silos, weighting=weighting)
    for group in layout.groups:
        for weight in group.weights:
            inward = (lambda w: w.T) if weight.transposed else (lambda w: w)
            rows, targets = [], []
            for x, w, e in zip(inputs, tuned, examples, strict=True):
                # Each silo counts as one, or by its examples, whatever the number of its tokens.
                share = np.sqrt((e if weighting == "examples" else 1) / len(x[group.name]))
                rows.append(share * x[group.name])
                targets.append(share * x[group.name] @ inward(w[weight.weight]))
            expected, *_ = np.linalg.lstsq(np.concatenate(rows), np.concatenate(targets), rcond=None)
            actual = inward(base[weight.weight] + merged.deltas[weight.weight])
            np.testing.assert_allclose(actual, expected, rtol=1e-8, atol=1e-10, err_msg=weight.weight)
    assert [(step.group, step.outcome) for step in merged.steps] == [("pair", "clean"), ("lone", "clean")]


@pytest.mark.parametrize("structure", ["full", "block:5", "diagonal"])
@pytest.mark.parametrize("alpha", [0.0, 0.9, 1.0])
@pytest.mark.parametrize("tokens", [4, 50], ids=["fewer tokens than features", "enough tokens"])
def test_silos_with_equal_weights_get_those_weights_back(structure: str, alpha: float, tokens: int) -> None:
    rng = np.random.default_rng(2)
    layout = a_layout(structure)
    deltas = {name: delta.astype(np.float32) for name, delta in deltas_of(layout, rng).items()}
    x = inputs_of(layout, rng, tokens)
    equal = [statistics(layout, x, deltas, dtype=np.float32)] * 4
    other_data = [statistics(layout, inputs_of(layout, rng, 1), deltas, dtype=np.float32) for _ in range(3)]
    for silos in (equal, other_data):
        merged, _ = merge(layout, silos, alpha=alpha)
        for name, delta in deltas.items():
            np.testing.assert_allclose(merged.deltas[name], delta, rtol=1e-6, atol=1e-7, err_msg=name)


@pytest.mark.parametrize("tokens", [0, 3, 50])
def test_layers_that_no_silo_touched_stay_exactly_the_base(tokens: int) -> None:
    rng = np.random.default_rng(3)
    layout = a_layout()
    silos = []
    for _ in range(3):
        deltas = {**deltas_of(layout, rng), "lone.weight": np.zeros((2, D)), "linear.bias": np.zeros(OUTS[0])}
        deltas["linear.weight"][1] = 0  # one output of a weight that was otherwise trained
        silos.append(statistics(layout, inputs_of(layout, rng, tokens), deltas, dtype=np.float32))
    merged, _ = merge(layout, silos)
    for untouched in (merged.deltas["lone.weight"], merged.deltas["linear.bias"], merged.deltas["linear.weight"][1]):
        np.testing.assert_array_equal(untouched, 0)
    assert np.abs(merged.deltas["conv.weight"]).max() > 0


def test_a_block_as_wide_as_the_layer_is_the_full_gram() -> None:
    merged = []
    for structure in ("full", f"block:{D}", f"block:{10 * D}"):
        rng = np.random.default_rng(4)
        layout = a_layout(structure)
        silos = [statistics(layout, inputs_of(layout, rng, 30), deltas_of(layout, rng)) for _ in range(2)]
        merged.append(merge(layout, silos, alpha=0.8)[0])
    assert_same(merged[0].deltas, merged[1].deltas)
    assert_same(merged[0].deltas, merged[2].deltas)


def test_alpha_zero_on_a_full_gram_is_the_diagonal_structure() -> None:
    merged = []
    for structure, alpha in (("full", 0.0), ("diagonal", 0.7), ("block:1", 1.0)):
        rng = np.random.default_rng(5)
        layout = a_layout(structure)
        silos = [statistics(layout, inputs_of(layout, rng, 30), deltas_of(layout, rng)) for _ in range(3)]
        merged.append(merge(layout, silos, alpha=alpha)[0])
    for other in merged[1:]:
        for name, delta in merged[0].deltas.items():
            np.testing.assert_allclose(other.deltas[name], delta, rtol=1e-13, err_msg=name)


@pytest.mark.parametrize(("weighting", "weights", "bias"), [("uniform", (9 / 5, 2), 3), ("examples", (25 / 13, 2), 4)])
def test_diagonal_and_both_weightings_by_hand(weighting: str, weights: tuple[float, float], bias: float) -> None:
    # Feature 0 has mean squares 1 and 4, feature 1 has 9 and 0. Silo 1 changed the weights by (1, 2) and
    # the bias by 1, silo 2 the weights by (2, 7) and the bias by 5. They have 1 and 3 examples.
    # uniform: (1·1 + 4·2) / 5 and 9·2 / 9, bias (1 + 5) / 2; examples: (1·1 + 3·4·2) / 13, bias (1 + 3·5) / 4.
    layout = Layout(
        groups=(
            Group(
                name="g",
                d_in=2,
                structure="diagonal",
                weights=(Linear(weight="w.weight", d_out=1, transposed=True),),
            ),
        ),
        tensors=(
            Tensor(name="w.weight", shape=(1, 2), merge="regmean"),
            Tensor(name="w.bias", shape=(1,), merge="mean"),
        ),
        frozen=(),
    )

    def silo(examples: int, gram: list[float], weight: list[float], bias: float) -> Statistics:
        blocks = {
            "gram:g": np.array(gram, np.float32),
            "delta:w.weight": np.array([weight], np.float32),
            "delta:w.bias": np.array([bias], np.float32),
        }
        return Statistics(examples, {"g": 100 * examples}, blocks)

    merged, accumulator = merge(
        layout, [silo(1, [1, 9], [1, 2], 1), silo(3, [4, 0], [2, 7], 5)], alpha=0.3, weighting=weighting
    )
    np.testing.assert_allclose(merged.deltas["w.weight"], [weights], rtol=1e-14)
    np.testing.assert_allclose(merged.deltas["w.bias"], [bias], rtol=1e-14)
    simple = (1.5, 4.5) if weighting == "uniform" else (7 / 4, 23 / 4)
    np.testing.assert_allclose(accumulator.mean()["w.weight"], [simple], rtol=1e-14)


def test_the_order_of_folding_changes_only_the_rounding() -> None:
    rng = np.random.default_rng(6)
    layout = a_layout("block:5")
    silos = [
        statistics(layout, inputs_of(layout, rng, 25), deltas_of(layout, rng), examples=e, dtype=np.float32)
        for e in (3, 1000, 17, 250)
    ]
    forward, _ = merge(layout, silos, weighting="examples")
    backward, _ = merge(layout, silos[::-1], weighting="examples")
    for name, delta in forward.deltas.items():
        np.testing.assert_allclose(backward.deltas[name], delta, rtol=1e-10, atol=1e-12, err_msg=name)


def test_a_group_that_no_silo_fed_a_token_takes_the_mean_and_is_named_empty() -> None:
    rng = np.random.default_rng(7)
    layout = a_layout()
    silos = []
    for examples in (4, 9):
        x = {**inputs_of(layout, rng, 30), "lone": np.zeros((0, D))}
        silos.append(statistics(layout, x, deltas_of(layout, rng), examples=examples, dtype=np.float32))
    merged, accumulator = merge(layout, silos, alpha=0.9, weighting="examples")
    np.testing.assert_array_equal(merged.deltas["lone.weight"], accumulator.mean()["lone.weight"])
    assert [(step.group, step.outcome) for step in merged.steps] == [("pair", "clean"), ("lone", "empty")]


def test_a_silo_without_tokens_in_a_group_leaves_that_group_to_the_others() -> None:
    rng = np.random.default_rng(8)
    layout = a_layout()
    seen, unseen = deltas_of(layout, rng), deltas_of(layout, rng)
    x = inputs_of(layout, rng, 30)
    silos = [
        statistics(layout, x, seen),
        statistics(layout, {**x, "lone": np.zeros((0, D))}, unseen),
    ]
    merged, _ = merge(layout, silos)
    np.testing.assert_allclose(merged.deltas["lone.weight"], seen["lone.weight"], rtol=1e-9)


def test_tensors_outside_the_closed_form_take_the_mean() -> None:
    rng = np.random.default_rng(9)
    layout = a_layout()
    layout = Layout(
        groups=layout.groups[:1],  # as if "lone.weight" were excluded
        tensors=tuple(t.model_copy(update={"merge": "mean"}) if t.name == "lone.weight" else t for t in layout.tensors),
        frozen=layout.frozen,
    )
    deltas = [deltas_of(layout, rng) for _ in range(3)]
    merged, _ = merge(layout, [statistics(layout, inputs_of(layout, rng, 30), delta) for delta in deltas])
    for name in ("lone.weight", "linear.bias"):
        np.testing.assert_allclose(merged.deltas[name], sum(delta[name] for delta in deltas) / 3, rtol=1e-14)


@pytest.mark.parametrize(
    ("case", "outcome", "dead"),
    [
        ("fewer tokens", "jitter", 0),
        ("twin features", "jitter", 0),
        ("condition 1e12", "jitter", 0),
        ("zero", "clean", 1),
    ],
)
def test_ill_conditioned_float32_statistics_merge_with_the_step_named(case: str, outcome: str, dead: int) -> None:
    rng = np.random.default_rng(10)
    d = 32
    layout = a_layout(d=d)
    mix = np.linalg.qr(rng.standard_normal((d, d)))[0]
    deltas = deltas_of(layout, rng)
    silos = []
    for _ in range(3):
        x = rng.standard_normal((6 if case == "fewer tokens" else 200, d))
        if case == "twin features":
            x[:, 9] = 3 * x[:, 20]
        elif case == "condition 1e12":
            x = x * np.geomspace(1, 1e-6, d) @ mix
        elif case == "zero":
            x[:, 7] = 0
        noisy = {name: delta + 0.01 * rng.standard_normal(delta.shape) for name, delta in deltas.items()}
        silos.append((x, noisy))
    merged, accumulator = merge(
        layout, [statistics(layout, {"pair": x, "lone": x}, noisy, dtype=np.float32) for x, noisy in silos]
    )
    for step in merged.steps:
        assert (step.outcome, step.dead_features, step.mean_blocks) == (outcome, dead, 0)
        assert (step.jitter > 0) == (outcome == "jitter")
    for name, delta in merged.deltas.items():
        assert np.isfinite(delta).all(), name

    def loss(lone: np.ndarray) -> float:
        return sum(float(np.square(x @ (lone - noisy["lone.weight"]).T).mean()) for x, noisy in silos)

    # Whatever was done about the conditioning, the silos' outputs are met better than by the mean.
    assert loss(merged.deltas["lone.weight"]) < loss(accumulator.mean()["lone.weight"])
    if case == "zero":
        np.testing.assert_array_equal(merged.deltas["lone.weight"][:, 7], accumulator.mean()["lone.weight"][:, 7])
        np.testing.assert_array_equal(merged.deltas["conv.weight"][7], accumulator.mean()["conv.weight"][7])


def test_a_contribution_whose_counts_do_not_fit_leaves_the_sums_as_they_were() -> None:
    rng = np.random.default_rng(11)
    layout = a_layout()
    good = statistics(layout, inputs_of(layout, rng, 30), deltas_of(layout, rng))
    accumulator = Accumulator(layout, alpha=1.0)
    accumulator.fold(good, "good")
    before = accumulator.merge().deltas
    for examples, tokens in ((0, good.tokens), (5, {"pair": 3}), (5, {"pair": 3, "lone": -1})):
        with pytest.raises(ContributionError, match="odd"):
            accumulator.fold(Statistics(examples, tokens, good.blocks), "odd")
    assert_same(accumulator.merge().deltas, before)


def test_folding_does_not_change_what_the_silo_sent() -> None:
    rng = np.random.default_rng(12)
    layout = a_layout("block:5")
    silo = statistics(layout, inputs_of(layout, rng, 30), deltas_of(layout, rng))
    copies = {name: block.copy() for name, block in silo.blocks.items()}
    for block in silo.blocks.values():
        block.flags.writeable = False
    merge(layout, [silo, silo], alpha=0.5)
    assert_same(silo.blocks, copies)


@pytest.mark.parametrize("weighting", ["uniform", "examples"])
@pytest.mark.parametrize("structure", ["full", "block:5", "diagonal"])
def test_a_sum_of_words_gives_the_merge_of_what_was_encoded(structure: str, weighting: Any) -> None:
    rng = np.random.default_rng(10)
    plain = a_layout(structure)
    groups = [g.model_copy(update={"exponents": tuple(int(e) for e in rng.integers(0, 3, D))}) for g in plain.groups]
    layout = plain.model_copy(update={"groups": tuple(groups)})
    silos = [
        statistics(layout, inputs_of(layout, rng, 30), deltas_of(layout, rng), examples=e, dtype=np.float32)
        for e in (5, 700, 31)
    ]
    words = np.zeros(layout.sum_entries, np.uint64)
    for silo in silos:
        blocks = summands(layout, silo, alpha=0.9, weighting=weighting)
        parts = [
            encode(values, scale, 5, block.name).reshape(-1)
            for (block, values), (_, scale) in zip(blocks, scales(layout, 5, weighting), strict=True)
        ]
        words += np.concatenate(parts)
    folded, expected = merge(layout, silos, alpha=0.9, weighting=weighting)
    loaded = Accumulator(layout, alpha=0.9, weighting=weighting)
    loaded.load(words, 5)
    assert (loaded.weight, loaded.examples) == (expected.weight, expected.examples)
    # Weighed by examples, an integer leaves 18 bits to their number; these silos use few of them.
    rtol, atol = (1e-7, 1e-8) if weighting == "uniform" else (1e-5, 1e-6)
    for name, delta in loaded.merge().deltas.items():
        np.testing.assert_allclose(delta, folded.deltas[name], rtol=rtol, atol=atol, err_msg=name)
    assert [step.outcome for step in loaded.merge().steps] == ["clean", "clean"]


def test_merging_nothing_is_refused() -> None:
    with pytest.raises(ContributionError, match="nothing to merge"):
        Accumulator(a_layout(), alpha=1.0).merge()
