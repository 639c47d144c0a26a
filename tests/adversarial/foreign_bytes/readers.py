"""Readers: each makes a case from a seed, and reads it."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from gramfuse_client.guard.ledger import Ledger
from gramfuse_client.guard.ledger_lines import Entry, Item
from gramfuse_client.silo_file import Silo
from gramfuse_protocol.contract.head_layout import HeadLayout
from gramfuse_protocol.contract.layout import Layout
from gramfuse_protocol.contract.plan import Plan
from gramfuse_protocol.contract.task import Task
from gramfuse_protocol.messages import flower_records, npy
from gramfuse_protocol.messages.phases import REQUESTS
from gramfuse_protocol.messages.wire import Frame, pack, unpack
from gramfuse_protocol.secure_sum import member as secure_sum
from gramfuse_protocol.statistics.about import Origin
from gramfuse_protocol.statistics.contribution import Statistics
from gramfuse_protocol.statistics.file import read_statistics, write_statistics
from gramfuse_protocol.statistics.head_file import read_head, write_head
from gramfuse_protocol.statistics.head_sums import HeadSums
from gramfuse_server.run_directory import checkpoint_text, partial_of, read_checkpoint
from tests.adversarial.foreign_bytes.changes import changed_bytes, changed_document, changed_text, written
from tests.adversarial.foreign_bytes.documents import (
    ABOUT,
    ASKED,
    EVERY_REPLY,
    LAYOUT,
    NAMES,
    PLAN,
    ROSTER,
    SAID,
    SILO,
    TRANSCRIPT,
)


def frame(draw: random.Random, messages: list[Any], types: dict[str, Any]) -> None:
    good, other = pack(draw.choice(messages)), pack(draw.choice(messages))
    kind = draw.randrange(4)
    header = good.header
    if kind == 0:
        header = changed_text(draw, header, other.header)
    elif kind < 3:
        document = json.loads(header)
        for text in ("layout", "plan_text"):  # a document in the document
            if text in document["body"] and draw.random() < 0.5:
                document["body"][text] = changed_text(draw, document["body"][text], other.header)
        header = written(draw, changed_document(draw, document))
    buffers = good.buffers
    if kind == 3 or draw.random() < 0.2:
        data = b"".join(buffer.tobytes() for buffer in buffers)
        buffers = (np.frombuffer(changed_bytes(draw, data, b"\x00" * 9), np.uint8), *other.buffers[: draw.randrange(2)])
    found = unpack(Frame(header, buffers), types)
    again = pack(found)
    assert (again.header, again.nbytes) == (header, again.nbytes)
    assert again.digest == Frame(header, buffers).digest


def read_request(draw: random.Random, place: Path) -> None:
    frame(draw, ASKED, dict(REQUESTS))


def read_reply(draw: random.Random, place: Path) -> None:
    frame(draw, SAID, EVERY_REPLY)


def read_record(draw: random.Random, place: Path) -> None:
    frame = pack(draw.choice([*ASKED, *SAID]))
    good = flower_records.to_record(frame)
    arrays, header = dict(good.array_records["arrays"]), dict(good.config_records["header"])
    records: dict[str, Any] = {}
    for _ in range(draw.choice((1, 2))):
        match draw.randrange(6):
            case 0:
                header[draw.choice(("json", "x"))] = draw.choice((1, 1.5, b"\xff", "", True, [1, 2], ["a"], "A" * 5000))
            case 1:
                header.clear()
            case 2:
                arrays[draw.choice(("000000", "000001", "x", "", "-1"))] = Array(
                    draw.choice(("uint8", "object", "")),
                    draw.choice(((1,), (), (2**63,), (True,), (-1, 2))),
                    draw.choice(("numpy.ndarray", "pickle", "")),
                    draw.choice((b"", b"\x93NUMPY\x01\x00", npy.encode(np.zeros(1, np.uint8)), draw.randbytes(200))),
                )
            case 3:
                arrays.clear()
            case 4:
                records[draw.choice(("more", "header", "arrays"))] = draw.choice(
                    (MetricRecord({"a": 1}), ConfigRecord(), ArrayRecord())
                )
            case _ if arrays:
                key = draw.choice(list(arrays))
                array = arrays[key]
                arrays[key] = Array(
                    "uint8", array.shape, array.stype, changed_bytes(draw, array.data, frame.header.encode())
                )
    content = RecordDict({"header": ConfigRecord(header), "arrays": ArrayRecord(arrays), **records})
    unpack(flower_records.from_record(content), {**REQUESTS, **EVERY_REPLY} if draw.random() < 0.5 else EVERY_REPLY)


def read_npy(draw: random.Random, place: Path) -> None:
    good = npy.encode(np.frombuffer(draw.randbytes(draw.choice((0, 1, 64, 1000))), np.uint8))
    data = changed_bytes(draw, good, b"{'descr': '|O', 'fortran_order': False, 'shape': (9, ((((((( }")
    assert npy.encode(npy.decode(data)) == data


def read_layout(draw: random.Random, place: Path) -> None:
    document = json.loads(LAYOUT.to_json())
    text = (
        changed_text(draw, LAYOUT.to_json(), PLAN)
        if draw.random() < 0.4
        else written(draw, changed_document(draw, document))
    )
    layout = Layout.parse(text)
    assert len(layout.digest) == 64
    assert layout.piece(layout.piece_count() - 1)
    assert len(layout.sums) == 1 + 2 * len(layout.groups) + len(layout.tensors)


def read_plan(draw: random.Random, place: Path) -> None:
    text = changed_text(draw, PLAN, SILO)
    if draw.random() < 0.3:
        text = changed_bytes(draw, text.encode(), SILO.encode()).decode("utf-8", "replace")
    plan = Plan.parse(text)
    assert Plan.parse(plan.to_toml()).digest == plan.digest


def read_silo_file(draw: random.Random, place: Path) -> None:
    path = place / "silo.toml"
    text = changed_text(draw, SILO, PLAN).encode("utf-8", "surrogatepass")
    path.write_bytes(changed_bytes(draw, text, PLAN.encode()) if draw.random() < 0.5 else text)
    assert Silo.read(path).file.name


def read_statistics_file(draw: random.Random, place: Path) -> None:
    path = place / "north.safetensors"
    if not path.exists():
        blocks = {block.name: np.ones(block.shape, np.float32) for block in LAYOUT.blocks}
        write_statistics(
            path,
            Statistics(7, {"a": 40, "h0": 1, "h1": 0}, blocks),
            name="north",
            base=Origin(name="some/base", weights={"a.weight": "0" * 64}, config="2" * 64, processor="3" * 64),
            task=Task(task="classification", labels=("yes", "no"), threshold=0.25),
            layout=LAYOUT,
            head=["head.weight"],
            own={"head.weight": np.ones((1, 2), np.float32)},
        )
    file = read_statistics(_changed_file(draw, path.read_bytes(), "gramfuse", place))
    assert [file.block(block.name).shape for block in file.about.blocks] == [b.shape for b in file.about.blocks]


def read_head_file(draw: random.Random, place: Path) -> None:
    path = place / "north.head.safetensors"
    if not path.exists():
        rng = np.random.default_rng(1)
        write_head(
            path,
            HeadSums.of(rng.normal(size=(12, 3)), np.eye(2)[np.arange(12) % 2]),
            name="north",
            model=Origin(name="some/base", weights={"a.weight": "0" * 64}, config="2" * 64, processor="3" * 64),
            task=Task(task="classification", labels=("yes", "no")),
            head=HeadLayout(
                fit="discriminant",
                weight="head.weight",
                bias="head.bias",
                features=3,
                outputs=2,
                columns=2,
                exponents=(0, 0, 0),
            ),
            least=2,
        )
    file = read_head(_changed_file(draw, path.read_bytes(), "gramfuse-head", place))
    assert file.sums.examples == file.about.examples == file.sums.counts.sum()


def _changed_file(draw: random.Random, good: bytes, key: str, place: Path) -> Path:
    """Write a changed statistics file or head file."""
    size = int.from_bytes(good[:8], "little")
    if draw.random() < 0.3:
        data = changed_bytes(draw, good, LAYOUT.to_json().encode())
    else:  # with a length and a digest that fit, so that more than these is read
        header = json.loads(good[8 : 8 + size])
        if draw.random() < 0.7:
            about = json.loads(header["__metadata__"][key])
            text = written(draw, changed_document(draw, about))
            text = changed_text(draw, text, PLAN) if draw.random() < 0.2 else text
            header["__metadata__"][key] = text
            digest = hashlib.sha256(text.encode("utf-8", "surrogatepass") + good[8 + size :])
            header["__metadata__"]["sha256"] = digest.hexdigest()
        else:
            header = changed_document(draw, header)
        line = json.dumps(header, ensure_ascii=draw.random() < 0.2, separators=(",", ":"))
        raw = line.encode("utf-8", "surrogatepass")
        raw += b" " * (-len(raw) % 8)
        data = len(raw).to_bytes(8, "little") + raw + good[8 + size :]
    changed = place / "changed.safetensors"
    changed.write_bytes(data)
    return changed


def read_ledger(draw: random.Random, place: Path) -> None:
    path = place / "good" / "ledger.jsonl"
    if not path.exists():
        for n in range(3):
            item = Item(name="delta:é", dtype="float32", shape=(n, 2), bytes=8 * n, sha256="0" * 64)
            Ledger(path, "north").append(Entry(phase="upload", kind="reply", form="open", run=2**63, items=(item,)))
    lines = path.read_bytes()
    head = path.with_suffix(".head").read_bytes()
    match draw.randrange(4):
        case 0:
            lines = changed_bytes(draw, lines, head)
        case 1:
            lines = changed_text(draw, lines.decode(), PLAN).encode("utf-8", "surrogatepass")
        case 2:
            first, *rest = lines.splitlines(keepends=True)
            text = written(draw, changed_document(draw, json.loads(first)))
            lines = text.encode("utf-8", "surrogatepass") + b"\n" + b"".join(rest)
        case _:
            head = changed_bytes(draw, head, lines)
    copied = place / "copy.jsonl"
    copied.write_bytes(lines)
    copied.with_suffix(".head").write_bytes(head)
    Ledger(copied, "north").verify()


def read_a_checkpoint(draw: random.Random, place: Path) -> None:
    run = place / "run"
    partial_of(run).mkdir(exist_ok=True)
    text = checkpoint_text({"session": "f" * 32, "train": {"north": {"examples": 3}}, "masked": ["north"]})
    data = changed_bytes(draw, text.encode(), PLAN.encode())
    (partial_of(run) / "checkpoint.json").write_bytes(data)
    assert read_checkpoint(run).keys() == {"session", "train", "masked"}


def read_transcript(draw: random.Random, place: Path) -> None:
    """What silos and the coordinator read of each other in a session: keys, sealed shares, signatures."""
    member = draw.choice(TRANSCRIPT.members)
    begun = member.with_(adverts=(), own_shares={})
    match draw.randrange(3):
        case 0:
            document = changed_document(draw, [advert.model_dump(mode="json") for advert in TRANSCRIPT.adverts])
            body = {"adverts": document, **ABOUT, "protocol": 1}
            header = written(draw, {"arrays": [], "body": body, "phase": "shares"})
            request: Any = unpack(Frame(header, ()), {"shares": REQUESTS["shares"]})
            secure_sum.share(ROSTER, begun, request.adverts, draw.randbytes)
        case 1:
            sealed = {peer: of[member.name] for peer, of in TRANSCRIPT.sealed.items() if peer != member.name}
            peer = draw.choice(list(sealed))
            sealed[draw.choice((peer, *NAMES, "west"))] = changed_bytes(draw, sealed[peer], b"\xff" * 66)
            secure_sum.receive(ROSTER, member, sealed)
        case _:
            advert = draw.choice(TRANSCRIPT.adverts)
            key = changed_bytes(draw, bytes.fromhex(advert.channel), b"\xff" * 32)[:32].ljust(32, b"\xff")
            secure_sum.check_advert(ROSTER, ABOUT["session"], advert.model_copy(update={"channel": key.hex()}))


READERS: dict[str, Callable[[random.Random, Path], None]] = {
    "requests": read_request,
    "replies": read_reply,
    "records": read_record,
    "npy": read_npy,
    "layout": read_layout,
    "plan": read_plan,
    "silo file": read_silo_file,
    "statistics file": read_statistics_file,
    "head file": read_head_file,
    "ledger": read_ledger,
    "checkpoint": read_a_checkpoint,
    "transcript": read_transcript,
}
