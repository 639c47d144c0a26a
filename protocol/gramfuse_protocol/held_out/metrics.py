"""Held-out metrics from sums over silos.

A silo reduces its predictions to one small float64 array. The silos' arrays are added, and metrics are computed from
the total. So a joint metric over all silos is exact, and no single prediction leaves a silo.

Each kind of task defines its sums and metrics in its file in `gramfuse_protocol.tasks`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from gramfuse_protocol.contract.task import Task
from gramfuse_protocol.tasks.registry import TASK_KINDS, kind_of
from gramfuse_protocol.tasks.scores import Sums, examples_in

__all__ = ["MOST_HELD_OUT", "Sums", "are_sums", "by_label", "examples_in", "metrics", "primary", "sums_shape"]

MOST_HELD_OUT = 2**30
"""Maximum number of held-out examples; a sum whose masks do not cancel is far above it."""


def primary(kind: str) -> str:
    """Return the name of the metric that ranks models of a kind of task; higher is better."""
    return TASK_KINDS[kind].primary


def sums_shape(task: Task) -> tuple[int, ...]:
    """Return the shape of a task's sums."""
    return kind_of(task).shape(task)


def are_sums(task: Task, sums: NDArray[Any]) -> bool:
    """Return whether an array can be the sums of 1 to MOST_HELD_OUT examples, by shape, dtype and range of values."""
    if sums.dtype != np.float64 or sums.shape != sums_shape(task) or not np.isfinite(sums).all():
        return False
    return bool(kind_of(task).counts(sums).min() >= 0) and 1 <= examples_in(sums) <= MOST_HELD_OUT


def metrics(task: Task, sums: Sums) -> dict[str, float]:
    """Compute metrics from added sums of at least one example: `examples`, and the metrics of the kind of task."""
    return {"examples": examples_in(sums)} | kind_of(task).metrics(task, sums)


def by_label(task: Task, sums: Sums) -> dict[str, dict[str, float]]:
    """Compute scores for each label, or each entity type, from added sums.

    Returns:
        By label, in the task's order: `examples` (number of true examples), `precision` (0 if never predicted),
        `recall` (0 if never true) and `f1`. Omits labels that are neither true nor predicted. Empty for tasks without
        labels.
    """
    return kind_of(task).by_label(task, sums)
