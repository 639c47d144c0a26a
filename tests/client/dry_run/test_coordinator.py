"""The way to the coordinator: clock, proxy, certificate, authority, name server."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.hashes import SHA256

from gramfuse_client.dry_run import of_coordinator as connection
from gramfuse_client.silo_file import Silo
from gramfuse_deployment.certificates import Authority, certificate_pem, key_pem, new_key, server_names
from tests.client.dry_run.sites import YEAR, Coordinator, Site, finding, problems


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
    assert f"to {datetime.now(UTC) - YEAR + timedelta(days=30):%Y-%m-%d}, but here" in said
    assert "gramfuse pki server DIR --host 127.0.0.1 --renew" in said


def test_a_certificate_that_ends_soon_is_a_notice(site: Site, coordinator: Coordinator) -> None:
    coordinator.certify(server_names([]), datetime.now(UTC), 20)
    report = site.check()
    assert not problems(report)
    assert "expires in 19 days" in finding(report, "certificate").remedy


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
    assert "intercepting" in said


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
    assert "not valid now" in certificate(site)


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
    [(b"HTTP/1.1 400 Bad Request\r\n\r\n", "no TLS"), (None, "handshake did not finish")],
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
    assert "nothing listens" in found["connection"]
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
    assert said.startswith("coordinator's clock: this clock is 50 s ahead")
    assert "timedatectl" in said
    assert "\n" not in said
    assert "SuperLink: " in connection.obstacle(silo, tls=False)


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
    assert "no result within" in problems(report)["connection"]
