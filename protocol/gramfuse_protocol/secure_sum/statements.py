"""The byte strings that the secure sum signs and hashes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import ConfigDict, Field, model_validator

from gramfuse_protocol.contract.plan_sections import Name, Sha256
from gramfuse_protocol.secure_sum.keys import Purpose, framed
from gramfuse_protocol.text import Legible

Sum = Literal["statistics", "metrics"]
SUMS: tuple[Sum, ...] = ("statistics", "metrics")
"""The two sums of a session. Each has its own masks, since opening a sum reveals its masks."""

Hex32 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Hex64 = Annotated[str, Field(pattern=r"^[0-9a-f]{128}$")]
Nonce = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]


class Advert(Legible):
    """One silo's public keys in one session.

    Args:
        silo: the silo's name in the roster.
        channel: X25519 public key for encrypting shares, hexadecimal.
        masks: X25519 public key for masks, one for each sum, hexadecimal.
        commitments: `commitment` to the self-mask seed, one for each sum.
        signature: Ed25519 signature over `advert_statement` with the silo's key in the roster, hexadecimal.
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
        """Name and keys as fields of statements."""
        keys = [self.channel]
        for name in SUMS:
            keys += [self.masks[name], self.commitments[name]]
        return (self.silo, *(bytes.fromhex(key) for key in keys))


def commitment(seed: bytes) -> str:
    """Return the commitment to a self-mask seed, hexadecimal."""
    return hashlib.sha256(framed(Purpose.COMMITMENT, seed)).hexdigest()


def advert_statement(plan: str, nonce: str, fields: Sequence[bytes | str]) -> bytes:
    """Return the statement by which a silo signs its keys.

    Args:
        plan: `round_digest`.
        nonce: the session's nonce, hexadecimal.
        fields: `Advert.fields`.
    """
    return framed(Purpose.ADVERT, bytes.fromhex(plan), bytes.fromhex(nonce), *fields)


def session_id(plan: str, nonce: str, adverts: Sequence[Advert]) -> bytes:
    """Return the session's identifier, 32 bytes. It enters every key derivation, so different keys give other masks.

    Args:
        plan: `round_digest`.
        adverts: adverts of all silos in the session, in roster order.
    """
    fields = [field for advert in adverts for field in advert.fields]
    return hashlib.sha256(framed(Purpose.SESSION, bytes.fromhex(plan), bytes.fromhex(nonce), *fields)).digest()


def survivors_statement(
    session: bytes, name: Sum, members: Sequence[str], survivors: Sequence[str], context: str
) -> bytes:
    """Return the statement that the survivors sign.

    Args:
        session: `session_id`.
        name: which sum.
        members: the silos whose masks are in the sum, in roster order.
        survivors: the silos whose contributions are in the sum, in roster order.
        context: digest of the sum's subject, hexadecimal: the layout's digest, or `metrics_context`.
    """
    lists = [framed(Purpose.SURVIVORS, *names) for names in (members, survivors)]
    return framed(Purpose.SURVIVORS, session, name, *lists, bytes.fromhex(context))


def model_digest(arrays: Iterable[NDArray[np.float32]]) -> str:
    """Return the digest of a model that the coordinator sends, hexadecimal.

    Args:
        arrays: the model's differences from the base, float32, in the layout's order.
    """
    hasher = hashlib.sha256()
    for array in arrays:
        hasher.update(np.ascontiguousarray(array, "<f4").data)
    return hasher.hexdigest()


def round_digest(plan: str, number: int, start: str) -> str:
    """Return the digest that represents the plan in a round's statements and identifiers, hexadecimal.

    In the first round it is the plan's digest. Later rounds include the model from which silos start, so silos that
    received different models reject each other's keys. Otherwise a coordinator could send all silos but one a model
    that leaves their statistics empty, and the sum would be that one silo's statistics.

    Args:
        plan: digest of the plan, hexadecimal.
        number: the round, counted from 1.
        start: `model_digest` of the model that the round starts from; empty in the first round.
    """
    if number == 1:
        return plan
    fields = bytes.fromhex(plan), str(number), bytes.fromhex(start)
    return hashlib.sha256(framed(Purpose.ROUND, *fields)).hexdigest()


def metrics_context(candidates: Mapping[str, str]) -> str:
    """Return the context of a sum of metrics, hexadecimal.

    Args:
        candidates: `model_digest` of each measured model by name, in the order of their sums in the vector.
    """
    fields = [field for name, digest in candidates.items() for field in (name, bytes.fromhex(digest))]
    return hashlib.sha256(framed(Purpose.CONTEXT, *fields)).hexdigest()
