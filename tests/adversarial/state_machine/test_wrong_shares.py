"""Silos that lie to the coordinator when the sum is opened."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping

import pytest

from gramfuse_protocol.errors import SecurityError
from gramfuse_protocol.secure_sum import member as secure_sum
from gramfuse_protocol.secure_sum.shares import SHARE_BYTES
from tests.adversarial.state_machine.stage import THRESHOLD, Stage, assert_tells_no_secret, unmasking


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (
            lambda s: {k: v for k, v in s.items() if k != "e"},
            "silo 'b' did not release",
        ),
        (lambda s: {**s, "zz": s["a"]}, "silo 'b' did not release"),
        (lambda s: {**s, "c": s["c"][:-1]}, "silo 'c' committed to"),
        (lambda s: {**s, "c": b"\xff" * SHARE_BYTES}, "silo 'c' committed to"),
        (lambda s: {**s, "c": s["d"]}, "silo 'c' committed to"),
        (lambda s: {**s, "e": s["a"]}, "silo 'e' committed to"),
        (lambda s: dict.fromkeys(s, bytes(SHARE_BYTES)), "silo 'a' committed to"),
    ],
    ids=["one missing", "one too many", "cut off", "too large", "another's", "another kind", "zeros"],
)
def test_a_wrong_share_never_becomes_a_mask(
    spoil: Callable[[Mapping[str, bytes]], Mapping[str, bytes]], told: str, at: Stage
) -> None:
    shares = {n: secure_sum.release(at.roster, at.signed[n], "statistics", at.signatures) for n in at.survivors}
    assert len(unmasking(at, shares)) == 4 + 4  # four self masks, and the dead silo's mask with each of four
    with pytest.raises(SecurityError) as caught:
        unmasking(at, {**shares, "b": spoil(shares["b"])})
    assert told in str(caught.value)
    assert_tells_no_secret(str(caught.value), at)


@pytest.mark.parametrize("owner", ["c", "e"], ids=["a survivor", "the dead silo"])
def test_a_secret_that_its_owner_did_not_commit_to_is_not_used(owner: str, at: Stage) -> None:
    # Four silos on one side put together shares that do give a secret back, only not the right one.
    wrong = secure_sum.split(bytes(range(32)), THRESHOLD, range(1, 6), random.Random(3).randbytes)
    shares = {
        n: {**secure_sum.release(at.roster, at.signed[n], "statistics", at.signatures), owner: wrong[k]}
        for k, n in enumerate(at.survivors, 1)
    }
    with pytest.raises(SecurityError, match=rf"silo '{owner}' .*a, b, c, d"):
        unmasking(at, shares)


def test_three_shares_open_nothing(at: Stage) -> None:
    shares = {n: secure_sum.release(at.roster, at.signed[n], "statistics", at.signatures) for n in at.survivors[:3]}
    with pytest.raises(SecurityError, match=r"^3 .*shares.*4"):
        unmasking(at, shares)


def test_a_share_from_one_that_is_no_survivor_is_not_taken(at: Stage) -> None:
    shares = {n: secure_sum.release(at.roster, at.signed[n], "statistics", at.signatures) for n in at.survivors}
    for stranger in ("e", "zz"):
        with pytest.raises(SecurityError, match=f"'{stranger}'"):
            unmasking(at, {**shares, stranger: shares["a"]})
