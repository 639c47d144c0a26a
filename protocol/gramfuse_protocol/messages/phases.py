"""The messages of a run: one frozen pydantic model for each phase and direction.

Every message has the protocol version, the plan's digest, the round and its session's nonce. Arrays are sent beside the
header (`gramfuse_protocol.messages.wire`), never inside it.
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
from gramfuse_protocol.contract.form import PIECE_BYTES
from gramfuse_protocol.contract.plan_sections import LARGEST, Name, Sha256
from gramfuse_protocol.errors import FailureError, FederationError, GramfuseError, RefusalError
from gramfuse_protocol.secure_sum.member import SEALED_BYTES
from gramfuse_protocol.secure_sum.shares import SHARE_BYTES
from gramfuse_protocol.secure_sum.statements import Advert, Hex64, Nonce, Sum
from gramfuse_protocol.text import QUOTE_LIMIT, Legible, one_line

Count = Annotated[int, Field(ge=0, le=LARGEST)]
Examples = Annotated[int, Field(ge=1, le=LARGEST)]
Tokens = Annotated[Mapping[Title, Count], Field(max_length=TENSORS)]
Piece = Annotated[int, Field(ge=0, le=2**40)]
Names = Annotated[Many[Name], Field(max_length=SILOS)]

Candidate = Annotated[str, Field(min_length=1, max_length=64)]
"""The name of a measured model."""

DELTAS = {r"delta:.+": "float32"}
"""The arrays of a whole model."""

STATISTICS = DELTAS | {r"gram:.+": "float32"}
"""The arrays of statistics."""

CONTRIBUTION = STATISTICS | {r"head:.+": "float64"}
"""The arrays of a contribution in the clear: statistics, or the sums of a head."""

Round = Annotated[int, Field(ge=1, le=LARGEST)]
Sealed = Annotated[str, Field(pattern=rf"^[0-9a-f]{{{2 * SEALED_BYTES}}}$")]
Share = Annotated[str, Field(pattern=rf"^[0-9a-f]{{{2 * SHARE_BYTES}}}$")]


class Body(Legible):
    """Base class of everything on the wire.

    Args:
        arrays: named arrays; subclasses document their shapes.

    Attributes:
        carries: the allowed arrays: maps a pattern for whole names to a dtype. By default no arrays are allowed.
        characters: maximum length of the header.
        items: maximum number of items in the header's lists and objects together
            (`gramfuse_protocol.bounds.check_size`).
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
        """Return whether such a message may have an array of this name and dtype."""
        return any(re.fullmatch(pattern, name) and dtype == allowed for pattern, allowed in cls.carries.items())


class StatisticsBody(Body):
    """A whole contribution outside a planned run: `arrays` has every block of the layout, float32."""

    phase = "statistics"
    carries = STATISTICS
    characters = 2 * LAYOUT_CHARACTERS
    items = FEATURES
    layout: Annotated[str, Field(max_length=LAYOUT_CHARACTERS)]
    examples: Examples
    tokens: Tokens


class Message(Body):
    """Base class of the messages of a planned run.

    Args:
        plan: digest of the plan.
        session: nonce, 16 random bytes in hexadecimal, which the coordinator draws for each round of a run.
        round: the number of the session in the run, counted from 1 (`gramfuse_protocol.contract.stages`).

    Attributes:
        title: a request's phase, in words.
        form: how the content of a reply can be read: "masked", "signature", …; empty if it is open, or there is none.
    """

    title: ClassVar[str] = ""
    form: ClassVar[str] = ""
    plan: Sha256
    session: Nonce
    round: Round = 1

    @property
    def about(self) -> dict[str, Any]:
        """Plan, session and round, which a reply shares with its request."""
        return {"plan": self.plan, "session": self.session, "round": self.round}


class SecureRequest(Message):
    """A request of the secure sum; a silo answers it from its session (`gramfuse_client.exchange.secure_phases`)."""


class JoinRequest(Message):
    """Join a run. The silo checks the plan (TOML text) and the layout (JSON text) against its own file and base."""

    phase = "join"
    title = "silos join"
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
    """Fine-tune, or measure for the fit of a head, and collect the results on the silo's disk.

    After the first session, `arrays` has the model to continue from: its differences from the base as
    `delta:<parameter>` blocks, float32. Tensors that equal the base's are left out.
    """

    phase = "train"
    title = "silos fine-tune and measure"
    carries = DELTAS


class TrainReply(Message):
    """Statistics are ready on the silo's disk; counts are sent only without secure aggregation."""

    phase = "train"
    silo: Name
    examples: Examples | None = None
    tokens: Tokens = Field(default={})


class KeysRequest(SecureRequest):
    """Generate keys for this session; the cohort is in roster order."""

    phase = "keys"
    title = "silos exchange keys"
    cohort: Names


class KeysReply(Message):
    """The silo's public keys, signed."""

    phase = "keys"
    form = "public keys"
    silo: Name
    advert: Advert


class SharesRequest(SecureRequest):
    """Share the silo's secrets among the silos with these keys, which are in roster order."""

    phase = "shares"
    title = "silos share their mask secrets"
    adverts: Annotated[Many[Advert], Field(max_length=SILOS)]


class SharesReply(Message):
    """Encrypted shares for each peer, hexadecimal."""

    phase = "shares"
    form = "sealed shares"
    silo: Name
    sealed: Annotated[Mapping[Name, Sealed], Field(max_length=SILOS)]


class MaskedRequest(SecureRequest):
    """Send one piece of the masked contribution to a sum.

    Args:
        sealed: the peers' encrypted shares for this silo, the same with every piece; only for the sum of statistics.
        candidates: the results that are summed, in order (`gramfuse_protocol.contract.stages.Stage.results`); only for
            the sum of metrics.
    """

    phase = "masked"
    title = "silos upload masked vectors"
    sum_of: Sum
    sealed: Annotated[Mapping[Name, Sealed], Field(max_length=SILOS)] = {}
    candidates: Annotated[Many[Candidate], Field(max_length=2 * SILOS)] = ()
    piece: Piece
    piece_bytes: Annotated[int, Field(ge=16, le=PIECE_BYTES, multiple_of=16)]


class MaskedReply(Message):
    """One piece: `arrays` has `masked`, uint64, the words from index piece · piece_bytes / 8."""

    phase = "masked"
    form = "masked"
    carries: ClassVar[Mapping[str, str]] = {"masked": "uint64"}
    silo: Name
    sum_of: Sum
    piece: Piece


class SurvivorsRequest(SecureRequest):
    """Sign the list of silos whose contributions are in a sum, in roster order."""

    phase = "survivors"
    title = "silos sign who is in the sum"
    sum_of: Sum
    survivors: Names


class SurvivorsReply(Message):
    """The silo's signature (`gramfuse_protocol.secure_sum.statements.survivors_statement`), hexadecimal."""

    phase = "survivors"
    form = "signature"
    silo: Name
    sum_of: Sum
    signature: Hex64


class UnmaskRequest(SecureRequest):
    """Release one share for each member of a sum, given the survivors' signatures, hexadecimal."""

    phase = "unmask"
    title = "unmask the sum"
    sum_of: Sum
    signatures: Annotated[Mapping[Name, Hex64], Field(max_length=SILOS)]


class UnmaskReply(Message):
    """Shares by the silo whose secret they share, hexadecimal."""

    phase = "unmask"
    form = "shares"
    silo: Name
    sum_of: Sum
    shares: Annotated[Mapping[Name, Share], Field(max_length=SILOS)]


class UploadRequest(Message):
    """Send one piece of the contribution, in the clear."""

    phase = "upload"
    title = "silos upload"
    piece: Piece
    piece_bytes: Annotated[int, Field(ge=4, le=PIECE_BYTES)]


class UploadReply(Message):
    """One piece: `arrays` has the slices of `Form.pieces(piece_bytes)[piece]`, in the form's dtype."""

    phase = "upload"
    carries = CONTRIBUTION
    silo: Name
    piece: Piece


class EvaluateRequest(Message):
    """Measure a model on held-out data.

    `arrays` has its differences from the base as `delta:<parameter>` blocks, float32. Tensors that equal the base's are
    left out.
    """

    phase = "evaluate"
    title = "measure on held-out data"
    carries = DELTAS
    candidate: Candidate


class EvaluateReply(Message):
    """The model is measured.

    `arrays` has `sums`, float64 (`gramfuse_protocol.held_out.metrics`), or is empty if results leave in a secure sum.
    With the last model of a session that chooses between two, it also has `judged`: the sums of both on validation
    examples, (2, …) in the order of the stage (`gramfuse_protocol.contract.stages.Stage.judged`).
    """

    phase = "evaluate"
    carries: ClassVar[Mapping[str, str]] = {"sums": "float64", "judged": "float64"}
    silo: Name
    candidate: Candidate


class FinishRequest(Message):
    """The run is over: wipe the session's state. Sent to all silos that joined, including those lost since."""

    phase = "finish"
    title = "silos wipe their session state"


class FinishReply(Message):
    """The session's state is wiped, except the record that the session is over."""

    phase = "finish"
    silo: Name


class Refusal(Message):
    """The silo declines, with an error type and a reason, never data."""

    phase = "refusal"
    title = "silos refuse"
    form = "reason"
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
    """Return Flower's message type for a phase's requests: `train`, `evaluate`, or `query.<phase>`."""
    return phase if phase in ("train", "evaluate") else f"query.{phase}"


PHASE_OF_TYPE: Mapping[str, str] = {message_type(phase): phase for phase in REQUESTS}
"""Phases by Flower message type; a silo answers no others."""


def refusal(request: Message, silo: str, error: GramfuseError) -> Refusal:
    """Convert a silo's error to the refusal that answers `request`."""
    return Refusal(
        **request.about,
        silo=silo,
        error=type(error).__name__,
        exit_code=error.exit_code,
        reason=one_line(" ".join(error.reason.split()), 2000),
    )


M = TypeVar("M", bound=Message)


def expect(kind: type[M], request: Message, reply: Message, source: str) -> M:
    """Return `reply` if it answers `request` and has the expected type.

    Args:
        source: the sender, for errors.

    Raises:
        RefusalError: if the silo declined; the message has its reason.
        FederationError: if plan, session, round or type differ.
    """
    if reply.about != request.about:
        raise FederationError(f"{source} answered phase {request.phase!r} for another plan, session or round")
    if isinstance(reply, Refusal):
        reason = one_line(reply.reason, QUOTE_LIMIT)
        log = "" if reply.error == FailureError.__name__ else "; the silo's own log has the details"
        raise RefusalError(f"{source} refused in phase {request.phase!r}: {reason} ({reply.error}){log}", reason=reason)
    if not isinstance(reply, kind):
        raise FederationError(f"{source} answered phase {request.phase!r} with {reply.phase!r}")
    return reply
