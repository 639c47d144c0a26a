"""The vectors, and what replays them: gramfuse and independent.py behind one face."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gramfuse_protocol.contract.plan import Plan
from gramfuse_protocol.contract.roster import Roster
from gramfuse_protocol.errors import SecurityError
from gramfuse_protocol.messages import npy, wire
from gramfuse_protocol.messages.phases import REPLIES, REQUESTS
from gramfuse_protocol.secure_sum import masks
from gramfuse_protocol.secure_sum import member as secure_sum
from gramfuse_protocol.secure_sum import unmasking as unmask
from gramfuse_protocol.secure_sum.fixed_point import encode
from gramfuse_protocol.secure_sum.keys import Identity
from gramfuse_protocol.secure_sum.shares import combine
from gramfuse_protocol.secure_sum.statements import Advert
from tests.vectors import independent

VECTORS = Path(__file__).parent
Json = dict[str, Any]


def _read(name: str) -> Json:
    document: Json = json.loads((VECTORS / name).read_bytes())
    return document


SESSIONS: list[Json] = _read("secure_sum.json")["sessions"]
BY_NAME = {session["name"]: session for session in SESSIONS}
PARTS = _read("parts.json")
REFUSED: list[Json] = _read("refused.json")["refused"]


def words_of(data: str) -> masks.Words:
    return np.frombuffer(bytes.fromhex(data), "<u8").copy()


def hex_of(words: masks.Words) -> str:
    return words.astype("<u8").tobytes().hex()


def integers_of(data: str) -> list[int]:
    return [int.from_bytes(bytes.fromhex(data[at : at + 16]), "little") for at in range(0, len(data), 16)]


def text_of(words: Sequence[int]) -> str:
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
        vector = words_of(words)
        masks.apply(vector, applied)
        return hex_of(vector)

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
        total = np.zeros_like(words_of(next(iter(masked.values()))))
        for data in masked.values():
            total += words_of(data)
        masks.apply(total, off)
        return hex_of(total)

    @staticmethod
    def combine(shares: Mapping[str, str], threshold: int) -> str:
        return combine({int(point): bytes.fromhex(share) for point, share in shares.items()}, threshold).hex()

    @staticmethod
    def encode(values: Sequence[str], exponent: int, silos: int) -> str:
        return hex_of(encode(np.array([float(value) for value in values]), 2.0**exponent, silos, "values"))

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
        return text_of(self.one.contribute(name, integers_of(words), context))

    @staticmethod
    def unmask(session: Json, about: Json, released: Json, masked: Mapping[str, str]) -> str:
        adverts = [step["advert"] for step in session["advertise"].values()]
        vectors = {silo: integers_of(data) for silo, data in masked.items()}
        roster = Other.roster_of(session)
        terms = about["name"], about["members"], about["context"]
        return text_of(independent.unmask(roster, session["nonce"], adverts, *terms, vectors, released))

    @staticmethod
    def combine(shares: Mapping[str, str], threshold: int) -> str:
        found: bytes = independent.combine({int(point): share for point, share in shares.items()}, threshold)
        return found.hex()

    @staticmethod
    def encode(values: Sequence[str], exponent: int, silos: int) -> str:
        return text_of(independent.encode([float(value) for value in values], [exponent] * len(values), silos))

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
