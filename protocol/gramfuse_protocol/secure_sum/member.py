"""The secure sum: what each silo does in turn, and how the coordinator takes the masks off. No disk, no network.

Every step is a function of (state, message, randomness) and gives back a new state; whatever must not be is raised as
SecurityError, and then nothing may leave the silo any more. The order at a silo is

    advertise → share → receive → contribute → sign → release        (the last three once for each sum)

Source: Bonawitz et al., "Practical Secure Aggregation for Privacy-Preserving Machine Learning", CCS 2017, figure 4 with
the consistency check of the variant for active adversaries, on the complete graph. Differences: two sums share one
exchange of keys and shares; vectors are modulo 2^64; what a sum is about enters its masks; the reconstructed secrets
are checked against what their owner committed to.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from pydantic import BaseModel, ConfigDict, Field

from gramfuse_protocol.contract.roster import Roster
from gramfuse_protocol.errors import SecurityError
from gramfuse_protocol.secure_sum.keys import (
    KEY_BYTES,
    Identity,
    Label,
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
KINDS: tuple[SecretKind, ...] = ("mask", "seed")
"""The two secrets behind a sum: the private mask key, opened for the dead, and the self-mask seed, for survivors."""

SEALED_BYTES = len(SUMS) * len(KINDS) * SHARE_BYTES + 16
"""Shares of one silo for another, and the seal's tag."""

_ONE_USE = bytes(12)  # nonce of a seal: its key is used once


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, hide_input_in_errors=True)


class Secrets(_Frozen):
    """What only this silo knows: X25519 private keys and self-mask seeds, hexadecimal. The repr is empty.

    The channel key is None once the peers' shares are open: with it, whoever recorded the sealed shares could open
    them again after they were wiped.
    """

    channel: Hex32 | None = Field(repr=False)
    mask: Mapping[Sum, Hex32] = Field(repr=False)
    seed: Mapping[Sum, Hex32] = Field(repr=False)


class Uploaded(_Frozen):
    """What this silo has masked for one sum: a digest of it, and what the sum is about (`survivors_statement`)."""

    digest: str
    context: Hex32


class Signed(_Frozen):
    """What this silo has signed of one sum."""

    survivors: tuple[str, ...]
    context: Hex32


Shares = Mapping[Sum, Mapping[SecretKind, str]]


class Member(_Frozen):
    """One silo's state in one session.

    Args:
        nonce: of the session.
        cohort: the silos that the coordinator invited.
        secrets, advert: this silo's keys.
        adverts: the keys of all silos that are in, in roster order; empty before `share`.
        own: shares of this silo's own secrets that it keeps for itself.
        held: shares of its peers' secrets, by peer.
        members: by sum, the silos whose masks are in it, this one among them.
        uploaded: by sum, what was masked.
        signed: by sum, what was signed.
    """

    nonce: Nonce
    cohort: tuple[str, ...]
    secrets: Secrets
    advert: Advert
    adverts: tuple[Advert, ...] = ()
    own: Shares = Field(default={}, repr=False)
    held: Mapping[str, Shares] = Field(default={}, repr=False)
    members: Mapping[Sum, tuple[str, ...]] = {}
    uploaded: Mapping[Sum, Uploaded] = {}
    signed: Mapping[Sum, Signed] = {}

    @property
    def name(self) -> str:
        """This silo."""
        return self.advert.silo

    def with_(self, **changes: Any) -> Member:
        """Return this state with some of it replaced."""
        return self.model_copy(update=changes)


def check_cohort(roster: Roster, names: Sequence[str], what: str, *, within: Sequence[str] | None = None) -> None:
    """Raise SecurityError unless names are distinct, known, in roster order, and enough to go on with.

    Args:
        what: what they are called in the error.
        within: the silos that they must be among; the roster by default.
    """
    known = roster.names if within is None else tuple(within)
    if len(set(names)) != len(names):
        raise SecurityError(f"{what} names a silo twice")
    unknown = [name for name in names if name not in known]
    if unknown:
        raise SecurityError(f"{what} names {unknown[0]!r}, which cannot be there")
    if list(names) != [name for name in roster.names if name in names]:
        raise SecurityError(f"{what} is not in the order of the roster")
    if len(names) < roster.floor:
        raise SecurityError(f"{what} has {len(names)} silos; the plan asks for {roster.floor} at least")


def advertise(
    roster: Roster, nonce: str, name: str, cohort: Sequence[str], identity: Identity, random: Random
) -> Member:
    """Make this silo's keys for a session: `Member.advert` is what it sends.

    Args:
        random: asked for 32 bytes five times: channel, then mask and seed of each sum.

    Raises:
        SecurityError: if the cohort is too small, leaves this silo out or is not of the roster, or if the roster has
            another key for this silo.
    """
    check_cohort(roster, cohort, "the cohort")
    if name not in cohort:
        raise SecurityError(f"the cohort leaves out silo {name!r}, which was asked for its keys")
    if roster.keys[name] != identity.public:
        raise SecurityError(f"the roster has another key for silo {name!r} than its identity file")
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
    """Raise SecurityError unless these keys are signed with the key of the roster, for this plan and session.

    No key may be of low order, written in a second way, or there twice.
    """
    keys = [advert.channel, *advert.masks.values()]
    for key in keys:
        check_exchange_key(bytes.fromhex(key), advert.silo)
    if len(set(keys)) != len(keys):
        raise SecurityError(f"the keys of silo {advert.silo!r} hold one key twice")
    statement = advert_statement(roster.plan, nonce, advert.fields)
    verify(roster.keys[advert.silo], bytes.fromhex(advert.signature), statement, f"the keys of silo {advert.silo!r}")


def check_adverts(roster: Roster, nonce: str, cohort: Sequence[str], adverts: Sequence[Advert]) -> None:
    """Raise SecurityError unless these are honestly signed keys of enough silos of the cohort, in roster order."""
    check_cohort(roster, [advert.silo for advert in adverts], "the list of keys", within=cohort)
    for advert in adverts:
        check_advert(roster, nonce, advert)
    keys = [key for advert in adverts for key in (advert.channel, *advert.masks.values())]
    if len(set(keys)) != len(keys):
        raise SecurityError("the list of keys holds one key twice")


def share(roster: Roster, member: Member, adverts: Sequence[Advert], random: Random) -> tuple[Member, dict[str, bytes]]:
    """Share this silo's secrets among all silos that are in.

    Done twice with one state, it would use a seal's key twice: keep the new state before anything sealed leaves.

    Args:
        adverts: of all silos that are in, this one's among them as it was sent.
        random: as `gramfuse_protocol.secure_sum.shares.split` asks for it; sums in order, mask before seed.

    Returns:
        The new state, and for each peer the sealed shares, SEALED_BYTES.

    Raises:
        SecurityError: if a key is forged, missing, of low order, or there are too few.
    """
    if member.adverts:
        raise SecurityError("shares were made already; a second list of keys came")
    check_adverts(roster, member.nonce, member.cohort, adverts)
    if member.advert not in adverts:
        raise SecurityError(f"the list of keys does not hold those of silo {member.name!r} as they were sent")
    points = {advert.silo: roster.index(advert.silo) for advert in adverts}
    split_up = {
        (sum_name, kind): split(
            bytes.fromhex(getattr(member.secrets, kind)[sum_name]), roster.threshold, points.values(), random
        )
        for sum_name in SUMS
        for kind in KINDS
    }
    shares = {
        silo: {s: {kind: split_up[s, kind][point].hex() for kind in KINDS} for s in SUMS}
        for silo, point in points.items()
    }
    session = session_id(roster.plan, member.nonce, adverts)
    sealed = {}
    for advert in adverts:
        if advert.silo != member.name:
            key = _channel(member, session, advert, member.name, advert.silo)
            plain = b"".join(bytes.fromhex(shares[advert.silo][s][kind]) for s in SUMS for kind in KINDS)
            about = framed(Label.CHANNEL, session, member.name, advert.silo)
            sealed[advert.silo] = ChaCha20Poly1305(key).encrypt(_ONE_USE, plain, about)
    return member.with_(adverts=tuple(adverts), own=shares[member.name]), sealed


def receive(roster: Roster, member: Member, sealed: Mapping[str, bytes]) -> Member:
    """Open the shares that peers sealed for this silo; whoever sent some, and this silo, are members of the sums.

    Raises:
        SecurityError: if they come from a stranger or too few, do not open, or hold no shares.
    """
    if not member.adverts:
        raise SecurityError("shares came before the list of keys")
    if "statistics" in member.members:
        raise SecurityError("shares came a second time")
    if member.name in sealed:
        raise SecurityError(f"shares came that silo {member.name!r} is said to have sealed for itself")
    present = {advert.silo: advert for advert in member.adverts}
    unknown = sorted(set(sealed) - set(present))
    if unknown:
        raise SecurityError(f"shares came from {unknown[0]!r}, whose keys are not in the list")
    members = tuple(name for name in roster.names if name in sealed or name == member.name)
    check_cohort(roster, members, "the list of those who shared")
    session = session_id(roster.plan, member.nonce, member.adverts)
    held = {}
    for name, data in sealed.items():
        key = _channel(member, session, present[name], name, member.name)
        try:
            plain = ChaCha20Poly1305(key).decrypt(_ONE_USE, data, framed(Label.CHANNEL, session, name, member.name))
        except InvalidTag:
            raise SecurityError(
                f"the shares of silo {name!r} for silo {member.name!r} do not open: they were changed, belong to "
                "another silo or session, or the two were told different lists of keys"
            ) from None
        parts = [plain[at : at + SHARE_BYTES] for at in range(0, len(plain), SHARE_BYTES)]
        if len(plain) != SEALED_BYTES - 16:
            raise SecurityError(f"silo {name!r} sealed {len(plain)} bytes that are no shares")
        try:
            for part in parts:
                check_share(part)
        except SecurityError as error:
            raise SecurityError(f"silo {name!r} sealed what is no share: {error}") from None
        values = iter(part.hex() for part in parts)
        held[name] = {s: {kind: next(values) for kind in KINDS} for s in SUMS}
    secrets = member.secrets.model_copy(update={"channel": None})
    return member.with_(secrets=secrets, held=held, members={"statistics": members})


def contribute(roster: Roster, member: Member, name: Sum, digest: str, context: str) -> tuple[Member, list[Mask]]:
    """Note what is masked for a sum, and return its masks: this silo's own, and one with every other member.

    Of two silos, the one that comes first in the roster adds their mask and the other subtracts it. The context is in
    every mask: those of silos that were told different things do not cancel, whatever the others sign.

    Args:
        digest: of what is masked.
        context: what the sum is about, as this silo knows it (`survivors_statement`).

    Raises:
        SecurityError: if it is not yet known who the members are, or if something else was masked for this sum before:
            two vectors under one mask show their difference.
    """
    members = _members(member, name)
    if name not in member.secrets.seed:
        raise SecurityError(f"the secrets of the sum of {name} are wiped; it was asked for again")
    uploaded = Uploaded(digest=digest, context=context)
    if member.uploaded.get(name, uploaded) != uploaded:
        raise SecurityError(f"the sum of {name} was asked for twice, with different contents")
    session = session_id(roster.plan, member.nonce, member.adverts)
    seed, private = bytes.fromhex(member.secrets.seed[name]), bytes.fromhex(member.secrets.mask[name])
    found = [self_mask(seed, session, name, context, member.name)]
    for advert in member.adverts:
        if advert.silo in members and advert.silo != member.name:
            secret = agree(private, bytes.fromhex(advert.masks[name]), advert.silo)
            found.append(pair_mask(roster, secret, session, name, context, member.name, advert.silo))
    return member.with_(uploaded={**member.uploaded, name: uploaded}), found


def sign(
    roster: Roster, member: Member, identity: Identity, name: Sum, survivors: Sequence[str]
) -> tuple[Member, bytes]:
    """Sign whose contributions are in a sum, and what it is about; afterwards no other set is signed for it.

    Raises:
        SecurityError: if this silo sent nothing or is missing, a silo is named twice or unknown, there are too few,
            or another set was signed before.
    """
    members = _members(member, name)
    if name not in member.uploaded:
        raise SecurityError(f"survivors of the sum of {name} came, and silo {member.name!r} sent nothing for it")
    check_cohort(roster, survivors, "the list of survivors", within=members)
    if member.name not in survivors:
        raise SecurityError(f"the list of survivors leaves out silo {member.name!r}, which is alive and was asked")
    context = member.uploaded[name].context
    signed = Signed(survivors=tuple(survivors), context=context)
    if member.signed.get(name, signed) != signed:
        raise SecurityError(f"a second list of survivors came for the sum of {name}")
    session = session_id(roster.plan, member.nonce, member.adverts)
    signature = identity.sign(survivors_statement(session, name, members, survivors, context))
    # What comes after the first sum is among its survivors.
    later = {s: tuple(survivors) for s in SUMS[SUMS.index(name) + 1 :]}
    state = member.with_(signed={**member.signed, name: signed}, members={**member.members, **later})
    return state, signature


def check_signature(
    roster: Roster, session: bytes, name: Sum, members: Sequence[str], signed: Signed, silo: str, signature: bytes
) -> None:
    """Raise SecurityError unless this silo signed exactly this set of survivors, in this context."""
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
    """Raise SecurityError unless at least `threshold` survivors signed exactly this set, and nobody else anything."""
    unknown = sorted(set(signatures) - set(signed.survivors))
    if unknown:
        raise SecurityError(f"a signature came from {unknown[0]!r}, which is no survivor")
    if len(signatures) < roster.threshold:
        raise SecurityError(f"{len(signatures)} silos signed the survivors; the threshold is {roster.threshold}")
    for silo, signature in signatures.items():
        check_signature(roster, session, name, members, signed, silo, signature)


def release(roster: Roster, member: Member, name: Sum, signatures: Mapping[str, bytes]) -> dict[str, bytes]:
    """Return one share for each member of a sum: of the seed of a survivor, of the mask key of one that is not.

    Raises:
        SecurityError: if this silo did not sign, or fewer than `threshold` survivors signed the same.
    """
    if name not in member.signed:
        raise SecurityError(f"shares for the sum of {name} were asked for before its survivors were signed")
    if name not in member.secrets.seed:
        raise SecurityError(f"the secrets of the sum of {name} are wiped; a second request for shares came")
    members, signed = _members(member, name), member.signed[name]
    session = session_id(roster.plan, member.nonce, member.adverts)
    check_signatures(roster, session, name, members, signed, signatures)
    everyone = {**member.held, member.name: member.own}
    return {
        silo: bytes.fromhex(everyone[silo][name]["seed" if silo in signed.survivors else "mask"]) for silo in members
    }


def forget(member: Member, name: Sum) -> Member:
    """Return the state without the secrets of a sum that is over."""

    def rest(values: Mapping[Sum, Any]) -> dict[Sum, Any]:
        return {s: value for s, value in values.items() if s != name}

    secrets = member.secrets.model_copy(update={"mask": rest(member.secrets.mask), "seed": rest(member.secrets.seed)})
    held = {peer: rest(shares) for peer, shares in member.held.items()}
    return member.with_(secrets=secrets, own=rest(member.own), held=held)


def _members(member: Member, name: Sum) -> tuple[str, ...]:
    if name not in member.members:
        raise SecurityError(f"the sum of {name} was asked for before its members are known")
    return member.members[name]


def _channel(member: Member, session: bytes, peer: Advert, sender: str, receiver: str) -> bytes:
    assert member.secrets.channel is not None  # noqa: S101 - it is there until `receive` is done
    secret = agree(bytes.fromhex(member.secrets.channel), bytes.fromhex(peer.channel), peer.silo)
    return derive(secret, Label.CHANNEL, session, sender, receiver)


def self_mask(seed: bytes, session: bytes, name: Sum, context: str, owner: str) -> Mask:
    """Return a silo's own mask, which the other silos' shares of its seed give back."""
    return Mask(derive(seed, Label.SELF, session, name, bytes.fromhex(context), owner), 1)


def pair_mask(roster: Roster, secret: bytes, session: bytes, name: Sum, context: str, own: str, peer: str) -> Mask:
    """Return the mask between two silos as `own` applies it."""
    first, second = sorted((own, peer), key=roster.index)
    key = derive(secret, Label.PAIR, session, name, bytes.fromhex(context), first, second)
    return Mask(key, 1 if own == first else -1)
