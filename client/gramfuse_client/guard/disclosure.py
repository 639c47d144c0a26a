"""Lists what a silo would send in one run under a plan: each message, its size, its form, and who could read it.

The list is derived from the protocol's own messages, in their real sizes, with blank content.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gramfuse_client.tasks.registry import at_silo
from gramfuse_protocol.canonical import canonical_json
from gramfuse_protocol.contract.form import PIECE_BYTES, Block
from gramfuse_protocol.contract.gram_structure import describe
from gramfuse_protocol.contract.head_layout import FIRST, SECOND
from gramfuse_protocol.contract.layout import Layout
from gramfuse_protocol.contract.plan import Plan
from gramfuse_protocol.contract.roster import tolerated
from gramfuse_protocol.contract.stages import FITTED, REFITTED, Stage, describe_stage
from gramfuse_protocol.contract.who_sees_what import (
    COORDINATOR,
    FACTS,
    MODEL_SAYS,
    OF_HEAD,
    STATISTICS_SAY,
    SUM_SAYS,
    SUMMED,
    holds,
    seen,
)
from gramfuse_protocol.held_out.metrics import sums_shape
from gramfuse_protocol.held_out.noise import DELTA, spent
from gramfuse_protocol.held_out.sums import groups
from gramfuse_protocol.messages.phases import (
    EvaluateReply,
    FinishReply,
    JoinReply,
    KeysReply,
    MaskedReply,
    Message,
    SharesReply,
    SurvivorsReply,
    TrainReply,
    UnmaskReply,
    UploadReply,
)
from gramfuse_protocol.secure_sum.keys import KEY_BYTES, SIGNATURE_BYTES
from gramfuse_protocol.secure_sum.member import SEALED_BYTES
from gramfuse_protocol.secure_sum.shares import SHARE_BYTES
from gramfuse_protocol.secure_sum.statements import SUMS, Advert, Sum
from gramfuse_protocol.tasks.registry import kind_of

LARGEST_COUNT = 10**12
"""More examples than any silo has; gives the size of a count that leaves in the clear."""

WORDS = {
    "every message": "also has the plan's digest, the session's nonce and this silo's name",
    "Gram matrix": "for each pair of a layer's input features, the mean of their product over the training tokens: one "
    "number for all tokens together",
    "change": "a parameter's value after fine-tuning, minus its value in the base model",
    "masked": "a random number is added to each number; they cancel when the vectors of all silos in the sum are added",
}
"""Definitions of terms in the list."""


@dataclass(frozen=True)
class SentArray:
    """One array of a message; for a masked vector, one of the arrays that it contains.

    Args:
        dtype: numpy's name of the dtype.
        what: describes its content.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    bytes: int
    what: str


@dataclass(frozen=True)
class Departure:
    """One message of a run, or several of one kind, that would leave.

    Args:
        phase: the phase's name in the ledger.
        what: describes its content.
        form: how its content can be read, as in the ledger.
        bytes: size of header and arrays, as in the ledger; None for a message of Flower itself.
        to: recipient.
        readers: who can read its content.
        parts: its arrays.
    """

    phase: str
    what: str
    form: str
    bytes: int | None
    to: str = COORDINATOR
    readers: str = COORDINATOR
    parts: tuple[SentArray, ...] = ()


@dataclass(frozen=True)
class Disclosure:
    """Everything that would leave in one run.

    Args:
        secure: whether contributions are masked.
        departures: the messages, in the protocol's order.
        claims: who can learn what, under which conditions.
        stays: what does not leave.
        words: definitions of terms.
    """

    secure: bool
    departures: tuple[Departure, ...]
    claims: tuple[str, ...]
    stays: tuple[str, ...]
    words: Mapping[str, str]

    @property
    def bytes(self) -> int:
        """Total bytes of all messages."""
        return sum(departure.bytes or 0 for departure in self.departures)


def form_of(reply: Message) -> str:
    """Return how a reply's content can be read, in a word or two; the ledger uses it too."""
    counts = isinstance(reply, TrainReply) and (reply.examples is not None or reply.tokens)
    return reply.form or ("open" if reply.arrays or counts else "no data")


def disclose(silo: str, plan: Plan, layout: Layout) -> Disclosure:
    """Return everything that a silo would send in one run without failures.

    Args:
        silo: the silo's name.
        layout: the plan's layout.
    """
    secure = plan.privacy.secure_aggregation
    about: dict[str, Any] = {"plan": plan.digest, "session": "0" * 32, "silo": silo}
    departures = (
        Departure(
            "connection",
            "that this silo is online, and its address; signatures of the time, by its node key",
            "signature",
            None,
            "the coordinator's SuperLink, as long as the silo runs",
            f"{COORDINATOR}; the network sees addresses, times and sizes",
        ),
        *(departure for stage in _different(plan) for departure in _session(about, plan, layout, stage)),
        _departure(FACTS["end"].what, FinishReply(**about)),
        Departure(
            "any",
            "instead of any of these: that it refuses, with a reason, before it touches its data; or that it failed",
            "reason",
            None,
        ),
    )
    words = {term: meaning for term, meaning in WORDS.items() if secure or term != "masked"}
    return Disclosure(secure, departures, _claims(plan), _stays(plan, layout), words)


def _different(plan: Plan) -> list[Stage]:
    """Return the stages of a run, with one for all rounds of training."""
    return [stage for stage in plan.stages if stage.work != "train" or stage.round == 1]


def _session(about: Mapping[str, Any], plan: Plan, layout: Layout, stage: Stage) -> Iterator[Departure]:
    """Yield the departures of one stage; for training, with the total size of all rounds, and the parts of one."""
    run = _masked_run if plan.privacy.secure_aggregation else _open_run
    rounds = plan.merge.rounds if stage.work == "train" else 1
    where = f"; in each of {rounds} rounds" if rounds > 1 else ""
    if stage.work != "train":
        where = f"; in {describe_stage(stage)}"
    for departure in (_departure("that it takes part", JoinReply(**about)), *run(about, plan, layout, stage)):
        yield replace(departure, what=departure.what + where, bytes=rounds * (departure.bytes or 0))


def _masked_run(about: Mapping[str, Any], plan: Plan, layout: Layout, stage: Stage) -> Iterator[Departure]:
    others = [name for name in plan.names if name != about["silo"]]
    key, signature = "00" * KEY_BYTES, "00" * SIGNATURE_BYTES
    keys = dict.fromkeys(SUMS, key)
    advert = Advert(silo=about["silo"], channel=key, masks=keys, commitments=keys, signature=signature)
    done = "measuring features" if stage.fits_head else "fine-tuning"
    yield _departure(f"that {done} is done; no numbers", TrainReply(**about))
    yield _departure(
        "its public keys for this session: one for shares, two for masks, and two commitments to secrets, signed",
        KeysReply(**about, advert=advert),
        to=f"{COORDINATOR}, and through it all other silos",
        readers="all of them; the keys are public",
    )
    yield _departure(
        f"for each of the {len(others)} other silos, its shares of this silo's secrets, sealed for it",
        SharesReply(**about, sealed=dict.fromkeys(others, "00" * SEALED_BYTES)),
        to=f"{COORDINATOR}, which passes each to its recipient",
        readers=f"its recipient; {plan.threshold} of {len(plan.names)} shares recover a secret",
    )
    parts = _parts(stage.form(layout).sums, "uint64", layout, plan)
    yield from _masked_sum("statistics", "its contribution", about, plan, parts)
    if plan.privacy.metrics != "sum" or not stage.measured:
        yield from _results(about, plan, stage)
    else:
        yield _departure(
            f"that it measured {_models(stage.measured)}{_also_judged(stage)}; no numbers",
            *(EvaluateReply(**about, candidate=name) for name in stage.measured),
        )
        noise = ", noise and masks" if plan.epsilon is not None else ", masks"
        yield from _masked_sum(
            "metrics", "its held-out results", about, plan, _vector_parts(plan, about["silo"], stage), noise
        )


def _masked_sum(
    name: Sum, what: str, about: Mapping[str, Any], plan: Plan, parts: tuple[SentArray, ...], added: str = ", masks"
) -> Iterator[Departure]:
    """Yield the departures of one of the two sums: the vector, a signature, and shares to unmask the sum.

    Args:
        added: what is added to each word.
    """
    words, silos, signature = sum(part.bytes for part in parts) // 8, len(plan.names), "00" * SIGNATURE_BYTES
    pieces = [min(PIECE_BYTES // 8, words - start) for start in range(0, words, PIECE_BYTES // 8)]
    in_pieces = f", in {len(pieces)} pieces" if len(pieces) > 1 else ""
    yield _departure(
        f"{what}, as one vector of {words:,} words of 64 bits{in_pieces}{added} added to each",
        *(
            MaskedReply(**about, sum_of=name, piece=piece, arrays={"masked": _blank("uint64", (count,))})
            for piece, count in enumerate(pieces)
        ),
        readers=SUMMED.format(least=f"{plan.minimum_survivors} of the {silos}"),
        parts=parts,
    )
    yield _departure(
        FACTS["signature"].what,
        SurvivorsReply(**about, sum_of=name, signature=signature),
        to=f"{COORDINATOR}, and through it all silos in the sum",
        readers="all of them; the signature is public",
    )
    yield _departure(
        FACTS["opening"].what,
        UnmaskReply(**about, sum_of=name, shares=dict.fromkeys(plan.names, "00" * SHARE_BYTES)),
        readers=f"{COORDINATOR}; {plan.threshold} of {silos} shares unmask the sum",
    )


def _open_run(about: Mapping[str, Any], plan: Plan, layout: Layout, stage: Stage) -> Iterator[Departure]:
    form = stage.form(layout)
    tokens = dict.fromkeys(form.gram_names, plan.merge.tokens)
    yield _departure(
        "the number of training examples" + (", and of tokens behind each Gram matrix" if tokens else ""),
        TrainReply(**about, examples=LARGEST_COUNT, tokens=tokens),
    )
    replies = []
    for piece, slices in enumerate(form.pieces()):
        shapes = {
            part.name: part.block.shape if part.name == part.block.name else (part.stop - part.start,)
            for part in slices
        }
        arrays = {name: _blank(form.dtype, shape) for name, shape in shapes.items()}
        replies.append(UploadReply(**about, piece=piece, arrays=arrays))
    content = (
        f"sums {OF_HEAD}"
        if stage.fits_head
        else "its Gram matrices, and the differences of its parameters from the base model's"
    )
    yield _departure(
        f"its contribution, unmasked, in {len(form.blocks)} arrays: {content}",
        *replies,
        readers=COORDINATOR
        if stage.fits_head
        else f"{COORDINATOR}: base model plus differences give this silo's own model",
        parts=_parts(form.blocks, form.dtype, layout, plan),
    )
    yield from _results(about, plan, stage)


def _results(about: Mapping[str, Any], plan: Plan, stage: Stage) -> Iterator[Departure]:
    """Yield the departures of held-out results in the clear, if there are any."""
    if not stage.measured:
        if plan.model.head == "own" or not stage.last:
            got = "the merged body" if plan.model.head == "own" else "the model to continue from"
            yield _departure(f"that it has {got}; no numbers", EvaluateReply(**about, candidate=stage.merged))
        return
    task = plan.task_of(about["silo"])
    sums, count = _blank("float64", sums_shape(task)), len(stage.judged)
    judged = {"judged": _blank("float64", (count, *sums_shape(task)))} if count else {}
    shown = "reported as a sum, but read silo by silo" if plan.privacy.metrics == "sum" else "reported silo by silo"
    yield _departure(
        f"its held-out results, for {_models(stage.measured)}{_also_judged(stage)}: {kind_of(task).summed}; {shown}",
        *(
            EvaluateReply(**about, candidate=name, arrays={"sums": sums, **(judged if name == stage.merged else {})})
            for name in stage.measured
        ),
        parts=tuple(
            _array(f"sums of {name}", "float64", sums_shape(task), _of_part(kind_of(task).summed, name, stage))
            for name in stage.results
        ),
    )


def _also_judged(stage: Stage) -> str:
    """Name what a silo measures on validation examples, to choose between two models."""
    return f", and {_models(stage.judged)} on validation examples, if it has any" if stage.judged else ""


def _models(measured: Iterable[str]) -> str:
    """Name the models that a silo measures."""
    names = {
        "simple": "the simple average",
        "regmean": "the merged model",
        FITTED: "the base model with the fitted head",
        REFITTED: "the merged model with the head fitted again",
    }
    return " and ".join(names[name] for name in measured)


def _departure(
    what: str, *replies: Message, to: str = COORDINATOR, readers: str = COORDINATOR, parts: tuple[SentArray, ...] = ()
) -> Departure:
    """Describe replies of one kind."""
    size = sum(map(_size, replies))
    return Departure(replies[0].phase, what, form_of(replies[0]), size, to, readers, parts)


def _size(reply: Message) -> int:
    """Return the size of a message in bytes, as `gramfuse_protocol.messages.wire` packs it."""
    index = [[name, str(array.dtype), list(array.shape)] for name, array in reply.arrays.items()]
    header = {"phase": reply.phase, "body": reply.model_dump(mode="json"), "arrays": index}
    return len(canonical_json(header)) + sum(array.nbytes for array in reply.arrays.values())


def _blank(dtype: str, shape: tuple[int, ...]) -> NDArray[Any]:
    """Return an array of any shape that takes no memory."""
    return np.broadcast_to(np.zeros((), dtype), shape)


def _parts(blocks: tuple[Block, ...], dtype: str, layout: Layout, plan: Plan) -> tuple[SentArray, ...]:
    return tuple(_array(block.name, dtype, block.shape, _content(block, layout, plan)) for block in blocks)


def _vector_parts(plan: Plan, silo: str, stage: Stage) -> tuple[SentArray, ...]:
    """Return the parts of a silo's held-out results in a secure sum, one for each group of numbers."""
    task = plan.task_of(silo)
    return tuple(
        _array(f"{group.name} of {candidate}", "uint64", (group.size,), _of_part(group.words, candidate, stage))
        for candidate in stage.results
        for group in groups(task)
    )


def _of_part(words: str, result: str, stage: Stage) -> str:
    """Return what a group of numbers is, for the examples that a result is on."""
    return words if result in stage.measured else words.replace("held-out", "validation")


def _array(name: str, dtype: str, shape: tuple[int, ...], what: str) -> SentArray:
    return SentArray(name, dtype, shape, np.dtype(dtype).itemsize * math.prod(shape), what)


def _content(block: Block, layout: Layout, plan: Plan) -> str:
    """Describe the content of a block of a contribution."""
    kind, _, name = block.name.partition(":")
    if block.name == SECOND:
        over = "words" if kind_of(plan.model.single_task).fits_words else "examples"
        return f"for each pair of the head's input features, the sum of their product over the training {over}"
    if block.name == FIRST:
        return kind_of(plan.model.single_task).fit_says
    if kind == "count":
        if not plan.counted:
            return "this silo's weight in the merge; numbers of examples and tokens are left out"
        return "this silo's weight in the merge, and its numbers of examples and of tokens for each Gram matrix"
    if kind in ("m", "delta"):
        tensor = next(tensor for tensor in layout.tensors if tensor.name == name)
        if not tensor.buffer:
            return "change of a parameter"
        if tensor.merge == "sum":
            return "number of batches trained on" if plan.counted else "nothing: a counter is left out"
        return "change of a running mean"
    group = next(group for group in layout.groups if group.name == name)
    if kind == "t":
        return "Gram matrix times change of the layer's weights"
    return describe(group.structure, group.d_in, group.experts)


def _claims(plan: Plan) -> tuple[str, ...]:
    """Describe who can learn what; docs/threat-model.md gives the reasons."""
    after = f"The coordinator gets the merged model, and passes it on to others. {MODEL_SAYS}"
    if not plan.privacy.secure_aggregation:
        return (
            f"Open: {seen('open')}: it can read this silo's own. {STATISTICS_SAY}",
            "TLS keeps the network from reading it. Other silos do not get it.",
            after,
        )
    silos, minimum = len(plan.names), plan.minimum_survivors
    most = tolerated(silos, plan.threshold, minimum)["colluding"]
    rounds = (
        ()
        if len(plan.stages) == 1
        else (
            f"Each of the {len(plan.stages)} exchanges has its own sum, "
            + ("all over the same silos" if plan.counted else "and those of one kind are over the same silos")
            + ". In later ones this silo continues from the model that the coordinator presents as the merged one; all "
            "silos in a sum continued from the same model.",
        )
    )
    tells = kind_of(plan.model.single_task).fit_tells if plan.fits_head else ""
    head = (tells,) if tells else ()
    asked = f" The plan asks for {plan.privacy.colluding}." if most != plan.privacy.colluding else ""
    return (
        f"Masked: {seen('secure', least=f'{minimum} of the {silos}')}. From each silo it gets random words. Other "
        "silos cannot read the sum, and neither can the network, because of TLS.",
        f"{holds(most)}{asked} Colluding silos can subtract their own contributions from the sum; what remains is a "
        f"sum over at least {minimum - most} silos, including this one.",
        f"If more than {most} collude with the coordinator, they may be able to read this silo's own contribution.",
        SUM_SAYS,
        *head,
        *rounds,
        *_noise(plan),
        after,
    )


def _noise(plan: Plan) -> Iterator[str]:
    """Describe what the sum of held-out results reveals about a single example."""
    if not plan.summed:
        return
    if plan.epsilon is None:
        yield (
            "The sum of held-out results has no noise: a coordinator that sends crafted models can learn single "
            "held-out examples, with their labels, from the difference of two sums."
        )
        return
    judged = any(stage.judged for stage in plan.stages)
    times = _models(plan.measured) + (f", in each of {plan.merge.rounds} rounds" if plan.merge.rounds > 1 else "")
    yield (
        "The sum of held-out results has noise, to which all silos contribute: for any model, one sum is "
        f"differentially private in a single held-out example, with epsilon = {plan.epsilon:g} and delta = {DELTA:g}. "
        f"There is one for {times}; together they cost epsilon = {spent(plan):.2f}."
        + (" A validation example is in two other sums, and so costs no more." if judged else "")
    )


def _stays(plan: Plan, layout: Layout) -> tuple[str, ...]:
    """List what does not leave."""
    inputs = " and ".join(sorted({at_silo(task).inputs_name for task in plan.tasks.values()}))
    stays = [
        f"{inputs} and labels, of both training and held-out examples",
        "predictions, losses, or anything else about a single example",
    ]
    if plan.privacy.secure_aggregation:
        stays.append("this silo's own fine-tuned model, Gram matrices and numbers of examples, except masked")
    if plan.model.head == "own":
        stays.append("this silo's own head, and its finished model: the merged body with that head")
    if plan.privacy.metrics == "none":
        stays.append("held-out results")
    if layout.frozen:
        stays.append(f"the {len(layout.frozen)} parameters that the plan freezes")
    return (*stays, "the silo file, private keys, the ledger, logs, and text quoted in error messages")
