"""Sites, the coordinator's proxy, and `gramfuse` in this process."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from gramfuse_cli.main import main
from gramfuse_deployment.certificates import Authority, certificate_pem, server_names
from gramfuse_model.project import Project
from gramfuse_protocol.contract import node_key
from tests.client.dry_run.sites import NAME, YEAR, Coordinator, Site


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
