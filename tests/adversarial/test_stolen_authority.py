"""Somebody has the key of the federation's authority. To whom can they pose as whom?"""

from __future__ import annotations

import ipaddress
import shutil
import socket
import ssl
import subprocess
import threading
from collections.abc import Callable, Iterable
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from cryptography.x509.verification import PolicyBuilder, Store, VerificationError

from gramfuse_deployment.certificates import Authority, certificate_pem, key_pem, new_key, server_names

NOW = datetime.now(UTC)
Forge = Callable[..., None]


@pytest.fixture
def stolen(tmp_path: Path) -> Authority:
    """The authority of a federation whose coordinator is merge.example.org; its certificate is ca.crt at each silo."""
    authority = Authority.create("gramfuse CA", server_names(["merge.example.org", "10.77.0.1"]), NOW, 30)
    (tmp_path / "ca.crt").write_bytes(certificate_pem(authority.certificate))
    return authority


@pytest.fixture
def forge(tmp_path: Path) -> Forge:
    """Return a function that signs whatever the thief likes, by none of gramfuse's code, into server.crt."""

    def sign(
        issuer: Authority,
        names: Iterable[x509.GeneralName],
        *,
        subject: str = "bank.example.org",
        ca: bool = False,
        use: x509.ObjectIdentifier = ExtendedKeyUsageOID.SERVER_AUTH,
        above: bytes = b"",
    ) -> Authority:
        key = new_key()
        own = issuer.certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
        builder = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, subject)]))
            .issuer_name(issuer.certificate.subject)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(NOW - timedelta(days=1))
            .not_valid_after(NOW + timedelta(days=20))
            .add_extension(x509.BasicConstraints(ca, None), critical=True)
            .add_extension(x509.ExtendedKeyUsage([use]), critical=False)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(own), critical=False)
            .add_extension(x509.KeyUsage(not ca, *[False] * 4, ca, ca, False, False), critical=True)
        )
        if names := list(names):
            builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        made = Authority(key, builder.sign(issuer.key, hashes.SHA384()))
        (tmp_path / "server.crt").write_bytes(certificate_pem(made.certificate) + above)
        (tmp_path / "server.key").write_bytes(key_pem(key))
        return made

    return sign


def deceives(directory: Path, host: str) -> bool:
    """Whether a client that trusts ca.crt, as a silo does, takes server.crt for this host."""
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(directory / "server.crt", directory / "server.key")
    client = ssl.create_default_context(cafile=directory / "ca.crt")
    ours, theirs = socket.socketpair()

    def serve() -> None:
        with suppress(OSError), server.wrap_socket(theirs, server_side=True) as secured:
            secured.recv(1)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        with client.wrap_socket(ours, server_hostname=host):
            return True
    except ssl.SSLCertVerificationError:
        return False
    finally:
        ours.close()
        thread.join()


def convinces(directory: Path, host: str) -> bool:
    """The same by cryptography's verifier, which shares no code with OpenSSL's."""
    root, leaf, *above = x509.load_pem_x509_certificates(
        (directory / "ca.crt").read_bytes() + (directory / "server.crt").read_bytes()
    )
    try:
        name: x509.GeneralName = x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        name = x509.DNSName(host)
    try:
        PolicyBuilder().store(Store([root])).time(NOW).build_server_verifier(name).verify(leaf, above)
    except VerificationError:
        return False
    return True


def test_the_thief_poses_as_the_coordinator_and_as_nobody_else(stolen: Authority, forge: Forge, tmp_path: Path) -> None:
    # What the key is good for, and what a silo loses by it: masked vectors go to somebody else.
    for host in ("merge.example.org", "10.77.0.1", "localhost"):
        forge(stolen, server_names([host])[:1], subject="gramfuse coordinator")
        assert (deceives(tmp_path, host), convinces(tmp_path, host)) == (True, True), host
    # A machine that took ca.crt among the authorities that it trusts for everything loses nothing else.
    for host in ("bank.example.org", "example.org", "evilmerge.example.org", "10.77.0.2", "192.0.2.1", "2001:db8::1"):
        forge(stolen, server_names([host])[:1])
        assert (deceives(tmp_path, host), convinces(tmp_path, host)) == (False, False), host


def test_a_good_name_beside_a_bad_one_does_not_help(stolen: Authority, forge: Forge, tmp_path: Path) -> None:
    forge(stolen, server_names(["merge.example.org", "bank.example.org"]))
    for host in ("bank.example.org", "merge.example.org"):
        assert (deceives(tmp_path, host), convinces(tmp_path, host)) == (False, False), host


@pytest.mark.parametrize("names", [[], [x509.DNSName("*.example.org")], [x509.RFC822Name("root@bank.example.org")]])
def test_neither_do_a_subject_a_wildcard_or_a_name_of_another_kind(
    names: list[x509.GeneralName], stolen: Authority, forge: Forge, tmp_path: Path
) -> None:
    forge(stolen, names)
    assert (deceives(tmp_path, "bank.example.org"), convinces(tmp_path, "bank.example.org")) == (False, False)


def test_an_authority_that_the_thief_makes_under_it_is_none(stolen: Authority, forge: Forge, tmp_path: Path) -> None:
    under = forge(stolen, [], subject="an authority without constraints", ca=True)
    for host in ("bank.example.org", "merge.example.org"):
        forge(under, server_names([host])[:1], above=certificate_pem(under.certificate))
        assert (deceives(tmp_path, host), convinces(tmp_path, host)) == (False, False), host


def test_it_signs_no_mail_no_code_and_no_client(stolen: Authority, forge: Forge, tmp_path: Path) -> None:
    # Name constraints say nothing of a kind of name that they do not mention; the authority's own use does.
    if shutil.which("openssl") is None:
        pytest.skip("needs openssl")
    purposes = {"smimesign": ExtendedKeyUsageOID.EMAIL_PROTECTION, "sslclient": ExtendedKeyUsageOID.CLIENT_AUTH}
    for purpose, use in {**purposes, "sslserver": ExtendedKeyUsageOID.SERVER_AUTH}.items():
        forge(stolen, [x509.DNSName("merge.example.org")], use=use)
        command = ["openssl", "verify", "-purpose", purpose, "-CAfile", tmp_path / "ca.crt", tmp_path / "server.crt"]
        done = subprocess.run(command, capture_output=True, text=True)
        assert (done.returncode == 0) is (purpose == "sslserver"), done.stderr
