"""What a hostile silo sends instead of what it would have."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from gramfuse_protocol.messages.flower_records import from_record, to_record
from gramfuse_protocol.messages.phases import REPLIES, EvaluateReply, MaskedReply, Refusal
from gramfuse_protocol.messages.wire import Frame, pack, unpack
from gramfuse_protocol.secure_sum.keys import FIELD
from gramfuse_protocol.secure_sum.statements import advert_statement
from tests.adversarial.hostile_silo.runs import A, D, Lie, Run


def headed(change: Callable[[str], Any]) -> Lie:
    """Change the header's text, or put something else in its place."""

    def lie(_: Run, reply: RecordDict) -> RecordDict:
        header = change(from_record(reply).header)
        return RecordDict({"header": ConfigRecord({"json": header}), "arrays": reply.array_records["arrays"]})

    return lie


def documented(change: Callable[[dict[str, Any]], None]) -> Lie:
    """Change the header as a document, and write it as it must be written."""

    def changed(text: str) -> str:
        document = json.loads(text)
        change(document)
        return json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False)

    return headed(changed)


def arrayed(change: Callable[[Array], Array]) -> Lie:
    """Change the record of the first buffer."""

    def lie(_: Run, reply: RecordDict) -> RecordDict:
        arrays = dict(reply.array_records["arrays"])
        first = next(iter(arrays))
        arrays[first] = change(arrays[first])
        return RecordDict({"header": reply.config_records["header"], "arrays": ArrayRecord(arrays)})

    return lie


def npy(header: bytes, data: bytes = b"", version: int = 1) -> Lie:
    """A .npy file with this header."""
    size = len(header).to_bytes(2 if version == 1 else 4, "little")
    return arrayed(
        lambda array: Array("uint8", (1,), "numpy.ndarray", b"\x93NUMPY" + bytes([version, 0]) + size + header + data)
    )


def answered(change: Callable[[Any], Any]) -> Lie:
    """Answer honestly packed, but with another reply."""
    return lambda _, reply: to_record(pack(change(unpack(from_record(reply), REPLIES))))


def advertised(change: Callable[[dict[str, Any]], None]) -> Lie:
    """Other public keys, signed as the roster asks."""

    def lie(run: Run, content: RecordDict) -> RecordDict:
        reply = unpack(from_record(content), REPLIES)
        document = reply.advert.model_dump(mode="json")
        change(document)
        advert = type(reply.advert).model_validate(document)
        statement = advert_statement(run.federation.plan.digest, reply.session, advert.fields)
        signature = run.federation.identity(D).sign(statement).hex()
        return to_record(pack(reply.model_copy(update={"advert": advert.model_copy(update={"signature": signature})})))

    return lie


class Loads:
    """Unpickled, it leaves a file."""

    def __reduce__(self) -> Any:
        return (Path.write_text, (Path("pickle-was-loaded"), "by the coordinator"))


def _twice(document: dict[str, Any]) -> None:
    document["masks"]["metrics"] = document["masks"]["statistics"]


def _twice_by_the_top_bit(document: dict[str, Any]) -> None:
    key = bytearray.fromhex(document["masks"]["statistics"])
    key[31] |= 0x80
    document["masks"]["metrics"] = key.hex()


def _low_order(document: dict[str, Any]) -> None:
    document["masks"]["statistics"] = (1).to_bytes(32, "little").hex()


def _beyond_the_field(document: dict[str, Any]) -> None:
    document["channel"] = (FIELD + 9).to_bytes(32, "little").hex()


def _with_array(reply: Any, name: str = "delta:x") -> RecordDict:
    frame = pack(
        MaskedReply(**reply.about, silo=D, sum_of="statistics", piece=0, arrays={"masked": np.zeros(2, "<u8")})
    )
    document = json.loads(pack(reply).header)
    document["arrays"] = [[name, "uint64", [2]]]
    header = json.dumps(document, sort_keys=True, separators=(",", ":"))
    return to_record(Frame(header, frame.buffers))


LIES: dict[str, tuple[str, Lie]] = {
    # It hopes for an exception that nobody catches.
    "garbage for its name": ("join", headed(lambda _: "\x00\x01" * 40)),
    "a header that is bytes": ("shares", headed(str.encode)),
    "a .npy header that is no Python": ("masked", npy(b"{'descr': '|u1', (\n")),
    # It hopes that what it sends is run.
    "a pickle": ("masked", arrayed(lambda a: Array("object", (1,), "pickle", pickle.dumps(Loads())))),
    # It hopes that what should not be there is read.
    "an array in a phase that has none": ("survivors", lambda _, r: _with_array(unpack(from_record(r), REPLIES))),
    "metrics in the clear": (
        "evaluate",
        answered(lambda r: EvaluateReply(**r.about, silo=D, candidate=r.candidate, arrays={"sums": np.ones((3, 3))})),
    ),
    # It hopes to be taken for another silo.
    "another silo's name": ("join", answered(lambda reply: reply.model_copy(update={"silo": A}))),
    # It hopes that the honest silos take its keys for an attack of the coordinator, and end the session.
    "one public key twice, but for the bit that X25519 ignores": ("keys", advertised(_twice_by_the_top_bit)),
}

BEFORE_THE_SUM = ("join", "train", "keys", "shares", "masked")
ABOUT = {"plan": "0" * 64, "session": "f" * 32, "silo": D}
MASKED = MaskedReply(**ABOUT, sum_of="statistics", piece=0, arrays={"masked": np.arange(40, dtype="<u8")})

MORE_LIES: dict[str, Lie] = {
    "no records at all": lambda _, reply: RecordDict(),
    "a record too many": lambda _, reply: RecordDict({**reply, "more": MetricRecord({"a": 1})}),
    "a header that is a number": headed(lambda _: 1.5),
    "a header that is a list": headed(lambda text: [text, text]),
    "a header with a lone surrogate": headed(lambda text: text.replace(D, "\\ud800")),
    "a .npy header of 3.4 MB": npy(b"{'descr': '|u1', (" * 200_000, version=2),
    "a million brackets": headed(lambda _: "[" * 1_000_000),
    "a header of five megabytes": headed(lambda text: text + " " * 5 * 2**20),
    "a million keys": headed(lambda _: "{" + ",".join(f'"{n}":9' for n in range(300_000)) + "}"),
    "a number of 5,000 digits": headed(lambda text: text.replace('"piece":0', '"piece":' + "9" * 5000)),
    "a piece of 300 digits": headed(lambda text: text.replace('"piece":0', '"piece":' + "9" * 300)),
    "a number that is none": headed(lambda text: text.replace('"protocol":1', '"protocol":NaN')),
    "one key twice": headed(lambda text: text.replace('"protocol":1', '"protocol":1,"protocol":1')),
    "a shape of 2^320 elements": documented(lambda d: d.update(arrays=[["masked", "uint64", [2**40] * 8]])),
    "a shape of 100,000 dimensions": documented(lambda d: d.update(arrays=[["masked", "uint64", [2] * 100_000]])),
    "a million arrays": documented(lambda d: d.update(arrays=[["masked", "uint64", [0]]] * 200_000)),
    "an array's name of a megabyte": documented(lambda d: d.update(arrays=[["m" * 2**20, "uint64", [40]]])),
    "an array of another phase": documented(lambda d: d.update(arrays=[["delta:w", "float32", [80]]])),
    "a buffer that is no .npy file": arrayed(lambda a: Array("uint8", (3,), "numpy.ndarray", b"abc")),
    "a .npy file of objects": npy(
        b"{'descr': '|O', 'fortran_order': False, 'shape': (1,), }\n", pickle.dumps([Loads()])
    ),
    "a terabyte that did not come": arrayed(lambda a: Array("uint8", (2**40,), "numpy.ndarray", a.data)),
    "a shape that is no number": arrayed(lambda a: Array("uint8", (True,), "numpy.ndarray", a.data[:129])),
    "a refusal with an array": lambda _, reply: _with_array(
        Refusal(**ABOUT, error="RefusalError", exit_code=13, reason="no"), "masked"
    ),
}

KEYS: dict[str, Callable[[dict[str, Any]], None]] = {
    "of low order": _low_order,
    "of low order, for the shares": lambda document: document.update(channel="00" * 32),
    "written in a second way": _beyond_the_field,
    "twice": _twice,
    "twice, but for the bit that X25519 ignores": _twice_by_the_top_bit,
}
