"""The coordinator's side: keeps a SuperLink, a SuperExec and nginx running on one machine."""

from __future__ import annotations

import os
import secrets
import sqlite3
import ssl
import tomllib
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import tomlkit
from cryptography import x509

from gramfuse_deployment.certificates import LOCAL_HOSTS
from gramfuse_deployment.endpoint import (
    check_free,
    free_port,
    healthy,
    host_of,
    is_loopback,
    listening_address,
    listens,
    port_of,
)
from gramfuse_deployment.nginx import find_nginx, write_configuration
from gramfuse_deployment.processes import BIN, MALLOC_SETTINGS
from gramfuse_deployment.superlink import SERVER, home_of
from gramfuse_deployment.supervisor import Service, Supervisor, say, supervised
from gramfuse_protocol.errors import FederationError, PlanError
from gramfuse_protocol.files import write_private


@contextmanager
def serving(directory: Path, host: str | None, port: int, *, insecure_loopback: bool = False) -> Iterator[Supervisor]:
    """Start the coordinator's processes; end all of them on exit.

    Args:
        directory: holds ca.crt, server.crt and server.key.
        host: IP address to listen on for silos; None means all addresses, or 127.0.0.1 with `insecure_loopback`.
        insecure_loopback: run without TLS and node keys, for silos on this machine only.

    Raises:
        PlanError: if a file or program is missing, or the directory is in use.
        FederationError: if the port is taken, or a process does not start.
    """
    nginx = find_nginx()
    if insecure_loopback:
        host = host or "127.0.0.1"
        if not is_loopback(host):
            raise PlanError(
                f"--insecure-loopback is only for silos on this machine, but others can reach {host}; leave it out"
            )
        hosts = [host]
    else:
        host = host or "0.0.0.0"  # noqa: S104  # nginx is open to all; node keys authenticate silos behind it
        hosts = check_certificate(directory)
    listen = listening_address(host, port)
    state = directory.resolve() / "superlink"
    home = home_of(directory.resolve())
    with supervised(state, ended=lambda: _compact(state / "state.db")) as supervisor:
        check_free(host, port)
        home.mkdir(mode=0o700, exist_ok=True)
        link = superlink_port(home)
        ca = None if insecure_loopback else directory.resolve() / "ca.crt"
        write_private(state / "secret", secrets.token_hex(32).encode("ascii"))
        write_private(home / "config.toml", _connection(link, ca).encode("utf-8"))
        write_configuration(state / "nginx.conf", host, port, link, tls=not insecure_loopback)
        for service in (
            _superlink(state, home, link, ca),
            _superexec(state, home, link, ca),
            _nginx(state, nginx, host, port),
        ):
            supervisor.start(service)
        say(f"the SuperLink is up, on 127.0.0.1:{link}; silos connect to {listen}")
        say(
            f'in each silo file: [coordinator] address = "{hosts[0]}:{port}"'
            + ("" if ca is None else f", ca = copy of {ca}")
        )
        yield supervisor


def check_certificate(directory: Path) -> list[str]:
    """Check the server's key and certificate in a directory, and return the host names that silos can dial.

    Raises:
        PlanError: if a file is missing, others can read the key, or the certificate does not match the key, is not
            valid now, or does not name localhost and 127.0.0.1.
    """
    ca, certificate, key = (directory / name for name in ("ca.crt", "server.crt", "server.key"))
    renew = f"gramfuse pki server {directory}"
    for path, make in ((ca, f"gramfuse pki init {directory} --host HOST"), (certificate, renew), (key, renew)):
        if not path.is_file():
            raise PlanError(f"{path}: no such file; make it with: {make}")
    if key.stat().st_mode & 0o077:
        raise PlanError(f"{key}: others on this machine can read it; run: chmod 600 {key}")
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key)
        parsed = x509.load_pem_x509_certificate(certificate.read_bytes())
        names = [str(name) for name in _names(parsed)]
    except (ssl.SSLError, ValueError, x509.ExtensionNotFound) as error:
        raise PlanError(
            f"{certificate}: not a server certificate for {key} ({error}); make both again: {renew} --renew"
        ) from None
    if not parsed.not_valid_before_utc <= datetime.now(UTC) < parsed.not_valid_after_utc:
        raise PlanError(
            f"{certificate}: valid only from {parsed.not_valid_before_utc:%Y-%m-%d} to "
            f"{parsed.not_valid_after_utc:%Y-%m-%d}; make a new one: {renew} --renew"
        )
    missing = [host for host in LOCAL_HOSTS[:2] if host not in names]
    if missing:
        raise PlanError(
            f"{certificate}: does not name {' and '.join(missing)}, which local processes use to reach the SuperLink; "
            f"it names {', '.join(names)}. Make a new one: {renew} --renew"
        )
    return [name for name in names if name not in LOCAL_HOSTS] or names


def superlink_port(home: Path) -> int:
    """Return a port for the SuperLink: the same as last time if it is free, so that clients find it again."""
    with suppress(OSError, ValueError, KeyError, FederationError):
        address = tomllib.loads((home / "config.toml").read_text(encoding="utf-8"))["superlink"][SERVER]["address"]
        check_free(host_of(address), port_of(address))
        return port_of(address)
    return free_port()


def _names(certificate: x509.Certificate) -> list[Any]:
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return [*names.get_values_for_type(x509.DNSName), *names.get_values_for_type(x509.IPAddress)]


def _connection(port: int, ca: Path | None) -> str:
    trust: dict[str, Any] = {"insecure": True} if ca is None else {"root-certificates": str(ca)}
    return tomlkit.dumps({"superlink": {"default": SERVER, SERVER: {"address": f"127.0.0.1:{port}", **trust}}})


def _compact(database: Path) -> None:
    """Compact the SuperLink's closed database, so that its files hold no deleted rows.

    Masked vectors and released shares went through it; between runs, only the silos' registrations remain.
    """
    if not database.exists():
        return
    try:
        with closing(sqlite3.connect(database, isolation_level=None)) as connection:
            for command in ("PRAGMA wal_checkpoint(TRUNCATE)", "VACUUM", "PRAGMA wal_checkpoint(TRUNCATE)"):
                connection.execute(command)
    except sqlite3.Error as error:
        say(f"{database}: cannot be compacted, so it may still hold messages that silos sent: {error}")


def _superlink(state: Path, home: Path, port: int, ca: Path | None) -> Service:
    command = [str(BIN / "flower-superlink"), "--host", "127.0.0.1", "--port", str(port), "--isolation", "process"]
    command += ["--superexec-auth-secret-file", str(state / "secret"), "--database", str(state / "state.db")]
    command += ["--disable-runtime-dependency-installation"]
    if ca is None:
        command += ["--insecure"]
    else:
        command += ["--enable-supernode-auth", "--ssl-ca-certfile", str(ca)]
        command += ["--ssl-certfile", str(ca.with_name("server.crt")), "--ssl-keyfile", str(ca.with_name("server.key"))]
    environment = {**MALLOC_SETTINGS, "FLWR_HOME": str(home)}
    return Service("SuperLink", command, state / "superlink.log", environment, ready=lambda: healthy(port, ca))


def _superexec(state: Path, home: Path, port: int, ca: Path | None) -> Service:
    command = [str(BIN / "flower-superexec"), "--runtime-api-address", f"127.0.0.1:{port}"]
    command += ["--superexec-auth-secret-file", str(state / "secret")]
    command += ["--insecure"] if ca is None else ["--root-certificates", str(ca)]
    path = f"{BIN}{os.pathsep}{os.environ.get('PATH', os.defpath)}"  # it starts flwr-serverapp by name
    environment = {**MALLOC_SETTINGS, "FLWR_HOME": str(home), "PATH": path}
    return Service("SuperExec", command, state / "superexec.log", environment)


def _nginx(state: Path, nginx: str, host: str, port: int) -> Service:
    command = [nginx, "-e", "stderr", "-p", f"{state}/", "-c", "nginx.conf"]
    dialled = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104
    return Service("nginx", command, state / "nginx.log", {}, ready=lambda: listens(dialled, port))
