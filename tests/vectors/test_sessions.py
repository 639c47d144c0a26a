"""Whole sessions of the secure sum, as gramfuse and independent.py replay them."""

from __future__ import annotations

import hashlib
import json
from fractions import Fraction

import numpy as np
import pytest

from gramfuse_protocol.canonical import canonical_json
from gramfuse_protocol.contract.layout import Layout
from gramfuse_protocol.contract.plan import Plan
from gramfuse_protocol.secure_sum.fixed_point import capacity, decode
from gramfuse_protocol.secure_sum.statements import SUMS, metrics_context, session_id
from tests.vectors import independent
from tests.vectors.replaying import SESSIONS, Json, Other, Ours, Replay, Silo, both, by_session, integers_of, words_of


@both
@by_session
def test_every_silo_sends_what_the_vector_has(side: type[Silo], session: Json) -> None:
    for name in session["advertise"]:
        replay = Replay(side, session, name)
        for step in replay.steps:
            replay.do(step)


@both
@by_session
@pytest.mark.parametrize("which", [0, 1], ids=SUMS)
def test_the_coordinator_gets_the_sum(side: type[Silo], session: Json, which: int) -> None:
    about = session["sums"][which]
    masked = {silo: about["masked"][silo] for silo in about["survivors"]}
    assert side.unmask(session, about, about["released"], masked) == about["sum_words"]


@by_session
@pytest.mark.parametrize("which", [0, 1], ids=SUMS)
def test_the_sum_is_that_of_the_survivors_and_of_nobody_else(session: Json, which: int) -> None:
    about = session["sums"][which]
    words = [integers_of(about["words"][silo]) for silo in about["survivors"]]
    assert integers_of(about["sum_words"]) == [sum(column) % 2**64 for column in zip(*words, strict=True)]
    values = [about["values"][silo] for silo in about["survivors"]]
    for column, f, found in zip(zip(*values, strict=True), about["exponents"], about["sum"], strict=True):
        exact = sum(map(Fraction, column), Fraction(0))
        rounding = Fraction(len(values), 2) / Fraction(2) ** f + abs(exact) * Fraction(2) ** -52
        assert abs(Fraction(found) - exact) <= rounding


@by_session
def test_the_plan_and_the_layout_have_the_digests_of_the_vector(session: Json) -> None:
    plan = Plan.parse(session["plan_text"])
    assert plan.document() == session["plan_document"]
    assert canonical_json(plan.document()).decode() == session["plan_canonical"]
    assert independent.canonical(session["plan_document"]) == session["plan_canonical"]
    assert plan.digest == hashlib.sha256(session["plan_canonical"].encode()).hexdigest() == session["plan"]
    layout = independent.canonical(session["layout"])
    assert Layout.parse(layout).digest == hashlib.sha256(layout.encode()).hexdigest() == session["layout_digest"]
    assert plan.merge.layout == session["layout_digest"] == session["sums"][0]["context"]
    assert plan.roster == Ours.roster_of(session)


@by_session
def test_what_lies_in_between_is_as_independent_py_derives_it(session: Json) -> None:
    adverts = [step["advert"] for step in session["advertise"].values()]
    identifier = independent.session_of(session["plan"], session["nonce"], adverts)
    assert identifier.hex() == session["session"]
    assert session_id(session["plan"], session["nonce"], Ours.adverts(adverts)) == identifier
    roster, point = session["roster"], Other.roster_of(session).point
    for silo, step in session["advertise"].items():
        drawn = [step[kind][name] for name in SUMS for kind in ("mask_private", "seed")]
        assert "".join([step["channel_private"], *drawn]) == step["random"]
        statement = independent.advert_statement(session["plan"], session["nonce"], step["advert"])
        assert statement.hex() == step["statement"]
        independent.check_signature(roster[silo]["identity_public"], step["advert"]["signature"], statement)
    for sender, step in session["share"].items():
        for about, entry in step["shares"].items():
            name, _, kind = about.partition(" ")
            secret = session["advertise"][sender][{"mask": "mask_private", "seed": "seed"}[kind]][name]
            shares = {point[peer]: share for peer, share in entry["shares"].items()}
            assert independent.combine(shares, session["threshold"]).hex() == secret
            for coefficients in [entry["coefficients"]] if "coefficients" in entry else []:
                polynomial = [int.from_bytes(bytes.fromhex(c), "little") for c in (secret, *coefficients)]
                for x, share in shares.items():
                    value = sum(a * x**k for k, a in enumerate(polynomial)) % independent.PRIME
                    assert value == independent.share_value(share)
        for receiver, sealing in step["sealed"].items():
            if "key" in sealing:
                private = bytes.fromhex(session["advertise"][receiver]["channel_private"])
                public = session["advertise"][sender]["advert"]["channel"]
                secret = independent.agreed(private, public)
                info = independent.framed("channel", identifier, sender, receiver)
                key = independent.derived(secret, "channel", identifier, sender, receiver)
                plain = "".join(entry["shares"][receiver] for entry in step["shares"].values())
                found = [sealing[name] for name in ("secret", "info_and_associated_data", "key", "plain")]
                assert found == [secret.hex(), info.hex(), key.hex(), plain]
    for about in session["sums"]:
        _check_masks_and_secrets(session, about, identifier)


def _check_masks_and_secrets(session: Json, about: Json, identifier: bytes) -> None:
    name, steps, roster = about["name"], session["advertise"], Other.roster_of(session)
    context, unmasking = about["context"], []
    for silo, mask in about["self_masks"].items():
        seed = bytes.fromhex(steps[silo]["seed"][name])
        info = independent.framed("self mask", identifier, name, bytes.fromhex(context), silo)
        assert mask["info"] == info.hex()
        assert mask["key"] == independent.self_key(seed, identifier, name, context, silo).hex()
        assert integers_of(mask["first_words"]) == independent.stream(bytes.fromhex(mask["key"]), 4)
        if silo in about["survivors"]:
            unmasking.append((mask["key"], -1))
    for mask in about["pair_masks"]:
        first, second = mask["added_by"], mask["subtracted_by"]
        private = bytes.fromhex(steps[second]["mask_private"][name])
        secret = independent.agreed(private, steps[first]["advert"]["masks"][name])
        assert mask["secret"] == secret.hex()
        info = independent.framed("pair mask", identifier, name, bytes.fromhex(context), first, second)
        assert mask["info"] == info.hex()
        assert mask["key"] == independent.pair_key(roster, secret, identifier, name, context, second, first).hex()
        assert integers_of(mask["first_words"]) == independent.stream(bytes.fromhex(mask["key"]), 4)
        if (first in about["survivors"]) != (second in about["survivors"]):
            unmasking.append((mask["key"], -1 if first in about["survivors"] else 1))
    assert sorted((mask["key"], mask["sign"]) for mask in about["unmasking"]) == sorted(unmasking)
    statement = independent.survivors_statement(identifier, name, about["members"], about["survivors"], context)
    assert statement.hex() == about["statement"]
    for owner, opened in about["opened"].items():
        assert opened["kind"] == ("seed" if owner in about["survivors"] else "mask")
        assert opened["secret"] == steps[owner]["seed" if opened["kind"] == "seed" else "mask_private"][name]
        shares = {roster.point[by]: given[owner] for by, given in about["released"].items()}
        assert independent.combine(shares, session["threshold"]).hex() == opened["secret"]


@by_session
def test_values_and_words_are_as_independent_py_finds_them(session: Json) -> None:
    statistics, metrics = session["sums"]
    silos = len(session["roster"])
    terms = session["layout"], silos, statistics["weighting"]
    assert independent.exponents(*terms) == statistics["exponents"]
    for silo, values in statistics["values"].items():
        given = statistics["contributions"][silo]
        exact = independent.summands(session["layout"], given, statistics["alpha"], statistics["weighting"], silo)
        assert exact == [Fraction(value) for value in values]
    for about in (statistics, metrics):
        assert about["capacity"] == independent.capacity(silos) == capacity(silos)
        for silo, values in about["values"].items():
            assert independent.encode(values, about["exponents"], silos) == integers_of(about["words"][silo])
        assert independent.decode(integers_of(about["sum_words"]), about["exponents"]) == about["sum"]
        scale = 2.0 ** np.array(about["exponents"], np.float64)
        assert decode(words_of(about["sum_words"]), scale).tolist() == about["sum"]


@by_session
def test_the_metrics_are_about_the_requests_that_were_answered(session: Json) -> None:
    about, digests = session["sums"][1], {}
    for name, request in about["candidates"].items():
        data = request["header"].encode() + b"".join(map(bytes.fromhex, request["buffers"]))
        digests[name] = hashlib.sha256(data).hexdigest()
        assert digests[name] == request["digest"]
        assert json.loads(request["header"])["body"]["candidate"] == name
    assert metrics_context(digests) == independent.metrics_context(digests) == about["context"]


def test_the_sessions_lose_silos_at_every_step() -> None:
    four, five, seven = SESSIONS
    names = list(four["roster"])
    assert all(list(about["members"]) == about["survivors"] == names for about in four["sums"])
    assert [len(about["survivors"]) for about in five["sums"]] == [4, 4]
    assert five["sums"][0]["opened"]["rome"]["kind"] == "mask"
    assert [len(seven[step]) for step in ("roster", "cohort", "advertise", "share")] == [7, 6, 6, 5]
    assert [len(about["survivors"]) for about in seven["sums"]] == [5, 4]
    assert seven["sums"][1]["opened"]["f"]["kind"] == "mask"
