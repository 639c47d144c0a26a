"""`gramfuse server`: commands of the coordinator's operator."""

from __future__ import annotations

from pathlib import Path

import click

from gramfuse_cli.group import FileGroup

directory_argument = click.argument("directory", metavar="DIR", type=click.Path(path_type=Path, file_okay=False))


@click.group(cls=FileGroup, prefix="server_")
def server() -> None:
    """Run the coordinator, and manage which silos can connect.

    DIR holds the files that 'gramfuse pki' made: ca.crt, server.crt and server.key. Everything else goes to
    DIR/superlink, including the SuperLink's database: the registered silos, and their messages until they are fetched.
    """
