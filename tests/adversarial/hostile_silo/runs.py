"""One silo of four means harm: it has its key and its place in the roster, and sends what nobody expects.

It hopes to end the run, to end every resume of it too, or to have the coordinator run something. What it gets is its
own loss: the others' models are merged without it, and a run that was interrupted afterwards goes on without it too."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_ssh_public_key
from flwr.app import Error, RecordDict

from gramfuse_client.app import SiloApp
from gramfuse_client.data.examples import load
from gramfuse_client.exchange import local_model
from gramfuse_client.silo_file import Silo
from gramfuse_model.loading.base_model import Base, load_base
from gramfuse_model.project import Project
from gramfuse_protocol.contract.node_key import generate
from gramfuse_protocol.contract.plan import Plan
from gramfuse_protocol.secure_sum.keys import Identity
from gramfuse_protocol.statistics.contribution import Statistics
from gramfuse_server.run.exchange import Exchange
from gramfuse_server.run.patience import Patience
from gramfuse_server.run_directory import RunDirectory
from tests.grid import InProcessGrid

A, B, C, D = NAMES = tuple(f"silo-{letter}" for letter in "abcd")
PIECE_BYTES = 16384


class Federation:
    """Four silos with real state on their disks. What they measure is measured once for all tests."""

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
