"""Shamir's secret sharing over the integers modulo the prime 2^521 − 1.

A secret of 32 bytes becomes the constant term of a polynomial of degree t − 1 whose other coefficients are random;
a share is its value at one point. Any t shares give the secret back, and t − 1 say nothing about it.

Python's integers take a time that depends on their values. A secret is shared once, from fresh randomness, in a
process that answers to nobody while it does, so there is nothing to measure repeatedly; say so to whoever reviews it.

Source: Shamir, "How to Share a Secret", Communications of the ACM 22(11), 1979.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from gramfuse_protocol.errors import SecurityError
from gramfuse_protocol.secure_sum.keys import KEY_BYTES, Random

PRIME = 2**521 - 1
SHARE_BYTES = 66


def split(secret: bytes, threshold: int, points: Iterable[int], random: Random) -> dict[int, bytes]:
    """Return a share for each point.

    Args:
        secret: 32 bytes; read as a little-endian integer.
        threshold: shares that give it back, ≥ 1.
        points: distinct, each ≥ 1.
        random: asked for 66 bytes for each coefficient, from the lowest power up, and again for one that is no
            residue (once in 2^521).

    Returns:
        66 bytes, little-endian, by point.
    """
    if len(secret) != KEY_BYTES:
        raise ValueError(f"a secret has {KEY_BYTES} bytes, not {len(secret)}")
    coefficients = [int.from_bytes(secret, "little"), *(_residue(random) for _ in range(threshold - 1))]
    shares = {}
    for point in points:
        value = 0
        for coefficient in reversed(coefficients):
            value = (value * point + coefficient) % PRIME
        shares[point] = value.to_bytes(SHARE_BYTES, "little")
    return shares


def combine(shares: Mapping[int, bytes], threshold: int) -> bytes:
    """Return the secret of at least `threshold` shares by point; those of the smallest points are taken.

    Raises:
        SecurityError: if there are too few, one has another form, or what comes out is no 32-byte secret.
    """
    if len(shares) < threshold:
        raise SecurityError(f"{len(shares)} shares came; the threshold is {threshold}")
    points = sorted(shares)[:threshold]
    values = {point: check_share(shares[point]) for point in points}
    secret = 0
    for point, value in values.items():
        numerator = denominator = 1
        for other in points:
            if other != point:
                numerator = numerator * other % PRIME
                denominator = denominator * (other - point) % PRIME
        secret = (secret + value * numerator * pow(denominator, -1, PRIME)) % PRIME
    if secret >> 8 * KEY_BYTES:
        raise SecurityError("the shares that came do not belong to one secret")
    return secret.to_bytes(KEY_BYTES, "little")


def check_share(share: bytes) -> int:
    """Return a share's value; raises SecurityError unless it is 66 bytes and below the prime."""
    value = int.from_bytes(share, "little")
    if len(share) != SHARE_BYTES or value >= PRIME:
        raise SecurityError(f"a share is not a number below 2^521 − 1 in {SHARE_BYTES} bytes")
    return value


def _residue(random: Random) -> int:
    while (value := int.from_bytes(random(SHARE_BYTES), "little") >> 7) == PRIME:
        continue
    return value
