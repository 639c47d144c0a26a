"""The test vectors: made by tests/vectors/make.py, replayed by gramfuse and by tests/vectors/independent.py."""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import json
import math
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from gramfuse_model.normal_equations import summands
from gramfuse_protocol.canonical import canonical_json, digest
from gramfuse_protocol.contract.layout import Layout
from gramfuse_protocol.contract.plan import Plan
from gramfuse_protocol.contract.roster import Roster, smallest_threshold
from gramfuse_protocol.errors import SecurityError, error_types
from gramfuse_protocol.messages import npy, wire
from gramfuse_protocol.messages import phases as messages_module
from gramfuse_protocol.messages.phases import REPLIES, REQUESTS
from gramfuse_protocol.secure_sum import masks
from gramfuse_protocol.secure_sum import member as secure_sum
from gramfuse_protocol.secure_sum import unmasking as unmask
from gramfuse_protocol.secure_sum.fixed_point import capacity, decode, encode
from gramfuse_protocol.secure_sum.keys import Identity, Label, derive, framed
from gramfuse_protocol.secure_sum.scales import scales
from gramfuse_protocol.secure_sum.shares import combine, split
from gramfuse_protocol.secure_sum.statements import (
    SUMS,
    Advert,
    commitment,
    metrics_context,
    model_digest,
    round_digest,
    session_id,
)
from gramfuse_protocol.statistics.contribution import Statistics

VECTORS = Path(__file__).parents[1] / "vectors"

Json = dict[str, Any]


def _load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"vectors_{name}", VECTORS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def _read(name: str) -> Json:
    document: Json = json.loads((VECTORS / name).read_bytes())
    return document


independent = _load("independent")
SESSIONS: list[Json] = _read("secure_sum.json")["sessions"]
BY_NAME = {session["name"]: session for session in SESSIONS}
PARTS = _read("parts.json")
REFUSED: list[Json] = _read("refused.json")["refused"]

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


def _words(data: str) -> masks.Words:
    return np.frombuffer(bytes.fromhex(data), "<u8").copy()


def _hex(words: masks.Words) -> str:
    return words.astype("<u8").tobytes().hex()


def _integers(data: str) -> list[int]:
    return [int.from_bytes(bytes.fromhex(data[at : at + 16]), "little") for at in range(0, len(data), 16)]


def _text(words: Sequence[int]) -> str:
    return b"".join(word.to_bytes(8, "little") for word in words).hex()


class Replayed:
    """Random bytes of a vector; whoever asks for more than were recorded has gone wrong."""

    def __init__(self, data: str) -> None:
        self.left = bytes.fromhex(data)

    def __call__(self, size: int) -> bytes:
        given, self.left = self.left[:size], self.left[size:]
        assert len(given) == size
        return given


class Ours:
    """One silo of a session in gramfuse; all that goes in and out is JSON."""

    error: Any = SecurityError

    def __init__(self, session: Json, silo: str, identity: str) -> None:
        self.roster, self.silo = self.roster_of(session), silo
        self.identity = Identity(bytes.fromhex(identity))
        self.member: Any = None

    @staticmethod
    def roster_of(session: Json) -> Roster:
        keys = {name: bytes.fromhex(silo["identity_public"]) for name, silo in session["roster"].items()}
        return Roster(session["plan"], keys, session["threshold"], session["minimum"])

    @staticmethod
    def adverts(adverts: Sequence[Json]) -> list[Advert]:
        return [Advert.model_validate_json(json.dumps(advert)) for advert in adverts]

    def advertise(self, nonce: str, cohort: Sequence[str], random: Replayed) -> Json:
        self.member = secure_sum.advertise(self.roster, nonce, self.silo, cohort, self.identity, random)
        advert: Json = self.member.advert.model_dump(mode="json")
        return advert

    def share(self, adverts: Sequence[Json], random: Replayed) -> Json:
        self.member, sealed = secure_sum.share(self.roster, self.member, self.adverts(adverts), random)
        return {peer: data.hex() for peer, data in sealed.items()}

    def receive(self, sealed: Mapping[str, str]) -> None:
        given = {peer: bytes.fromhex(data) for peer, data in sealed.items()}
        self.member = secure_sum.receive(self.roster, self.member, given)

    def contribute(self, name: Any, words: str, context: str) -> str:
        sent = hashlib.sha256(words.encode()).hexdigest()
        self.member, applied = secure_sum.contribute(self.roster, self.member, name, sent, context)
        vector = _words(words)
        masks.apply(vector, applied)
        return _hex(vector)

    def sign(self, name: Any, survivors: Sequence[str]) -> str:
        self.member, signature = secure_sum.sign(self.roster, self.member, self.identity, name, survivors)
        return signature.hex()

    def release(self, name: Any, signatures: Mapping[str, str]) -> Json:
        given = {silo: bytes.fromhex(signature) for silo, signature in signatures.items()}
        released = secure_sum.release(self.roster, self.member, name, given)
        return {owner: share.hex() for owner, share in released.items()}

    def wipe(self, name: Any) -> None:
        self.member = secure_sum.forget(self.member, name)

    @staticmethod
    def unmask(session: Json, about: Json, released: Json, masked: Mapping[str, str]) -> str:
        adverts = Ours.adverts([step["advert"] for step in session["advertise"].values()])
        shares = {by: {o: bytes.fromhex(share) for o, share in given.items()} for by, given in released.items()}
        signed = secure_sum.Signed(survivors=tuple(about["survivors"]), context=about["context"])
        roster, name, members = Ours.roster_of(session), about["name"], about["members"]
        off = unmask.unmasking(roster, session["nonce"], adverts, name, members, signed, shares)
        total = np.zeros_like(_words(next(iter(masked.values()))))
        for data in masked.values():
            total += _words(data)
        masks.apply(total, off)
        return _hex(total)

    @staticmethod
    def combine(shares: Mapping[str, str], threshold: int) -> str:
        return combine({int(point): bytes.fromhex(share) for point, share in shares.items()}, threshold).hex()

    @staticmethod
    def encode(values: Sequence[str], exponent: int, silos: int) -> str:
        return _hex(encode(np.array([float(value) for value in values]), 2.0**exponent, silos, "values"))

    @staticmethod
    def unpack(direction: str, header: str, buffers: Sequence[str]) -> Any:
        data = tuple(np.frombuffer(bytes.fromhex(buffer), np.uint8) for buffer in buffers)
        types = REQUESTS if direction.endswith("Request") else REPLIES
        return wire.unpack(wire.Frame(header, data), types)

    @staticmethod
    def npy(data: str) -> Any:
        return npy.decode(bytes.fromhex(data))

    @staticmethod
    def plan(text: str) -> Any:
        return Plan.parse(text).roster


class Other:
    """The same of independent.py."""

    error: Any = independent.Refused

    def __init__(self, session: Json, silo: str, identity: str) -> None:
        self.one = independent.Silo(self.roster_of(session), silo, identity)
        self.advertise = self.one.advertise
        self.share = self.one.share
        self.receive = self.one.receive
        self.sign = self.one.sign
        self.release = self.one.release
        self.wipe = self.one.wipe

    @staticmethod
    def roster_of(session: Json) -> Any:
        keys = {name: silo["identity_public"] for name, silo in session["roster"].items()}
        return independent.Roster(session["plan"], keys, session["threshold"], session["minimum"])

    def contribute(self, name: str, words: str, context: str) -> str:
        return _text(self.one.contribute(name, _integers(words), context))

    @staticmethod
    def unmask(session: Json, about: Json, released: Json, masked: Mapping[str, str]) -> str:
        adverts = [step["advert"] for step in session["advertise"].values()]
        vectors = {silo: _integers(data) for silo, data in masked.items()}
        roster = Other.roster_of(session)
        terms = about["name"], about["members"], about["context"]
        return _text(independent.unmask(roster, session["nonce"], adverts, *terms, vectors, released))

    @staticmethod
    def combine(shares: Mapping[str, str], threshold: int) -> str:
        found: bytes = independent.combine({int(point): share for point, share in shares.items()}, threshold)
        return found.hex()

    @staticmethod
    def encode(values: Sequence[str], exponent: int, silos: int) -> str:
        return _text(independent.encode([float(value) for value in values], [exponent] * len(values), silos))

    @staticmethod
    def unpack(direction: str, header: str, buffers: Sequence[str]) -> Any:
        end = "Request" if direction.endswith("Request") else "Reply"
        fields = {m["phase"]: set(m["body"]) for m in PARTS["wire"] if m["direction"].endswith(end)}
        return independent.unpack(header, [bytes.fromhex(buffer) for buffer in buffers], fields)


Silo = Ours | Other

both = pytest.mark.parametrize("side", [Ours, Other], ids=["ours", "independent"])
by_session = pytest.mark.parametrize("session", SESSIONS, ids=lambda session: session["name"].replace(" ", "-"))


class Replay:
    """One silo that goes through a session, every answer compared with the vector."""

    def __init__(self, side: type[Silo], session: Json, name: str, identity: str | None = None) -> None:
        self.session, self.name = session, name
        self.silo = side(session, name, identity or session["roster"][name]["identity_private"])

    @property
    def steps(self) -> list[str]:
        """What this silo does in the session, in order."""
        found = ["advertise"]
        if self.name in self.session["share"]:
            found += ["share", "receive"]
            for about in self.session["sums"]:
                if self.name in about["members"]:
                    found += [f"contribute {about['name']}"]
                if self.name in about["survivors"]:
                    found += [f"sign {about['name']}"]
                if self.name in about["released"]:
                    found += [f"release {about['name']}", f"wipe {about['name']}"]
        return found

    def up_to(self, last: str) -> None:
        """Do all steps up to and with one; none if it has no name."""
        if last:
            for step in self.steps[: self.steps.index(last) + 1]:
                self.do(step)

    def do(self, step: str) -> None:
        """Do one step as the vector has it."""
        kind, _, name = step.partition(" ")
        session, silo = self.session, self.silo
        about: Json = next((about for about in session["sums"] if about["name"] == name), {})
        match kind:
            case "advertise":
                random = Replayed(session["advertise"][self.name]["random"])
                advert = silo.advertise(session["nonce"], session["cohort"], random)
                assert advert == session["advertise"][self.name]["advert"]
                assert not random.left
            case "share":
                good = session["share"][self.name]
                random = Replayed(good["random"])
                sealed = silo.share([step["advert"] for step in session["advertise"].values()], random)
                assert sealed == {peer: sealing["sealed"] for peer, sealing in good["sealed"].items()}
                assert not random.left
            case "receive":
                silo.receive(self.sealed)
            case "contribute":
                masked = silo.contribute(name, about["words"][self.name], about["context"])
                assert masked == about["masked"][self.name]
            case "sign":
                signature = silo.sign(name, about["survivors"])
                assert signature == about["signatures"][self.name]
            case "release":
                shown = {signer: about["signatures"][signer] for signer in about["signatures_shown"]}
                assert silo.release(name, shown) == about["released"][self.name]
            case "wipe":
                silo.wipe(name)

    @property
    def sealed(self) -> dict[str, str]:
        """What peers sealed for this silo."""
        shared = self.session["share"].items()
        return {peer: step["sealed"][self.name]["sealed"] for peer, step in shared if peer != self.name}


# Whole sessions


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
    words = [_integers(about["words"][silo]) for silo in about["survivors"]]
    assert _integers(about["sum_words"]) == [sum(column) % 2**64 for column in zip(*words, strict=True)]
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
        assert _integers(mask["first_words"]) == independent.stream(bytes.fromhex(mask["key"]), 4)
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
        assert _integers(mask["first_words"]) == independent.stream(bytes.fromhex(mask["key"]), 4)
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
            assert independent.encode(values, about["exponents"], silos) == _integers(about["words"][silo])
        assert independent.decode(_integers(about["sum_words"]), about["exponents"]) == about["sum"]
        scale = 2.0 ** np.array(about["exponents"], np.float64)
        assert decode(_words(about["sum_words"]), scale).tolist() == about["sum"]


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


# Parts


@pytest.mark.parametrize("vector", PARTS["canonical"], ids=lambda vector: vector["digest"][:8])
def test_canonical_form(vector: Json) -> None:
    assert canonical_json(vector["document"]).decode() == vector["canonical"]
    assert independent.canonical(vector["document"]) == vector["canonical"]
    assert digest(vector["document"]) == vector["digest"]
    assert hashlib.sha256(vector["canonical"].encode()).hexdigest() == vector["digest"]


@pytest.mark.parametrize("vector", PARTS["framed"], ids=lambda vector: vector["label"][11:])
def test_framing(vector: Json) -> None:
    fields = [bytes.fromhex(field) for field in vector["fields"]]
    assert framed(Label(vector["label"]), *fields).hex() == vector["framed"]
    assert independent.framed(vector["label"].removeprefix("gramfuse/1 "), *fields).hex() == vector["framed"]


@pytest.mark.parametrize("vector", PARTS["commitment"], ids=lambda vector: vector["seed"][:8])
def test_commitment(vector: Json) -> None:
    seed = bytes.fromhex(vector["seed"])
    assert commitment(seed) == independent.hashed("commitment", seed).hex() == vector["commitment"]


@pytest.mark.parametrize("vector", PARTS["derive"], ids=lambda vector: vector["label"][11:])
def test_derivation(vector: Json) -> None:
    secret, fields = bytes.fromhex(vector["secret"]), [bytes.fromhex(field) for field in vector["fields"]]
    assert derive(secret, Label(vector["label"]), *fields).hex() == vector["key"]
    assert independent.derived(secret, vector["label"].removeprefix("gramfuse/1 "), *fields).hex() == vector["key"]


@pytest.mark.parametrize("vector", PARTS["thresholds"], ids=lambda vector: f"{vector['silos']}-{vector['colluding']}")
def test_thresholds(vector: Json) -> None:
    n, c, t = vector["silos"], vector["colluding"], vector["threshold"]
    assert smallest_threshold(n, c) == t
    assert 2 * t > n + c >= 2 * (t - 1)


@pytest.mark.parametrize("vector", PARTS["shares"], ids=["one", "three", "extremes"])
def test_shares(vector: Json) -> None:
    secret, points = bytes.fromhex(vector["secret"]), [int(point) for point in vector["shares"]]
    for divide in (split, independent.split):
        random = Replayed(vector["random"])
        shares = divide(secret, vector["threshold"], points, random)
        as_text = {str(x): share.hex() if isinstance(share, bytes) else share for x, share in shares.items()}
        assert as_text == vector["shares"]
        assert not random.left
    for side in (Ours, Other):
        last = dict(list(vector["shares"].items())[-vector["threshold"] :])
        assert side.combine(last, vector["threshold"]) == vector["secret"]
        assert side.combine(vector["shares"], vector["threshold"]) == vector["secret"]


@pytest.mark.parametrize("vector", PARTS["masks"], ids=lambda vector: f"{vector['key'][:4]}-{vector['start']}")
def test_masks(vector: Json) -> None:
    key, start = bytes.fromhex(vector["key"]), vector["start"]
    expected = _integers(vector["words"])
    assert independent.stream(key, len(expected), start) == expected
    words = np.zeros(len(expected), np.uint64)
    masks.apply(words, [masks.Mask(key, 1)], start)
    assert words.tolist() == expected
    masks.apply(words, [masks.Mask(key, -1)], start)
    masks.apply(words, [masks.Mask(key, -1)], start)
    assert words.tolist() == [-word % 2**64 for word in expected]


def test_a_mask_entered_later_goes_on_where_the_first_part_ended() -> None:
    whole, later = PARTS["masks"][1], PARTS["masks"][2]
    assert whole["start"] == 0
    words = np.zeros(11, np.uint64)
    masks.apply(words, [masks.Mask(bytes.fromhex(later["key"]), 1)], 0)
    assert words[6:].tolist() == _integers(later["words"])


@pytest.mark.parametrize("vector", PARTS["encode"], ids=lambda vector: vector["name"].replace(" ", "-"))
def test_encoding(vector: Json) -> None:
    values, f, silos = vector["values"], vector["exponent"], vector["silos"]
    assert _hex(encode(np.array(values), 2.0**f, silos, "values")) == vector["words"]
    assert independent.encode(values, [f] * len(values), silos) == _integers(vector["words"])
    assert capacity(silos) == independent.capacity(silos) == vector["capacity"]
    # The bound is met, not passed.
    integers = [word - 2**64 if word >> 63 else word for word in _integers(vector["words"])]
    assert max(map(abs, integers)) <= 2 ** vector["capacity"]


@pytest.mark.parametrize("vector", PARTS["decode"], ids=lambda vector: str(vector["exponent"]))
def test_decoding(vector: Json) -> None:
    words, f = _integers(vector["words"]), vector["exponent"]
    assert words == [int(integer) % 2**64 for integer in vector["integers"]]
    assert decode(_words(vector["words"]), 2.0**f).tolist() == vector["values"]
    assert independent.decode(words, [f] * len(words)) == vector["values"]


@pytest.mark.parametrize(
    "vector", PARTS["layouts"], ids=lambda vector: f"{vector['digest'][:8]}-{vector['silo']}-{vector['weighting']}"
)
def test_layout_and_scales(vector: Json) -> None:
    silos, weighting = vector["silos"], vector["weighting"]
    layout = Layout.parse(json.dumps(vector["layout"]))
    assert layout.digest == vector["digest"]
    assert [[block.name, list(block.shape)] for block in layout.sums] == vector["blocks"]
    assert sum(math.prod(shape) for _, shape in vector["blocks"]) == len(vector["exponents"]) == layout.sum_entries
    assert independent.exponents(vector["layout"], silos, weighting) == vector["exponents"]
    given = vector["contribution"]
    shapes = {block.name: block.shape for block in layout.blocks}
    blocks = {name: np.array(values, np.float32).reshape(shapes[name]) for name, values in given["blocks"].items()}
    statistics = Statistics(given["examples"], given["tokens"], blocks)
    values, words = [], []
    summed = summands(layout, statistics, alpha=float(vector["alpha"]), weighting=weighting, silo=vector["silo"])
    for (block, value), (_, scale) in zip(summed, scales(layout, silos, weighting), strict=True):
        scaled = np.broadcast_to(scale, block.shape).reshape(-1)
        values += np.asarray(value).reshape(-1).tolist()
        words.append(encode(np.asarray(value).reshape(-1), scaled, silos, block.name))
    assert values == vector["values"]
    assert _hex(np.concatenate(words)) == vector["words"]
    exact = independent.summands(vector["layout"], given, vector["alpha"], weighting, vector["silo"])
    assert exact == [Fraction(value) for value in vector["values"]]
    assert independent.encode(exact, vector["exponents"], silos) == _integers(vector["words"])


@pytest.mark.parametrize("vector", PARTS["metrics_context"], ids=["none", "two", "two the other way round"])
def test_metrics_context(vector: Json) -> None:
    candidates = dict(vector["candidates"])
    assert metrics_context(candidates) == independent.metrics_context(candidates) == vector["context"]


@pytest.mark.parametrize("vector", PARTS["rounds"], ids=["first", "second", "another start", "another round"])
def test_rounds(vector: Json) -> None:
    plan, number, start = (vector[key] for key in ("plan", "round", "start"))
    if start:
        ours = model_digest(np.array([value], np.float32) for value in start)
        assert ours == independent.model_digest(start) == vector["start_digest"]
    digest = vector["start_digest"]
    assert round_digest(plan, number, digest) == independent.round_digest(plan, number, digest) == vector["digest"]


@pytest.mark.parametrize("vector", PARTS["wire"], ids=lambda vector: vector["direction"])
def test_messages(vector: Json) -> None:
    arrays = {n: np.frombuffer(bytes.fromhex(data), t).reshape(s) for n, t, s, data in vector["arrays"]}
    kind = getattr(messages_module, vector["direction"])
    message = kind.model_validate_json(json.dumps(vector["body"])).model_copy(update={"arrays": arrays})
    frame = wire.pack(message)
    buffers = [buffer.tobytes().hex() for buffer in frame.buffers]
    assert (frame.header, buffers) == (vector["header"], vector["buffers"])
    assert [npy.encode(buffer).hex() for buffer in frame.buffers] == vector["npy"]
    for buffer, file in zip(frame.buffers, vector["npy"], strict=True):
        assert npy.decode(bytes.fromhex(file)).tobytes() == buffer.tobytes()
    read = Ours.unpack(vector["direction"], vector["header"], vector["buffers"])
    assert read.model_dump(mode="json") == vector["body"]
    assert {name: array.tobytes() for name, array in read.arrays.items()} == {
        name: array.tobytes() for name, array in arrays.items()
    }
    plain = {name: (dtype, shape, bytes.fromhex(data)) for name, dtype, shape, data in vector["arrays"]}
    header, data = independent.pack(vector["phase"], vector["body"], plain)
    assert (header, data.hex()) == (vector["header"], "".join(vector["buffers"]))
    assert Other.unpack(vector["direction"], header, vector["buffers"]) == (vector["phase"], vector["body"], plain)


# What must be refused


def _refused_ids(vector: Json) -> str:
    return f"{vector['step']}-{vector['name']}".replace(" ", "-")


@pytest.mark.parametrize("vector", REFUSED, ids=_refused_ids)
def test_gramfuse_refuses(vector: Json) -> None:
    _refuses(Ours, vector, error_types()[vector["error"]])


@pytest.mark.parametrize(
    "vector", [v for v in REFUSED if v["step"] not in OURS_ONLY and v["name"] not in LOOSE], ids=_refused_ids
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


# The files themselves


def test_the_script_makes_the_files_that_are_checked_in() -> None:
    made = _load("make").documents()
    assert {path.name for path in VECTORS.glob("*.json")} == set(made)
    for name, text in made.items():
        assert (VECTORS / name).read_bytes() == text.encode("ascii"), f"{name}: run tests/vectors/make.py"


def test_the_script_says_when_a_file_differs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make = _load("make")
    monkeypatch.setattr(make, "HERE", tmp_path)
    assert make.main(["--check"]) == 1
    assert make.main([]) == 0
    assert make.main(["--check"]) == 0
    text = (tmp_path / "parts.json").read_text(encoding="ascii")
    (tmp_path / "parts.json").write_text(text.replace("0", "1", 1), encoding="ascii")
    assert make.main(["--check"]) == 1


def test_the_files_stay_small() -> None:
    assert sum(path.stat().st_size for path in VECTORS.glob("*.json")) < 430_000


def test_the_independent_implementation_imports_nothing_of_gramfuse() -> None:
    tree = ast.parse((VECTORS / "independent.py").read_text(encoding="utf-8"))
    names = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    names += [str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    assert {name.partition(".")[0] for name in names} <= sys.stdlib_module_names | {"cryptography"}


def test_the_protocol_page_names_every_label_and_every_field() -> None:
    page = (VECTORS.parents[1] / "docs" / "protocol.md").read_text(encoding="utf-8")
    assert {label.value for label in Label} == set(re.findall(r"gramfuse/1 [a-z ]+[a-z]", page))
    rows = {row.split("|")[1].strip(): row.split("|")[2:4] for row in page.splitlines() if row.count("|") == 4}
    for phase, request in REQUESTS.items():
        for cell, kind in zip(rows[phase], (request, REPLIES[phase]), strict=True):
            fields = set(kind.model_fields) - {"protocol", "plan", "session", "round", "silo", "arrays"}
            assert set(re.findall(r"`([a-z_]+)`", cell)) - {"hex", "masked", "sums"} == fields, phase
