"""`gramfuse server`: what the coordinator's operator does."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import click

from gramfuse_cli.options import as_json as json_option
from gramfuse_deployment import terminal
from gramfuse_deployment.coordinator import serving
from gramfuse_deployment.endpoint import (
    listening_address,
)
from gramfuse_deployment.superlink import UNREGISTERED, Link
from gramfuse_deployment.supervisor import POLL_SECONDS, say
from gramfuse_model.project import Project
from gramfuse_protocol.errors import PlanError

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


def _status(word: str) -> str:
    return "revoked" if word == UNREGISTERED else word
