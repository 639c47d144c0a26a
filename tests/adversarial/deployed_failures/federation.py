"""Silos that follow the protocol; the tests beside this try on them how deployed secure aggregation was broken.

Each section of a test file is a row of a table of defects that were found by reading the sources of other systems:
Flower's SecAgg+ (1.41, 1.42), OpenFL 1.9, FedML's LightSecAgg, declearn, Fed-BioMed's LOM, NVIDIA FLARE's homomorphic
encryption.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np

from gramfuse_protocol.contract.roster import Roster
from gramfuse_protocol.secure_sum import member as secure_sum
from gramfuse_protocol.secure_sum.keys import Identity
from gramfuse_protocol.secure_sum.masks import Mask, apply
from gramfuse_protocol.secure_sum.member import Member
from gramfuse_protocol.secure_sum.statements import Sum

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


def signed_by(fed: Federation, member: Member, name: Sum, survivors: Sequence[str]) -> tuple[Member, bytes]:
    uploaded, _ = contributed(fed.roster, member, name)
    return secure_sum.sign(fed.roster, uploaded, fed.identities[member.name], name, survivors)
