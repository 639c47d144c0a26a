"""One session of a run: silos contribute, the coordinator merges what they send, silos measure the merge."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gramfuse_model.loading.base_model import Base
from gramfuse_protocol.contract.layout import Layout
from gramfuse_protocol.contract.stages import describe_stage
from gramfuse_protocol.contract.whole_model import without_zeros
from gramfuse_protocol.errors import FederationError, GramfuseError, RefusalError
from gramfuse_protocol.messages.phases import TrainReply, TrainRequest, UploadReply, UploadRequest
from gramfuse_protocol.secure_sum.statements import model_digest
from gramfuse_protocol.statistics.contribution import check_counts, check_slices
from gramfuse_protocol.tasks.registry import kind_of
from gramfuse_server.merging.accumulator import Accumulator, Merged
from gramfuse_server.merging.checks import check_merge, check_model, check_shares
from gramfuse_server.merging.head_accumulator import HeadAccumulator
from gramfuse_server.merging.head_checks import check_head, check_outputs
from gramfuse_server.report.choices import HeadChoice
from gramfuse_server.report.schema import Check, Loss, Measured, RoundOfReport, SiloOfReport
from gramfuse_server.report.verdicts import worst
from gramfuse_server.run.conductor import Conductor
from gramfuse_server.run.evaluation import Evaluation, NamedModel
from gramfuse_server.run.secure_sums import UPLOADS, SecureSums
from gramfuse_server.run.spool import Spool, Spooled

Arrays = Mapping[str, NDArray[np.float32]]
Traffic = dict[str, dict[str, int]]


class Round:
    """The coordinator's side of one session: a round of training, or an exchange that fits the head.

    Args:
        conductor: of this session.
        layout: the plan's.
        base: values of the base model's parameters by name, with at least those of a fitted head.
        start: the model that silos start from, as differences from the base by block name, all tensors; empty in the
            first session.
        piece_bytes: most bytes of a contribution in one message; a multiple of 16.

    Attributes:
        trained: `examples` and `tokens` of each silo that trained, in roster order.
        survivors: the silos whose contributions are in the merge, in roster order.
        merged: the merge to measure and report, as differences from the base; None until it exists.
        checks: checks of the merge; empty until it exists.
        models: the models measured on held-out examples.
        judged: the models measured on validation examples, to choose between.
        choice: which of them is the run's result; None if there was nothing to choose.
        measured: the silos whose held-out examples were used, in roster order.
        unmeasured: why nothing was measured, or None.
        examples: training examples of the survivors together; 0 if the sum does not count them.
        unfitted: why the head is not fitted again after this session, the run's last, though the plan asks for it.
        concluded: whether the session was over before, and only the run's result is missing.
    """

    def __init__(self, conductor: Conductor, layout: Layout, base: Arrays, start: Arrays, piece_bytes: int) -> None:
        self.conductor = conductor
        self.plan = conductor.plan
        self.stage = conductor.stage
        self.layout = layout
        self.form = self.stage.form(layout)
        self.start = start
        self.piece_bytes = piece_bytes
        self.secure: SecureSums | None = None
        self.start_digest = model_digest(start[piece.name] for piece in layout.deltas) if start else ""
        if self.plan.privacy.secure_aggregation:
            self.secure = SecureSums(conductor, piece_bytes, self.start_digest)
        self.accumulator: Accumulator | HeadAccumulator
        if self.stage.fits_head:
            self.accumulator = HeadAccumulator(
                layout, base, trains=not self.stage.last, seen=self.stage.work == "refit"
            )
        else:
            self.accumulator = Accumulator(layout, alpha=self.plan.merge.alpha, weighting=self.plan.merge.weighting)
        self.trained: Mapping[str, Mapping[str, Any]] = {}
        self.survivors: tuple[str, ...] = ()
        self.merged: Merged | None = None
        self.checks: list[Check] = []
        self.models: list[Measured] = []
        self.judged: list[Measured] = []
        self.choice: HeadChoice | None = None
        self.measured: tuple[str, ...] = ()
        self.unmeasured: str | None = None
        self.examples = 0
        self.unfitted: str | None = None
        self.concluded = False

    def merge(self) -> Merged:
        """Have the silos work, collect what they contribute, and merge it.

        Returns:
            Differences from the base, not from the model that the session started from.

        Raises:
            GramfuseError: if the session fails; the message names the silo.
        """
        conductor = self.conductor
        try:
            with conductor.phase("join"):
                conductor.join(self.layout)
            self.trained = conductor.step("train", self._train)
            self.survivors = self._sum_open() if self.secure is None else self._sum_masked(self.secure)
        except (FederationError, RefusalError) as error:
            if not conductor.only or self.stage.work == "refit":  # a run ends well without a second fit
                raise
            raise type(error)(
                f"{error}\nWith secure aggregation, {describe_stage(self.stage)} needs exactly the silos of an earlier "
                f"sum: {', '.join(conductor.only)}. Bring back the lost ones, and resume the run"
            ) from None
        with conductor.phase("merge"):
            self.merged = self._merged()
            self.examples = self._count()
        return self.merged

    def _count(self) -> int:
        """Return the number of training examples in the sums; 0 if they do not tell it."""
        words = self.stage.fits_head and kind_of(self.plan.model.single_task).fits_words
        return 0 if words else self.accumulator.examples

    def _merged(self) -> Merged:
        """Return the merge of the sums, as differences from the base, and check them."""
        if isinstance(self.accumulator, HeadAccumulator):
            sums, head = self.accumulator.sums, self.accumulator.head
            self.checks = check_head(sums, head, len(self.survivors), secure=self.secure is not None)
            return self.accumulator.merge(self.start)
        merged = self.accumulator.merge()
        self.checks = check_merge(self.accumulator, merged, self.plan, self.survivors)
        if self.secure is None:
            examples = {silo: self.trained[silo]["examples"] for silo in self.survivors}
            self.checks += check_shares(examples, self.plan.merge.weighting)
        return merged.after(self.start)

    def conclude(self, report: RoundOfReport, merged: Merged) -> None:
        """Take the results of this session from its report, if it was over before.

        Args:
            merged: the model that it ended with.
        """
        self.trained, self.survivors, self.merged = self.conductor.done("train"), report.survivors, merged
        self.checks, self.models, self.unmeasured = list(report.checks), list(report.models), report.unmeasured
        self.examples, self.concluded = report.examples, True

    def check(self, base: Base, merged: Merged) -> None:
        """Add checks of the model that the session ends with.

        Args:
            base: the base model.
            merged: differences from it of the model to measure and write.
        """
        start = {} if self.stage.fits_head else self.start
        self.checks += check_model(base.model, merged, self.layout, self.plan.merge.maximum_change, start)
        if self.stage.fits_head and self.layout.head is not None:
            self.checks += check_outputs(base, merged, self.layout.head)

    @property
    def result(self) -> str:
        """Name of the model that the run ends with, if it ends here."""
        return self.stage.merged if self.choice is None else self.choice.kept

    @property
    def sound(self) -> bool:
        """Whether no check of the merge is `bad`."""
        return worst(self.checks) != "bad"

    def measure(self, candidates: Iterable[NamedModel]) -> None:
        """Have the survivors measure models.

        Silos that keep their heads or continue in another session receive the merged model, the last candidate, even if
        none is measured. An unsound merge is sent to no silo.

        The merge is already complete, so an error here costs the metrics, not the model.
        """
        if not self.sound:
            self.unmeasured = "a check of the merge is bad, so it was not sent to any silo"
            return
        self.conductor.keep_only(self.survivors)
        if self.secure is not None:
            self.secure.release_late(self.survivors)
        evaluation = Evaluation(self.conductor, self.layout, self.secure, self.start_digest)
        try:
            if not self.stage.measured:
                self.unmeasured = (
                    "the plan lets no metrics leave"
                    if self.plan.privacy.metrics == "none"
                    else "a head before training is not measured"
                )
                if self.plan.model.head == "own" or not self.stage.last:
                    *_, merged = candidates
                    evaluation.hand_over(merged)
            else:
                results = evaluation.measure(candidates, self.survivors)
                self.models = [model for model in results if model.name in self.stage.measured]
                self.judged = [model for model in results if model.name not in self.stage.measured]
                self.measured = evaluation.silos
        except GramfuseError as error:
            self.unmeasured = str(error)

    @property
    def lost(self) -> dict[str, str]:
        """Why silos are not in the merge, or were lost after it."""
        conductor = self.conductor
        before = {name: reason for name, reason in conductor.lost_before.items() if name not in self.survivors}
        return before | {name: str(error) for name, error in conductor.lost.items()}

    @property
    def silos(self) -> tuple[SiloOfReport, ...]:
        """How far each silo of the roster got, for the report of a failed run."""
        return tuple(
            SiloOfReport.read({"name": name, "state": self._state(name), **self._examples(name)})
            for name in self.plan.names
        )

    def report(self) -> RoundOfReport:
        """Return this session's entry in report.json; of a failed one, as far as it got."""
        conductor = self.conductor
        report = RoundOfReport(
            round=conductor.round,
            work=self.stage.work,
            lost=tuple(Loss(name=name, reason=reason) for name, reason in self.lost.items()),
            bytes=self._traffic(conductor.post.received),
            bytes_to_silos=self._traffic(conductor.post.sent),
            seconds={phase: round(seconds, 3) for phase, seconds in conductor.seconds.items()},
        )
        if self.merged is not None:
            report = report.updated(
                examples=self.examples,
                survivors=self.survivors,
                solve=self.merged.steps,
                checks=tuple(self.checks),
            )
        if self.models or self.unmeasured:
            report = report.updated(models=tuple(self.models), unmeasured=self.unmeasured)
        return report

    def _state(self, silo: str) -> str:
        if self.merged is not None and silo in self.survivors:
            return "merged"
        progress = self.conductor.progress.get(silo, "absent")
        if silo in self.conductor.lost_before or (silo in self.conductor.lost and progress != "absent"):
            return "lost"
        return "trained" if silo in self.trained else progress

    def _examples(self, silo: str) -> dict[str, int]:
        examples = self.trained.get(silo, {}).get("examples")
        return {} if examples is None else {"examples": examples}

    def _train(self) -> dict[str, dict[str, Any]]:
        trained: dict[str, dict[str, Any]] = {}
        self.trained = trained  # set now, for the report if not all silos get there
        request = TrainRequest(**self.conductor.about, arrays=without_zeros(self.start))
        open_mode = self.secure is None

        def check(silo: str, _: TrainRequest, reply: TrainReply) -> None:
            if open_mode:
                check_counts(self.form, reply.examples or 0, reply.tokens, f"silo {silo!r}")
            elif reply.examples is not None or reply.tokens:
                raise FederationError(
                    f"silo {silo!r} reported its counts in the clear, which secure aggregation forbids"
                )

        for silo, _, reply in self.conductor.ask(
            TrainReply,
            {name: [request] for name in self.conductor.nodes},
            needed=self.conductor.needed,
            long_work=True,
            check=check,
        ):
            trained[silo] = {"examples": reply.examples, "tokens": dict(reply.tokens)}
            self.conductor.tell("train", "silo", silo=silo, examples=reply.examples)
        return {name: trained[name] for name in self.plan.names if name in trained}

    def _sum_open(self) -> tuple[str, ...]:
        """Collect every silo's contribution and fold it in, in roster order."""
        spool, pieces = Spool(self.conductor.place("spool")), self.form.pieces(self.piece_bytes)
        survivors = tuple(self.conductor.step("upload", lambda: self._upload(spool, tuple(self.trained))))
        if not all(spool.has(name, number) for name in survivors for number in range(len(pieces))):
            survivors = tuple(self._upload(spool, survivors))  # an interrupted run's disk lost some
            self.conductor.keep("upload", list(survivors))
        for name in survivors:
            about = self.trained[name]
            contribution = Spooled(spool, name, pieces, about["examples"], about["tokens"])
            self.accumulator.fold(contribution, f"silo {name!r}", silo=name)
        return survivors

    def _upload(self, spool: Spool, silos: tuple[str, ...]) -> list[str]:
        pieces = self.form.pieces(self.piece_bytes)
        requests = {
            name: [
                UploadRequest(**self.conductor.about, piece=number, piece_bytes=self.piece_bytes)
                for number in range(len(pieces))
                if not spool.has(name, number)
            ]
            for name in silos
            if name in self.conductor.nodes
        }

        def check(silo: str, request: UploadRequest, reply: UploadReply) -> None:
            if reply.piece != request.piece:
                raise FederationError(f"silo {silo!r} sent piece {reply.piece}; expected piece {request.piece}")
            check_slices(pieces[reply.piece], reply.arrays, f"silo {silo!r}", self.form.dtype)

        complete = [name for name in silos if name not in requests and spool.has(name, len(pieces) - 1)]
        for silo, _, reply in self.conductor.ask(
            UploadReply, requests, in_flight=UPLOADS, needed=self.conductor.needed - len(complete), check=check
        ):
            with self.conductor.run.writing():
                spool.save(silo, reply.piece, reply.arrays)
            self.conductor.tell("upload", "silo", silo=silo, piece=reply.piece + 1, pieces=len(pieces))
        return [name for name in silos if all(spool.has(name, number) for number in range(len(pieces)))]

    def _sum_masked(self, secure: SecureSums) -> tuple[str, ...]:
        """Sum the silos' contributions under masks."""
        secure.prepare()
        words, survivors = secure.statistics(self.form.sum_entries, self.form.digest)
        self.accumulator.load(words, len(self.plan.silo))
        return survivors

    def _traffic(self, traffic: Mapping[str, Mapping[str, int]]) -> Traffic:
        """Return traffic by silo, without nodes that did not join as one."""
        return {name: dict(traffic[name]) for name in self.plan.names if name in traffic}
