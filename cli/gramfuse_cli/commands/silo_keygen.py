"""`gramfuse silo keygen`: makes a silo's keys."""

from __future__ import annotations

import secrets
from pathlib import Path

import click

from gramfuse_cli.options import as_json as json_option
from gramfuse_deployment.key_files import make_node_key
from gramfuse_deployment.terminal import say, show_json
from gramfuse_protocol.contract.node_key import fingerprint
from gramfuse_protocol.secure_sum.keys import KEY_BYTES, Identity


@click.command()
@click.argument("file", metavar="SILO_TOML", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@json_option
def keygen(file: Path, as_json: bool) -> None:
    """Make the keys that authenticate this silo, and print their public keys.

    There are two: the identity authenticates this silo to other silos, and the node key authenticates it to the
    coordinator's Flower. The private keys go into the files that SILO_TOML names as 'identity' and as 'node-key' of
    [coordinator] (by default, for north.toml, north.pem and north.key beside it), readable by their owner only. A key
    that exists already is not replaced, because plans name it, but its public key is printed too. The public keys go
    into the plan, as 'public-key' and 'node-key' of this silo's [[silo]]. Hand them over on a channel that nobody can
    tamper with: anyone who can put their own keys into the plan can pose as this silo.
    """
    from gramfuse_client.silo_file import Silo, write_identity

    silo = Silo.read(file)
    has_identity, has_node_key = silo.identity_path.exists(), silo.node_key_path.exists()
    # Read the key that exists before making the other, so that nothing is written if it is invalid.
    identity = silo.identity() if has_identity else Identity(secrets.token_bytes(KEY_BYTES))
    node_key = silo.node_key() if has_node_key else make_node_key(silo)[0]
    if not has_identity:
        write_identity(silo.identity_path, identity)
    public = identity.public.hex()
    if as_json:
        show_json(
            {
                "name": silo.name,
                "identity": str(silo.identity_path),
                "node_key_file": str(silo.node_key_path),
                "public_key": public,
                "node_key": node_key,
                "fingerprint": fingerprint(node_key),
            }
        )
        return
    for path, existed in ((silo.identity_path, has_identity), (silo.node_key_path, has_node_key)):
        say(f"private key {'exists already:' if existed else 'written to'} {path}", err=True)
    say(f"fingerprint of the node key: {fingerprint(node_key)}", err=True)
    lines = (f'name = "{silo.name}"', f'public-key = "{public}"', f'node-key = "{node_key}"')
    say("[[silo]]", *lines, copied=True)
