"""Lies of a coordinator, or of a silo on its side, at every step of the secure sum."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import pytest

from gramfuse_protocol.contract.roster import Roster
from gramfuse_protocol.secure_sum import member as secure_sum
from gramfuse_protocol.secure_sum.member import SEALED_BYTES
from gramfuse_protocol.secure_sum.shares import PRIME, SHARE_BYTES
from gramfuse_protocol.secure_sum.statements import SUMS, Advert, Sum
from tests.adversarial.state_machine.stage import CONTEXT, NAMES, NONCE, OTHER_PLAN, PLAN, THRESHOLD, Stage, changed


@dataclass(frozen=True)
class Lie:
    """What a coordinator does at a step, and what the error must say, in one piece or more."""

    what: str
    tell: Callable[[Stage, Stage], object]
    told: str | tuple[str, ...]

    def __str__(self) -> str:
        return self.what


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


NOT_SIGNED = "not signed"


def unsigned(name: str) -> tuple[str, str]:
    return f"silo '{name}'", NOT_SIGNED


ADVERTISE = [
    Lie("too few are invited", advertise("a", NAMES[:3]), ("the cohort", "3 silos", "4")),
    Lie("it is not invited itself", advertise("a", NAMES[1:]), ("the cohort", "omits silo 'a'")),
    Lie("one is invited twice", advertise("a", ("a", "b", "b", "c", "d")), ("the cohort", "twice")),
    Lie("a stranger is invited", advertise("a", ("a", "b", "c", "zz")), ("the cohort", "'zz'")),
    Lie("another order", advertise("a", ("b", "a", "c", "d")), ("the cohort", "roster order")),
    Lie("another silo's name", advertise("a", NAMES, by="b"), ("key of silo 'a'", "roster")),
    Lie(
        "another roster",
        advertise("a", NAMES, Roster(PLAN, {n: bytes([k]) * 32 for k, n in enumerate(NAMES)}, THRESHOLD, THRESHOLD)),
        ("key of silo 'a'", "roster"),
    ),
]

SHARE = [
    Lie(
        "too few",
        share(lambda at, _: list(at.adverts.values())[:3]),
        ("the list of keys", "3 silos", "4"),
    ),
    Lie("none", share(lambda at, _: []), ("the list of keys", "0 silos")),
    Lie("one twice", share(lambda at, _: [*at.adverts.values(), at.adverts["b"]]), ("the list of keys", "twice")),
    Lie("another order", share(lambda at, _: list(at.adverts.values())[::-1]), "roster order"),
    Lie(
        "its own left out",
        share(lambda at, _: list(at.adverts.values())[1:]),
        ("silo 'a'", "omits or alters"),
    ),
    Lie(
        "its own from another session",
        with_advert("a", lambda at, other: other.adverts["a"]),
        unsigned("a"),
    ),
    Lie(
        "its own signed, and others",
        with_advert("a", lambda at, _: at.advert("a", channel=at.adverts["a"].channel[:-2] + "11")),
        ("silo 'a'", "omits or alters"),
    ),
    Lie(
        "a stranger",
        share(lambda at, _: [*at.adverts.values(), at.adverts["b"].model_copy(update={"silo": "zz"})]),
        ("the list of keys", "'zz'"),
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
        ("the list of keys", "one key twice"),
    ),
    Lie(
        "one key for both sums",
        with_advert("b", lambda at, _: at.advert("b", masks=dict.fromkeys(SUMS, at.adverts["b"].masks["metrics"]))),
        ("silo 'b'", "one key twice"),
    ),
    Lie(
        "a second list",
        lambda at, _: secure_sum.share(at.roster, at.shared["a"], list(at.adverts.values()), at.random),
        "second list of keys",
    ),
]

RECEIVE = [
    Lie("too few", receive(lambda at, _: {n: at.sealed[n]["a"] for n in ("b", "c")}), ("3 silos", "4")),
    Lie("none", receive(lambda at, _: {}), ("those who shared", "1 silos")),
    Lie(
        "a stranger's",
        with_sealed(zz=lambda at, _: at.sealed["b"]["a"]),
        ("shares", "'zz'"),
    ),
    Lie("its own", with_sealed(a=lambda at, _: at.sealed["a"]["b"]), ("silo 'a'", "from itself")),
    Lie(
        "changed",
        with_sealed(b=lambda at, _: changed(at.sealed["b"]["a"])),
        ("silo 'b' for silo 'a'", "changed"),
    ),
    Lie(
        "changed in the tag",
        with_sealed(b=lambda at, _: changed(at.sealed["b"]["a"], -1 + SEALED_BYTES)),
        ("silo 'b' for silo 'a'", "decrypted"),
    ),
    Lie("cut off", with_sealed(b=lambda at, _: at.sealed["b"]["a"][:-1]), ("silo 'b' for silo 'a'", "decrypted")),
    Lie("empty", with_sealed(c=lambda at, _: b""), ("silo 'c' for silo 'a'", "decrypted")),
    Lie(
        "swapped",
        with_sealed(b=lambda at, _: at.sealed["c"]["a"], c=lambda at, _: at.sealed["b"]["a"]),
        ("for silo 'a'", "decrypted"),
    ),
    Lie("meant for another", with_sealed(b=lambda at, _: at.sealed["b"]["c"]), ("silo 'b' for silo 'a'", "decrypted")),
    Lie("reflected", with_sealed(b=lambda at, _: at.sealed["a"]["b"]), ("silo 'b' for silo 'a'", "decrypted")),
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
        "different lists of keys",
    ),
    Lie(
        "sealed, and no shares",
        with_sealed(b=lambda at, _: at.seal(bytes(SHARE_BYTES))),
        ("silo 'b'", "66 bytes"),
    ),
    Lie("sealed, and nothing", with_sealed(b=lambda at, _: at.seal(b"")), ("silo 'b'", " 0 bytes")),
    Lie(
        "sealed, and beyond the prime",
        with_sealed(b=lambda at, _: at.seal(3 * bytes(SHARE_BYTES) + PRIME.to_bytes(SHARE_BYTES, "little"))),
        ("silo 'b'", "malformed share", "2^521 − 1"),
    ),
    Lie(
        "before the list of keys",
        lambda at, _: secure_sum.receive(at.roster, at.invited["a"], at.sealed_for("a")),
        "before the list of keys",
    ),
    Lie(
        "a second time",
        lambda at, _: secure_sum.receive(at.roster, at.joined["a"], at.sealed_for("a")),
        "a second time",
    ),
]

UPLOAD = [
    Lie(
        "masks before the members",
        lambda at, _: at.contribute(at.shared["a"]),
        "before its members",
    ),
    Lie(
        "the second sum first",
        lambda at, _: at.contribute(at.uploaded["a"], "metrics"),
        ("metrics", "before its members"),
    ),
    Lie(
        "other contents",
        lambda at, _: at.contribute(at.uploaded["a"], digest="d2"),
        ("statistics", "different contents"),
    ),
    Lie(
        "about something else",
        lambda at, _: at.contribute(at.uploaded["a"], context="c3" * 32),
        ("statistics", "different contents"),
    ),
]

SIGN = [
    Lie("it is dead itself", sign(NAMES[1:]), ("survivors", "omits silo 'a'")),
    Lie("too few", sign(NAMES[:3]), ("survivors", "3 silos", "4")),
    Lie("none", sign(()), ("survivors", "0 silos")),
    Lie("one twice", sign(("a", "b", "b", "c", "d")), ("survivors", "twice")),
    Lie("itself twice", sign(("a", "a", "b", "c")), ("survivors", "twice")),
    Lie("a stranger", sign(("a", "b", "c", "zz")), ("survivors", "'zz'")),
    Lie("another order", sign(("a", "c", "b", "d")), ("survivors", "roster order")),
    Lie("before it sent anything", sign(NAMES, "joined"), ("silo 'a'", "nothing")),
    Lie("before the shares", sign(NAMES, "shared"), "before its members"),
    Lie(
        "a living silo dead after all",
        sign(("a", "b", "c", "e"), "signed"),
        ("second list of survivors", "statistics"),
    ),
    Lie("a dead silo alive after all", sign(NAMES, "signed"), "second list of survivors"),
    Lie("the second sum before the first", sign(NAMES, "uploaded", "metrics"), "before its members"),
    Lie("the second sum, nothing sent", sign(NAMES[:4], "signed", "metrics"), ("silo 'a'", "nothing")),
    Lie(
        "a dead silo alive in the second sum",
        lambda at, _: at.sign(at.contribute(at.signed["a"], "metrics", "d3")[0], NAMES, "metrics"),
        ("survivors", "'e'"),
    ),
    Lie(
        "a member that never shared",
        lambda at, _: at.sign(
            at.contribute(
                secure_sum.receive(at.roster, at.shared["a"], {n: at.sealed[n]["a"] for n in ("b", "c", "d")})
            )[0],
            NAMES,
        ),
        ("survivors", "'e'"),
    ),
]

RELEASE = [
    Lie(
        "nothing signed",
        lambda at, _: secure_sum.release(at.roster, at.uploaded["a"], "statistics", at.signatures),
        "before its survivors",
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
        ("signed", "'zz'"),
    ),
    Lie(
        "a dead silo's",
        release(lambda at, _: {**at.signatures, "e": at.signatures["a"]}),
        ("signed", "'e'"),
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
        ("metrics", "before its survivors"),
    ),
    Lie(
        "after they were wiped",
        lambda at, _: secure_sum.release(
            at.roster, secure_sum.forget(at.signed["a"], "statistics"), "statistics", at.signatures
        ),
        ("statistics", "again", "wiped"),
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
