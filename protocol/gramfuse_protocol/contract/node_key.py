"""Node keys: the keys that authenticate silos to Flower's SuperLink.

A node key is a NIST P-384 key pair. Flower reads the private key from an OpenSSH file without a passphrase and
identifies a node by the public key, which gramfuse writes in one form only: the OpenSSH line
`ecdsa-sha2-nistp384 <base64>`, without a comment.

Sources: RFC 5656 (the line), RFC 5480 (the same key in PEM, as Flower reports it).
"""

from __future__ import annotations

import base64
import hashlib
from typing import Annotated

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from pydantic import AfterValidator

from gramfuse_protocol.errors import PlanError

KEY_TYPE = "ecdsa-sha2-nistp384"

_EXPECTED = f"expected the line that gramfuse silo keygen prints: {KEY_TYPE} …"
_UNREADABLE = (ValueError, UnsupportedAlgorithm, NotImplementedError)
"""Exceptions of the cryptography package for a broken key or an unknown key type."""


def generate() -> tuple[str, str]:
    """Return a new key pair: the private key as the text of an OpenSSH file, the public key as its line."""
    key = ec.generate_private_key(ec.SECP384R1())
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
    )
    return private.decode("ascii"), _line(key.public_key())


def public_of(private: str, source: str) -> str:
    """Return the public line of a private key in OpenSSH format.

    Args:
        source: origin of the text, for the error; the text itself is never quoted.

    Raises:
        PlanError: if it is not such a key, or has a passphrase.
    """
    try:
        key = serialization.load_ssh_private_key(private.encode("utf-8"), password=None)
    except TypeError:
        raise PlanError(
            f"{source}: has a passphrase, but Flower cannot ask for one; remove it with: ssh-keygen -p -f {source}"
        ) from None
    except _UNREADABLE:
        key = None
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, ec.SECP384R1):
        raise PlanError(
            f"{source}: is not a P-384 private key in OpenSSH format; make one with: gramfuse pki silo SILO_TOML"
        )
    return _line(key.public_key())


def canonical(key: str | bytes) -> str:
    """Return the public line of a public key, given in PEM (as Flower reports it) or as an OpenSSH line.

    Raises:
        ValueError: if it is not a P-384 public key.
    """
    try:
        text = key if isinstance(key, str) else key.decode("ascii")
        if text.lstrip().startswith("-----BEGIN PUBLIC KEY-----"):
            return _line(serialization.load_pem_public_key(text.encode("ascii")))
    except _UNREADABLE:
        raise ValueError(_EXPECTED) from None
    return _canonical_line(text)


def fingerprint(line: str) -> str:
    """Return the fingerprint of a public line, as `ssh-keygen -l` prints it."""
    digest = hashlib.sha256(base64.b64decode(line.split()[1])).digest()
    return "SHA256:" + base64.b64encode(digest).decode("ascii").rstrip("=")


def _canonical_line(text: str) -> str:
    """Normalise an OpenSSH line: drop its comment, surrounding spaces and the newline."""
    fields = text.split()
    if len(text.strip().splitlines()) != 1 or len(fields) < 2 or fields[0] != KEY_TYPE:
        raise ValueError(_EXPECTED)
    try:
        return _line(serialization.load_ssh_public_key(" ".join(fields[:2]).encode("ascii")))
    except _UNREADABLE:
        raise ValueError(_EXPECTED) from None


def _line(key: object) -> str:
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP384R1):
        raise ValueError(_EXPECTED)
    return key.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH).decode("ascii")


PublicNodeKey = Annotated[str, AfterValidator(_canonical_line)]
"""The public key in a plan: `ecdsa-sha2-nistp384 <base64>`; a comment and surrounding spaces are dropped."""
