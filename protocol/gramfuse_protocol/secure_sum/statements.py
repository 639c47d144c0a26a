"""What a secure sum signs and hashes: the one place that says which bytes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import ConfigDict, Field, model_validator

from gramfuse_protocol.contract.plan_sections import Name, Sha256
from gramfuse_protocol.secure_sum.keys import Label, framed
from gramfuse_protocol.text import Legible

Sum = Literal["statistics", "metrics"]
SUMS: tuple[Sum, ...] = ("statistics", "metrics")
"""The two sums of a session. Each has masks of its own, since opening one tells what masked it."""

Hex32 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Hex64 = Annotated[str, Field(pattern=r"^[0-9a-f]{128}$")]
Nonce = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]


class Advert(Legible):
    """The public keys that one silo uses in one session.

    Args:
        silo: its name in the roster.
        channel: X25519 public key for sealing shares, hexadecimal.
        masks: X25519 public key for masks, one for each sum.
        commitments: `commitment` of the self-mask seed, one for each sum.
        signature: Ed25519 over `advert_statement`, by the key of the roster.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    silo: Name
    channel: Hex32
    masks: Mapping[Sum, Hex32]
    commitments: Mapping[Sum, Sha256]
    signature: Hex64

    @model_validator(mode="after")
    def _both_sums(self) -> Advert:
        if set(self.masks) != set(SUMS) or set(self.commitments) != set(SUMS):
            raise ValueError(f"expected a mask key and a commitment for each of {', '.join(SUMS)}")
        return self

    @property
    def fields(self) -> tuple[bytes | str, ...]:
        """Name and keys, as they enter statements."""
        keys = [self.channel]
        for name in SUMS:
            keys += [self.masks[name], self.commitments[name]]
        return (self.silo, *(bytes.fromhex(key) for key in keys))


def commitment(seed: bytes) -> str:
    """Return the commitment to a self-mask seed, hexadecimal."""
    return hashlib.sha256(framed(Label.COMMITMENT, seed)).hexdigest()


def advert_statement(plan: str, nonce: str, fields: Sequence[bytes | str]) -> bytes:
    """Return what a silo signs of its keys.

    Args:
        plan: `round_digest`.
        nonce: the session's nonce, hexadecimal.
        fields: `Advert.fields`.
    """
    return framed(Label.ADVERT, bytes.fromhex(plan), bytes.fromhex(nonce), *fields)


def session_id(plan: str, nonce: str, adverts: Sequence[Advert]) -> bytes:
    """Return the session's identifier, 32 bytes: it enters every derivation, so other keys give other masks.

    Args:
        plan: `round_digest`.
        adverts: of all silos that are in, in roster order.
    """
    fields = [field for advert in adverts for field in advert.fields]
    return hashlib.sha256(framed(Label.SESSION, bytes.fromhex(plan), bytes.fromhex(nonce), *fields)).digest()


def survivors_statement(
    session: bytes, name: Sum, members: Sequence[str], survivors: Sequence[str], context: str
) -> bytes:
    """Return what the survivors sign.

    Args:
        session: `session_id`.
        name: which sum.
        members: the silos whose masks are in it, in roster order.
        survivors: those whose contributions are in it, in roster order.
        context: what the sum is about, hexadecimal: the layout's digest, or `metrics_context`.
    """
    lists = [framed(Label.SURVIVORS, *names) for names in (members, survivors)]
    return framed(Label.SURVIVORS, session, name, *lists, bytes.fromhex(context))


def model_digest(arrays: Iterable[NDArray[np.float32]]) -> str:
    """Return the digest of a model that the coordinator sends, hexadecimal.

    Args:
        arrays: its differences from the base, float32, in the layout's order.
    """
    hasher = hashlib.sha256()
    for array in arrays:
        hasher.update(np.ascontiguousarray(array, "<f4").data)
    return hasher.hexdigest()


def round_digest(plan: str, number: int, start: str) -> str:
    """Return what stands for the plan in the statements and identifiers of a round, hexadecimal.

    In the first round it is the plan's digest. In later ones the model that silos start from is in it, so that silos
    which were given different ones take each other's keys for forged: a model can be made for all silos but one that
    leaves their statistics empty, and the sum would be that one's.

    Args:
        plan: digest of the plan, hexadecimal.
        number: of the round.
        start: `model_digest` of it; empty in the first round, which starts from the base.
    """
    if number == 1:
        return plan
    fields = bytes.fromhex(plan), str(number), bytes.fromhex(start)
    return hashlib.sha256(framed(Label.ROUND, *fields)).hexdigest()


def metrics_context(candidates: Mapping[str, str]) -> str:
    """Return what a sum of metrics is about, hexadecimal.

    Args:
        candidates: `model_digest` of each measured model by its name, in the order of their sums in the vector.
    """
    fields = [field for name, digest in candidates.items() for field in (name, bytes.fromhex(digest))]
    return hashlib.sha256(framed(Label.CONTEXT, *fields)).hexdigest()
