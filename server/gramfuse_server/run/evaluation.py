"""Has the silos measure models on their held-out examples, and adds up what the plan lets them say."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from gramfuse_protocol.contract.layout import Layout
from gramfuse_protocol.contract.plan import Plan
from gramfuse_protocol.contract.task import Task
from gramfuse_protocol.errors import FederationError, SecurityError
from gramfuse_protocol.held_out.metrics import Sums, are_sums, by_label, metrics, primary, sums_shape
from gramfuse_protocol.held_out.sums import Vector, figures, is_sum, label_figures, size
from gramfuse_protocol.messages.phases import EvaluateReply, EvaluateRequest
from gramfuse_protocol.secure_sum.fixed_point import decode
from gramfuse_protocol.secure_sum.scales import METRICS_SCALE
from gramfuse_protocol.secure_sum.statements import metrics_context, model_digest
from gramfuse_server.report.intervals import with_intervals
from gramfuse_server.report.schema import LabelFigures, Labels, Measured
from gramfuse_server.run.conductor import Conductor
from gramfuse_server.run.secure_sums import SecureSums


class Candidate(NamedTuple):
    """A model to be measured: its name, and its differences from the base, float32 by block name."""

    name: str
    arrays: Mapping[str, NDArray[np.float32]]


class Evaluation:
    """One evaluation of several models by the same silos.

    Args:
        layout: the plan's.
        secure: takes the metrics as a secure sum, if the plan has one and shows metrics as a sum only.

    Attributes:
        silos: those that what was measured is of, in roster order.
    """

    def __init__(self, conductor: Conductor, layout: Layout, secure: SecureSums | None) -> None:
        self.conductor = conductor
        self.layout = layout
        self.plan = conductor.plan
        self.secure = secure if self.plan.privacy.metrics == "sum" else None
        self.in_the_clear = self.secure is None and self.plan.privacy.metrics != "none"
        self.silos: tuple[str, ...] = ()

    def measure(self, candidates: Iterable[Candidate], survivors: tuple[str, ...]) -> list[Measured]:
        """Return what is to be reported of each model (`described`).

        Args:
            survivors: the silos whose contributions are in the merge.

        Raises:
            GramfuseError: if fewer silos answer than the plan asks for.
        """
        digests: dict[str, str] = {}
        found: dict[str, dict[str, Sums]] = {}
        with self.conductor.phase("evaluate"):
            for candidate in candidates:
                digests[candidate.name], found[candidate.name] = self._ask(candidate)
                self.conductor.tell("evaluate", "measured", name=candidate.name)
        if self.secure is not None:
            return self._summed({name: digests[name] for name in self.plan.privacy.candidates}, survivors)
        # A silo that was lost half-way would be in the metrics of some models only.
        self.silos = tuple(silo for silo in self.conductor.nodes if all(silo in by for by in found.values()))
        results = {name: {silo: by[silo] for silo in self.silos} for name, by in found.items()}
        return [described(self.plan, name, name, by) for name, by in results.items()]

    def hand_over(self, merged: Candidate) -> None:
        """Bring the merged model to the silos under a plan that lets no metrics leave.

        Those that keep their heads need its body, and all need it to go on from in another round.

        Raises:
            GramfuseError: if fewer silos answer than the plan asks for.
        """
        with self.conductor.phase("evaluate"):
            self._ask(merged)

    def _ask(self, candidate: Candidate) -> tuple[str, dict[str, Sums]]:
        """Return a model's digest, and the sums of each silo that may tell them."""
        request = EvaluateRequest(**self.conductor.about, candidate=candidate.name, arrays=candidate.arrays)
        requests = {silo: [request] for silo in self.conductor.nodes}
        replies = self.conductor.ask(
            EvaluateReply, requests, needed=self.plan.minimum_survivors, long_work=True, check=self._check
        )
        digest = model_digest(candidate.arrays[piece.name] for piece in self.layout.deltas)
        return digest, {silo: reply.arrays["sums"] for silo, _, reply in replies if self.in_the_clear}

    def _check(self, silo: str, request: EvaluateRequest, reply: EvaluateReply) -> None:
        name, found = request.candidate, reply.arrays.get("sums")
        if not self.in_the_clear:
            if reply.candidate != name or reply.arrays:
                allowed = "has them summed" if self.secure else "lets none leave"
                raise FederationError(f"silo {silo!r} sent metrics of {name!r} in the clear; the plan {allowed}")
            return
        task = self.plan.task_of(silo)
        if reply.candidate != name or found is None or found.shape != sums_shape(task):
            raise FederationError(
                f"silo {silo!r} sent metrics of {reply.candidate!r} that do not fit; expected float64 sums of "
                f"shape {sums_shape(task)} of {name!r}"
            )
        if not are_sums(task, found):
            raise FederationError(f"silo {silo!r} sent metrics of {name!r} that are no sums over examples")

    def _summed(self, digests: Mapping[str, str], survivors: tuple[str, ...]) -> list[Measured]:
        """Return what is to be reported of each model, from the secure sum."""
        assert self.secure is not None  # noqa: S101
        (task,) = self.plan.tasks.values()
        entries = size(task) * len(digests)
        words, self.silos = self.secure.metrics(survivors, tuple(digests), entries, metrics_context(digests))
        values = decode(words, METRICS_SCALE).reshape(len(digests), -1)
        if not all(is_sum(task, total) for total in values):
            raise SecurityError(
                "what the sum of the metrics opened to is no sum over examples: the silos did not measure the same "
                "models, or one of them sent what it did not measure. The report names the silos that were lost"
            )
        return [
            _from_vector(self.plan, name, task, total, len(self.silos))
            for name, total in zip(digests, values, strict=True)
        ]


def _from_vector(plan: Plan, name: str, task: Task, vector: Vector, silos: int) -> Measured:
    """Return what a report says of a model whose sum left as a secure one; with noise, also what is known of it."""
    if plan.epsilon is not None:
        return with_intervals(plan, name, task, vector, silos)
    model = Measured(name=name, kind=name, metrics=figures(task, vector))
    labels = label_figures(task, vector)
    return model.updated(labels=_labels({"": labels})) if labels else model


def described(plan: Plan, name: str, kind: str, by: Mapping[str, Sums]) -> Measured:
    """Return what a report says of a model.

    Args:
        name, kind: of the model.
        by: held-out sums by silo.

    Returns:
        Its `metrics`, over the examples of all silos together; if silos have different tasks, also `tasks`; if there
        are tasks with labels, `labels`; if the plan shows metrics silo by silo, `silos`.
    """
    joint: dict[str, Sums] = {}
    for task_name in plan.tasks:
        theirs = [sums for silo, sums in by.items() if not plan.task or _task_name(plan, silo) == task_name]
        if theirs:
            joint[task_name] = np.sum(theirs, axis=0)
    model = _described(plan, name, kind, joint)
    if plan.privacy.metrics == "silo":
        return model.updated(silos={silo: metrics(plan.task_of(silo), sums) for silo, sums in by.items()})
    return model


def _described(plan: Plan, name: str, kind: str, joint: Mapping[str, Sums]) -> Measured:
    """Return what `described` does of all silos together, from their sums by task."""
    found = {task_name: metrics(plan.tasks[task_name], sums) for task_name, sums in joint.items()}
    if plan.task:
        scores = [of[primary(plan.tasks[task_name].task)] for task_name, of in found.items()]
        examples = sum(of["examples"] for of in found.values())
        together = {"examples": examples, "mean-score": sum(scores) / len(scores)}
        model = Measured(name=name, kind=kind, metrics=together, tasks=found)
    else:
        model = Measured(name=name, kind=kind, metrics=found[""])
    labels = {task_name: by_label(plan.tasks[task_name], sums) for task_name, sums in joint.items()}
    if any(labels.values()):
        return model.updated(labels=_labels({task_name: of for task_name, of in labels.items() if of}))
    return model


def _labels(found: Mapping[str, Mapping[str, Mapping[str, float]]]) -> Labels:
    return {task: {label: LabelFigures.read(of) for label, of in labels.items()} for task, labels in found.items()}


def of_silos(plan: Plan, found: Mapping[str, Mapping[str, Sums]]) -> list[Measured]:
    """Return what a report says of the silos' own models.

    Where silos keep their heads, each is a `body` under every silo's own head, and `alone` are all silos' own models,
    each on its own examples.

    Args:
        found: held-out sums, by whose model it is and by silo.
    """
    if plan.model.head != "own":
        return [described(plan, name, "silo", by) for name, by in found.items()]
    bodies = [described(plan, name, "body", by) for name, by in found.items()]
    return [*bodies, described(plan, "alone", "alone", {silo: by[silo] for silo, by in found.items()})]


def ranked_by(plan: Plan) -> str:
    """Return which of the `metrics` of `described` ranks models: the higher, the better."""
    return "mean-score" if plan.task else primary(plan.task_of(plan.names[0]).task)


def _task_name(plan: Plan, silo: str) -> str | None:
    return next(entry.task for entry in plan.silo if entry.name == silo)
