"""Lies to one silo, step by step, and phases out of order."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gramfuse_protocol.messages.phases import Refusal, UploadRequest
from tests.exchange.secure.coordinator import STEPS, STRANGER, Coordinator, assert_over, at, exchanged, flipped
from tests.exchange.secure.runs import NAMES, A, B, C, D, E


def changed(step: str, **changes: Any) -> Callable[[Coordinator], Any]:
    """An honest request to silo-a with other fields; a function gets the coordinator."""

    def make(c: Coordinator) -> Any:
        found = {key: value(c) if callable(value) else value for key, value in changes.items()}
        return c.requests[step][A][0].model_copy(update=found)

    return make


def renamed(advert: Any, silo: str) -> Any:
    return advert.model_copy(update={"silo": silo})


def signatures_of(c: Coordinator) -> dict[str, str]:
    return dict(c.requests["unmask"][A][0].signatures)


def of_another_session(c: Coordinator) -> tuple[Any, ...]:
    other = Coordinator(c.site, c.plan, c.place / "elsewhere", "0f" * 16)
    if not other.place.exists():
        for step in STEPS[:3]:
            other.do(step, [B])
    else:
        other.replies["keys"][B] = [other.ask(B, other.honest("keys", B)[0])]
    return tuple(other.replies["keys"][B][0].advert if a.silo == B else a for a in c.adverts)


ZERO = "00" * 32
SIX = (*NAMES, STRANGER)


# What silo-a is asked, the step that it has come to, and what of the reason must be there.
ATTACKS: dict[str, tuple[str, Callable[[Coordinator], Any], str]] = {
    "keys: a cohort without it": ("keys", changed("keys", cohort=NAMES[1:]), "omits"),
    "keys: too small a cohort": ("keys", changed("keys", cohort=NAMES[:3]), "at least 4"),
    "keys: a silo twice": ("keys", changed("keys", cohort=(A, *NAMES)), "twice"),
    "keys: a stranger": ("keys", changed("keys", cohort=SIX), STRANGER),
    "keys: in another order": ("keys", changed("keys", cohort=NAMES[::-1]), "order"),
    "keys: a second cohort": ("shares", changed("keys", cohort=NAMES[:4]), "second, different"),
    "shares: before the keys": ("keys", changed("shares"), "before the keys"),
    "shares: a key not signed": ("shares", changed("shares", adverts=lambda c: c.advert(B, channel="11" * 32)), B),
    "shares: signed by another": ("shares", changed("shares", adverts=lambda c: c.advert(B, C, channel="11" * 32)), B),
    "shares: another session's": ("shares", changed("shares", adverts=of_another_session), B),
    "shares: one silo's keys as another's": (
        "shares",
        changed("shares", adverts=lambda c: (*c.adverts[:2], renamed(c.adverts[1], C), *c.adverts[3:])),
        C,
    ),
    "shares: its own keys changed": (
        "shares", changed("shares", adverts=lambda c: c.advert(A, A, channel="11" * 32)), "omits or alters"
    ),
    "shares: without its own keys": ("shares", changed("shares", adverts=lambda c: c.adverts[1:]), "omits or alters"),
    "shares: a silo twice": ("shares", changed("shares", adverts=lambda c: (*c.adverts, c.adverts[-1])), "twice"),
    "shares: in another order": ("shares", changed("shares", adverts=lambda c: c.adverts[::-1]), "order"),
    "shares: too few": ("shares", changed("shares", adverts=lambda c: c.adverts[:3]), "at least 4"),
    "shares: a stranger": ("shares", changed("shares", adverts=lambda c: c.advert(E, E, silo=STRANGER)), STRANGER),
    "shares: an all-zero mask key": (
        "shares",
        changed("shares", adverts=lambda c: c.advert(D, D, masks={"statistics": ZERO, "metrics": "22" * 32})),
        "all-zero",
    ),
    "shares: an all-zero mask key for the metrics": (
        "shares",
        changed("shares", adverts=lambda c: c.advert(D, D, masks={"statistics": "22" * 32, "metrics": ZERO})),
        "all-zero",
    ),
    "shares: an all-zero channel key": (
        "shares", changed("shares", adverts=lambda c: c.advert(D, D, channel=ZERO)), "all-zero"
    ),
    "shares: one key of two silos": (
        "shares", changed("shares", adverts=lambda c: c.advert(D, D, channel=c.adverts[2].channel)), "one key twice"
    ),
    "shares: a second list": ("masked", changed("shares", adverts=lambda c: c.adverts[:4]), "second, different"),
    "masked: before the shares": ("shares", changed("masked"), "before the list"),
    "masked: shares swapped": (
        "masked", changed("masked", sealed=lambda c: exchanged(c.sealed(A), B, C)), "cannot be decrypted"
    ),
    "masked: shares for another": ("masked", changed("masked", sealed=lambda c: {**c.sealed(A), B: c.sealed(C)[B]}), B),
    "masked: shares changed": (
        "masked", changed("masked", sealed=lambda c: {**c.sealed(A), E: flipped(c.sealed(A)[E])}), "cannot be decrypted"
    ),
    "masked: too few shares": (
        "masked", changed("masked", sealed=lambda c: {s: c.sealed(A)[s] for s in (B, C)}), "at least 4"
    ),
    "masked: shares of a stranger": (
        "masked", changed("masked", sealed=lambda c: {**c.sealed(A), STRANGER: c.sealed(A)[B]}), STRANGER
    ),
    "masked: shares of its own": ("masked", changed("masked", sealed=lambda c: {**c.sealed(A), A: c.sealed(A)[B]}), A),
    "masked: for other members": (
        "survivors", changed("masked", sealed=lambda c: {s: c.sealed(A)[s] for s in (B, C, D)}), "different"
    ),
    "masked: in other pieces": ("survivors", changed("masked", piece_bytes=16), "different"),
    "masked: the metrics first": ("masked", changed("masked-metrics"), "metrics"),
    "upload: in the clear": (
        "masked", lambda c: UploadRequest(**c.about, piece=0, piece_bytes=2**20), "masked"
    ),
    "survivors: before the upload": ("masked", changed("survivors"), "before its members"),
    "survivors: without it": ("survivors", changed("survivors", survivors=NAMES[1:]), "omits"),
    "survivors: one twice": ("survivors", changed("survivors", survivors=(*NAMES, E)), "twice"),
    "survivors: a stranger": ("survivors", changed("survivors", survivors=(*NAMES[:4], STRANGER)), STRANGER),
    "survivors: in another order": ("survivors", changed("survivors", survivors=(B, A, C, D, E)), "order"),
    "survivors: too few": ("survivors", changed("survivors", survivors=NAMES[:3]), "at least 4"),
    "survivors: a second list": ("unmask", changed("survivors", survivors=NAMES[:4]), "different"),
    "unmask: before signing": ("survivors", changed("unmask"), "before its survivors"),
    "unmask: too few signatures": (
        "unmask", changed("unmask", signatures=lambda c: {s: signatures_of(c)[s] for s in (A, B, C)}), "threshold is 4"
    ),
    "unmask: a forged signature": (
        "unmask", changed("unmask", signatures=lambda c: {**signatures_of(c), E: "ab" * 64}), E
    ),
    "unmask: signatures swapped": (
        "unmask", changed("unmask", signatures=lambda c: exchanged(signatures_of(c), B, C)), "not signed"
    ),
    "unmask: a stranger's signature": (
        "unmask", changed("unmask", signatures=lambda c: {**signatures_of(c), STRANGER: signatures_of(c)[B]}), STRANGER
    ),
    "unmask: those of the metrics": (
        "unmask", changed("unmask", signatures=lambda c: c.requests["unmask-metrics"][A][0].signatures), "not signed"
    ),
    "unmask: a second time, otherwise": (
        "evaluate", changed("unmask", signatures=lambda c: {s: signatures_of(c)[s] for s in NAMES[:4]}), "different"
    ),
    "evaluate: two models under one name": (
        "masked-metrics", changed("evaluate", arrays=lambda c: c.models["regmean"]), "two different models"
    ),
    "evaluate: a model that the plan does not name": (
        "survivors-metrics", changed("evaluate", candidate="other"), "candidate 'other'"
    ),
    "metrics: of other models": ("masked-metrics", changed("masked-metrics", candidates=("simple",)), "other models"),
    "metrics: in another order": (
        "masked-metrics", changed("masked-metrics", candidates=("regmean", "simple")), "other models"
    ),
    "metrics: a second list": ("survivors-metrics", changed("masked-metrics", candidates=("regmean",)), "different"),
    "metrics: survivors without it": (
        "survivors-metrics", changed("survivors-metrics", survivors=NAMES[1:]), "omits"
    ),
    "metrics: too few survivors": (
        "survivors-metrics", changed("survivors-metrics", survivors=NAMES[:3]), "at least 4"
    ),
    "metrics: the statistics again": ("unmask-metrics", changed("unmask", signatures={}), "different"),
    "metrics: signatures of the statistics": (
        "unmask-metrics", changed("unmask-metrics", signatures=signatures_of), "not signed"
    ),
}  # fmt: skip


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_lie_ends_the_session_and_nothing_more_leaves(script: Coordinator, place: Path, attack: str) -> None:
    step, request_of, reason = ATTACKS[attack]
    at(script, step, place, A)
    reply = script.ask(A, request_of(script), place)
    assert isinstance(reply, Refusal)
    assert (reply.error, reply.exit_code) == ("SecurityError", 17)
    assert reason in reply.reason
    assert not [secret for secret in script.secrets if secret in reply.reason]
    assert_over(script, place, A)


@pytest.mark.parametrize("step", STEPS[1:])
def test_phases_out_of_order_get_nothing(script: Coordinator, place: Path, step: str) -> None:
    """Whatever comes before its time is refused, and what is no lie by itself leaves the session as it is."""
    at(script, step, place, A)
    later = STEPS[STEPS.index(step) + 1 :]
    wrong = [s for s in later if not (s == "evaluate" or (step, s) == ("unmask", "masked-metrics"))]
    for name in wrong:
        shutil.rmtree(place / "state")
        at(script, step, place, A)
        reply = script.ask(A, script.requests[name][A][0], place)
        assert isinstance(reply, Refusal), name
        if reply.error == "SecurityError":
            assert_over(script, place, A)
        else:
            assert (reply.error, reply.reason) == ("FederationError", "not trained")
            assert not isinstance(script.ask(A, script.requests[step][A][0], place), Refusal)
