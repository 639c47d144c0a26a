"""One moment of an honest session of five silos, and what of it must not be read."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

from gramfuse_protocol.contract.roster import Roster
from gramfuse_protocol.secure_sum import member as secure_sum
from gramfuse_protocol.secure_sum import unmasking as unmask
from gramfuse_protocol.secure_sum.keys import Identity, Purpose, agree, derive, framed
from gramfuse_protocol.secure_sum.masks import Mask
from gramfuse_protocol.secure_sum.member import Member, Signed
from gramfuse_protocol.secure_sum.statements import Advert, Sum, advert_statement, session_id, survivors_statement

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
        key = derive(secret, Purpose.CHANNEL, self.session, sender, receiver)
        about = framed(Purpose.CHANNEL, self.session, sender, receiver)
        return secure_sum.ChaCha20Poly1305(key).encrypt(bytes(12), plain, about)

    def signatures_over(
        self, sum_name: Sum, members: Sequence[str], survivors: Sequence[str], context: str
    ) -> dict[str, bytes]:
        statement = survivors_statement(self.session, sum_name, members, survivors, context)
        return {name: self.identities[name].sign(statement) for name in survivors}


def secrets_of(stage: Stage) -> list[str]:
    """All that must not be read in any text: keys, seeds and shares, in hexadecimal."""
    found = []
    found += [str(member.secrets.channel) for member in stage.invited.values()]
    for member in (*stage.joined.values(), *stage.invited.values()):
        found += [*member.secrets.mask.values(), *member.secrets.seed.values()]
        for shares in (member.own_shares, *member.held.values()):
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


def changed(data: bytes, place: int = 0) -> bytes:
    return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


def unmasking(at: Stage, shares: Mapping[str, Mapping[str, bytes]]) -> list[Mask]:
    signed = Signed(survivors=at.survivors, context=CONTEXT["statistics"])
    return unmask.unmasking(at.roster, at.nonce, list(at.adverts.values()), "statistics", NAMES, signed, shares)
