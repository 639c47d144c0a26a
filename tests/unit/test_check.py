"""`gramfuse silo check`: each thing that is wrong is named with what to do, and what would leave is all that would."""

from __future__ import annotations

import json
import os
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

import pytest
from cryptography import x509

from gramfuse_cli.authority import Authority, certificate_pem, key_pem, new_key, server_names
from gramfuse_cli.main import main
from gramfuse_cli.project import Project
from gramfuse_client import check as check_module
from gramfuse_client.check import Report, check
from gramfuse_client.silo import Silo
from gramfuse_protocol import node_key
from gramfuse_protocol.layout import Layout
from gramfuse_protocol.plan import Plan

NAME = "silo-a"
YEAR = timedelta(days=365)


@dataclass
class Coordinator:
    """A coordinator's proxy, as far as a check sees it. All of it can be changed while it runs.

    Args:
        statuses: by path; 404 for others.
        ahead: how far its clock is.
        silent: whether it takes connections and says nothing.
    """

    directory: Path
    authority: Authority
    port: int = 0
    statuses: dict[str, int] = field(default_factory=dict)
    ahead: timedelta = timedelta()
    dated: bool = True
    asked: list[str] = field(default_factory=list)
    context: ssl.SSLContext = field(default_factory=lambda: ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER))

    def certify(self, names: list[x509.GeneralName], begin: datetime, days: int, authority: Authority | None = None) -> None:
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
    ours = Coordinator(directory, Authority.create("pico CA", now - 2 * YEAR, 3650))
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
        text = self.silo.read_text()
        self.silo.write_text(text.replace(self.plan.digest, plan.digest))
        self.plan = plan

    def check(self, **options: Any) -> Report:
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
