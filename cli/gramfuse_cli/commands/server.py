"""`gramfuse server`: what the coordinator's operator does."""

from __future__ import annotations

import os
import secrets
import shlex
import sqlite3
import ssl
import time
import tomllib
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import click
import tomlkit
from cryptography import x509

from gramfuse_cli.options import as_json as json_option
from gramfuse_deployment import terminal
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
from gramfuse_deployment.superlink import SERVER, UNREGISTERED, Link, home_of
from gramfuse_deployment.supervisor import POLL_SECONDS, Service, Supervisor, say, supervised
from gramfuse_model.project import Project
from gramfuse_protocol.errors import FederationError, PlanError
from gramfuse_protocol.files import write_private

F = TypeVar("F", bound=Callable[..., Any])

directory_argument = click.argument("directory", metavar="DIR", type=click.Path(path_type=Path, file_okay=False))


def _address(_: click.Context, __: click.Parameter, value: str | None) -> str | None:
    if value is not None:
        try:
            listening_address(value, 1)
        except PlanError as error:
            raise click.BadParameter(str(error)) from None
    return value


@click.group()
def server() -> None:
    """Run the coordinator's side, and say which silos may connect.

    DIR holds what 'gramfuse pki' made: ca.crt, server.crt and server.key. All else goes to DIR/superlink, among it the
    SuperLink's database: which silos are registered, and what they sent until it was fetched.
    """


def listening(command: F) -> F:
    """Add --host and --port."""
    for option in (
        click.option("--port", default=9443, show_default=True, type=click.IntRange(1, 65535), help="Port for silos."),
        click.option(
            "--host",
            metavar="IP",
            callback=_address,
            help="Address of this machine that silos come in by.  [default: 0.0.0.0, which is all of them]",
        ),
    ):
        command = option(command)
    return command


@server.command()
@directory_argument
@listening
@click.option(
    "--insecure-loopback",
    is_flag=True,
    help="Without TLS and node keys, for silos on this very machine only. To try things out.",
)
@json_option
def start(directory: Path, host: str | None, port: int, insecure_loopback: bool, as_json: bool) -> None:
    """Start the coordinator's side and keep it running, until Ctrl-C or SIGTERM.

    Flower's SuperLink and its SuperExec run on this machine's loopback, where whoever may log in here can command them.
    Silos reach nothing but an nginx in front, by TLS, and through it only the part of Flower that is meant for them;
    each is known by its node key. Silos come in at --host and --port; their silo files say so:

    \b
    [coordinator]
    address = "HOST:9443"   # by a name that is in server.crt
    ca = "ca.crt"           # a copy of DIR/ca.crt

    Then, here, for each exchange: gramfuse run PROJECT DIR. It survives that the SuperLink is killed: this command
    starts it again, with its database. With --json, standard output gets an object at the end.
    """
    with suppress(KeyboardInterrupt), serving(directory, host, port, insecure_loopback=insecure_loopback) as supervisor:
        say(f"to run an exchange, on this machine: gramfuse run PROJECT {shlex.quote(str(directory))}")
        while True:
            supervisor.poll()
            time.sleep(POLL_SECONDS)
    say("all of it has ended")
    if as_json:
        terminal.show_json({"directory": str(directory), "port": port})


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


@server.command()
@directory_argument
@click.argument("project", metavar="PROJECT", type=click.Path(path_type=Path, exists=True))
@json_option
def register(directory: Path, project: Path, as_json: bool) -> None:
    """Let the silos of a plan connect, before its first run, which would do it too.

    The server in DIR must be up. PROJECT is the directory of the plan, whose roster has the silos' node keys.
    """
    plan = Project.read(project).plan
    Link.of_server(directory).admit(plan)
    if as_json:
        terminal.show_json({"registered": list(plan.names)})
        return
    terminal.say(f"may connect: {', '.join(plan.names)}")


@server.command()
@directory_argument
@json_option
def silos(directory: Path, as_json: bool) -> None:
    """List the silos that are registered, with the fingerprints of their node keys, and which are connected.

    DIR is that of 'gramfuse server start', which must be running. A silo sees the same fingerprint by
    ssh-keygen -l -f NODE_KEY.
    """
    nodes = Link.of_server(directory).nodes()
    if as_json:
        found = [
            {"name": n.name, "status": _status(n.status), "fingerprint": n.fingerprint, "node_id": n.id} for n in nodes
        ]
        terminal.show_json({"silos": found})
        return
    for node in nodes:
        terminal.say(f"{node.name or node.id:<20} {_status(node.status):<11} {node.fingerprint}")
    if not nodes:
        terminal.say("none yet; gramfuse server register does it, or the first run of a plan", err=True)


@server.command()
@directory_argument
@click.argument("silo", metavar="SILO")
@json_option
def revoke(directory: Path, silo: str, as_json: bool) -> None:
    """Let a silo connect no more: cut its connection, and never take its node key again.

    SILO is a name or a fingerprint, as 'gramfuse server silos DIR' lists them; the server must be running. To come
    back the silo needs another node key ('gramfuse pki silo --renew'), in another plan.
    """
    link = Link.of_server(directory)
    nodes = [node for node in link.nodes() if node.status != UNREGISTERED]
    revoked = [node for node in nodes if silo in (node.name, node.fingerprint)]
    if not revoked:
        known = ", ".join(sorted({node.name for node in nodes})) or "none"
        raise PlanError(f"{directory}: no silo {silo!r} is registered; registered: {known}")
    for node in revoked:
        link.unregister(node)
    fingerprints = [node.fingerprint for node in revoked]
    if as_json:
        terminal.show_json({"silo": silo, "revoked": fingerprints})
        return
    for fingerprint in fingerprints:
        terminal.say(f"revoked {fingerprint}")


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


def _status(word: str) -> str:
    return "revoked" if word == UNREGISTERED else word


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
