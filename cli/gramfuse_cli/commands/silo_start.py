"""`gramfuse silo start`: runs a silo's node, which connects to the coordinator and answers its requests.

Flower's SuperNode transports messages. For each message it has a SuperExec start a worker. The SuperExec is our own, so
that only the installed gramfuse ever runs (`gramfuse_client.runner`, `gramfuse_client.worker`).
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import click

from gramfuse_cli.options import as_json as json_option
from gramfuse_deployment.silo_node import check_keys, follow, services
from gramfuse_deployment.silo_watch import Watch
from gramfuse_deployment.supervisor import say, supervised
from gramfuse_deployment.terminal import show_json


@click.command()
@click.argument("file", metavar="SILO_TOML", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option(
    "--insecure-loopback",
    is_flag=True,
    help="Connect without TLS and node key, only to a coordinator on this same machine. For trying things out.",
)
@click.option("--once", is_flag=True, help="Exit with 0 when one exchange is over.")
@json_option
def start(file: Path, insecure_loopback: bool, once: bool, as_json: bool) -> None:
    """Connect this silo to its coordinator and answer its requests, until Ctrl-C or SIGTERM.

    [coordinator] of SILO_TOML names the coordinator's address, its authority's certificate and this silo's node key.
    The silo trains and contributes when the coordinator runs a plan whose digest is listed in 'approved', within
    [limits]. Only the gramfuse installed here runs, never code that a coordinator sends. Each message that the silo
    sends is shown here and recorded in the ledger. Processes that end are restarted. With --json, one object is printed
    at the end: the numbers of replies, refusals and bytes sent.
    """
    from gramfuse_client.silo_file import Silo
    from gramfuse_client.worker import check_flower

    check_flower()
    silo = Silo.read(file)
    address = silo.coordinator.address
    ca = None if insecure_loopback else silo.ca_path
    check_keys(silo, insecure=insecure_loopback)
    directory = silo.state / "node"
    watch = Watch(silo, address, directory, tls=ca is not None)
    with suppress(KeyboardInterrupt), supervised(directory) as supervisor:
        say(f"{silo.name}: connecting to {address}")
        for service in services(silo, directory, address, ca, watch):
            supervisor.start(service)
        follow(supervisor, watch, once=once)
    say(f"{silo.name}: ended")
    if as_json:
        show_json({"silo": silo.name, "replies": watch.replies, "refusals": watch.refusals, "bytes": watch.bytes})
