"""What a silo does with each message of the protocol. Knows nothing of Flower."""

from __future__ import annotations

import logging

import torch

from gramfuse_client.batches import Encoded, batches
from gramfuse_client.data import Examples, load
from gramfuse_client.evaluate import evaluate
from gramfuse_client.finetune import choose_device, finetune
from gramfuse_client.membership import Membership
from gramfuse_client.policy import check_examples, check_plan
from gramfuse_client.silo import Silo
from gramfuse_client.state import State
from gramfuse_client.statistics import collect_statistics
from gramfuse_model.base import Base, load_base, trainable
from gramfuse_model.tracing import plan_layout
from gramfuse_protocol.errors import FederationError, GramfuseError, RefusalError, SecurityError
from gramfuse_protocol.layout import Layout, delta_block
from gramfuse_protocol.messages import (
    EvaluateReply,
    EvaluateRequest,
    JoinReply,
    JoinRequest,
    KeysRequest,
    MaskedRequest,
    Message,
    SharesRequest,
    SurvivorsRequest,
    TrainReply,
    TrainRequest,
    UnmaskRequest,
    UploadReply,
    UploadRequest,
    refusal,
)
from gramfuse_protocol.plan import Plan
from gramfuse_protocol.statistics import Statistics, check_slices

EVALUATION_BATCH = 64

log = logging.getLogger(__name__)


class Participant:
    """One silo's side of the protocol; all that it remembers is on its disk."""

    def __init__(self, silo: Silo) -> None:
        self.silo = silo
        if silo.file.threads:
            torch.set_num_threads(silo.file.threads)

    def answer(self, request: Message) -> Message:
        """Return the reply to a request; whatever goes wrong becomes a refusal that carries no data."""
        log.info("silo %s, phase %s, plan %s", self.silo.name, request.phase, request.plan)
        try:
            match request:
                case JoinRequest():
                    return self._join(request)
                case TrainRequest():
                    return self._train(request)
                case UploadRequest():
                    return self._upload(request)
                case EvaluateRequest():
                    return self._evaluate(request)
                case KeysRequest() | SharesRequest() | MaskedRequest() | SurvivorsRequest() | UnmaskRequest():
                    return self._membership(request).answer(request)
            raise FederationError(f"phase {request.phase!r} is not a silo's to answer")
        except GramfuseError as error:
            log.error("silo %s, phase %s: %s: %s", self.silo.name, request.phase, type(error).__name__, error)
            if isinstance(error, SecurityError):
                self._state(request).session(request.session).end(str(error))
            return refusal(request, self.silo.name, error)
        except Exception:
            # Flower would send the exception's text to the coordinator; it may quote data.
            log.exception("silo %s, phase %s: unexpected error", self.silo.name, request.phase)
            return refusal(request, self.silo.name, GramfuseError("", reason="an unexpected error at the silo"))

    def _join(self, request: JoinRequest) -> JoinReply:
        plan = Plan.parse(request.plan_text, "the coordinator's plan")
        if plan.digest != request.plan:
            raise FederationError(
                "the plan that came has another digest than its message", reason="plan digest differs"
            )
        check_plan(self.silo, plan)
        examples, _ = load(self.silo, plan.model)
        check_examples(self.silo, len(examples))
        given = Layout.parse(request.layout, "the coordinator's layout")
        if given.digest != plan.merge.layout:
            raise FederationError("the coordinator's layout is not the plan's", reason="layout digest differs")
        layout = plan_layout(plan, self._base(plan), given)
        state = self._state(request)
        state.join(request.plan_text, layout)
        if plan.privacy.secure_aggregation:
            state.join_session(request.session)
        return JoinReply(plan=request.plan, session=request.session, silo=self.silo.name)

    def _train(self, request: TrainRequest) -> TrainReply:
        state = self._state(request)
        plan, layout = self._joined(state, request)
        examples, _ = load(self.silo, plan.model)
        check_examples(self.silo, len(examples))
        contributed = state.contributed()
        if contributed is not None and contributed.data != examples.digest:
            raise RefusalError(
                f"{self.silo.path}: other data were contributed under this plan before; the difference of the two sums "
                "would show what changed. Agree on a new version of the plan",
                reason="this silo contributed other data under this plan before",
            )
        counts = state.counts(examples.digest)
        if counts is None:
            statistics = train(self.silo, plan, layout, self._base(plan), examples, state)
            state.save(statistics, examples.digest)
            counts = statistics.examples, statistics.tokens
        secure = plan.privacy.secure_aggregation
        return TrainReply(
            plan=request.plan,
            session=request.session,
            silo=self.silo.name,
            examples=None if secure else counts[0],
            tokens={} if secure else counts[1],
        )

    def _upload(self, request: UploadRequest) -> UploadReply:
        state = self._state(request)
        plan, layout = self._joined(state, request)
        if plan.privacy.secure_aggregation:
            raise SecurityError("statistics were asked for in the clear, and the plan has them masked")
        pieces = layout.pieces(request.piece_bytes)
        if request.piece >= len(pieces):
            raise FederationError(
                f"piece {request.piece} was asked for; there are {len(pieces)}", reason="no such piece"
            )
        arrays = state.slices(pieces[request.piece])
        check_slices(pieces[request.piece], arrays, "this silo")
        return UploadReply(
            plan=request.plan, session=request.session, silo=self.silo.name, piece=request.piece, arrays=arrays
        )

    def _evaluate(self, request: EvaluateRequest) -> EvaluateReply:
        plan, layout = self._joined(self._state(request), request)
        if plan.privacy.metrics == "none":
            raise FederationError("the plan lets no metrics leave", reason="the plan lets no metrics leave")
        base = self._base(plan)
        check_slices(layout.deltas, request.arrays, "the coordinator's model")
        summed = plan.privacy.secure_aggregation and plan.privacy.metrics == "sum"
        membership = self._membership(request) if summed else None
        reply = EvaluateReply(
            plan=request.plan, session=request.session, silo=self.silo.name, candidate=request.candidate
        )
        if membership is not None and membership.measured(request):
            return reply
        parameters = dict(base.model.named_parameters())
        with torch.no_grad():
            for tensor in layout.tensors:
                parameters[tensor.name] += torch.from_numpy(request.arrays[delta_block(tensor.name)].copy())
        _, held_out = load(self.silo, plan.model)
        device = choose_device(self.silo.file.device)
        encoded = Encoded(held_out, base.tokenizer, plan.model.max_length)
        sums = evaluate(
            base.model.to(device),
            batches(encoded, base.tokenizer, EVALUATION_BATCH, device, by_length=True),
            len(plan.model.labels),
        )
        if membership is not None:
            membership.keep_metrics(request, sums)
            return reply
        return reply.model_copy(update={"arrays": {"sums": sums}})

    def _membership(self, request: Message) -> Membership:
        state = self._state(request)
        return Membership(self.silo, *self._joined(state, request), state, request.session)

    def _joined(self, state: State, request: Message) -> tuple[Plan, Layout]:
        """Return what was joined, if the silo file still allows it and the session goes on."""
        plan, layout = state.joined()
        check_plan(self.silo, plan)
        if plan.privacy.secure_aggregation:
            state.session(request.session).read()
        return plan, layout

    def _base(self, plan: Plan) -> Base:
        return load_base(plan, self.silo.directory, override=self.silo.file.base)

    def _state(self, request: Message) -> State:
        return State(self.silo.state, request.plan)


def train(
    silo: Silo, plan: Plan, layout: Layout, base: Base, examples: Examples, state: State | None = None
) -> Statistics:
    """Fine-tune the base model on a silo's examples, in place, and measure it.

    Args:
        state: where progress is noted, if anywhere.
    """
    device = choose_device(silo.file.device)
    encoded = Encoded(examples, base.tokenizer, plan.model.max_length)
    before = trainable(base.model)
    finetune(
        base.model,
        encoded,
        base.tokenizer,
        plan.training,
        device,
        progress=None if state is None else lambda done, total: state.progress("train", done, total),
    )
    size = plan.training.batch_size
    return collect_statistics(
        base.model,
        batches(encoded, base.tokenizer, size, device),
        layout,
        base=before,
        examples=len(examples),
        limit=plan.merge.tokens,
        progress=None if state is None else lambda done: state.progress("measure", done, -(-len(encoded) // size)),
    )
