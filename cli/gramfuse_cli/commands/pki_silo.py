"""`gramfuse pki silo`: makes a silo's node key."""

from __future__ import annotations

from pathlib import Path

import click

from gramfuse_cli.commands.pki import echo, say_kept
from gramfuse_cli.options import as_json as json_option
from gramfuse_deployment.key_files import make_node_key
from gramfuse_deployment.terminal import say


@click.command()
@click.argument("file", metavar="SILO_TOML", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option("--renew", is_flag=True, help="Replace the node key; keep the old file as .old.")
@json_option
def silo(file: Path, renew: bool, as_json: bool) -> None:
    """Make only a silo's node key, with which it authenticates to Flower, and print the public key.

    'gramfuse silo keygen' makes it too, together with the silo's identity. The private key goes into the file that
    SILO_TOML names as 'node-key' of [coordinator] (by default, for north.toml, north.key beside it), readable by its
    owner only ('--auth-supernode-private-key' of flower-supernode). The public key goes into the plan, as 'node-key' of
    this silo's [[silo]]. After --renew, put the new one into the plan, lock it again, and have each silo approve it.
    """
    from gramfuse_client.silo_file import Silo

    silo = Silo.read(file)
    public, kept = make_node_key(silo, renew=renew)
    if as_json:
        echo(name=silo.name, node_key_file=silo.node_key_path, node_key=public, kept=kept)
        return
    say_kept(kept)
    say(f"private key written to {silo.node_key_path}", err=True)
    say(f'node-key = "{public}"', copied=True)
