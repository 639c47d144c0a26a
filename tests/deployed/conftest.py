"""Deployments as operators make them: certificates, keys, a server and silos, all by the commands, on loopback."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from gramfuse_client.data.examples import load
from gramfuse_client.exchange.local_model import train
from gramfuse_client.guard.ledger import Ledger
from gramfuse_client.silo_file import Silo
from gramfuse_client.state.masked_vector import write_masked
from gramfuse_deployment.processes import BIN, marked
from gramfuse_deployment.superlink import Link
from gramfuse_deployment.supervisor import mark_of
from gramfuse_model.loading.base_model import load_base
from gramfuse_model.normal_equations import summands
from gramfuse_protocol.contract.layout import Layout
from gramfuse_protocol.contract.plan import Plan
from gramfuse_protocol.secure_sum.scales import scales
from gramfuse_server.merging.accumulator import Accumulator
from gramfuse_server.report.merged_model import write_model

GRAMFUSE = str(BIN / "gramfuse")
CHANGED = Path(__file__).parent / "changed"
QUICK = {"FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.1", "OMP_NUM_THREADS": "1"}


def gramfuse(*arguments: str | Path) -> dict[str, Any]:
    """Run a command as a user does and return its JSON."""
    done = subprocess.run([GRAMFUSE, *map(str, arguments), "--json"], capture_output=True, text=True, timeout=800)
    assert done.returncode == 0, done.stderr + done.stdout
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def fails(*arguments: str | Path) -> str:
    """Run a command that must fail in a way that it knows, at once; return its message."""
    done = subprocess.run([GRAMFUSE, *map(str, arguments), "--json"], capture_output=True, text=True, timeout=60)
    assert done.returncode in (10, 16), done.stderr + done.stdout
    return str(json.loads(done.stdout)["error"]["message"])


@dataclass
class Started:
    """A command that goes on until it is told to stop.

    Args:
        directory: where it keeps what it runs; its processes are known by it.
        log: what it says on standard error.
    """

    process: subprocess.Popen[bytes]
    directory: Path
    log: Path

    @property
    def said(self) -> str:
        return self.log.read_text(encoding="utf-8")

    def wait_for(self, text: str, seconds: float = 40, times: int = 1) -> str:
        """Wait until it has said something, so many times; return all that it said."""
        deadline = time.monotonic() + seconds
        while self.said.count(text) < times:
            assert self.process.poll() is None, self.said
            assert time.monotonic() < deadline, f"{text!r} is not in:\n{self.said}{self.logs()}"
            time.sleep(0.05)
        return self.said

    def logs(self) -> str:
        """The last of what its processes wrote, for a failed test."""
        return "".join(f"\n--- {p}\n{p.read_text()[-2000:]}" for p in sorted(self.directory.glob("*.log")))

    def processes(self) -> list[psutil.Process]:
        """All processes that it started and that are there still; nginx shows no mark, but what it works with."""
        nginx = [
            p for p in psutil.process_iter(["cmdline"]) if f"-p {self.directory}/" in " ".join(p.info["cmdline"] or ())
        ]
        return [*marked(mark_of(self.directory)), *nginx, *(worker for master in nginx for worker in master.children())]

    def one(self, command: str) -> psutil.Process:
        """The process of one of its commands."""
        (process,) = [p for p in self.processes() if command in " ".join(p.cmdline()[:4])]
        return process

    def worker(self) -> psutil.Process:
        """The process of a silo that answers a message now."""
        (process,) = [w for p in self.one("gramfuse_client.runner").children() for w in p.children()]
        return process

    def stop(self, how: signal.Signals = signal.SIGTERM) -> int:
        """Tell it to stop and return its exit code."""
        self.process.send_signal(how)
        return self.process.wait(30)


@dataclass
class Running:
    """A `gramfuse run` that is under way.

    Args:
        out: its run directory, once it is complete.
        log, answer: what it says on standard error and on standard output.
        around: the coordinator and the silos, for what they say if it goes wrong.
    """

    process: subprocess.Popen[bytes]
    out: Path
    log: Path
    answer: Path
    around: list[Started]

    def crossed(self) -> list[tuple[str, str, str]]:
        """("to" or "from", silo, phase) of everything that its transcript has so far."""
        found = []
        for directory in (self.out.with_name(f"{self.out.name}.partial"), self.out):
            with contextlib.suppress(FileNotFoundError):
                text = (directory / "transcript.jsonl").read_text(encoding="utf-8")
                for entry in map(json.loads, text[: text.rfind("\n") + 1].splitlines()):
                    way = "to" if "to" in entry else "from"
                    found.append((way, entry[way], entry["phase"]))
        return found

    def wait_for(self, *message: str, seconds: float = 300) -> None:
        """Wait until a message, as `crossed` has it, is in the transcript."""
        deadline = time.monotonic() + seconds
        while message not in self.crossed():
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, f"no {message} in {self.crossed()}\n{self.told()}"
            time.sleep(0.05)

    def end(self, seconds: float = 420) -> tuple[int, dict[str, Any]]:
        """Wait until it ends; return its exit code, and its report or error."""
        try:
            code = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"it does not end:\n{self.told()}") from None
        answer = json.loads(self.answer.read_text())
        return code, answer.get("error", answer)

    def report(self, seconds: float = 420) -> dict[str, Any]:
        """Wait until it ends well, and return its report."""
        code, answer = self.end(seconds)
        assert code == 0, f"{answer}\n{self.log.read_text()}"
        return answer

    def told(self) -> str:
        """What it said, and all around it."""
        return self.log.read_text() + "".join(f"\n--- {c.log}\n{c.said}{c.logs()}" for c in self.around)

    def weights(self) -> bytes:
        """The merged model, once it is complete."""
        return (self.out / "model" / "model.safetensors").read_bytes()


@dataclass
class Deployment:
    """A coordinator and its silos.

    Args:
        directory: of all of it.
        project: whose silo files lead to the coordinator, if there is one.
        insecure: without TLS and node keys.
    """

    directory: Path
    project: Any = None
    insecure: bool = False
    port: int = 0
    started: list[Started] = field(default_factory=list)
    running: list[Running] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)
    """Of all that is started from now on, beside this process's own."""

    def __post_init__(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self.port = probe.getsockname()[1]
        self.coordinator.mkdir(parents=True)
        if not self.insecure:
            gramfuse("pki", "init", self.coordinator, "--host", "localhost")
            gramfuse("pki", "server", self.coordinator)
        if self.project:
            self._agree()

    @property
    def coordinator(self) -> Path:
        """DIR of `gramfuse server start`; with a space, as people have them."""
        return self.directory / "the coordinator"

    @property
    def ca(self) -> Path:
        return self.coordinator / "ca.crt"

    def server_port(self) -> int:
        """The SuperLink's own, behind the proxy."""
        return int(Link.of_server(self.coordinator).address.rpartition(":")[2])

    def start_server(self, *options: str, host: str = "127.0.0.1") -> Started:
        """Start the coordinator's side and wait until it is up."""
        options += ("--host", host, "--port", str(self.port))
        if self.insecure:
            options += ("--insecure-loopback",)
        server = self.start("server", "start", str(self.coordinator), *options, of=self.coordinator / "superlink")
        server.wait_for("to run an exchange")
        return server

    def start_silo(self, name: str, *options: str, connected: bool = True) -> Started:
        """Start a silo, and wait until it is connected."""
        file = self.project.silo(name)
        if self.insecure:
            options += ("--insecure-loopback",)
        silo = self.start("silo", "start", str(file), *options, of=Silo.read(file).state / "node")
        if connected:
            silo.wait_for("connected to")
        return silo

    def start(self, *arguments: str, of: Path) -> Started:
        """Start a command that goes on until it is told to stop; the fixture ends it at the latest."""
        log = self.directory / f"{'-'.join(arguments[:2])}-{len(self.started)}.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                [GRAMFUSE, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=output,
                env={**os.environ, **QUICK, **self.environment},
            )
        self.started.append(Started(process, of, log))
        return self.started[-1]

    def hasten(self) -> None:
        """Have Flower miss a process after 20 s, where it takes a minute else."""
        self.change("HEARTBEAT", "10")

    def change(self, what: str, value: str) -> None:
        """Change something of the processes that are started from now on; see `changed/sitecustomize.py`."""
        self.environment |= {"PYTHONPATH": str(CHANGED), f"CHANGED_{what}": value}

    def register(self) -> None:
        """Let the silos connect before the first run, which would do it too."""
        gramfuse("server", "register", self.coordinator, self.project.directory)

    def run(self, *options: str | Path) -> dict[str, Any]:
        """Run one exchange and return its report."""
        return gramfuse("run", self.project.directory, self.coordinator, "--out", self.directory / "run", *options)

    def start_run(self, *options: str | Path, project: Any = None, out: str = "run") -> Running:
        """Start an exchange in the background; with --resume among the options it goes on with what `out` was."""
        path, number = self.directory / out, len(self.running)
        log, answer = (self.directory / f"run-{number}.{kind}" for kind in ("log", "json"))
        arguments = ["run", (project or self.project).directory, self.coordinator, *options, "--json"]
        arguments += [] if "--resume" in options else ["--out", path]
        with log.open("wb") as errors, answer.open("wb") as output:
            process = subprocess.Popen(
                [GRAMFUSE, *map(str, arguments)], stdin=subprocess.DEVNULL, stdout=output, stderr=errors
            )
        self.running.append(Running(process, path, log, answer, self.started))
        return self.running[-1]

    def resume(self, out: str = "run") -> Running:
        """Go on with an interrupted run in the background."""
        return self.start_run("--resume", self.directory / out, out=out)

    def state(self, name: str) -> Path:
        """Where a silo keeps what it has under the project's plan."""
        digest = Plan.read(self.project.plan).digest
        return Path(Silo.read(self.project.silo(name)).state) / digest

    def trained(self) -> dict[str, tuple[int, int]]:
        """By silo, what is another if it trained again."""
        found = {name: (self.state(name) / "statistics.safetensors").stat() for name in self.project.names}
        return {name: (stat.st_ino, stat.st_mtime_ns) for name, stat in found.items()}

    def check_silos(self, *names: str) -> None:
        """Check that the ledgers hold together, and that no silo has anything half-written or secret left."""
        for name in names or self.project.names:
            silo = Silo.read(self.project.silo(name))
            assert Ledger(silo.ledger, name).verify().number > 0
            left = [p for p in silo.state.rglob("*") if p.suffix in (".partial", ".masked")]
            assert left == [], name

    def stop(self) -> None:
        """End all of it, silos first; nothing may be left."""
        for running in self.running:
            if running.process.poll() is None:
                running.process.kill()
                running.process.wait()
        for command in reversed(self.started):
            if command.process.poll() is None:
                command.process.terminate()
        for command in reversed(self.started):
            command.process.wait(40)
        left = [process for command in self.started for process in command.processes()]
        for process in left:
            process.kill()
        assert not left

    def _agree(self) -> None:
        """Give every silo its keys and its coordinator, lock the plan with them, and have every silo approve it."""
        project = self.project
        for name in project.names:
            file = project.silo(name)
            with file.open("a", encoding="utf-8") as text:
                text.write(f'\n[coordinator]\naddress = "localhost:{self.port}"\nca = "{self.ca}"\n')
            if not self.insecure:
                key = gramfuse("silo", "keygen", file)["node_key"]
                project.replace(project.plan, f'name = "{name}"\n', f'name = "{name}"\nnode-key = "{key}"\n')
        digest = gramfuse("plan", "lock", project.directory)["plan_digest"]
        for name in project.names:
            text = project.silo(name).read_text(encoding="utf-8")
            project.silo(name).write_text(re.sub(r"approved = \[.*\]", f'approved = ["{digest}"]', text))


@pytest.fixture
def undisturbed(tmp_path: Path) -> Callable[..., bytes]:
    """Return a function that gives the weights that a project's secure run ends with, made without any of Flower."""

    def merge(project: Any, *silos: str) -> bytes:
        plan, layout = Plan.read(project.plan), Layout.read(project.directory / "layout.json")
        silos = silos or project.names
        total = np.zeros(layout.sum_entries, np.uint64)
        for name in silos:
            silo, base = Silo.read(project.silo(name)), load_base(plan, project.directory)
            measured = train(silo, plan, layout, base, load(silo, plan.task_of(silo.name))[0])
            values = summands(layout, measured, alpha=plan.merge.alpha, weighting=plan.merge.weighting)
            scaled = zip(values, scales(layout, len(plan.silo), plan.merge.weighting), strict=True)
            write_masked(
                tmp_path / "words", ((b.name, array, scale) for (b, array), (_, scale) in scaled), len(plan.silo), ()
            )
            total += np.fromfile(tmp_path / "words", np.uint64)
        accumulator = Accumulator(layout, alpha=plan.merge.alpha, weighting=plan.merge.weighting)
        accumulator.load(total, len(plan.silo))
        base = load_base(plan, project.directory)
        write_model(tmp_path / "undisturbed", base, accumulator.merge().rounded(), plan, silos, None)
        return (tmp_path / "undisturbed" / "model" / "model.safetensors").read_bytes()

    return merge


@pytest.fixture(name="gramfuse")
def _gramfuse() -> Callable[..., dict[str, Any]]:
    return gramfuse


@pytest.fixture(name="fails")
def _fails() -> Callable[..., str]:
    return fails


@pytest.fixture
def deploy(tmp_path: Path) -> Iterator[Callable[..., Deployment]]:
    """Return a function that makes a deployment: `deploy(project, insecure=False)`; nothing of it is started yet."""
    made: list[Deployment] = []

    def make(project: Any = None, *, insecure: bool = False) -> Deployment:
        made.append(Deployment(tmp_path / f"deployment-{len(made)}", project, insecure))
        return made[-1]

    yield make
    for deployment in made:
        deployment.stop()


@pytest.fixture(scope="module")
def coordinator(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """A coordinator without silos that is up, one for all tests of a module."""
    deployment = Deployment(tmp_path_factory.mktemp("coordinator") / "deployment")
    try:
        deployment.start_server()
        yield deployment
    finally:
        deployment.stop()
