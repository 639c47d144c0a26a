"""Nothing leaves a silo unrecorded, and a hostile coordinator gets a reason where it wanted data."""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tomlkit
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict

from gramfuse_client.app import SiloApp
from gramfuse_client.guard.disclosure import disclose
from gramfuse_client.guard.egress import Egress
from gramfuse_client.guard.ledger import REASON, Ledger
from gramfuse_client.guard.ledger_lines import Line
from gramfuse_client.silo_file import Silo, write_identity
from gramfuse_client.state.session import Record
from gramfuse_deployment.flower_run import write_app
from gramfuse_model.project import Project
from gramfuse_protocol.contract.layout import Layout
from gramfuse_protocol.contract.plan import Plan
from gramfuse_protocol.messages.flower_records import from_record, to_record
from gramfuse_protocol.messages.phases import (
    PHASE_OF_TYPE,
    REPLIES,
    EvaluateRequest,
    JoinRequest,
    KeysRequest,
    SurvivorsRequest,
    TrainRequest,
    UploadRequest,
    message_type,
)
from gramfuse_protocol.messages.phases import Message as Said
from gramfuse_protocol.messages.wire import pack, unpack
from gramfuse_protocol.secure_sum.keys import Identity
from gramfuse_server.app import coordinate
from gramfuse_simulation.engine import simulated_silo

ROW = "zzyzx, a word of one row that nobody may ever read"
SESSION = "a" * 32


@dataclass
class Site:
    """A locked project, and one of its silos behind its door."""

    project: Any
    plan: Plan
    layout: Layout
    state: Path
    bundle: bytes | None = None
    changes: Mapping[str, Any] = field(default_factory=dict)

    def silo(self, name: str = "silo-a") -> Silo:
        silo = simulated_silo(str(self.project.silo(name)), str(self.state), self.plan.digest)
        return Silo(silo.path, silo.file.model_copy(update=dict(self.changes)))

    def ledger(self, name: str = "silo-a") -> list[Line]:
        silo = self.silo(name)
        return list(Ledger(silo.ledger, silo.name).lines())

    def send(self, content: RecordDict, kind: str) -> Message:
        message = Message(content, 101, kind)
        message.metadata.__dict__["_message_id"] = "m"
        context = Context(1, 101, {}, RecordDict(), {})
        reply = SiloApp(lambda _: self.silo(), self.bundle)(message, context)
        assert ROW not in repr(_bytes(reply))
        return reply

    def ask(self, request: Said) -> Message:
        return self.send(to_record(pack(request)), message_type(request.phase))

    def about(self, **changes: Any) -> dict[str, Any]:
        return {"plan": self.plan.digest, "session": SESSION, **changes}

    def join(self) -> Message:
        return self.ask(JoinRequest(**self.about(), plan_text=self.plan.to_toml(), layout=self.layout.to_json()))


@pytest.fixture
def site(tmp_path: Path, pico_project: Callable[..., Any], request: pytest.FixtureRequest) -> Site:
    secure = getattr(request, "param", True)
    project = pico_project(silos=4, secure=secure, examples=12)
    with (project.directory / "data" / "silo-a" / "train.jsonl").open("a") as rows:
        rows.write(json.dumps({"text": ROW, "label": project_label(project)}) + "\n")
    plan, layout = Project.read(project.directory).locked()
    identities = {name: Identity(bytes([n + 1]) * 32) for n, name in enumerate(project.names)}
    if secure:
        plan = plan.with_keys({name: identity.public.hex() for name, identity in identities.items()})
    for name, identity in identities.items():
        write_identity(tmp_path / "silos" / name / "identity.pem", identity)
    return Site(project, plan, layout, tmp_path / "silos")


def project_label(project: Any) -> str:
    first = (project.directory / "data" / "silo-a" / "train.jsonl").read_text().splitlines()[0]
    return str(json.loads(first)["label"])


def _bytes(message: Message) -> tuple[bytes, ...]:
    if message.has_error():
        return (message.error.reason.encode(),)
    frame = from_record(message.content)
    return (frame.header.encode(), *(buffer.tobytes() for buffer in frame.buffers))


def refused(reply: Message) -> str:
    """Return the type and the reason that a reply gives, which carries nothing else."""
    if reply.has_error():
        return str(reply.error.reason)
    frame = from_record(reply.content)
    said: Any = unpack(frame, REPLIES)
    assert said.phase == "refusal"
    assert not frame.buffers
    return f"{said.error}: {said.reason}"


@pytest.mark.parametrize("site", [True, False], indirect=True, ids=["secure", "open"])
def test_every_array_that_leaves_is_in_the_ledger_with_its_digest(site: Site, in_process_grid: Any) -> None:
    left: dict[str, list[tuple[str, Any]]] = {name: [] for name in site.project.names}

    def node(name: str) -> Callable[[Message, Context], Message]:
        app = SiloApp(lambda _: site.silo(name))

        def answer(message: Message, context: Context) -> Message:
            reply = app(message, context)
            frame = from_record(reply.content)
            for arrays in reply.content.array_records.values():
                assert sum(len(array.data) for array in arrays.values()) >= sum(b.nbytes for b in frame.buffers)
            left[name].append((message.metadata.message_type, frame))
            return reply

        return answer

    grid = in_process_grid({name: node(name) for name in site.project.names})
    coordinate(grid, site.plan, site.layout, site.project.directory, site.state.parent / "run")
    for name, frames in left.items():
        lines = site.ledger(name)
        assert [line.entry.phase for line in lines] == [PHASE_OF_TYPE[kind] for kind, _ in frames]
        for line, (_, frame) in zip(lines, frames, strict=True):
            said = unpack(frame, REPLIES)
            header = frame.header.encode()
            expected = [("header", "json", (), len(header), hashlib.sha256(header).hexdigest())]
            for label, array in said.arrays.items():
                data = np.ascontiguousarray(array).tobytes()
                expected.append((label, str(array.dtype), array.shape, len(data), hashlib.sha256(data).hexdigest()))
            assert [(i.name, i.dtype, i.shape, i.bytes, i.sha256) for i in line.entry.items] == expected
            assert line.entry.bytes == frame.nbytes
            assert (line.entry.plan, line.entry.session) == (said.plan, said.session)
        forms = {line.entry.phase: line.entry.form for line in lines}
        if site.plan.privacy.secure_aggregation:
            assert forms == {
                "join": "no data", "train": "no data", "keys": "public keys", "shares": "sealed shares",
                "masked": "masked", "survivors": "signature", "unmask": "shares", "evaluate": "no data",
                "finish": "no data",
            }  # fmt: skip
        else:
            assert forms == {
                "join": "no data", "train": "open", "upload": "open", "evaluate": "open", "finish": "no data"
            }  # fmt: skip
        # What `silo check` says beforehand is what leaves, to the byte; how many digits a count has is not known then.
        said = [departure for departure in disclose(name, site.plan, site.layout).departures if departure.bytes]
        assert {departure.phase: departure.form for departure in said} == forms
        promised, left_in = Counter[str](), Counter[str]()
        for departure in said:
            promised[departure.phase] += departure.bytes or 0
        for line in lines:
            left_in[line.entry.phase] += line.entry.bytes
        counts = {} if site.plan.privacy.secure_aggregation else {"train": promised["train"] - left_in["train"]}
        assert promised - left_in == counts
        assert not left_in - promised


def _extra(reply: Message) -> None:
    reply.content["more"] = MetricRecord({"loss": 0.5})


def _extra_array(reply: Message) -> None:
    reply.content.array_records["arrays"]["rows"] = Array(np.frombuffer(ROW.encode(), np.uint8))


def _extra_value(reply: Message) -> None:
    reply.content.config_records["header"]["row"] = ROW


def _longer(reply: Message) -> None:
    reply.content.array_records["arrays"]["000000"] = Array(np.frombuffer(ROW.encode(), np.uint8))


def _not_a_frame(reply: Message) -> None:
    reply.content["header"] = ConfigRecord({"json": json.dumps({"rows": ROW})})


@pytest.mark.parametrize("change", [_extra, _extra_array, _extra_value, _longer, _not_a_frame])
def test_what_is_not_a_message_of_the_protocol_does_not_leave(site: Site, change: Callable[[Message], None]) -> None:
    site.join()
    request = TrainRequest(**site.about())
    message = Message(to_record(pack(request)), 101, "train")
    message.metadata.__dict__["_message_id"] = "m"

    def leaking(message: Message, context: Context) -> Message:
        reply = SiloApp(lambda _: site.silo())(message, context)
        change(reply)
        return reply

    before = len(site.ledger())
    reply = Egress(site.silo())(message, Context(1, 101, {}, RecordDict(), {}), leaking)
    assert ROW not in repr(_bytes(reply))
    assert "cannot be read" in refused(reply) or "FederationError" in refused(reply)
    assert [line.entry.kind for line in site.ledger()[before:]] == ["reply", "refusal"]


def test_an_exception_says_nothing_of_what_it_quotes(site: Site) -> None:
    def raising(message: Message, context: Context) -> Message:
        raise ValueError(ROW)

    message = Message(to_record(pack(TrainRequest(**site.about()))), 101, "train")
    message.metadata.__dict__["_message_id"] = "m"
    reply = Egress(site.silo())(message, Context(1, 101, {}, RecordDict(), {}), raising)
    assert refused(reply).partition(":")[0] == "GramfuseError"
    assert ROW not in site.silo().ledger.read_text()


def test_without_a_ledger_nothing_leaves(site: Site) -> None:
    site.join()
    site.silo().ledger.chmod(0o644)  # the ledger refuses what others can read, as it does a full disk
    assert refused(site.ask(TrainRequest(**site.about()))) == f"LedgerError: {REASON}"


def zipped(files: Mapping[str, str]) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as bundle:
        for name, text in files.items():
            bundle.writestr(name, text)
    return content.getvalue()


def app_of(site: Site, tmp_path: Path) -> dict[str, Any]:
    write_app(tmp_path / "app", site.plan, site.layout)
    return tomlkit.parse((tmp_path / "app" / "pyproject.toml").read_text()).unwrap()


def other_component(app: dict[str, Any]) -> dict[str, str]:
    app["tool"]["flwr"]["app"]["components"]["clientapp"] = "gramfuse_client.thief:app"
    return {"pyproject.toml": tomlkit.dumps(app), ".info/CONTENT": ""}


def shadow(app: dict[str, Any]) -> dict[str, str]:
    return {"pyproject.toml": tomlkit.dumps(app), ".info/CONTENT": "", "gramfuse_client/app.py": "import os"}


def other_plan(app: dict[str, Any]) -> dict[str, str]:
    config = app["tool"]["flwr"]["app"]["config"]
    config["plan"] = config["plan"].replace('name = "pico"', 'name = "other"')
    return {"pyproject.toml": tomlkit.dumps(app), ".info/CONTENT": ""}


def no_plan(app: dict[str, Any]) -> dict[str, str]:
    del app["tool"]["flwr"]["app"]["config"]["plan"]
    return {"pyproject.toml": tomlkit.dumps(app), ".info/CONTENT": ""}


def bomb(app: dict[str, Any]) -> dict[str, str]:
    return {"pyproject.toml": tomlkit.dumps(app), ".info/CONTENT": "0" * (65 * 2**20)}


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        (other_component, "not one of gramfuse's"),
        (shadow, "not one of gramfuse's"),
        (no_plan, "not one of gramfuse's"),
        (bomb, "not one of gramfuse's"),
        (other_plan, "approved"),
    ],
)
def test_another_bundle_is_refused_and_recorded(
    site: Site, tmp_path: Path, files: Callable[[dict[str, Any]], dict[str, str]], reason: str
) -> None:
    site.bundle = zipped(files(app_of(site, tmp_path)))
    assert reason in refused(site.join())
    stolen = site.send(RecordDict({"anything": ConfigRecord({"please": "rows"})}), "query.steal")
    assert reason in refused(stolen)  # no need to speak the protocol to be told
    assert [(line.entry.kind, reason in line.entry.note) for line in site.ledger()] == [
        ("refusal", True),
        ("error", True),
    ]
    assert not (site.silo().state / site.plan.digest).exists()


@pytest.mark.parametrize("content", [b"", b"no zip at all", zipped({"a": ""})], ids=["nothing", "text", "a zip"])
def test_what_is_no_bundle_at_all_is_refused(site: Site, content: bytes) -> None:
    site.bundle = content
    assert "not one of gramfuse's" in refused(site.join())


def test_the_bundle_of_gramfuse_run_is_let_in(site: Site, tmp_path: Path) -> None:
    app = app_of(site, tmp_path)
    site.bundle = zipped({"pyproject.toml": tomlkit.dumps(app), ".info/CONTENT": ""})
    assert unpack(from_record(site.join().content), REPLIES).phase == "join"


class Hostile:
    """What a coordinator may try; each returns the silo's answer."""

    @staticmethod
    def other_plan(site: Site) -> Message:
        other = Plan.parse(site.plan.to_toml().replace("epochs = 2", "epochs = 3"))
        about = site.about(plan=other.digest)
        return site.ask(JoinRequest(**about, plan_text=other.to_toml(), layout=site.layout.to_json()))

    @staticmethod
    def other_plan_under_an_approved_digest(site: Site) -> Message:
        text = site.plan.to_toml().replace("epochs = 2", "epochs = 3")
        return site.ask(JoinRequest(**site.about(), plan_text=text, layout=site.layout.to_json()))

    @staticmethod
    def other_base_model(site: Site) -> Message:
        other = Plan.parse(site.plan.to_toml().replace(site.plan.model.sha256 or "", "0" * 64))
        site.changes = {"approved": (site.plan.digest, other.digest)}
        about = site.about(plan=other.digest)
        return site.ask(JoinRequest(**about, plan_text=other.to_toml(), layout=site.layout.to_json()))

    @staticmethod
    def other_layout(site: Site) -> Message:
        blocks = json.loads(site.layout.to_json())
        other = json.dumps({**blocks, "tensors": blocks["tensors"][:1]}) if "tensors" in blocks else "{}"
        return site.ask(JoinRequest(**site.about(), plan_text=site.plan.to_toml(), layout=other))

    @staticmethod
    def open_upload(site: Site) -> Message:
        trained(site)
        return site.ask(UploadRequest(**site.about(), piece=0, piece_bytes=1 << 20))

    @staticmethod
    def unknown_type(site: Site) -> Message:
        trained(site)
        return site.send(to_record(pack(TrainRequest(**site.about()))), "query.rows")

    @staticmethod
    def phase_in_another_type(site: Site) -> Message:
        trained(site)
        return site.send(to_record(pack(UploadRequest(**site.about(), piece=0, piece_bytes=1 << 20))), "query.masked")

    @staticmethod
    def unknown_survivors(site: Site) -> Message:
        trained(site)
        site.ask(KeysRequest(**site.about(), cohort=site.plan.names))
        return site.ask(SurvivorsRequest(**site.about(), sum_of="statistics", survivors=("silo-a",)))

    @staticmethod
    def array_far_larger_than_the_layout(site: Site) -> Message:
        trained(site)
        arrays = {"delta:everything": np.zeros(3_000_000, np.float32)}
        return site.ask(EvaluateRequest(**site.about(), candidate="regmean", arrays=arrays))

    @staticmethod
    def records_beside_the_frame(site: Site) -> Message:
        trained(site)
        content = to_record(pack(TrainRequest(**site.about())))
        content["code"] = ArrayRecord({"0": Array(np.zeros(3, np.uint8))})
        return site.send(content, "train")


def trained(site: Site) -> None:
    assert unpack(from_record(site.join().content), REPLIES).phase == "join"
    assert unpack(from_record(site.ask(TrainRequest(**site.about())).content), REPLIES).phase == "train"


ATTEMPTS = [name for name in vars(Hostile) if not name.startswith("_")]


@pytest.mark.parametrize("attempt", ATTEMPTS)
def test_a_hostile_coordinator_gets_a_reason_and_no_data(site: Site, attempt: str) -> None:
    reason = refused(getattr(Hostile, attempt)(site))
    last = site.ledger()[-1].entry
    assert last.kind in ("refusal", "error")
    assert last.form == "reason"
    assert last.note == reason
    assert all(item.name == "header" for item in last.items)
    assert "GramfuseError" not in reason  # a hostile message is not an unexpected one


def test_a_second_contribution_is_refused_whoever_else_is_in_the_sum(site: Site, in_process_grid: Any) -> None:
    apps = {name: SiloApp(lambda _, name=name: site.silo(name)) for name in site.project.names}
    coordinate(in_process_grid(apps), site.plan, site.layout, site.project.directory, site.state.parent / "run")
    request = JoinRequest(**site.about(), plan_text=site.plan.to_toml(), layout=site.layout.to_json())
    assert "contributed" in refused(site.ask(request))
    assert site.ledger()[-1].entry.kind == "refusal"
    kept = [path for path in (site.silo().state / site.plan.digest / "sessions").rglob("*") if path.is_file()]
    assert [path.name for path in kept] == ["session.json"]  # what the session kept was wiped when it was over
    assert Record.model_validate_json(kept[0].read_bytes()) == Record(ended="the run is over")
