"""The layout: cutting a contribution into pieces, and the JSON that both sides agree on."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gramfuse_protocol.contract.coverage import coverage
from gramfuse_protocol.contract.layout import Group, Layout, Linear, SharedOutputs, Tensor
from gramfuse_protocol.errors import ContributionError, PlanError


def _layout() -> Layout:
    return Layout(
        groups=(
            Group(
                name="q",
                d_in=6,
                structure="block:4",
                weights=(
                    Linear(weight="q.weight", d_out=3, transposed=True),
                    Linear(weight="k.weight", d_out=2, transposed=True),
                ),
                rows=("target", "all"),
                exponents=(-3, 0, 40, -40, 2, 1),
            ),
            Group(name="ü", d_in=5, structure="full", weights=(Linear(weight="c.weight", d_out=1, transposed=False),)),
        ),
        tensors=(
            Tensor(name="q.weight", shape=(3, 6), merge="regmean", context_free=True),
            Tensor(name="k.weight", shape=(2, 6), merge="regmean", context_free=True),
            Tensor(name="scale", shape=(), merge="mean"),
            Tensor(name="c.weight", shape=(5, 1), merge="regmean"),
            Tensor(name="batches", shape=(), merge="sum", buffer=True),
        ),
        frozen=("embeddings.weight",),
    )


BLOCKS = [
    ("gram:q", (13,)),
    ("gram:ü", (15,)),
    ("delta:q.weight", (3, 6)),
    ("delta:k.weight", (2, 6)),
    ("delta:scale", ()),
    ("delta:c.weight", (5, 1)),
    ("delta:batches", ()),
]
"""By hand: 4·5/2 + 2·3/2 entries in blocks of 4 and 2, 5·6/2 in full."""

SIZES = {"gram:q": 13, "gram:ü": 15, "delta:q.weight": 18, "delta:k.weight": 12, "delta:scale": 1, "delta:c.weight": 5}
SIZES["delta:batches"] = 1

DOCUMENT = (
    '{"frozen":["embeddings.weight"],'
    '"groups":[{"d_in":6,"experts":null,"exponents":[-3,0,40,-40,2,1],"name":"q","part":null,"rows":["target","all"],'
    '"structure":"block:4","weights":['
    '{"d_out":3,"transposed":true,"weight":"q.weight"},{"d_out":2,"transposed":true,"weight":"k.weight"}]},'
    '{"d_in":5,"experts":null,"exponents":[],"name":"ü","part":null,"rows":["input"],'
    '"structure":"full","weights":[{"d_out":1,"transposed":false,"weight":"c.weight"}]}],"head":null,"parts":[],'
    '"tensors":[{"buffer":false,"context_free":true,"merge":"regmean","name":"q.weight","parted":false,"shape":[3,6],"unmatched":false},'
    '{"buffer":false,"context_free":true,"merge":"regmean","name":"k.weight","parted":false,"shape":[2,6],"unmatched":false},'
    '{"buffer":false,"context_free":false,"merge":"mean","name":"scale","parted":false,"shape":[],"unmatched":false},'
    '{"buffer":false,"context_free":false,"merge":"regmean","name":"c.weight","parted":false,"shape":[5,1],"unmatched":false},'
    '{"buffer":true,"context_free":false,"merge":"sum","name":"batches","parted":false,"shape":[],"unmatched":false}],"version":1}'
)


def test_the_blocks_are_the_gram_matrices_then_the_differences() -> None:
    layout = _layout()
    assert [tuple(block) for block in layout.blocks] == BLOCKS
    assert {block.name: block.entries for block in layout.blocks} == SIZES
    assert [piece.name for piece in layout.deltas] == [name for name, _ in BLOCKS[2:]]
    assert layout.contribution_bytes == 4 * 65


def test_frozen_parameters_are_in_no_block() -> None:
    layout = _layout()
    assert not {block.name for block in layout.blocks} & {f"delta:{name}" for name in layout.frozen}


@given(limit=st.integers(4, 300))
def test_pieces_cover_every_element_once_in_order_and_respect_the_limit(limit: int) -> None:
    layout = _layout()
    pieces = layout.pieces(limit)
    expected = [(name, element) for name, size in SIZES.items() for element in range(size)]
    assert [(s.block.name, e) for piece in pieces for s in piece for e in range(s.start, s.stop)] == expected
    sizes = [4 * sum(s.stop - s.start for s in piece) for piece in pieces]
    assert max(sizes) <= limit
    assert all(size == 4 * (limit // 4) for size in sizes[:-1]), "every piece but the last is full"
    assert min(sizes) > 0
    names = [s.name for piece in pieces for s in piece]
    assert len(set(names)) == len(names)


def test_a_block_larger_than_the_limit_spans_pieces_and_its_slices_say_where() -> None:
    pieces = _layout().pieces(10 * 4)
    assert [[s.name for s in piece] for piece in pieces] == [
        ["gram:q[0:10]"],
        ["gram:q[10:13]", "gram:ü[0:7]"],
        ["gram:ü[7:15]", "delta:q.weight[0:2]"],
        ["delta:q.weight[2:12]"],
        ["delta:q.weight[12:18]", "delta:k.weight[0:4]"],
        ["delta:k.weight[4:12]", "delta:scale", "delta:c.weight[0:1]"],
        ["delta:c.weight[1:5]", "delta:batches"],
    ]


def test_a_contribution_within_the_limit_is_one_piece_of_whole_blocks() -> None:
    (piece,) = _layout().pieces()
    assert [s.name for s in piece] == list(SIZES)
    assert _layout().pieces(4 * 65) == (piece,)
    assert len(_layout().pieces(4 * 65 - 1)) == 2


def test_a_layout_written_and_read_again_is_equal(tmp_path: Path) -> None:
    layout = _layout()
    assert layout.to_json() == DOCUMENT
    path = tmp_path / "layout.json"
    path.write_text(json.dumps(json.loads(DOCUMENT), indent=2, sort_keys=False) + "\n", encoding="utf-8")
    again = Layout.read(path)
    assert again == layout
    assert again.blocks == layout.blocks
    assert again.to_json() == DOCUMENT


def test_the_digest_is_of_the_canonical_text_and_changes_with_everything() -> None:
    assert _layout().digest == hashlib.sha256(DOCUMENT.encode("utf-8")).hexdigest()
    changes = [
        ('"q.weight"', '"r.weight"'),
        ('"d_in":6', '"d_in":7'),
        ('"block:4"', '"block:3"'),
        ("[-3,0,40", "[-2,0,40"),
        ('"exponents":[]', '"exponents":[0,0,0,0,0]'),
        ('"d_out":3', '"d_out":4'),
        ('"transposed":false', '"transposed":true'),
        ('"merge":"mean"', '"merge":"regmean"'),
        ('"context_free":false,"merge":"mean"', '"context_free":true,"merge":"mean"'),
        ('"shape":[3,6]', '"shape":[6,3]'),
        ('"frozen":["embeddings.weight"]', '"frozen":[]'),
        ('"rows":["input"]', '"rows":["all"]'),
        ('"parts":[]', '"parts":[{"outputs":[0],"silos":["a"]}]'),
    ]
    documents = [DOCUMENT.replace(old, new) for old, new in changes]
    assert DOCUMENT not in documents
    digests = {hashlib.sha256(document.encode()).hexdigest() for document in documents}
    assert len(digests) == len(changes)
    order = _layout().model_copy(update={"groups": tuple(reversed(_layout().groups))})
    assert order.digest != _layout().digest


def test_what_is_summed_over_silos_in_order() -> None:
    layout = _layout()
    assert [tuple(block) for block in layout.sums] == [
        ("count", (4,)),
        ("s:q", (13,)),
        ("s:ü", (15,)),
        ("t:q", (6, 5)),
        ("t:ü", (5, 1)),
        *((f"m:{name.removeprefix('delta:')}", shape) for name, shape in BLOCKS[2:]),
    ]
    assert layout.sum_entries == 4 + 28 + 30 + 5 + 37


@pytest.mark.parametrize(
    ("path", "value", "follows"),
    [
        ("groups.0.exponents", [-2, 1, 39, -39, 1, 0], True),
        ("groups.0.exponents.0", -1, False),
        ("groups.0.structure", "block:3", False),
        ("groups.0.name", "p", False),
        ("groups.1.exponents", [0] * 5, False),
        ("frozen", [], False),
    ],
)
def test_a_layout_derived_anew_may_differ_in_its_exponents_by_one(path: str, value: Any, follows: bool) -> None:
    other = Layout.parse(_with(path, value))
    assert _layout().follows(other) == other.follows(_layout()) == follows


def _parted() -> Layout:
    """A head of three labels, of which two silos annotate the first and the last, and all the one in the middle."""
    weights = [(Linear(weight="head.weight", d_out=outputs, transposed=True),) for outputs in (2, 1)]
    return Layout(
        groups=tuple(
            Group(name=f"head[{n}]", d_in=2, structure="full", weights=weight, rows=("all",), part=n)
            for n, weight in enumerate(weights)
        ),
        tensors=(
            Tensor(name="head.weight", shape=(3, 2), merge="regmean", parted=True),
            Tensor(name="head.bias", shape=(3,), merge="mean", parted=True),
        ),
        frozen=(),
        parts=(SharedOutputs(silos=("a", "b"), outputs=(0, 2)), SharedOutputs(silos=("a", "b", "c"), outputs=(1,))),
    )


def test_a_part_of_the_head_has_a_gram_matrix_a_right_side_and_a_weight_of_its_own() -> None:
    layout = _parted()
    assert [tuple(block) for block in layout.blocks] == [
        ("gram:head[0]", (3,)),
        ("gram:head[1]", (3,)),
        ("delta:head.weight", (3, 2)),
        ("delta:head.bias", (3,)),
    ]
    assert [tuple(block) for block in layout.sums] == [
        ("count", (6,)),
        ("s:head[0]", (3,)),
        ("s:head[1]", (3,)),
        ("t:head[0]", (2, 2)),
        ("t:head[1]", (2, 1)),
        ("m:head.weight", (3, 2)),
        ("m:head.bias", (3,)),
    ]
    assert layout.held("b") == (True, True)
    assert layout.held("c") == (False, True)
    assert layout.by_output((5, 7)).tolist() == [5, 7, 5]
    assert Layout.parse(layout.to_json()) == layout
    with pytest.raises(ContributionError, match="silo's name"):
        layout.held(None)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"outputs":[0,2]', '"outputs":[0,1]'),
        ('"outputs":[0,2]', '"outputs":[0]'),
        ('"part":1', '"part":0'),
        ('"part":1', '"part":2'),
        ('"part":1', '"part":null'),
        ('"name":"head.weight","parted":true', '"name":"head.weight","parted":false'),
        ('"name":"head.bias","parted":true,"shape":[3]', '"name":"head.bias","parted":true,"shape":[2]'),
        ('"d_out":2', '"d_out":1'),
    ],
)
def test_parts_that_do_not_fit_the_head_are_refused(old: str, new: str) -> None:
    text = _parted().to_json()
    assert text.count(old) == 1
    with pytest.raises(PlanError, match=r"^node 7: not a layout: "):
        Layout.parse(text.replace(old, new), "node 7")


def _with(path: str, value: Any) -> str:
    document = json.loads(DOCUMENT)
    *keys, last = (int(key) if key.isdigit() else key for key in path.split("."))
    place = document
    for key in keys:
        place = place[key]
    place[last] = value
    return json.dumps(document)


def _of_experts(shape: tuple[int, ...] = (3, 4, 5), **changes: Any) -> Layout:
    """Three experts of four outputs and five inputs that are one tensor."""
    weights = (Linear(weight="up", d_out=4, transposed=True),)
    group = {"name": "up", "d_in": 5, "structure": "block:2", "weights": weights, "experts": 3} | changes
    return Layout(groups=(Group(**group),), tensors=(Tensor(name="up", shape=shape, merge="regmean"),), frozen=())


def test_experts_have_a_gram_matrix_each_and_products_one_below_the_other() -> None:
    layout = _of_experts()
    sizes = {"gram:up": (3 * (3 + 3 + 1),), "delta:up": (3, 4, 5)}
    assert {block.name: block.shape for block in layout.blocks} == sizes
    assert {block.name: block.shape for block in layout.sums}["t:up"] == (15, 4)
    assert coverage(layout).closed == 1
    assert Layout.parse(layout.to_json()) == layout


@pytest.mark.parametrize(
    "changes",
    [
        {"shape": (2, 4, 5)},
        {"shape": (4, 5)},
        {"shape": (3, 5, 4)},
        {"experts": None},
        {"experts": 2},
        {"experts": 2**12 + 1},
        {"experts": 0},
        {"d_in": 15},
        {"part": 0},
        {"exponents": (0,) * 15},
        {"weights": (Linear(weight="up", d_out=4, transposed=False),), "shape": (3, 5, 4)},
        {"weights": (Linear(weight="up", d_out=2, transposed=True),) * 2},
    ],
)
def test_experts_that_do_not_fit_their_tensor_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError):  # noqa: PT011  # whichever of both finds it
        _of_experts(**changes)


def test_a_group_whose_weights_do_not_see_the_same_is_refused() -> None:
    with pytest.raises(PlanError, match=r"group 'q' .*context-free"):
        Layout.parse(_with("tensors.1.context_free", value=False))


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "{}", "\x00", DOCUMENT[:-1], DOCUMENT + "x"], ids=repr)
def test_text_that_is_no_layout_is_refused_with_its_source(text: str) -> None:
    with pytest.raises(PlanError, match=r"^node 7: not a layout: "):
        Layout.parse(text, "node 7")


@pytest.mark.parametrize(
    ("path", "value", "key"),
    [
        ("version", 2, "version"),
        ("extra", 1, "extra"),
        ("groups.0.d_in", 0, "d_in"),
        ("groups.0.d_in", "6", "d_in"),
        ("groups.0.d_in", 2**53, "d_in"),
        ("groups.0.weights", [], "weights"),
        ("groups.0.structure", "block:0", "structure"),
        ("groups.1.structure", "half", "structure"),
        ("groups.0.exponents", [0, 0, 0, 0, 0], "exponents"),
        ("groups.0.exponents.2", 41, "exponents"),
        ("groups.0.exponents.2", 0.5, "exponents"),
        ("groups.1.name", "q", "name"),
        ("tensors", [], "tensors"),
        ("tensors.0.shape", [3, -6], "shape"),
        ("tensors.0.shape", [3, 0], "shape"),
        ("tensors.0.merge", "fisher", "merge"),
        ("tensors.1.name", "q.weight", "name"),
    ],
)
def test_a_layout_that_does_not_hold_together_is_refused_with_source_and_key(path: str, value: Any, key: str) -> None:
    with pytest.raises(PlanError, match=rf"^node 7: not a layout: .*{key}"):
        Layout.parse(_with(path, value), "node 7")


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("groups.0.weights.0.weight", "nowhere.weight"),
        ("groups.0.weights.0.d_out", 4),
        ("groups.0.weights.1.weight", "q.weight"),
        ("tensors.0.shape", [6, 3]),
        ("tensors.0.merge", "mean"),
        ("tensors.2.merge", "regmean"),
        ("tensors.2.merge", "sum"),
        ("tensors.4.shape", [1]),
        ("tensors.4.merge", "regmean"),
        ("tensors.4.context_free", True),
    ],
)
def test_a_layout_whose_groups_do_not_fit_its_tensors_is_refused(path: str, value: Any) -> None:
    with pytest.raises(PlanError, match=r"^node 7: not a layout: "):
        Layout.parse(_with(path, value), "node 7")


def test_a_layout_file_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"layout.json: no such file"):
        Layout.read(tmp_path / "layout.json")
