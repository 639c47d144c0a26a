"""A coordinator that has silos measure different models, to read a few silos' counts in the sum of the metrics.

All but those few measure a model whose counts tell nothing. With the colluding silo they are as many as must sign, so
the shares are released that open the sum over all, the few among them. What keeps their counts hidden are the masks:
what a silo measured is in each of its own.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping, Sequence

import numpy as np
import pytest

from gramfuse_protocol.contract.roster import Roster, smallest_threshold
from gramfuse_protocol.errors import SecurityError
from gramfuse_protocol.secure_sum import member as secure_sum
from gramfuse_protocol.secure_sum.keys import Identity
from gramfuse_protocol.secure_sum.masks import apply
from gramfuse_protocol.secure_sum.member import SECRET_KINDS, Member, SecretKind
from gramfuse_protocol.secure_sum.shares import combine
from gramfuse_protocol.secure_sum.statements import metrics_context, session_id, survivors_statement

NAMES = ("a", "b", "c", "d", "e", "f", "g")
COLLUDING, HONEST = NAMES[0], NAMES[1:]
THRESHOLD = smallest_threshold(len(NAMES), 1)
NONCE = "1d" * 16
CONSTANT, REAL = (metrics_context({"simple": "11" * 32, "regmean": digest * 32}) for digest in ("22", "33"))
WORDS = 64


def counts(silo: str, context: str) -> np.ndarray:
    """What a silo counts: with the constant model, nothing."""
    found = np.random.default_rng(NAMES.index(silo)).integers(1, 10_000, WORDS)
    return found.astype(np.uint64) if context == REAL else np.zeros(WORDS, np.uint64)


class Attack:
    """A session up to what the coordinator holds in the end.

    Args:
        apart: silos that measure the real model; all others measure the constant one.
        dead: silos whose metrics came, and which the coordinator calls dead.
    """

    def __init__(self, apart: Sequence[str], dead: Sequence[str] = ()) -> None:
        draw = random.Random(1).randbytes
        self.identities = {name: Identity(draw(32)) for name in NAMES}
        keys = {name: identity.public for name, identity in self.identities.items()}
        self.roster = Roster("a1" * 32, keys, THRESHOLD, THRESHOLD)
        self.told = {name: REAL if name in apart else CONSTANT for name in NAMES}
        self.alive = tuple(name for name in NAMES if name not in dead)
        states = self._ready(draw)
        self.states: dict[str, Member] = {}
        self.uploads = {name: counts(name, self.told[name]) for name in NAMES}
        self.masks = {}
        for name in NAMES:
            self.states[name], self.masks[name] = secure_sum.contribute(
                self.roster, states[name], "metrics", "d2", self.told[name]
            )
            apply(self.uploads[name], self.masks[name])

    def _ready(self, draw: secure_sum.Random) -> dict[str, Member]:
        """Return the silos' states after an honest sum of the statistics."""
        roster = self.roster
        states = {n: secure_sum.advertise(roster, NONCE, n, NAMES, self.identities[n], draw) for n in NAMES}
        self.adverts = [state.advert for state in states.values()]
        sealed: dict[str, dict[str, bytes]] = {}
        for n in NAMES:
            states[n], sealed[n] = secure_sum.share(roster, states[n], self.adverts, draw)
        for n in NAMES:
            states[n] = secure_sum.receive(roster, states[n], {p: sealed[p][n] for p in NAMES if p != n})
            states[n], _ = secure_sum.contribute(roster, states[n], "statistics", "d1", "c1" * 32)
            states[n], _ = secure_sum.sign(roster, states[n], self.identities[n], "statistics", NAMES)
        return states

    def released(self, context: str) -> Mapping[str, Mapping[str, bytes]]:
        """What the honest silos that measured one thing release for each other's signatures and the colluding one's."""
        session = session_id(self.roster.plan, NONCE, self.adverts)
        statement = survivors_statement(session, "metrics", NAMES, self.alive, context)
        signatures, states = {COLLUDING: self.identities[COLLUDING].sign(statement)}, {}
        for name in HONEST:
            if name in self.alive and self.told[name] == context:
                states[name], signatures[name] = secure_sum.sign(
                    self.roster, self.states[name], self.identities[name], "metrics", self.alive
                )
        return {name: secure_sum.release(self.roster, state, "metrics", signatures) for name, state in states.items()}

    def known(self) -> set[tuple[str, SecretKind]]:
        """The secrets that the coordinator can put together, with all shares that the colluding silo holds."""
        found: set[tuple[str, SecretKind]] = {(COLLUDING, "mask"), (COLLUDING, "seed")}
        for owner, kind in itertools.product(HONEST, SECRET_KINDS):
            pool = {COLLUDING: bytes.fromhex(self.states[COLLUDING].held[owner]["metrics"][kind])}
            if kind == ("seed" if owner in self.alive else "mask"):
                pool |= {name: shares[owner] for name, shares in self.released(CONSTANT).items()}
            if len(pool) >= THRESHOLD:
                secret = combine({self.roster.index(name): share for name, share in pool.items()}, THRESHOLD)
                assert secret.hex() == getattr(self.states[owner].secrets, kind)["metrics"]
                found.add((owner, kind))
        return found

    def left(self) -> dict[str, np.ndarray]:
        """Each upload without those of its masks for which the coordinator knows either end's key."""
        known, left = self.known(), {}
        for name in NAMES:
            ends: list[list[tuple[str, SecretKind]]] = [[(name, "seed")]]
            ends += [[(name, "mask"), (peer, "mask")] for peer in NAMES if peer != name]
            gone = [mask.inverse for mask, of in zip(self.masks[name], ends, strict=True) if known & set(of)]
            left[name] = self.uploads[name].copy()
            apply(left[name], gone)
        return left


def total(vectors: Mapping[str, np.ndarray], silos: Sequence[str]) -> np.ndarray:
    return sum((vectors[name] for name in silos), np.zeros(WORDS, np.uint64))


@pytest.mark.parametrize(
    ("apart", "dead"), [("b", ""), ("b", "b"), ("b", "g"), ("b", "bg"), ("bc", ""), ("bc", "b")], ids=lambda s: s or "-"
)
def test_no_sum_of_uploads_shows_what_a_few_silos_measured_apart(apart: str, dead: str) -> None:
    attack = Attack(apart, dead)
    left = attack.left()
    assert attack.known() >= {(name, "seed") for name in attack.alive} | {(name, "mask") for name in dead}
    for size in range(1, len(NAMES) + 1):
        for chosen in itertools.combinations(NAMES, size):
            if set(chosen) & set(apart):  # no word is small, as every sum of counts would be
                assert (np.abs(total(left, chosen).view(np.int64)) > 2**32).all(), chosen
    if set(apart) - set(dead):  # and they release nothing themselves
        with pytest.raises(SecurityError, match="threshold is 5"):
            attack.released(REAL)


@pytest.mark.parametrize("dead", ["", "g"], ids=["-", "g"])
def test_of_silos_that_measured_the_same_the_same_arithmetic_gives_the_sum(dead: str) -> None:
    # Otherwise the test above would show nothing. With a silo that is dead, its pair masks are taken off by its key.
    attack = Attack((), dead)
    real = {name: counts(name, REAL) for name in NAMES}
    uploads = {name: attack.left()[name] + real[name] for name in NAMES}
    np.testing.assert_array_equal(total(uploads, attack.alive), total(real, attack.alive))
    for missing in attack.alive[1:]:
        words = total(uploads, [name for name in attack.alive if name != missing])
        assert (np.abs(words.view(np.int64)) > 2**32).all()
