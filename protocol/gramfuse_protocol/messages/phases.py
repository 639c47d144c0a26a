"""One frozen model per phase and direction.

Every message carries the protocol version, the plan's digest, the round and its session's nonce. Arrays travel
beside the header (`gramfuse_protocol.messages.wire`), never inside it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from numpy.typing import NDArray
from pydantic import ConfigDict, Field

from gramfuse_protocol.bounds import (
    FEATURES,
    HEADER_CHARACTERS,
    LAYOUT_CHARACTERS,
    PLAN_CHARACTERS,
    SILOS,
    TENSORS,
    VALUES,
    Many,
    Title,
)
from gramfuse_protocol.contract.layout import PIECE_BYTES
from gramfuse_protocol.contract.plan_sections import LARGEST, Name, Sha256
from gramfuse_protocol.errors import FailureError, FederationError, GramfuseError, RefusalError
from gramfuse_protocol.secure_sum.member import SEALED_BYTES
from gramfuse_protocol.secure_sum.shares import SHARE_BYTES
from gramfuse_protocol.secure_sum.statements import Advert, Hex64, Nonce, Sum
from gramfuse_protocol.text import SAID, Legible, one_line

Count = Annotated[int, Field(ge=0, le=LARGEST)]
Examples = Annotated[int, Field(ge=1, le=LARGEST)]
Tokens = Annotated[Mapping[Title, Count], Field(max_length=TENSORS)]
Piece = Annotated[int, Field(ge=0, le=2**40)]
Names = Annotated[Many[Name], Field(max_length=SILOS)]

MERGED = "regmean"
"""What an evaluate request calls the merged model."""

Candidate = Annotated[str, Field(min_length=1, max_length=64)]
"""What a measured model is called."""

DELTAS = {r"delta:.+": "float32"}
"""The arrays of a whole model."""

STATISTICS = DELTAS | {r"gram:.+": "float32"}
"""The arrays of a contribution in the clear."""

Round = Annotated[int, Field(ge=1, le=LARGEST)]
Sealed = Annotated[str, Field(pattern=rf"^[0-9a-f]{{{2 * SEALED_BYTES}}}$")]
Share = Annotated[str, Field(pattern=rf"^[0-9a-f]{{{2 * SHARE_BYTES}}}$")]


class Body(Legible):
    """What everything on the wire has.

    Args:
        arrays: named arrays; their shapes are the subclass's to state.

    Attributes:
        carries: which arrays such a message may have: a pattern of their whole names, and their dtype. None by default.
        characters: most that its header may have.
        items: most items of the header's lists and objects together (`gramfuse_protocol.bounds.check_size`).
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, arbitrary_types_allowed=True)

    phase: ClassVar[str]
    carries: ClassVar[Mapping[str, str]] = {}
    characters: ClassVar[int] = HEADER_CHARACTERS
    items: ClassVar[int] = VALUES
    protocol: Literal[1] = 1
    arrays: Mapping[str, NDArray[Any]] = Field(default_factory=dict, exclude=True, repr=False)

    @classmethod
    def may_carry(cls, name: str, dtype: str) -> bool:
        """Whether such a message may have an array of this name and dtype."""
        return any(re.fullmatch(pattern, name) and dtype == wanted for pattern, wanted in cls.carries.items())


class StatisticsBody(Body):
    """A whole contribution outside of a planned run: `arrays` holds every block of the layout, float32."""

    phase = "statistics"
    carries = STATISTICS
    characters = 2 * LAYOUT_CHARACTERS
    items = FEATURES
    layout: Annotated[str, Field(max_length=LAYOUT_CHARACTERS)]
    examples: Examples
    tokens: Tokens


class Message(Body):
    """What all messages of a planned run have.

    Args:
        plan: digest of the plan.
        session: 16 random bytes in hexadecimal, drawn by the coordinator, once for each round of a run.
        round: which of the plan's exchanges this is, from 1 on.
    """

    plan: Sha256
    session: Nonce
    round: Round = 1

    @property
    def about(self) -> dict[str, Any]:
        """Plan, session and round: what a reply has in common with its request."""
        return {"plan": self.plan, "session": self.session, "round": self.round}


class JoinRequest(Message):
    """The plan as TOML text and the layout as JSON text, for the silo to check against its own file and base."""

    phase = "join"
    documents = frozenset({"plan_text"})
    characters = 2 * (LAYOUT_CHARACTERS + PLAN_CHARACTERS)
    items = FEATURES
    plan_text: Annotated[str, Field(max_length=PLAN_CHARACTERS)]
    layout: Annotated[str, Field(max_length=LAYOUT_CHARACTERS)]


class JoinReply(Message):
    """The silo takes part."""

    phase = "join"
    silo: Name


class TrainRequest(Message):
    """Fine-tune and collect statistics; nothing else leaves.

    In a round after the first, `arrays` holds the model to go on from: `delta:<parameter>` blocks, float32, its
    differences from the base.
    """

    phase = "train"
    carries = DELTAS


class TrainReply(Message):
    """Statistics are ready on the silo's disk. Under secure aggregation nothing more is said."""

    phase = "train"
    silo: Name
    examples: Examples | None = None
    tokens: Tokens = Field(default={})


class KeysRequest(Message):
    """Make keys for this session. The cohort is in roster order."""

    phase = "keys"
    cohort: Names


class KeysReply(Message):
    """The silo's public keys, signed."""

    phase = "keys"
    silo: Name
    advert: Advert


class SharesRequest(Message):
    """Share your secrets among the silos whose keys these are, in roster order."""

    phase = "shares"
    adverts: Annotated[Many[Advert], Field(max_length=SILOS)]


class SharesReply(Message):
    """Sealed shares for each peer, hexadecimal."""

    phase = "shares"
    silo: Name
    sealed: Annotated[Mapping[Name, Sealed], Field(max_length=SILOS)]


class MaskedRequest(Message):
    """Send one piece of the masked contribution to a sum.

    Args:
        sealed: the shares that peers sealed for this silo, the same with every piece; only for the statistics.
        candidates: the measured models whose metrics are summed, in order; only for the metrics.
    """

    phase = "masked"
    sum_of: Sum
    sealed: Annotated[Mapping[Name, Sealed], Field(max_length=SILOS)] = {}
    candidates: Annotated[Many[Candidate], Field(max_length=2 * SILOS)] = ()
    piece: Piece
    piece_bytes: Annotated[int, Field(ge=16, le=PIECE_BYTES, multiple_of=16)]


class MaskedReply(Message):
    """One piece: `arrays` holds `masked`, uint64, the words from piece · piece_bytes / 8 on."""

    phase = "masked"
    carries: ClassVar[Mapping[str, str]] = {"masked": "uint64"}
    silo: Name
    sum_of: Sum
    piece: Piece


class SurvivorsRequest(Message):
    """Sign whose contributions are in a sum; in roster order."""

    phase = "survivors"
    sum_of: Sum
    survivors: Names


class SurvivorsReply(Message):
    """The silo's signature (`gramfuse_protocol.secure_sum.statements.survivors_statement`), hexadecimal."""

    phase = "survivors"
    silo: Name
    sum_of: Sum
    signature: Hex64


class UnmaskRequest(Message):
    """Release one share for each member of a sum; here are the survivors' signatures, hexadecimal."""

    phase = "unmask"
    sum_of: Sum
    signatures: Annotated[Mapping[Name, Hex64], Field(max_length=SILOS)]


class UnmaskReply(Message):
    """Shares by the silo that they belong to, hexadecimal."""

    phase = "unmask"
    silo: Name
    sum_of: Sum
    shares: Annotated[Mapping[Name, Share], Field(max_length=SILOS)]


class UploadRequest(Message):
    """Send one piece of the contribution, in the clear."""

    phase = "upload"
    piece: Piece
    piece_bytes: Annotated[int, Field(ge=4, le=PIECE_BYTES)]


class UploadReply(Message):
    """One piece: `arrays` holds the slices of `Layout.pieces(piece_bytes)[piece]`, float32."""

    phase = "upload"
    carries = STATISTICS
    silo: Name
    piece: Piece


class EvaluateRequest(Message):
    """Measure a model on held-out data: `arrays` holds `delta:<parameter>` blocks, float32."""

    phase = "evaluate"
    carries = DELTAS
    candidate: Candidate


class EvaluateReply(Message):
    """`arrays` holds `sums`, float64 (`gramfuse_protocol.held_out.metrics`); nothing if they leave through a secure
    sum."""

    phase = "evaluate"
    carries: ClassVar[Mapping[str, str]] = {"sums": "float64"}
    silo: Name
    candidate: Candidate


class FinishRequest(Message):
    """The run is over: wipe what the session still keeps. Comes to all silos that joined, also to those lost since."""

    phase = "finish"


class FinishReply(Message):
    """Nothing is kept of the session but that it is over."""

    phase = "finish"
    silo: Name


class Refusal(Message):
    """The silo declines: a type and a reason, never data."""

    phase = "refusal"
    silo: Name
    error: Annotated[str, Field(pattern=r"^[A-Za-z]{1,64}$")]
    exit_code: Annotated[int, Field(ge=1, le=255)]
    reason: Annotated[str, Field(max_length=2000)]


REQUESTS: Mapping[str, type[Message]] = {
    cls.phase: cls
    for cls in (
        JoinRequest,
        TrainRequest,
        KeysRequest,
        SharesRequest,
        MaskedRequest,
        SurvivorsRequest,
        UnmaskRequest,
        UploadRequest,
        EvaluateRequest,
        FinishRequest,
    )
}
REPLIES: Mapping[str, type[Message]] = {
    cls.phase: cls
    for cls in (
        JoinReply,
        TrainReply,
        KeysReply,
        SharesReply,
        MaskedReply,
        SurvivorsReply,
        UnmaskReply,
        UploadReply,
        EvaluateReply,
        FinishReply,
        Refusal,
    )
}


def message_type(phase: str) -> str:
    """Return the type of message that carries a phase's requests in Flower: two of its own, or a named query."""
    return phase if phase in ("train", "evaluate") else f"query.{phase}"


PHASES: Mapping[str, str] = {message_type(phase): phase for phase in REQUESTS}
"""Phases by type of message: all that a silo answers to."""


def refusal(request: Message, silo: str, error: GramfuseError) -> Refusal:
    """Turn an error at a silo into the refusal that answers `request`."""
    return Refusal(
        **request.about,
        silo=silo,
        error=type(error).__name__,
        exit_code=error.exit_code,
        reason=one_line(" ".join(error.reason.split()), 2000),
    )


M = TypeVar("M", bound=Message)


def expect(kind: type[M], request: Message, reply: Message, source: str) -> M:
    """Return `reply` if it belongs to `request` and is of the expected kind.

    Args:
        source: who it came from, for errors.

    Raises:
        RefusalError: if the silo declined; the message gives its reason.
        FederationError: if plan, session, round or kind differ.
    """
    if reply.about != request.about:
        raise FederationError(f"{source} answered phase {request.phase!r} for another plan, session or round")
    if isinstance(reply, Refusal):
        reason = one_line(reply.reason, SAID)
        log = "" if reply.error == FailureError.__name__ else "; the silo's own log has the details"
        raise RefusalError(f"{source} refused in phase {request.phase!r}: {reason} ({reply.error}){log}", reason=reason)
    if not isinstance(reply, kind):
        raise FederationError(f"{source} answered phase {request.phase!r} with {reply.phase!r}")
    return reply
