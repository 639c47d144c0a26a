"""Heads in closed form: on the base as it is, and anew on a merged model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from gramfuse_protocol.tasks.registry import kind_of
from gramfuse_server.merging.methods.arithmetic import weighted_mean
from gramfuse_server.merging.methods.registry import (
    DIFFERENT_TASKS,
    MASKED,
    UNTRAINED,
    MethodSums,
    NotAllowed,
    Silos,
    method,
    one_of,
)

PAPER = "Fisher 1936; ridge: Hoerl & Kennard 1970; shrinkage: Chen et al., IEEE TSP 2010"

NO_CLOSED_FORM = NotAllowed(
    lambda plan: any(kind_of(task).fit is None for task in plan.tasks.values()),
    "fits a head in closed form, which the plan's task has none of; leave it out",
)

REFUSALS = (DIFFERENT_TASKS, MASKED, NO_CLOSED_FORM)


def _fit_and_measure(silos: Silos, deltas: Any, pooling: str, *, seen: bool) -> MethodSums:
    from gramfuse_server.merging.head_solvers import SOLVERS

    head = SOLVERS[silos.head_fit].fit(silos.head_sums(deltas, pooling), start=None, seen=seen)
    more = {"note": f"shrinkage {head.shrinkage:.3g}"}
    return MethodSums(silos.measure_head(deltas, head, pooling), more=more)


@method(
    name="probe",
    label="head only",
    words="a head in closed form on the features of the base model, which is not fine-tuned",
    paper=PAPER,
    options=one_of("pooling", "head", "mean", "head takes the input of the last layer, mean the mean over tokens"),
    needs=("data",),
    refusals=REFUSALS,
)
def probe(silos: Silos, pooling: Literal["head", "mean"]) -> MethodSums:
    """Measure the base model with a closed-form head: the control for all fine-tuning."""
    measured = _fit_and_measure(silos, {}, pooling, seen=False)
    return MethodSums(measured.sums, ("mean-pooled",) if pooling == "mean" else (), measured.more)


@method(
    name="refit",
    label="head fitted again",
    words="the merge, with a head fitted in closed form on its features",
    paper=PAPER,
    options=one_of(
        "body", "regmean", "simple", "regmean takes the body of the merge, simple that of the simple average"
    ),
    needs=("data",),
    refusals=(UNTRAINED, *REFUSALS),
)
def refit(silos: Silos, body: Literal["regmean", "simple"]) -> MethodSums:
    """Measure a merged model after its head was fitted again."""
    bodies: dict[str, Callable[[], Any]] = {
        "regmean": silos.merged,
        "simple": lambda: weighted_mean(*silos.parents()),
    }
    measured = _fit_and_measure(silos, bodies[body](), "head", seen=True)
    return MethodSums(measured.sums, ("simple average",) if body == "simple" else (), measured.more)
