"""`gramfuse pki`: keys and certificates for the connections between silos and coordinator."""

from __future__ import annotations

import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from cryptography import x509

from gramfuse_cli.options import as_json as json_option
from gramfuse_deployment.certificates import (
    CERTIFICATE_FILE,
    KEY_FILE,
    LEAST_PASSPHRASE,
    Authority,
    certificate_pem,
    fingerprint,
    key_pem,
    new_key,
    server_names,
)
from gramfuse_deployment.key_files import Content, make_node_key, write_new
from gramfuse_deployment.terminal import ask_secret, say, show_json
from gramfuse_protocol.documents import read_text
from gramfuse_protocol.errors import PlanError

if TYPE_CHECKING:
    pass

MOST_DAYS = 36500


def _name(_: click.Context, __: click.Parameter, value: str) -> str:
    if not 0 < len(value) <= 64 or not value.isprintable():
        raise click.BadParameter(f"expected 1 to 64 printable characters (got {value!r})")
    return value


def _hosts(_: click.Context, __: click.Parameter, value: tuple[str, ...]) -> list[x509.GeneralName]:
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


def _read_passphrase(path: Path) -> bytes:
    """Read a passphrase from the first line of a file.

    Raises:
        PlanError: if the file cannot be read, others can read it too, or the passphrase is too short.
    """
    lines = read_text(path).splitlines()
    if path.stat().st_mode & 0o077:
        raise PlanError(f"{path}: others on this machine can read it; run: chmod 600 {path}")
    return _check_length(lines[0] if lines else "", str(path))


def _check_length(text: str, where: str) -> bytes:
    if len(text) < LEAST_PASSPHRASE:
        raise PlanError(
            f"{where}: the passphrase has {len(text)} characters, and needs at least {LEAST_PASSPHRASE}; six words "
            "chosen by dice make a good one"
        )
    return text.encode("utf-8")


def _passphrase_source(path: Path | None) -> Callable[[], bytes] | None:
    """Return a function that reads the passphrase of the authority's key; None without a file or terminal."""
    if path is not None:
        return lambda: _read_passphrase(path)
    if sys.stdin.isatty():
        return lambda: ask_secret("Passphrase of the authority's key").encode("utf-8")
    return None


@click.group()
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


@pki.command()
@click.argument("directory", metavar="DIR", type=click.Path(path_type=Path, file_okay=False))
@click.option(
    "--host",
    "hosts",
    multiple=True,
    required=True,
    metavar="HOST",
    callback=_hosts,
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
    secret = _read_passphrase(passphrase_file) if passphrase_file is not None else None
    if secret is None and passphrase:
        secret = _check_length(ask_secret("Passphrase of the authority's key", twice=True), "--passphrase")
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
        _echo(key=key, certificate=certificate, name=name, hosts=names, valid_until=end, sha256=digest)
        return
    say(f"private key written to {key}{', encrypted' if secret else ''}", err=True)
    say(f"certificate  {certificate}", f"valid until  {end:%Y-%m-%d}", f"for          {', '.join(names)} only")
    say(f"SHA-256      {digest}", copied=True)


@pki.command()
@click.argument("directory", metavar="DIR", type=click.Path(path_type=Path, file_okay=False))
@click.option(
    "--host",
    "names",
    multiple=True,
    metavar="HOST",
    callback=_hosts,
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
        _echo(key=key, certificate=certificate, hosts=hosts, valid_until=end, kept=kept)
        return
    _say_kept(kept)
    say(f"private key written to {key}", err=True)
    say(f"certificate  {certificate}", f"valid until  {end:%Y-%m-%d}", f"hosts        {', '.join(hosts)}")


@pki.command()
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
        _echo(name=silo.name, node_key_file=silo.node_key_path, node_key=public, kept=kept)
        return
    _say_kept(kept)
    say(f"private key written to {silo.node_key_path}", err=True)
    say(f'node-key = "{public}"', copied=True)


def _say_kept(kept: list[Path]) -> None:
    for path in kept:
        say(f"the old file is kept as {path}", err=True)


def _echo(**values: Any) -> None:
    """Print values as one JSON object: paths as text, times in ISO 8601."""
    show_json({name: _plain(value) for name, value in values.items()})


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, datetime):
        return value.isoformat()
    return value if isinstance(value, bool | None) else str(value)
