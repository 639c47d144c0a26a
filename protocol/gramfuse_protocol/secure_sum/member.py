"""The secure sum at a silo: its steps as pure functions, without disk or network.

Every step is a function of (state, message, randomness) that returns a new state. A protocol violation raises
SecurityError, and then nothing more may leave the silo. The order of steps is

    advertise → share → receive → contribute → sign → release        (the last three once for each sum)

Source: Bonawitz et al., "Practical Secure Aggregation for Privacy-Preserving Machine Learning", CCS 2017, figure 4 with
the consistency check for active adversaries, on the complete graph. Differences: two sums share one exchange of keys
and shares; vectors are modulo 2^64; a sum's context enters its masks; reconstructed secrets are checked against their
owners' commitments.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from pydantic import Field

from gramfuse_protocol.contract.roster import Roster
from gramfuse_protocol.errors import SecurityError
from gramfuse_protocol.frozen import Frozen
from gramfuse_protocol.secure_sum.keys import (
    KEY_BYTES,
    Identity,
    Purpose,
    Random,
    agree,
    check_exchange_key,
    derive,
    framed,
    public_of,
    verify,
)
from gramfuse_protocol.secure_sum.masks import Mask
from gramfuse_protocol.secure_sum.shares import SHARE_BYTES, check_share, split
from gramfuse_protocol.secure_sum.statements import (
    SUMS,
    Advert,
    Hex32,
    Nonce,
    Sum,
    advert_statement,
    commitment,
    session_id,
    survivors_statement,
)

SecretKind = Literal["mask", "seed"]
SECRET_KINDS: tuple[SecretKind, ...] = ("mask", "seed")
"""A silo's two secrets for a sum: its private mask key, revealed if it dropped out, and its self-mask seed, revealed if
it survived."""

SEALED_BYTES = len(SUMS) * len(SECRET_KINDS) * SHARE_BYTES + 16
"""Size of one silo's encrypted shares for another, with the authentication tag."""

_NONCE = bytes(12)  # constant, since each encryption key is used once


class Secrets(Frozen):
    """This silo's X25519 private keys and self-mask seeds, hexadecimal; the repr is empty.

    The channel key is None once the peers' shares are decrypted: with it, anyone who recorded the encrypted shares
    could decrypt them even after the silo wiped them.
    """

    channel: Hex32 | None = Field(repr=False)
    mask: Mapping[Sum, Hex32] = Field(repr=False)
    seed: Mapping[Sum, Hex32] = Field(repr=False)


class Uploaded(Frozen):
    """Digest and context (`survivors_statement`) of the vector that this silo masked for one sum."""

    digest: str
    context: Hex32


class Signed(Frozen):
    """The survivors and the context that this silo signed for one sum."""

    survivors: tuple[str, ...]
    context: Hex32


Shares = Mapping[Sum, Mapping[SecretKind, str]]


class Member(Frozen):
    """One silo's state in one session.

    Args:
        nonce: the session's nonce.
        cohort: the silos that the coordinator invited.
        secrets, advert: this silo's private and public keys.
        adverts: the public keys of all silos in the session, in roster order; empty before `share`.
        own_shares: this silo's own shares of its secrets.
        held: shares of its peers' secrets, by peer.
        members: by sum, the silos whose masks are in it, including this one.
        uploaded: by sum, the vector that was masked.
        signed: by sum, the statement that was signed.
    """

    nonce: Nonce
    cohort: tuple[str, ...]
    secrets: Secrets
    advert: Advert
    adverts: tuple[Advert, ...] = ()
    own_shares: Shares = Field(default={}, repr=False)
    held: Mapping[str, Shares] = Field(default={}, repr=False)
    members: Mapping[Sum, tuple[str, ...]] = {}
    uploaded: Mapping[Sum, Uploaded] = {}
    signed: Mapping[Sum, Signed] = {}

    @property
    def name(self) -> str:
        """This silo's name."""
        return self.advert.silo

    def with_(self, **changes: Any) -> Member:
        """Return a copy of this state with some fields replaced."""
        return self.model_copy(update=changes)


def check_cohort(roster: Roster, names: Sequence[str], what: str, *, within: Sequence[str] | None = None) -> None:
    """Raise SecurityError unless names are distinct, known, in roster order, and numerous enough.

    Args:
        what: name of the list, for the error.
        within: the allowed silos; by default the roster.
    """
    allowed = roster.names if within is None else tuple(within)
    if len(set(names)) != len(names):
        raise SecurityError(f"{what} names a silo twice")
    unknown = [name for name in names if name not in allowed]
    if unknown:
        raise SecurityError(f"{what} names silo {unknown[0]!r}, which is not allowed in it")
    if list(names) != [name for name in roster.names if name in names]:
        raise SecurityError(f"{what} is not in roster order")
    if len(names) < roster.floor:
        raise SecurityError(f"{what} has {len(names)} silos; the plan requires at least {roster.floor}")


def advertise(
    roster: Roster, nonce: str, name: str, cohort: Sequence[str], identity: Identity, random: Random
) -> Member:
    """Generate this silo's keys for a session; it sends `Member.advert`.

    Args:
        random: called five times for 32 bytes: channel, then mask and seed of each sum.

    Raises:
        SecurityError: if the cohort is too small, omits this silo or has silos outside the roster, or if the roster has
            a different key for this silo.
    """
    check_cohort(roster, cohort, "the cohort")
    if name not in cohort:
        raise SecurityError(f"the cohort omits silo {name!r}, which was asked for its keys")
    if roster.keys[name] != identity.public:
        raise SecurityError(f"the key of silo {name!r} in the roster is not the one in its identity file")
    channel = random(KEY_BYTES)
    mask, seed = {}, {}
    for sum_name in SUMS:
        mask[sum_name], seed[sum_name] = random(KEY_BYTES), random(KEY_BYTES)
    unsigned = Advert(
        silo=name,
        channel=public_of(channel).hex(),
        masks={sum_name: public_of(key).hex() for sum_name, key in mask.items()},
        commitments={sum_name: commitment(value) for sum_name, value in seed.items()},
        signature="0" * 128,
    )
    signature = identity.sign(advert_statement(roster.plan, nonce, unsigned.fields))
    secrets = Secrets(
        channel=channel.hex(),
        mask={s: key.hex() for s, key in mask.items()},
        seed={s: v.hex() for s, v in seed.items()},
    )
    advert = unsigned.model_copy(update={"signature": signature.hex()})
    return Member(nonce=nonce, cohort=tuple(cohort), secrets=secrets, advert=advert)


def check_advert(roster: Roster, nonce: str, advert: Advert) -> None:
    """Raise SecurityError unless the keys are signed with the roster's key, for this plan and session.

    It also refuses keys of low order, non-canonical keys and duplicates.
    """
    keys = [advert.channel, *advert.masks.values()]
    for key in keys:
        check_exchange_key(bytes.fromhex(key), advert.silo)
    if len(set(keys)) != len(keys):
        raise SecurityError(f"silo {advert.silo!r} uses one key twice")
    statement = advert_statement(roster.plan, nonce, advert.fields)
    verify(roster.keys[advert.silo], bytes.fromhex(advert.signature), statement, f"the keys of silo {advert.silo!r}")


def check_adverts(roster: Roster, nonce: str, cohort: Sequence[str], adverts: Sequence[Advert]) -> None:
    """Raise SecurityError unless these are validly signed keys of enough silos of the cohort, in roster order."""
    check_cohort(roster, [advert.silo for advert in adverts], "the list of keys", within=cohort)
    for advert in adverts:
        check_advert(roster, nonce, advert)
    keys = [key for advert in adverts for key in (advert.channel, *advert.masks.values())]
    if len(set(keys)) != len(keys):
        raise SecurityError("the list of keys has one key twice")


def share(roster: Roster, member: Member, adverts: Sequence[Advert], random: Random) -> tuple[Member, dict[str, bytes]]:
    """Share this silo's secrets among all silos in the session.

    A second call with the same state would reuse encryption keys, so store the new state before anything is sent.

    Args:
        adverts: adverts of all silos in the session, including this silo's, unchanged.
        random: passed to `gramfuse_protocol.secure_sum.shares.split` for each sum in order, mask before seed.

    Returns:
        The new state, and the encrypted shares for each peer, SEALED_BYTES long.

    Raises:
        SecurityError: if a key is forged, missing or of low order, or there are too few keys.
    """
    if member.adverts:
        raise SecurityError("a second list of keys arrived after shares were made")
    check_adverts(roster, member.nonce, member.cohort, adverts)
    if member.advert not in adverts:
        raise SecurityError(f"the list of keys omits or alters the keys of silo {member.name!r}")
    points = {advert.silo: roster.index(advert.silo) for advert in adverts}
    splits = {
        (sum_name, kind): split(
            bytes.fromhex(getattr(member.secrets, kind)[sum_name]), roster.threshold, points.values(), random
        )
        for sum_name in SUMS
        for kind in SECRET_KINDS
    }
    shares = {
        silo: {s: {kind: splits[s, kind][point].hex() for kind in SECRET_KINDS} for s in SUMS}
        for silo, point in points.items()
    }
    session = session_id(roster.plan, member.nonce, adverts)
    sealed = {}
    for advert in adverts:
        if advert.silo != member.name:
            key = _channel(member, session, advert, member.name, advert.silo)
            plain = b"".join(bytes.fromhex(shares[advert.silo][s][kind]) for s in SUMS for kind in SECRET_KINDS)
            associated = framed(Purpose.CHANNEL, session, member.name, advert.silo)
            sealed[advert.silo] = ChaCha20Poly1305(key).encrypt(_NONCE, plain, associated)
    return member.with_(adverts=tuple(adverts), own_shares=shares[member.name]), sealed


def receive(roster: Roster, member: Member, sealed: Mapping[str, bytes]) -> Member:
    """Decrypt the peers' shares for this silo; their senders and this silo become the members of the sums.

    Raises:
        SecurityError: if there are too few senders, one is unknown, or shares cannot be decrypted or are malformed.
    """
    if not member.adverts:
        raise SecurityError("shares arrived before the list of keys")
    if "statistics" in member.members:
        raise SecurityError("shares arrived a second time")
    if member.name in sealed:
        raise SecurityError(f"silo {member.name!r} received shares that claim to be from itself")
    present = {advert.silo: advert for advert in member.adverts}
    unknown = sorted(set(sealed) - set(present))
    if unknown:
        raise SecurityError(f"shares arrived from silo {unknown[0]!r}, whose keys are not in the list")
    members = tuple(name for name in roster.names if name in sealed or name == member.name)
    check_cohort(roster, members, "the list of those who shared")
    session = session_id(roster.plan, member.nonce, member.adverts)
    held = {}
    for name, data in sealed.items():
        key = _channel(member, session, present[name], name, member.name)
        try:
            plain = ChaCha20Poly1305(key).decrypt(_NONCE, data, framed(Purpose.CHANNEL, session, name, member.name))
        except InvalidTag:
            raise SecurityError(
                f"the shares of silo {name!r} for silo {member.name!r} cannot be decrypted: they were changed, belong "
                "to another silo or session, or the two silos received different lists of keys"
            ) from None
        parts = [plain[at : at + SHARE_BYTES] for at in range(0, len(plain), SHARE_BYTES)]
        if len(plain) != SEALED_BYTES - 16:
            raise SecurityError(f"silo {name!r} sent {len(plain)} bytes of shares; expected {SEALED_BYTES - 16}")
        try:
            for part in parts:
                check_share(part)
        except SecurityError as error:
            raise SecurityError(f"silo {name!r} sent a malformed share: {error}") from None
        values = iter(part.hex() for part in parts)
        held[name] = {s: {kind: next(values) for kind in SECRET_KINDS} for s in SUMS}
    secrets = member.secrets.model_copy(update={"channel": None})
    return member.with_(secrets=secrets, held=held, members={"statistics": members})


def contribute(roster: Roster, member: Member, name: Sum, digest: str, context: str) -> tuple[Member, list[Mask]]:
    """Record which vector is masked for a sum, and return its masks: this silo's own, and one for each other member.

    Of two silos, the first in the roster adds their mask and the other subtracts it. Every mask depends on the context,
    so the masks of silos that received different contexts do not cancel, whatever the others sign.

    Args:
        digest: digest of the vector.
        context: the sum's context as this silo knows it (`survivors_statement`).

    Raises:
        SecurityError: if the members are not known yet, or if a different vector was masked for this sum before: two
            vectors under one mask reveal their difference.
    """
    members = _members(member, name)
    if name not in member.secrets.seed:
        raise SecurityError(f"the sum of {name} was requested again after its secrets were wiped")
    uploaded = Uploaded(digest=digest, context=context)
    if member.uploaded.get(name, uploaded) != uploaded:
        raise SecurityError(f"the sum of {name} was requested twice, with different contents")
    session = session_id(roster.plan, member.nonce, member.adverts)
    seed, private = bytes.fromhex(member.secrets.seed[name]), bytes.fromhex(member.secrets.mask[name])
    masks = [self_mask(seed, session, name, context, member.name)]
    for advert in member.adverts:
        if advert.silo in members and advert.silo != member.name:
            secret = agree(private, bytes.fromhex(advert.masks[name]), advert.silo)
            masks.append(pair_mask(roster, secret, session, name, context, member.name, advert.silo))
    return member.with_(uploaded={**member.uploaded, name: uploaded}), masks


def sign(
    roster: Roster, member: Member, identity: Identity, name: Sum, survivors: Sequence[str]
) -> tuple[Member, bytes]:
    """Sign the survivors and the context of a sum; this silo then signs no other set for that sum.

    Raises:
        SecurityError: if this silo sent nothing or is not listed, a silo is listed twice or unknown, there are too few
            silos, or another set was signed before.
    """
    members = _members(member, name)
    if name not in member.uploaded:
        raise SecurityError(
            f"a list of survivors arrived for the sum of {name}, but silo {member.name!r} sent nothing for it"
        )
    check_cohort(roster, survivors, "the list of survivors", within=members)
    if member.name not in survivors:
        raise SecurityError(f"the list of survivors omits silo {member.name!r}, although it answered")
    context = member.uploaded[name].context
    signed = Signed(survivors=tuple(survivors), context=context)
    if member.signed.get(name, signed) != signed:
        raise SecurityError(f"a second list of survivors arrived for the sum of {name}")
    session = session_id(roster.plan, member.nonce, member.adverts)
    signature = identity.sign(survivors_statement(session, name, members, survivors, context))
    # The members of later sums are the survivors of this one.
    later = {s: tuple(survivors) for s in SUMS[SUMS.index(name) + 1 :]}
    state = member.with_(signed={**member.signed, name: signed}, members={**member.members, **later})
    return state, signature


def check_signature(
    roster: Roster, session: bytes, name: Sum, members: Sequence[str], signed: Signed, silo: str, signature: bytes
) -> None:
    """Raise SecurityError unless a silo signed exactly these survivors and this context."""
    statement = survivors_statement(session, name, members, signed.survivors, signed.context)
    verify(roster.keys[silo], signature, statement, f"the list of survivors by silo {silo!r}")


def check_signatures(
    roster: Roster,
    session: bytes,
    name: Sum,
    members: Sequence[str],
    signed: Signed,
    signatures: Mapping[str, bytes],
) -> None:
    """Raise SecurityError unless at least `threshold` survivors signed exactly this set, and no other silo signed."""
    unknown = sorted(set(signatures) - set(signed.survivors))
    if unknown:
        raise SecurityError(f"silo {unknown[0]!r} signed the survivors but is not one of them")
    if len(signatures) < roster.threshold:
        raise SecurityError(f"{len(signatures)} silos signed the survivors; the threshold is {roster.threshold}")
    for silo, signature in signatures.items():
        check_signature(roster, session, name, members, signed, silo, signature)


def release(roster: Roster, member: Member, name: Sum, signatures: Mapping[str, bytes]) -> dict[str, bytes]:
    """Return one share for each member of a sum: of a survivor's seed, or of a dropped silo's mask key.

    Raises:
        SecurityError: if this silo did not sign, or fewer than `threshold` survivors signed the same statement.
    """
    if name not in member.signed:
        raise SecurityError(f"shares for the sum of {name} were requested before its survivors were signed")
    if name not in member.secrets.seed:
        raise SecurityError(f"shares for the sum of {name} were requested again after its secrets were wiped")
    members, signed = _members(member, name), member.signed[name]
    session = session_id(roster.plan, member.nonce, member.adverts)
    check_signatures(roster, session, name, members, signed, signatures)
    everyone = {**member.held, member.name: member.own_shares}
    return {
        silo: bytes.fromhex(everyone[silo][name]["seed" if silo in signed.survivors else "mask"]) for silo in members
    }


def forget(member: Member, name: Sum) -> Member:
    """Return the state without the secrets of a finished sum."""

    def without(values: Mapping[Sum, Any]) -> dict[Sum, Any]:
        return {s: value for s, value in values.items() if s != name}

    secrets = member.secrets.model_copy(
        update={"mask": without(member.secrets.mask), "seed": without(member.secrets.seed)}
    )
    held = {peer: without(shares) for peer, shares in member.held.items()}
    return member.with_(secrets=secrets, own_shares=without(member.own_shares), held=held)


def _members(member: Member, name: Sum) -> tuple[str, ...]:
    if name not in member.members:
        raise SecurityError(f"the sum of {name} was requested before its members are known")
    return member.members[name]


def _channel(member: Member, session: bytes, peer: Advert, sender: str, receiver: str) -> bytes:
    assert member.secrets.channel is not None  # noqa: S101 - it exists until `receive` returns
    secret = agree(bytes.fromhex(member.secrets.channel), bytes.fromhex(peer.channel), peer.silo)
    return derive(secret, Purpose.CHANNEL, session, sender, receiver)


def self_mask(seed: bytes, session: bytes, name: Sum, context: str, owner: str) -> Mask:
    """Return a silo's own mask, derived from its seed."""
    return Mask(derive(seed, Purpose.SELF, session, name, bytes.fromhex(context), owner), 1)


def pair_mask(roster: Roster, secret: bytes, session: bytes, name: Sum, context: str, silo: str, peer: str) -> Mask:
    """Return the mask that two silos share, with the sign with which `silo` applies it."""
    first, second = sorted((silo, peer), key=roster.index)
    key = derive(secret, Purpose.PAIR, session, name, bytes.fromhex(context), first, second)
    return Mask(key, 1 if silo == first else -1)
