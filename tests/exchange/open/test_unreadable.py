"""Answers that cannot be read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from gramfuse_protocol.errors import FederationError
from gramfuse_protocol.messages.flower_records import to_record
from gramfuse_protocol.messages.wire import pack
from tests.exchange.open.lies import lying
from tests.exchange.open.runs import Honest, failure


def header(change: Callable[[str], Any]) -> Callable[[Any], Any]:
    """A reply whose header is changed as text, or is not text at all."""

    def apply(reply: Any) -> RecordDict:
        record = to_record(pack(reply))
        record["header"] = ConfigRecord({"json": change(str(record.config_records["header"]["json"]))})
        return record

    return apply


def document(change: Callable[[dict[str, Any]], Any]) -> Callable[[Any], Any]:
    """A reply whose header is changed as a JSON document."""

    def edited(text: str) -> str:
        value = json.loads(text)
        change(value)
        return json.dumps(value)

    return header(edited)


def without(record_name: str) -> Callable[[Any], Any]:
    def apply(reply: Any) -> RecordDict:
        record = to_record(pack(reply))
        del record[record_name]
        return record

    return apply


def arrays(change: Callable[[list[Array]], list[Array]]) -> Callable[[Any], Any]:
    """A reply whose buffers are changed."""

    def apply(reply: Any) -> RecordDict:
        record = to_record(pack(reply))
        buffers = change(list(record.array_records["arrays"].values()))
        record["arrays"] = ArrayRecord({f"{n:06}": array for n, array in enumerate(buffers)})
        return record

    return apply


def raw(dtype: str, shape: str, data: bytes) -> Array:
    """An array as NumPy stores it, with a header that need not be true."""
    description = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}".encode().ljust(117) + b"\n"
    return Array("uint8", (3,), "numpy.ndarray", b"\x93NUMPY\x01\x00v\x00" + description + data)


UNREADABLE: dict[str, Callable[[Any], Any]] = {
    "a header that is not JSON": header(lambda _: "not JSON"),
    "an empty header": header(lambda _: ""),
    "a header that is a list": header(lambda _: "[]"),
    "a header of another type": header(lambda _: 7),
    "a header that is nested too deeply": header(lambda _: "[" * 100_000),
    "no header": without("header"),
    "no arrays": without("arrays"),
    "an empty record": lambda _: RecordDict(),
    "an unknown phase": document(lambda d: d.update(phase="conquer")),
    "a request": document(lambda d: d.update(phase="upload", body={**d["body"], "piece_bytes": 3})),
    "another version of the protocol": document(lambda d: d["body"].update(protocol=2)),
    "a field too many": document(lambda d: d["body"].update(more=1)),
    "a field too few": document(lambda d: d["body"].pop("session")),
    "a name that is a path": document(lambda d: d["body"].update(silo="../../etc")),
    "an array that is longer than what came": document(lambda d: d["arrays"].append(["more", "float32", [10**6]])),
    "an array with an absurd shape": document(lambda d: d["arrays"].append(["more", "float32", [0, 2**80]])),
    "an array of a negative size": document(lambda d: d["arrays"].append(["more", "float32", [-1]])),
    "an array of objects": document(lambda d: d["arrays"].append(["more", "object", [0]])),
    "more bytes than arrays": arrays(lambda buffers: [*buffers, Array(np.zeros(3, np.uint8))]),
    "bytes that are not an array": arrays(lambda _: [Array("uint8", (3,), "numpy.ndarray", b"no")]),
    "a pickle": arrays(lambda _: [raw("|O", "(1,)", b"\x80\x04N.")]),
    "a damaged archive": arrays(lambda _: [Array("uint8", (3,), "numpy.ndarray", b"PK\x03\x04 no archive")]),
    "an array that says it is huge": arrays(lambda _: [raw("|u1", f"({2**46},)", b"abc")]),
    "an array that ends too early": arrays(lambda _: [raw("|u1", "(100,)", b"abc")]),
    "buffers of floating-point numbers": arrays(lambda b: [Array(buffer.numpy().astype(np.float32)) for buffer in b]),
    "buffers of wide integers": arrays(lambda b: [Array(buffer.numpy().astype(np.int64)) for buffer in b]),
    "buffers of two dimensions": arrays(lambda b: [Array(buffer.numpy().reshape(-1, 2)) for buffer in b]),
    "a buffer without dimensions": arrays(lambda _: [Array(np.array(7, np.uint8))]),
}


@pytest.mark.timeout(10)
@pytest.mark.parametrize("lie", UNREADABLE)
def test_what_cannot_be_read_names_the_silo(honest: Honest, in_process_grid: Any, place: Path, lie: str) -> None:
    grid = in_process_grid(honest.scripted(), fault=lying("upload", UNREADABLE[lie]))
    assert "silo 'silo-b'" in failure(FederationError, grid, honest, place)


def test_what_cannot_be_read_at_join_names_the_node(honest: Honest, in_process_grid: Any, place: Path) -> None:
    grid = in_process_grid(honest.scripted(), fault=lying("join", header(lambda _: "not JSON")))
    assert f"node {grid.number('silo-b')}" in failure(FederationError, grid, honest, place)
