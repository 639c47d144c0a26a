"""Certificates of a private authority and of the servers that it certifies.

Keys and times are arguments; nothing is written to disk here.

An authority is restricted to the hosts that it was made for: a thief of its key can pose as one of these hosts, but as
no other.

Sources: RFC 5280 (certificates; 4.2.1.10: name constraints), RFC 9525 (a server is identified by its subject
alternative names, not by its subject).
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from gramfuse_protocol.documents import read_text
from gramfuse_protocol.errors import PlanError

KEY_FILE = "ca.key"
CERTIFICATE_FILE = "ca.crt"

LEAST_PASSPHRASE = 20
"""Minimum length of an authority's passphrase: a thief of the file can try some thousand per second, offline."""

LOCAL_HOSTS = ("localhost", "127.0.0.1", "::1")
"""Names in every server certificate: processes that a SuperLink starts connect to it locally."""

_SLACK = timedelta(days=1)
"""Certificates are backdated by this much, for machines whose clocks are slow."""
_LABEL = re.compile(r"(?!-)[a-z0-9-]{1,63}(?<!-)")


@dataclass(frozen=True)
class Authority:
    """A certificate authority: its private key and its own certificate."""

    key: ec.EllipticCurvePrivateKey
    certificate: x509.Certificate

    @staticmethod
    def create(name: str, hosts: Iterable[x509.GeneralName], now: datetime, days: int) -> Authority:
        """Make an authority that can certify these hosts as servers, but no others, and no other authorities.

        Args:
            name: its common name, 1 to 64 characters.
            hosts: from `server_names`; a DNS name includes its subdomains.
            now: the current time, with a time zone.
            days: how long the certificate is valid.
        """
        key = new_key()
        subject = _name(name)
        certificate = (
            _builder(subject, subject, key.public_key(), now, now + timedelta(days=days))
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_usage("key_cert_sign", "crl_sign"), critical=True)
            .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
            .add_extension(x509.NameConstraints([_subtree(host) for host in hosts], None), critical=True)
            .sign(key, hashes.SHA384())
        )
        return Authority(key, certificate)

    @staticmethod
    def read(directory: Path, now: datetime, passphrase: Callable[[], bytes] | None = None) -> Authority:
        """Read ca.key and ca.crt.

        Args:
            now: the current time, with a time zone.
            passphrase: called for the passphrase if the key is encrypted.

        Raises:
            PlanError: if a file is missing or invalid, the two do not match, others on this machine can read the key,
                its passphrase is wrong or missing, or the certificate is not valid now.
        """
        key = _read_key(directory / KEY_FILE, passphrase)
        path = directory / CERTIFICATE_FILE
        text = read_text(path)
        try:
            certificate = x509.load_pem_x509_certificate(text.encode("utf-8"))
            certifies = certificate.public_key() == key.public_key()
            constraints = certificate.extensions.get_extension_for_class(x509.BasicConstraints).value
            certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier)
            certificate.extensions.get_extension_for_class(x509.NameConstraints)
        except (ValueError, UnsupportedAlgorithm, x509.ExtensionNotFound):
            raise PlanError(f"{path}: not a certificate made by gramfuse pki init; put that one there") from None
        if not certifies or not constraints.ca:
            raise PlanError(f"{path}: not the authority's certificate for {KEY_FILE} beside it; put that one there")
        begin, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
        if not begin <= now < end:
            raise PlanError(
                f"{path}: valid only from {begin:%Y-%m-%d} to {end:%Y-%m-%d}, but today is {now:%Y-%m-%d}; "
                "if this machine's clock is right, make a new authority with gramfuse pki init in another directory"
            )
        return Authority(key, certificate)

    @property
    def hosts(self) -> list[x509.GeneralName]:
        """All hosts that it can certify, in the form that server certificates use."""
        allowed = self.certificate.extensions.get_extension_for_class(x509.NameConstraints).value.permitted_subtrees
        return [_host_of_subtree(subtree) for subtree in allowed or ()]

    def vouches(self, host: x509.GeneralName) -> bool:
        """Return whether it can certify a host: one of `hosts`, or a subdomain of one."""
        names = [name.value for name in self.hosts if isinstance(name, x509.DNSName)]
        under = isinstance(host, x509.DNSName) and any(host.value.endswith(f".{name}") for name in names)
        return under or host in self.hosts

    def certify(
        self, key: ec.EllipticCurvePublicKey, names: Iterable[x509.GeneralName], now: datetime, days: int
    ) -> x509.Certificate:
        """Return a server certificate.

        Args:
            key: the server's public key.
            names: all names that clients use to connect to the server; from `server_names`.
            now: the current time, with a time zone.
            days: how long the certificate is valid, but never longer than the authority's own.

        Raises:
            PlanError: if the authority cannot certify one of the names.
        """
        names = list(names)
        if others := [str(name.value) for name in names if not self.vouches(name)]:
            raise PlanError(
                f"this authority cannot certify {', '.join(others)}, only "
                f"{', '.join(str(name.value) for name in self.hosts)}; leave --host out, or make another authority for "
                "that host (gramfuse pki init OTHER_DIR --host HOST), whose ca.crt every silo needs"
            )
        end = min(now + timedelta(days=days), self.certificate.not_valid_after_utc)
        identifier = self.certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
        return (
            _builder(_name("gramfuse coordinator"), self.certificate.subject, key, now, end)
            .add_extension(x509.SubjectAlternativeName(names), critical=False)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage("digital_signature"), critical=True)
            .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identifier), critical=False)
            .sign(self.key, hashes.SHA384())
        )


def new_key() -> ec.EllipticCurvePrivateKey:
    """Generate a P-384 key."""
    return ec.generate_private_key(ec.SECP384R1())


def key_pem(key: ec.EllipticCurvePrivateKey, passphrase: bytes | None = None) -> bytes:
    """Return a private key as PKCS#8 PEM, encrypted if there is a passphrase (AES-256, PBKDF2)."""
    encryption: serialization.KeySerializationEncryption = serialization.NoEncryption()
    if passphrase is not None:
        encryption = serialization.BestAvailableEncryption(passphrase)
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption)


def certificate_pem(certificate: x509.Certificate) -> bytes:
    """Return a certificate as PEM."""
    return certificate.public_bytes(serialization.Encoding.PEM)


def fingerprint(certificate: x509.Certificate) -> str:
    """Return the SHA-256 of a certificate, as `openssl x509 -fingerprint -sha256` prints it."""
    return certificate.fingerprint(hashes.SHA256()).hex(":").upper()


def server_names(hosts: Iterable[str]) -> list[x509.GeneralName]:
    """Return the names for a server certificate: each host once, then LOCAL_HOSTS.

    Raises:
        ValueError: naming a host that is not valid.
    """
    return list(dict.fromkeys(_host(host) for host in (*hosts, *LOCAL_HOSTS)))


def _host(text: str) -> x509.GeneralName:
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        name = text.lower().removesuffix(".")
        labels = name.split(".")
        if len(name) > 253 or not all(_LABEL.fullmatch(label) for label in labels) or labels[-1].isdigit():
            raise ValueError(
                f"{text!r} is not a host; expected a name such as merge.example.org (without https:// and port, "
                "international names in xn-- form) or an IP address such as 10.0.0.5"
            ) from None
        return x509.DNSName(name)
    if address.is_unspecified or "%" in text:
        raise ValueError(f"{text!r} is not an address that others can connect to; give the one that silos use")
    return x509.IPAddress(address)


def _subtree(host: x509.GeneralName) -> x509.GeneralName:
    """Return a host in the form that name constraints use: an address becomes a network of one."""
    return x509.IPAddress(ipaddress.ip_network(host.value)) if isinstance(host, x509.IPAddress) else host


def _host_of_subtree(subtree: x509.GeneralName) -> x509.GeneralName:
    """Undo `_subtree`."""
    if isinstance(subtree, x509.IPAddress):
        return x509.IPAddress(ipaddress.ip_network(subtree.value).network_address)
    return subtree


def _read_key(path: Path, passphrase: Callable[[], bytes] | None) -> ec.EllipticCurvePrivateKey:
    try:
        mode = path.stat().st_mode
    except OSError:
        raise PlanError(f"{path}: no such file; make the authority with: gramfuse pki init {path.parent}") from None
    if mode & 0o077:
        raise PlanError(f"{path}: others on this machine can read it; run: chmod 600 {path}")
    text = read_text(path)
    secret = None
    if "BEGIN ENCRYPTED PRIVATE KEY" in text:
        if passphrase is None:
            raise PlanError(f"{path}: is encrypted; give its passphrase with --passphrase-file, or at a terminal")
        secret = passphrase()
    try:
        key = serialization.load_pem_private_key(text.encode("utf-8"), secret)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        if secret is not None:
            raise PlanError(f"{path}: wrong passphrase; give the one that encrypts it") from None
        key = None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise PlanError(f"{path}: not a private key made by gramfuse pki init; put that one there")
    return key


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, now: datetime, end: datetime
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _SLACK)
        .not_valid_after(end)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _usage(*allowed: str) -> x509.KeyUsage:
    uses = (
        "digital_signature",
        "content_commitment",
        "key_encipherment",
        "data_encipherment",
        "key_agreement",
        "key_cert_sign",
        "crl_sign",
        "encipher_only",
        "decipher_only",
    )
    return x509.KeyUsage(**{use: use in allowed for use in uses})
