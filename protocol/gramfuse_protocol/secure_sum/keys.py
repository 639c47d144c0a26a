"""Keys: Ed25519 identities, X25519 key exchange, and the table of domain separation labels.

Every byte string that is hashed, signed or used in key derivation begins with a label that is unique to its purpose,
and each of its fields is preceded by its length, so that nothing made for one purpose is valid for another.

Sources: Ed25519 RFC 8032, X25519 RFC 7748, HKDF RFC 5869.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from gramfuse_protocol.errors import PlanError, SecurityError

KEY_BYTES = 32
SIGNATURE_BYTES = 64

FIELD = 2**255 - 19
"""The prime field of both curves. Elements are encoded in 255 bits, little-endian; the top bit has another use."""

_EIGHTH = 2707385501144840649318225287225658788936804267575313519463743609750303402022
"""The y coordinate of a point of order eight on Ed25519; the other such points have its negative."""

_LOW_ORDER = {0, 1, FIELD - 1, _EIGHTH, FIELD - _EIGHTH}
"""The y coordinates of all points of Ed25519 whose order divides eight."""

Random = Callable[[int], bytes]
"""Returns the given number of random bytes; `secrets.token_bytes` outside of tests."""


class Purpose(StrEnum):
    """The purpose of a byte string: its first field."""

    ROUND = "gramfuse/1 round"
    """Hashed: the round's digest, which replaces the plan's digest after the first round."""
    ADVERT = "gramfuse/1 advert"
    """Signed: a silo's public keys in one session."""
    SESSION = "gramfuse/1 session"
    """Hashed: the session's identifier."""
    COMMITMENT = "gramfuse/1 commitment"
    """Hashed: the self-mask seed, published before it is shared."""
    CHANNEL = "gramfuse/1 channel"
    """Derived: the key that encrypts one silo's shares for another; also the associated data of the encryption."""
    PAIR = "gramfuse/1 pair mask"
    """Derived: the key of the mask that two silos share."""
    SELF = "gramfuse/1 self mask"
    """Derived: the key of a silo's own mask."""
    SURVIVORS = "gramfuse/1 survivors"
    """Signed: the silos whose contributions are in a sum."""
    CONTEXT = "gramfuse/1 context"
    """Hashed: the models that a sum of metrics is about."""


def framed(purpose: Purpose, *fields: bytes | str) -> bytes:
    """Concatenate purpose and fields, each preceded by its length in four bytes, little-endian; text is UTF-8."""
    parts = []
    for field in (str(purpose), *fields):
        data = field.encode("utf-8") if isinstance(field, str) else field
        parts += [len(data).to_bytes(4, "little"), data]
    return b"".join(parts)


def derive(secret: bytes, purpose: Purpose, *fields: bytes | str) -> bytes:
    """Derive a 32-byte key: HKDF-SHA-256 without salt, `info` = `framed(purpose, *fields)`."""
    return HKDF(SHA256(), KEY_BYTES, salt=None, info=framed(purpose, *fields)).derive(secret)


def public_of(private: bytes) -> bytes:
    """Return the X25519 public key of a private key."""
    return X25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw()


def check_identity_key(public: bytes) -> None:
    """Raise ValueError unless an Ed25519 public key is canonical and not of low order.

    For a key of low order, anyone can make one signature that verifies for every statement. A y coordinate outside the
    field is a second encoding of a smaller one, so one key could be listed twice.
    """
    y = int.from_bytes(public, "little") % 2**255
    if len(public) != KEY_BYTES or y >= FIELD or y in _LOW_ORDER:
        raise ValueError("the key is not a valid Ed25519 public key: it has low order or is not canonical")


def check_exchange_key(public: bytes, owner: str) -> None:
    """Raise SecurityError unless an X25519 public key is canonical and not of low order.

    X25519 ignores the top bit and accepts numbers outside the field, so one key could have several encodings. A key of
    low order makes every shared secret zero.

    Args:
        owner: the silo that sent the key, for the error.
    """
    if int.from_bytes(public, "little") >= FIELD:
        raise SecurityError(f"a public key of silo {owner!r} is not in canonical form, so it was forged")
    agree(bytes(KEY_BYTES), public, owner)


def agree(private: bytes, public: bytes, owner: str) -> bytes:
    """Return the X25519 shared secret, 32 bytes.

    Args:
        owner: the silo that sent the public key, for the error.

    Raises:
        SecurityError: if the result is all zeros, as for a public key of low order (RFC 7748, section 6.1).
    """
    try:
        return X25519PrivateKey.from_private_bytes(private).exchange(X25519PublicKey.from_public_bytes(public))
    except ValueError:
        raise SecurityError(f"the public key of silo {owner!r} gives an all-zero secret, so it was forged") from None


class Identity:
    """A silo's Ed25519 private key; its repr shows the public key only."""

    def __init__(self, private: bytes) -> None:
        self._key = Ed25519PrivateKey.from_private_bytes(private)

    def __repr__(self) -> str:
        return f"Identity(public={self.public.hex()})"

    @property
    def public(self) -> bytes:
        """The public key, 32 bytes."""
        return self._key.public_key().public_bytes_raw()

    def sign(self, statement: bytes) -> bytes:
        """Sign a statement; returns 64 bytes."""
        return self._key.sign(statement)

    def to_pem(self) -> str:
        """Return the private key in unencrypted PKCS#8 PEM."""
        return self._key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        ).decode("ascii")

    @staticmethod
    def parse(text: str, source: str) -> Identity:
        """Parse the output of `to_pem`; raises PlanError that names `source` and never quotes the text."""
        try:
            key = serialization.load_pem_private_key(text.encode("utf-8"), password=None)
        except (ValueError, TypeError):
            key = None
        if not isinstance(key, Ed25519PrivateKey):
            raise PlanError(f"{source}: is not an Ed25519 private key in PEM; make one with: gramfuse silo keygen")
        return Identity(key.private_bytes_raw())


def verify(public: bytes, signature: bytes, statement: bytes, what: str) -> None:
    """Raise SecurityError unless the signature over the statement is valid for the public key.

    Args:
        what: what was signed, for the error.
    """
    try:
        Ed25519PublicKey.from_public_bytes(public).verify(signature, statement)
    except (InvalidSignature, ValueError):
        raise SecurityError(f"{what}: not signed with the key that the plan's roster names") from None
