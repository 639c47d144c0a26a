"""`gramfuse silo check`: each thing that is wrong is named with what to do, and what would leave is all that would."""

from __future__ import annotations

import json
import shutil
import signal
import socket
import ssl
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.hashes import SHA256
from tokenizers.normalizers import BertNormalizer

from gramfuse_cli.commands import silo_check as cli_check
from gramfuse_cli.main import main
from gramfuse_client.data.examples import Examples, load
from gramfuse_client.dry_run import of_coordinator as connection
from gramfuse_client.dry_run import of_inputs, of_machine
from gramfuse_client.dry_run.check import DryRun, check
from gramfuse_client.dry_run.findings import Findings
from gramfuse_client.guard import disclosure, policy
from gramfuse_client.guard.disclosure import leaves
from gramfuse_client.guard.ledger import Ledger
from gramfuse_client.guard.ledger_lines import Entry
from gramfuse_client.silo_file import Data, Silo, SiloFile, write_identity
from gramfuse_client.state.state import Contributed, State
from gramfuse_deployment.certificates import Authority, certificate_pem, key_pem, new_key, server_names
from gramfuse_model.loading.base_model import load_base
from gramfuse_model.project import Project
from gramfuse_protocol.contract import node_key
from gramfuse_protocol.contract.layout import Layout
from gramfuse_protocol.contract.plan import Plan
from gramfuse_protocol.errors import RefusalError
from gramfuse_protocol.messages.phases import JoinReply, MaskedReply, SharesReply, UnmaskReply
from gramfuse_protocol.messages.wire import pack
from gramfuse_protocol.secure_sum.keys import Identity
from gramfuse_protocol.tasks.registry import kind_of

NAME = "silo-a"
YEAR = timedelta(days=365)


@dataclass
class Coordinator:
    """A coordinator's proxy, as far as a check sees it. All of it can be changed while it runs.

    Args:
        statuses: by path; 404 for others.
        ahead: how far its clock is.
        dated: whether it tells its time.
        asked: the paths that were asked for.
    """

    directory: Path
    authority: Authority
    port: int = 0
    statuses: dict[str, int] = field(default_factory=dict)
    ahead: timedelta = timedelta()
    dated: bool = True
    asked: list[str] = field(default_factory=list)
    context: ssl.SSLContext = field(default_factory=lambda: ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER))

    def certify(
        self, names: list[x509.GeneralName], begin: datetime, days: int, authority: Authority | None = None
    ) -> None:
        """Show another certificate from now on."""
        key = new_key()
        certificate = (authority or self.authority).certify(key.public_key(), names, begin, days)
        (self.directory / "server.crt").write_bytes(certificate_pem(certificate))
        (self.directory / "server.key").write_bytes(key_pem(key))
        self.context.load_cert_chain(self.directory / "server.crt", self.directory / "server.key")


@pytest.fixture
def coordinator(tmp_path: Path) -> Iterator[Coordinator]:
    now = datetime.now(UTC)
    directory = tmp_path / "coordinator"
    directory.mkdir()
    hosts = server_names(["merge.example.org"])
    ours = Coordinator(directory, Authority.create("pico CA", hosts, now - 2 * YEAR, 3650))
    ours.certify(server_names([]), now, 397)
    (directory / "ca.crt").write_bytes(certificate_pem(ours.authority.certificate))

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            ours.asked.append(self.path)
            self.send_response_only(ours.statuses.get(self.path, 404))
            if ours.dated:
                self.send_header("Date", format_datetime(datetime.now(UTC) + ours.ahead, usegmt=True))
            self.send_header("Content-Length", "0")
            self.end_headers()

        def do_POST(self) -> None:
            self.do_GET()

        def log_message(self, *_: Any) -> None:
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def finish_request(self, request: Any, client_address: Any) -> None:
            try:
                with ours.context.wrap_socket(request, server_side=True) as secured:
                    super().finish_request(secured, client_address)
            except OSError:
                pass  # the silo did not like what it saw

    with Server(("127.0.0.1", 0), Handler) as server:
        ours.port = server.server_address[1]
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        yield ours
        server.shutdown()


@dataclass
class Site:
    """A project that is locked and approved by a silo that has all that it needs."""

    project: Any
    silo: Path
    plan: Plan

    def edit(self, old: str, new: str) -> None:
        self.project.replace(self.silo, old, new)

    def lock(self) -> None:
        """Lock the plan anew, and approve it."""
        project = Project.read(self.project.directory)
        plan, layout = Project(project.directory, project.plan.unlocked()).locked()
        project.write_lock(plan, layout)
        self.edit(self.plan.digest, plan.digest)
        self.plan = plan

    def check(self, **options: Any) -> DryRun:
        return check(self.silo, self.project.directory, **options)


@pytest.fixture
def make_site(pico_project: Callable[..., Any], tmp_path: Path) -> Callable[..., Site]:
    """Return a function that makes a site; with a coordinator, its silo dials it."""

    def make(coordinator: Coordinator | None = None, secure: bool = True) -> Site:
        project = pico_project(silos=4, secure=secure)
        for name in project.names:
            private, line = node_key.generate()
            project.replace(project.plan, f'name = "{name}"\n', f'name = "{name}"\nnode-key = "{line}"\n')
            if name == NAME:
                path = project.directory / "state" / f"{name}.key"
                path.parent.mkdir(exist_ok=True)
                path.touch(mode=0o600)
                path.write_text(private)
        read = Project.read(project.directory)
        plan, layout = read.locked()
        read.write_lock(plan, layout)
        silo = project.silo(NAME)
        project.replace(silo, "approved = []", f'approved = ["{plan.digest}"]')
        port, ca = (coordinator.port, coordinator.directory / "ca.crt") if coordinator else (1, tmp_path / "ca.crt")
        with silo.open("a") as file:
            file.write(
                f'\n[coordinator]\naddress = "127.0.0.1:{port}"\nca = "{ca}"\nnode-key = "../state/{NAME}.key"\n'
            )
        return Site(project, silo, plan)

    return make


@pytest.fixture
def site(make_site: Callable[..., Site], coordinator: Coordinator) -> Site:
    return make_site(coordinator)


@pytest.fixture
def gramfuse(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Iterator[Callable[..., Any]]:
    """Return a function that runs a command in this process and returns exit code, standard output and error."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}

    def run(*arguments: str | Path) -> tuple[Any, str, str]:
        monkeypatch.setattr(sys, "argv", ["gramfuse", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as caught:
            main()
        return (caught.value.code, *capfd.readouterr())

    yield run
    for number, handler in before.items():
        signal.signal(number, handler)


def tree(directory: Path) -> dict[str, tuple[float, bytes | None]]:
    return {
        str(path): (path.stat().st_mtime, path.read_bytes() if path.is_file() else None)
        for path in directory.rglob("*")
    }


def problems(report: DryRun) -> dict[str, str]:
    """What stands in the way, by subject: what was found, and what to do."""
    found = report.findings.problems
    assert all(finding.remedy for finding in found)
    return {finding.subject: f"{finding.what}\n{finding.remedy}" for finding in found}


def finding(report: DryRun, subject: str) -> Any:
    (found,) = [finding for finding in report.findings if finding.subject == subject]
    return found


# All is well


@pytest.mark.parametrize("secure", [True, False], ids=["secure", "open"])
def test_a_silo_that_is_ready_is_told_so_and_nothing_is_written(
    make_site: Callable[..., Site], coordinator: Coordinator, gramfuse: Callable[..., Any], secure: bool
) -> None:
    site = make_site(coordinator, secure)
    if not secure:
        write_identity(site.project.identity(NAME), Identity(bytes(32)))
    before = tree(site.project.directory)
    code, out, err = gramfuse("silo", "check", site.silo, "--plan", site.project.plan)
    assert code == 0, out + err
    assert tree(site.project.directory) == before
    assert not Silo.read(site.silo).state.exists()
    assert "PROBLEM" not in out
    assert site.plan.digest in out
    assert "24 training examples ('animals' 22, 'weather' 2, 'kitchen' 0), 20 held out" in out
    assert "What does not leave" in out
    if secure:
        assert "nobody: random words" in out
        assert "over at least 3 of the 4 silos" in out
    else:
        assert "Open: the coordinator sees each silo's statistics" in out
    assert coordinator.asked == [connection.NOTHING, *connection.HIDDEN]


def test_as_json_it_is_one_object_with_the_same_in_it(site: Site, gramfuse: Callable[..., Any]) -> None:
    code, out, _ = gramfuse("silo", "check", site.silo, "--plan", site.project.directory, "--json")
    document = json.loads(out)
    assert code == 0
    assert document["ready"]
    assert "error" not in document
    assert document["plan"]["digest"] == site.plan.digest
    assert {finding["state"] for finding in document["findings"]} == {"ok"}
    leaves = document["leaves"]
    assert leaves["bytes"] == sum(departure["bytes"] or 0 for departure in leaves["departures"])
    assert [d["phase"] for d in leaves["departures"]] == [
        "connection", "join", "train", "keys", "shares", "masked", "survivors", "unmask",
        "evaluate", "masked", "survivors", "unmask", "finish", "any",
    ]  # fmt: skip
    contribution = leaves["departures"][5]
    layout = Layout.read(site.project.directory / "layout.json")
    assert [(p["name"], tuple(p["shape"])) for p in contribution["parts"]] == [(b.name, b.shape) for b in layout.sums]
    assert sum(part["bytes"] for part in contribution["parts"]) == 8 * layout.sum_entries
    assert 0 < contribution["bytes"] - 8 * layout.sum_entries < 300  # its header


def test_sizes_are_those_of_the_messages(site: Site) -> None:
    layout = Layout.read(site.project.directory / "layout.json")
    about: dict[str, Any] = {"plan": site.plan.digest, "session": "a" * 32, "silo": NAME}
    by_phase = {d.phase: d.bytes for d in reversed(leaves(NAME, site.plan, layout).departures)}
    words = np.zeros(layout.sum_entries, np.uint64)
    sealed = {name: "ab" * 280 for name in site.plan.names if name != NAME}
    for reply in (
        JoinReply(**about),
        SharesReply(**about, sealed=sealed),
        MaskedReply(**about, sum_of="statistics", piece=0, arrays={"masked": words}),
        UnmaskReply(**about, sum_of="statistics", shares=dict.fromkeys(site.plan.names, "cd" * 66)),
    ):
        assert by_phase[reply.phase] == pack(reply).nbytes


def test_what_leaves_in_rounds_is_counted_as_often(site: Site) -> None:
    layout = Layout.read(site.project.directory / "layout.json")
    merge = site.plan.merge.model_copy(update={"rounds": 3})
    once, often = (leaves(NAME, p, layout) for p in (site.plan, site.plan.model_copy(update={"merge": merge})))
    for one, three in zip(once.departures, often.departures, strict=True):
        assert three.bytes == (one.bytes if one.phase in ("connection", "finish", "any") else 3 * (one.bytes or 0))
        assert three.parts == one.parts
    assert any("3 rounds" in claim for claim in often.claims)


def test_a_contribution_in_pieces_has_as_many_headers(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = Layout.read(site.project.directory / "layout.json")
    whole = leaves(NAME, site.plan, layout).departures[5]
    monkeypatch.setattr(disclosure, "PIECE_BYTES", 16384)
    pieces = leaves(NAME, site.plan, layout).departures[5]
    assert "in 5 pieces" in pieces.what
    assert 4 * 200 < (pieces.bytes or 0) - (whole.bytes or 0) < 4 * 300


def test_how_many_may_collude_is_what_the_terms_withstand(make_site: Callable[..., Site]) -> None:
    site = make_site()
    layout = Layout.read(site.project.directory / "layout.json")
    five = [*site.plan.silo, site.plan.silo[0].model_copy(update={"name": "silo-e"})]
    said = " ".join(leaves(NAME, site.plan.model_copy(update={"silo": tuple(five)}), layout).claims)
    assert "at least 4 of the 5 silos" in said
    assert "at most 2 silos work together with the coordinator" in said
    assert "The plan asks for 1" in said
    assert "a sum over at least 2 silos, this one among them" in said


def test_long_lists_are_shortened_for_people_and_whole_with_all(
    site: Site, gramfuse: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli_check, "MOST_LINES", 20)
    arguments = ("silo", "check", site.silo, "--plan", site.project.directory, "--offline")
    _, out, _ = gramfuse(*arguments)
    assert "s:bert.encoder.layer.*.output.dense (×2)" in out
    assert "s:bert.encoder.layer.1.output.dense" not in out
    _, out, _ = gramfuse(*arguments, "--all")
    assert "s:bert.encoder.layer.1.output.dense" in out


def test_a_plan_cannot_write_over_what_is_printed(site: Site, gramfuse: Callable[..., Any]) -> None:
    site.project.replace(site.project.plan, '"kitchen"', r'"kitchen", "\u001b[2Jx\n  ok      approval"')
    code, out, _ = gramfuse("silo", "check", site.silo, "--plan", site.project.directory, "--offline")
    assert code == 19
    assert "\x1b" not in out
    assert "U+001B" in out
    assert not [line for line in out.splitlines() if line.startswith("  ok      approval")]


def test_offline_the_coordinator_is_left_alone(
    site: Site, coordinator: Coordinator, gramfuse: Callable[..., Any]
) -> None:
    code, out, _ = gramfuse("silo", "check", site.silo, "--plan", site.project.directory, "--offline")
    assert code == 0
    assert out.count("--offline") == len(connection.REMOTE)
    assert coordinator.asked == []


def test_without_a_plan_it_is_one_that_was_joined(site: Site) -> None:
    layout = Layout.read(site.project.directory / "layout.json")
    state = Silo.read(site.silo).state
    state.mkdir(mode=0o700)
    assert "gramfuse silo check" in problems(check(site.silo, offline=True))["plan"]
    older, other = site.plan, site.plan.override(["merge.alpha=0.5"])
    for plan in (older, other):
        State(state, plan.digest).join(plan.to_toml(), layout)
    report = check(site.silo, offline=True)
    assert not problems(report)
    assert report.plan["digest"] == older.digest  # approved, though the other is newer
    assert "1 more were joined" in finding(report, "plan").what


# The silo file, the plan, the data


def test_a_silo_file_that_cannot_be_read_is_all_that_is_said(site: Site) -> None:
    site.edit("[limits]", "[limit]")
    report = site.check()
    assert problems(report).keys() == {"silo file"}
    assert "unknown key 'limit'" in problems(report)["silo file"]
    assert report.disclosure is None


def _not_approved(site: Site) -> None:
    site.edit(site.plan.digest, "1" * 64)


def _not_in_the_roster(site: Site) -> None:
    site.edit(f'name = "{NAME}"', 'name = "silo-x"')


def _another_without_a_key(site: Site) -> None:
    site.project.replace(site.project.plan, f'public-key = "{site.plan.silo[1].public_key}"\n', "")
    site.lock()


def _less_metrics(site: Site) -> None:
    site.edit('metrics = "sum"', 'metrics = "none"')


def _words_told(site: Site) -> None:
    site.project.replace(site.project.plan, "[merge]", '[merge]\ncontext-free = "full"')
    site.lock()


def _fewer_bytes(site: Site) -> None:
    site.edit("[limits]", "[limits]\nmaximum-bytes = 1000")


def _more_examples(site: Site) -> None:
    site.edit("minimum-examples = 10", "minimum-examples = 100")


def _contributed(site: Site) -> None:
    train, _ = load(Silo.read(site.silo), site.plan.task_of(NAME))
    state = State(Silo.read(site.silo).state, site.plan.digest)
    Silo.read(site.silo).state.mkdir(mode=0o700)
    state.directory.mkdir(mode=0o700)
    state.contribute(Contributed(sessions={1: ("a" * 32,)}, data=train.digest))


def _other_data_contributed(site: Site) -> None:
    _contributed(site)
    site.edit("[limits]", "[limits]\nrepeat-contributions = true")
    with site.project.train(NAME).open("a") as file:
        file.write('{"text": "a new cat", "label": "animals"}\n')


def _damaged_contributed(site: Site) -> None:
    _contributed(site)
    (Silo.read(site.silo).state / site.plan.digest / "contributed.json").write_text("{")


def _unknown_label(site: Site) -> None:
    with site.project.train(NAME).open("a") as file:
        file.write('{"text": "a cat", "label": "cats"}\n')


def _no_data(site: Site) -> None:
    site.project.train(NAME).unlink()


def _open_key(site: Site) -> None:
    site.project.identity(NAME).chmod(0o644)


def _no_identity(site: Site) -> None:
    site.project.identity(NAME).unlink()


def _other_identity(site: Site) -> None:
    site.project.identity(NAME).unlink()
    write_identity(site.project.identity(NAME), Identity(bytes(32)))


def _no_node_key(site: Site) -> None:
    Silo.read(site.silo).node_key_path.unlink()


def _other_node_key(site: Site) -> None:
    Silo.read(site.silo).node_key_path.write_text(node_key.generate()[0])


def _node_key_not_in_the_plan(site: Site) -> None:
    line = Silo.read(site.silo).node_key()
    site.project.replace(site.project.plan, f'node-key = "{line}"\n', "")
    site.lock()


def _other_base(site: Site) -> None:
    site.project.replace(site.project.plan, site.plan.model.sha256 or "", "2" * 64)
    site.edit(site.plan.digest, Plan.read(site.project.plan).digest)


def _no_base(site: Site) -> None:
    site.edit("[data]", 'base = "nowhere/at/all"\n[data]')


def _base_on_the_hub(site: Site) -> None:
    site.edit("[data]", 'base = "gramfuse/no-such-model"\n[data]')


def _other_layout(site: Site) -> None:
    site.project.replace(site.project.plan, site.plan.merge.layout or "", "3" * 64)
    site.edit(site.plan.digest, Plan.read(site.project.plan).digest)


def _not_locked(site: Site) -> None:
    site.project.replace(site.project.plan, f'layout = "{site.plan.merge.layout}"', "")
    site.edit(site.plan.digest, Plan.read(site.project.plan).digest)


def _no_gpu(site: Site) -> None:
    site.edit('device = "cpu"', 'device = "mps"')


def _wide_state(site: Site) -> None:
    Silo.read(site.silo).state.mkdir(mode=0o755)


def _no_coordinator(site: Site) -> None:
    Silo.read(site.silo).node_key_path.rename(site.silo.with_suffix(".key"))
    site.silo.write_text(site.silo.read_text().partition("[coordinator]")[0])


def _no_authority(site: Site) -> None:
    Silo.read(site.silo).ca_path.unlink()


def _no_certificate(site: Site) -> None:
    Silo.read(site.silo).ca_path.write_text("-----BEGIN NONSENSE-----")


@pytest.mark.parametrize(
    ("change", "subject", "words"),
    [
        (_not_approved, "approval", ['approved = ["' + "1" * 64 + '", "{digest}"]', "gramfuse plan show {project}"]),
        (_not_in_the_roster, "roster", ["'silo-x'", "silo-a, silo-b", "correct 'name'"]),
        (_another_without_a_key, "roster", ["no public key for silo-b", "gramfuse silo keygen"]),
        (_less_metrics, "metrics", ["'none'", 'metrics = "sum"', "[limits]"]),
        (_words_told, "vocabulary", ["merge.context-free = 'full'", 'context-free = "full"', "[limits]"]),
        (_fewer_bytes, "size", ["maximum-bytes", "71,408", "block:128"]),
        (_more_examples, "data", ["24 training examples", "'limits.minimum-examples' = 100"]),
        (_contributed, "repeat", ["contributed under this plan before", "same silos", "--resume"]),
        (_other_data_contributed, "data", ["other data were contributed", "same silos"]),
        (_damaged_contributed, "repeat", ["contributed.json", "damaged", "gramfuse silo ledger show"]),
        (_unknown_label, "data", ["train.jsonl:25", "unknown label 'cats'"]),
        (_no_data, "data", ["no such file", "[data]"]),
        (_open_key, "identity", ["chmod 600"]),
        (_no_identity, "identity", ["gramfuse silo keygen"]),
        (_other_identity, "identity", ["roster has", 'public-key = "3b6a27bc']),
        (_no_node_key, "node key", ["gramfuse silo keygen"]),
        (_other_node_key, "node key", ["roster has another key", 'node-key = "ecdsa']),
        (_node_key_not_in_the_plan, "node key", ["roster has no key", 'node-key = "ecdsa']),
        (_other_base, "base model", ["locked to " + "2" * 64, 'base = "DIRECTORY"']),
        (_no_base, "base model", ["nowhere/at/all", 'base = "DIRECTORY"']),
        (_base_on_the_hub, "base model", ["not on this machine", "hf download gramfuse/no-such-model"]),
        (_other_layout, "layout", ["locked to " + "3" * 64, "same versions"]),
        (_not_locked, "lock", ["not locked", "gramfuse plan lock"]),
        (_no_gpu, "device", ["torch finds none", 'device = "auto"']),
        (_wide_state, "state", ["mode 755", "chmod 700"]),
        (_no_coordinator, "coordinator", ["[coordinator]", "address"]),
        (_no_authority, "authority", ["No such file", "ca.crt"]),
        (_no_certificate, "authority", ["no certificate", "ca.crt"]),
    ],
)
def test_what_is_wrong_is_named_with_what_to_do(
    site: Site, change: Callable[[Site], None], subject: str, words: list[str]
) -> None:
    change(site)
    found = problems(site.check(offline=True))
    assert found.keys() == {subject}, found
    for word in words:
        assert word.format(digest=Plan.read(site.project.plan).digest, project=site.project.directory) in found[subject]


def test_bad_rows_are_counted_and_left_out_as_the_silo_file_allows(site: Site, gramfuse: Callable[..., Any]) -> None:
    with site.project.train(NAME).open("a") as file:
        file.write('{"text": "a cat", "label": "cats"}\n{"text": "a cat", "label": null}\n')
    arguments = ("silo", "check", site.silo, "--plan", site.project.directory, "--offline", "--json")
    assert "2 of 26 rows cannot be used" in problems(site.check(offline=True))["data"]
    code, out, _ = gramfuse(*arguments, "--skip-bad", "5")
    found = [finding for finding in json.loads(out)["findings"] if finding["state"] == "problem"]
    assert code == 19, "a run would fail"
    assert [finding["subject"] for finding in found] == ["bad rows"]
    assert "train.jsonl:25: unknown label 'cats'" in found[0]["what"]
    assert "train.jsonl:26: a label must be text" in found[0]["what"]
    site.edit("[data]", f"[data]\n{found[0]['remedy'].splitlines()[-1]}")
    report = site.check(offline=True)
    assert not problems(report)
    assert "2 bad rows are left out" in finding(report, "bad rows").what
    assert "24 training examples" in finding(report, "data").what


def test_open_uploads_are_named(make_site: Callable[..., Site], coordinator: Coordinator) -> None:
    site = make_site(coordinator, secure=False)
    write_identity(site.project.identity(NAME), Identity(bytes(32)))
    site.edit("open-uploads = true", "open-uploads = false")
    found = problems(site.check(offline=True))
    assert found.keys() == {"uploads"}
    assert "open-uploads = true" in found["uploads"]


def test_what_only_the_policy_knows_is_named_too(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(policy, "refusals", lambda *_: [("fee", RefusalError("a rule that came later; do this"))])
    assert problems(site.check(offline=True)) == {"fee": "a rule that came later\ndo this"}


def test_all_problems_are_named_and_as_json_in_one_object(
    site: Site, coordinator: Coordinator, gramfuse: Callable[..., Any]
) -> None:
    for change in (_not_approved, _less_metrics, _open_key, _more_examples, _fewer_bytes):
        change(site)
    coordinator.statuses["/v1/control/start-run"] = 405
    arguments = ("silo", "check", site.silo, "--plan", site.project.directory)
    code, out, err = gramfuse(*arguments)
    assert code == 19
    assert out.count("PROBLEM") == 6
    assert "6 problems: approval, metrics, identity, data, size, control API" in err
    assert "What would leave" in out
    code, out, err = gramfuse(*arguments, "--json")
    document = json.loads(out)
    assert code == 19
    assert not document["ready"]
    assert document["error"]["type"] == "CheckError"
    assert document["error"]["exit_code"] == 19
    assert [f["subject"] for f in document["findings"] if f["state"] == "problem"] == [
        "approval", "metrics", "identity", "data", "size", "control API"
    ]  # fmt: skip
    assert "6 problems" in err


def test_outside_of_its_hours_a_silo_is_ready_and_says_when(site: Site) -> None:
    site.edit("[limits]", '[limits]\ntrain-hours = "20:00-06:00"')
    noon = datetime(2027, 1, 1, 12, tzinfo=UTC)
    hours = finding(site.check(offline=True, now=noon), "hours")
    assert hours.state == "ok"
    assert "12:00" in hours.what
    assert "20:00-06:00" in hours.what
    assert "refused" in hours.remedy
    assert not finding(site.check(offline=True, now=noon.replace(hour=21)), "hours").remedy


# This machine


def test_too_little_room_or_memory_is_named(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(of_machine.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 10**6))
    monkeypatch.setattr(of_machine, "available_memory", lambda: 10**6)
    found = problems(site.check(offline=True))
    assert found.keys() == {"disk", "memory"}
    assert "1.0 MB are free" in found["disk"]
    assert "masked vector 0.1 MB" in found["disk"]
    assert "1.0 MB are free" in found["memory"]
    assert "block:128" in found["memory"]


def test_a_state_directory_that_cannot_be_made_is_named(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(of_machine.os, "access", lambda *_: False)
    assert "install -d -m 700" in problems(site.check(offline=True))["state"]
    Silo.read(site.silo).state.mkdir(mode=0o700)
    assert "cannot write" in problems(site.check(offline=True))["state"]
    Silo.read(site.silo).state.rmdir()
    Silo.read(site.silo).state.touch()
    assert "no directory" in problems(site.check(offline=True))["state"]


@pytest.fixture
def ledger(site: Site) -> Ledger:
    silo = Silo.read(site.silo)
    ledger = Ledger(silo.ledger, NAME)
    for note in ("one", "two"):
        ledger.append(Entry(phase="join", kind="refusal", form="reason", note=note), datetime(2026, 2, 3, tzinfo=UTC))
    return ledger


def test_a_ledger_that_holds_together_is_summed_up(site: Site, ledger: Ledger) -> None:
    found = finding(site.check(offline=True), "ledger")
    assert found.state == "ok"
    assert "2 lines" in found.what
    assert ledger.verify().digest in found.what
    before = datetime(2026, 2, 2, tzinfo=UTC)
    assert "before the last line of the ledger" in problems(site.check(offline=True, now=before))["clock"]


def test_a_damaged_ledger_is_named_and_a_line_cut_short_is_no_damage(site: Site, ledger: Ledger) -> None:
    content = ledger.path.read_bytes()
    ledger.path.write_bytes(content + content[:40])
    found = finding(site.check(offline=True), "ledger")
    assert found.state == "ok"
    assert "never left" in found.what
    ledger.path.write_bytes(content.replace(b'"one"', b'"eno"'))
    assert "ledger.jsonl:1" in problems(site.check(offline=True))["ledger"]
    ledger.path.write_bytes(content[:-20])
    assert "cut short" in problems(site.check(offline=True))["ledger"]
    ledger.path.unlink()
    assert "missing" in problems(site.check(offline=True))["ledger"]
    ledger.path.write_bytes(content)
    ledger.path.chmod(0o644)
    assert "chmod 600" in problems(site.check(offline=True))["ledger"]


# The coordinator


@pytest.mark.parametrize(("seconds", "state"), [(3, "ok"), (-3, "ok"), (-50, "problem"), (40, "ok"), (100, "problem")])
def test_a_clock_that_is_off_is_named(site: Site, coordinator: Coordinator, seconds: int, state: str) -> None:
    coordinator.ahead = timedelta(seconds=seconds)
    clock = finding(site.check(), "coordinator's clock")
    assert clock.state == state
    if abs(seconds) > 3:
        assert f"{'behind' if seconds > 0 else 'ahead of'} the coordinator's" in clock.what
    if state == "problem":
        assert "timedatectl" in clock.remedy


def test_a_coordinator_without_a_clock_is_let_pass(site: Site, coordinator: Coordinator) -> None:
    coordinator.dated = False
    assert finding(site.check(), "coordinator's clock").state == "skipped"


@pytest.mark.parametrize("path", ["/v1/control/", "/v1/control/start-run", "/v1/runtime/acquire-task"])
def test_a_coordinator_that_shows_its_control_api_is_named(site: Site, coordinator: Coordinator, path: str) -> None:
    coordinator.statuses[path] = 405
    found = problems(site.check())
    assert found.keys() == {"control API"}
    assert f"{path} (status 405)" in found["control API"]
    assert "operator" in found["control API"]


def test_a_proxy_with_nothing_behind_it_is_named(site: Site, coordinator: Coordinator) -> None:
    coordinator.statuses[connection.NOTHING] = 502
    found = problems(site.check())
    assert found.keys() == {"SuperLink"}
    assert "gramfuse server start" in found["SuperLink"]


def certificate(site: Site) -> str:
    """Return what is wrong with the coordinator's certificate, which ends the visit."""
    report = site.check()
    found = problems(report)
    assert found.keys() == {"certificate"}, found
    assert [finding(report, subject).state for subject in connection.REMOTE[2:]] == ["skipped"] * 3
    return found["certificate"]


def test_a_certificate_that_is_over_is_named(site: Site, coordinator: Coordinator) -> None:
    coordinator.certify(server_names([]), datetime.now(UTC) - YEAR, 30)
    said = certificate(site)
    assert f"to {datetime.now(UTC) - YEAR + timedelta(days=30):%Y-%m-%d} only" in said
    assert "gramfuse pki server DIR --host 127.0.0.1 --renew" in said


def test_a_certificate_that_ends_soon_is_a_notice(site: Site, coordinator: Coordinator) -> None:
    coordinator.certify(server_names([]), datetime.now(UTC), 20)
    report = site.check()
    assert not problems(report)
    assert "19 days are left" in finding(report, "certificate").remedy


def test_a_certificate_for_another_host_is_named(site: Site, coordinator: Coordinator) -> None:
    coordinator.certify([x509.DNSName("merge.example.org")], datetime.now(UTC), 30)
    said = certificate(site)
    assert "it is for merge.example.org" in said
    assert "--host 127.0.0.1 --renew" in said
    site.edit("127.0.0.1:", "localhost:")
    assert "is not for localhost; it is for merge.example.org" in certificate(site)


def test_another_authority_is_named(site: Site, coordinator: Coordinator) -> None:
    other = Authority.create("somebody else", server_names([]), datetime.now(UTC), 30)
    coordinator.certify(server_names([]), datetime.now(UTC), 30, other)
    said = certificate(site)
    assert "but by CN=somebody else" in said
    assert "somebody is between you and them" in said


def test_an_authority_that_is_over_is_named(site: Site, coordinator: Coordinator) -> None:
    begin = datetime.now(UTC) - YEAR
    over = Authority.create("pico CA", server_names([]), begin, 30)
    Silo.read(site.silo).ca_path.write_bytes(certificate_pem(over.certificate))
    key = new_key()
    lasting = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([]))
        .issuer_name(over.certificate.subject)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(begin)
        .not_valid_after(begin + 2 * YEAR)
        .add_extension(x509.SubjectAlternativeName(server_names([])), critical=True)
        .sign(over.key, SHA256())
    )
    (coordinator.directory / "server.crt").write_bytes(certificate_pem(lasting))
    (coordinator.directory / "server.key").write_bytes(key_pem(key))
    coordinator.context.load_cert_chain(coordinator.directory / "server.crt", coordinator.directory / "server.key")
    assert "the authority that signed it is not valid now" in certificate(site)


@contextmanager
def listener(answer: bytes | None) -> Iterator[int]:
    """Listen without TLS: whoever comes gets the same answer, or none at all."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        held = []

        def serve() -> None:
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                if answer is not None:
                    connection.sendall(answer)
                held.append(connection)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield server.getsockname()[1]
        server.shutdown(socket.SHUT_RDWR)
        thread.join()
        for connection in held:
            connection.close()


@pytest.mark.parametrize(
    ("answer", "words"),
    [(b"HTTP/1.1 400 Bad Request\r\n\r\n", "no TLS is spoken there"), (None, "handshake was not finished")],
)
def test_what_speaks_no_tls_is_named_in_time(
    make_site: Callable[..., Site], coordinator: Coordinator, monkeypatch: pytest.MonkeyPatch, answer: Any, words: str
) -> None:
    monkeypatch.setattr(connection, "STEP_SECONDS", 0.2)
    with listener(answer) as port:
        coordinator.port = port
        assert words in certificate(make_site(coordinator))


def test_nobody_there_and_a_host_that_is_none_are_named(
    make_site: Callable[..., Site], coordinator: Coordinator, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        coordinator.port = free.getsockname()[1]
    site = make_site(coordinator)
    found = problems(site.check())
    assert found.keys() == {"connection"}
    assert "nothing listens on that port" in found["connection"]
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:1")
    monkeypatch.setenv("NO_PROXY", "")
    assert "HTTPS_PROXY is set" in problems(site.check())["connection"]
    site.edit("127.0.0.1:", "no-such-host.invalid:")
    assert "no such host" in problems(site.check())["connection"]
    site.edit("no-such-host.invalid:", "no..host:")
    assert "no..host" in problems(site.check())["connection"]


def test_what_is_in_the_way_of_a_silo_that_starts_is_the_first_problem_in_one_line(
    site: Site, coordinator: Coordinator
) -> None:
    silo = Silo.read(site.silo)
    assert connection.obstacle(silo, tls=True) == ""
    coordinator.ahead = -timedelta(seconds=50)
    coordinator.statuses["/v1/control/"] = 405
    said = connection.obstacle(silo, tls=True)
    assert said.startswith("coordinator's clock: this clock is 50 s ahead of the coordinator's")
    assert "timedatectl" in said
    assert "\n" not in said
    assert "SuperLink: does not answer in HTTP" in connection.obstacle(silo, tls=False)


def test_a_name_server_that_does_not_answer_does_not_hold_the_check(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    over = threading.Event()

    def wait(*_: Any) -> None:
        over.wait()
        raise OSError

    monkeypatch.setattr(connection, "CONNECTION_SECONDS", 0.2)
    monkeypatch.setattr(connection.socket, "create_connection", wait)
    report = site.check()
    over.set()
    assert problems(report).keys() == {"connection"}
    assert "took more than" in problems(report)["connection"]


MASKED = 'task = "multi-label"\nlabels = ["a", "b", "c"]'
KINDS = {
    "multi-label": (
        MASKED,
        [["a"], ["a", "b"], []],
        "'a' 2, 'b' 1; none of them 1; 1 labels are not this silo's to annotate",
        "got each label rightly or wrongly",
    ),
    "token-classification": (
        'task = "token-classification"\nlabels = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]',
        ["B-PER I-PER", "O B-PER", "B-LOC B-LOC"],
        "'PER' 2, 'LOC' 2",
        "entities of each type",
    ),
    "sequence-to-sequence": ('task = "sequence-to-sequence"', ["x", "y", "z"], "targets are texts", "targets were met"),
    "causal-lm": ('task = "causal-lm"', ["", "", ""], "21 characters", "tokens were predicted rightly"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_of_data_is_counted_in_its_own_words(kind: str, tmp_path: Path) -> None:
    task, labels, counted, leaving = KINDS[kind]
    rows = [{"text": "one two", "label": label} for label in labels]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "silo.toml").write_text(
        'name = "silo-a"\n[data]\ntrain = "rows.jsonl"\nheld-out = "rows.jsonl"\n[limits]\nminimum-examples = 1\n'
    )
    own = 'labels = ["b", "a"]' if task is MASKED else ""
    plan = Plan.parse(
        f'[plan]\nname = "x"\n[model]\nbase = "x"\n{task}\n[privacy]\nsecure-aggregation = false\n'
        f'[[silo]]\nname = "silo-a"\n{own}\n[[silo]]\nname = "silo-b"\n'
    )
    found = Findings()
    of_inputs.check_data(found, Silo.read(tmp_path / "silo.toml"), plan, None, offline=True)
    (data,) = list(found)
    assert data.state == "ok"
    assert f"3 training examples ({counted}), 3 held out" in data.what
    assert leaving in kind_of(plan.task_of("silo-a")).summed


@pytest.mark.parametrize(
    ("texts", "state", "words"),
    [
        (["cat dog", "cat dog hen cow", "cat"], "ok", "1 of 9 words have no token: the 5 "),
        (["cat dog", "\u200b", "hen cow"], "problem", "1 of 3 examples have no word"),
    ],
)
def test_words_that_the_model_does_not_see_are_told_before_a_run(
    texts: list[str], state: str, words: str, pico_bert: Path, tmp_path: Path
) -> None:
    plan = Plan.parse(
        f'[plan]\nname = "x"\n[model]\nbase = "{pico_bert}"\nmax-length = 5\ntask = "token-classification"\n'
        'labels = ["O", "B-X", "I-X"]\n[privacy]\nsecure-aggregation = false\n[[silo]]\nname = "silo-a"\n'
    )
    base = load_base(plan, tmp_path)
    base.tokenizer.backend_tokenizer.normalizer = BertNormalizer()
    split = [tuple(text.split(" ")) for text in texts]
    examples = Examples(split, None, [(0,) * len(each) for each in split])
    silo = Silo(tmp_path / "silo.toml", SiloFile(name="silo-a", data=Data(train="x", held_out=0.5)))
    found = Findings()
    of_inputs.check_encoding(found, silo, plan, base, (examples, examples.take([0])))
    (tokens,) = found
    assert tokens.state == state
    assert words in tokens.what
