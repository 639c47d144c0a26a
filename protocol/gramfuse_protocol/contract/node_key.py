"""Node keys: the key that a silo's connection to Flower is authenticated with.

It is a NIST P-384 key. Flower reads the private half as an OpenSSH file without a passphrase and knows a node by the
public half, which is written here in one way only: the OpenSSH line `ecdsa-sha2-nistp384 <base64>`, without a comment.

Sources: RFC 5656 (the line), RFC 5480 (the same key in PEM, as Flower hands it out).
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
"""What the cryptography package raises for a key that is broken or of a kind that it does not know."""


def generate() -> tuple[str, str]:
    """Return a new key: the private half as an OpenSSH file's text, the public half as its line."""
    key = ec.generate_private_key(ec.SECP384R1())
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
    )
    return private.decode("ascii"), _line(key.public_key())


def public_of(private: str, source: str) -> str:
    """Return the public line of a private key in OpenSSH format.

    Args:
        source: where the text is from, for the error; the text itself is never quoted.

    Raises:
        PlanError: if it is no such key, or one with a passphrase.
    """
    try:
        key = serialization.load_ssh_private_key(private.encode("utf-8"), password=None)
    except TypeError:
        raise PlanError(
            f"{source}: has a passphrase, for which Flower cannot ask; take it off with: ssh-keygen -p -f {source}"
        ) from None
    except _UNREADABLE:
        key = None
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, ec.SECP384R1):
        raise PlanError(
            f"{source}: is not a P-384 private key in OpenSSH format; make one with: gramfuse pki silo SILO_TOML"
        )
    return _line(key.public_key())


def canonical(key: str | bytes) -> str:
    """Return the public line of a public key: of PEM, as Flower's nodes carry it, or of an OpenSSH line.

    Raises:
        ValueError: if it is no P-384 public key.
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
    """Drop what is around a key in its line: a comment, spaces, the end of the line."""
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
"""The public half in a plan: `ecdsa-sha2-nistp384 <base64>`; a comment or spaces around it are dropped."""
