"""What gramfuse and independent.py must refuse."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from gramfuse_protocol.errors import error_types
from tests.vectors import independent
from tests.vectors.replaying import BY_NAME, REFUSED, Json, Other, Ours, Replay, Replayed, Silo

STEPS = ("advertise", "share", "receive", "contribute", "sign", "release", "unmask")
"""Of a session; what is refused elsewhere needs none."""

OURS_ONLY = {"npy", "plan"}
"""What independent.py has no word for."""

LOOSE = {
    "another protocol version",
    "a sum that there is not",
    "a nonce in capitals",
    "a silo name that is none",
    "a negative piece",
    "a piece that is text",
}
"""Messages that independent.py takes, since it does not look at what the fields of a body hold."""


def ids(vector: Json) -> str:
    return f"{vector['step']}-{vector['name']}".replace(" ", "-")


@pytest.mark.parametrize("vector", REFUSED, ids=ids)
def test_gramfuse_refuses(vector: Json) -> None:
    _refuses(Ours, vector, error_types()[vector["error"]])


@pytest.mark.parametrize(
    "vector", [v for v in REFUSED if v["step"] not in OURS_ONLY and v["name"] not in LOOSE], ids=ids
)
def test_the_independent_implementation_refuses(vector: Json) -> None:
    _refuses(Other, vector, independent.Refused)


def test_what_the_independent_implementation_is_said_to_take_is_there() -> None:
    assert {vector["name"] for vector in REFUSED} >= LOOSE
    assert {vector["step"] for vector in REFUSED} >= OURS_ONLY


def _refuses(side: type[Silo], vector: Json, error: type[Exception]) -> None:
    step, given = vector["step"], vector["input"]
    call: Callable[[], Any]
    if step not in STEPS:
        call = lambda: getattr(side, step)(**given)  # noqa: E731
    elif step == "unmask":
        call = _unmasking(side, BY_NAME[vector["session"]], given)
    else:
        call = _asking(side, BY_NAME[vector["session"]], vector)
    with pytest.raises(error) as caught:
        call()
    assert type(caught.value) is error


def _unmasking(side: type[Silo], session: Json, given: Json) -> Callable[[], Any]:
    about = next(about for about in session["sums"] if about["name"] == given["sum"])
    masked = {silo: about["masked"][silo] for silo in about["survivors"]}
    released = {by: about["released"][by] if shares == by else shares for by, shares in given["released"].items()}
    return lambda: side.unmask(session, about, released, masked)


def _asking(side: type[Silo], session: Json, vector: Json) -> Callable[[], Any]:
    step, given = vector["step"], vector["input"]
    replay = Replay(side, session, vector["silo"], given.get("identity_private"))
    replay.up_to(vector["after"])
    if vector["again"]:
        replay.do(f"{step} {given['sum']}" if "sum" in given else step)
    silo, random = replay.silo, Replayed("00" * 4096)
    match step:
        case "advertise":
            return lambda: silo.advertise(session["nonce"], given["cohort"], random)
        case "share":
            adverts = [session["advertise"][a]["advert"] if isinstance(a, str) else a for a in given["adverts"]]
            return lambda: silo.share(adverts, random)
        case "receive":
            sealed = {peer: replay.sealed[peer] if data == peer else data for peer, data in given["sealed"].items()}
            return lambda: silo.receive(sealed)
        case "contribute":
            return lambda: silo.contribute(given["sum"], given["words"], given["context"])
        case "sign":
            return lambda: silo.sign(given["sum"], given["survivors"])
    return lambda: silo.release(given["sum"], given["signatures"])
