"""Answers each message of the protocol for a silo. Does not depend on Flower."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Mapping
from contextlib import nullcontext
from datetime import datetime
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gramfuse_client.data.examples import Examples, load, load_validation
from gramfuse_client.exchange.secure_phases import Membership, check_range
from gramfuse_client.guard.policy import check_bytes, check_data, check_disk, check_hours, check_plan, check_repeat
from gramfuse_client.guard.releases import Releases
from gramfuse_client.silo_file import Silo
from gramfuse_client.state.measurements import HeldOut, Measurement
from gramfuse_client.state.state import MeasuredOn, State
from gramfuse_protocol.canonical import text_digest
from gramfuse_protocol.contract.layout import Layout
from gramfuse_protocol.contract.plan import Plan
from gramfuse_protocol.contract.stages import describe_stage
from gramfuse_protocol.contract.task import Task
from gramfuse_protocol.contract.whole_model import with_zeros
from gramfuse_protocol.errors import (
    DataError,
    FailureError,
    FederationError,
    GramfuseError,
    RefusalError,
    SecurityError,
)
from gramfuse_protocol.files import exclusive
from gramfuse_protocol.held_out.metrics import Sums, sums_shape
from gramfuse_protocol.held_out.noise import noisy_words
from gramfuse_protocol.held_out.sums import size
from gramfuse_protocol.messages.phases import (
    EvaluateReply,
    EvaluateRequest,
    FinishReply,
    FinishRequest,
    JoinReply,
    JoinRequest,
    Message,
    SecureRequest,
    TrainReply,
    TrainRequest,
    UploadReply,
    UploadRequest,
    refusal,
)
from gramfuse_protocol.secure_sum.statements import model_digest
from gramfuse_protocol.statistics.contribution import check_slices
from gramfuse_protocol.text import quoted

if TYPE_CHECKING:
    from gramfuse_client.exchange.local_model import Workbench

NOTHING_SENT = "0" * 64
"""Content digest of an attempt whose request contains no model: work in the first session, and uploads."""

log = logging.getLogger(__name__)


class WholeModel(NamedTuple):
    """A model that the coordinator sent.

    Args:
        arrays: differences from the base of all the layout's tensors, by block name.
        digest: its `model_digest`.
    """

    arrays: Mapping[str, NDArray[Any]]
    digest: str


class Participant:
    """One silo's side of the protocol. All its state is on disk."""

    def __init__(self, silo: Silo) -> None:
        self.silo = silo

    def answer(self, request: Message) -> Message:
        """Return the reply to a request.

        A refusal before the silo's data are touched gives its reason. Any error after that, including a bug, becomes a
        failure with one fixed text for each phase, so that what the other side reads does not depend on the data.

        A lock serialises requests: a worker may still be busy with a request that its restarted node fetched again.
        """
        log.info("silo %s, phase %s, plan %s", self.silo.name, request.phase, request.plan)
        try:
            # A request that is refused before there is any state leaves no trace, not even a lock.
            with exclusive(self.silo.state / "lock") if self.silo.state.is_dir() else nullcontext():
                return self._answer(request)
        except GramfuseError as error:
            log.error("silo %s, phase %s: %s: %s", self.silo.name, request.phase, type(error).__name__, error)
            return self._declined(request, error)
        except Exception as error:
            log.exception("silo %s, phase %s: unexpected error", self.silo.name, request.phase)
            return self._declined(request, FailureError(str(error), phase=request.phase))

    def _declined(self, request: Message, error: GramfuseError) -> Message:
        """Return the refusal of a request. End the session after a protocol violation, or a failure with secrets."""
        state = self._state(request)
        violation = isinstance(error, SecurityError)
        if violation or (isinstance(error, FailureError) and state.attempts.failed(request)):
            try:
                session = state.session(request.session)
                if violation or session.begun:
                    session.end(str(error))
            except Exception:  # the state itself may be damaged; then nothing leaves in the session either
                log.exception("silo %s: the session could not be ended", self.silo.name)
        return refusal(request, self.silo.name, error)

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
            case SecureRequest():
                return self._membership(request).answer(request)
        raise FederationError(f"a silo does not answer phase {request.phase!r}")

    def _join(self, request: JoinRequest) -> JoinReply:
        """Join. This does not touch the silo's data, so a refusal can give its reason."""
        plan = Plan.parse(request.plan_text, "the coordinator's plan")
        if plan.digest != request.plan:
            raise FederationError("the plan's digest differs from the one in its message", reason="plan digest differs")
        check_plan(self.silo, plan)
        if text_digest(request.layout) != plan.merge.layout:  # never parse a layout that is not the plan's
            raise FederationError("the coordinator's layout is not the plan's", reason="layout digest differs")
        plan.stage(request.round)
        state = self._state(request)
        state.attempts.check(request)
        check_repeat(self.silo, state, request.session)
        if not state.trained:
            check_hours(self.silo, datetime.now())
        received = Layout.parse(request.layout, "the coordinator's layout")
        check_bytes(self.silo, plan, received)
        layout = self._workbench(plan).check_layout(received)
        if not state.trained:
            check_disk(self.silo, plan, plan.stage(request.round).form(layout))
        state.join(request.plan_text, layout)
        if plan.privacy.secure_aggregation:
            state.join_session(request.session)
        return JoinReply(**request.about, silo=self.silo.name)

    def _train(self, request: TrainRequest) -> TrainReply:
        state = self._state(request)
        plan, layout = self._joined(state, request)
        start = self._check_start(state, plan, layout, request)
        if not state.trained:
            check_hours(self.silo, datetime.now())
            check_disk(self.silo, plan, plan.stage(request.round).form(layout))
        with state.attempts.attempt(request, "train", start or NOTHING_SENT):
            self._ensure_statistics(state, plan, layout, request, start)
            statistics = state.contribution()
        secure = plan.privacy.secure_aggregation
        return TrainReply(
            **request.about,
            silo=self.silo.name,
            examples=None if secure else statistics.examples,
            tokens={} if secure else statistics.tokens,
        )

    def _ensure_statistics(self, state: State, plan: Plan, layout: Layout, request: TrainRequest, start: str) -> None:
        """Do the session's work, unless its statistics exist from the same data and the same start model."""
        task = plan.task_of(self.silo.name)
        examples, held_out = load(self.silo, task)
        check_data(self.silo, task, examples, held_out)
        contributed = state.contributed()
        if contributed is not None and contributed.data != examples.digest:
            raise DataError(
                f"{self.silo.path}: this silo contributed other data under this plan before; the difference of the two "
                "sums would reveal what changed. Restore the earlier data, or agree on a new plan"
            )
        rows = self.releases.keep_rows(examples.input_keys)  # again, in case the owner cleared them
        if state.trained and state.origin()[:2] == (examples.digest, start):
            return
        check_hours(self.silo, datetime.now())
        stage, workbench = plan.stage(request.round), self._workbench(plan)
        if any(each.judged for each in plan.stages):
            self._validation(plan)  # an error in it comes before any work
        work = workbench.measure_head if stage.fits_head else workbench.measure
        statistics = work(layout, examples, state, with_zeros(layout, request.arrays) if start else {})
        if plan.privacy.secure_aggregation:
            check_range(self.silo, plan, stage.form(layout), statistics)
        state.save(statistics, MeasuredOn(examples.digest, start, rows), request.arrays)

    def _check_start(self, state: State, plan: Plan, layout: Layout, request: TrainRequest) -> str:
        """Return the digest of the model that a session starts from; empty in the first.

        Under secure aggregation, a later one must start from the merged model of the session before, and this silo must
        have received it after contributing there. With any other start model, the coordinator could probe this
        silo's data.

        Raises:
            ContributionError: if the model does not fit the layout.
            RefusalError: if it is another model, or this silo received no merged model.
        """
        if request.round == 1:
            check_slices((), request.arrays, "the model to start from")
            return ""
        start = self._whole(layout, request.arrays, "the model to start from").digest
        if (
            not plan.privacy.secure_aggregation
        ):  # the coordinator can read contributions anyway, and an absent silo may return
            return start
        previous = State(self.silo.state, request.plan, request.round - 1)
        contributed = state.contributed()
        before = plan.stage(previous.round)
        merged = previous.measurements.of(previous.round).get(before.merged)
        if merged is None or contributed is None or not contributed.sessions.get(previous.round):
            raise RefusalError(
                f"{self.silo.path}: the coordinator asked for session {request.round}, but this silo did not "
                f"contribute to {describe_stage(before)}, or did not receive its model",
                reason="this silo did not complete the previous session",
            )
        if start != merged.model:
            raise RefusalError(
                f"{self.silo.path}: the coordinator asked for session {request.round} from a model other than the one "
                f"that this silo received after {describe_stage(before)}. Resume the interrupted run (gramfuse run "
                "--resume)",
                reason="the starting model is not the previous session's merged model",
            )
        return start

    def _whole(self, layout: Layout, arrays: Mapping[str, NDArray[Any]], what: str) -> WholeModel:
        """Return a received model, completed with the tensors that equal the base's.

        Args:
            what: noun for the model in errors.

        Raises:
            ContributionError: if it does not fit the layout.
        """
        complete = with_zeros(layout, arrays)
        check_slices(layout.deltas, complete, what)
        return WholeModel(complete, model_digest(complete[piece.name] for piece in layout.deltas))

    def _upload(self, request: UploadRequest) -> UploadReply:
        state = self._state(request)
        plan, layout = self._joined(state, request)
        if plan.privacy.secure_aggregation:
            raise SecurityError("the coordinator asked for unmasked statistics, but the plan masks them")
        form = plan.stage(request.round).form(layout)
        count = form.piece_count(request.piece_bytes)
        if request.piece >= count:
            raise FederationError(
                f"the coordinator asked for piece {request.piece}, but there are only {count}", reason="no such piece"
            )
        piece = form.piece(request.piece, request.piece_bytes)
        state.check_trained()
        with state.attempts.attempt(request, "upload", NOTHING_SENT):
            arrays = state.slices(piece)
            check_slices(piece, arrays, "this silo", form.dtype)
            state.contribute_openly(request.session)
        return UploadReply(**request.about, silo=self.silo.name, piece=request.piece, arrays=arrays)

    def _evaluate(self, request: EvaluateRequest) -> EvaluateReply:
        """Measure one of the session's models, once, after this silo's contribution was released."""
        state = self._state(request)
        plan, layout = self._joined(state, request)
        stage = plan.stage(request.round)
        unmeasured = not stage.measured
        if unmeasured and not (request.candidate == stage.merged and (plan.model.head == "own" or not stage.last)):
            raise FederationError("the plan lets no metrics leave", reason="the plan lets no metrics leave")
        if request.candidate not in (stage.measured or (stage.merged,)):
            raise SecurityError(
                f"the coordinator sent candidate {quoted(request.candidate)}; the plan has {', '.join(stage.measured)}"
            )
        whole = self._whole(layout, request.arrays, "the coordinator's model")
        self._check_released(state, plan, request)
        model = whole.digest
        measurement = state.measurements.of(request.round).get(request.candidate)
        if measurement is not None and measurement.model != model:
            raise SecurityError(f"the coordinator sent two different models as {request.candidate!r}")
        workbench = self._workbench(plan)
        if measurement is None:
            workbench.check_model(layout, whole.arrays, state)
            if not unmeasured:
                check_hours(self.silo, datetime.now())
        with state.attempts.attempt(request, f"evaluate {request.candidate}", model):
            if measurement is None:
                measurement = self._measure(workbench, state, layout, request, whole)
        reply = EvaluateReply(**request.about, silo=self.silo.name, candidate=request.candidate)
        if not measurement.sums:
            return reply
        shape, stored = sums_shape(plan.task_of(self.silo.name)), state.measurements.of(request.round)
        arrays = {"sums": np.array(measurement.sums).reshape(shape)}
        if stage.judged and request.candidate == stage.merged:
            judged = [stored[name].sums for name in stage.judgements]
            arrays["judged"] = np.array(judged).reshape(len(judged), *shape)
        return reply.model_copy(update={"arrays": arrays})

    def _measure(
        self, workbench: Workbench, state: State, layout: Layout, request: EvaluateRequest, whole: WholeModel
    ) -> Measurement:
        """Measure a model, and store exactly what leaves."""
        plan, stage, model = workbench.plan, workbench.plan.stage(request.round), whole.digest
        finished = plan.model.head == "own" and request.candidate == stage.merged
        if not stage.measured:
            if finished:
                workbench.keep(layout, whole.arrays, state)
            measurement = Measurement(model=model)
            state.measurements.keep(request.round, request.candidate, measurement)
            return measurement
        task = plan.task_of(self.silo.name)
        _, held_out = load(self.silo, task)
        earlier = state.measurements.held_out()
        if earlier.data not in ("", held_out.digest):
            raise DataError(
                f"{self.silo.path}: this silo measured on other held-out examples under this plan before; the "
                "difference of the two sums would reveal what changed. Restore the earlier examples"
            )
        keys = held_out.input_keys
        if stage.judged and request.candidate == stage.merged:
            validation = self._validation(plan)
            keys += validation.input_keys
            start = WholeModel(with_zeros(layout, state.start()), state.origin().start)
            for name, judged in zip(stage.judgements, (start, whole), strict=True):
                nothing: Sums = np.zeros(size(task) if plan.summed else sums_shape(task))
                sums = workbench.evaluate(layout, judged.arrays, state, validation) if validation else nothing
                state.measurements.keep(request.round, name, _as_it_leaves(plan, task, judged.digest, sums))
        sums = workbench.evaluate(layout, whole.arrays, state, held_out, keep=finished)
        measurement = _as_it_leaves(plan, task, model, sums)
        measured_on = HeldOut(data=held_out.digest, rows=self.releases.keep_rows(keys) if plan.summed else "")
        state.measurements.keep(request.round, request.candidate, measurement, measured_on)
        return measurement

    def _validation(self, plan: Plan) -> Examples:
        """Return the validation examples; none if the silo file names none, since all others are held out."""
        task = plan.task_of(self.silo.name)
        if self.silo.file.data.validation is None:
            return load(self.silo, task)[1].take([])
        return load_validation(self.silo, task)

    def _check_released(self, state: State, plan: Plan, request: EvaluateRequest) -> None:
        """Raise RefusalError if this session has not yet released this silo's contribution to the round."""
        if plan.privacy.secure_aggregation:
            released = state.session(request.session).read().released("statistics")
        else:
            contributed = state.contributed()
            released = contributed is not None and request.session in contributed.sessions.get(request.round, ())
        if not released:
            raise RefusalError(
                f"{self.silo.path}: the coordinator sent a model to measure before this silo's contribution was "
                "released",
                reason="this silo measures models after its contribution was released",
            )

    def _finish(self, request: FinishRequest) -> FinishReply:
        self._state(request).session(request.session).end("the run is over")
        return FinishReply(**request.about, silo=self.silo.name)

    def _membership(self, request: Message) -> Membership:
        state = self._state(request)
        plan, layout = self._joined(state, request)
        return Membership(self.silo, plan, layout, state, self.releases, request.session)

    def _joined(self, state: State, request: Message) -> tuple[Plan, Layout]:
        """Return the joined plan and layout, if the silo file still allows them, nothing failed, and the session is on.

        Raises:
            GramfuseError: otherwise.
        """
        plan, layout = state.joined()
        check_plan(self.silo, plan)
        plan.stage(request.round)
        check_bytes(self.silo, plan, layout)
        state.attempts.check(request)
        check_repeat(self.silo, state, request.session)
        if plan.privacy.secure_aggregation:
            state.session(request.session).read()
        return plan, layout

    @property
    def releases(self) -> Releases:
        """The sums that this silo signed, across all plans."""
        return Releases(self.silo.state / "releases")

    def _workbench(self, plan: Plan) -> Workbench:
        # Imported here because torch takes seconds to import, and few phases need it.
        from gramfuse_client.exchange.local_model import Workbench

        return Workbench(self.silo, plan)

    def _state(self, request: Message) -> State:
        return State(self.silo.state, request.plan, request.round)


def _as_it_leaves(plan: Plan, task: Task, model: str, sums: Sums) -> Measurement:
    """Return a measurement with its noise, if it leaves in a secure sum.

    Args:
        model: digest of the measured model.
        sums: of `Workbench.evaluate`.
    """
    if plan.summed:
        words = noisy_words(plan, task, sums, secrets.token_bytes)
        return Measurement(model=model, words=tuple(words.tolist()))
    return Measurement(model=model, sums=tuple(np.nan_to_num(sums).reshape(-1).tolist()))
