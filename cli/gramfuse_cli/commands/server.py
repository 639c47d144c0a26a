"""`gramfuse server`: commands of the coordinator's operator."""

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
    """Run the coordinator, and manage which silos can connect.

    DIR holds the files that 'gramfuse pki' made: ca.crt, server.crt and server.key. Everything else goes to
    DIR/superlink, including the SuperLink's database: the registered silos, and their messages until they are fetched.
    """


def listening(command: F) -> F:
    """Add --host and --port."""
    for option in (
        click.option("--port", default=9443, show_default=True, type=click.IntRange(1, 65535), help="Port for silos."),
        click.option(
            "--host",
            metavar="IP",
            callback=_address,
            help="Address of this machine to listen on for silos.  [default: 0.0.0.0, all addresses]",
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
    help="Run without TLS and node keys, only for silos on this same machine. For trying things out.",
)
@json_option
def start(directory: Path, host: str | None, port: int, insecure_loopback: bool, as_json: bool) -> None:
    """Start the coordinator and keep it running, until Ctrl-C or SIGTERM.

    Flower's SuperLink and SuperExec run on this machine's loopback, where any user of this machine can command them.
    Silos reach only an nginx in front of them, over TLS, and through it only the part of Flower meant for silos. Each
    silo authenticates with its node key. Silos connect to --host and --port, as their silo files say:

    \b
    [coordinator]
    address = "HOST:9443"   # a name that is in server.crt
    ca = "ca.crt"           # a copy of DIR/ca.crt

    Then, on this machine, for each exchange: gramfuse run PROJECT DIR. A run survives a crash of the SuperLink: this
    command restarts it with its database. With --json, one object is printed at the end.
    """
    with suppress(KeyboardInterrupt), serving(directory, host, port, insecure_loopback=insecure_loopback) as supervisor:
        say(f"to run an exchange, on this machine: gramfuse run PROJECT {shlex.quote(str(directory))}")
        while True:
            supervisor.poll()
            time.sleep(POLL_SECONDS)
    say("stopped")
    if as_json:
        terminal.show_json({"directory": str(directory), "port": port})


@server.command()
@directory_argument
@click.argument("project", metavar="PROJECT", type=click.Path(path_type=Path, exists=True))
@json_option
def register(directory: Path, project: Path, as_json: bool) -> None:
    """Register the silos of a plan, so that they can connect before its first run, which also registers them.

    The server in DIR must be running. PROJECT is the directory of the plan; its roster has the silos' node keys.
    """
    plan = Project.read(project).plan
    Link.of_server(directory).admit(plan)
    if as_json:
        terminal.show_json({"registered": list(plan.names)})
        return
    terminal.say(f"registered: {', '.join(plan.names)}")


@server.command()
@directory_argument
@json_option
def silos(directory: Path, as_json: bool) -> None:
    """List the registered silos, the fingerprints of their node keys, and which of them are connected.

    DIR is the directory of 'gramfuse server start', which must be running. A silo gets the same fingerprint with:
    ssh-keygen -l -f NODE_KEY
    """
    nodes = Link.of_server(directory).nodes()
    if as_json:
        entries = [
            {"name": n.name, "status": _status(n.status), "fingerprint": n.fingerprint, "node_id": n.id} for n in nodes
        ]
        terminal.show_json({"silos": entries})
        return
    for node in nodes:
        terminal.say(f"{node.name or node.id:<20} {_status(node.status):<11} {node.fingerprint}")
    if not nodes:
        terminal.say("none yet; register silos with gramfuse server register, or run a plan", err=True)


@server.command()
@directory_argument
@click.argument("silo", metavar="SILO")
@json_option
def revoke(directory: Path, silo: str, as_json: bool) -> None:
    """Disconnect a silo and block its node key permanently.

    SILO is a name or a fingerprint, as listed by 'gramfuse server silos DIR'; the server must be running. To return,
    the silo needs a new node key ('gramfuse pki silo --renew'), in a new plan.
    """
    link = Link.of_server(directory)
    nodes = [node for node in link.nodes() if node.status != UNREGISTERED]
    revoked = [node for node in nodes if silo in (node.name, node.fingerprint)]
    if not revoked:
        names = ", ".join(sorted({node.name for node in nodes})) or "none"
        raise PlanError(f"{directory}: no silo {silo!r} is registered; registered: {names}")
    for node in revoked:
        link.unregister(node)
    fingerprints = [node.fingerprint for node in revoked]
    if as_json:
        terminal.show_json({"silo": silo, "revoked": fingerprints})
        return
    for fingerprint in fingerprints:
        terminal.say(f"revoked {fingerprint}")


def _status(status: str) -> str:
    return "revoked" if status == UNREGISTERED else status
