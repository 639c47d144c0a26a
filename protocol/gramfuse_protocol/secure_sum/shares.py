"""Shamir secret sharing over the integers modulo the prime 2^521 − 1.

A secret of 32 bytes is the constant term of a polynomial of degree t − 1 whose other coefficients are random; a share
is its value at one point. Any t shares determine the secret, and t − 1 shares reveal nothing about it.

Python's integer arithmetic is not constant-time. A secret is shared once, with fresh randomness, in a process that
answers no requests meanwhile, so an attacker cannot repeat a timing measurement.

Source: Shamir, "How to Share a Secret", Communications of the ACM 22(11), 1979.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from gramfuse_protocol.errors import SecurityError
from gramfuse_protocol.secure_sum.keys import KEY_BYTES, Random

PRIME = 2**521 - 1
SHARE_BYTES = 66


def split(secret: bytes, threshold: int, points: Iterable[int], random: Random) -> dict[int, bytes]:
    """Split a secret into one share for each point.

    Args:
        secret: 32 bytes; read as a little-endian integer.
        threshold: number of shares that determine it, ≥ 1.
        points: distinct integers ≥ 1.
        random: called for 66 bytes for each coefficient, from the lowest power up, and again if the number is not below
            the prime (once in 2^521).

    Returns:
        Shares of 66 bytes, little-endian, by point.
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
    """Reconstruct a secret from at least `threshold` shares by point; uses those at the smallest points.

    Raises:
        SecurityError: if there are too few shares, one is malformed, or the result is not a 32-byte secret.
    """
    if len(shares) < threshold:
        raise SecurityError(f"received {len(shares)} shares; the threshold is {threshold}")
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
        raise SecurityError("the received shares do not belong to one secret")
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
