"""`gramfuse pki init`: makes a certificate authority."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import click
from cryptography import x509

from gramfuse_cli.commands.pki import MOST_DAYS, as_hosts, check_length, echo, passphrase_file, read_passphrase
from gramfuse_cli.options import as_json as json_option
from gramfuse_deployment.certificates import (
    CERTIFICATE_FILE,
    KEY_FILE,
    Authority,
    certificate_pem,
    fingerprint,
    key_pem,
)
from gramfuse_deployment.key_files import Content, write_new
from gramfuse_deployment.terminal import ask_secret, say


def _name(_: click.Context, __: click.Parameter, value: str) -> str:
    if not 0 < len(value) <= 64 or not value.isprintable():
        raise click.BadParameter(f"expected 1 to 64 printable characters (got {value!r})")
    return value


@click.command()
@click.argument("directory", metavar="DIR", type=click.Path(path_type=Path, file_okay=False))
@click.option(
    "--host",
    "hosts",
    multiple=True,
    required=True,
    metavar="HOST",
    callback=as_hosts,
    help="A name or IP address at which silos reach the coordinator, now or later. Can be repeated.",
)
@click.option(
    "--name",
    default="gramfuse CA",
    show_default=True,
    callback=_name,
    help="The authority's common name.",
)
@click.option(
    "--days",
    default=3650,
    show_default=True,
    type=click.IntRange(1, MOST_DAYS),
    help="Days that the authority is valid.",
)
@click.option("--passphrase", is_flag=True, help="Prompt for a passphrase, and encrypt ca.key with it.")
@passphrase_file
@json_option
def init(
    directory: Path,
    hosts: list[x509.GeneralName],
    name: str,
    days: int,
    passphrase: bool,
    passphrase_file: Path | None,
    as_json: bool,
) -> None:
    """Make an authority in DIR: its key DIR/ca.key and its certificate DIR/ca.crt.

    The authority can certify every --host and its subdomains, localhost, and nothing else; its certificate says so.
    Give every host that silos will ever use. Another host needs another authority.

    Only the owner can read DIR/ca.key. Anyone who has it can pose as the coordinator to every silo, so keep it away
    from the coordinator's machine. With a passphrase, a copy of the file alone is not enough. DIR/ca.crt goes to the
    coordinator and to every silo ('--root-certificates' of flower-supernode). It is not secret, but each silo should
    compare its SHA-256, which this command prints, over another channel.
    """
    secret = read_passphrase(passphrase_file) if passphrase_file is not None else None
    if secret is None and passphrase:
        secret = check_length(ask_secret("Passphrase of the authority's key", twice=True), "--passphrase")
    authority = Authority.create(name, hosts, datetime.now(UTC), days)
    key, certificate = directory / KEY_FILE, directory / CERTIFICATE_FILE
    write_new(
        {
            key: Content(key_pem(authority.key, secret)),
            certificate: Content(certificate_pem(authority.certificate), 0o644),
        },
        "every silo trusts that authority; to make another one, use another directory",
    )
    end, digest = authority.certificate.not_valid_after_utc, fingerprint(authority.certificate)
    names = [str(host.value) for host in hosts]
    if as_json:
        echo(key=key, certificate=certificate, name=name, hosts=names, valid_until=end, sha256=digest)
        return
    say(f"private key written to {key}{', encrypted' if secret else ''}", err=True)
    say(f"certificate  {certificate}", f"valid until  {end:%Y-%m-%d}", f"for          {', '.join(names)} only")
    say(f"SHA-256      {digest}", copied=True)
