"""`gramfuse server start`: runs the coordinator."""

from __future__ import annotations

import shlex
import time
from contextlib import suppress
from pathlib import Path

import click

from gramfuse_cli.commands.server import directory_argument
from gramfuse_cli.options import as_json as json_option
from gramfuse_cli.options import listening
from gramfuse_deployment import terminal
from gramfuse_deployment.coordinator import serving
from gramfuse_deployment.supervisor import POLL_SECONDS, say


@click.command()
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
