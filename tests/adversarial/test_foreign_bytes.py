"""Bytes that somebody else wrote: whatever they are, reading them ends soon, in little memory, and with a typed error.

Good documents of every kind are changed at random: bits, bytes, tokens, whole subtrees, lengths, numbers, depths, keys.
Hypothesis draws the seeds; from each, a batch of cases is made, so that 20,000 cases cost seconds. A second part has
the cases that were made by hand to be as dear as their size allows.
"""

from __future__ import annotations

import copy
import hashlib
import json
import random
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st

from gramfuse_client.guard.ledger import Ledger
from gramfuse_client.guard.ledger_lines import Entry, Item
from gramfuse_client.silo_file import Silo
from gramfuse_protocol.bounds import LAYOUT_CHARACTERS
from gramfuse_protocol.canonical import canonical_json
from gramfuse_protocol.contract.layout import Group, Layout, Linear, SharedOutputs, Tensor
from gramfuse_protocol.contract.node_key import generate
from gramfuse_protocol.contract.plan import Plan
from gramfuse_protocol.contract.roster import Roster
from gramfuse_protocol.contract.task import Task
from gramfuse_protocol.errors import GramfuseError
from gramfuse_protocol.messages import flower_records, npy
from gramfuse_protocol.messages.phases import REPLIES, REQUESTS, Message, StatisticsBody
from gramfuse_protocol.messages.wire import Frame, pack, unpack
from gramfuse_protocol.secure_sum import member as secure_sum
from gramfuse_protocol.secure_sum.keys import Identity
from gramfuse_protocol.secure_sum.member import Member
from gramfuse_protocol.secure_sum.statements import Advert
from gramfuse_protocol.statistics.about import Origin
from gramfuse_protocol.statistics.contribution import Statistics
from gramfuse_protocol.statistics.file import read_statistics, write_statistics
from gramfuse_server.run_directory import checkpoint_text, partial_of, read_checkpoint

CASES = {
    "requests": 3000,
    "replies": 3000,
    "records": 2000,
    "npy": 2000,
    "layout": 2500,
    "plan": 2000,
    "silo file": 1500,
    "statistics file": 1500,
    "ledger": 1500,
    "checkpoint": 500,
    "transcript": 1000,
}
"""How many cases of each kind there are."""

BATCH = 50
SECONDS = 1.0
"""Most processor time of one step."""

MEGABYTES = 256
"""Most memory of one step."""


def test_there_are_twenty_thousand_cases() -> None:
    assert sum(CASES.values()) >= 20_000


# Good documents


LAYOUT = Layout(
    groups=(
        Group(
            name="a",
            d_in=3,
            structure="full",
            weights=(Linear(weight="a.weight", d_out=2, transposed=True),),
            exponents=(1, -2, 0),
        ),
        Group(name="h0", d_in=2, structure="block:2", weights=(Linear(weight="h", d_out=1, transposed=True),), part=0),
        Group(name="h1", d_in=2, structure="diagonal", weights=(Linear(weight="h", d_out=2, transposed=True),), part=1),
    ),
    tensors=(
        Tensor(name="a.weight", shape=(2, 3), merge="regmean"),
        Tensor(name="h", shape=(3, 2), merge="regmean", parted=True),
        Tensor(name="a.bias", shape=(2,), merge="mean"),
    ),
    frozen=("e",),
    parts=(SharedOutputs(silos=("a", "b"), outputs=(0,)), SharedOutputs(silos=("b", "c"), outputs=(1, 2))),
)
NAMES = ("north", "south", "east")
IDENTITIES = {name: Identity(hashlib.sha256(name.encode()).digest()) for name in NAMES}
NODE_KEY = generate()[1]
PLAN = """[plan]
name = "clinics"

[model]
base = "bundled:minilm"
task = "multi-label"
labels = ["an ä", "b", "c"]
threshold = 0.25

[training]
learning-rate = 2e-5
freeze = ["embeddings", "*.layer.0.*"]

[merge]
alpha = 0.9
gram = { "*" = "full", "*.1.*" = "block:64" }
rounds = 2

[privacy]
colluding = 1
metrics = "sum"
""" + "".join(
    f'\n[[silo]]\nname = "{name}"\npublic-key = "{IDENTITIES[name].public.hex()}"\n'
    + (f'node-key = "{NODE_KEY}"\n' if name == "north" else "")
    for name in NAMES
)
SILO = f"""name = "north"
state = "state"
threads = 2
approved = ["{"ab" * 32}"]

[data]
train = "train.jsonl"
held-out = 0.2

[limits]
minimum-examples = 50
train-hours = "20:00-06:00"

[coordinator]
address = "[2001:db8::1]:9092"
"""
ABOUT: dict[str, Any] = {"plan": "0" * 63 + "a", "session": "f" * 32, "round": 2}
ROSTER = Roster(ABOUT["plan"], {name: identity.public for name, identity in IDENTITIES.items()}, 3, 3)


class Transcript(NamedTuple):
    """All that crossed the coordinator's door in the first phases of a session."""

    members: tuple[Member, ...]
    adverts: tuple[Advert, ...]
    sealed: dict[str, dict[str, bytes]]


def _transcript() -> Transcript:
    draw = random.Random(3).randbytes
    begun = [secure_sum.advertise(ROSTER, ABOUT["session"], n, NAMES, IDENTITIES[n], draw) for n in NAMES]
    adverts = tuple(member.advert for member in begun)
    shared = [secure_sum.share(ROSTER, member, adverts, draw) for member in begun]
    return Transcript(
        tuple(member for member, _ in shared), adverts, {member.name: sealed for member, sealed in shared}
    )


TRANSCRIPT = _transcript()


def _messages() -> tuple[list[Message], list[Any]]:
    """Return good requests and replies, one of each phase at least."""
    delta = {"delta:a.weight": np.ones((2, 3), np.float32), "delta:a.bias": np.zeros(2, np.float32)}
    sealed = {name: {peer: data.hex() for peer, data in of.items()} for name, of in TRANSCRIPT.sealed.items()}
    bodies: dict[str, dict[str, Any]] = {
        "join": {"plan_text": PLAN, "layout": LAYOUT.to_json()},
        "train": {"arrays": delta},
        "keys": {"cohort": NAMES},
        "shares": {"adverts": TRANSCRIPT.adverts},
        "masked": {"sum_of": "statistics", "sealed": sealed["south"], "piece": 1, "piece_bytes": 64},
        "survivors": {"sum_of": "metrics", "survivors": NAMES},
        "unmask": {"sum_of": "metrics", "signatures": dict.fromkeys(NAMES, "ab" * 64)},
        "upload": {"piece": 0, "piece_bytes": 64},
        "evaluate": {"candidate": "regmean", "arrays": delta},
        "finish": {},
    }
    replies: dict[str, dict[str, Any]] = {
        "join": {},
        "train": {"examples": 7, "tokens": {"a": 9, "h0": 4}},
        "keys": {"advert": TRANSCRIPT.adverts[0]},
        "shares": {"sealed": sealed["north"]},
        "masked": {"sum_of": "statistics", "piece": 1, "arrays": {"masked": np.arange(8, dtype="<u8")}},
        "survivors": {"sum_of": "metrics", "signature": "ab" * 64},
        "unmask": {"sum_of": "metrics", "shares": dict.fromkeys(NAMES, "cd" * 66)},
        "upload": {"piece": 0, "arrays": delta},
        "evaluate": {"candidate": "regmean", "arrays": {"sums": np.ones((3, 3))}},
        "finish": {},
        "refusal": {"error": "RefusalError", "exit_code": 13, "reason": "not today"},
    }
    whole = {block.name: np.ones(block.shape, np.float32) for block in LAYOUT.blocks}
    tokens = {group.name: 5 for group in LAYOUT.groups}
    statistics = StatisticsBody(layout=LAYOUT.to_json(), examples=3, tokens=tokens, arrays=whole)
    return (
        [REQUESTS[phase](**ABOUT, **body) for phase, body in bodies.items()],
        [*(REPLIES[phase](**ABOUT, silo="north", **body) for phase, body in replies.items()), statistics],
    )


ASKED, SAID = _messages()
EVERY_REPLY: dict[str, Any] = {**REPLIES, "statistics": StatisticsBody}


def test_every_phase_is_changed_below() -> None:
    assert {message.phase for message in ASKED} == set(REQUESTS)
    assert {message.phase for message in SAID} == set(EVERY_REPLY)
    for message in (*ASKED, *SAID):
        assert unpack(pack(message), REQUESTS if message in ASKED else EVERY_REPLY).phase == message.phase


# Changes


JUNK: list[Any] = [
    None, True, -1, 0, 1.5, 2**31, 2**53, 10**30, 10**400, float("nan"), float("inf"), "", "a", "A" * 5000,
    "\x00\n\x1b", "\ud800", "\u202e", [], {}, [[]], [1] * 300, {"a": 1}, [None], {"": {}}, "ab" * 32, "1" * 5000,
    [["x", "uint64", [2**60]]],
]  # fmt: skip

TOKENS = re.compile(r'"(?:[^"\\]|\\.)*"|-?\d+(?:\.\d+)?(?:e-?\d+)?|[\[\]{}:,=.]|[A-Za-z_-]+|\n')

WORDS = [
    "null", "true", "NaN", "-Infinity", "1e999", "-0", "9" * 5000, "0x" + "f" * 6000, '"\\ud800"', '"\\u0000"', "]",
    "}", "[" * 3000, "{" * 3000, '{"a":' * 1500, ",", ":", '"', "'", '"""', "#", "\n", "=", ".", "a.b.c", "[[silo]]",
    "inf", "1979-05-27", "", " ", "[]", "{}", '"' + "x" * 3000 + '"', ".".join("a" * 60), "\u2028", "é",
]  # fmt: skip


def changed_bytes(draw: random.Random, data: bytes, other: bytes) -> bytes:
    """Flip, cut, repeat, insert, splice, or edit what looks like a length."""
    changed = bytearray(data)
    for _ in range(draw.choice((1, 1, 1, 2, 5))):
        place = draw.randrange(len(changed) + 1)
        match draw.randrange(8):
            case 0 if changed:
                changed[place % len(changed)] ^= 1 << draw.randrange(8)
            case 1:
                del changed[place:]
            case 2:
                del changed[place : place + draw.choice((1, 2, 8, 100))]
            case 3:
                changed[place:place] = changed[place : place + draw.choice((1, 8, 100))]
            case 4:
                changed[place:place] = draw.randbytes(draw.choice((1, 4, 40)))
            case 5:
                start = draw.randrange(len(other) + 1)
                changed[place : place + 20] = other[start : start + draw.choice((1, 20, 200))]
            case 6:
                size = draw.choice((0, 1, 255, 2**16 - 1, 2**31, 2**32 - 1, 2**63, len(data), len(data) + 1))
                width = draw.choice((2, 4, 8))
                at = draw.choice((0, 0, 8, place))
                changed[at : at + width] = (size % 256**width).to_bytes(width, "little")
            case _:
                changed[place : place + 1] = bytes([draw.choice((0, 10, 0x1B, 0x80, 0xC0, 0xED, 0xFF))])
    return bytes(changed)


def changed_text(draw: random.Random, text: str, other: str) -> str:
    """Replace, repeat, drop and exchange tokens; what is left may or may not be of the language."""
    tokens = list(TOKENS.finditer(text))
    if not tokens:
        return draw.choice(WORDS)
    for _ in range(draw.choice((1, 1, 2, 4))):
        token, second = draw.choice(tokens), draw.choice(tokens)
        match draw.randrange(6):
            case 0 | 1:
                text = text[: token.start()] + draw.choice(WORDS) + text[token.end() :]
            case 2:
                text = text[: token.start()] + text[token.end() :]
            case 3:
                text = text[: token.end()] + text[token.start() :]
            case 4:
                first, last = sorted((token.start(), second.end()))
                text = text[:last] + "," * draw.randrange(2) + text[first:]
            case _:
                strange = draw.choice(list(TOKENS.finditer(other)) or tokens)
                text = text[: token.start()] + strange.group() + text[token.end() :]
    return text


def changed_document(draw: random.Random, document: Any) -> Any:
    """Put junk, or a part of the document itself, in the place of one of its parts; or add, drop and rename one."""
    document = copy.deepcopy(document)
    for _ in range(draw.choice((1, 1, 2, 3))):
        places = list(_places(document))
        if not places:
            return None
        holder, key = draw.choice(places)
        match draw.randrange(6):
            case 0 | 1 | 2:
                holder[key] = copy.deepcopy(draw.choice(JUNK))
            case 3:
                other, at = draw.choice(places)
                holder[key] = copy.deepcopy(other[at])
            case 4:
                del holder[key]
            case _ if isinstance(holder, dict):
                holder[draw.choice(("", "x", "phase", "arrays", "\ud800", "a" * 3000))] = copy.deepcopy(
                    draw.choice(JUNK)
                )
            case _:
                holder.extend(copy.deepcopy(holder))
    return document


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in keys:
        yield value, key
        yield from _places(value[key])


def written(draw: random.Random, document: Any) -> str:
    """Write a document as JSON: in canonical form where it has one, or in another."""
    if draw.random() < 0.7:
        try:
            return canonical_json(document).decode()
        except (ValueError, RecursionError):
            pass
    try:
        return json.dumps(document, ensure_ascii=draw.random() < 0.5)
    except (ValueError, RecursionError):
        return "[" * 2000


# Readers: each makes a case from a seed, and reads it


def _frame(draw: random.Random, messages: list[Any], types: dict[str, Any]) -> None:
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
    _frame(draw, ASKED, dict(REQUESTS))


def read_reply(draw: random.Random, place: Path) -> None:
    _frame(draw, SAID, EVERY_REPLY)


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
    good = path.read_bytes()
    size = int.from_bytes(good[:8], "little")
    if draw.random() < 0.3:
        data = changed_bytes(draw, good, LAYOUT.to_json().encode())
    else:  # with a length and a digest that fit, so that more than these is read
        header = json.loads(good[8 : 8 + size])
        if draw.random() < 0.7:
            about = json.loads(header["__metadata__"]["gramfuse"])
            text = written(draw, changed_document(draw, about))
            text = changed_text(draw, text, PLAN) if draw.random() < 0.2 else text
            header["__metadata__"]["gramfuse"] = text
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
    file = read_statistics(changed)
    assert [file.block(block.name).shape for block in file.about.blocks] == [b.shape for b in file.about.blocks]


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
    begun = member.with_(adverts=(), own={})
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
    "ledger": read_ledger,
    "checkpoint": read_a_checkpoint,
    "transcript": read_transcript,
}


@pytest.mark.parametrize("kind", CASES)
def test_nothing_that_is_read_breaks_its_reader(kind: str, tmp_path: Path) -> None:
    read, seen = READERS[kind], {"cases": 0, "read": 0, "slowest": 0.0, "longest": 0}

    @settings(
        max_examples=CASES[kind] // BATCH,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(seed=st.binary(min_size=8, max_size=8))
    def batch(seed: bytes) -> None:
        for number in range(BATCH):
            draw = random.Random(seed + bytes([number]))
            began = time.process_time()
            try:
                read(draw, tmp_path)
                seen["read"] += 1
            except GramfuseError as error:
                seen["longest"] = max(seen["longest"], len(str(error)))
            except BaseException:
                note(f"case {number} of seed {seed.hex()}")
                raise
            took = time.process_time() - began
            assert took < SECONDS, f"case {number} of seed {seed.hex()} took {took:.1f} s"
            seen["cases"] += 1
            seen["slowest"] = max(seen["slowest"], took)

    batch()
    print(f"{kind}: {seen['cases']} cases, {seen['read']} of them still read, the slowest {seen['slowest']:.3f} s")
    assert seen["cases"] >= CASES[kind]
    assert seen["longest"] < 20_000  # characters of an error
    assert seen["read"] < seen["cases"] / 2  # the changes are changes


# Cases that are as dear as their size allows


def _header(document: str) -> Callable[[Path], Any]:
    return lambda place: unpack(Frame(document, ()), EVERY_REPLY)


def _body(phase: str, body: str, arrays: str = "[]") -> Callable[[Path], Any]:
    return _header(f'{{"arrays":{arrays},"body":{body},"phase":"{phase}"}}')


def _layout(**parts: str) -> Callable[[Path], Any]:
    keys = {"frozen": "[]", "groups": "[]", "parts": "[]", "tensors": "[]", "version": "1"} | parts
    return lambda place: Layout.parse("{" + ",".join(f'"{key}":{value}' for key, value in keys.items()) + "}")


def _plan(text: str) -> Callable[[Path], Any]:
    return lambda place: Plan.parse(text)


def _file(data: bytes) -> Callable[[Path], Any]:
    def read(place: Path) -> Any:
        path = place / "big.safetensors"
        path.write_bytes(len(data).to_bytes(8, "little") + data)
        return read_statistics(path)

    return read


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
