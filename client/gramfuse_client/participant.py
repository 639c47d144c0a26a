"""What a silo does with each message of the protocol. Knows nothing of Flower."""

from __future__ import annotations

import logging
from contextlib import nullcontext
from datetime import datetime
from typing import TYPE_CHECKING

from gramfuse_client.data import load
from gramfuse_client.membership import Membership
from gramfuse_client.policy import check_bytes, check_examples, check_hours, check_plan, check_repeat
from gramfuse_client.private import exclusive
from gramfuse_client.silo import Silo
from gramfuse_client.state import Origin, State
from gramfuse_protocol.errors import FederationError, GramfuseError, RefusalError, SecurityError, disk_is_full
from gramfuse_protocol.layout import Layout
from gramfuse_protocol.messages import (
    MERGED,
    EvaluateReply,
    EvaluateRequest,
    FinishReply,
    FinishRequest,
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
from gramfuse_protocol.statistics import check_slices
from gramfuse_protocol.transcript import start_digest

if TYPE_CHECKING:
    from gramfuse_client.workbench import Workbench

log = logging.getLogger(__name__)


class Participant:
    """One silo's side of the protocol; all that it remembers is on its disk."""

    def __init__(self, silo: Silo) -> None:
        self.silo = silo

    def answer(self, request: Message) -> Message:
        """Return the reply to a request. What goes wrong becomes a refusal, but for bugs, which raise.

        One is answered after the other: a worker may still be at a request that its node, started anew, got again.
        """
        log.info("silo %s, phase %s, plan %s", self.silo.name, request.phase, request.plan)
        try:
            # What is refused before anything was kept leaves no trace, not even a lock.
            with exclusive(self.silo.state / "lock") if self.silo.state.is_dir() else nullcontext():
                return self._answer(request)
        except GramfuseError as error:
            log.error("silo %s, phase %s: %s: %s", self.silo.name, request.phase, type(error).__name__, error)
            if isinstance(error, SecurityError):
                self._state(request).session(request.session).end(str(error))
            return refusal(request, self.silo.name, error)
        except Exception as error:
            if not disk_is_full(error):
                raise
            log.error("silo %s, phase %s: no space left on the disk: %s", self.silo.name, request.phase, error)
            return refusal(request, self.silo.name, RefusalError("", reason="no space left on this silo's disk"))

    def _answer(self, request: Message) -> Message:
        match request:
            case JoinRequest():
                return self._join(request)
            case TrainRequest():
                return self._train(request)
            case UploadRequest():
                return self._upload(request)
            case EvaluateRequest():
                return self._evaluate(request)
            case FinishRequest():
                return self._finish(request)
            case KeysRequest() | SharesRequest() | MaskedRequest() | SurvivorsRequest() | UnmaskRequest():
                return self._membership(request).answer(request)
        raise FederationError(f"phase {request.phase!r} is not a silo's to answer")

    def _join(self, request: JoinRequest) -> JoinReply:
        plan = Plan.parse(request.plan_text, "the coordinator's plan")
        if plan.digest != request.plan:
            raise FederationError(
                "the plan that came has another digest than its message", reason="plan digest differs"
            )
        check_plan(self.silo, plan)
        _check_round(plan, request)
        state = self._state(request)
        check_repeat(self.silo, state, request.session)
        examples, _ = load(self.silo, plan.task_of(self.silo.name))
        check_examples(self.silo, len(examples))
        if not (state.trained and state.origin().data == examples.digest):
            check_hours(self.silo, datetime.now())
        given = Layout.parse(request.layout, "the coordinator's layout")
        if given.digest != plan.merge.layout:
            raise FederationError("the coordinator's layout is not the plan's", reason="layout digest differs")
        check_bytes(self.silo, plan, given)
        layout = self._workbench(plan).check_layout(given)
        state.join(request.plan_text, layout)
        if plan.privacy.secure_aggregation:
            state.join_session(request.session)
        return JoinReply(**request.about, silo=self.silo.name)

    def _train(self, request: TrainRequest) -> TrainReply:
        state = self._state(request)
        plan, layout = self._joined(state, request)
        examples, _ = load(self.silo, plan.task_of(self.silo.name))
        check_examples(self.silo, len(examples))
        contributed = state.contributed()
        if contributed is not None and contributed.data != examples.digest:
            raise RefusalError(
                f"{self.silo.path}: other data were contributed under this plan before; the difference of the two sums "
                "would show what changed. Agree on a new version of the plan",
                reason="this silo contributed other data under this plan before",
            )
        origin = Origin(examples.digest, self._check_start(state, layout, request))
        if not state.trained or state.origin() != origin:
            check_hours(self.silo, datetime.now())
            statistics = self._workbench(plan).measure(layout, examples, state, request.arrays)
            state.save(statistics, origin, request.arrays)
        kept, secure = state.contribution(), plan.privacy.secure_aggregation
        return TrainReply(
            **request.about,
            silo=self.silo.name,
            examples=None if secure else kept.examples,
            tokens={} if secure else kept.tokens,
        )

    def _check_start(self, state: State, layout: Layout, request: TrainRequest) -> str:
        """Return the digest of the model that a round starts from; empty in the first, which starts from the base.

        Raises:
            ContributionError: if it does not fit the layout.
            RefusalError: if this silo started the round from another model before.
        """
        check_slices(layout.deltas if request.round > 1 else (), request.arrays, "the model to go on from")
        if request.round == 1:
            return ""
        start = start_digest(request.arrays[piece.name] for piece in layout.deltas)
        contributed = state.contributed()
        known = {state.origin().start} if state.trained else set()
        known |= {contributed.starts.get(request.round, start)} if contributed else set()
        if known - {start}:
            raise RefusalError(
                f"{self.silo.path}: this silo went on from another model in round {request.round} before, and "
                "contributions from two would show more than one does. Go on with the run that was interrupted "
                "(gramfuse run --resume), or agree on a new version of the plan",
                reason=f"this silo went on from another model in round {request.round} before",
            )
        return start

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
        state.contribute_openly(request.session)
        return UploadReply(**request.about, silo=self.silo.name, piece=request.piece, arrays=arrays)

    def _evaluate(self, request: EvaluateRequest) -> EvaluateReply:
        state = self._state(request)
        plan, layout = self._joined(state, request)
        finished = plan.model.head == "own" and request.candidate == MERGED
        unmeasured = plan.privacy.metrics == "none"
        if unmeasured and not finished:
            raise FederationError("the plan lets no metrics leave", reason="the plan lets no metrics leave")
        check_slices(layout.deltas, request.arrays, "the coordinator's model")
        reply = EvaluateReply(**request.about, silo=self.silo.name, candidate=request.candidate)
        if unmeasured:
            self._workbench(plan).keep(layout, request.arrays, state)
            return reply
        summed = plan.privacy.secure_aggregation and plan.privacy.metrics == "sum"
        membership = Membership(self.silo, plan, layout, state, request.session) if summed else None
        if membership is not None and membership.measured(request):
            return reply
        sums = self._workbench(plan).evaluate(layout, request.arrays, state, keep=finished)
        if membership is not None:
            membership.keep_metrics(request, sums)
            return reply
        return reply.model_copy(update={"arrays": {"sums": sums}})

    def _finish(self, request: FinishRequest) -> FinishReply:
        self._state(request).session(request.session).end("the run is over")
        return FinishReply(**request.about, silo=self.silo.name)

    def _membership(self, request: Message) -> Membership:
        state = self._state(request)
        return Membership(self.silo, *self._joined(state, request), state, request.session)

    def _joined(self, state: State, request: Message) -> tuple[Plan, Layout]:
        """Return what was joined, if the silo file still allows it and the session goes on."""
        plan, layout = state.joined()
        check_plan(self.silo, plan)
        _check_round(plan, request)
        check_bytes(self.silo, plan, layout)
        check_repeat(self.silo, state, request.session)
        if plan.privacy.secure_aggregation:
            state.session(request.session).read()
        return plan, layout

    def _workbench(self, plan: Plan) -> Workbench:
        from gramfuse_client.workbench import Workbench  # torch takes seconds to load, and few phases need it

        return Workbench(self.silo, plan)

    def _state(self, request: Message) -> State:
        return State(self.silo.state, request.plan, request.round)


def _check_round(plan: Plan, request: Message) -> None:
    if request.round > plan.merge.rounds:
        raise FederationError(
            f"round {request.round} was asked for, and the plan has merge.rounds = {plan.merge.rounds}",
            reason="the plan has fewer rounds",
        )
