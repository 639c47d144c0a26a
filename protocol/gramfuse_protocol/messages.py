"""One frozen model per phase and direction.

Every message carries the protocol version, the plan's digest, the round and its session's nonce. Arrays travel
beside the header (`gramfuse_protocol.wire`), never inside it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from numpy.typing import NDArray
from pydantic import ConfigDict, Field

from gramfuse_protocol.errors import FederationError, GramfuseError, RefusalError
from gramfuse_protocol.plan import LARGEST, Name, Sha256
from gramfuse_protocol.secure_sum import SEALED_BYTES
from gramfuse_protocol.shares import SHARE_BYTES
from gramfuse_protocol.text import SAID, Legible, one_line
from gramfuse_protocol.transcript import Advert, Hex64, Nonce, Sum

Count = Annotated[int, Field(ge=0)]

MERGED = "regmean"
"""What an evaluate request calls the merged model."""

Round = Annotated[int, Field(ge=1, le=LARGEST)]
Sealed = Annotated[str, Field(pattern=rf"^[0-9a-f]{{{2 * SEALED_BYTES}}}$")]
Share = Annotated[str, Field(pattern=rf"^[0-9a-f]{{{2 * SHARE_BYTES}}}$")]


class Body(Legible):
    """What everything on the wire has.

    Args:
        arrays: named arrays; their dtypes and shapes are the subclass's to state.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, arbitrary_types_allowed=True)

    phase: ClassVar[str]
    protocol: Literal[1] = 1
    arrays: Mapping[str, NDArray[Any]] = Field(default_factory=dict, exclude=True, repr=False)


class StatisticsBody(Body):
    """A whole contribution outside of a planned run: `arrays` holds every block of the layout, float32."""

    phase = "statistics"
    layout: str
    examples: Annotated[int, Field(ge=1)]
    tokens: Mapping[str, Count]


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
    plan_text: str
    layout: str


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


class TrainReply(Message):
    """Statistics are ready on the silo's disk. Under secure aggregation nothing more is said."""

    phase = "train"
    silo: Name
    examples: Annotated[int, Field(ge=1)] | None = None
    tokens: Mapping[str, Count] = {}


class KeysRequest(Message):
    """Make keys for this session. The cohort is in roster order."""

    phase = "keys"
    cohort: tuple[Name, ...]


class KeysReply(Message):
    """The silo's public keys, signed."""

    phase = "keys"
    silo: Name
    advert: Advert


class SharesRequest(Message):
    """Share your secrets among the silos whose keys these are, in roster order."""

    phase = "shares"
    adverts: tuple[Advert, ...]


class SharesReply(Message):
    """Sealed shares for each peer, hexadecimal."""

    phase = "shares"
    silo: Name
    sealed: Mapping[Name, Sealed]


class MaskedRequest(Message):
    """Send one piece of the masked contribution to a sum.

    Args:
        sealed: the shares that peers sealed for this silo, the same with every piece; only for the statistics.
        candidates: the measured models whose metrics are summed, in order; only for the metrics.
    """

    phase = "masked"
    sum_of: Sum
    sealed: Mapping[Name, Sealed] = {}
    candidates: tuple[str, ...] = ()
    piece: Count
    piece_bytes: Annotated[int, Field(ge=16, multiple_of=16)]


class MaskedReply(Message):
    """One piece: `arrays` holds `masked`, uint64, the words from piece · piece_bytes / 8 on."""

    phase = "masked"
    silo: Name
    sum_of: Sum
    piece: Count


class SurvivorsRequest(Message):
    """Sign whose contributions are in a sum; in roster order."""

    phase = "survivors"
    sum_of: Sum
    survivors: tuple[Name, ...]


class SurvivorsReply(Message):
    """The silo's signature (`gramfuse_protocol.transcript.survivors_statement`), hexadecimal."""

    phase = "survivors"
    silo: Name
    sum_of: Sum
    signature: Hex64


class UnmaskRequest(Message):
    """Release one share for each member of a sum; here are the survivors' signatures, hexadecimal."""

    phase = "unmask"
    sum_of: Sum
    signatures: Mapping[Name, Hex64]


class UnmaskReply(Message):
    """Shares by the silo that they belong to, hexadecimal."""

    phase = "unmask"
    silo: Name
    sum_of: Sum
    shares: Mapping[Name, Share]


class UploadRequest(Message):
    """Send one piece of the contribution, in the clear."""

    phase = "upload"
    piece: Count
    piece_bytes: Annotated[int, Field(ge=1)]


class UploadReply(Message):
    """One piece: `arrays` holds the slices of `Layout.pieces(piece_bytes)[piece]`, float32."""

    phase = "upload"
    silo: Name
    piece: Count


class EvaluateRequest(Message):
    """Measure a model on held-out data: `arrays` holds `delta:<parameter>` blocks, float32."""

    phase = "evaluate"
    candidate: str


class EvaluateReply(Message):
    """`arrays` holds `sums`, float64 (`gramfuse_protocol.metrics`); nothing if they leave through a secure sum."""

    phase = "evaluate"
    silo: Name
    candidate: str


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
        raise RefusalError(
            f"{source} refused in phase {request.phase!r}: {reason} ({reply.error}); "
            "the silo's own log has the details",
            reason=reason,
        )
    if not isinstance(reply, kind):
        raise FederationError(f"{source} answered phase {request.phase!r} with {reply.phase!r}")
    return reply
