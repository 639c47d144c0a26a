"""The coordinator's side: SuperLink, SuperExec and nginx, kept running on one machine."""

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
from gramfuse_deployment.processes import BIN, GIVE_BACK
from gramfuse_deployment.superlink import SERVER, home_of
from gramfuse_deployment.supervisor import Service, Supervisor, say, supervised
from gramfuse_protocol.errors import FederationError, PlanError
from gramfuse_protocol.files import write_private


@contextmanager
def serving(directory: Path, host: str | None, port: int, *, insecure_loopback: bool = False) -> Iterator[Supervisor]:
    """Start the coordinator's side; on leaving, all of it is ended.

    Args:
        directory: with ca.crt, server.crt and server.key.
        host: IP address that silos come in by; None is all of them, or with `insecure_loopback` 127.0.0.1.

    Raises:
        PlanError: if something that it needs is missing or taken.
        FederationError: if one of its processes does not come up.
    """
    nginx = find_nginx()
    if insecure_loopback:
        host = host or "127.0.0.1"
        if not is_loopback(host):
            raise PlanError(
                f"--insecure-loopback is for this machine's own silos, and {host} is for others; leave it out"
            )
        hosts = [host]
    else:
        host = host or "0.0.0.0"  # noqa: S104  # nginx is there for everyone, and behind it node keys decide
        hosts = check_certificate(directory)
    listen = listening_address(host, port)
    own = directory.resolve() / "superlink"
    home = home_of(directory.resolve())
    with supervised(own, ended=lambda: _compact(own / "state.db")) as supervisor:
        check_free(host, port)
        home.mkdir(mode=0o700, exist_ok=True)
        link = own_port(home)
        ca = None if insecure_loopback else directory.resolve() / "ca.crt"
        write_private(own / "secret", secrets.token_hex(32).encode("ascii"))
        write_private(home / "config.toml", _connection(link, ca).encode("utf-8"))
        write_configuration(own / "nginx.conf", host, port, link, tls=not insecure_loopback)
        for service in (
            _superlink(own, home, link, ca),
            _superexec(own, home, link, ca),
            _nginx(own, nginx, host, port),
        ):
            supervisor.start(service)
        say(f"the SuperLink is up, on 127.0.0.1:{link}; silos come in at {listen}")
        say(
            f'in each silo file: [coordinator] address = "{hosts[0]}:{port}"'
            + ("" if ca is None else f", ca = copy of {ca}")
        )
        yield supervisor


def check_certificate(directory: Path) -> list[str]:
    """Return the names that silos can dial by the certificate in DIR.

    Raises:
        PlanError: if a file is missing, others can read the key, the certificate is not the key's, is not valid now, or
            lacks one of this machine's own names.
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
        found = x509.load_pem_x509_certificate(certificate.read_bytes())
        names = [str(name) for name in _names(found)]
    except (ssl.SSLError, ValueError, x509.ExtensionNotFound) as error:
        raise PlanError(
            f"{certificate}: is not a server's certificate of {key} ({error}); make both anew: {renew} --renew"
        ) from None
    if not found.not_valid_before_utc <= datetime.now(UTC) < found.not_valid_after_utc:
        raise PlanError(
            f"{certificate}: is valid from {found.not_valid_before_utc:%Y-%m-%d} to "
            f"{found.not_valid_after_utc:%Y-%m-%d}; make another: {renew} --renew"
        )
    missing = [host for host in LOCAL_HOSTS[:2] if host not in names]
    if missing:
        raise PlanError(
            f"{certificate}: does not name {' and '.join(missing)}, where the SuperLink is dialled on its own machine; "
            f"it names {', '.join(names)}. Make another: {renew} --renew"
        )
    return [name for name in names if name not in LOCAL_HOSTS] or names


def own_port(home: Path) -> int:
    """Return the SuperLink's port: as before, so that whoever used it finds it again, or else a free one."""
    with suppress(OSError, ValueError, KeyError, FederationError):
        before = tomllib.loads((home / "config.toml").read_text(encoding="utf-8"))["superlink"][SERVER]["address"]
        check_free(host_of(before), port_of(before))
        return port_of(before)
    return free_port()


def _names(certificate: x509.Certificate) -> list[Any]:
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return [*names.get_values_for_type(x509.DNSName), *names.get_values_for_type(x509.IPAddress)]


def _connection(port: int, ca: Path | None) -> str:
    trust: dict[str, Any] = {"insecure": True} if ca is None else {"root-certificates": str(ca)}
    return tomlkit.dumps({"superlink": {"default": SERVER, SERVER: {"address": f"127.0.0.1:{port}", **trust}}})


def _compact(database: Path) -> None:
    """Rewrite the SuperLink's database once it is closed, since what was deleted in it would still stand in its files.

    Between runs it holds nothing but which silos are registered; masked vectors and released shares went through it.
    """
    if not database.exists():
        return
    try:
        with closing(sqlite3.connect(database, isolation_level=None)) as connection:
            for command in ("PRAGMA wal_checkpoint(TRUNCATE)", "VACUUM", "PRAGMA wal_checkpoint(TRUNCATE)"):
                connection.execute(command)
    except sqlite3.Error as error:
        say(f"{database}: cannot be compacted, so it may still hold what silos sent: {error}")


def _superlink(own: Path, home: Path, port: int, ca: Path | None) -> Service:
    command = [str(BIN / "flower-superlink"), "--host", "127.0.0.1", "--port", str(port), "--isolation", "process"]
    command += ["--superexec-auth-secret-file", str(own / "secret"), "--database", str(own / "state.db")]
    command += ["--disable-runtime-dependency-installation"]
    if ca is None:
        command += ["--insecure"]
    else:
        command += ["--enable-supernode-auth", "--ssl-ca-certfile", str(ca)]
        command += ["--ssl-certfile", str(ca.with_name("server.crt")), "--ssl-keyfile", str(ca.with_name("server.key"))]
    environment = {**GIVE_BACK, "FLWR_HOME": str(home)}
    return Service("SuperLink", command, own / "superlink.log", environment, ready=lambda: healthy(port, ca))


def _superexec(own: Path, home: Path, port: int, ca: Path | None) -> Service:
    command = [str(BIN / "flower-superexec"), "--runtime-api-address", f"127.0.0.1:{port}"]
    command += ["--superexec-auth-secret-file", str(own / "secret")]
    command += ["--insecure"] if ca is None else ["--root-certificates", str(ca)]
    path = f"{BIN}{os.pathsep}{os.environ.get('PATH', os.defpath)}"  # it starts flwr-serverapp by name
    return Service("SuperExec", command, own / "superexec.log", {**GIVE_BACK, "FLWR_HOME": str(home), "PATH": path})


def _nginx(own: Path, nginx: str, host: str, port: int) -> Service:
    command = [nginx, "-e", "stderr", "-p", f"{own}/", "-c", "nginx.conf"]
    dialled = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104
    return Service("nginx", command, own / "nginx.log", {}, ready=lambda: listens(dialled, port))
