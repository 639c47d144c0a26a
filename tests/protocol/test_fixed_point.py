"""Fixed point: exact against Fractions, loud at its limits; and scales that leave the room which they promise."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gramfuse_model.normal_equations import summands
from gramfuse_protocol.contract.form import EXPONENT
from gramfuse_protocol.contract.layout import Group, Layout, Linear, Tensor
from gramfuse_protocol.errors import ContributionError
from gramfuse_protocol.secure_sum.fixed_point import capacity, decode, encode
from gramfuse_protocol.secure_sum.scales import scales, spread
from gramfuse_protocol.statistics.contribution import Statistics

FEW = settings(max_examples=60, deadline=None, derandomize=True)
MANY = settings(max_examples=150, deadline=None, derandomize=True)

WEIGHT_BITS = {"uniform": 0, "examples": 18}
TINY = 5e-324
"""The smallest denormal number."""


def bits(silos: int) -> int:
    """The largest K with silos · 2^K ≤ 2^62, by trying."""
    return max(k for k in range(63) if silos * 2**k <= 2**62)


def signed(words: np.ndarray) -> list[int]:
    """Words as integers in two's complement, by arithmetic."""
    return [int(word) - 2**64 if int(word) >= 2**63 else int(word) for word in words]


@st.composite
def sums(draw: st.DrawFn) -> tuple[int, list[list[float]]]:
    """An exponent f and for each of 1 to 64 silos three values, up to the bound and with every kind of rounding."""
    silos, f = draw(st.integers(1, 64)), draw(st.integers(-70, 130))
    limit = math.ldexp(1.0, bits(silos) - f)
    value = st.one_of(
        st.floats(-limit, limit),
        st.sampled_from([limit, -limit, math.nextafter(limit, 0), 0.0, -0.0, TINY, -TINY, 2.0**-1022]),
        st.integers(-9, 9).map(lambda k: math.ldexp(k + 0.5, -f)),  # ties
        st.integers(-(2**20), 2**20).map(lambda k: math.ldexp(k / 1024, -f)),
    ).filter(lambda x: abs(x) <= limit)
    return f, draw(st.lists(st.lists(value, min_size=3, max_size=3), min_size=silos, max_size=silos))


@MANY
@given(sums())
def test_a_decoded_sum_is_off_by_half_a_unit_for_each_silo_at_most(case: tuple[int, list[list[float]]]) -> None:
    f, rows = case
    silos, scale = len(rows), math.ldexp(1.0, f)
    total = np.zeros(3, np.uint64)
    for row in rows:
        words = encode(np.array(row), scale, silos, "t")
        # Python rounds a Fraction to the nearest integer, ties to even.
        assert signed(words) == [round(Fraction(x) * Fraction(2) ** f) for x in row]
        total += words
    values = decode(total, scale)
    for column, integer in enumerate(signed(total)):
        exact = sum(Fraction(row[column]) for row in rows)
        assert abs(integer) <= 2**62
        assert abs(Fraction(integer) / Fraction(2) ** f - exact) <= Fraction(silos, 2) / Fraction(2) ** f
        # What float64 has no room for is rounded once more, and only then.
        assert Fraction(float(values[column])) == Fraction(float(integer)) / Fraction(2) ** f
        if abs(integer) <= 2**53:
            assert abs(Fraction(float(values[column])) - exact) <= Fraction(silos, 2) / Fraction(2) ** f


def test_ties_go_to_the_even_integer() -> None:
    values = np.array([0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 0.49999999999999994, -3.5])
    assert signed(encode(values, 1.0, 4, "t")) == [0, 2, 2, 0, -2, -2, 0, -4]


@pytest.mark.parametrize("silos", [1, 2, 3, 4, 5, 33, 63, 64, 1024])
def test_the_bound_for_every_silo_at_once_does_not_wrap_and_a_little_more_is_refused(silos: int) -> None:
    assert capacity(silos) == bits(silos)
    scale = 2.0**-3
    limit = math.ldexp(1.0, bits(silos) + 3)
    total = np.zeros(2, np.uint64)
    for _ in range(silos):
        total += encode(np.array([limit, -limit]), scale, silos, "t")
    assert signed(total) == [silos * 2 ** bits(silos), -silos * 2 ** bits(silos)]
    assert decode(total, scale).tolist() == [silos * limit, -silos * limit]
    beyond = math.nextafter(limit, math.inf)
    values = np.array([0.0, beyond, limit, -beyond, 1.0])
    with pytest.raises(ContributionError, match=r"tensor 'm:head\.bias' has 2 of 5 .*range.* factor of 1"):
        encode(values, scale, silos, "m:head.bias")


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ([1.0, math.nan, 2.0], "has 1 NaN .*out of 3"),
        ([math.nan, 1e300, math.inf, -math.inf], "has 3 NaN .*out of 4"),
        ([1e300, 0.0], "has 1 of 2 .*range"),  # finite, and the product is not
        ([-1e300, 1e300], "has 2 of 2 .*range"),
    ],
)
def test_what_has_no_place_is_named_and_counted(values: list[float], told: str) -> None:
    with pytest.raises(ContributionError, match=rf"tensor 's:layer' {told}") as caught:
        encode(np.array(values), 2.0**100, 4, "s:layer")
    assert caught.value.reason == str(caught.value)
    with pytest.raises(ContributionError, match=told):
        encode(np.array(values), np.full(len(values), 2.0**100), 4, "s:layer", lambda n: np.zeros(n, np.uint64))


@MANY
@given(
    st.lists(st.tuples(st.floats(-1e6, 1e6), st.integers(-30, 30)), min_size=1, max_size=9),
    st.sampled_from([3, 4, 64]),
)
def test_the_same_values_give_the_same_words_however_they_are_asked_for(pairs: list[tuple[float, int]], n: int) -> None:
    values = np.array([x for x, _ in pairs])
    scale = np.exp2(np.array([f for _, f in pairs], np.float64))
    kept = values.copy()
    words = encode(values, scale, n, "t")
    out = np.full(len(pairs) + 2, 7, np.uint64)
    encode(values, scale, n, "t", lambda count: out[1 : 1 + count])
    assert out.tolist() == [7, *words.tolist(), 7]
    assert words.tolist() == [int(encode(np.array([x]), 2.0**f, n, "t")[0]) for x, f in pairs]
    assert encode(values[:0], scale[:0], n, "t").size == 0
    np.testing.assert_array_equal(values, kept)
    decode(words, scale)
    assert words.tobytes() == encode(values, scale, n, "t").tobytes()


# Scales. -----------------------------------------------------------------------------------------------------------


def a_layout(structure: str, exponents: list[int], outs: list[int]) -> Layout:
    """One group with these exponents, stored both ways, another of three features, and a bias."""
    d = len(exponents)
    weights = tuple(Linear(weight=f"w{n}", d_out=out, transposed=n % 2 == 0) for n, out in enumerate(outs))
    other = Linear(weight="other", d_out=2, transposed=True)
    return Layout(
        groups=(
            Group(name="g", d_in=d, structure=structure, weights=weights, exponents=tuple(exponents)),
            Group(name="h", d_in=3, structure="full", weights=(other,), exponents=(1, -2, 0)),
        ),
        tensors=(
            *(
                Tensor(name=w.weight, shape=(w.d_out, d) if w.transposed else (d, w.d_out), merge="regmean")
                for w in weights
            ),
            Tensor(name="other", shape=(2, 3), merge="regmean"),
            Tensor(name="bias", shape=(4,), merge="mean"),
        ),
        frozen=(),
    )


@st.composite
def layouts(draw: st.DrawFn, most: int = 9) -> Layout:
    exponents = draw(st.lists(st.integers(-EXPONENT, EXPONENT), min_size=1, max_size=most))
    structure = draw(
        st.one_of(st.sampled_from(["full", "diagonal"]), st.integers(1, len(exponents) + 2).map(lambda b: f"block:{b}"))
    )
    return a_layout(structure, exponents, draw(st.lists(st.integers(1, 3), min_size=1, max_size=3)))


def packed_pairs(group: Group) -> list[tuple[int, int]]:
    """The features of each packed entry, worked out from the structure's words alone."""
    kind, _, number = group.structure.partition(":")
    width = {"full": group.d_in, "diagonal": 1}.get(kind) or int(number)
    bounds = [(first, min(first + width, group.d_in)) for first in range(0, group.d_in, width)]
    return [(j, k) for first, stop in bounds for j in range(first, stop) for k in range(j, stop)]


def slow_spread(exponents: tuple[int, ...]) -> int:
    total = sum(Fraction(4) ** e for e in exponents)
    return next(g for g in range(-60, 80) if Fraction(4) ** g >= total)


@FEW
@given(layouts(), st.integers(3, 64), st.sampled_from(["uniform", "examples"]))
def test_scales_are_the_formulas_of_the_module(layout: Layout, silos: int, weighting: str) -> None:
    room = bits(silos) - WEIGHT_BITS[weighting]
    expected: list[list[int]] = [[0] * (2 + len(layout.groups))]
    for group in layout.groups:
        expected.append([room - 20 - group.exponents[j] - group.exponents[k] for j, k in packed_pairs(group)])
    for group in layout.groups:
        g = slow_spread(group.exponents)
        expected.append([room - 20 - e - g for e in group.exponents for _ in range(group.d_out)])
    bits_of = {False: 8, True: 24}
    expected += [[room - bits_of[tensor.buffer]] * math.prod(tensor.shape) for tensor in layout.tensors]
    found = list(scales(layout, silos, weighting))
    assert [block for block, _ in found] == list(layout.sums)
    for (block, scale), exponents in zip(found, expected, strict=True):
        assert np.broadcast_to(scale, block.shape).reshape(-1).tolist() == [math.ldexp(1.0, f) for f in exponents]


def test_a_layout_without_exponents_has_no_scales() -> None:
    layout = a_layout("full", [0, 1], [1])
    bare = layout.model_copy(
        update={"groups": (layout.groups[0], layout.groups[1].model_copy(update={"exponents": ()}))}
    )
    with pytest.raises(ValueError, match="no exponents"):
        next(iter(scales(bare, 4, "uniform")))


@MANY
@given(
    st.one_of(
        st.lists(st.integers(-EXPONENT, EXPONENT), min_size=1, max_size=12),
        # Sums at a power of four and just beside it.
        st.tuples(st.integers(-EXPONENT, EXPONENT), st.sampled_from([1, 3, 4, 5, 15, 16, 17, 1023, 1024, 1025])).map(
            lambda pair: [pair[0]] * pair[1]
        ),
    )
)
@example([EXPONENT] + [-EXPONENT] * 3)
@example([0, *[-1] * 12, *[-EXPONENT]])
def test_spread_is_the_smallest_power_of_four_over_the_sum(exponents: list[int]) -> None:
    group = a_layout("full", exponents, [1]).groups[0]
    assert spread(group) == slow_spread(group.exponents)


def extreme(layout: Layout, examples: int, excess: int) -> Statistics:
    """A contribution whose every amplitude is 2^excess times that on public text, and whose features agree fully.

    Inputs are ±2^(e + excess) with a sign per feature, so that |G_jk| = 2^(e_j + e_k + 2·excess). A column of Δ has
    norm 1 and points where the output is largest; everything else is as large as it may be.
    """
    blocks: dict[str, np.ndarray] = {}
    for group in layout.groups:
        sign = np.where(np.arange(group.d_in) % 3 == 1, -1.0, 1.0)
        amplitude = sign * np.exp2(np.array(group.exponents, np.float64) + excess)
        blocks[f"gram:{group.name}"] = np.array(
            [amplitude[j] * amplitude[k] for j, k in packed_pairs(group)], np.float32
        )
        column = amplitude / np.sqrt(np.square(amplitude).sum()) * (1 - 1e-6)
        for weight in group.weights:
            delta = np.tile(column[:, None], weight.d_out)
            blocks[f"delta:{weight.weight}"] = (delta.T if weight.transposed else delta).astype(np.float32)
    blocks["delta:bias"] = np.full(4, 2.0**8, np.float32)
    return Statistics(examples, {"g": 2**40, "h": 0}, blocks)


@FEW
@given(
    layouts(),
    st.sampled_from([3, 4, 7, 64]),
    st.sampled_from(["uniform", "examples"]),
    st.sampled_from([0.0, 0.9, 1.0]),
)
def test_amplitudes_within_ten_bits_of_those_on_public_text_always_fit(
    layout: Layout, silos: int, weighting: str, alpha: float
) -> None:
    silo = extreme(layout, 2**18, 10)
    blocks = summands(layout, silo, alpha=alpha, weighting=weighting)
    for (block, values), (_, scale) in zip(blocks, scales(layout, silos, weighting), strict=True):
        words = encode(values, scale, silos, block.name).reshape(-1)
        with np.errstate(over="ignore"):
            total = words * np.uint64(silos)
        assert signed(total) == [silos * q for q in signed(words)], block.name
        # The room is used up: nothing is spent on headroom that was not asked for.
        if block.name.startswith("s:"):
            assert max(map(abs, signed(words))) == 2 ** bits(silos)


@FEW
@given(layouts(), st.sampled_from(["uniform", "examples"]))
def test_one_bit_more_is_an_error_that_names_the_gram_matrix(layout: Layout, weighting: str) -> None:
    silo = extreme(layout, 2**18, 11)
    blocks = summands(layout, silo, alpha=0.9, weighting=weighting)
    found = [
        (block, values, scale) for (block, values), (_, scale) in zip(blocks, scales(layout, 4, weighting), strict=True)
    ]
    block, values, scale = found[1]
    diagonal = layout.groups[0].d_in
    with pytest.raises(ContributionError, match=r"tensor 's:g' has \d+ of") as caught:
        encode(values, scale, 4, block.name)
    assert int(str(caught.value).split(" has ")[1].split()[0]) >= diagonal
