"""`gramfuse silo start`: it connects, it says what keeps it from connecting, it runs nothing of the coordinator's."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import psutil
import pytest
from flwr.proto.runtime_pb2 import AcquireTaskResponse
from flwr.proto.task_pb2 import Task
from flwr.supercore.constant import TaskType

from gramfuse_client.silo_file import Silo
from gramfuse_deployment import endpoint
from gramfuse_deployment.processes import contained
from gramfuse_deployment.silo_node import node_config
from gramfuse_deployment.tail import Growing
from gramfuse_protocol.errors import PlanError

Run = Callable[..., Any]


def test_it_connects_and_stops_without_a_trace(deploy: Run, pico_project: Run, fails: Run, gramfuse: Run) -> None:
    deployment = deploy(pico_project(silos=2))
    server = deployment.start_server()
    deployment.register()
    silo = deployment.start_silo("silo-a")
    listed = {silo["name"]: silo["status"] for silo in gramfuse("server", "silos", deployment.coordinator)["silos"]}
    assert listed == {"silo-a": "online", "silo-b": "registered"}
    file = deployment.project.silo("silo-a")
    assert "is in use" in fails("silo", "start", file)

    directory = silo.directory
    assert directory.stat().st_mode & 0o777 == 0o700
    for name in ("secret", "lock", "supernode.log", "superexec.log"):
        assert (directory / name).stat().st_mode & 0o777 == 0o600, name
    secret = (directory / "secret").read_text()
    commands = [process.cmdline() for process in silo.processes()]
    assert not [part for command in commands for part in command if "installation" in part or secret in part]
    flowers = [command for command in commands if not any("multiprocessing" in part for part in command)]
    assert len(flowers) == 2
    assert all("127.0.0.1" in command or "--runtime-api-address" in command for command in flowers)

    # A SuperNode that ends is started again, with the same key.
    silo.one("flower-supernode").terminate()
    silo.wait_for("SuperNode ended with status 0")
    silo.wait_for("connected to localhost", times=2)

    # A coordinator that goes away is waited for.
    server.stop()
    silo.wait_for(f"lost the connection to localhost:{deployment.port}")
    deployment.start_server()
    silo.wait_for(f"connected to localhost:{deployment.port} again")

    assert silo.stop(signal.SIGTERM) == 0
    assert silo.said.splitlines()[-1].endswith("silo-a: ended")
    assert not silo.processes()
    again = deployment.start_silo("silo-a")
    assert (directory / "secret").read_text() != secret
    assert again.stop(signal.SIGINT) == 0


def test_a_silo_that_is_revoked_is_cut_off_for_good(deploy: Run, pico_project: Run, gramfuse: Run, fails: Run) -> None:
    deployment = deploy(pico_project(silos=2))
    deployment.start_server()
    deployment.register()
    silo = deployment.start_silo("silo-a")
    (fingerprint,) = gramfuse("server", "revoke", deployment.coordinator, "silo-a")["revoked"]
    silo.wait_for("[code: 2004]")
    statuses = {s["name"]: s for s in gramfuse("server", "silos", deployment.coordinator)["silos"]}
    assert statuses["silo-a"]["status"] == "revoked"
    assert statuses["silo-b"]["status"] == "registered"
    key = Silo.read(deployment.project.silo("silo-a")).node_key_path
    printed = subprocess.run(["ssh-keygen", "-l", "-f", str(key)], capture_output=True, text=True, check=True).stdout
    assert fingerprint == statuses["silo-a"]["fingerprint"] == printed.split()[1]
    message = fails("run", deployment.project.directory, deployment.coordinator)
    for words in ("'silo-a'", fingerprint, "was revoked", "--renew"):
        assert words in message


def test_a_key_that_the_coordinator_does_not_know_is_said(deploy: Run, pico_project: Run) -> None:
    deployment = deploy(pico_project(silos=2))
    deployment.start_server()
    silo = deployment.start_silo("silo-a", connected=False)
    said = silo.wait_for("SuperNode ended as before")
    assert "Exit Code: 305" in said
    assert "registers" in said
    deployment.register()
    silo.wait_for("connected to")


def test_what_keeps_it_from_connecting_is_said(deploy: Run, pico_project: Run, gramfuse: Run, tmp_path: Path) -> None:
    deployment = deploy(pico_project(silos=2))
    file = deployment.project.silo("silo-a")
    silo = deployment.start_silo("silo-a", connected=False)
    silo.wait_for(f"localhost:{deployment.port} refuses the connection")
    assert silo.stop() == 0

    # The coordinator is there, under a name that is not in its certificate.
    deployment.start_server(host="127.0.0.2")
    deployment.project.replace(file, "localhost:", "127.0.0.2:")
    silo = deployment.start_silo("silo-a", connected=False)
    silo.wait_for("certificate: is not for 127.0.0.2")
    assert silo.stop() == 0

    # The silo has another authority's certificate.
    gramfuse("pki", "init", tmp_path / "other", "--host", "localhost")
    deployment.project.replace(file, str(deployment.ca), str(tmp_path / "other" / "ca.crt"))
    silo = deployment.start_silo("silo-a", connected=False)
    said = silo.wait_for("SuperNode ended with status 1: Exit Code: 305")
    assert f"{tmp_path}/other/ca.crt" in said


def test_missing_and_open_keys_are_refused(deploy: Run, pico_project: Run, fails: Run) -> None:
    deployment = deploy(pico_project(silos=2))
    file = deployment.project.silo("silo-a")
    silo = Silo.read(file)
    for path in (silo.node_key_path, silo.identity_path):
        path.chmod(0o644)
        assert f"chmod 600 {path}" in fails("silo", "start", file)
        path.chmod(0o600)
        path.rename(path.with_suffix(".away"))
        assert f"gramfuse silo keygen {file}" in fails("silo", "start", file)
        path.with_suffix(".away").rename(path)
    deployment.ca.unlink()
    message = fails("silo", "start", file)
    assert f"{deployment.ca}: no such file" in message
    assert "gramfuse pki init" in message
    deployment.project.replace(file, "[coordinator]\naddress", "[coordinators]\naddress")
    assert not (silo.state / "node").exists()


def test_without_tls_it_goes_to_this_machine_only(deploy: Run, pico_project: Run, fails: Run) -> None:
    deployment = deploy(pico_project(silos=2), insecure=True)
    file = deployment.project.silo("silo-a")
    local = f"localhost:{deployment.port}"
    for address in ("10.0.0.5:9443", "merge.example.org:9443", "0.0.0.0:9443", "localhost.example.org:9443"):
        deployment.project.replace(file, local, address)
        assert f"'coordinator.address' is {address}" in fails("silo", "start", file, "--insecure-loopback")
        deployment.project.replace(file, address, local)
    deployment.start_server()
    silo = deployment.start_silo("silo-a")
    assert silo.one("gramfuse_client.runner").is_running()  # what answers is the pinned worker all the same


def test_an_address_can_be_of_the_sixth_version() -> None:
    assert (endpoint.host_of("[::1]:9443"), endpoint.port_of("[::1]:9443")) == ("::1", 9443)
    assert [host for host in ("127.0.0.1", "::1", "localhost", "127.8.9.1") if not endpoint.is_loopback(host)] == []
    assert [h for h in ("0.0.0.0", "::", "10.0.0.1", "local", "127.0.0.1.org", "") if endpoint.is_loopback(h)] == []


def test_all_that_flower_could_start_at_a_silo_is_ours(tmp_path: Path) -> None:
    """A silo's SuperExec is given tasks of all of Flower's types, some of which run code that a coordinator brings."""
    others = sorted(set(TaskType) - {TaskType.CLIENT_APP})
    tasks = [Task(task_id=n, run_id=1, type=kind) for n, kind in enumerate([*others, TaskType.CLIENT_APP], 1)]
    asked = []

    class SuperNode(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            if not self.path.endswith("acquire-task"):
                asked.append((self.path, str(self.headers)))
                return self.send_error(401)
            answer = AcquireTaskResponse(task=tasks[0], token=f"token-{tasks.pop(0).type}") if tasks else None
            self.send_response(200)
            self.send_header("content-type", "application/protobuf")
            self.end_headers()
            return self.wfile.write(answer.SerializeToString() if answer else b"")

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    log = tmp_path / "superexec.log"
    with HTTPServer(("127.0.0.1", 0), SuperNode) as node:
        runner = [sys.executable, "-P", "-c", "from gramfuse_client.runner import main; main()", "--insecure"]
        with contained([*runner, "--runtime-api-address", f"127.0.0.1:{node.server_port}"], log, {}) as process:
            while not asked:
                node.handle_request()
            started = psutil.Process(process.pid).children(recursive=True)
            assert "token-" not in str([part for child in started for part in child.cmdline()])
    assert "token-flwr-clientapp" in asked[0][1]  # Flower's worker, with its token; no other task began
    for kind in others:
        assert f"a silo runs no {kind}: refused" in log.read_text()


@pytest.mark.parametrize(
    "path", ["/a b/silo.toml", '/a"b/silo.toml', "/o'brien/silo.toml", "/a\\b/silo.toml", "/ä/silo.toml"]
)
def test_flower_reads_the_silos_path_back(path: str) -> None:
    from flwr.common.config import parse_config_args

    assert parse_config_args([node_config(Path(path))]) == {"silo": path}


def test_a_path_that_flower_could_not_read_is_refused() -> None:
    for path in ("/o'brien's \"x\"/silo.toml", "/a\nb/silo.toml", "/a' silo='b\t/silo.toml"):
        with pytest.raises(PlanError):
            node_config(Path(path))


def test_a_growing_file_is_read_line_by_line(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    assert Growing(path).lines() == []
    path.write_text("old\n")
    file = Growing(path)
    assert file.lines() == []
    with path.open("a") as more:
        more.write("one\ntw")
        more.flush()
        assert file.lines() == ["one"]
        more.write("o\n")
    assert file.lines() == ["two"]
    path.rename(tmp_path / "away")
    assert file.lines() == []
    path.write_text("a new one, longer than what was there\n")
    assert file.lines() == ["a new one, longer than what was there"]
    path.write_text("cut\n")
    assert file.lines() == ["cut"]
