"""Frames: what is packed comes out again, however buffers fall; what `pack` would not have made is refused."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

import gramfuse_protocol.messages.wire as wire
from gramfuse_protocol.errors import FederationError
from gramfuse_protocol.messages.phases import REPLIES, REQUESTS, StatisticsBody, UploadReply, UploadRequest
from gramfuse_protocol.messages.wire import Frame, pack, unpack
from gramfuse_protocol.text import printable

BUFFER = 24
PRINTABLE = st.characters(
    exclude_categories=["Cs", "Cc", "Cf", "Co", "Cn", "Zl", "Zp", "Zs", "Mn", "Me"], include_characters=" "
).filter(printable)
DTYPES = {"<f4": "f", "<f8": "d", "<u8": "u"}
ABOUT = {"plan": "0" * 63 + "a", "session": "f" * 32}


@pytest.fixture(autouse=True)
def _small_buffers() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(wire, "BUFFER_BYTES", BUFFER)
        yield


class Mixed(UploadReply):
    """A message that carries all that the format can: no message of the protocol has two dtypes."""

    carries: ClassVar[Mapping[str, str]] = {"f.*": "float32", "d.*": "float64", "u.*": "uint64"}


KNOWN = {**REPLIES, "upload": Mixed}


def _reply(arrays: dict[str, NDArray[Any]]) -> Mixed:
    return Mixed(**ABOUT, silo="a", piece=3, arrays=arrays)


def _bytes(frame: Frame) -> bytes:
    return b"".join(buffer.tobytes() for buffer in frame.buffers)


def _array(values: list[int], dtype: str, shape: tuple[int, ...]) -> NDArray[Any]:
    # Made from raw bits, so that NaN payloads, signed zeros and denormals must survive as they are.
    return np.array(values, np.uint64).astype(f"<u{np.dtype(dtype).itemsize}").view(dtype).reshape(shape)


@st.composite
def _arrays(draw: st.DrawFn) -> dict[str, NDArray[Any]]:
    arrays = {}
    for name in draw(st.lists(st.text(PRINTABLE, max_size=20), max_size=5, unique=True)):
        shape = tuple(draw(st.lists(st.integers(0, 4), max_size=3)))
        size = int(np.prod(shape, dtype=int))
        values = draw(st.lists(st.integers(0, 2**64 - 1), min_size=size, max_size=size))
        dtype = draw(st.sampled_from(["<f4", "<f8", "<u8"]))
        array = _array(values, dtype, shape)
        arrays[f"{DTYPES[dtype]}{name}"] = np.asfortranarray(array) if draw(st.booleans()) and array.ndim else array
    return arrays


@given(arrays=_arrays(), offset=st.integers(0, 9))
def test_arrays_come_out_as_they_went_in(arrays: dict[str, NDArray[Any]], offset: int) -> None:
    message = _reply(arrays)
    frame = pack(message)
    assert all(buffer.dtype == np.uint8 and buffer.ndim == 1 for buffer in frame.buffers)
    assert all(buffer.size == BUFFER for buffer in frame.buffers[:-1])
    assert all(0 < buffer.size <= BUFFER for buffer in frame.buffers)
    assert _bytes(frame) == b"".join(array.tobytes("C") for array in arrays.values())
    assert frame.nbytes == len(frame.header.encode()) + sum(array.nbytes for array in arrays.values())

    # A transport may hand over memory that begins anywhere.
    moved = tuple(np.concatenate([np.zeros(offset, np.uint8), buffer])[offset:] for buffer in frame.buffers)
    found = unpack(Frame(frame.header, moved), KNOWN)
    assert type(found) is Mixed
    assert found.model_dump() == message.model_dump()
    assert list(found.arrays) == list(arrays)
    for name, array in arrays.items():
        assert found.arrays[name].dtype == array.dtype
        assert found.arrays[name].shape == array.shape
        assert found.arrays[name].tobytes() == array.tobytes("C")
        assert found.arrays[name].flags.aligned
    assert pack(found).header == frame.header


def test_every_array_of_a_layout_may_begin_off_the_eight_byte_boundary() -> None:
    arrays = {"f": np.ones(1, np.float32), "d": np.arange(9.0), "f2": np.float32([[7]]), "d2": np.array(5.0)}
    found = unpack(pack(_reply(arrays)), KNOWN).arrays
    for name, array in arrays.items():
        np.testing.assert_array_equal(found[name], array)
        assert found[name].flags.aligned
    assert float(found["d"].sum()) == 36.0


@given(counts=st.dictionaries(st.text(PRINTABLE), st.integers(0, 2**53 - 1)))
def test_a_body_comes_out_as_it_went_in(counts: dict[str, int]) -> None:
    body = StatisticsBody(layout="{}", examples=1, tokens=counts, arrays={})
    assert unpack(pack(body), {"statistics": StatisticsBody}) == body


@pytest.mark.parametrize("array", [np.zeros(2, np.float16), np.zeros(2, np.int64), np.zeros(2, bool), np.array(["x"])])
def test_another_dtype_is_not_packed(array: NDArray[Any]) -> None:
    with pytest.raises((KeyError, ValueError)):
        pack(_reply({"a": array}))


def test_a_request_is_not_taken_for_a_reply() -> None:
    frame = pack(UploadRequest(**ABOUT, piece=0, piece_bytes=4))
    assert isinstance(unpack(frame, REQUESTS), UploadRequest)
    with pytest.raises(FederationError):
        unpack(frame, REPLIES)


# What a peer that means harm, or runs another version, may send


def _frame() -> tuple[dict[str, Any], tuple[NDArray[np.uint8], ...]]:
    """A good frame of 60 bytes in three buffers, its header as a document."""
    frame = pack(_reply({"f": np.arange(5, dtype=np.float32), "d": np.arange(5.0)}))
    return json.loads(frame.header), frame.buffers


def _refuse(header: Any, buffers: tuple[NDArray[Any], ...]) -> None:
    text = header if isinstance(header, str) else json.dumps(header, sort_keys=True, separators=(",", ":"))
    with pytest.raises(FederationError, match="cannot be read"):
        unpack(Frame(text, buffers), KNOWN)


def test_the_frame_that_is_tampered_with_below_is_a_good_one() -> None:
    header, buffers = _frame()
    text = json.dumps(header, sort_keys=True, separators=(",", ":"))
    assert [buffer.size for buffer in buffers] == [24, 24, 12]
    assert unpack(Frame(text, buffers), KNOWN).arrays["d"].tolist() == [0.0, 1.0, 2.0, 3.0, 4.0]


@pytest.mark.parametrize(
    "index",
    [
        [["f", "float32", [5]]],
        [["f", "float32", [5]], ["d", "float64", [4]]],
        [["f", "float32", [5]], ["d", "float64", [6]]],
        [["f", "float32", [5]], ["d", "float64", [2**62, 2**62]]],
        [["f", "float32", [5]], ["d", "float64", [5]], ["d2", "float64", [2**70, 0]]],
        [["f", "float32", [5]], ["d", "float64", [5]], ["f2", "float32", [1]]],
        [["f", "float32", [5]], ["f", "float64", [5]]],
        [["f", "float32", [-5]], ["d", "float64", [5]]],
        [["f", "float32", [-1, -5]], ["d", "float64", [5]]],
        [["f", "float32", [5.0]], ["d", "float64", [5]]],
        [["f", "float32", [True, 5]], ["d", "float64", [5]]],
        [["f", "float32", 5], ["d", "float64", [5]]],
        [["f", "float32", None], ["d", "float64", [5]]],
        [["f", "float32", [5]], ["d", "float64", [5]], ["f2", "float32", ["0"]]],
        [["f", "int32", [5]], ["d", "float64", [5]]],
        [["f", "<f4", [5]], ["d", "float64", [5]]],
        [["f", "object", [5]], ["d", "float64", [5]]],
        [["f", ["float32"], [5]], ["d", "float64", [5]]],
        [[5, "float32", [5]], ["d", "float64", [5]]],
        [[None, "float32", [5]], ["d", "float64", [5]]],
        [["f", "float32", [5], 0], ["d", "float64", [5]]],
        [["f", "float32"], ["d", "float64", [5]]],
        {"f": ["float32", [5]], "d": ["float64", [5]]},
        [],
        None,
        "fd",
    ],
    ids=str,
)
def test_an_index_that_does_not_fit_the_bytes_or_is_malformed_is_refused(index: Any) -> None:
    header, buffers = _frame()
    _refuse({**header, "arrays": index}, buffers)


@pytest.mark.parametrize("shape", ["", {}], ids=repr)
def test_a_shape_is_a_list(shape: Any) -> None:
    header, _ = _frame()
    _refuse({**header, "arrays": [["f", "float32", shape]]}, (np.zeros(4, np.uint8),))


_ZERO = np.zeros(1, np.uint8)
_BUFFERS: dict[str, Callable[[list[NDArray[Any]]], list[NDArray[Any]]]] = {
    "none": lambda b: [],
    "the last is missing": lambda b: b[:-1],
    "a middle one is missing": lambda b: [b[0], b[2]],
    "one too many": lambda b: [*b, _ZERO],
    "an empty one too many": lambda b: [*b, _ZERO[:0]],
    "a byte short": lambda b: [*b[:-1], b[-1][:-1]],
    "a byte long": lambda b: [*b[:-1], np.append(b[-1], _ZERO)],
    "cut elsewhere": lambda b: [b[0][:-1], np.append(b[0][-1:], b[1]), b[2]],
    "a short one first": lambda b: [b[2], b[0], b[1]],
    "all in one": lambda b: [np.concatenate(b)],
    "the last two in one": lambda b: [b[0], np.concatenate(b[1:])],
    "not flat": lambda b: [b[0], b[1], b[2].reshape(3, 4)],
    "not bytes": lambda b: [*b[:-1], np.zeros(12, np.int64)],
    "not bytes, right in total": lambda b: [b[0].view(np.float64), b[1], b[2]],
}


@pytest.mark.parametrize("change", _BUFFERS.values(), ids=_BUFFERS.keys())
def test_buffers_that_pack_would_not_make_are_refused(
    change: Callable[[list[NDArray[Any]]], list[NDArray[Any]]],
) -> None:
    header, buffers = _frame()
    _refuse(header, tuple(change(list(buffers))))


def test_an_array_may_not_begin_beyond_the_buffers_that_a_frame_of_this_size_has() -> None:
    header, buffers = _frame()
    index = [["f", "float32", [7]], ["d", "float32", [8]]]
    _refuse({**header, "arrays": index}, (np.concatenate(buffers),))


def test_a_buffer_of_two_dimensions_is_refused() -> None:
    header, _ = _frame()
    _refuse({**header, "arrays": [["f", "float32", [2]]]}, (np.zeros((2, 4), np.uint8),))


@pytest.mark.parametrize(
    "change",
    [
        {"phase": "mutiny"},
        {"phase": "statistics"},
        {"phase": "train"},
        {"phase": ["upload"]},
        {"phase": None},
        {"phase": ...},
        {"body": ...},
        {"arrays": ...},
        {"body": []},
        {"body": None},
        {"extra": 1},
        {"protocol": 1},
    ],
    ids=str,
)
def test_a_header_with_other_keys_or_another_phase_is_refused(change: dict[str, Any]) -> None:
    header, buffers = _frame()
    _refuse({key: value for key, value in {**header, **change}.items() if value is not ...}, buffers)


@pytest.mark.parametrize(
    "change",
    [
        {"protocol": 2},
        {"protocol": 0},
        {"protocol": "1"},
        {"protocol": 1.0},
        {"protocol": True},
        {"protocol": ...},
        {"plan": "0" * 63},
        {"plan": "0" * 64 + "\n"},
        {"session": "F" * 32},
        {"session": ...},
        {"silo": "../a"},
        {"silo": 1},
        {"piece": -1},
        {"piece": "3"},
        {"piece": 3.0},
        {"piece": 2**53},
        {"piece": 10**30},
        {"extra": 1},
        {"arrays": {}},
        {"arrays": {"x": [1.0]}},
    ],
    ids=str,
)
def test_a_body_of_another_protocol_version_or_with_other_fields_is_refused(change: dict[str, Any]) -> None:
    header, buffers = _frame()
    body = {key: value for key, value in {**header["body"], **change}.items() if value is not ...}
    _refuse({**header, "body": body}, buffers)


@pytest.mark.parametrize(
    "text",
    ["", "null", "[]", "3", '"upload"', "{", "\x00", "[" * 100_000, '{"arrays":' * 100_000, "1" * 10_000],
    ids=lambda text: repr(text[:12]),
)
def test_a_header_that_is_no_object_is_refused(text: str) -> None:
    _refuse(text, ())


def test_a_header_that_says_something_twice_is_refused() -> None:
    header, buffers = _frame()
    text = json.dumps(header, sort_keys=True, separators=(",", ":"))
    _refuse(text.replace('"piece":3', '"piece":9,"piece":3'), buffers)
    _refuse(text[:-1] + ',"phase":"upload"}', buffers)


@given(seed=st.randoms(use_true_random=False), data=st.data())
def test_a_header_with_any_part_replaced_is_refused_or_read_but_never_breaks(seed: Any, data: st.DataObject) -> None:
    header, buffers = _frame()
    junk = st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    )
    place: Any = header
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        key = seed.choice(keys)
        if not isinstance(place[key], list | dict) or not place[key] or seed.random() < 0.3:
            break
        place = place[key]
    place[key] = data.draw(junk)
    try:
        found = unpack(Frame(json.dumps(header), buffers), KNOWN)
    except FederationError:
        return
    assert sum(array.nbytes for array in found.arrays.values()) == 60


@pytest.mark.parametrize(("name", "value"), [("silo", "a patient's name"), ("secret", "a patient's name")])
def test_the_error_about_a_bad_message_has_a_reason_that_quotes_nothing(name: str, value: str) -> None:
    header, buffers = _frame()
    body = {**header["body"], name: value}
    with pytest.raises(FederationError) as caught:
        unpack(Frame(json.dumps({**header, "body": body}), buffers), KNOWN)
    assert value not in caught.value.reason
