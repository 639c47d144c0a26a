"""A coordinator, or a silo on its side, that lies at every step of the secure sum.

Each lie must meet SecurityError with a text that says what is wrong, leave the state as it was, and put no secret into
any text.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pytest

from gramfuse_protocol.contract.roster import Roster
from gramfuse_protocol.errors import SecurityError
from gramfuse_protocol.secure_sum import member as secure_sum
from gramfuse_protocol.secure_sum import unmasking as unmask
from gramfuse_protocol.secure_sum.keys import Identity, Label, agree, derive, framed
from gramfuse_protocol.secure_sum.masks import Mask, apply
from gramfuse_protocol.secure_sum.member import SEALED_BYTES, Member, Signed
from gramfuse_protocol.secure_sum.shares import PRIME, SHARE_BYTES
from gramfuse_protocol.secure_sum.statements import SUMS, Advert, Sum, advert_statement, session_id, survivors_statement

PLAN, OTHER_PLAN = "a1" * 32, "a2" * 32
NONCE, OTHER_NONCE = "b1" * 16, "b2" * 16
CONTEXT: Mapping[Sum, str] = {"statistics": "c1" * 32, "metrics": "c2" * 32}
NAMES = ("a", "b", "c", "d", "e")
THRESHOLD = 4

LOW_ORDER = [
    # Points of order 1, 2, 4 and 8 on Curve25519 and its twist, for which RFC 7748, section 6.1, asks for the check of
    # an all-zero secret: 0, 1, the two of order 8, p − 1, and p and p + 1, which stand for 0 and 1 once more.
    "0000000000000000000000000000000000000000000000000000000000000000",
    "0100000000000000000000000000000000000000000000000000000000000000",
    "e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800",
    "5f9c95bca3508c24b1d0b1559c83ef5b04445cc4581c8e86d8224eddd09f1157",
    "ecffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
    "edffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
    "eeffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
]
LOW_ORDER += [point[:-2] + f"{int(point[-2:], 16) | 0x80:02x}" for point in LOW_ORDER]  # the highest bit is ignored


class Stage:
    """Everything there is at one moment of an honest session of five silos, from the view of silo `a`."""

    def __init__(self, plan: str = PLAN, nonce: str = NONCE, seed: int = 1) -> None:
        source = random.Random(0)
        self.identities = {name: Identity(source.randbytes(32)) for name in NAMES}
        self.roster = Roster(plan, {n: i.public for n, i in self.identities.items()}, THRESHOLD, THRESHOLD)
        self.nonce = nonce
        self.random = random.Random(seed).randbytes
        self.invited = {
            n: secure_sum.advertise(self.roster, nonce, n, NAMES, self.identities[n], self.random) for n in NAMES
        }
        self.adverts = {n: member.advert for n, member in self.invited.items()}
        self.shared: dict[str, Member] = {}
        self.sealed: dict[str, dict[str, bytes]] = {}
        for n in NAMES:
            self.shared[n], self.sealed[n] = secure_sum.share(
                self.roster, self.invited[n], list(self.adverts.values()), self.random
            )
        self.joined = {n: secure_sum.receive(self.roster, self.shared[n], self.sealed_for(n)) for n in NAMES}
        self.uploaded = {n: self.contribute(m)[0] for n, m in self.joined.items()}
        self.survivors = NAMES[:4]
        signed = {n: self.sign(self.uploaded[n], self.survivors) for n in self.survivors}
        self.signed = {n: member for n, (member, _) in signed.items()}
        self.signatures = {n: signature for n, (_, signature) in signed.items()}

    @property
    def session(self) -> bytes:
        return session_id(self.roster.plan, self.nonce, list(self.adverts.values()))

    def sealed_for(self, name: str) -> dict[str, bytes]:
        return {peer: self.sealed[peer][name] for peer in NAMES if peer != name}

    def contribute(
        self, member: Member, sum_name: Sum = "statistics", digest: str = "d1", context: str | None = None
    ) -> tuple[Member, list[Mask]]:
        return secure_sum.contribute(self.roster, member, sum_name, digest, context or CONTEXT[sum_name])

    def sign(self, member: Member, survivors: Sequence[str], sum_name: Sum = "statistics") -> tuple[Member, bytes]:
        return secure_sum.sign(self.roster, member, self.identities[member.name], sum_name, survivors)

    def advert(
        self, name: str, plan: str = PLAN, nonce: str = NONCE, by: str | None = None, **changes: object
    ) -> Advert:
        """An advert with changes, signed anew by its own silo or by another."""
        changed = self.adverts[name].model_copy(update=changes)
        signature = self.identities[by or name].sign(advert_statement(plan, nonce, changed.fields))
        return changed.model_copy(update={"signature": signature.hex()})

    def seal(self, plain: bytes, sender: str = "b", receiver: str = "a") -> bytes:
        """What a silo on the coordinator's side seals, whatever it is."""
        secret = agree(
            bytes.fromhex(self.invited[sender].secrets.channel), bytes.fromhex(self.adverts[receiver].channel), receiver
        )
        key = derive(secret, Label.CHANNEL, self.session, sender, receiver)
        about = framed(Label.CHANNEL, self.session, sender, receiver)
        return secure_sum.ChaCha20Poly1305(key).encrypt(bytes(12), plain, about)

    def signatures_over(
        self, sum_name: Sum, members: Sequence[str], survivors: Sequence[str], context: str
    ) -> dict[str, bytes]:
        statement = survivors_statement(self.session, sum_name, members, survivors, context)
        return {name: self.identities[name].sign(statement) for name in survivors}


@pytest.fixture(scope="module")
def at() -> Stage:
    return Stage()


@pytest.fixture(scope="module")
def elsewhere() -> Stage:
    """Another session of the same silos under the same plan."""
    return Stage(nonce=OTHER_NONCE, seed=2)


@dataclass(frozen=True)
class Lie:
    """What a coordinator does at a step, and what the error must say, in one piece or more."""

    what: str
    tell: Callable[[Stage, Stage], object]
    told: str | tuple[str, ...]

    def __str__(self) -> str:
        return self.what


def secrets_of(stage: Stage) -> list[str]:
    """All that must not be read in any text: keys, seeds and shares, in hexadecimal."""
    found = []
    found += [str(member.secrets.channel) for member in stage.invited.values()]
    for member in (*stage.joined.values(), *stage.invited.values()):
        found += [*member.secrets.mask.values(), *member.secrets.seed.values()]
        for shares in (member.own, *member.held.values()):
            found += [share for kinds in shares.values() for share in kinds.values()]
    return found


def assert_tells_no_secret(text: str, *stages: Stage) -> None:
    for stage in stages:
        for secret in secrets_of(stage):
            assert secret[:24] not in text
            assert secret[-24:] not in text
            assert repr(bytes.fromhex(secret))[2:-1] not in text


def all_states(stage: Stage) -> list[Member]:
    return [
        m
        for states in (stage.invited, stage.shared, stage.joined, stage.uploaded, stage.signed)
        for m in states.values()
    ]


def advertise(
    name: str, cohort: Sequence[str], roster: Roster | None = None, by: str | None = None
) -> Callable[[Stage, Stage], object]:
    return lambda at, _: secure_sum.advertise(
        roster or at.roster, NONCE, name, cohort, at.identities[by or name], at.random
    )


def share(make: Callable[[Stage, Stage], Sequence[Advert]]) -> Callable[[Stage, Stage], object]:
    return lambda at, other: secure_sum.share(at.roster, at.invited["a"], make(at, other), random.Random(9).randbytes)


def with_advert(name: str, make: Callable[[Stage, Stage], Advert]) -> Callable[[Stage, Stage], object]:
    """The list of keys with one advert replaced."""
    return share(lambda at, other: [make(at, other) if n == name else advert for n, advert in at.adverts.items()])


def receive(make: Callable[[Stage, Stage], Mapping[str, bytes]]) -> Callable[[Stage, Stage], object]:
    return lambda at, other: secure_sum.receive(at.roster, at.shared["a"], make(at, other))


def with_sealed(**changes: Callable[[Stage, Stage], bytes]) -> Callable[[Stage, Stage], object]:
    return receive(lambda at, other: at.sealed_for("a") | {n: make(at, other) for n, make in changes.items()})


def sign(
    survivors: Sequence[str], state: str = "uploaded", sum_name: Sum = "statistics"
) -> Callable[[Stage, Stage], object]:
    return lambda at, _: at.sign(getattr(at, state)["a"], survivors, sum_name)


def release(make: Callable[[Stage, Stage], Mapping[str, bytes]]) -> Callable[[Stage, Stage], object]:
    return lambda at, other: secure_sum.release(at.roster, at.signed["a"], "statistics", make(at, other))


def changed(data: bytes, place: int = 0) -> bytes:
    return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


NOT_SIGNED = "not signed with the key that the plan's roster names"


def unsigned(name: str) -> tuple[str, str]:
    return f"silo '{name}'", NOT_SIGNED


ADVERTISE = [
    Lie("too few are invited", advertise("a", NAMES[:3]), "the cohort has 3 silos; the plan asks for 4"),
    Lie("it is not invited itself", advertise("a", NAMES[1:]), "the cohort leaves out silo 'a'"),
    Lie("one is invited twice", advertise("a", ("a", "b", "b", "c", "d")), "the cohort names a silo twice"),
    Lie("a stranger is invited", advertise("a", ("a", "b", "c", "zz")), "the cohort names 'zz', which cannot be there"),
    Lie("another order", advertise("a", ("b", "a", "c", "d")), "the cohort is not in the order of the roster"),
    Lie("another silo's name", advertise("a", NAMES, by="b"), "another key for silo 'a' than its identity file"),
    Lie(
        "another roster",
        advertise("a", NAMES, Roster(PLAN, {n: bytes([k]) * 32 for k, n in enumerate(NAMES)}, THRESHOLD, THRESHOLD)),
        "the roster has another key for silo 'a'",
    ),
]

SHARE = [
    Lie(
        "too few",
        share(lambda at, _: list(at.adverts.values())[:3]),
        "the list of keys has 3 silos; the plan asks for 4",
    ),
    Lie("none", share(lambda at, _: []), "the list of keys has 0 silos"),
    Lie(
        "one twice", share(lambda at, _: [*at.adverts.values(), at.adverts["b"]]), "the list of keys names a silo twice"
    ),
    Lie("another order", share(lambda at, _: list(at.adverts.values())[::-1]), "not in the order of the roster"),
    Lie(
        "its own left out",
        share(lambda at, _: list(at.adverts.values())[1:]),
        "does not hold those of silo 'a' as they were sent",
    ),
    Lie(
        "its own from another session",
        with_advert("a", lambda at, other: other.adverts["a"]),
        unsigned("a"),
    ),
    Lie(
        "its own signed, and others",
        with_advert("a", lambda at, _: at.advert("a", channel=at.adverts["a"].channel[:-2] + "11")),
        "does not hold those of silo 'a' as they were sent",
    ),
    Lie(
        "a stranger",
        share(lambda at, _: [*at.adverts.values(), at.adverts["b"].model_copy(update={"silo": "zz"})]),
        "the list of keys names 'zz', which cannot be there",
    ),
    Lie("replayed from another session", with_advert("b", lambda _, other: other.adverts["b"]), unsigned("b")),
    Lie(
        "signed under another plan",
        with_advert("b", lambda at, _: at.advert("b", plan=OTHER_PLAN)),
        unsigned("b"),
    ),
    Lie("signed by another silo", with_advert("b", lambda at, _: at.advert("b", by="c")), unsigned("b")),
    Lie(
        "two silos' keys swapped",
        with_advert("b", lambda at, _: at.adverts["c"].model_copy(update={"silo": "b"})),
        unsigned("b"),
    ),
    Lie(
        "the keys of the two sums swapped",
        with_advert(
            "b",
            lambda at, _: at.adverts["b"].model_copy(
                update={"masks": dict(zip(SUMS, reversed([at.adverts["b"].masks[s] for s in SUMS]), strict=True))}
            ),
        ),
        unsigned("b"),
    ),
    Lie(
        "channel key for mask key",
        with_advert(
            "b",
            lambda at, _: at.adverts["b"].model_copy(
                update={
                    "channel": at.adverts["b"].masks["statistics"],
                    "masks": {**at.adverts["b"].masks, "statistics": at.adverts["b"].channel},
                }
            ),
        ),
        unsigned("b"),
    ),
    Lie(
        "a signature of zeros",
        with_advert("b", lambda at, _: at.adverts["b"].model_copy(update={"signature": "0" * 128})),
        unsigned("b"),
    ),
    *(
        Lie(
            f"another {field}",
            with_advert(
                "b",
                lambda at, _, field=field: at.adverts["b"].model_copy(
                    update={field: {**getattr(at.adverts["b"], field), "metrics": "77" * 32}}
                ),
            ),
            unsigned("b"),
        )
        for field in ("masks", "commitments")
    ),
    Lie(
        "a key copied from another silo and signed",
        with_advert("b", lambda at, _: at.advert("b", channel=at.adverts["c"].channel)),
        "the list of keys holds one key twice",
    ),
    Lie(
        "one key for both sums",
        with_advert("b", lambda at, _: at.advert("b", masks=dict.fromkeys(SUMS, at.adverts["b"].masks["metrics"]))),
        "the keys of silo 'b' hold one key twice",
    ),
    Lie(
        "a second list",
        lambda at, _: secure_sum.share(at.roster, at.shared["a"], list(at.adverts.values()), at.random),
        "a second list of keys came",
    ),
]

RECEIVE = [
    Lie(
        "too few", receive(lambda at, _: {n: at.sealed[n]["a"] for n in ("b", "c")}), "has 3 silos; the plan asks for 4"
    ),
    Lie("none", receive(lambda at, _: {}), "the list of those who shared has 1 silos"),
    Lie(
        "a stranger's",
        with_sealed(zz=lambda at, _: at.sealed["b"]["a"]),
        "shares came from 'zz', whose keys are not in the list",
    ),
    Lie("its own", with_sealed(a=lambda at, _: at.sealed["a"]["b"]), "silo 'a' is said to have sealed for itself"),
    Lie(
        "changed",
        with_sealed(b=lambda at, _: changed(at.sealed["b"]["a"])),
        "silo 'b' for silo 'a' do not open: they were changed",
    ),
    Lie(
        "changed in the tag",
        with_sealed(b=lambda at, _: changed(at.sealed["b"]["a"], -1 + SEALED_BYTES)),
        "silo 'b' for silo 'a' do not open",
    ),
    Lie("cut off", with_sealed(b=lambda at, _: at.sealed["b"]["a"][:-1]), "silo 'b' for silo 'a' do not open"),
    Lie("empty", with_sealed(c=lambda at, _: b""), "silo 'c' for silo 'a' do not open"),
    Lie(
        "swapped", with_sealed(b=lambda at, _: at.sealed["c"]["a"], c=lambda at, _: at.sealed["b"]["a"]), "do not open"
    ),
    Lie("meant for another", with_sealed(b=lambda at, _: at.sealed["b"]["c"]), "silo 'b' for silo 'a' do not open"),
    Lie("reflected", with_sealed(b=lambda at, _: at.sealed["a"]["b"]), "silo 'b' for silo 'a' do not open"),
    Lie(
        "replayed from another session",
        with_sealed(b=lambda _, other: other.sealed["b"]["a"]),
        "another silo or session",
    ),
    Lie(
        "made with another list of keys",
        with_sealed(
            b=lambda at, _: secure_sum.share(
                at.roster, at.invited["b"], [at.adverts[n] for n in NAMES[:4]], random.Random(4).randbytes
            )[1]["a"]
        ),
        "the two were told different lists of keys",
    ),
    Lie(
        "sealed, and no shares",
        with_sealed(b=lambda at, _: at.seal(bytes(SHARE_BYTES))),
        "silo 'b' sealed 66 bytes that are no shares",
    ),
    Lie("sealed, and nothing", with_sealed(b=lambda at, _: at.seal(b"")), "silo 'b' sealed 0 bytes that are no shares"),
    Lie(
        "sealed, and beyond the prime",
        with_sealed(b=lambda at, _: at.seal(3 * bytes(SHARE_BYTES) + PRIME.to_bytes(SHARE_BYTES, "little"))),
        ("silo 'b' sealed what is no share", "not a number below 2^521 − 1"),
    ),
    Lie(
        "before the list of keys",
        lambda at, _: secure_sum.receive(at.roster, at.invited["a"], at.sealed_for("a")),
        "shares came before the list of keys",
    ),
    Lie(
        "a second time",
        lambda at, _: secure_sum.receive(at.roster, at.joined["a"], at.sealed_for("a")),
        "shares came a second time",
    ),
]

UPLOAD = [
    Lie(
        "masks before the members",
        lambda at, _: at.contribute(at.shared["a"]),
        "before its members are known",
    ),
    Lie(
        "the second sum first",
        lambda at, _: at.contribute(at.uploaded["a"], "metrics"),
        "sum of metrics was asked for before its members are known",
    ),
    Lie(
        "other contents",
        lambda at, _: at.contribute(at.uploaded["a"], digest="d2"),
        "sum of statistics was asked for twice, with different contents",
    ),
    Lie(
        "about something else",
        lambda at, _: at.contribute(at.uploaded["a"], context="c3" * 32),
        "sum of statistics was asked for twice, with different contents",
    ),
]

SIGN = [
    Lie("it is dead itself", sign(NAMES[1:]), "the list of survivors leaves out silo 'a', which is alive"),
    Lie("too few", sign(NAMES[:3]), "the list of survivors has 3 silos; the plan asks for 4"),
    Lie("none", sign(()), "the list of survivors has 0 silos"),
    Lie("one twice", sign(("a", "b", "b", "c", "d")), "the list of survivors names a silo twice"),
    Lie("itself twice", sign(("a", "a", "b", "c")), "the list of survivors names a silo twice"),
    Lie("a stranger", sign(("a", "b", "c", "zz")), "the list of survivors names 'zz', which cannot be there"),
    Lie("another order", sign(("a", "c", "b", "d")), "the list of survivors is not in the order of the roster"),
    Lie("before it sent anything", sign(NAMES, "joined"), "silo 'a' sent nothing for it"),
    Lie("before the shares", sign(NAMES, "shared"), "before its members are known"),
    Lie(
        "a living silo dead after all",
        sign(("a", "b", "c", "e"), "signed"),
        "a second list of survivors came for the sum of statistics",
    ),
    Lie("a dead silo alive after all", sign(NAMES, "signed"), "a second list of survivors came"),
    Lie("the second sum before the first", sign(NAMES, "uploaded", "metrics"), "before its members are known"),
    Lie("the second sum, nothing sent", sign(NAMES[:4], "signed", "metrics"), "silo 'a' sent nothing for it"),
    Lie(
        "a dead silo alive in the second sum",
        lambda at, _: at.sign(at.contribute(at.signed["a"], "metrics", "d3")[0], NAMES, "metrics"),
        "the list of survivors names 'e', which cannot be there",
    ),
    Lie(
        "a member that never shared",
        lambda at, _: at.sign(
            at.contribute(
                secure_sum.receive(at.roster, at.shared["a"], {n: at.sealed[n]["a"] for n in ("b", "c", "d")})
            )[0],
            NAMES,
        ),
        "the list of survivors names 'e', which cannot be there",
    ),
]

RELEASE = [
    Lie(
        "nothing signed",
        lambda at, _: secure_sum.release(at.roster, at.uploaded["a"], "statistics", at.signatures),
        "before its survivors were signed",
    ),
    Lie("no signatures", release(lambda at, _: {}), "0 silos signed the survivors; the threshold is 4"),
    Lie(
        "too few signatures",
        release(lambda at, _: {n: at.signatures[n] for n in NAMES[:3]}),
        "3 silos signed the survivors; the threshold is 4",
    ),
    Lie(
        "a stranger's",
        release(lambda at, _: {**at.signatures, "zz": at.signatures["a"]}),
        "a signature came from 'zz', which is no survivor",
    ),
    Lie(
        "a dead silo's",
        release(lambda at, _: {**at.signatures, "e": at.signatures["a"]}),
        "a signature came from 'e', which is no survivor",
    ),
    Lie("changed", release(lambda at, _: {**at.signatures, "c": changed(at.signatures["c"])}), unsigned("c")),
    Lie("one signature for all", release(lambda at, _: dict.fromkeys(NAMES[:4], at.signatures["a"])), unsigned("b")),
    Lie(
        "swapped",
        release(lambda at, _: {**at.signatures, "b": at.signatures["c"], "c": at.signatures["b"]}),
        unsigned("b"),
    ),
    Lie("cut off", release(lambda at, _: {**at.signatures, "d": at.signatures["d"][:63]}), unsigned("d")),
    Lie("of another session", release(lambda _, other: other.signatures), NOT_SIGNED),
    Lie(
        "of other survivors",
        release(
            lambda at, _: {
                n: s
                for n, s in at.signatures_over("statistics", NAMES, NAMES, CONTEXT["statistics"]).items()
                if n != "e"
            }
        ),
        NOT_SIGNED,
    ),
    Lie(
        "of other members",
        release(lambda at, _: at.signatures_over("statistics", NAMES[:4], NAMES[:4], CONTEXT["statistics"])),
        NOT_SIGNED,
    ),
    Lie(
        "of another context",
        release(lambda at, _: at.signatures_over("statistics", NAMES, NAMES[:4], "c3" * 32)),
        NOT_SIGNED,
    ),
    Lie(
        "of the other sum",
        release(lambda at, _: at.signatures_over("metrics", NAMES, NAMES[:4], CONTEXT["statistics"])),
        NOT_SIGNED,
    ),
    Lie(
        "the other sum's shares",
        lambda at, _: secure_sum.release(at.roster, at.signed["a"], "metrics", at.signatures),
        "sum of metrics were asked for before its survivors",
    ),
    Lie(
        "after they were wiped",
        lambda at, _: secure_sum.release(
            at.roster, secure_sum.forget(at.signed["a"], "statistics"), "statistics", at.signatures
        ),
        "are wiped; a second request",
    ),
]

LIES = [
    pytest.param(lie, id=f"{step}: {lie}")
    for step, lies in {
        "advertise": ADVERTISE,
        "share": SHARE,
        "receive": RECEIVE,
        "upload": UPLOAD,
        "sign": SIGN,
        "release": RELEASE,
    }.items()
    for lie in lies
]


@pytest.mark.parametrize("lie", LIES)
def test_a_lie_is_named_changes_nothing_and_brings_no_secret_to_light(lie: Lie, at: Stage, elsewhere: Stage) -> None:
    states = all_states(at)
    before = copy.deepcopy(states)
    with pytest.raises(SecurityError) as caught:
        lie.tell(at, elsewhere)
    text = str(caught.value)
    for told in (lie.told,) if isinstance(lie.told, str) else lie.told:
        assert told in text
    assert caught.value.reason == text
    assert caught.value.__cause__ is None
    assert_tells_no_secret(text, at, elsewhere)
    assert states == before


@pytest.mark.parametrize("point", LOW_ORDER)
@pytest.mark.parametrize("place", ["channel", *SUMS])
def test_a_public_key_of_low_order_is_refused_though_it_is_signed(place: str, point: str, at: Stage) -> None:
    change = {"channel": point} if place == "channel" else {"masks": {**at.adverts["d"].masks, place: point}}
    adverts = [at.advert("d", **change) if n == "d" else advert for n, advert in at.adverts.items()]
    for name in ("a", "e"):
        before = copy.deepcopy(at.invited[name])
        with pytest.raises(SecurityError, match=r"public key of silo 'd' .*; it is no honest key"):
            secure_sum.share(at.roster, at.invited[name], adverts, random.Random(9).randbytes)
        assert at.invited[name] == before


def test_after_all_lies_the_same_states_finish_an_honest_session(at: Stage, elsewhere: Stage) -> None:
    for parameter in LIES:
        with pytest.raises(SecurityError):
            parameter.values[0].tell(at, elsewhere)
    inputs = {name: np.arange(1, 5, dtype=np.uint64) * np.uint64(10**k) for k, name in enumerate(NAMES)}
    total = np.zeros(4, np.uint64)
    for name in at.survivors:
        masked = inputs[name].copy()
        apply(masked, at.contribute(at.signed[name])[1])
        total += masked
    shares = {n: secure_sum.release(at.roster, at.signed[n], "statistics", at.signatures) for n in at.survivors}
    apply(total, unmasking(at, shares))
    assert total.tolist() == [1111, 2222, 3333, 4444]  # each silo once, and the dead one not


# Silos that lie to the coordinator. ---------------------------------------------------------------------------------


def unmasking(at: Stage, shares: Mapping[str, Mapping[str, bytes]]) -> list[Mask]:
    signed = Signed(survivors=at.survivors, context=CONTEXT["statistics"])
    return unmask.unmasking(at.roster, at.nonce, list(at.adverts.values()), "statistics", NAMES, signed, shares)


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (
            lambda s: {k: v for k, v in s.items() if k != "e"},
            "silo 'b' did not release exactly one share for each member",
        ),
        (lambda s: {**s, "zz": s["a"]}, "silo 'b' did not release exactly one share for each member"),
        (lambda s: {**s, "c": s["c"][:-1]}, "what silo 'c' committed to"),
        (lambda s: {**s, "c": b"\xff" * SHARE_BYTES}, "what silo 'c' committed to"),
        (lambda s: {**s, "c": s["d"]}, "what silo 'c' committed to"),
        (lambda s: {**s, "e": s["a"]}, "what silo 'e' committed to"),
        (lambda s: dict.fromkeys(s, bytes(SHARE_BYTES)), "what silo 'a' committed to"),
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
    with pytest.raises(SecurityError, match=rf"silo '{owner}' committed to; one of a, b, c, d"):
        unmasking(at, shares)


def test_three_shares_open_nothing(at: Stage) -> None:
    shares = {n: secure_sum.release(at.roster, at.signed[n], "statistics", at.signatures) for n in at.survivors[:3]}
    with pytest.raises(SecurityError, match=r"^3 .*shares.*; the threshold is 4"):
        unmasking(at, shares)


def test_a_share_from_one_that_is_no_survivor_is_not_taken(at: Stage) -> None:
    shares = {n: secure_sum.release(at.roster, at.signed[n], "statistics", at.signatures) for n in at.survivors}
    for stranger in ("e", "zz"):
        with pytest.raises(SecurityError, match=f"shares came from '{stranger}', which is no survivor"):
            unmasking(at, {**shares, stranger: shares["a"]})


# Text. --------------------------------------------------------------------------------------------------------------


def test_no_text_form_of_a_state_shows_a_secret(at: Stage) -> None:
    for member in all_states(at):
        for thing in (member, member.secrets, [member], {"member": member}):
            for text in (repr(thing), str(thing), f"{thing}"):
                assert_tells_no_secret(text, at)
        assert member.advert.channel in repr(member)  # public keys may be read
    for name in NAMES:
        private = at.identities[name].to_pem().splitlines()[1]
        assert private not in repr(at.identities[name]) + str(at.identities[name])
        assert at.identities[name].public.hex() in repr(at.identities[name])
    for _, masks in (at.contribute(at.joined[n]) for n in NAMES):
        assert all(mask.key.hex() not in repr(masks) and repr(mask.key) not in repr(masks) for mask in masks)


def test_what_is_forgotten_is_gone_from_the_state(at: Stage) -> None:
    forgotten = secure_sum.forget(at.signed["a"], "statistics")
    text = forgotten.model_dump_json()
    state = at.signed["a"]
    for secrets in (state.secrets.mask, state.secrets.seed):
        assert secrets["statistics"] not in text
        assert secrets["metrics"] in text
    for shares in (state.own, *state.held.values()):
        assert not any(share in text for share in shares["statistics"].values())
        assert all(share in text for share in shares["metrics"].values())
    assert secure_sum.forget(forgotten, "statistics") == forgotten
    assert Member.model_validate_json(text) == forgotten
    with pytest.raises(SecurityError, match="the secrets of the sum of statistics are wiped"):
        at.contribute(forgotten)


def test_once_shares_are_open_the_key_that_opens_them_is_gone(at: Stage) -> None:
    # Otherwise a recording of what the coordinator passed on, and the state of later, would bring wiped shares back.
    for name in NAMES:
        channel = at.invited[name].secrets.channel
        assert channel in at.shared[name].model_dump_json()
        assert channel not in at.joined[name].model_dump_json()


def test_a_damaged_state_is_refused_without_being_quoted(at: Stage) -> None:
    secrets = at.uploaded["a"].secrets
    text = at.uploaded["a"].model_dump_json()
    for secret in (*secrets.mask.values(), *secrets.seed.values()):
        for damaged in (secret[:-1], secret.upper(), secret + '"'):
            with pytest.raises(ValueError, match="validation error") as caught:
                Member.model_validate_json(text.replace(secret, damaged))
            assert secret[:12] not in str(caught.value).lower()
