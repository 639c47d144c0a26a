"""`gramfuse server silos`: lists the registered silos."""

from __future__ import annotations

from pathlib import Path

import click

from gramfuse_cli.commands.server import directory_argument
from gramfuse_cli.options import as_json as json_option
from gramfuse_deployment.superlink import UNREGISTERED, Link
from gramfuse_deployment.terminal import say, show_json


@click.command()
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
        show_json({"silos": entries})
        return
    for node in nodes:
        say(f"{node.name or node.id:<20} {_status(node.status):<11} {node.fingerprint}")
    if not nodes:
        say("none yet; register silos with gramfuse server register, or run a plan", err=True)


def _status(status: str) -> str:
    return "revoked" if status == UNREGISTERED else status
