"""`gramfuse pki server`: makes the coordinator's key and certificate."""

from __future__ import annotations

import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import click
from cryptography import x509

from gramfuse_cli.commands.pki import MOST_DAYS, as_hosts, echo, passphrase_file, read_passphrase, say_kept
from gramfuse_cli.options import as_json as json_option
from gramfuse_deployment.certificates import (
    Authority,
    certificate_pem,
    key_pem,
    new_key,
)
from gramfuse_deployment.key_files import Content, write_new
from gramfuse_deployment.terminal import ask_secret, say


def _passphrase_source(path: Path | None) -> Callable[[], bytes] | None:
    """Return a function that reads the passphrase of the authority's key; None without a file or terminal."""
    if path is not None:
        return lambda: read_passphrase(path)
    if sys.stdin.isatty():
        return lambda: ask_secret("Passphrase of the authority's key").encode("utf-8")
    return None


@click.command()
@click.argument("directory", metavar="DIR", type=click.Path(path_type=Path, file_okay=False))
@click.option(
    "--host",
    "names",
    multiple=True,
    metavar="HOST",
    callback=as_hosts,
    help="A name or IP address at which silos reach the coordinator. Can be repeated.  [default: all that DIR/ca.crt "
    "allows]",
)
@click.option(
    "--days",
    default=397,
    show_default=True,
    type=click.IntRange(1, MOST_DAYS),
    help="Days that the certificate is valid; never longer than the authority.",
)
@click.option("--renew", is_flag=True, help="Replace server.key and server.crt; keep the old files as .old.")
@passphrase_file
@json_option
def server(
    directory: Path,
    names: list[x509.GeneralName],
    days: int,
    renew: bool,
    passphrase_file: Path | None,
    as_json: bool,
) -> None:
    """Make the coordinator's key DIR/server.key and its certificate DIR/server.crt, signed by the authority in DIR.

    The certificate names all hosts of the authority, or only each --host, and localhost, because the processes that a
    SuperLink starts connect to it there. Silos refuse the connection if they use any other name. Both files go to the
    coordinator's machine, with DIR/ca.crt:

    \b
    flower-superlink --ssl-ca-certfile ca.crt --ssl-certfile server.crt --ssl-keyfile server.key

    A renewal does not affect silos, as long as the authority stays the same.
    """
    now = datetime.now(UTC)
    authority = Authority.read(directory, now, _passphrase_source(passphrase_file))
    private = new_key()
    names = names or authority.hosts
    signed = authority.certify(private.public_key(), names, now, days)
    key, certificate = directory / "server.key", directory / "server.crt"
    kept = write_new(
        {key: Content(key_pem(private)), certificate: Content(certificate_pem(signed), 0o644)},
        f"to replace it: gramfuse pki server {directory} --renew",
        renew=renew,
    )
    hosts, end = [str(name.value) for name in names], signed.not_valid_after_utc
    if as_json:
        echo(key=key, certificate=certificate, hosts=hosts, valid_until=end, kept=kept)
        return
    say_kept(kept)
    say(f"private key written to {key}", err=True)
    say(f"certificate  {certificate}", f"valid until  {end:%Y-%m-%d}", f"hosts        {', '.join(hosts)}")
