"""The secure exchange: equal to the open one, whoever drops out, whatever is lost, and whatever the coordinator tries.

The silos are real Participants of a pico model; what they measure is measured once, and every run begins with silos
that have an empty disk and "train" by taking that.
"""

from __future__ import annotations

import copy
import json
import logging
import os
import random
import shutil
import stat
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Context, Error, Message, RecordDict
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from gramfuse_client.app import SiloApp
from gramfuse_client.data.examples import load
from gramfuse_client.exchange import local_model, secure_phases
from gramfuse_client.exchange.participant import Participant
from gramfuse_client.silo_file import Silo
from gramfuse_client.state.session import Session
from gramfuse_client.state.state import State
from gramfuse_model.loading.base_model import Base, load_base
from gramfuse_model.normal_equations import summands
from gramfuse_model.project import Project
from gramfuse_protocol.contract.layout import Layout
from gramfuse_protocol.contract.plan import Plan
from gramfuse_protocol.errors import FederationError, GramfuseError, RefusalError, RunDirectoryError
from gramfuse_protocol.messages.flower_records import from_record, to_record
from gramfuse_protocol.messages.phases import (
    REPLIES,
    REQUESTS,
    EvaluateRequest,
    JoinRequest,
    KeysRequest,
    MaskedRequest,
    Refusal,
    SharesRequest,
    SurvivorsRequest,
    TrainRequest,
    UnmaskReply,
    UnmaskRequest,
    UploadRequest,
    refusal,
)
from gramfuse_protocol.messages.wire import pack, unpack
from gramfuse_protocol.secure_sum import member as secure_sum
from gramfuse_protocol.secure_sum.fixed_point import encode
from gramfuse_protocol.secure_sum.keys import Identity
from gramfuse_protocol.secure_sum.masks import apply
from gramfuse_protocol.secure_sum.member import Signed
from gramfuse_protocol.secure_sum.scales import scales
from gramfuse_protocol.secure_sum.statements import advert_statement, metrics_context
from gramfuse_protocol.statistics.contribution import Statistics
from gramfuse_server.merging.accumulator import Accumulator, rounded
from gramfuse_server.run import delivery
from gramfuse_server.run import exchange as exchange_module
from gramfuse_server.run.exchange import Exchange
from gramfuse_server.run_directory import RunDirectory
from tests.reports import read_back

PIECE_BYTES = 16384
A, B, C, D, E = NAMES = tuple(f"silo-{letter}" for letter in "abcde")

Arrays = Mapping[str, np.ndarray]
Answer = Callable[[], RecordDict]


@dataclass(frozen=True, repr=False)
class Site:
    """Five silos, and what they measure."""

    project: Any
    base: Base
    layout: Layout
    statistics: Mapping[str, Statistics]
    repeat: bool = False
    """Whether the silos contribute in another session of a plan too."""

    def plan(self, *changes: str, silos: int = 5) -> Plan:
        """The plan with settings, of the first few silos, locked."""
        plan = Plan.read(self.project.plan)
        exact = 'privacy.metrics-epsilon="none"'  # other noise in each run would hide what is compared
        plan = plan.model_copy(update={"silo": plan.silo[:silos]}).override((exact, *changes))
        return plan.pinned(self.base.pins, self.layout.digest)

    def silo(self, name: str, plan: Plan, place: Path) -> Silo:
        """A silo that approved the plan, with its state under a place."""
        silo = Silo.read(self.project.silo(name))
        allowed = {"open_uploads": not plan.privacy.secure_aggregation, "repeat_contributions": self.repeat}
        allowed["exact_metrics"] = True
        limits = silo.file.limits.model_copy(update=allowed)
        changes = {"approved": (plan.digest,), "state": str(place / "state" / name), "limits": limits}
        return Silo(silo.path, silo.file.model_copy(update=changes))

    def merged(self, plan: Plan, silos: Sequence[str]) -> Arrays:
        """The differences that an open merge of these silos gives."""
        accumulator = Accumulator(self.layout, alpha=plan.merge.alpha, weighting=plan.merge.weighting)
        for name in silos:
            accumulator.fold(self.statistics[name], name)
        return accumulator.merge().deltas

    def words(self, plan: Plan, silos: Sequence[str]) -> np.ndarray:
        """The sum of these silos' encoded vectors, modulo 2^64."""
        n, weighting, total = len(plan.silo), plan.merge.weighting, np.zeros(self.layout.sum_entries, np.uint64)
        for name in silos:
            values = summands(self.layout, self.statistics[name], alpha=plan.merge.alpha, weighting=weighting)
            scaled = zip(values, scales(self.layout, n, weighting), strict=True)
            total += np.concatenate([encode(v, scale, n, b.name).reshape(-1) for (b, v), (_, scale) in scaled])
        return total


@pytest.fixture(scope="module")
def _kept() -> list[Site]:
    return []


@pytest.fixture
def site(_kept: list[Site], pico_project: Any) -> Site:
    """The silos; they are trained once."""
    if not _kept:
        project = pico_project(silos=5, name="secure", secure=True)
        structures = '"*" = "block:5", "*attention*" = "full", "*encoder.layer.0.*" = "diagonal"'
        project.replace(project.plan, '"*" = "full"', structures)
        for n, name in enumerate(NAMES):
            lines = project.train(name).read_text().splitlines(keepends=True)
            project.train(name).write_text("".join(lines[: 12 + 2 * n]))
        plan, layout = Project.read(project.directory).locked()
        assert {group.structure for group in layout.groups} == {"full", "block:5", "diagonal"}
        base = load_base(plan, project.directory)
        statistics = {}
        for name in NAMES:
            silo = Silo.read(project.silo(name))
            examples, _ = load(silo, plan.task_of(name))
            found = local_model.train(silo, plan, layout, copy.deepcopy(base), examples)
            # Weighed by examples, an integer leaves 18 bits to their number: let them be as many as silos have.
            statistics[name] = replace(found, examples=100 * len(examples))
        _kept.append(Site(project, base, layout, statistics))
    return _kept[0]


@dataclass(repr=False)
class Watched:
    """What happened at the silos that must not happen twice, and what may never leave them."""

    trained: Counter[str] = field(default_factory=Counter)
    masked: Counter[Path] = field(default_factory=Counter)
    secrets: set[str] = field(default_factory=set)
    shares: set[str] = field(default_factory=set)


@pytest.fixture(autouse=True)
def watched(site: Site, monkeypatch: pytest.MonkeyPatch) -> Watched:
    """Silos take their statistics and their base model from the site; the merged model is written as differences."""
    seen = Watched()
    write_masked, write = secure_phases.write_masked, Session.write

    def train(silo: Silo, *_: Any) -> Statistics:
        seen.trained[silo.name] += 1
        return site.statistics[silo.name]

    def counted(path: Path, *arguments: Any) -> None:
        seen.masked[path] += 1
        write_masked(path, *arguments)

    def spied(session: Session, record: Any) -> None:
        if record.member is not None:
            document = record.member.model_dump(mode="json")
            seen.secrets |= set(leaves(document["secrets"]))
            seen.shares |= set(leaves([document["own"], document["held"]]))
        write(session, record)

    def write_model(directory: Path, _: Any, deltas: Arrays, *__: Any) -> None:
        directory.mkdir(exist_ok=True)
        save_file({name: np.ascontiguousarray(delta) for name, delta in deltas.items()}, directory / "deltas")

    monkeypatch.setattr(local_model, "train", train)
    monkeypatch.setattr(local_model, "load_base", lambda *_, **__: copy.deepcopy(site.base))
    monkeypatch.setattr(local_model, "plan_layout", lambda *_: site.layout)
    monkeypatch.setattr(secure_phases, "write_masked", counted)
    monkeypatch.setattr(Session, "write", spied)
    monkeypatch.setattr(exchange_module, "write_model", write_model)
    monkeypatch.setattr(delivery.time, "sleep", lambda _: None)
    return seen


def leaves(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif value is not None:
        for item in value.values() if isinstance(value, dict) else value:
            yield from leaves(item)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    directory = tmp_path / "place"
    directory.mkdir()
    return directory


def no_fault(visit: Any, deliver: Answer) -> RecordDict | Error:
    return deliver()


@dataclass(repr=False)
class Run:
    """One run of the coordinator, and all that crossed its door."""

    site: Site
    plan: Plan
    place: Path
    piece_bytes: int = PIECE_BYTES
    grid: Any = None
    received: list[tuple[str, Any]] = field(default_factory=list)
    answers: dict[tuple[str, str], set[str]] = field(default_factory=lambda: defaultdict(set))
    events: list[dict[str, Any]] = field(default_factory=list)
    report: dict[str, Any] = field(default_factory=dict)

    def nodes(self) -> dict[str, Any]:
        """The silos' ClientApps; the digest of every answer is kept by (silo, digest of the request)."""

        def node(name: str) -> Any:
            app = SiloApp(lambda _: self.site.silo(name, self.plan, self.place))

            def answer(message: Message, context: Context) -> Message:
                request, reply = from_record(message.content), app(message, context)
                self.answers[name, request.digest].add(from_record(reply.content).digest)
                return reply

            return answer

        return {name: node(name) for name in self.plan.names}

    def start(
        self,
        grid: Any,
        *,
        fault: Any = no_fault,
        lag: random.Random | None = None,
        resume: bool = False,
        observer: Callable[[dict[str, Any]], None] = lambda event: None,
    ) -> dict[str, Any]:
        """Run, or go on with, the exchange; return its report."""

        def observe(event: dict[str, Any]) -> None:
            self.events.append(event)
            observer(event)

        def recorded(visit: Any, deliver: Answer) -> RecordDict | Error:
            content = fault(visit, deliver)
            if not isinstance(content, Error):
                self.received.append((visit.node, unpack(from_record(content), REPLIES)))
            return content

        self.grid = grid(self.nodes(), fault=recorded, lag=lag)
        with RunDirectory(self.out, 0, resume=resume) as run:
            report = (
                Exchange(
                    self.grid,
                    self.plan,
                    self.site.layout,
                    self.site.base,
                    run,
                    observer=observe,
                    piece_bytes=self.piece_bytes,
                )
                .start()
                .document()
            )
            run.finish()
        assert read_back(self.out) == report
        self.report = report
        return report

    @property
    def out(self) -> Path:
        return self.place / "run"

    @property
    def deltas(self) -> Arrays:
        return load_file(self.out / "model" / "deltas")

    def of(self, kind: type) -> list[Any]:
        return [reply for _, reply in self.received if isinstance(reply, kind)]

    def shares(self) -> dict[tuple[str, str], int]:
        """How many shares the coordinator got of each secret: by sum, owner."""
        return Counter((reply.sum_of, owner) for reply in self.of(UnmaskReply) for owner in reply.shares)


def distance(found: Arrays, expected: Arrays, start: Arrays | None = None) -> float:
    """How far two models' parameters, or their differences from the base, are from each other, relatively."""
    assert found.keys() == expected.keys()
    off = [np.linalg.norm(found[name] - expected[name]) for name in expected]
    size = [np.linalg.norm(expected[name] + (0 if start is None else start[name])) for name in expected]
    return float(np.linalg.norm(off) / np.linalg.norm(size))


# Equal to the open merge


@pytest.mark.parametrize("weighting", ["uniform", "examples"])
def test_the_secure_merge_is_the_open_merge_in_any_order_of_arrival(
    site: Site, in_process_grid: Any, place: Path, weighting: str
) -> None:
    results = {}
    for mode in ("true", "false"):
        plan = site.plan(f"merge.weighting={weighting}", f"privacy.secure-aggregation={mode}", silos=4)
        results[mode] = run = Run(site, plan, place / mode, 4096)
        report = run.start(in_process_grid, lag=random.Random(5))
        assert report["unmeasured"] is None
        assert report["lost"] == []
    secure, opened = results["true"], results["false"]
    start = {name: p.detach().numpy() for name, p in site.base.model.named_parameters()}
    assert distance(secure.deltas, opened.deltas, start) <= 1e-6
    assert distance(secure.deltas, opened.deltas) <= 1e-6
    assert distance(opened.deltas, rounded(site.merged(opened.plan, NAMES[:4]))) == 0
    for key in ("metrics", "labels"):
        assert [m[key] for m in secure.report["models"]] == [m[key] for m in opened.report["models"]]
    assert [m["metrics"]["examples"] for m in secure.report["models"]] == [80, 80]
    assert secure.report["examples"] == opened.report["examples"] == 100 * sum(12 + 2 * n for n in range(4))
    assert secure.report["silos"] == [{"name": name, "examples": None} for name in NAMES[:4]]
    pieces = -(-8 * site.layout.sum_entries // 4096)
    assert pieces > 5
    assert secure.grid.sent.count((A, "masked")) == pieces + 1
    assert "upload" not in {phase for _, phase in secure.grid.sent}
    assert set(secure.shares().values()) == {4}
    assert not list((secure.out).glob("spool*"))


# Drop-outs

PHASES = ("keys", "shares", "masked", "survivors", "unmask")


def gone(losses: Mapping[str, tuple[str, int]], *, refuses: bool = False) -> Any:
    """A fault: each silo is gone from its n-th message of its phase on, or refuses it and is gone then."""
    left: set[str] = set()

    def fault(visit: Any, deliver: Answer) -> RecordDict | Error:
        phase, number = losses.get(visit.node, ("", 0))
        if visit.node not in left and (visit.phase, visit.number) == (phase, number):
            left.add(visit.node)
            if refuses:
                reply = unpack(from_record(deliver()), REPLIES)
                return to_record(pack(refusal(reply, visit.node, RefusalError("", reason="the operator said no"))))
        return Error(5, "Node Unavailable") if visit.node in left else deliver()

    return fault


@pytest.mark.parametrize(
    ("phase", "number", "refuses"),
    [(phase, 1, False) for phase in ("train", "keys", "shares", "survivors", "unmask")]
    + [(phase, 1, True) for phase in ("join", "survivors", "unmask")]
    + [("masked", number, refuses) for number in (1, 3) for refuses in (False, True)]
    + [("join", 1, False), ("evaluate", 2, False)],
)
def test_one_silo_may_drop_out_in_any_phase(
    site: Site, in_process_grid: Any, place: Path, phase: str, number: int, refuses: bool
) -> None:
    run = Run(site, site.plan(), place)
    report = run.start(in_process_grid, fault=gone({C: (phase, number)}, refuses=refuses))
    left_before = phase in ("join", "train", "keys", "shares", "masked")
    survivors = [name for name in NAMES if name != C or not left_before]
    assert [silo["name"] for silo in report["silos"]] == survivors
    ((lost, reason),) = [(lost["name"], lost["reason"]) for lost in report["lost"]]
    assert lost == C
    if refuses or phase != "join":  # before it has joined, a silo is known by its node alone
        assert f"silo {C!r}" in reason
        assert repr(phase) in reason
        assert ("the operator said no" if refuses else "Flower error 5") in reason
    assert [event["silo"] for event in run.events if event["state"] == "lost"][-1:] == (
        [C] if phase != "join" or refuses else [f"node {run.grid.number(C)}"]
    )
    assert distance(run.deltas, site.merged(run.plan, survivors)) <= 1e-6
    assert report["unmeasured"] is None
    assert [model["metrics"]["examples"] for model in report["models"]] == [80, 80]
    assert not [sent for sent in run.grid.sent[run.grid.sent.index((A, "evaluate")) :] if sent[0] == C and left_before]


@pytest.mark.parametrize(
    ("phases", "refuses"),
    [
        *((("train", "train"), r) for r in (False, True)),
        *(((phase, phase), phase in ("shares", "masked")) for phase in PHASES),
        (("keys", "unmask"), False),
        (("masked", "survivors"), True),
    ],
)
def test_two_losses_of_five_end_the_run_and_reveal_nothing(
    site: Site, in_process_grid: Any, place: Path, phases: tuple[str, str], refuses: bool
) -> None:
    run = Run(site, site.plan(), place)
    with pytest.raises(RefusalError if refuses and len(set(phases)) == 1 else GramfuseError) as caught:
        run.start(in_process_grid, fault=gone({B: (phases[0], 1), D: (phases[1], 1)}, refuses=refuses))
    assert all(repr(name) in str(caught.value) for name in (B, D))
    assert {event["silo"] for event in run.events if event["state"] == "lost"} == {B, D}
    assert not run.out.exists()
    report = left(run, caught.value)
    assert {lost["name"] for lost in report["lost"]} == {B, D}
    # The coordinator asks all that are left before it counts them.
    assert report["failure"]["phase"] == phases[-1] == run.grid.sent[-1][1]
    assert report["failure"]["resumable"] == (run.place / "run.partial").exists() == ("train" not in phases)
    states = {silo["name"]: silo["state"] for silo in report["silos"]}
    assert tuple(states) == NAMES
    assert {name for name, state in states.items() if state == "lost"} == {B, D}
    assert {states[name] for name in (A, C, E)} <= ({"joined", "trained"} if "train" in phases else {"trained"})
    assert report["bytes"][A].keys() <= {phase for _, phase in run.grid.sent} == report["bytes_to_silos"][A].keys()
    assert report["failure"]["phase"] in report["seconds"]
    assert not report.keys() & {"models", "solve", "examples"}
    threshold = run.plan.threshold
    assert threshold == 4
    # To take a mask off, t shares of its seed or key are needed; the statistics' are asked for last of all.
    assert max(run.shares().values(), default=0) < threshold
    assert "evaluate" not in {phase for _, phase in run.grid.sent}


def left(run: Run, error: GramfuseError) -> dict[str, Any]:
    """The report of a run that failed, beside which nothing may be left but what a resumed run needs."""
    failed = run.out.with_name("run.failed")
    assert error.report == failed / "report.html"
    assert {path.name for path in failed.iterdir()} == {"plan.toml", "report.html", "report.json", "transcript.jsonl"}
    assert {path.name for path in run.place.iterdir()} <= {"state", "run.failed", "run.partial"}
    report = read_back(failed)
    assert report["failure"]["message"] == str(error)
    return report


# Faults of every kind


@dataclass(frozen=True)
class Loss:
    """A silo's n-th message of a phase gets lost, before or after the silo did its part; for good, or once."""

    silo: str
    phase: str
    number: int
    delivered: bool
    for_good: bool
    code: int


def losses_of(silos: Sequence[str]) -> st.SearchStrategy[list[Loss]]:
    numbers = {"masked": 4, "survivors": 2, "unmask": 2, "evaluate": 2}
    loss = st.sampled_from(["join", "train", *PHASES, "evaluate"]).flatmap(
        lambda phase: st.builds(
            Loss,
            silo=st.sampled_from(silos),
            phase=st.just(phase),
            number=st.integers(1, numbers.get(phase, 1)),
            delivered=st.booleans(),
            for_good=st.integers(0, 3).map(lambda n: n == 0),
            code=st.sampled_from([3, 5, 8]),
        )
    )
    return st.lists(loss, max_size=6, unique_by=lambda loss: (loss.silo, loss.phase))


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(plan=st.data(), seed=st.integers(0, 2**32))
def test_whatever_gets_lost_the_sum_is_exactly_that_of_the_survivors(
    site: Site, in_process_grid: Any, tmp_path_factory: pytest.TempPathFactory, plan: Any, seed: int
) -> None:
    losses = plan.draw(losses_of(NAMES[:4]))
    left: set[str] = set()
    met: set[str] = set()

    def fault(visit: Any, deliver: Answer) -> RecordDict | Error:
        found = [
            loss for loss in losses if (loss.silo, loss.phase, loss.number) == (visit.node, visit.phase, visit.number)
        ]
        if visit.node not in left and not found:
            return deliver()
        loss = found[0] if found else Loss(visit.node, visit.phase, 0, False, True, 5)
        if loss.delivered and visit.node not in left:
            deliver()
        if loss.for_good:
            left.add(visit.node)
        met.add(visit.node)
        return Error(loss.code, "lost")

    words: list[np.ndarray] = []
    load_sum = Accumulator.load
    run = Run(site, site.plan(silos=4), tmp_path_factory.mktemp("faults"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Accumulator, "load", lambda self, w, n: (words.append(w.copy()), load_sum(self, w, n)))
        try:
            report = run.start(in_process_grid, fault=fault, lag=random.Random(seed))
        except GramfuseError:
            assert len(left) > 1, "one silo may be lost"
            assert not run.out.exists()
            assert max((n for (sum_of, _), n in run.shares().items() if sum_of == "statistics"), default=0) <= 2
        else:
            survivors = [silo["name"] for silo in report["silos"]]
            assert {lost["name"] for lost in report["lost"]} == left
            assert len(survivors) >= 3
            np.testing.assert_array_equal(words[0], site.words(run.plan, survivors))
            assert report["examples"] == sum(site.statistics[name].examples for name in survivors)
            if len(left) <= 1:
                assert report["unmeasured"] is None
            for model in report["models"]:
                assert model["metrics"]["examples"] in {20 * n for n in range(3, 5)}
    assert all(len(replies) == 1 for replies in run.answers.values()), "an answer changed when it was asked for again"


# A coordinator that is killed


class Killed(BaseException):
    """As kill -9 is: nothing is tidied up after it."""


POINTS = [
    (phase, state)
    for phase in ("keys", "shares", "masked", "survivors", "unmask", "merge", "evaluate", "masked-metrics",
                  "survivors-metrics", "unmask-metrics", "write")
    for state in ("start", "middle", "end")
    if state != "middle" or phase not in ("merge", "write")
]  # fmt: skip


def let_go(run: RunDirectory, *_: Any) -> None:
    """All that happens to a run directory when its process is killed: its lock is free."""
    run._locked.close()


def killer(phase: str, state: str) -> Callable[[dict[str, Any]], None]:
    """Kills the coordinator when it begins a phase, after the second answer in it, or when it ends it."""
    seen: list[str] = []

    def observe(event: dict[str, Any]) -> None:
        if event["state"] == "start":
            seen[:] = [event["phase"]]
        else:
            seen.append(event["state"])
        point = {1: "start"}.get(len(seen), "end" if event["state"] == "end" else "middle" if len(seen) == 3 else "")
        if (seen[0], point) == (phase, state):
            raise Killed

    return observe


@pytest.mark.parametrize("lost", [None, ("masked", 2)], ids=str)
def test_a_coordinator_that_is_killed_at_every_step_goes_on_to_the_same_end(
    site: Site,
    in_process_grid: Any,
    place: Path,
    watched: Watched,
    monkeypatch: pytest.MonkeyPatch,
    lost: tuple[str, int] | None,
) -> None:
    """Killed and resumed at each point in turn, in one and the same run."""
    monkeypatch.setattr(RunDirectory, "__exit__", let_go)
    whole = Run(site, site.plan(silos=4), place / "whole")
    fault = gone({B: lost}) if lost else no_fault
    expected = whole.start(in_process_grid, fault=fault)
    watched.trained.clear()
    watched.masked.clear()
    run = Run(site, whole.plan, place / "killed")
    fault = gone({B: lost}) if lost else no_fault
    for number, point in enumerate(POINTS):
        with pytest.raises(Killed):
            run.start(in_process_grid, fault=fault, resume=number > 0, observer=killer(*point))
        assert not run.out.exists()
    report = run.start(in_process_grid, fault=fault, resume=True)
    for name, delta in whole.deltas.items():
        assert run.deltas[name].tobytes() == delta.tobytes(), name
    for key in ("models", "silos", "solve", "examples", "unmeasured"):
        assert report[key] == expected[key], key
    assert [silo["name"] for silo in report["lost"]] == [silo["name"] for silo in expected["lost"]] == [B] * bool(lost)
    assert watched.trained == dict.fromkeys(NAMES[:4], 1)
    assert set(watched.masked.values()) == {1}
    assert all(len(replies) == 1 for replies in run.answers.values())
    assert not (run.out / "checkpoint.json").exists()


@pytest.mark.parametrize("point", [("join", "start"), ("train", "middle"), ("train", "end")])
def test_before_the_silos_have_trained_there_is_nothing_to_resume(
    site: Site, in_process_grid: Any, place: Path, point: tuple[str, str]
) -> None:
    run = Run(site, site.plan(silos=4), place)
    with pytest.raises(Killed):
        run.start(in_process_grid, observer=killer(*point))
    assert not list(place.glob("run*")), "whoever ends a run wants no report of it"
    with pytest.raises(RunDirectoryError, match="nothing to resume"):
        run.start(in_process_grid, resume=True)


def test_a_run_that_lost_too_many_goes_on_when_they_are_back(
    site: Site, in_process_grid: Any, place: Path, watched: Watched
) -> None:
    run = Run(site, site.plan(), place)
    with pytest.raises(FederationError):
        run.start(in_process_grid, fault=gone({B: ("unmask", 1), D: ("unmask", 1)}))
    assert run.out.with_name("run.failed").exists()
    report = run.start(in_process_grid, resume=True)
    assert not run.out.with_name("run.failed").exists()
    assert distance(run.deltas, site.merged(run.plan, NAMES)) <= 1e-6
    assert report["lost"] == []
    assert set(watched.masked.values()) == set(watched.trained.values()) == {1}


def test_a_silo_that_was_lost_before_the_run_was_resumed_is_in_the_report(
    site: Site, in_process_grid: Any, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RunDirectory, "__exit__", let_go)
    run = Run(site, site.plan(silos=4), place)
    with pytest.raises(Killed):
        run.start(in_process_grid, fault=gone({B: ("keys", 1)}), observer=killer("shares", "end"))
    report = run.start(in_process_grid, resume=True)  # silo-b is back, too late
    assert [silo["name"] for silo in report["silos"]] == [A, C, D]
    ((lost, reason),) = [(silo["name"], silo["reason"]) for silo in report["lost"]]
    assert lost == B
    assert "'keys'" in reason
    assert "Flower error 5" in reason


# A coordinator that lies

STEPS = (
    "join", "train", "keys", "shares", "masked", "survivors", "unmask",
    "evaluate", "masked-metrics", "survivors-metrics", "unmask-metrics",
)  # fmt: skip
STRANGER = "silo-z"


class Coordinator:
    """A coordinator in the test's hand: what an honest one asks, and what it was answered."""

    def __init__(self, site: Site, plan: Plan, place: Path, nonce: str = "5e" * 16) -> None:
        self.site = site
        self.plan = plan
        self.place = place
        self.about: dict[str, Any] = {"plan": plan.digest, "session": nonce}
        self.names = plan.names
        self.models = {"simple": self._model(0.0), "regmean": self._model(0.01)}
        self.requests: dict[str, dict[str, list[Any]]] = defaultdict(dict)
        self.replies: dict[str, dict[str, list[Any]]] = defaultdict(dict)
        self.secrets: set[str] = set()

    def ask(self, silo: str, request: Any, place: Path | None = None) -> Any:
        """What a silo answers, each way over the wire; its state is under a place."""
        file = self.site.silo(silo, self.plan, place or self.place)
        return unpack(pack(Participant(file).answer(unpack(pack(request), REQUESTS))), REPLIES)

    def do(self, step: str, names: Sequence[str] | None = None) -> None:
        """Ask silos what an honest coordinator asks in a step, each twice; all must say yes, and the same."""
        for silo in names or self.names:
            self.requests[step][silo] = self.honest(step, silo)
            self.replies[step][silo] = [self.ask(silo, request) for request in self.requests[step][silo]]
            for request, reply in zip(self.requests[step][silo], self.replies[step][silo], strict=True):
                assert not isinstance(reply, Refusal), reply
                assert pack(self.ask(silo, request)).digest == pack(reply).digest

    def honest(self, step: str, silo: str) -> list[Any]:
        phase, _, metrics = step.partition("-")
        name: Any = "metrics" if metrics else "statistics"
        match phase:
            case "join":
                return [JoinRequest(**self.about, plan_text=self.plan.to_toml(), layout=self.site.layout.to_json())]
            case "train":
                return [TrainRequest(**self.about)]
            case "keys":
                return [KeysRequest(**self.about, cohort=self.names)]
            case "shares":
                return [SharesRequest(**self.about, adverts=self.adverts)]
            case "masked":
                more: dict[str, Any] = {"candidates": tuple(self.models)} if metrics else {"sealed": self.sealed(silo)}
                return [MaskedRequest(**self.about, sum_of=name, piece=0, piece_bytes=2**20, **more)]
            case "survivors":
                return [SurvivorsRequest(**self.about, sum_of=name, survivors=self.names)]
            case "unmask":
                signatures = {s: r[0].signature for s, r in self.replies[step.replace("unmask", "survivors")].items()}
                return [UnmaskRequest(**self.about, sum_of=name, signatures=signatures)]
            case _:
                return [EvaluateRequest(**self.about, candidate=c, arrays=model) for c, model in self.models.items()]

    @property
    def adverts(self) -> tuple[Any, ...]:
        return tuple(self.replies["keys"][name][0].advert for name in self.names)

    def sealed(self, silo: str) -> dict[str, str]:
        return {peer: self.replies["shares"][peer][0].sealed[silo] for peer in self.names if peer != silo}

    def advert(self, of: str, signer: str | None = None, **changes: Any) -> tuple[Any, ...]:
        """The adverts, one of them changed and, if a signer is named, signed again."""
        changed = []
        for advert in self.adverts:
            if advert.silo == of:
                advert = advert.model_copy(update=changes)
                if signer is not None:
                    identity = Identity.parse(self.site.project.identity(signer).read_text(), signer)
                    signature = identity.sign(advert_statement(self.plan.digest, self.about["session"], advert.fields))
                    advert = advert.model_copy(update={"signature": signature.hex()})
            changed.append(advert)
        return tuple(changed)

    def _model(self, value: float) -> Arrays:
        return {s.name: np.full(s.block.shape, value, np.float32) for s in self.site.layout.deltas}


@pytest.fixture(scope="module")
def _script() -> list[Coordinator]:
    return []


@pytest.fixture
def script(
    _script: list[Coordinator], site: Site, watched: Watched, tmp_path_factory: pytest.TempPathFactory
) -> Coordinator:
    """A whole honest session; the silos' state before each step is kept in a directory of the step's name."""
    if not _script:
        place = tmp_path_factory.mktemp("script")
        coordinator = Coordinator(site, site.plan(), place)
        # The most careless umask there is: what is private must be so by the code's own doing.
        before = os.umask(0)
        try:
            for step in STEPS:
                if (place / "state").exists():
                    shutil.copytree(place / "state", place / step / "state")
                coordinator.do(step)
        finally:
            os.umask(before)
        coordinator.secrets = watched.secrets | watched.shares
        _script.append(coordinator)
    return _script[0]


def at(script: Coordinator, step: str, place: Path, *silos: str) -> None:
    """Put silos where they were before a step of the script."""
    for silo in silos:
        shutil.copytree(script.place / step / "state" / silo, place / "state" / silo)


def session_of(script: Coordinator, place: Path, silo: str) -> Path:
    return place / "state" / silo / script.plan.digest / "sessions" / str(script.about["session"])


def changed(step: str, **changes: Any) -> Callable[[Coordinator], Any]:
    """An honest request to silo-a with other fields; a function gets the coordinator."""

    def make(c: Coordinator) -> Any:
        found = {key: value(c) if callable(value) else value for key, value in changes.items()}
        return c.requests[step][A][0].model_copy(update=found)

    return make


def exchanged(mapping: Mapping[str, str], one: str, other: str) -> dict[str, str]:
    return {**mapping, one: mapping[other], other: mapping[one]}


def flipped(text: str) -> str:
    return text[:-1] + ("0" if text[-1] != "0" else "1")


def renamed(advert: Any, silo: str) -> Any:
    return advert.model_copy(update={"silo": silo})


def signatures_of(c: Coordinator) -> dict[str, str]:
    return dict(c.requests["unmask"][A][0].signatures)


def of_another_session(c: Coordinator) -> tuple[Any, ...]:
    other = Coordinator(c.site, c.plan, c.place / "elsewhere", "0f" * 16)
    if not other.place.exists():
        for step in STEPS[:3]:
            other.do(step, [B])
    else:
        other.replies["keys"][B] = [other.ask(B, other.honest("keys", B)[0])]
    return tuple(other.replies["keys"][B][0].advert if a.silo == B else a for a in c.adverts)


ZERO = "00" * 32
SIX = (*NAMES, STRANGER)

# What silo-a is asked, the step that it has come to, and what of the reason must be there.
ATTACKS: dict[str, tuple[str, Callable[[Coordinator], Any], str]] = {
    "keys: a cohort without it": ("keys", changed("keys", cohort=NAMES[1:]), "leaves out"),
    "keys: too small a cohort": ("keys", changed("keys", cohort=NAMES[:3]), "asks for 4"),
    "keys: a silo twice": ("keys", changed("keys", cohort=(A, *NAMES)), "twice"),
    "keys: a stranger": ("keys", changed("keys", cohort=SIX), STRANGER),
    "keys: in another order": ("keys", changed("keys", cohort=NAMES[::-1]), "order"),
    "keys: a second cohort": ("shares", changed("keys", cohort=NAMES[:4]), "second, different"),
    "shares: before the keys": ("keys", changed("shares"), "before the keys"),
    "shares: a key not signed": ("shares", changed("shares", adverts=lambda c: c.advert(B, channel="11" * 32)), B),
    "shares: signed by another": ("shares", changed("shares", adverts=lambda c: c.advert(B, C, channel="11" * 32)), B),
    "shares: another session's": ("shares", changed("shares", adverts=of_another_session), B),
    "shares: one silo's keys as another's": (
        "shares",
        changed("shares", adverts=lambda c: (*c.adverts[:2], renamed(c.adverts[1], C), *c.adverts[3:])),
        C,
    ),
    "shares: its own keys changed": (
        "shares", changed("shares", adverts=lambda c: c.advert(A, A, channel="11" * 32)), "as they were sent"
    ),
    "shares: without its own keys": ("shares", changed("shares", adverts=lambda c: c.adverts[1:]), "as they were sent"),
    "shares: a silo twice": ("shares", changed("shares", adverts=lambda c: (*c.adverts, c.adverts[-1])), "twice"),
    "shares: in another order": ("shares", changed("shares", adverts=lambda c: c.adverts[::-1]), "order"),
    "shares: too few": ("shares", changed("shares", adverts=lambda c: c.adverts[:3]), "asks for 4"),
    "shares: a stranger": ("shares", changed("shares", adverts=lambda c: c.advert(E, E, silo=STRANGER)), STRANGER),
    "shares: an all-zero mask key": (
        "shares",
        changed("shares", adverts=lambda c: c.advert(D, D, masks={"statistics": ZERO, "metrics": "22" * 32})),
        "all-zero",
    ),
    "shares: an all-zero mask key for the metrics": (
        "shares",
        changed("shares", adverts=lambda c: c.advert(D, D, masks={"statistics": "22" * 32, "metrics": ZERO})),
        "all-zero",
    ),
    "shares: an all-zero channel key": (
        "shares", changed("shares", adverts=lambda c: c.advert(D, D, channel=ZERO)), "all-zero"
    ),
    "shares: one key of two silos": (
        "shares", changed("shares", adverts=lambda c: c.advert(D, D, channel=c.adverts[2].channel)), "one key twice"
    ),
    "shares: a second list": ("masked", changed("shares", adverts=lambda c: c.adverts[:4]), "second, different"),
    "masked: before the shares": ("shares", changed("masked"), "before the list of keys"),
    "masked: shares swapped": (
        "masked", changed("masked", sealed=lambda c: exchanged(c.sealed(A), B, C)), "do not open"
    ),
    "masked: shares for another": ("masked", changed("masked", sealed=lambda c: {**c.sealed(A), B: c.sealed(C)[B]}), B),
    "masked: shares changed": (
        "masked", changed("masked", sealed=lambda c: {**c.sealed(A), E: flipped(c.sealed(A)[E])}), "do not open"
    ),
    "masked: too few shares": (
        "masked", changed("masked", sealed=lambda c: {s: c.sealed(A)[s] for s in (B, C)}), "asks for 4"
    ),
    "masked: shares of a stranger": (
        "masked", changed("masked", sealed=lambda c: {**c.sealed(A), STRANGER: c.sealed(A)[B]}), STRANGER
    ),
    "masked: shares of its own": ("masked", changed("masked", sealed=lambda c: {**c.sealed(A), A: c.sealed(A)[B]}), A),
    "masked: for other members": (
        "survivors", changed("masked", sealed=lambda c: {s: c.sealed(A)[s] for s in (B, C, D)}), "different"
    ),
    "masked: in other pieces": ("survivors", changed("masked", piece_bytes=16), "different"),
    "masked: the metrics first": ("masked", changed("masked-metrics"), "metrics"),
    "upload: in the clear": (
        "masked", lambda c: UploadRequest(**c.about, piece=0, piece_bytes=2**20), "the plan has them masked"
    ),
    "survivors: before the upload": ("masked", changed("survivors"), "before its members are known"),
    "survivors: without it": ("survivors", changed("survivors", survivors=NAMES[1:]), "leaves out"),
    "survivors: one twice": ("survivors", changed("survivors", survivors=(*NAMES, E)), "twice"),
    "survivors: a stranger": ("survivors", changed("survivors", survivors=(*NAMES[:4], STRANGER)), STRANGER),
    "survivors: in another order": ("survivors", changed("survivors", survivors=(B, A, C, D, E)), "order"),
    "survivors: too few": ("survivors", changed("survivors", survivors=NAMES[:3]), "asks for 4"),
    "survivors: a second list": ("unmask", changed("survivors", survivors=NAMES[:4]), "different"),
    "unmask: before signing": ("survivors", changed("unmask"), "before its survivors were signed"),
    "unmask: too few signatures": (
        "unmask", changed("unmask", signatures=lambda c: {s: signatures_of(c)[s] for s in (A, B, C)}), "threshold is 4"
    ),
    "unmask: a forged signature": (
        "unmask", changed("unmask", signatures=lambda c: {**signatures_of(c), E: "ab" * 64}), E
    ),
    "unmask: signatures swapped": (
        "unmask", changed("unmask", signatures=lambda c: exchanged(signatures_of(c), B, C)), "not signed"
    ),
    "unmask: a stranger's signature": (
        "unmask", changed("unmask", signatures=lambda c: {**signatures_of(c), STRANGER: signatures_of(c)[B]}), STRANGER
    ),
    "unmask: those of the metrics": (
        "unmask", changed("unmask", signatures=lambda c: c.requests["unmask-metrics"][A][0].signatures), "not signed"
    ),
    "unmask: a second time, otherwise": (
        "evaluate", changed("unmask", signatures=lambda c: {s: signatures_of(c)[s] for s in NAMES[:4]}), "different"
    ),
    "evaluate: two models under one name": (
        "masked-metrics", changed("evaluate", arrays=lambda c: c.models["regmean"]), "two different models"
    ),
    "evaluate: a model that the plan does not name": (
        "survivors-metrics", changed("evaluate", candidate="other"), "another candidate"
    ),
    "metrics: of other models": ("masked-metrics", changed("masked-metrics", candidates=("simple",)), "other models"),
    "metrics: in another order": (
        "masked-metrics", changed("masked-metrics", candidates=("regmean", "simple")), "other models"
    ),
    "metrics: a second list": ("survivors-metrics", changed("masked-metrics", candidates=("regmean",)), "different"),
    "metrics: survivors without it": (
        "survivors-metrics", changed("survivors-metrics", survivors=NAMES[1:]), "leaves out"
    ),
    "metrics: too few survivors": (
        "survivors-metrics", changed("survivors-metrics", survivors=NAMES[:3]), "asks for 4"
    ),
    "metrics: the statistics again": ("unmask-metrics", changed("unmask", signatures={}), "different"),
    "metrics: signatures of the statistics": (
        "unmask-metrics", changed("unmask-metrics", signatures=signatures_of), "not signed"
    ),
}  # fmt: skip


def assert_over(script: Coordinator, place: Path, silo: str) -> None:
    """Nothing leaves the silo in this session any more, and its secrets are gone."""
    everything = [request for step in STEPS for request in script.requests[step][silo]]
    everything.append(UploadRequest(**script.about, piece=0, piece_bytes=2**20))
    for request in everything:
        reply = script.ask(silo, request, place)
        assert isinstance(reply, Refusal), request.phase
        assert not reply.arrays
        assert (reply.error, reply.reason) == ("RefusalError", "the session is over at this silo"), request.phase
    (file,) = session_of(script, place, silo).iterdir()
    record = json.loads(file.read_text())
    assert (record["member"], record["answers"]) == (None, {})
    assert not [secret for secret in script.secrets if secret in file.read_text()]


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_lie_ends_the_session_and_nothing_more_leaves(script: Coordinator, place: Path, attack: str) -> None:
    step, request_of, reason = ATTACKS[attack]
    at(script, step, place, A)
    reply = script.ask(A, request_of(script), place)
    assert isinstance(reply, Refusal)
    assert (reply.error, reply.exit_code) == ("SecurityError", 17)
    assert reason in reply.reason
    assert not [secret for secret in script.secrets if secret in reply.reason]
    assert_over(script, place, A)


def test_silos_that_are_told_different_things_find_out(script: Coordinator, place: Path) -> None:
    """Lists of keys, survivors, and models: each silo's own view is consistent, and theirs together are not."""
    c = Coordinator(script.site, script.plan, place, str(script.about["session"]))
    c.requests, c.replies = copy.copy(script.requests), copy.copy(script.replies)

    at(script, "shares", place / "keys", A, B)
    # B is told that E is not there, and seals its shares for the others.
    apart = c.ask(B, c.requests["shares"][B][0].model_copy(update={"adverts": c.adverts[:4]}), place / "keys")
    assert not isinstance(c.ask(A, c.requests["shares"][A][0], place / "keys"), Refusal)
    sealed = {**c.sealed(A), B: apart.sealed[A]}
    reply = c.ask(A, c.requests["masked"][A][0].model_copy(update={"sealed": sealed}), place / "keys")
    assert (reply.error, "told different lists of keys" in reply.reason) == ("SecurityError", True)
    assert_over(script, place / "keys", A)

    at(script, "survivors", place / "survivors", A, B, C, D)
    # A and B are told that E is dead, C and D that it is alive: either kind of E's shares, from different silos.
    signatures = {
        name: c.ask(
            name, c.requests["survivors"][name][0].model_copy(update={"survivors": survivors}), place / "survivors"
        ).signature
        for name, survivors in {A: NAMES[:4], B: NAMES[:4], C: NAMES, D: NAMES}.items()
    }
    for name in (A, B, C, D):
        request = c.requests["unmask"][name][0].model_copy(update={"signatures": signatures})
        reply = c.ask(name, request, place / "survivors")
        assert (reply.error, "not signed" in reply.reason) == ("SecurityError", True)
        assert_over(script, place / "survivors", name)

    at(script, "evaluate", place / "models", *NAMES)
    # One silo measures another model under the same name, so that the sum shows its metrics apart.
    other = c.requests["evaluate"][B][1].model_copy(update={"arrays": c.models["simple"]})
    for name in NAMES:
        first, second = c.requests["evaluate"][name]
        for request in (first, other if name == B else second, c.requests["masked-metrics"][name][0]):
            assert not isinstance(c.ask(name, request, place / "models"), Refusal)
    signatures = {
        name: c.ask(name, c.requests["survivors-metrics"][name][0], place / "models").signature for name in NAMES
    }
    reply = c.ask(A, c.requests["unmask-metrics"][A][0].model_copy(update={"signatures": signatures}), place / "models")
    assert (reply.error, repr(B) in reply.reason) == ("SecurityError", True)
    assert_over(script, place / "models", A)


def test_what_one_silo_measured_apart_stays_masked_though_the_others_agree(script: Coordinator, place: Path) -> None:
    """All but silo-b measure a model that tells nothing; they are enough to sign, and open the sum that it is in."""
    at(script, "evaluate", place, *NAMES)
    c = Coordinator(script.site, script.plan, place, str(script.about["session"]))
    c.requests, c.replies = copy.copy(script.requests), copy.copy(script.replies)
    agreed = tuple(name for name in NAMES if name != B)
    vectors = []
    for name in NAMES:
        first, second = c.requests["evaluate"][name]
        told = second if name == B else second.model_copy(update={"arrays": c.models["simple"]})
        for request in (first, told):
            assert not isinstance(c.ask(name, request), Refusal)
        vectors.append(c.ask(name, c.requests["masked-metrics"][name][0]).arrays["masked"])
    total = np.sum(vectors, axis=0, dtype=np.uint64)
    known = {n: State(place / "state" / n, c.plan.digest).measurements.of(1) for n in NAMES}
    counts = np.sum([[w for m in known[n].values() for w in m.words] for n in NAMES], axis=0, dtype=np.uint64)
    asked = {name: c.requests["survivors-metrics"][name][0] for name in agreed}
    signatures = {name: c.ask(name, request).signature for name, request in asked.items()}
    unmask = c.requests["unmask-metrics"][A][0].model_copy(update={"signatures": signatures})
    replies = {name: c.ask(name, unmask) for name in agreed}
    shares = {n: {owner: bytes.fromhex(share) for owner, share in r.shares.items()} for n, r in replies.items()}
    for name in (A, B):  # what the others signed, and what silo-b would have
        signed = Signed(survivors=NAMES, context=metrics_context({m: of.model for m, of in known[name].items()}))
        opened = total.copy()
        apply(
            opened,
            secure_sum.unmasking(c.plan.roster, str(c.about["session"]), c.adverts, "metrics", NAMES, signed, shares),
        )
        assert not np.isin(opened, counts).any()
        assert (np.abs(opened.view(np.int64)) > 2**36).any(), "words of a sum of counts are small"


def test_a_sum_of_metrics_that_does_not_open_is_no_metric(site: Site, in_process_grid: Any, place: Path) -> None:
    """Somebody on the way to silo-c has it measure another model; the others are enough to sign."""
    run = Run(site, site.plan(), place)
    honest = run.nodes()

    def lied_to(message: Message, context: Context) -> Message:
        request = unpack(from_record(message.content), REQUESTS)
        if isinstance(request, EvaluateRequest):
            other = {name: np.zeros_like(array) for name, array in request.arrays.items()}
            message.content = to_record(pack(request.model_copy(update={"arrays": other})))
        return honest[C](message, context)

    run.nodes = lambda: {**honest, C: lied_to}  # type: ignore[method-assign]
    report = run.start(in_process_grid)
    assert report["models"] == []
    assert "the silos did not measure the same models" in report["unmeasured"]
    assert [silo["name"] for silo in report["lost"]] == [C]
    assert distance(run.deltas, site.merged(run.plan, NAMES)) <= 1e-6


@pytest.mark.parametrize("step", STEPS[1:])
def test_phases_out_of_order_get_nothing(script: Coordinator, place: Path, step: str) -> None:
    """Whatever comes before its time is refused, and what is no lie by itself leaves the session as it is."""
    at(script, step, place, A)
    later = STEPS[STEPS.index(step) + 1 :]
    wrong = [s for s in later if not (s == "evaluate" or (step, s) == ("unmask", "masked-metrics"))]
    for name in wrong:
        shutil.rmtree(place / "state")
        at(script, step, place, A)
        reply = script.ask(A, script.requests[name][A][0], place)
        assert isinstance(reply, Refusal), name
        if reply.error == "SecurityError":
            assert_over(script, place, A)
        else:
            assert (reply.error, reply.reason) == ("FederationError", "not trained")
            assert not isinstance(script.ask(A, script.requests[step][A][0], place), Refusal)


def test_what_was_answered_is_answered_again_to_the_last_bit_and_in_the_end_no_secret_is_left(
    script: Coordinator, place: Path
) -> None:
    shutil.copytree(script.place / "state", place / "state")
    released = {
        share
        for step in ("unmask", "unmask-metrics")
        for r in script.replies[step].values()
        for s in r
        for share in s.shares.values()
    }
    for name in NAMES:
        for step in STEPS:
            for request, before in zip(script.requests[step][name], script.replies[step][name], strict=True):
                reply = script.ask(name, request, place)
                if step.startswith("masked"):
                    assert (reply.error, reply.reason) == ("RefusalError", "the sum is over at this silo")
                else:
                    assert pack(reply).digest == pack(before).digest, step
        (file,) = session_of(script, place, name).iterdir()
        assert json.loads(file.read_text())["member"] is None
        assert not [secret for secret in script.secrets - released if secret in file.read_text()]


def test_state_is_private_to_its_owner_at_every_step(script: Coordinator) -> None:
    for step in (*STEPS[1:], "."):
        for name in NAMES:
            for path in (script.place / step / "state" / name / script.plan.digest).rglob("*"):
                mode = stat.S_IMODE(path.stat().st_mode)
                assert mode == (0o700 if path.is_dir() else 0o600), path
                assert not path.name.endswith(".partial")
    masked = session_of(script, script.place / "survivors", A) / "statistics.masked"
    assert masked.stat().st_size == 8 * script.site.layout.sum_entries


def test_once_a_sum_was_signed_no_other_session_of_its_plan_begins(script: Coordinator, place: Path) -> None:
    again = Coordinator(script.site, script.plan, place, "ee" * 16)
    at(script, "unmask", place, A)
    reply = again.ask(A, again.honest("join", A)[0])
    assert (reply.error, reply.reason) == ("RefusalError", "this silo contributed under this plan before")
    for step in ("join", "unmask"):  # the session itself goes on, and can be resumed
        assert not isinstance(script.ask(A, script.requests[step][A][0], place), Refusal)

    shutil.rmtree(place / "state")
    at(script, "survivors", place, A)
    again.do("join", [A])


def test_a_second_sum_under_the_same_plan_is_over_the_same_silos_or_none(script: Coordinator, place: Path) -> None:
    site = replace(script.site, repeat=True)
    shutil.copytree(script.place / "evaluate" / "state", place / "state")
    again = Coordinator(site, script.plan, place, "ee" * 16)
    for step in STEPS:  # the same silos: nothing can be learned from it, and nothing is masked with the same masks
        again.do(step)
    first, second = (c.replies["masked"][A][0].arrays["masked"] for c in (script, again))
    assert not (first == second).any()
    assert_over(script, place, A)  # beginning another session ends the one before

    fewer = Coordinator(site, script.plan, place, "dd" * 16)
    fewer.names = NAMES[:4]
    for step in STEPS[:5]:
        fewer.do(step)
    for name in fewer.names:
        reply = fewer.ask(name, fewer.honest("survivors", name)[0])
        assert (reply.error, "over other silos" in reply.reason) == ("SecurityError", True)
    fewer.requests = script.requests
    unmask = UnmaskRequest(**fewer.about, sum_of="statistics", signatures={A: "00" * 64})
    assert isinstance(fewer.ask(A, unmask), Refusal)


def with_other_data(site: Site, place: Path) -> Site:
    """The same silos, of which silo-a has one example more; they contribute in another session too."""
    directory = shutil.copytree(site.project.directory, place / "project", ignore=shutil.ignore_patterns("*.pem"))
    project = copy.copy(site.project)
    object.__setattr__(project, "directory", directory)
    shutil.copytree(site.project.directory / "state", directory / "state", dirs_exist_ok=True)
    with project.train(A).open("a") as file:
        file.write('{"text": "the old cat", "label": "animals"}\n')
    return replace(site, project=project, repeat=True)


def test_other_data_are_not_contributed_under_the_same_plan(script: Coordinator, place: Path) -> None:
    """Nobody is told why, and it stays so, in whatever session, until the silo's owner clears it."""
    at(script, "unmask", place, *NAMES)
    site = with_other_data(script.site, place)
    c = Coordinator(site, script.plan, place)
    c.do("join", [A])
    again = Coordinator(site, script.plan, place, "ee" * 16)
    for request in (c.honest("train", A)[0], again.honest("join", A)[0], script.requests["unmask"][A][0]):
        reply = c.ask(A, request)
        assert (reply.error, reply.reason) == ("FailureError", failed_in(request.phase))
    assert State(place / "state" / A, script.plan.digest).attempts.clear() == 1
    again.site = replace(script.site, repeat=True)  # the data as they were
    for step in ("join", "train"):
        again.do(step, [A])


def failed_in(phase: str) -> str:
    """All that a coordinator reads of a failure."""
    return f"this silo failed in phase {phase}; its own log has the reason"


def test_data_that_change_while_the_masked_vector_is_under_way_do_not_take_its_place(
    script: Coordinator, place: Path
) -> None:
    """The vector was masked; then silo-a trains on other data, the session goes on, and another one is tried."""
    at(script, "survivors", place, *NAMES)
    site = with_other_data(script.site, place)
    assert not isinstance(Coordinator(site, script.plan, place).ask(A, script.requests["train"][A][0]), Refusal)
    for name in NAMES:
        assert not isinstance(script.ask(name, script.requests["survivors"][name][0], place), Refusal)
    again = Coordinator(site, script.plan, place, "ee" * 16)
    for step in STEPS[:5]:
        again.do(step, [n for n in NAMES if (step, n) != ("train", A)])
    reply = again.ask(A, again.honest("survivors", A)[0])
    assert (reply.error, reply.reason) == ("FailureError", failed_in("survivors"))


def test_what_the_silo_file_does_not_allow_is_refused_at_join(script: Coordinator, place: Path) -> None:
    c = Coordinator(script.site, script.plan, place)
    join = c.honest("join", A)[0]
    other = script.site.plan("privacy.minimum-survivors=5")
    keys = {silo.name: silo.public_key for silo in c.plan.silo}
    swapped = c.plan.with_keys(exchanged(keys, A, B))  # type: ignore[arg-type]
    wider = script.site.layout.model_copy(update={"frozen": ()})
    for request, error in (
        (join.model_copy(update={"plan": other.digest, "plan_text": other.to_toml()}), "RefusalError"),
        (join.model_copy(update={"plan_text": other.to_toml()}), "FederationError"),
        (join.model_copy(update={"layout": wider.to_json()}), "FederationError"),
    ):
        assert c.ask(A, request).error == error
    taken = Coordinator(script.site, swapped, place)  # this silo approved it, and it names another key
    reply = taken.ask(A, taken.honest("join", A)[0])
    assert (reply.error, "another key" in reply.reason) == ("RefusalError", True)
    assert not (place / "state" / A).exists()
    script.site.silo(A, c.plan, place).identity()
    for step in STEPS[1:]:
        for request in script.requests[step][A]:
            assert (c.ask(A, request).error, c.ask(A, request).reason) == ("FederationError", "not joined")


def test_secrets_are_nowhere_but_on_the_silos_disk(
    site: Site, in_process_grid: Any, place: Path, watched: Watched, caplog: pytest.LogCaptureFixture
) -> None:
    secret_files = {name: site.project.identity(name).read_text().splitlines()[1] for name in NAMES[:4]}
    with caplog.at_level(logging.DEBUG):
        run = Run(site, site.plan(silos=4), place)
        run.start(in_process_grid, fault=gone({B: ("unmask", 1)}, refuses=True))
        lying = Run(site, run.plan, place / "second")
        with pytest.raises(RefusalError, match="do not open") as caught:
            lying.start(in_process_grid, fault=spoil_shares)
    assert left(lying, caught.value)["failure"]["error"] == "RefusalError"
    assert "SecurityError" in {reply.error for reply in lying.of(Refusal)}
    assert len(caplog.records) > 50
    assert {record.levelname for record in caplog.records} >= {"INFO", "ERROR"}
    places = {
        "log": caplog.text + "".join(str(record.__dict__) for record in caplog.records),
        "events": json.dumps(run.events + lying.events),
        "report": json.dumps(run.report),
        "refusals": "".join(reply.reason for reply in run.of(Refusal) + lying.of(Refusal)),
        "contexts": "".join(str(context) for r in (run, lying) for context in r.grid.contexts.values()),
        **{path.name: path.read_text() for path in run.out.glob("*.*") if path.is_file()},
        **{f"failed {path.name}": path.read_text() for path in lying.out.with_name("run.failed").iterdir()},
    }
    assert "transcript.jsonl" in places
    assert all(not context.state for r in (run, lying) for context in r.grid.contexts.values())
    secrets = watched.secrets | watched.shares | set(secret_files.values())
    assert len(secrets) > 4 * (5 + 4 * 4)
    for name, text in places.items():
        assert not [secret for secret in secrets if secret in text], name


def spoil_shares(visit: Any, deliver: Answer) -> RecordDict | Error:
    """What one silo sealed for the others is changed on the way, so that each of them ends the session."""
    reply = unpack(from_record(deliver()), REPLIES)
    if (visit.node, visit.phase) == (D, "shares"):
        reply = reply.model_copy(update={"sealed": {peer: flipped(text) for peer, text in reply.sealed.items()}})
    return to_record(pack(reply))
