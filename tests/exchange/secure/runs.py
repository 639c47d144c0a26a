"""Secure exchanges between five silos, and what crosses the coordinator's door.

The silos are real Participants of a pico model; what they measure is measured once, and every run begins with silos
that have an empty disk and "train" by taking that.
"""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Context, Error, Message, RecordDict
from safetensors.numpy import load_file

from gramfuse_client.app import SiloApp
from gramfuse_client.silo_file import Silo
from gramfuse_model.loading.base_model import Base
from gramfuse_model.normal_equations import summands
from gramfuse_protocol.contract.layout import Layout
from gramfuse_protocol.contract.plan import Plan
from gramfuse_protocol.errors import GramfuseError, RefusalError
from gramfuse_protocol.messages.flower_records import from_record, to_record
from gramfuse_protocol.messages.phases import REPLIES, UnmaskReply, refusal
from gramfuse_protocol.messages.wire import pack, unpack
from gramfuse_protocol.secure_sum.fixed_point import encode
from gramfuse_protocol.secure_sum.scales import scales
from gramfuse_protocol.statistics.contribution import Statistics
from gramfuse_server.merging.accumulator import Accumulator
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


@dataclass(repr=False)
class Watched:
    """What happened at the silos that must not happen twice, and what may never leave them."""

    trained: Counter[str] = field(default_factory=Counter)
    masked: Counter[Path] = field(default_factory=Counter)
    secrets: set[str] = field(default_factory=set)
    shares: set[str] = field(default_factory=set)


def leaves(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif value is not None:
        for item in value.values() if isinstance(value, dict) else value:
            yield from leaves(item)


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


def left(run: Run, error: GramfuseError) -> dict[str, Any]:
    """The report of a run that failed, beside which nothing may be left but what a resumed run needs."""
    failed = run.out.with_name("run.failed")
    assert error.report == failed / "report.html"
    assert {path.name for path in failed.iterdir()} == {"plan.toml", "report.html", "report.json", "transcript.jsonl"}
    assert {path.name for path in run.place.iterdir()} <= {"state", "run.failed", "run.partial"}
    report = read_back(failed)
    assert report["failure"]["message"] == str(error)
    return report
