"""`gramfuse pki`: keys and certificates for the connections between silos and coordinator."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Any

import click
from cryptography import x509

from gramfuse_cli.group import FileGroup
from gramfuse_deployment.certificates import LEAST_PASSPHRASE, server_names
from gramfuse_deployment.terminal import say, show_json
from gramfuse_protocol.documents import read_text
from gramfuse_protocol.errors import PlanError

MOST_DAYS = 36500


def as_hosts(_: click.Context, __: click.Parameter, value: tuple[str, ...]) -> list[x509.GeneralName]:
    """Parse each --host.

    Raises:
        click.BadParameter: if one is neither a name nor an IP address.
    """
    try:
        return server_names(value) if value else []
    except ValueError as error:
        raise click.BadParameter(str(error)) from None


passphrase_file = click.option(
    "--passphrase-file",
    metavar="FILE",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Read the passphrase of ca.key from the first line of this file.",
)


def read_passphrase(path: Path) -> bytes:
    """Read a passphrase from the first line of a file.

    Raises:
        PlanError: if the file cannot be read, others can read it too, or the passphrase is too short.
    """
    lines = read_text(path).splitlines()
    if path.stat().st_mode & 0o077:
        raise PlanError(f"{path}: others on this machine can read it; run: chmod 600 {path}")
    return check_length(lines[0] if lines else "", str(path))


def check_length(text: str, where: str) -> bytes:
    """Return a passphrase as bytes.

    Args:
        where: where it was read, for the error.

    Raises:
        PlanError: if it is too short.
    """
    if len(text) < LEAST_PASSPHRASE:
        raise PlanError(
            f"{where}: the passphrase has {len(text)} characters, and needs at least {LEAST_PASSPHRASE}; six words "
            "chosen by dice make a good one"
        )
    return text.encode("utf-8")


@click.group(cls=FileGroup, prefix="pki_")
def pki() -> None:
    """Make a private certificate authority, and certificates.

    \b
    Once, where the authority is kept:  gramfuse pki init DIR --host merge.example.org
    For the coordinator's SuperLink:    gramfuse pki server DIR
    At each silo:                       gramfuse silo keygen silo.toml

    Silos connect to the coordinator's SuperLink with TLS. They authenticate it by a certificate that an authority
    signed, and it authenticates each of them by its node key. If you already have a certificate, from a public
    authority or from your organisation's, you only need 'gramfuse silo keygen'.
    """


def say_kept(kept: list[Path]) -> None:
    """Print where replaced files are kept."""
    for path in kept:
        say(f"the old file is kept as {path}", err=True)


def echo(**values: Any) -> None:
    """Print values as one JSON object: paths as text, times in ISO 8601."""
    show_json({name: _plain(value) for name, value in values.items()})


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, datetime):
        return value.isoformat()
    return value if isinstance(value, bool | None) else str(value)
