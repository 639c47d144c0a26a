"""`gramfuse server revoke`: blocks a silo's node key."""

from __future__ import annotations

from pathlib import Path

import click

from gramfuse_cli.commands.server import directory_argument
from gramfuse_cli.options import as_json as json_option
from gramfuse_deployment.superlink import UNREGISTERED, Link
from gramfuse_deployment.terminal import say, show_json
from gramfuse_protocol.errors import PlanError


@click.command()
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
        show_json({"silo": silo, "revoked": fingerprints})
        return
    for fingerprint in fingerprints:
        say(f"revoked {fingerprint}")
