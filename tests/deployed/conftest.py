"""Deployments as operators make them: certificates, keys, a server and silos, all by the commands, on loopback."""

from __future__ import annotations

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

import psutil
import pytest

from gramfuse_cli.link import Link
from gramfuse_cli.processes import BIN, marked
from gramfuse_cli.supervisor import mark_of
from gramfuse_client.silo import Silo

GRAMFUSE = str(BIN / "gramfuse")


def gramfuse(*arguments: str | Path) -> dict[str, Any]:
    """Run a command as a user does and return its JSON."""
    done = subprocess.run([GRAMFUSE, *map(str, arguments), "--json"], capture_output=True, text=True, timeout=240)
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
        (process,) = [p for p in self.processes() if command in " ".join(p.cmdline()[:2])]
        return process

    def stop(self, how: signal.Signals = signal.SIGTERM) -> int:
        """Tell it to stop and return its exit code."""
        self.process.send_signal(how)
        return self.process.wait(30)


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

    def __post_init__(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self.port = probe.getsockname()[1]
        self.coordinator.mkdir(parents=True)
        if not self.insecure:
            gramfuse("pki", "init", self.coordinator)
            gramfuse("pki", "server", self.coordinator, "--host", "localhost")
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
                env={**os.environ, "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.1", "OMP_NUM_THREADS": "1"},
            )
        self.started.append(Started(process, of, log))
        return self.started[-1]

    def register(self) -> None:
        """Let the silos connect before the first run, which would do it too."""
        gramfuse("server", "register", self.coordinator, self.project.directory)

    def run(self, *options: str | Path) -> dict[str, Any]:
        """Run one exchange and return its report."""
        return gramfuse("run", self.project.directory, self.coordinator, "--out", self.directory / "run", *options)

    def stop(self) -> None:
        """End all of it, silos first; nothing may be left."""
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
