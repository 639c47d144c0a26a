"""Packed Gram matrices, against a loop over the features that knows nothing of blocks."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from gramfuse_protocol.contract.gram_structure import Blocks, parse_structure

WIDTHS = st.integers(1, 40)
DTYPES = st.sampled_from([np.float32, np.float64])


def _gram(d: int, dtype: type) -> NDArray[np.floating]:
    """A symmetric (d, d) matrix of which every entry of the upper triangle is another number."""
    upper = np.triu(np.arange(1, d * d + 1, dtype=dtype).reshape(d, d))
    return upper + np.triu(upper, 1).T


def _kept(d: int, b: int) -> list[tuple[int, int]]:
    """The entries of a Gram matrix in packed order, by the definition: same block, upper triangle, row by row."""
    return [(row, column) for row in range(d) for column in range(row, d) if row // b == column // b]


def _cut(gram: NDArray[np.floating], blocks: Blocks) -> list[NDArray[np.floating]]:
    parts = []
    for first, count, width in blocks.parts:
        starts = range(first, first + count * width, width)
        parts.append(np.stack([gram[start : start + width, start : start + width] for start in starts]))
    return parts


@given(d=WIDTHS, b=st.integers(1, 50), dtype=DTYPES)
def test_packing_keeps_exactly_the_entries_of_the_definition_in_order(d: int, b: int, dtype: type) -> None:
    gram, blocks = _gram(d, dtype), Blocks.of(f"block:{b}", d)
    packed = blocks.pack(_cut(gram, blocks))
    assert packed.dtype == dtype
    assert packed.tolist() == [gram[entry] for entry in _kept(d, b)]
    assert blocks.entries == packed.size


@given(d=WIDTHS, b=st.integers(1, 50), dtype=DTYPES)
def test_unpacking_gives_back_the_symmetric_blocks(d: int, b: int, dtype: type) -> None:
    gram, blocks = _gram(d, dtype), Blocks.of(f"block:{b}", d)
    kept = np.zeros_like(gram)
    for row, column in _kept(d, b):
        kept[row, column] = kept[column, row] = gram[row, column]
    parts = list(blocks.unpack(np.array([gram[entry] for entry in _kept(d, b)], dtype)))
    rebuilt = np.zeros_like(gram)
    for (first, count, width), block in zip(blocks.parts, parts, strict=True):
        assert block.shape == (count, width, width)
        assert block.dtype == dtype
        for n in range(count):
            place = slice(first + n * width, first + (n + 1) * width)
            rebuilt[place, place] = block[n]
    np.testing.assert_array_equal(rebuilt, kept)
    np.testing.assert_array_equal(blocks.pack(parts), blocks.pack(_cut(gram, blocks)))


@given(d=WIDTHS, b=st.integers(1, 50))
def test_the_parts_cover_every_feature_once_in_order(d: int, b: int) -> None:
    blocks = Blocks.of(f"block:{b}", d)
    covered = [feature for first, count, width in blocks.parts for feature in range(first, first + count * width)]
    assert covered == list(range(d))
    assert 1 <= len(blocks.parts) <= 2
    assert all(count >= 1 for _, count, _ in blocks.parts)


@given(d=st.integers(1, 5000), b=st.integers(1, 6000))
def test_the_number_of_entries_is_the_formula(d: int, b: int) -> None:
    width = min(b, d)
    count, rest = d // width, d % width
    assert Blocks.of(f"block:{b}", d).entries == count * width * (width + 1) // 2 + rest * (rest + 1) // 2


@given(d=WIDTHS, wider=st.integers(0, 10))
def test_a_block_as_wide_as_the_features_is_full_and_blocks_of_one_are_the_diagonal(d: int, wider: int) -> None:
    assert Blocks.of(f"block:{d + wider}", d) == Blocks.of("full", d)
    assert Blocks.of("full", d).entries == d * (d + 1) // 2
    diagonal = Blocks.of("diagonal", d)
    assert diagonal == Blocks.of("block:1", d)
    gram = _gram(d, np.float64)
    np.testing.assert_array_equal(diagonal.pack(_cut(gram, diagonal)), gram.diagonal())


@given(d=WIDTHS, b=st.integers(1, 50))
def test_packing_reads_the_upper_triangle_only_and_does_not_alias(d: int, b: int) -> None:
    gram, blocks = _gram(d, np.float64), Blocks.of(f"block:{b}", d)
    parts = _cut(gram, blocks)
    expected = blocks.pack(parts)
    upper = [np.triu(part) for part in parts]
    packed = blocks.pack(upper)
    for part in upper:
        part[:] = -1.0
    np.testing.assert_array_equal(packed, expected)


@pytest.mark.parametrize(("text", "width"), [("full", None), ("diagonal", 1), ("block:1", 1), ("block:3072", 3072)])
def test_a_structure_is_read(text: str, width: int | None) -> None:
    assert parse_structure(text) == width


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Full",
        "full ",
        "full:3",
        "diagonal:1",
        "block",
        "block:",
        "block:0",
        "block:-1",
        "block:1.0",
        "block: 8",
        "block:8 ",
        "block:+8",
        "block:²",
        "block:٣",
        "block:1_0",
        "blocks:8",
        "block:8:8",
    ],
)
def test_another_structure_is_refused_and_quoted(text: str) -> None:
    with pytest.raises(ValueError, match="expected 'full', 'block:<width>' or 'diagonal'") as caught:
        parse_structure(text)
    assert repr(text) in str(caught.value)
