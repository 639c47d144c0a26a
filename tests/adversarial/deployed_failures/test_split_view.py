"""One silo unmasked as both active and dead."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import pytest

from gramfuse_protocol.errors import SecurityError
from gramfuse_protocol.secure_sum import member as secure_sum
from gramfuse_protocol.secure_sum.member import SECRET_KINDS, Member
from gramfuse_protocol.secure_sum.shares import combine
from gramfuse_protocol.secure_sum.statements import SUMS, Sum
from tests.adversarial.deployed_failures.federation import (
    CONTEXT,
    NONCE,
    Federation,
    contributed,
    federation,
    signed_by,
)


def test_a_silo_gives_away_one_kind_of_share_in_whatever_order_it_is_asked() -> None:
    fed = federation(4, 3)
    a, b, c, d = fed.names
    ready, _ = contributed(fed.roster, fed.received(a))
    stories = {"all": (a, b, c, d), "without d": (a, b, c), "without b": (a, c, d)}
    signatures = {
        story: {name: signed_by(fed, fed.received(name), "statistics", alive)[1] for name in alive}
        for story, alive in stories.items()
    }
    for order in itertools.permutations(stories):
        state, first = ready, order[0]
        given: dict[str, set[bytes]] = {name: set() for name in fed.names}
        for story in order:
            if story == first:
                state, _ = secure_sum.sign(fed.roster, state, fed.identities[a], "statistics", stories[story])
            else:
                with pytest.raises(SecurityError, match="second list of survivors"):
                    secure_sum.sign(fed.roster, state, fed.identities[a], "statistics", stories[story])
        for story in (*order, *order):
            if story == first:
                for owner, share in secure_sum.release(fed.roster, state, "statistics", signatures[story]).items():
                    given[owner].add(share)
            else:
                with pytest.raises(SecurityError, match=r"not one of them|not signed"):
                    secure_sum.release(fed.roster, state, "statistics", signatures[story])
        # The same single share however often it was asked for, and of the kind that the first story says.
        everyone = {**state.held, a: state.own_shares}
        for owner, shares in given.items():
            kind = "seed" if owner in stories[first] else "mask"
            assert shares == {bytes.fromhex(everyone[owner]["statistics"][kind])}
    with pytest.raises(SecurityError, match=r"before .* signed"):
        secure_sum.release(fed.roster, ready, "statistics", signatures["all"])


View = tuple[tuple[str, ...], tuple[str, ...]]
"""What a coordinator tells one silo: who the members are, and which of them survived."""


@dataclass(eq=False)
class SplitView:
    """A coordinator that tells every honest silo a story of its own; the first of the roster are on its side."""

    fed: Federation
    colluding: int
    sum_name: Sum

    @property
    def honest(self) -> tuple[str, ...]:
        return self.fed.names[self.colluding :]

    def views(self, name: str) -> Iterator[View]:
        """All stories that a silo accepts: it does what it is told unless the protocol forbids it."""
        others = [other for other in self.fed.names if other != name]
        for members in self._subsets(others, name):
            for survivors in self._subsets([other for other in members if other != name], name):
                try:
                    self.state(name, (members, survivors))
                except SecurityError:
                    continue
                yield members, survivors

    def _subsets(self, others: Sequence[str], name: str) -> Iterator[tuple[str, ...]]:
        for count in range(len(others) + 1):
            for chosen in itertools.combinations(others, count):
                yield tuple(other for other in self.fed.names if other in chosen or other == name)

    @lru_cache  # noqa: B019
    def state(self, name: str, view: View) -> tuple[Member, bytes]:
        """A silo's state and signature after it was told a story."""
        members, survivors = view
        if self.sum_name == "statistics":
            return signed_by(self.fed, self.fed.received(name, members), "statistics", survivors)
        # The members of the second sum are the survivors of the first.
        first, _ = signed_by(self.fed, self.fed.received(name), "statistics", members)
        return signed_by(self.fed, first, "metrics", survivors)

    def signature(self, name: str, view: View) -> bytes:
        """A signature under any story, as a silo makes it that answers everything."""
        members, survivors = view
        statement = secure_sum.survivors_statement(
            self.fed.session, self.sum_name, members, survivors, CONTEXT[self.sum_name]
        )
        return self.fed.identities[name].sign(statement)

    @lru_cache  # noqa: B019
    def released(self, name: str, view: View, honest: frozenset[str]) -> Mapping[str, bytes] | None:
        """What a silo releases if it sees signatures of its story by all colluding and these honest silos."""
        state, _ = self.state(name, view)
        signatures = {peer: self.state(peer, view)[1] for peer in honest if peer in view[1]}
        signatures |= {peer: self.signature(peer, view) for peer in self.fed.names[: self.colluding] if peer in view[1]}
        try:
            return secure_sum.release(self.fed.roster, state, self.sum_name, signatures)
        except SecurityError:
            return None

    def opened(self, told: Mapping[str, View]) -> set[str]:
        """The honest silos of which the coordinator comes to hold both secrets, or whose single vector it can open."""
        pool = {(owner, kind): dict[int, bytes]() for owner in self.honest for kind in SECRET_KINDS}
        for name in self.fed.names[: self.colluding]:
            held = self.fed.received(name).held
            for owner, kind in pool:
                pool[owner, kind][self.fed.roster.index(name)] = bytes.fromhex(held[owner][self.sum_name][kind])
        for name, view in told.items():
            same = frozenset(peer for peer in self.honest if told[peer] == view)
            for owner, share in (self.released(name, view, same) or {}).items():
                if owner in self.honest:
                    kind = "seed" if owner in view[1] else "mask"
                    pool[owner, kind][self.fed.roster.index(name)] = share
        known = {key for key, shares in pool.items() if len(shares) >= self.fed.roster.threshold}
        for owner, kind in known:  # what counts as known really is the secret
            secret = combine(pool[owner, kind], self.fed.roster.threshold).hex()
            assert secret == getattr(self.fed.members[owner].secrets, kind)[self.sum_name]
        both = {owner for owner in self.honest if all((owner, kind) in known for kind in SECRET_KINDS)}
        alone = {
            owner
            for owner in self.honest
            if (owner, "seed") in known
            and all(
                (owner, "mask") in known or (peer, "mask") in known
                for peer in told[owner][0]
                if peer in self.honest and peer != owner
            )
        }
        return both | alone


@pytest.mark.parametrize("sum_name", SUMS)
@pytest.mark.parametrize(("silos", "threshold", "stories"), [(4, 3, 7**3), (5, 4, 9**4)])
def test_no_split_of_the_view_opens_a_silo(silos: int, threshold: int, stories: int, sum_name: Sum) -> None:
    attack = SplitView(federation(silos, threshold), 1, sum_name)
    told = 0
    for views in itertools.product(*(list(attack.views(name)) for name in attack.honest)):
        told += 1
        assert attack.opened(dict(zip(attack.honest, views, strict=True))) == set()
    assert told == stories


@pytest.mark.parametrize(("silos", "threshold", "colluding"), [(4, 2, 1), (5, 3, 1), (4, 3, 2)])
def test_with_a_threshold_that_plans_refuse_the_same_attack_succeeds(
    silos: int, threshold: int, colluding: int
) -> None:
    # 2t ≤ n + c: the search above would find it. Where the stories are many, the first that works is enough.
    attack = SplitView(federation(silos, threshold), colluding, "statistics")
    everything = itertools.product(*(list(attack.views(name)) for name in attack.honest))
    assert any(attack.opened(dict(zip(attack.honest, views, strict=True))) for views in everything)


def test_two_lists_of_keys_leave_silos_that_cannot_read_each_other() -> None:
    # A colluding silo signs two sets of keys, and the coordinator shows one to some and the other to the rest.
    fed = federation(5, 4)
    names = fed.names
    twin = secure_sum.advertise(
        fed.roster, NONCE, names[0], names, fed.identities[names[0]], random.Random(9).randbytes
    )
    honest = [member.advert for name, member in fed.members.items() if name != names[0]]
    told = {name: [fed.members[names[0]].advert if n < 3 else twin.advert, *honest] for n, name in enumerate(names)}
    sealed, states = {}, {}
    for name in names[1:]:
        fresh = fed.members[name].with_(adverts=(), own_shares={})
        states[name], sealed[name] = secure_sum.share(fed.roster, fresh, told[name], random.Random(3).randbytes)
    for one, other in itertools.permutations(names[1:], 2):
        if told[one] != told[other]:
            shares = {peer: sealed[peer][one] for peer in names[1:] if peer != one} | {
                names[0]: fed.sealed[names[0]][one]
            }
            with pytest.raises(SecurityError, match=rf"silo '{one}' .*different lists"):
                secure_sum.receive(fed.roster, states[one], shares)
