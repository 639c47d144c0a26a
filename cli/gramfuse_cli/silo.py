"""`gramfuse silo`: what a silo's operator does."""

from __future__ import annotations

import json
import secrets
from pathlib import Path

import click

from gramfuse_cli.options import as_json as json_option
from gramfuse_protocol.keys import KEY_BYTES, Identity


@click.group()
def silo() -> None:
    """Make a silo's key.

    A silo file (silo.toml) says what a silo brings and what it allows. It is private to the silo.
    """


@silo.command()
@click.argument("file", metavar="SILO_TOML", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@json_option
def keygen(file: Path, as_json: bool) -> None:
    """Make the key by which other silos know this one, and print the public half.

    The private half goes into the file that SILO_TOML names as 'identity' (by default identity.pem beside it), readable
    by its owner only; an existing file is left alone. The public half goes into the plan, as 'public-key' of this
    silo's [[silo]]. Hand it over in a way that nobody can tamper with: whoever can put a key of their own into the plan
    is that silo.
    """
    from gramfuse_client.silo import Silo, write_identity

    silo = Silo.read(file)
    identity = Identity(secrets.token_bytes(KEY_BYTES))
    write_identity(silo.identity_path, identity)
    public = identity.public.hex()
    if as_json:
        click.echo(json.dumps({"name": silo.name, "identity": str(silo.identity_path), "public_key": public}))
        return
    click.echo(f"private key written to {silo.identity_path}", err=True)
    click.echo(f'[[silo]]\nname = "{silo.name}"\npublic-key = "{public}"')
