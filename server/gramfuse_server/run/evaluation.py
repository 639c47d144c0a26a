"""Has the silos measure models on their held-out examples, and sums the metrics that the plan lets leave."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from gramfuse_protocol.contract.layout import Layout
from gramfuse_protocol.contract.plan import Plan
from gramfuse_protocol.contract.task import Task
from gramfuse_protocol.contract.whole_model import with_zeros, without_zeros
from gramfuse_protocol.errors import FederationError, SecurityError
from gramfuse_protocol.held_out.metrics import Sums, are_sums, by_label, examples_in, metrics, primary, sums_shape
from gramfuse_protocol.held_out.sums import Vector, figures, is_sum, label_figures, size
from gramfuse_protocol.messages.phases import EvaluateReply, EvaluateRequest
from gramfuse_protocol.secure_sum.fixed_point import decode
from gramfuse_protocol.secure_sum.scales import METRICS_SCALE
from gramfuse_protocol.secure_sum.statements import metrics_context, model_digest
from gramfuse_server.report.intervals import with_intervals
from gramfuse_server.report.schema import LabelFigures, Labels, Measured
from gramfuse_server.run.conductor import Conductor
from gramfuse_server.run.secure_sums import SecureSums


class NamedModel(NamedTuple):
    """A model to be measured: its name, and its differences from the base, float32 by block name."""

    name: str
    arrays: Mapping[str, NDArray[np.float32]]


class Evaluation:
    """One evaluation of several models by the same silos.

    Args:
        layout: the plan's.
        secure: the secure sums, used for metrics if the plan shows them as a sum only; None in open mode.
        start: digest of the model that the session started from; empty in the first.

    Attributes:
        silos: those whose held-out examples were measured, in roster order.
    """

    def __init__(self, conductor: Conductor, layout: Layout, secure: SecureSums | None, start: str) -> None:
        self.conductor = conductor
        self.stage = conductor.stage
        self.start = start
        self.layout = layout
        self.plan = conductor.plan
        measures = bool(self.stage.measured)
        self.secure = secure if self.plan.privacy.metrics == "sum" else None
        self.in_the_clear = measures and self.secure is None
        self.silos: tuple[str, ...] = ()

    def measure(self, candidates: Iterable[NamedModel], survivors: tuple[str, ...]) -> list[Measured]:
        """Return the report's entry for each result of the stage (`to_measured`), in order.

        Those on validation examples are missing if no silo has any.

        Args:
            candidates: the models that the stage measures; the one that it ends with comes last.
            survivors: the silos whose contributions are in the merge.

        Raises:
            GramfuseError: if fewer silos answer than the plan requires.
        """
        digests: dict[str, str] = {}
        sums: dict[str, dict[str, Sums]] = {}
        results, judgements = self.stage.results, self.stage.judgements
        with self.conductor.phase("evaluate"):
            for candidate in candidates:
                digests[candidate.name], sums[candidate.name], judged = self._ask(candidate)
                for place, name in enumerate(judgements):
                    sums[name] = {silo: both[place] for silo, both in judged.items()}
                self.conductor.tell("evaluate", "measured", name=candidate.name)
        if self.stage.judged:
            digests |= zip(judgements, (self.start, digests[self.stage.merged]), strict=True)
        if self.secure is not None:
            return self._summed({name: digests[name] for name in results}, survivors)
        # A silo that was lost midway would be in the metrics of some models only.
        self.silos = tuple(silo for silo in self.conductor.nodes if all(silo in sums[name] for name in results))
        complete = {name: {silo: sums[name][silo] for silo in self.silos} for name in results}
        for name in judgements:
            complete[name] = {silo: own for silo, own in complete[name].items() if examples_in(own)}
        return [to_measured(self.plan, name, name, by_silo) for name, by_silo in complete.items() if by_silo]

    def hand_over(self, merged: NamedModel) -> None:
        """Send the merged model to the silos in a session that measures none.

        Silos that keep their heads need its body, and all need it as the start of another session.

        Raises:
            GramfuseError: if fewer silos answer than the plan requires.
        """
        with self.conductor.phase("evaluate"):
            self._ask(merged)

    def _ask(self, candidate: NamedModel) -> tuple[str, dict[str, Sums], dict[str, Sums]]:
        """Return a model's digest, and by silo the sums, and those on validation examples, that leave in the clear."""
        arrays = without_zeros(candidate.arrays)
        request = EvaluateRequest(**self.conductor.about, candidate=candidate.name, arrays=arrays)
        requests = {silo: [request] for silo in self.conductor.nodes}
        replies = self.conductor.ask(
            EvaluateReply, requests, needed=self.plan.minimum_survivors, long_work=True, check=self._check
        )
        whole = with_zeros(self.layout, arrays)  # as silos have it: zeros have no sign
        digest = model_digest(whole[piece.name] for piece in self.layout.deltas)
        arrays_of = {silo: reply.arrays for silo, _, reply in replies if self.in_the_clear}
        judged = {silo: sums["judged"] for silo, sums in arrays_of.items() if "judged" in sums}
        return digest, {silo: sums["sums"] for silo, sums in arrays_of.items()}, judged

    def _check(self, silo: str, request: EvaluateRequest, reply: EvaluateReply) -> None:
        name, sums = request.candidate, reply.arrays.get("sums")
        if not self.in_the_clear:
            if reply.candidate != name or reply.arrays:
                allowed = "only allows a secure sum" if self.secure else "lets none leave now"
                raise FederationError(f"silo {silo!r} sent metrics of {name!r} in the clear; the plan {allowed}")
            return
        task, judged = self.plan.task_of(silo), reply.arrays.get("judged")
        shape = sums_shape(task)
        both = (len(self.stage.judged), *shape) if self.stage.judged and name == self.stage.merged else None
        if reply.candidate != name or sums is None or sums.shape != shape or (judged is None) != (both is None):
            raise FederationError(
                f"silo {silo!r} sent metrics of {reply.candidate!r} that do not fit; expected float64 sums of "
                f"shape {shape} of {name!r}{'' if both is None else ', and its results on validation examples'}"
            )
        if judged is not None and judged.shape != both:
            raise FederationError(f"silo {silo!r} sent results on validation examples of another shape than {both}")
        of_some = [] if judged is None else [each for each in judged if each.any()]
        if not all(are_sums(task, each) for each in (sums, *of_some)):
            raise FederationError(f"silo {silo!r} sent metrics of {name!r} that cannot be sums over examples")

    def _summed(self, digests: Mapping[str, str], survivors: tuple[str, ...]) -> list[Measured]:
        """Return the report's entry for each model, from the secure sum."""
        assert self.secure is not None  # noqa: S101
        (task,) = self.plan.tasks.values()
        entries = size(task) * len(digests)
        words, self.silos = self.secure.metrics(survivors, tuple(digests), entries, metrics_context(digests))
        values = decode(words, METRICS_SCALE).reshape(len(digests), -1)
        if not all(is_sum(task, total) for total in values):
            raise SecurityError(
                "the unmasked sum of the metrics cannot be a sum over examples: the silos measured different models, "
                "or one of them sent a forged vector. The report names the silos that were lost"
            )
        return [
            _from_vector(self.plan, name, task, total, len(self.silos))
            for name, total in zip(digests, values, strict=True)
            if total.any()
        ]


def _from_vector(plan: Plan, name: str, task: Task, vector: Vector, silos: int) -> Measured:
    """Return the report's entry for a model from its secure sum; with noise, including intervals."""
    if plan.epsilon is not None:
        return with_intervals(plan, name, task, vector, silos)
    model = Measured(name=name, kind=name, metrics=figures(task, vector))
    labels = label_figures(task, vector)
    return model.updated(labels=_labels({"": labels})) if labels else model


def to_measured(plan: Plan, name: str, kind: str, by_silo: Mapping[str, Sums]) -> Measured:
    """Return the report's entry for a model.

    Args:
        name, kind: of the model.
        by_silo: held-out sums by silo.

    Returns:
        `metrics` over the examples of all silos together; `tasks` if silos have different tasks; `labels` for tasks
        with labels; `silos` if the plan shows metrics by silo.
    """
    joint: dict[str, Sums] = {}
    for task_name in plan.tasks:
        theirs = [sums for silo, sums in by_silo.items() if not plan.task or _task_name(plan, silo) == task_name]
        if theirs:
            joint[task_name] = np.sum(theirs, axis=0)
    model = _joint_entry(plan, name, kind, joint)
    if plan.privacy.metrics == "silo":
        return model.updated(silos={silo: metrics(plan.task_of(silo), sums) for silo, sums in by_silo.items()})
    return model


def _joint_entry(plan: Plan, name: str, kind: str, joint: Mapping[str, Sums]) -> Measured:
    """Return the entry of `to_measured` for all silos together, from their sums by task."""
    by_task = {task_name: metrics(plan.tasks[task_name], sums) for task_name, sums in joint.items()}
    if plan.task:
        scores = [figures[primary(plan.tasks[task_name].task)] for task_name, figures in by_task.items()]
        examples = sum(figures["examples"] for figures in by_task.values())
        together = {"examples": examples, "mean-score": sum(scores) / len(scores)}
        model = Measured(name=name, kind=kind, metrics=together, tasks=by_task)
    else:
        model = Measured(name=name, kind=kind, metrics=by_task[""])
    labels = {task_name: by_label(plan.tasks[task_name], sums) for task_name, sums in joint.items()}
    if any(labels.values()):
        return model.updated(labels=_labels({task_name: figures for task_name, figures in labels.items() if figures}))
    return model


def _labels(by_task: Mapping[str, Mapping[str, Mapping[str, float]]]) -> Labels:
    return {
        task: {label: LabelFigures.read(figures) for label, figures in labels.items()}
        for task, labels in by_task.items()
    }


def silo_models(plan: Plan, sums: Mapping[str, Mapping[str, Sums]]) -> list[Measured]:
    """Return the report's entries for the silos' own models.

    If silos keep their heads, each `body` is measured with every silo's own head, and `alone` combines all silos' own
    models, each on its own examples.

    Args:
        sums: held-out sums, by the silo that owns the model, then by the silo that measured it.
    """
    if plan.model.head != "own":
        return [to_measured(plan, name, "silo", by_silo) for name, by_silo in sums.items()]
    bodies = [to_measured(plan, name, "body", by_silo) for name, by_silo in sums.items()]
    return [*bodies, to_measured(plan, "alone", "alone", {silo: by_silo[silo] for silo, by_silo in sums.items()})]


def ranked_by(plan: Plan) -> str:
    """Return the metric that ranks models, one of the `metrics` of `to_measured`; higher is better."""
    return "mean-score" if plan.task else primary(plan.task_of(plan.names[0]).task)


def _task_name(plan: Plan, silo: str) -> str | None:
    return next(entry.task for entry in plan.silo if entry.name == silo)
