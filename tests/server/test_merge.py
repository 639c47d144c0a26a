"""The merge of any silos, layers, structures and settings, against RegMean written out as loops."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gramfuse_protocol.contract.layout import Group, Layout, Linear, Tensor
from gramfuse_protocol.statistics.contribution import Statistics
from gramfuse_server.merging import regmean as public
from gramfuse_server.merging.accumulator import Accumulator, Merged

FEW = settings(max_examples=60, deadline=None, derandomize=True)
MANY = settings(max_examples=150, deadline=None, derandomize=True)


@dataclass
class Case:
    """Silos with one group of layers; inputs (tokens, d_in) and differences (d_in, d_out) are kept as they are."""

    structure: str
    alpha: float
    weighting: str
    d_in: int
    outs: list[int]
    transposed: list[bool]
    examples: list[int]
    inputs: list[np.ndarray]
    deltas: list[list[np.ndarray]]

    @property
    def shares(self) -> list[float]:
        return [float(e) if self.weighting == "examples" else 1.0 for e in self.examples]

    @property
    def bounds(self) -> list[tuple[int, int]]:
        """The blocks, worked out from the plan's words alone."""
        kind, _, number = self.structure.partition(":")
        width = {"full": self.d_in, "diagonal": 1}.get(kind) or int(number)
        return [(first, min(first + width, self.d_in)) for first in range(0, self.d_in, width)]


def regmean(case: Case) -> list[np.ndarray]:
    """RegMean by its definition, in float64: equation 2 of Jin et al. (ICLR 2023), for every weight and block.

    Returns:
        For each layer the merged difference, (d_in, d_out).
    """
    merged = []
    for layer in range(len(case.outs)):
        whole = np.empty((case.d_in, case.outs[layer]))
        for first, stop in case.bounds:
            width = stop - first
            left = np.zeros((width, width))
            right = np.zeros((width, case.outs[layer]))
            for share, x, deltas in zip(case.shares, case.inputs, case.deltas, strict=True):
                gram = np.zeros((width, width))
                for token in x:
                    for i in range(width):
                        for j in range(width):
                            gram[i, j] += token[first + i] * token[first + j]
                gram /= len(x)
                for i in range(width):
                    for j in range(width):
                        if i != j:
                            gram[i, j] *= case.alpha
                left += share * gram
                right += share * (gram @ deltas[layer][first:stop])
            whole[first:stop] = np.linalg.solve(left, right)
        merged.append(whole)
    return merged


def layout_of(case: Case) -> Layout:
    weights = tuple(
        Linear(weight=f"w{n}.weight", d_out=out, transposed=transposed)
        for n, (out, transposed) in enumerate(zip(case.outs, case.transposed, strict=True))
    )
    return Layout(
        groups=(Group(name="g", d_in=case.d_in, structure=case.structure, weights=weights),),
        tensors=tuple(
            Tensor(name=w.weight, shape=(w.d_out, case.d_in) if w.transposed else (case.d_in, w.d_out), merge="regmean")
            for w in weights
        ),
        frozen=(),
    )


def contributions(case: Case, dtype: type = np.float64) -> list[Statistics]:
    silos = []
    for examples, x, deltas in zip(case.examples, case.inputs, case.deltas, strict=True):
        gram = x.T @ x / max(1, len(x))
        packed = [gram[i, j] for first, stop in case.bounds for i in range(first, stop) for j in range(i, stop)]
        blocks = {"gram:g": np.array(packed, dtype)}
        for n, delta in enumerate(deltas):
            blocks[f"delta:w{n}.weight"] = (delta.T if case.transposed[n] else delta).astype(dtype)
        silos.append(Statistics(examples, {"g": len(x)}, blocks))
    return silos


def fold(case: Case, silos: list[Statistics]) -> tuple[list[np.ndarray], Merged]:
    """Return each layer's merged difference, (d_in, d_out), and the whole result."""
    accumulator = Accumulator(layout_of(case), alpha=case.alpha, weighting=case.weighting)  # type: ignore[arg-type]
    for silo in silos:
        accumulator.fold(silo, "silo")
    merged = accumulator.merge()
    deltas = [merged.deltas[f"w{n}.weight"] for n in range(len(case.outs))]
    return [delta.T if case.transposed[n] else delta for n, delta in enumerate(deltas)], merged


def merge(case: Case) -> list[np.ndarray]:
    return fold(case, contributions(case))[0]


@st.composite
def cases(draw: st.DrawFn, *, tokens: tuple[int, int] = (0, 0), degenerate: bool = False) -> Case:
    """Any case; by default with enough tokens at each silo for well-conditioned Gram matrices."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    d_in = draw(st.integers(1, 9))
    structure = draw(
        st.one_of(st.sampled_from(["full", "diagonal"]), st.integers(1, d_in + 2).map(lambda b: f"block:{b}"))
    )
    outs = draw(st.lists(st.integers(1, 3), min_size=1, max_size=3))
    silos = draw(st.integers(1, 4))
    low, high = tokens if degenerate else (4 * d_in, 6 * d_in)
    inputs = []
    for _ in range(silos):
        x = rng.standard_normal((draw(st.integers(low, high)), d_in)) * rng.uniform(0.3, 3, d_in)
        if degenerate:
            x[:, rng.random(d_in) < 0.3] = 0
            x *= 10.0 ** draw(st.integers(-12, 12))
            if d_in > 1 and draw(st.booleans()):
                x[:, 0] = x[:, -1]
        inputs.append(x)
    return Case(
        structure=structure,
        alpha=draw(st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0])),
        weighting=draw(st.sampled_from(["uniform", "examples"])),
        d_in=d_in,
        outs=outs,
        transposed=[draw(st.booleans()) for _ in outs],
        examples=[draw(st.integers(1, 5000)) for _ in range(silos)],
        inputs=inputs,
        deltas=[[rng.standard_normal((d_in, out)) for out in outs] for _ in range(silos)],
    )


def assert_close(actual: list[np.ndarray], expected: list[np.ndarray], tolerance: float = 1e-9) -> None:
    for one, other in zip(actual, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=tolerance, atol=tolerance)


@FEW
@given(cases())
def test_the_merge_is_regmean(case: Case) -> None:
    assert_close(merge(case), regmean(case))


@FEW
@given(cases())
def test_float32_statistics_cost_no_more_than_their_rounding(case: Case) -> None:
    deltas, result = fold(case, contributions(case, np.float32))
    assert [step.outcome for step in result.steps] == ["clean"]
    assert_close(deltas, regmean(case), 1e-4)


@MANY
@given(cases(), st.randoms(use_true_random=False))
def test_the_order_of_the_silos_does_not_matter(case: Case, random: object) -> None:
    silos = contributions(case)
    expected, _ = fold(case, silos)
    random.shuffle(silos)  # type: ignore[attr-defined]
    assert_close(fold(case, silos)[0], expected, 1e-10)


@MANY
@given(cases(), st.integers(-40, 40))
def test_one_scale_for_all_inputs_changes_nothing(case: Case, exponent: int) -> None:
    expected = merge(case)
    case.inputs = [x * 2.0**exponent for x in case.inputs]
    assert_close(merge(case), expected)


@MANY
@given(cases(), st.randoms(use_true_random=False))
def test_the_unit_in_which_a_feature_is_measured_changes_nothing(case: Case, random: object) -> None:
    # A feature that is 2^k times as large, with weights 2^k times as small, is the same layer.
    expected = merge(case)
    scale = np.array([2.0 ** random.randint(-20, 20) for _ in range(case.d_in)])  # type: ignore[attr-defined]
    case.inputs = [x * scale for x in case.inputs]
    case.deltas = [[delta / scale[:, None] for delta in deltas] for deltas in case.deltas]
    assert_close([delta * scale[:, None] for delta in merge(case)], expected)


@MANY
@given(cases(), st.integers(1, 5))
def test_examples_count_as_that_many_equal_silos(case: Case, times: int) -> None:
    case.examples = [times] + [1] * (len(case.examples) - 1)
    case.weighting = "examples"
    weighted = merge(case)
    case.weighting = "uniform"
    silos = contributions(case)
    assert_close(weighted, fold(case, [silos[0]] * times + silos[1:])[0], 1e-10)


@MANY
@given(cases(), st.integers(0, 2**32 - 1))
def test_a_change_that_all_silos_share_is_added_to_the_merge(case: Case, seed: int) -> None:
    # The choice of the base is free: W₀ + merge(Wᵢ − W₀) is the same for any W₀.
    rng = np.random.default_rng(seed)
    expected = merge(case)
    shift = [rng.standard_normal((case.d_in, out)) for out in case.outs]
    case.deltas = [[d + s for d, s in zip(deltas, shift, strict=True)] for deltas in case.deltas]
    assert_close([d - s for d, s in zip(merge(case), shift, strict=True)], expected)


@MANY
@given(cases(tokens=(0, 12), degenerate=True))
def test_whatever_the_inputs_the_merge_is_finite_and_each_group_is_reported_once(case: Case) -> None:
    deltas, result = fold(case, contributions(case, np.float32))
    for delta in deltas:
        assert np.isfinite(delta).all()
    (step,) = result.steps
    live = sum(any((x[:, j] != 0).any() for x in case.inputs) for j in range(case.d_in))
    assert step.dead_features == case.d_in - live
    assert step.outcome in ({"empty"} if not live else {"clean", "jitter"})
    assert (step.jitter > 0) == (step.outcome == "jitter")


@MANY
@given(cases(tokens=(0, 12), degenerate=True))
def test_whatever_the_inputs_equal_silos_get_their_own_weights_back(case: Case) -> None:
    case.deltas = [case.deltas[0]] * len(case.deltas)
    deltas, _ = fold(case, contributions(case))
    assert_close(deltas, case.deltas[0], 1e-6)


@MANY
@given(cases(tokens=(0, 12), degenerate=True))
def test_whatever_the_inputs_a_diagonal_merge_stays_between_the_silos(case: Case) -> None:
    case.structure = "diagonal"
    deltas, _ = fold(case, contributions(case))
    for layer, delta in enumerate(deltas):
        every = np.stack([silo[layer] for silo in case.deltas])
        assert (delta >= every.min(axis=0) - 1e-9).all()
        assert (delta <= every.max(axis=0) + 1e-9).all()


def test_no_statistics_are_no_merge() -> None:
    with pytest.raises(ValueError, match="no statistics"):
        public.merge([], Layout(groups=(), tensors=(Tensor(name="w", shape=(2,), merge="mean"),), frozen=()))
