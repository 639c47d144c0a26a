"""One silo of four means harm: it has its key and its place in the roster, and sends what nobody expects.

It hopes to end the run, to end every resume of it too, or to have the coordinator run something. What it gets is its
own loss: the others' models are merged without it, and a run that was interrupted afterwards goes on without it too.
"""

from __future__ import annotations

import copy
import json
import pickle
import secrets
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_ssh_public_key
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from safetensors.numpy import save, save_file

from gramfuse_client.app import SiloApp
from gramfuse_client.data.examples import load
from gramfuse_client.exchange import local_model
from gramfuse_client.silo_file import Silo
from gramfuse_model.loading.base_model import Base, load_base
from gramfuse_model.project import Project
from gramfuse_protocol.contract.node_key import generate
from gramfuse_protocol.contract.plan import Plan
from gramfuse_protocol.errors import ContributionError, FederationError, SecurityError
from gramfuse_protocol.messages.flower_records import from_record, to_record
from gramfuse_protocol.messages.phases import REPLIES, EvaluateReply, MaskedReply, MaskedRequest, Refusal
from gramfuse_protocol.messages.wire import Frame, pack, unpack
from gramfuse_protocol.secure_sum.keys import FIELD, Identity
from gramfuse_protocol.secure_sum.member import advertise, check_advert
from gramfuse_protocol.secure_sum.statements import Advert, advert_statement
from gramfuse_protocol.statistics.contribution import Statistics
from gramfuse_server.run import delivery
from gramfuse_server.run import exchange as exchange_module
from gramfuse_server.run.exchange import Exchange
from gramfuse_server.run.patience import Patience
from gramfuse_server.run.spool import Spool
from gramfuse_server.run_directory import RunDirectory, partial_of
from tests.grid import InProcessGrid, _task_identity  # noqa: F401  # the second is a fixture

A, B, C, D = NAMES = tuple(f"silo-{letter}" for letter in "abcd")
PIECE_BYTES = 16384


class Federation:
    """Four silos with real state on their disks. What they measure is measured once for all tests of this file."""

    def __init__(self, project: Any) -> None:
        self.project = project
        plan, self.layout = Project.read(project.directory).locked()
        self.base: Base = load_base(plan, project.directory)
        self.statistics: dict[str, Statistics] = {}
        lines = {name: generate()[1] for name in NAMES}
        roster = tuple(entry.model_copy(update={"node_key": lines[entry.name]}) for entry in plan.silo)
        self.plan: Plan = plan.model_copy(update={"silo": roster})
        pem = Encoding.PEM, PublicFormat.SubjectPublicKeyInfo
        self.keys = {name: load_ssh_public_key(line.encode()).public_bytes(*pem) for name, line in lines.items()}
        for name in NAMES:
            silo = Silo.read(project.silo(name))
            examples, _ = load(silo, plan.task_of(name))
            self.statistics[name] = local_model.train(silo, plan, self.layout, copy.deepcopy(self.base), examples)

    def identity(self, name: str) -> Identity:
        return Silo.read(self.project.silo(name)).identity()


@pytest.fixture(scope="module")
def _made() -> list[Federation]:
    return []


@pytest.fixture
def federation(_made: list[Federation], pico_project: Any, monkeypatch: pytest.MonkeyPatch) -> Federation:
    if not _made:
        _made.append(Federation(pico_project(silos=4, name="hostile", secure=True)))
    federation = _made[0]

    def write_model(directory: Path, _: Any, deltas: Mapping[str, Any], *__: Any) -> None:
        directory.mkdir(exist_ok=True)
        save_file({name: np.ascontiguousarray(delta) for name, delta in deltas.items()}, directory / "deltas")

    monkeypatch.setattr(local_model, "train", lambda silo, *_: federation.statistics[silo.name])
    monkeypatch.setattr(local_model, "load_base", lambda *_, **__: copy.deepcopy(federation.base))
    monkeypatch.setattr(local_model, "plan_layout", lambda *_: federation.layout)
    monkeypatch.setattr(exchange_module, "write_model", write_model)
    monkeypatch.setattr(delivery.time, "sleep", lambda _: None)
    return federation


class Stopped(BaseException):
    """The coordinator's process was ended."""


Lie = Callable[["Run", RecordDict], "RecordDict | Error"]
"""What a silo sends instead of what it would have."""


class Run:
    """One run, and its resumes: silo D lies in one phase, each time it is asked.

    Attributes:
        liar: the silo, if it is another.
        asked: how many messages of a phase went to a silo.
    """

    def __init__(self, federation: Federation, place: Path, phase: str = "", lie: Lie = lambda run, reply: reply):
        self.federation = federation
        self.place = place
        self.phase = phase
        self.lie = lie
        self.liar = D
        self.asked: dict[tuple[str, str], int] = defaultdict(int)
        self.grid: type[InProcessGrid] = InProcessGrid

    def silo(self, name: str) -> Silo:
        silo = Silo.read(self.federation.project.silo(name))
        changes = {"approved": (self.federation.plan.digest,), "state": str(self.place / "state" / name)}
        return Silo(silo.path, silo.file.model_copy(update=changes))

    @property
    def out(self) -> Path:
        return self.place / "run"

    def go(self, *, stop: str = "", resume: bool = False) -> dict[str, Any]:
        """Run, or go on; with `stop`, the coordinator's process ends as this phase begins."""

        def fault(visit: Any, deliver: Callable[[], Any]) -> Any:
            self.asked[visit.node, visit.phase] += 1
            reply = deliver()
            return self.lie(self, reply) if (visit.node, visit.phase) == (self.liar, self.phase) else reply

        def observe(event: dict[str, Any]) -> None:
            if stop and (event["phase"], event["state"]) == (stop, "start"):
                raise Stopped

        federation = self.federation
        nodes = {name: SiloApp(lambda _, name=name: self.silo(name)) for name in NAMES}
        grid = self.grid(nodes, fault=fault, keys=federation.keys)
        with RunDirectory(self.out, 0, resume=resume) as run:
            report = (
                Exchange(
                    grid,
                    federation.plan,
                    federation.layout,
                    copy.deepcopy(federation.base),
                    run,
                    observer=observe,
                    piece_bytes=PIECE_BYTES,
                    patience=Patience(wait=0.1, authenticated=True),
                )
                .start()
                .document()
            )
            run.finish()
        return report


# The pieces that lies are made of


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


@pytest.mark.parametrize("what", LIES)
def test_a_silo_that_lies_is_lost_and_nobody_else_and_a_resumed_run_goes_on_without_it(
    federation: Federation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    monkeypatch.chdir(tmp_path)
    phase, lie = LIES[what]
    run = Run(federation, tmp_path / "place", phase, lie)
    with pytest.raises(Stopped):
        run.go(stop="merge" if phase != "evaluate" else "masked")
    report = run.go(resume=True)
    assert [silo["name"] for silo in report["silos"]] == [A, B, C, *(() if phase in BEFORE_THE_SUM else (D,))]
    lost = {entry["name"]: entry["reason"] for entry in report["lost"]}
    assert set(lost) == {D}
    assert len(lost[D]) < 1000
    assert report["unmeasured"] is None
    assert not list(tmp_path.rglob("pickle-was-loaded"))
    assert not partial_of(run.out).exists()


def test_a_silo_that_releases_wrong_shares_is_lost_and_the_sum_is_opened_without_them(
    federation: Federation, tmp_path: Path
) -> None:
    """It hopes that the sum can never be opened. Its own vector is in it, so it stays; three of four are enough."""
    wrong = answered(lambda reply: reply.model_copy(update={"shares": dict.fromkeys(reply.shares, "01" * 65 + "00")}))
    run = Run(federation, tmp_path / "place", "unmask", wrong)
    run.liar = A  # the shares of the first three are those that are used
    with pytest.raises(Stopped):
        run.go(stop="merge")
    report = run.go(resume=True)
    assert [silo["name"] for silo in report["silos"]] == list(NAMES)
    assert [entry["name"] for entry in report["lost"]] == [A]
    assert report["unmeasured"] is None


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


@pytest.mark.parametrize("what", MORE_LIES)
def test_whatever_a_silo_answers_the_post_says_that_it_is_no_answer(
    federation: Federation, tmp_path: Path, what: str
) -> None:
    """As above, without the run around it: the answer of a node, and what the coordinator's post makes of it."""
    lie, run = MORE_LIES[what], Run(federation, tmp_path)

    def node(message: Message, _: Any) -> Message:
        return Message(lie(run, to_record(pack(MASKED))), reply_to=message)

    request = MaskedRequest(plan="0" * 64, session="f" * 32, sum_of="statistics", piece=0, piece_bytes=320)
    grid = InProcessGrid({D: node})
    noted: list[dict[str, Any]] = []
    office = delivery.Post(grid, noted.append)
    began = time.process_time()
    ((silo, _, found),) = office.exchange({D: grid.number(D)}, {D: [request]}, 1)
    assert (silo, type(found)) == (D, FederationError)
    assert "cannot be read" in str(found)
    assert len(str(found)) < 1000
    assert time.process_time() - began < 2
    assert [entry for entry in noted if "from" in entry] == []


def test_the_honest_answer_is_one(federation: Federation) -> None:
    grid = InProcessGrid({D: lambda message, _: Message(to_record(pack(MASKED)), reply_to=message)})
    request = MaskedRequest(plan="0" * 64, session="f" * 32, sum_of="statistics", piece=0, piece_bytes=320)
    ((_, _, found),) = delivery.Post(grid, lambda entry: None).exchange({D: grid.number(D)}, {D: [request]}, 1)
    assert isinstance(found, MaskedReply)


KEYS: dict[str, Callable[[dict[str, Any]], None]] = {
    "of low order": _low_order,
    "of low order, for the shares": lambda document: document.update(channel="00" * 32),
    "written in a second way": _beyond_the_field,
    "twice": _twice,
    "twice, but for the bit that X25519 ignores": _twice_by_the_top_bit,
}


@pytest.mark.parametrize("what", KEYS)
def test_keys_that_no_honest_silo_has_are_refused_though_they_are_signed(federation: Federation, what: str) -> None:
    roster, nonce, identity = federation.plan.roster, "f" * 32, federation.identity(D)
    good = advertise(roster, nonce, D, NAMES, identity, secrets.token_bytes).advert
    check_advert(roster, nonce, good)
    document = good.model_dump(mode="json")
    KEYS[what](document)
    advert = Advert.model_validate(document)
    signature = identity.sign(advert_statement(roster.plan, nonce, advert.fields)).hex()
    with pytest.raises(SecurityError, match="key"):
        check_advert(roster, nonce, advert.model_copy(update={"signature": signature}))


def test_what_flower_cannot_put_together_is_the_senders_loss(federation: Federation, tmp_path: Path) -> None:
    """A node's objects are parsed by Flower as they are pulled: an array without its chunks raises there."""

    class Broken(InProcessGrid):
        def pull_messages(self, message_ids: Any) -> list[Any]:
            for message_id in message_ids:
                visit, _ = self._under_way.get(message_id, (None, None))
                if visit and (visit.node, visit.phase) == (D, "masked"):
                    raise KeyError("arraychunk_ids")
            return super().pull_messages(message_ids)

    run = Run(federation, tmp_path / "place")
    run.grid = Broken
    report = run.go()
    assert [silo["name"] for silo in report["silos"]] == [A, B, C]
    assert [entry["name"] for entry in report["lost"]] == [D]


def test_a_superlink_that_is_gone_is_no_silos_loss(federation: Federation, tmp_path: Path) -> None:
    class Gone(InProcessGrid):
        def pull_messages(self, message_ids: Any) -> list[Any]:
            raise ConnectionError("connection refused")

        def get_nodes(self) -> Any:
            if self.sent:
                raise ConnectionError("connection refused")
            return super().get_nodes()

    run = Run(federation, tmp_path / "place")
    run.grid = Gone
    with pytest.raises(ConnectionError):
        run.go()


# What the coordinator's own disk did to an interrupted run


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "cut off": lambda data: data[: len(data) // 2],
    "empty": lambda data: b"",
    "one bit": lambda data: data[:-5] + bytes([data[-5] ^ 1]) + data[-4:],
    "a header of gigabytes": lambda data: b"\xff" * 8 + data[8:],
    "a file of somebody else's": lambda data: save({"masked": np.zeros(8, "<u8")}),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_piece_is_as_one_that_never_came(tmp_path: Path, damage: str) -> None:
    Spool(tmp_path).save(D, 0, {"masked": np.arange(8, dtype="<u8")})
    (path,) = (tmp_path / D).iterdir()
    path.write_bytes(DAMAGE[damage](path.read_bytes()))
    found = Spool(tmp_path)
    assert not found.has(D, 0)
    assert not path.exists()
    found.save(D, 0, {"masked": np.arange(8, dtype="<u8")})
    assert Spool(tmp_path).has(D, 0)


@pytest.mark.parametrize("stop", ["masked", "survivors"])
def test_a_damaged_piece_is_asked_for_again(federation: Federation, tmp_path: Path, stop: str) -> None:
    run = Run(federation, tmp_path / "place")
    if stop == "masked":  # after some of the pieces came
        run.phase, run.lie = "masked", _stops(after=3)
    with pytest.raises(Stopped):
        run.go(stop="" if stop == "masked" else stop)
    run.phase = ""
    (spooled,) = (partial_of(run.out) / "spool" / D).glob("000001.*")
    spooled.write_bytes(DAMAGE["one bit"](spooled.read_bytes()))
    before = run.asked[D, "masked"]
    report = run.go(resume=True)
    assert [silo["name"] for silo in report["silos"]] == list(NAMES)
    assert report["lost"] == []
    assert report["unmeasured"] is None
    if stop == "survivors":
        assert run.asked[D, "masked"] == before + 1 + 1  # the piece, and the metrics


def _stops(after: int) -> Lie:
    count = 0

    def lie(_: Run, reply: RecordDict) -> RecordDict:
        nonlocal count
        count += 1
        if count > after:
            raise Stopped
        return reply

    return lie


def test_a_piece_that_its_silo_has_no_longer_ends_the_run_once_and_for_all(
    federation: Federation, tmp_path: Path
) -> None:
    run = Run(federation, tmp_path / "place")
    with pytest.raises(Stopped):
        run.go(stop="merge")  # the silos released their shares, and their vectors are gone
    (spooled,) = (partial_of(run.out) / "spool" / B).glob("000000.*")
    spooled.write_bytes(b"")
    with pytest.raises(ContributionError, match="start it anew"):
        run.go(resume=True)
    assert not partial_of(run.out).exists()
