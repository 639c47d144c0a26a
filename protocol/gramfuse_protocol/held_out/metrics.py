"""Held-out metrics as sums that add up over silos.

A silo turns its predictions into one small float64 array; the arrays of several silos are added, and only the
sum is turned into numbers. So a joint metric over all silos is exact, and no single prediction leaves a silo.

What the sums of a kind of task are, and its metrics, its file in `gramfuse_protocol.tasks` says.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from gramfuse_protocol.contract.task import Task
from gramfuse_protocol.tasks.registry import KINDS, kind_of
from gramfuse_protocol.tasks.scores import Sums, examples_in

__all__ = ["MOST_HELD_OUT", "Sums", "are_sums", "by_label", "examples_in", "metrics", "primary", "sums_shape"]

MOST_HELD_OUT = 2**30
"""More held-out examples than this are none: what a sum opens to whose masks do not cancel is far beyond."""


def primary(kind: str) -> str:
    """Return the name of the metric that models of a kind of task are ranked by; higher is better."""
    return KINDS[kind].primary


def sums_shape(task: Task) -> tuple[int, ...]:
    """Return the shape of the sums of a task."""
    return kind_of(task).shape(task)


def are_sums(task: Task, sums: NDArray[Any]) -> bool:
    """Whether an array can be the sums of 1 to MOST_HELD_OUT examples: shape, dtype, and values in their range."""
    if sums.dtype != np.float64 or sums.shape != sums_shape(task) or not np.isfinite(sums).all():
        return False
    return bool(kind_of(task).counts(sums).min() >= 0) and 1 <= examples_in(sums) <= MOST_HELD_OUT


def metrics(task: Task, sums: Sums) -> dict[str, float]:
    """Turn added sums, of one example at least, into metrics: `examples`, and what the kind of task has."""
    return {"examples": examples_in(sums)} | kind_of(task).metrics(task, sums)


def by_label(task: Task, sums: Sums) -> dict[str, dict[str, float]]:
    """Turn added sums into what they say of each label, or of each type of entity.

    Returns:
        By label, in the task's order: `examples` (how often it is in the truth), `precision` (0 of what was never
        predicted), `recall` (0 of what is never true) and `f1`. A label that is neither true nor predicted is left
        out. Empty for tasks without labels.
    """
    return kind_of(task).by_label(task, sums)
