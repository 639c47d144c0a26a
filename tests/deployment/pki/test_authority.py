"""The private authority: what TLS accepts, and no file ever overwritten."""

from __future__ import annotations

import hashlib
import os
import shutil
import ssl
from datetime import datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization

from gramfuse_cli.commands.pki import pki
from gramfuse_deployment.certificates import Authority, certificate_pem, key_pem, new_key, server_names
from gramfuse_protocol.errors import PlanError
from tests.deployment.pki.commands import NOW, handshake, invoke, mode, refuse, succeed, tree


def test_tls_accepts_the_hosts_of_the_certificate_and_the_machine_itself_and_nobody_else(
    authority: Path, tmp_path: Path
) -> None:
    for host in ("merge.example.org", "10.0.0.5", "127.0.0.1", "localhost", "::1"):
        handshake(authority, authority / "ca.crt", host)
    for host in ("example.org", "other.merge.example.org", "10.0.0.6"):
        with pytest.raises(ssl.SSLCertVerificationError, match=r"[Hh]ostname mismatch|IP address mismatch"):
            handshake(authority, authority / "ca.crt", host)
    succeed(pki, "init", tmp_path / "other", "--host", "merge.example.org")
    with pytest.raises(ssl.SSLCertVerificationError, match="certificate verify failed"):
        handshake(authority, tmp_path / "other" / "ca.crt", "merge.example.org")
    # A server's certificate is no authority's, though a real authority signed it.
    shutil.copy(authority / "server.key", tmp_path / "other" / "ca.key")
    shutil.copy(authority / "server.crt", tmp_path / "other" / "ca.crt")
    refuse("gramfuse pki init", pki, "server", tmp_path / "other")


def test_certificates_say_what_they_are_for_and_end_when_they_must() -> None:
    hosts = server_names(["Merge.Example.org.", "10.0.0.5", "localhost"])
    made = Authority.create("north CA", hosts, NOW, 30)
    own = made.certificate
    assert own.issuer == own.subject
    assert own.not_valid_after_utc == NOW + timedelta(days=30)
    assert own.extensions.get_extension_for_class(x509.BasicConstraints).value == x509.BasicConstraints(True, 0)
    usage = own.extensions.get_extension_for_class(x509.KeyUsage).value
    assert (usage.key_cert_sign, usage.crl_sign, usage.digital_signature) == (True, True, False)
    assert list(own.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value) == [x509.OID_SERVER_AUTH]
    constraints = own.extensions.get_extension_for_class(x509.NameConstraints)
    assert (constraints.critical, made.hosts) == (True, hosts)

    leaf = made.certify(new_key().public_key(), hosts, NOW, 397)
    leaf.verify_directly_issued_by(own)
    assert leaf.not_valid_before_utc == NOW - timedelta(days=1)
    assert leaf.not_valid_after_utc == own.not_valid_after_utc, "no longer than the authority"
    names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["merge.example.org", "localhost"]
    assert names.get_values_for_type(x509.IPAddress) == [ip_address(a) for a in ("10.0.0.5", "127.0.0.1", "::1")]
    extensions = leaf.extensions
    assert extensions.get_extension_for_class(x509.BasicConstraints).value == x509.BasicConstraints(False, None)
    assert list(extensions.get_extension_for_class(x509.ExtendedKeyUsage).value) == [x509.OID_SERVER_AUTH]
    assert (
        extensions.get_extension_for_class(x509.AuthorityKeyIdentifier).value.key_identifier
        == own.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value.digest
    )


def test_private_files_are_private_and_public_ones_hold_one_certificate(tmp_path: Path) -> None:
    before = os.umask(0o002)
    try:
        made = succeed(pki, "init", tmp_path / "a" / "b", "--host", "h.example", "--name", "north CA", "--days", "10")
        server = succeed(pki, "server", tmp_path / "a" / "b")
    finally:
        os.umask(before)
    directory = tmp_path / "a" / "b"
    assert [mode(directory.parent), mode(directory)] == [0o700, 0o700]
    assert {name: mode(directory / name) for name in tree(directory)} == {
        "ca.key": 0o600,
        "ca.crt": 0o644,
        "server.key": 0o600,
        "server.crt": 0o644,
    }
    (certificate,) = x509.load_pem_x509_certificates((directory / "ca.crt").read_bytes())
    assert made["name"] == "north CA"
    assert certificate.subject.rfc4514_string() == "CN=north CA"
    assert (
        made["sha256"].replace(":", "").lower()
        == hashlib.sha256(certificate.public_bytes(serialization.Encoding.DER)).hexdigest()
    )
    (leaf,) = x509.load_pem_x509_certificates((directory / "server.crt").read_bytes())
    assert server["hosts"] == ["h.example", "localhost", "127.0.0.1", "::1"]
    assert datetime.fromisoformat(server["valid_until"]) == leaf.not_valid_after_utc == certificate.not_valid_after_utc


def test_nothing_is_overwritten(authority: Path) -> None:
    before = tree(authority)
    refuse("ca.key exists already", pki, "init", authority, "--host", "a")
    refuse("server.key exists already; to replace it", pki, "server", authority)
    (authority / "server.key").unlink()
    refuse("server.crt exists already", pki, "server", authority)
    assert tree(authority) == {name: data for name, data in before.items() if name != "server.key"}


def test_renewal_keeps_the_old_pair_once_and_clients_notice_nothing(authority: Path) -> None:
    before = tree(authority)
    made = succeed(pki, "server", authority, "--host", "new.merge.example.org", "--renew")
    after = tree(authority)
    for name in ("server.key", "server.crt"):
        assert after[f"{name}.old"] == before[name] != after[name]
    assert made["kept"] == [str(authority / "server.key.old"), str(authority / "server.crt.old")]
    assert mode(authority / "server.key") == mode(authority / "server.key.old") == 0o600
    handshake(authority, authority / "ca.crt", "new.merge.example.org")
    refuse("server.key.old exists already", pki, "server", authority, "--renew")
    assert tree(authority) == after


@pytest.mark.parametrize("renew", [True, False])
def test_a_failure_half_way_leaves_everything_as_it_was(
    renew: bool, authority: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not renew:
        (authority / "server.key").unlink()
        (authority / "server.crt").unlink()
    before = tree(authority)
    real = {"link": os.link, "replace": os.replace}

    def fail(name: str) -> None:
        def function(source: Any, target: Any) -> None:
            if Path(target).name == "server.crt" and not str(source).endswith(".old"):
                raise OSError(28, "No space left on device")
            real[name](source, target)

        monkeypatch.setattr(os, name, function)

    fail("link")
    fail("replace")
    refuse("No space left on device", pki, "server", authority, *(["--renew"] if renew else []))
    assert tree(authority) == before


def test_an_authority_that_cannot_be_used_is_refused(authority: Path, tmp_path: Path) -> None:
    refuse(f"make the authority with: gramfuse pki init {tmp_path}", pki, "server", tmp_path)
    (authority / "ca.key").chmod(0o640)
    refuse(f"run: chmod 600 {authority / 'ca.key'}", pki, "server", authority, "--renew")
    (authority / "ca.key").write_bytes(key_pem(new_key()))
    (authority / "ca.key").chmod(0o600)
    refuse("certificate for ca.key", pki, "server", authority, "--renew")
    (authority / "ca.key").write_text("nothing")
    refuse("ca.key: not a private key", pki, "server", authority, "--renew")

    old = Authority.create("old", server_names([]), NOW, 30)
    (authority / "ca.key").write_bytes(key_pem(old.key))
    (authority / "ca.crt").write_bytes(certificate_pem(old.certificate))
    assert Authority.read(authority, NOW + timedelta(days=29)).certificate == old.certificate
    for now in (NOW + timedelta(days=30), NOW - timedelta(days=2)):
        with pytest.raises(PlanError, match=r"ca\.crt: valid only from 2029-12-31 to 2030-01-31"):
            Authority.read(authority, now)
    (authority / "ca.crt").write_text("nothing")
    with pytest.raises(PlanError, match=r"ca\.crt: not a certificate"):
        Authority.read(authority, NOW)


@pytest.mark.parametrize(
    "host",
    [
        "",
        " ",
        "https://a.example",
        "a.example:8000",
        "[::1]",
        "*.example.org",
        "a_b",
        "-a",
        "a..b",
        "10.0.0",
        "10.0.0.256",
        "münchen.example",
        "0.0.0.0",
        "::",
        "fe80::1%eth0",
        "a" * 64,
        ".".join(["a" * 63] * 4),
    ],
)
def test_what_is_no_host_is_refused(host: str, authority: Path) -> None:
    before = tree(authority)
    result = invoke(pki, "server", authority, "--host", host, "--renew")
    assert result.exit_code == 2
    assert "--host" in result.stderr
    assert tree(authority) == before
    assert invoke(pki, "init", authority.parent / "new", "--host", host).exit_code == 2
    assert not (authority.parent / "new").exists()


def test_an_authority_signs_for_its_own_hosts_only(authority: Path, tmp_path: Path) -> None:
    before = tree(authority)
    for host in ("example.org", "bank.example.org", "evilmerge.example.org", "10.0.0.6", "fd00::5"):
        refuse(f"cannot certify {host}", pki, "server", authority, "--host", host, "--renew")
    assert tree(authority) == before
    assert invoke(pki, "init", tmp_path / "new").exit_code == 2  # it has to know which hosts are its own
