"""What is checked of a contribution: every complaint names who sent it and the tensor."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from gramfuse_protocol.contract.form import Slice
from gramfuse_protocol.contract.layout import Group, Layout, Linear, Tensor
from gramfuse_protocol.errors import ContributionError
from gramfuse_protocol.statistics.contribution import check_counts, check_slices

Arrays = dict[str, NDArray]
GRAM, WEIGHT, BIAS = "gram:dense", "delta:dense.weight", "delta:dense.bias"


@pytest.fixture
def layout() -> Layout:
    return Layout(
        groups=(
            Group(
                name="dense",
                d_in=3,
                structure="full",
                weights=(Linear(weight="dense.weight", d_out=2, transposed=True),),
            ),
        ),
        tensors=(
            Tensor(name="dense.weight", shape=(2, 3), merge="regmean"),
            Tensor(name="dense.bias", shape=(2,), merge="mean"),
        ),
        frozen=(),
    )


def _good(layout: Layout) -> tuple[tuple[Slice, ...], Arrays]:
    slices = tuple(Slice(block, 0, block.entries) for block in layout.blocks)
    return slices, {block.name: np.ones(block.shape, np.float32) for block in layout.blocks}


def _put(name: str, place: tuple[int, ...], value: float) -> Callable[[Arrays], None]:
    def change(arrays: Arrays) -> None:
        arrays[name] = arrays[name].copy()
        arrays[name][place] = value

    return change


def _replace(name: str, array: NDArray | None) -> Callable[[Arrays], None]:
    def change(arrays: Arrays) -> None:
        del arrays[name]
        if array is not None:
            arrays[name] = array

    return change


def test_a_contribution_that_fits_passes(layout: Layout) -> None:
    slices, arrays = _good(layout)
    check_slices(slices, arrays, "silo 'a'")
    check_slices(iter(slices), arrays, "silo 'a'")
    arrays[WEIGHT] = np.array([[-0.0, 1e-45, -3.4e38], [0, 0, 0]], np.float32)
    check_slices(slices, arrays, "silo 'a'")


@pytest.mark.parametrize(
    ("change", "tensor", "says"),
    [
        (_replace(BIAS, None), BIAS, "missing"),
        (_replace(GRAM, None), GRAM, "missing"),
        (lambda arrays: arrays.update({"delta:secret": np.ones(1, np.float32)}), "delta:secret", "not in the layout"),
        (lambda arrays: arrays.update({f"{GRAM}[0:6]": arrays[GRAM]}), f"{GRAM}[0:6]", "not in the layout"),
        (_replace(WEIGHT, np.ones((3, 2), np.float32)), WEIGHT, r"float32 \(3, 2\).*expects float32 \(2, 3\)"),
        (_replace(WEIGHT, np.ones(6, np.float32)), WEIGHT, r"float32 \(6,\).*expects float32 \(2, 3\)"),
        (_replace(GRAM, np.ones((3, 3), np.float32)), GRAM, r"float32 \(3, 3\).*expects float32 \(6,\)"),
        (_replace(BIAS, np.ones((), np.float32)), BIAS, r"float32 \(\).*expects float32 \(2,\)"),
        (_replace(BIAS, np.ones(0, np.float32)), BIAS, r"float32 \(0,\).*expects float32 \(2,\)"),
        (_replace(BIAS, np.ones(2, np.float64)), BIAS, r"float64 \(2,\).*expects float32 \(2,\)"),
        (_replace(BIAS, np.ones(2, np.float16)), BIAS, r"float16 \(2,\).*expects float32 \(2,\)"),
        (_replace(BIAS, np.ones(2, np.int32)), BIAS, r"int32 \(2,\).*expects float32 \(2,\)"),
        (_put(WEIGHT, (1, 2), np.nan), WEIGHT, "1 NaN .*out of 6"),
        (_put(WEIGHT, (0, 0), np.inf), WEIGHT, "1 NaN .*out of 6"),
        (_put(GRAM, (5,), -np.inf), GRAM, "1 NaN .*out of 6"),
        (_put(BIAS, (), np.nan), BIAS, "2 NaN .*out of 2"),
    ],
)
def test_a_contribution_that_does_not_fit_is_refused_with_source_and_tensor(
    layout: Layout, change: Callable[[Arrays], None], tensor: str, says: str
) -> None:
    slices, arrays = _good(layout)
    change(arrays)
    with pytest.raises(ContributionError, match=says) as caught:
        check_slices(slices, arrays, "silo 'harbour'")
    assert re.match(rf"silo 'harbour': tensor {re.escape(repr(tensor))} ", str(caught.value))


def test_slices_of_a_piece_are_flat_and_checked_as_such(layout: Layout) -> None:
    pieces = layout.pieces(4 * 4)
    whole = np.arange(14, dtype=np.float32)
    start = 0
    for piece in pieces:
        arrays = {}
        for part in piece:
            size = part.stop - part.start
            shape = part.block.shape if part.name == part.block.name else (size,)
            arrays[part.name] = whole[start : start + size].reshape(shape)
            start += size
        check_slices(piece, arrays, "silo 'a'")
    first = pieces[0]
    assert [part.name for part in first] == ["gram:dense[0:4]"]
    with pytest.raises(ContributionError, match=r"silo 'a': tensor 'gram:dense\[0:4\]' is float32 \(5,\)"):
        check_slices(first, {"gram:dense[0:4]": np.ones(5, np.float32)}, "silo 'a'")
    with pytest.raises(ContributionError, match=r"silo 'a': tensor 'gram:dense\[0:4\]' has 1 NaN"):
        check_slices(first, {"gram:dense[0:4]": np.array([1, 2, 3, np.nan], np.float32)}, "silo 'a'")
    with pytest.raises(ContributionError, match=r"silo 'a': tensor 'gram:dense\[4:6\]'"):
        check_slices(first, {"gram:dense[4:6]": np.ones(2, np.float32)}, "silo 'a'")


def test_counts_that_fit_pass(layout: Layout) -> None:
    check_counts(layout, 1, {"dense": 0}, "silo 'a'")


@pytest.mark.parametrize(
    ("examples", "tokens", "says"),
    [
        (0, {"dense": 1}, "0 training examples"),
        (2.5, {"dense": 1}, "reports 2.5 training examples"),
        (-5, {"dense": 1}, "reports -5 training examples"),
        (1, {}, "group 'dense'"),
        (1, {"dense": 1, "other": 1}, "group 'other'"),
        (1, {"other": 1}, "group 'dense'"),
        (1, {"dense": -1}, "group 'dense' reports -1 tokens"),
    ],
)
def test_counts_that_do_not_fit_are_refused_with_source_and_group(
    layout: Layout, examples: int, tokens: dict[str, int], says: str
) -> None:
    with pytest.raises(ContributionError, match=f"^silo 'harbour': .*{re.escape(says)}"):
        check_counts(layout, examples, tokens, "silo 'harbour'")
