"""What one held-out example adds to the sum of metrics that leaves with noise, and how far that can be moved.

In a secure sum, a silo's held-out examples become one vector, the sum of a row for each example. A row is bounded
whatever the model says: predictions, losses and counts are clipped example by example, and NaN or infinity become a
fixed value. Its entries are rounded to multiples of 1 / SCALE, so that sums are exact in float64.

Neighbours are two sets of held-out examples of which one example was *replaced* by any other: its text changed, or its
label corrected. Entries of a row are 0 or above where nothing else is said, and two rows of a group then differ by
‖u − v‖² = ‖u‖² + ‖v‖² − 2⟨u, v⟩ ≤ ‖u‖² + ‖v‖². That covers an example that is added or removed too: it moves a group by
the norm of one row, which is no more than the sensitivity. (To count additions and removals only would let most of the
noise be smaller by √2, and give away more than ε where an example is changed.)

Which groups a kind of task has, of which entries, sensitivity and share of the privacy budget, and why these are the
sensitivities, its file in `gramfuse_protocol.tasks` says. Rounding moves each entry of a row by at most half a unit, so
the difference of two rows by at most 1 unit in each of d entries: √d units in L2, which
`gramfuse_protocol.held_out.noise` adds to Δ.

Examples are measured one by one: in a batch, the padding of one would depend on the length of another, and a crafted
model can make something of that.
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
    """Return how many entries a task's vector has."""
    return sum(group.size for group in groups(task))


def range_of(task: Task, metric: str) -> tuple[float, float]:
    """Return the lowest and the highest value of a metric of a task."""
    return (1.0, math.inf) if metric == "examples" else kind_of(task).measures[metric].range


def is_sum(task: Task, vector: Vector) -> bool:
    """Whether a vector can be the sum of rows of at most MOST_HELD_OUT examples, and noise.

    What a sum opens to whose masks do not cancel is far beyond; a negative count is not.
    """
    most = MOST_HELD_OUT * max(1.0, *(group.sensitivity for group in groups(task)))
    return vector.shape == (size(task),) and bool(np.isfinite(vector).all() and np.abs(vector).max() <= most)


def figures(task: Task, vector: Vector) -> dict[str, float]:
    """Turn a vector, with noise or without, into metrics: those of `gramfuse_protocol.held_out.metrics.metrics`.

    Without noise and clipping they are the same. With noise, each is clipped to its range.
    """
    found = kind_of(task).figures(task, vector)
    limits = {name: range_of(task, name) for name in found}
    return {name: min(max(value, limits[name][0]), limits[name][1]) for name, value in found.items()}


def label_figures(task: Task, vector: Vector) -> dict[str, dict[str, float]]:
    """Turn a vector into what it says of each label: as `gramfuse_protocol.held_out.metrics.by_label`."""
    return kind_of(task).label_figures(task, vector)


def label_counts(task: Task, vector: NDArray[Any]) -> NDArray[Any]:
    """Return the entries of each label or type: found, too much, missed; shape (…, labels, 3), of none elsewhere."""
    first = kind_of(task).first_label
    start = vector.shape[-1] if first is None else first
    return vector[..., start:].reshape(*vector.shape[:-1], -1, 3)
