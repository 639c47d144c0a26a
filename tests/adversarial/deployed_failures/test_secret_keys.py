"""Secret keys that others come to know or share."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from gramfuse_protocol.errors import SecurityError
from gramfuse_protocol.secure_sum import member as secure_sum
from gramfuse_protocol.secure_sum.keys import Purpose, public_of
from gramfuse_protocol.secure_sum.masks import apply
from gramfuse_protocol.secure_sum.member import SECRET_KINDS
from gramfuse_protocol.secure_sum.shares import combine
from gramfuse_protocol.secure_sum.statements import SUMS
from tests.adversarial.deployed_failures.federation import federation, masks_of, signed_by

# OpenFL: one scalar per party; the aggregator reconstructs every private key.


@pytest.mark.parametrize("dead", [None, "silo-e"])
def test_the_coordinator_does_not_come_to_know_a_living_silo_s_keys(dead: str | None) -> None:
    fed = federation(5, 4)
    alive = tuple(name for name in fed.names if name != dead)
    states, signatures = {}, {}
    for name in alive:
        states[name], signatures[name] = signed_by(fed, fed.received(name), "statistics", alive)
    released = {name: secure_sum.release(fed.roster, states[name], "statistics", signatures) for name in alive}
    points = {name: fed.roster.index(name) for name in alive}
    for owner in alive:
        advert = fed.members[owner].advert
        public = {advert.channel, *advert.masks.values()}
        # Every way of putting released shares together, of one owner or mixed, with the threshold or a lower one.
        for t in range(1, 5):
            for holders in itertools.combinations(alive, t):
                for owners in itertools.product((owner, alive[0], alive[-1]), repeat=t):
                    shares = {points[h]: released[h][o] for h, o in zip(holders, owners, strict=True)}
                    try:
                        secret = combine(shares, t)
                    except SecurityError:
                        continue
                    assert public_of(secret).hex() not in public
                    assert secure_sum.commitment(secret) != advert.commitments["metrics"]
    for sender in fed.names:  # nor does it read what it passes on, with any key that it has seen
        seen = [bytes.fromhex(member.advert.channel) for member in fed.members.values()]
        for receiver, data in fed.sealed[sender].items():
            for key in seen:
                about = secure_sum.framed(Purpose.CHANNEL, fed.session, sender, receiver)
                with pytest.raises(InvalidTag):
                    ChaCha20Poly1305(key).decrypt(bytes(12), data, about)


# NVIDIA FLARE: one secret key that all clients have.


def test_no_silo_has_another_s_secret_or_can_unmask_it() -> None:
    fed = federation(5, 4)
    secrets = [
        value
        for member in fed.members.values()
        for value in (member.secrets.channel, *member.secrets.mask.values(), *member.secrets.seed.values())
    ]
    assert len(set(secrets)) == 5 * 5
    words = 2**14
    plain = np.array(random.Random(8).choices(range(2**40), k=words), np.uint64)
    for victim, spy in itertools.permutations(fed.names, 2):
        state = fed.received(spy)
        mine = {mask.key for sum_name in SUMS for mask in masks_of(fed, spy, sum_name)}
        theirs = masks_of(fed, victim)
        unknown = [mask for mask in theirs if mask.key not in mine]
        assert len(theirs) - len(unknown) == 1  # the one that they have in common
        # With all that it knows taken off, what is left of the upload is still noise.
        left = plain.copy()
        apply(left, unknown)
        correlation = np.corrcoef(left.view(np.int64).astype(np.float64), plain.astype(np.float64))[0, 1]
        assert abs(correlation) < 4.5 / np.sqrt(words)
        # Its one share opens nothing.
        for kind in SECRET_KINDS:
            share = {fed.roster.index(spy): bytes.fromhex(state.held[victim]["statistics"][kind])}
            with pytest.raises(SecurityError, match=r"1 shares.*4"):
                combine(share, fed.roster.threshold)
            with pytest.raises(SecurityError, match="one secret"):
                combine(share, 1)
