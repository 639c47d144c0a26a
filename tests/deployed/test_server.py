"""`gramfuse server`: it starts, it stops, it starts again as it was, takes no bad certificate, shuts silos out."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from gramfuse_deployment.certificates import Authority, certificate_pem, key_pem, new_key, server_names
from gramfuse_deployment.coordinator import check_certificate
from gramfuse_deployment.endpoint import check_free, healthy
from gramfuse_deployment.superlink import Link
from gramfuse_protocol.contract import node_key
from gramfuse_protocol.errors import FederationError, PlanError

NOW = datetime.now(UTC)
Run = Callable[..., Any]


def test_it_stops_without_a_trace_and_starts_again_as_it_was(deploy: Run, gramfuse: Run, fails: Run) -> None:
    deployment = deploy()
    server = deployment.start_server()
    own = deployment.server_port()
    names = " ".join(" ".join(p.cmdline()) for p in server.processes())
    for process in ("flower-superlink", "flower-superexec", "nginx: master", "nginx: worker"):
        assert process in names
    key = node_key.generate()[1]
    Link.of_server(deployment.coordinator).register("north", key)
    (silo,) = gramfuse("server", "silos", deployment.coordinator)["silos"]
    assert (silo["name"], silo["status"]) == ("north", "registered")
    assert silo["fingerprint"].startswith("SHA256:")

    assert "is in use" in fails("server", "start", deployment.coordinator, "--host", "127.0.0.1", "--port", "1024")
    assert server.stop(signal.SIGTERM) == 0
    assert "stopped" in server.said
    assert not server.processes()
    for port in (own, deployment.port):
        check_free("127.0.0.1", port)
    assert "does not answer" in fails("server", "silos", deployment.coordinator)
    made = deployment.coordinator / "superlink"
    assert made.stat().st_mode & 0o777 == 0o700
    assert (made / "secret").stat().st_mode & 0o777 == (made / "state.db").stat().st_mode & 0o777 == 0o600

    deployment.start_server()
    assert deployment.server_port() == own
    assert gramfuse("server", "silos", deployment.coordinator)["silos"] == [silo]


def test_each_of_its_processes_is_started_again(deploy: Run, gramfuse: Run) -> None:
    deployment = deploy()
    server = deployment.start_server()
    Link.of_server(deployment.coordinator).register("north", node_key.generate()[1])
    before = {command: server.one(command) for command in ("flower-superlink", "flower-superexec", "nginx: master")}
    for process in before.values():
        process.kill()
    server.wait_for("SuperLink was killed by signal 9")
    server.wait_for("SuperExec was killed by signal 9")
    server.wait_for("nginx was killed by signal 9")
    deadline = time.monotonic() + 30
    while not healthy(deployment.server_port(), deployment.ca):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    for command, process in before.items():
        assert server.one(command).pid != process.pid
    assert [silo["name"] for silo in gramfuse("server", "silos", deployment.coordinator)["silos"]] == ["north"]


def test_a_port_that_is_taken_is_said_before_anything_starts(deploy: Run, fails: Run, coordinator: Any) -> None:
    deployment = deploy()
    arguments = ("server", "start", deployment.coordinator, "--host", "127.0.0.1", "--port", str(coordinator.port))
    assert f"127.0.0.1:{coordinator.port}: cannot listen there" in fails(*arguments)
    assert not (deployment.coordinator / "superlink" / "superlink.log").exists()


def test_without_tls_it_serves_this_machine_only(deploy: Run, fails: Run, gramfuse: Run) -> None:
    deployment = deploy(insecure=True)
    arguments = ("server", "start", deployment.coordinator, "--insecure-loopback")
    for host in ("0.0.0.0", "10.0.0.5", "::"):
        assert "--insecure-loopback" in fails(*arguments, "--host", host)
    deployment.start_server()
    assert gramfuse("server", "silos", deployment.coordinator) == {"silos": []}


def test_a_missing_file_is_named_with_the_command_that_makes_it(tmp_path: Path, fails: Run) -> None:
    message = fails("server", "start", tmp_path)
    assert f"{tmp_path}/ca.crt: no such file; make it with: gramfuse pki init {tmp_path}" in message
    assert list(tmp_path.iterdir()) == []


def certificates(directory: Path, hosts: tuple[str, ...] = (), days: int = 30, when: datetime = NOW) -> Path:
    """Make a coordinator's directory, with a certificate for these hosts and this machine's own names."""
    directory.mkdir()
    authority = Authority.create("test", server_names(hosts), when - timedelta(days=1), 400)
    key = new_key()
    made = authority.certify(key.public_key(), server_names(hosts), when, days)
    (directory / "ca.crt").write_bytes(certificate_pem(authority.certificate))
    (directory / "server.crt").write_bytes(certificate_pem(made))
    (directory / "server.key").write_bytes(key_pem(key))
    (directory / "server.key").chmod(0o600)
    return directory


def test_a_good_certificate_says_which_names_silos_dial(tmp_path: Path) -> None:
    assert check_certificate(certificates(tmp_path / "a", ("merge.example.org", "10.0.0.5"))) == [
        "merge.example.org",
        "10.0.0.5",
    ]
    assert check_certificate(certificates(tmp_path / "b")) == ["localhost", "127.0.0.1", "::1"]


def test_a_bad_certificate_is_refused(tmp_path: Path) -> None:
    def refused(directory: Path) -> str:
        with pytest.raises(PlanError) as caught:
            check_certificate(directory)
        return str(caught.value)

    open_key = certificates(tmp_path / "open")
    (open_key / "server.key").chmod(0o640)
    assert f"chmod 600 {open_key}/server.key" in refused(open_key)

    others_key = certificates(tmp_path / "others")
    (others_key / "server.key").write_bytes(key_pem(new_key()))
    assert "not a server certificate" in refused(others_key)

    authoritys = certificates(tmp_path / "authority")
    (authoritys / "server.crt").write_text("no certificate")
    assert "gramfuse pki server" in refused(authoritys)

    over = certificates(tmp_path / "over", days=10, when=NOW - timedelta(days=20))
    assert "valid only from" in refused(over)

    nameless = certificates(tmp_path / "nameless")
    hosts, key = server_names(["merge.example.org"]), new_key()
    authority = Authority.create("test", hosts, NOW, 400)
    made = authority.certify(key.public_key(), hosts[:1], NOW, 30)
    (nameless / "server.crt").write_bytes(certificate_pem(made))
    (nameless / "server.key").write_bytes(key_pem(key))
    assert "localhost and 127.0.0.1" in refused(nameless)


def test_a_certificate_of_another_authority_is_found_at_start(deploy: Run, fails: Run, tmp_path: Path) -> None:
    deployment = deploy()
    other = certificates(tmp_path / "other")
    os.replace(other / "ca.crt", deployment.ca)
    message = fails("server", "start", deployment.coordinator, "--host", "127.0.0.1", "--port", str(deployment.port))
    assert "not trusted" in message
    assert str(deployment.ca) in message


def test_a_key_that_is_registered_twice_or_not_at_all_is_said(coordinator: Any) -> None:
    link, key = Link.of_server(coordinator.coordinator), node_key.generate()[1]
    link.register("south", key)
    with pytest.raises(FederationError, match="already in use"):
        link.register("south", key)
    (south,) = [node for node in link.nodes() if node.name == "south"]
    assert south.key == key
    link.unregister(south)
    assert [node.status for node in link.nodes() if node.name == "south"] == ["unregistered"]


def test_nobody_is_revoked_by_mistake(coordinator: Any, fails: Run) -> None:
    Link.of_server(coordinator.coordinator).register("east", node_key.generate()[1])
    message = fails("server", "revoke", coordinator.coordinator, "west")
    assert "no silo 'west' is registered; registered: east" in message
