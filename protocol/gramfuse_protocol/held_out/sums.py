"""The rows of held-out examples in a noisy secure sum of metrics, and their sensitivity.

In a secure sum, a silo's held-out examples become one vector: the sum of one row for each example. A row is bounded
whatever the model predicts: predictions, losses and counts are clipped example by example, and NaN or infinity become a
fixed value. Entries are rounded to multiples of 1 / METRICS_SCALE, so that sums are exact in float64.

Neighbours are two sets of held-out examples in which one example is *replaced* by any other: its text changed, or its
label corrected. Entries of a row are ≥ 0 unless stated otherwise, so two rows of a group differ by
‖u − v‖² = ‖u‖² + ‖v‖² − 2⟨u, v⟩ ≤ ‖u‖² + ‖v‖². This also covers adding or removing an example, which changes a group by
the norm of one row, at most the sensitivity. (Counting only additions and removals would allow √2 less noise in most
groups, but reveal more than ε when an example changes.)

Each kind of task defines its groups in its file in `gramfuse_protocol.tasks`: their entries, their sensitivities with
the reasons, and their shares of the privacy budget. Rounding changes each entry of a row by at most half a unit, so the
difference of two rows changes by at most 1 unit in each of d entries: √d units in L2, which
`gramfuse_protocol.held_out.noise` adds to Δ.

Examples are evaluated one by one: in a batch, the padding of one depends on the length of another, which a malicious
model could exploit.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gramfuse_protocol.contract.task import Task
from gramfuse_protocol.held_out.metrics import MOST_HELD_OUT
from gramfuse_protocol.tasks.registry import SHARE, kind_of
from gramfuse_protocol.tasks.rows import LOSS, RowGroup, Vector

__all__ = [
    "LOSS",
    "SHARE",
    "RowGroup",
    "Vector",
    "figures",
    "groups",
    "is_sum",
    "label_counts",
    "label_figures",
    "range_of",
    "size",
]


def groups(task: Task) -> tuple[RowGroup, ...]:
    """Return the groups of a task's vector, in order."""
    return kind_of(task).groups(task)


def size(task: Task) -> int:
    """Return the number of entries of a task's vector."""
    return sum(group.size for group in groups(task))


def range_of(task: Task, metric: str) -> tuple[float, float]:
    """Return the lowest and the highest value of a metric of a task."""
    return (1.0, math.inf) if metric == "examples" else kind_of(task).measures[metric].range


def is_sum(task: Task, vector: Vector) -> bool:
    """Return whether a vector can be the noisy sum of rows of at most MOST_HELD_OUT examples.

    A sum whose masks do not cancel is far out of range. Negative counts are valid: noise can cause them.
    """
    most = MOST_HELD_OUT * max(1.0, *(group.sensitivity for group in groups(task)))
    return vector.shape == (size(task),) and bool(np.isfinite(vector).all() and np.abs(vector).max() <= most)


def figures(task: Task, vector: Vector) -> dict[str, float]:
    """Compute the metrics of `gramfuse_protocol.held_out.metrics.metrics` from a vector, with or without noise.

    Each metric is clipped to its range. Without noise and clipping, the results are the same.
    """
    values = kind_of(task).figures(task, vector)
    limits = {name: range_of(task, name) for name in values}
    return {name: min(max(value, limits[name][0]), limits[name][1]) for name, value in values.items()}


def label_figures(task: Task, vector: Vector) -> dict[str, dict[str, float]]:
    """Compute scores for each label from a vector, as `gramfuse_protocol.held_out.metrics.by_label` does."""
    return kind_of(task).label_figures(task, vector)


def label_counts(task: Task, vector: NDArray[Any]) -> NDArray[Any]:
    """Return (true positives, false positives, false negatives) of each label or entity type.

    Args:
        vector: (…, entries).

    Returns:
        (…, labels, 3); without labels (…, 0, 3).
    """
    first = kind_of(task).first_label
    start = vector.shape[-1] if first is None else first
    return vector[..., start:].reshape(*vector.shape[:-1], -1, 3)
