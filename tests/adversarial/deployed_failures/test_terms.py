"""Threshold 0, unauthenticated keys, silent clipping, counts in clear."""

from __future__ import annotations

import random

import numpy as np
import pytest

from gramfuse_protocol.contract.plan import Plan
from gramfuse_protocol.errors import ContributionError, PlanError, SecurityError
from gramfuse_protocol.secure_sum import member as secure_sum
from gramfuse_protocol.secure_sum.fixed_point import capacity, decode, encode
from gramfuse_protocol.secure_sum.keys import Identity, public_of
from gramfuse_protocol.secure_sum.masks import apply
from tests.adversarial.deployed_failures.federation import NONCE, PLAN, federation, masks_of


def plan_text(privacy: str) -> str:
    roster = "".join(f'[[silo]]\nname = "silo-{n}"\n' for n in range(4))
    return (
        f'[plan]\nname="p"\n[model]\nbase="b"\ntask="classification"\nlabels=["n","y"]\n[privacy]\n{privacy}\n{roster}'
    )


@pytest.mark.parametrize("threshold", ["0", "-3", "1", "2", "0.5", '"none"', "true"])
def test_no_plan_has_a_threshold_that_opens_a_silo(threshold: str) -> None:
    with pytest.raises(PlanError, match=r"'privacy\.threshold'"):
        Plan.parse(plan_text(f"threshold = {threshold}"))


def test_a_key_that_the_coordinator_made_up_is_not_taken_for_a_peer_s() -> None:
    fed = federation(4, 3)
    mallory = Identity(bytes(range(32)))
    private = random.Random(4).randbytes(32)
    fresh = {name: member.with_(adverts=(), own_shares={}) for name, member in fed.members.items()}
    adverts = [member.advert for member in fresh.values()]
    target = adverts[2]
    # With one key of its own among them it would know the mask, or read the shares, that silo-a has with silo-c.
    swaps = [
        {"channel": public_of(private).hex()},
        {"masks": {**target.masks, "statistics": public_of(private).hex()}},
        {"commitments": {**target.commitments, "statistics": "ab" * 32}},
    ]
    for swap in swaps:
        changed = target.model_copy(update=swap)
        statement = secure_sum.advert_statement(PLAN, NONCE, changed.fields)
        for signature in (
            target.signature,
            mallory.sign(statement).hex(),
            fed.identities["silo-d"].sign(statement).hex(),
        ):
            forged = changed.model_copy(update={"signature": signature})
            with pytest.raises(SecurityError, match=r"silo 'silo-c'.* not signed"):
                secure_sum.share(
                    fed.roster, fresh["silo-a"], [*adverts[:2], forged, adverts[3]], random.Random(5).randbytes
                )


@pytest.mark.parametrize("value", [8.0, 8.000001, 1e3, 2.0**21 - 2.0**-30])
def test_large_values_are_carried_or_refused_and_never_clipped(value: float) -> None:
    scale = 2.0 ** (capacity(4) - 21)  # a range of ±2^21
    values = np.array([value, -value, 0.25])
    total = sum((encode(values, scale, 4, "t") for _ in range(4)), np.zeros(3, np.uint64))
    assert np.abs(decode(total, scale) - 4 * values).max() <= 2 / scale
    with pytest.raises(ContributionError, match=r"'t'.*2 of 3 .*range"):
        encode(values * 2.0**21, scale, 4, "t")


def test_counts_leave_as_words_of_the_masked_sum_alone() -> None:
    fed = federation(4, 3)
    counts = {name: np.array([1.0, 40 + n, 7000 + n]) for n, name in enumerate(fed.names)}
    total = np.zeros(3, np.uint64)
    for name in fed.names:
        plain = encode(counts[name], 1.0, 4, "count")
        masked = plain.copy()
        masks = masks_of(fed, name)
        apply(masked, masks)
        for mask in masks:  # nor with any one mask taken off
            almost = masked.copy()
            apply(almost, [mask.inverse])
            assert not set(almost.tolist()) & set(plain.tolist())
        assert not set(masked.tolist()) & set(plain.tolist())
        assert masked.min() > 2**40  # nothing that looks like a count
        total += masked
    apply(total, [masks_of(fed, name)[0].inverse for name in fed.names])
    assert decode(total, 1.0).tolist() == sum(counts.values()).tolist()
