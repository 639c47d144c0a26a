"""Shamir's sharing against the polynomial that defines it."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Mapping, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gramfuse_protocol.errors import SecurityError
from gramfuse_protocol.secure_sum.shares import PRIME, SHARE_BYTES, check_share, combine, split

FEW = settings(max_examples=60, deadline=None, derandomize=True)
SECRETS = st.binary(min_size=32, max_size=32) | st.sampled_from([bytes(32), b"\xff" * 32, bytes(31) + b"\x80"])


def drawn(coefficients: Sequence[int]) -> Callable[[int], bytes]:
    """A source of randomness that makes `split` take these coefficients, and nothing more."""
    chunks = iter([(value << 7).to_bytes(66, "little") for value in coefficients])

    def source(count: int) -> bytes:
        assert count == 66
        return next(chunks)

    return source


def multiplied(one: Sequence[int], other: Sequence[int]) -> list[int]:
    product = [0] * (len(one) + len(other) - 1)
    for i, a in enumerate(one):
        for j, b in enumerate(other):
            product[i + j] = (product[i + j] + a * b) % PRIME
    return product


def polynomial_through(values: Mapping[int, int]) -> list[int]:
    """The coefficients, lowest first, of the polynomial of least degree with these values: Lagrange, written out."""
    result = [0] * len(values)
    for x, y in values.items():
        term, denominator = [y], 1
        for other in values:
            if other != x:
                term = multiplied(term, [-other % PRIME, 1])
                denominator = denominator * (x - other) % PRIME
        inverse = pow(denominator, PRIME - 2, PRIME)  # Fermat
        result = [(a + b * inverse) % PRIME for a, b in zip(result, term, strict=True)]
    return result


def test_the_modulus_is_prime() -> None:
    # Lucas and Lehmer: for an odd prime p, 2^p − 1 is prime if and only if s(p − 2) = 0 with s(0) = 4, s = s² − 2.
    assert PRIME == 2**521 - 1
    assert all(521 % divisor for divisor in range(2, 23))
    s = 4
    for _ in range(521 - 2):
        s = (s * s - 2) % PRIME
    assert s == 0


@FEW
@given(SECRETS, st.data(), st.integers(0, 2**32))
def test_any_t_shares_or_more_give_the_secret_and_fewer_are_refused(
    secret: bytes, data: st.DataObject, seed: int
) -> None:
    points = data.draw(st.lists(st.integers(1, 1024), min_size=1, max_size=6, unique=True))
    threshold = data.draw(st.integers(1, len(points)))
    shares = split(secret, threshold, points, random.Random(seed).randbytes)
    assert list(shares) == points
    for count in range(len(points) + 1):
        for chosen in itertools.combinations(points, count):
            some = {point: shares[point] for point in chosen}
            if count < threshold:
                with pytest.raises(SecurityError, match=rf"{count} shares.*{threshold}"):
                    combine(some, threshold)
            else:
                assert combine(some, threshold) == secret


@FEW
@given(
    SECRETS, st.lists(st.integers(0, PRIME - 1), max_size=5), st.lists(st.integers(1, 2000), min_size=1, unique=True)
)
def test_a_share_is_the_polynomial_s_value_and_its_coefficients_are_those_drawn(
    secret: bytes, drawn_values: list[int], points: list[int]
) -> None:
    coefficients = [int.from_bytes(secret, "little"), *drawn_values]
    shares = split(secret, len(coefficients), points, drawn(drawn_values))
    for point in points:
        value = sum(a * point**power for power, a in enumerate(coefficients)) % PRIME
        assert shares[point] == value.to_bytes(SHARE_BYTES, "little")


def test_a_draw_that_is_no_residue_is_drawn_again() -> None:
    secret = bytes(range(32))
    assert split(secret, 3, [1, 2, 3], drawn([5, PRIME, PRIME, 9])) == split(secret, 3, [1, 2, 3], drawn([5, 9]))


@FEW
@given(SECRETS, st.lists(SECRETS, min_size=3, max_size=3), st.integers(2, 6), st.integers(0, 2**32))
def test_fewer_than_t_shares_fit_every_secret(secret: bytes, candidates: list[bytes], t: int, seed: int) -> None:
    rng = random.Random(seed)
    shares = split(secret, t, range(1, 8), rng.randbytes)
    held = rng.sample(range(1, 8), t - 1)
    for candidate in candidates:
        values = {0: int.from_bytes(candidate, "little")} | {p: int.from_bytes(shares[p], "little") for p in held}
        constant, *others = polynomial_through(values)
        assert constant == values[0]
        # Had the silo shared the candidate, with other randomness, the same t − 1 shares would have come out.
        again = split(candidate, t, held, drawn(others))
        assert again == {point: shares[point] for point in held}
    with pytest.raises(SecurityError, match="one secret"):
        combine({point: shares[point] for point in held}, t - 1)


@pytest.mark.parametrize(
    "share",
    [b"", bytes(65), bytes(67), PRIME.to_bytes(66, "little"), (PRIME + 1).to_bytes(66, "little"), b"\xff" * 66],
    ids=["empty", "short", "long", "the prime", "beyond it", "all ones"],
)
def test_what_is_no_share_is_refused(share: bytes) -> None:
    with pytest.raises(SecurityError, match="66 bytes"):
        check_share(share)
    good = split(bytes(32), 2, [1, 2, 3], random.Random(1).randbytes)
    with pytest.raises(SecurityError, match="not a number below"):
        combine({**good, 2: share}, 2)


def test_the_largest_residue_is_a_share() -> None:
    assert check_share((PRIME - 1).to_bytes(66, "little")) == PRIME - 1


def test_a_wrong_share_or_one_of_another_secret_does_not_pass_for_a_secret() -> None:
    rng = random.Random(2)
    one, other = (split(rng.randbytes(32), 3, range(1, 6), rng.randbytes) for _ in range(2))
    for point in (1, 2, 3):
        with pytest.raises(SecurityError, match="one secret"):
            combine({**one, point: other[point]}, 3)
    with pytest.raises(SecurityError, match="one secret"):
        combine({1: one[2], 2: one[1], 3: one[3]}, 3)  # right shares at the wrong points


@pytest.mark.parametrize("length", [0, 31, 33, 66])
def test_only_secrets_of_32_bytes_are_shared(length: int) -> None:
    with pytest.raises(ValueError, match=f"32 bytes, not {length}"):
        split(bytes(length), 2, [1, 2], random.Random(3).randbytes)
