"""The ways in which deployed secure aggregation was broken, each tried on ours.

One part for each row of a table of defects that were found by reading the sources of other systems: Flower's SecAgg+
(1.41, 1.42), OpenFL 1.9, FedML's LightSecAgg, declearn, Fed-BioMed's LOM, NVIDIA FLARE's homomorphic encryption.
"""

from __future__ import annotations

import ast
import itertools
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

import gramfuse_protocol
from gramfuse_protocol.contract.plan import Plan
from gramfuse_protocol.contract.roster import Roster
from gramfuse_protocol.errors import ContributionError, PlanError, SecurityError
from gramfuse_protocol.secure_sum import member as secure_sum
from gramfuse_protocol.secure_sum import unmasking as unmask
from gramfuse_protocol.secure_sum.fixed_point import capacity, decode, encode
from gramfuse_protocol.secure_sum.keys import Identity, Label, agree, derive, public_of
from gramfuse_protocol.secure_sum.masks import Mask, apply
from gramfuse_protocol.secure_sum.member import KINDS, Member, Signed
from gramfuse_protocol.secure_sum.shares import combine
from gramfuse_protocol.secure_sum.statements import SUMS, Sum

PLAN = "5a" * 32
NONCE = "0f" * 16
CONTEXT: Mapping[Sum, str] = {"statistics": "c1" * 32, "metrics": "c2" * 32}


@dataclass
class Federation:
    """Silos that follow the protocol, up to the point where they have each other's shares."""

    silos: int
    threshold: int
    seed: int = 1
    nonce: str = NONCE
    identities: dict[str, Identity] = field(init=False)
    roster: Roster = field(init=False)
    members: dict[str, Member] = field(init=False)
    """After `share`."""
    sealed: dict[str, dict[str, bytes]] = field(init=False)
    """By sender, then by receiver."""

    def __post_init__(self) -> None:
        random_bytes = random.Random(self.seed).randbytes
        names = [f"silo-{chr(97 + n)}" for n in range(self.silos)]
        identities = random.Random(0)
        self.identities = {name: Identity(identities.randbytes(32)) for name in names}
        self.roster = Roster(PLAN, {n: i.public for n, i in self.identities.items()}, self.threshold, self.threshold)
        advertised = {
            name: secure_sum.advertise(self.roster, self.nonce, name, names, self.identities[name], random_bytes)
            for name in names
        }
        adverts = [member.advert for member in advertised.values()]
        self.members, self.sealed = {}, {}
        for name, member in advertised.items():
            self.members[name], self.sealed[name] = secure_sum.share(self.roster, member, adverts, random_bytes)

    @property
    def names(self) -> tuple[str, ...]:
        return self.roster.names

    def received(self, name: str, among: Iterable[str] | None = None) -> Member:
        """A silo's state after the shares of these silos reached it."""
        senders = [other for other in among or self.names if other != name]
        return secure_sum.receive(self.roster, self.members[name], {s: self.sealed[s][name] for s in senders})

    @property
    def session(self) -> bytes:
        member = self.members[self.names[0]]
        return secure_sum.session_id(PLAN, self.nonce, member.adverts)


@lru_cache
def federation(silos: int, threshold: int, seed: int = 1, nonce: str = NONCE) -> Federation:
    return Federation(silos, threshold, seed, nonce)


def masks_of(fed: Federation, name: str, sum_name: Sum = "statistics") -> list[Mask]:
    member = fed.received(name)
    if sum_name == "metrics":
        member = member.with_(members={**member.members, "metrics": member.members["statistics"]})
    return contributed(fed.roster, member, sum_name)[1]


def contributed(roster: Roster, member: Member, sum_name: Sum = "statistics") -> tuple[Member, list[Mask]]:
    return secure_sum.contribute(roster, member, sum_name, "d1", CONTEXT[sum_name])


def stream(masks: Sequence[Mask], words: int) -> np.ndarray:
    target = np.zeros(words, np.uint64)
    apply(target, masks)
    return target


def differing_bits(one: bytes, other: bytes) -> int:
    return (int.from_bytes(one, "little") ^ int.from_bytes(other, "little")).bit_count()


def assert_unrelated(keys: Sequence[bytes]) -> None:
    """Keys of 256 bits differ from each other in about half of them: 128 ± 8, and here within seven deviations."""
    for one, other in itertools.combinations(keys, 2):
        assert 72 < differing_bits(one, other) < 184


def flipped(text: str, bit: int) -> str:
    """Hexadecimal text with one bit flipped; bit 0 is the lowest of the first byte."""
    data = bytearray.fromhex(text)
    data[bit // 8] ^= 1 << bit % 8
    return data.hex()


# Flower SecAgg+: a seed folded to 32 bits. -------------------------------------------------------------------------


def test_every_bit_of_every_secret_changes_the_whole_mask() -> None:
    fed = federation(4, 3)
    member = fed.received("silo-b")
    _, before = contributed(fed.roster, member)
    assert [len(mask.key) for mask in before] == [32] * 4

    def masks_with(kind: str, bit: int) -> list[Mask]:
        changed = {
            **getattr(member.secrets, kind),
            "statistics": flipped(getattr(member.secrets, kind)["statistics"], bit),
        }
        secrets = member.secrets.model_copy(update={kind: changed})
        return contributed(fed.roster, member.with_(secrets=secrets))[1]

    self_keys = [masks_with("seed", bit)[0].key for bit in range(256)]
    # X25519 fixes five bits of a private key (RFC 7748, section 5); the other 251 all count.
    free = [bit for bit in range(256) if bit not in (0, 1, 2, 254, 255)]
    pair_keys = [[mask.key for mask in masks_with("mask", bit)[1:]] for bit in free]
    for old, keys in zip(before, [self_keys, *zip(*pair_keys, strict=True)], strict=True):
        assert_unrelated([old.key, *keys[:40]])
        assert len({old.key, *keys}) == 1 + len(keys)
        assert all(72 < differing_bits(old.key, key) < 184 for key in keys)


def test_every_bit_of_plan_session_and_context_changes_the_whole_mask() -> None:
    fed = federation(4, 3)
    member = fed.received("silo-b")
    _, before = contributed(fed.roster, member)
    others = [contributed(fed.roster, member.with_(nonce=flipped(NONCE, bit)))[1] for bit in range(0, 128, 3)]
    for bit in range(0, 256, 5):
        plan = Roster(flipped(PLAN, bit), fed.roster.keys, fed.roster.threshold, fed.roster.minimum)
        others.append(contributed(plan, member)[1])
        context = flipped(CONTEXT["statistics"], bit)
        others.append(secure_sum.contribute(fed.roster, member, "statistics", "d1", context)[1])
    for place, old in enumerate(before):
        assert_unrelated([old.key, *(masks[place].key for masks in others)])


def test_secrets_that_agree_when_folded_to_32_bits_give_unrelated_masks() -> None:
    # Flower folds a secret by XOR to 32 bits. Two bits that lie 32 apart cancel, so the folded values agree.
    def folded(secret: bytes) -> int:
        words = np.frombuffer(secret, "<u4")
        return int(np.bitwise_xor.reduce(words))

    fed = federation(4, 3)
    a, b = (fed.members[name] for name in ("silo-a", "silo-b"))
    secret = agree(bytes.fromhex(a.secrets.mask["statistics"]), bytes.fromhex(b.advert.masks["statistics"]), "silo-b")
    twins = [secret]
    for bit in range(0, 224, 9):
        twins.append(bytes.fromhex(flipped(flipped(secret.hex(), bit), bit + 32)))
    swapped = secret[4:8] + secret[:4] + secret[8:]
    twins.append(swapped)
    assert len({folded(twin) for twin in twins}) == 1
    about = "statistics", bytes.fromhex(CONTEXT["statistics"])
    keys = [derive(twin, Label.PAIR, fed.session, *about, "silo-a", "silo-b") for twin in twins]
    assert keys[0] == masks_of(fed, "silo-a")[1].key
    assert_unrelated(keys)
    streams = np.stack([stream([Mask(key, 1)], 512) for key in keys])
    assert np.unique(streams).size == streams.size


def test_mask_words_take_all_64_bits_with_equal_chance() -> None:
    # Flower draws below a modulus that is smaller than the word, so upper bits of its masks stay zero.
    fed = federation(4, 3)
    words = 2**16
    for masks in ([masks_of(fed, "silo-a")[0]], masks_of(fed, "silo-c")):
        values = stream(masks, words)
        ones = np.unpackbits(values.view(np.uint8)).reshape(words, 64).sum(axis=0)
        assert (np.abs(ones - words / 2) < 5 * np.sqrt(words) / 2).all()  # five standard deviations
        highest = np.bincount((values >> np.uint64(56)).astype(int), minlength=256)
        assert (np.square(highest - words / 256) / (words / 256)).sum() < 255 + 6 * np.sqrt(2 * 255)
        assert values.max() > 2**64 - 2**52
        assert np.unique(values).size == words


# Flower SecAgg+: one silo unmasked as both active and dead. --------------------------------------------------------


def signed_by(fed: Federation, member: Member, name: Sum, survivors: Sequence[str]) -> tuple[Member, bytes]:
    uploaded, _ = contributed(fed.roster, member, name)
    return secure_sum.sign(fed.roster, uploaded, fed.identities[member.name], name, survivors)


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
                with pytest.raises(SecurityError, match="second list of survivors came for the sum of statistics"):
                    secure_sum.sign(fed.roster, state, fed.identities[a], "statistics", stories[story])
        for story in (*order, *order):
            if story == first:
                for owner, share in secure_sum.release(fed.roster, state, "statistics", signatures[story]).items():
                    given[owner].add(share)
            else:
                with pytest.raises(SecurityError, match=r"is no survivor|not signed with the key"):
                    secure_sum.release(fed.roster, state, "statistics", signatures[story])
        # The same single share however often it was asked for, and of the kind that the first story says.
        everyone = {**state.held, a: state.own}
        for owner, shares in given.items():
            kind = "seed" if owner in stories[first] else "mask"
            assert shares == {bytes.fromhex(everyone[owner]["statistics"][kind])}
    with pytest.raises(SecurityError, match="before its survivors were signed"):
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
        pool = {(owner, kind): dict[int, bytes]() for owner in self.honest for kind in KINDS}
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
        both = {owner for owner in self.honest if all((owner, kind) in known for kind in KINDS)}
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
        fresh = fed.members[name].with_(adverts=(), own={})
        states[name], sealed[name] = secure_sum.share(fed.roster, fresh, told[name], random.Random(3).randbytes)
    for one, other in itertools.permutations(names[1:], 2):
        if told[one] != told[other]:
            shares = {peer: sealed[peer][one] for peer in names[1:] if peer != one} | {
                names[0]: fed.sealed[names[0]][one]
            }
            with pytest.raises(SecurityError, match=f"for silo '{one}' do not open: .*different lists of keys"):
                secure_sum.receive(fed.roster, states[one], shares)


# Flower SecAgg+: threshold 0, unauthenticated keys, silent clipping, counts in clear. -------------------------------


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
    fresh = {name: member.with_(adverts=(), own={}) for name, member in fed.members.items()}
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
            with pytest.raises(
                SecurityError, match=r"silo 'silo-c'.* not signed with the key that the plan's roster names"
            ):
                secure_sum.share(
                    fed.roster, fresh["silo-a"], [*adverts[:2], forged, adverts[3]], random.Random(5).randbytes
                )


@pytest.mark.parametrize("value", [8.0, 8.000001, 1e3, 2.0**21 - 2.0**-30])
def test_large_values_are_carried_or_refused_and_never_clipped(value: float) -> None:
    scale = 2.0 ** (capacity(4) - 21)  # a range of ±2^21
    values = np.array([value, -value, 0.25])
    total = sum((encode(values, scale, 4, "t") for _ in range(4)), np.zeros(3, np.uint64))
    assert np.abs(decode(total, scale) - 4 * values).max() <= 2 / scale
    with pytest.raises(ContributionError, match="'t' holds 2 values out of 3 beyond"):
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


# OpenFL: one scalar per party; the aggregator reconstructs every private key. ---------------------------------------


def test_no_two_words_of_a_mask_are_equal_or_move_together() -> None:
    fed = federation(4, 3)
    words = 2**14
    plain = random.Random(6).choices(range(2**40), k=words)
    differences = []
    for name in fed.names:
        masked = np.array(plain, np.uint64)
        apply(masked, masks_of(fed, name))
        difference = masked - np.array(plain, np.uint64)
        assert np.unique(difference).size == words
        assert np.unique(np.diff(difference)).size == words - 1
        differences.append(difference.astype(np.int64).astype(np.float64))
    shifted = [d[k : words - 8 + k] for d in differences for k in range(8)]
    correlations = np.corrcoef(np.stack(shifted))
    np.fill_diagonal(correlations, 0)
    assert np.abs(correlations).max() < 5 / np.sqrt(words - 8)


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
                about = secure_sum.framed(Label.CHANNEL, fed.session, sender, receiver)
                with pytest.raises(InvalidTag):
                    ChaCha20Poly1305(key).decrypt(bytes(12), data, about)


# FedML LightSecAgg: the noise is zeros. ----------------------------------------------------------------------------


def test_no_word_goes_out_without_noise() -> None:
    words = 2**15
    for fed in (federation(4, 3), federation(5, 4)):
        for sum_name in SUMS:
            for name in fed.names:
                masks = masks_of(fed, name, sum_name)
                assert len(masks) == len(fed.names)  # its own, and one with every other
                for chosen in ([mask] for mask in masks):
                    assert np.count_nonzero(stream(chosen, words)) == words
                assert np.count_nonzero(stream(masks, words)) == words
                # Even if every peer tells the coordinator its mask, the silo's own is left.
                assert np.count_nonzero(stream(masks[:1], words)) == words


# declearn: numpy's PCG64 as the source of masks. -------------------------------------------------------------------


def test_no_module_of_the_protocol_can_reach_a_generator_of_statistics() -> None:
    sources = sorted(Path(gramfuse_protocol.__file__).parent.rglob("*.py"))
    assert len(sources) > 10
    for path in sources:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                assert not {alias.name.split(".")[0] for alias in node.names} & {"random", "torch"}, path
                assert "numpy.random" not in {alias.name for alias in node.names}, path
            elif isinstance(node, ast.ImportFrom):
                assert (node.module or "").split(".")[0] not in {"random", "torch"}, path
                assert node.module != "numpy.random", path
                assert node.module != "numpy" or "random" not in {alias.name for alias in node.names}, path
            elif isinstance(node, ast.Attribute):
                numpy = isinstance(node.value, ast.Name) and node.value.id in {"np", "numpy"}
                assert not (numpy and node.attr == "random"), path


def test_seeding_generators_changes_no_mask_and_reveals_none() -> None:
    fed = federation(4, 3)
    expected = stream(masks_of(fed, "silo-a"), 100)
    for seed in (0, 1, 12345):
        random.seed(seed)
        np.random.seed(seed)
        before = random.getstate(), np.random.get_state()[1].tobytes()  # type: ignore[index, union-attr]
        again = Federation(4, 3)
        np.testing.assert_array_equal(stream(masks_of(again, "silo-a"), 100), expected)
        after = random.getstate(), np.random.get_state()[1].tobytes()  # type: ignore[index, union-attr]
        assert before == after  # nothing was drawn from them either


# Fed-BioMed LOM: related keys from round to round, and ten nodes or more. ------------------------------------------


@pytest.fixture(scope="module")
def twelve() -> list[Federation]:
    """Twelve silos in two sessions."""
    return [federation(12, 7, seed, nonce) for seed, nonce in ((1, "0" * 31 + "1"), (2, "0" * 31 + "2"))]


def test_masks_of_all_pairs_sums_and_sessions_are_unrelated(twelve: list[Federation]) -> None:
    keys = {
        mask.key for fed in twelve for sum_name in SUMS for name in fed.names for mask in masks_of(fed, name, sum_name)
    }
    assert len(keys) == 2 * 2 * (12 + 12 * 11 // 2)  # a pair has one key, and nothing else has it
    numbers = np.array([np.frombuffer(key, np.uint64) for key in sorted(keys)])
    differences = numbers[:, None, :] ^ numbers[None, :, :]
    apart = np.bitwise_count(differences).sum(axis=2)
    upper = np.triu_indices(len(keys), 1)
    assert 72 < apart[upper].min() < apart[upper].max() < 184
    # A fixed relation between rounds or pairs would show as one difference that comes twice.
    assert len({d.tobytes() for d in differences[upper]}) == upper[0].size


def test_with_the_same_secrets_another_session_still_has_unrelated_masks() -> None:
    # A silo whose random source repeats itself: only the nonce differs.
    one, other = federation(4, 3, 1, "0" * 32), federation(4, 3, 1, "0" * 31 + "1")
    assert one.members["silo-a"].secrets == other.members["silo-a"].secrets
    assert_unrelated([mask.key for fed in (one, other) for mask in masks_of(fed, "silo-a")])


def test_twelve_silos_sum_values_of_full_width(twelve: list[Federation]) -> None:
    fed = twelve[0]
    limit = 2 ** capacity(12)
    assert limit == 2**58
    rng = random.Random(7)
    dead = set(fed.names[9:])  # three of the five that may
    alive = tuple(name for name in fed.names if name not in dead)
    plain = {name: [limit, -limit, *(rng.randint(-limit, limit) for _ in range(62))] for name in fed.names}
    states, signatures = {}, {}
    total = np.zeros(64, np.uint64)
    for name in alive:
        state = fed.received(name)
        masked = np.array([value % 2**64 for value in plain[name]], np.uint64)
        apply(masked, contributed(fed.roster, state)[1])
        total += masked
        states[name], signatures[name] = signed_by(fed, state, "statistics", alive)
    shares = {name: secure_sum.release(fed.roster, states[name], "statistics", signatures) for name in alive[2:]}
    adverts = states[alive[0]].adverts
    signed = Signed(survivors=alive, context=CONTEXT["statistics"])
    apply(total, unmask.unmasking(fed.roster, fed.nonce, adverts, "statistics", fed.names, signed, shares))
    assert total.view(np.int64).tolist() == [sum(plain[name][n] for name in alive) for n in range(64)]


# NVIDIA FLARE: one secret key that all clients have. ---------------------------------------------------------------


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
        for kind in KINDS:
            share = {fed.roster.index(spy): bytes.fromhex(state.held[victim]["statistics"][kind])}
            with pytest.raises(SecurityError, match="1 shares came; the threshold is 4"):
                combine(share, fed.roster.threshold)
            with pytest.raises(SecurityError, match="do not belong to one secret"):
                combine(share, 1)
