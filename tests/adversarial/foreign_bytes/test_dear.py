"""Cases that are as dear as their size allows."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gramfuse_client.guard.ledger import Ledger
from gramfuse_protocol.bounds import LAYOUT_CHARACTERS
from gramfuse_protocol.contract.layout import Layout
from gramfuse_protocol.contract.plan import Plan
from gramfuse_protocol.errors import GramfuseError
from gramfuse_protocol.messages import npy
from gramfuse_protocol.messages.wire import Frame, unpack
from gramfuse_protocol.statistics.file import read_statistics
from gramfuse_protocol.statistics.head_file import read_head
from tests.adversarial.foreign_bytes.documents import EVERY_REPLY, MEGABYTES, PLAN, SECONDS


def _header(document: str) -> Callable[[Path], Any]:
    return lambda place: unpack(Frame(document, ()), EVERY_REPLY)


def _body(phase: str, body: str, arrays: str = "[]") -> Callable[[Path], Any]:
    return _header(f'{{"arrays":{arrays},"body":{body},"phase":"{phase}"}}')


def _layout(**parts: str) -> Callable[[Path], Any]:
    keys = {"frozen": "[]", "groups": "[]", "parts": "[]", "tensors": "[]", "version": "1"} | parts
    return lambda place: Layout.parse("{" + ",".join(f'"{key}":{value}' for key, value in keys.items()) + "}")


def _plan(text: str) -> Callable[[Path], Any]:
    return lambda place: Plan.parse(text)


def _file(data: bytes, reader: Callable[[Path], Any] = read_statistics) -> Callable[[Path], Any]:
    def read(place: Path) -> Any:
        path = place / "big.safetensors"
        path.write_bytes(len(data).to_bytes(8, "little") + data)
        return reader(path)

    return read


def _head(features: int, labels: int) -> bytes:
    """The header of a head file, without its tensors."""
    task = {"task": "classification", "labels": [str(n) for n in range(labels)]}
    model = {"name": "a", "revision": None, "weights": {"a": "0" * 64}, "config": "0" * 64, "processor": "0" * 64}
    about = {"name": "a", "model": model, "task": task, "weight": "w", "bias": None, "features": features}
    text = json.dumps({**about, "least": 1, "examples": 9, "made-by": "0"})
    return json.dumps({"__metadata__": {"gramfuse-head": text, "sha256": "0" * 64}}).encode()


def _ledger(data: bytes) -> Callable[[Path], Any]:
    def read(place: Path) -> Any:
        path = place / "big.jsonl"
        path.write_bytes(data)
        return Ledger(path, "north").verify()

    return read


def _parted(tensors: int, parts: int) -> Callable[[Path], Any]:
    """A layout in which each of many tensors has each of many parts."""
    many = ",".join(f'{{"merge":"mean","name":"{n}","parted":true,"shape":[{parts},1]}}' for n in range(tensors))
    held = ",".join(f'{{"outputs":[{n}],"silos":["a"]}}' for n in range(parts))
    return _layout(tensors=f"[{many}]", parts=f"[{held}]")


MANY = LAYOUT_CHARACTERS // 2 - 1000
SILOS = "".join(f'[[silo]]\nname = "s{n}"\n' for n in range(20_000))
LABELS = ", ".join(f'"{n}"' for n in range(30_000))

DEAR: dict[str, Callable[[Path], Any]] = {
    "a header of brackets": _header("[" * 4_000_000),
    "a header of empty lists": _header("[" + "[]," * 1_000_000 + "[]]"),
    "a header of empty objects": _body("finish", '{"x":[' + "{}," * 100_000 + "{}]}"),
    "a header of keys": _header("{" + ",".join(f'"{n}":1' for n in range(500_000)) + "}"),
    "a body of unknown keys": _body("finish", "{" + ",".join(f'"{n}":1' for n in range(130_000)) + "}"),
    "a mapping of wrong values": _body("shares", '{"sealed":{' + ",".join(f'"{n}":9' for n in range(130_000)) + "}}"),
    "a mapping of as many wrong values as there may be": _body(
        "shares",
        '{"plan":"","session":"","silo":"","sealed":{' + ",".join(f'"{n}":9' for n in range(16_000)) + "}}",
    ),
    "a list of wrong values": _body("upload", "[" + "9," * 130_000 + "9]"),
    "one long number": _body("upload", "9" * 4_000_000),
    "an index of arrays": _body("upload", "{}", "[" + '["gram:a","float32",[0]],' * 40_000 + '["a","float32",[0]]]'),
    "one array of many dimensions": _body("upload", "{}", '[["gram:a","float32",[' + "2," * 100_000 + "2]]]"),
    "a layout in which all groups are wrong": _layout(groups="[" + "1," * MANY + "1]"),
    "a layout of wrong exponents": _layout(
        groups='[{"name":"a","d_in":9,"structure":"full","weights":[],"exponents":[' + "99," * (MANY // 2) + "99]}]"
    ),
    "a layout of right exponents": _layout(
        groups='[{"name":"a","d_in":9,"structure":"full","weights":[{"weight":"w","d_out":1,"transposed":true}],'
        '"exponents":[' + "9," * MANY + "9]}]"
    ),
    "a layout of empty lists": _layout(groups="[" + "[]," * 1_000_000 + "[]]"),
    "a layout of many tensors and parts": _parted(1024, 1024),
    "a layout of as many as there may be": _parted(128, 1024),
    "a layout of a shape that is endless": _layout(
        tensors='[{"name":"a","shape":[' + "9007199254740991," * 300_000 + '1],"merge":"mean"}]'
    ),
    "a layout of 2^424 elements": _layout(
        tensors='[{"name":"a","shape":[' + ",".join(["9007199254740991"] * 8) + '],"merge":"mean"}]'
    ),
    "a layout with a Gram matrix of 2^106 entries": _layout(
        groups='[{"name":"a","d_in":9007199254740991,"structure":"full","weights":'
        '[{"weight":"w","d_out":1,"transposed":true}]}]',
        tensors='[{"name":"w","shape":[1,9007199254740991],"merge":"regmean"}]',
    ),
    "a plan of many silos": _plan(PLAN + SILOS),
    "a plan of many labels": _plan(PLAN.replace('labels = ["an ä", "b", "c"]', f"labels = [{LABELS}]")),
    "a plan whose silos have many labels": _plan(
        PLAN.replace('labels = ["an ä", "b", "c"]', f"labels = [{LABELS[:200_000]}\"]")
        + f'labels = [{LABELS[:200_000]}"]\n'
    ),
    "a plan of as many unknown keys as there may be": _plan("\n".join(f"a{n} = 1" for n in range(16_000))),
    "a plan of one key": _plan(".".join(["a"] * 250_000) + " = 1"),
    "a plan of one key in quotes": _plan('"".' * 150_000 + "a = 1"),
    "a plan of deep keys": _plan("\n".join(".".join(["a"] * 16) + f".b{n} = 1" for n in range(12_000))),
    "a plan of brackets": _plan("a = " + "[" * 500_000),
    "a plan of numbers": _plan("a = [" + "1," * 250_000 + "]"),
    "a plan of wrong labels": _plan(PLAN.replace('["an ä", "b", "c"]', "[" + "1," * 200_000 + "]")),
    "a plan with a number of 5,000 digits": _plan("[plan]\nversion = " + "9" * 5000),
    "a plan with a number of 400,000 digits": _plan("[plan]\nversion = 0x" + "f" * 400_000),
    "a plan of texts that do not end": _plan('"""\\"' * 100_000),
    "a statistics file of brackets": _file(b'{"__metadata__":' + b"[" * 20_000_000),
    "a statistics file of keys": _file(b"{" + b",".join(b'"%d":{}' % n for n in range(500_000)) + b"}"),
    "a statistics file whose document is large": _file(
        json.dumps({"__metadata__": {"gramfuse": '{"x":[' + "[]," * 100_000 + "[]]}", "sha256": "0" * 64}}).encode()
    ),
    "a statistics file whose document is large where it should not be": _file(
        json.dumps({"__metadata__": {"gramfuse": '{"layout":{"x":[' + "1," * 2**20 + "1]}}", "sha256": "0"}}).encode()
    ),
    "a head file of as many features and labels as there may be": _file(_head(2**14, 2**16), read_head),
    "a head file of a billion features": _file(_head(10**9, 2), read_head),
    "a ledger of one line": _ledger(b'{"number":' + b"9" * 20_000_000),
    "a ledger of brackets": _ledger(b"[" * 4_000_000 + b"\n"),
    "a ledger line of empty lists": _ledger(b'{"entry":[' + b"[]," * 1_000_000 + b"[]]}\n"),
    "a .npy header of 3.4 MB": lambda place: npy.decode(
        b"\x93NUMPY\x02\x00" + (3_400_000).to_bytes(4, "little") + b"{'descr': '|u1', (" * 200_000
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", DEAR)
def test_what_is_made_to_be_dear_takes_neither_a_second_nor_much_memory(what: str, tmp_path: Path) -> None:
    before = _reset_peak()
    for _ in range(3):  # a step is too slow if it is so every time, whatever else the machine does
        began = time.process_time()
        try:
            DEAR[what](tmp_path)
            said = "read"
        except GramfuseError as error:
            said = str(error)
        if (took := time.process_time() - began) < SECONDS:
            break
    used = _peak() - before
    print(f"{what}: {took:.2f} s, {used} MB: {said:.100}")
    assert took < SECONDS
    assert used < MEGABYTES
    assert len(said) < 20_000
    assert said != "read" or "as many as there may be" in what or "a plan" in what


def _reset_peak() -> int:
    """Forget the most memory that this process ever had; return what it has now, in MB."""
    Path("/proc/self/clear_refs").write_text("5")
    return _peak()


def _peak() -> int:
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) // 1024
