"""Any number of labels for each example.

The sums are (1 + 4·labels,): n, then for each label true positives, false positives, false negatives and true negatives
over the examples for which it is annotated.

Metrics: `macro-f1` (mean over the labels that occur in the truth) and `micro-f1`.

| group | share | entries of a row | sensitivity Δ (L2) |
|---|---|---|---|
| examples | 1/10 | 1 | 1 |
| labels | 9/10 | for each of l labels: found, predicted too much, missed | √(2l) |

At each label a row has at most one 1, so at each label two rows differ by at most √2.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gramfuse_protocol.tasks.registry import Measure, TaskKind, register
from gramfuse_protocol.tasks.rows import EXAMPLES, OF_LABELS, RowGroup, Vector, added
from gramfuse_protocol.tasks.scores import MACRO_F1, Sums, f1_of, mean, of_names

if TYPE_CHECKING:
    from gramfuse_protocol.contract.task import Task


@register
class MultiLabel(TaskKind):
    """Any number of labels."""

    name = "multi-label"
    primary = "macro-f1"
    measures = {
        "macro-f1": Measure(MACRO_F1),
        "micro-f1": Measure("F1 over the decisions about all labels together"),
    }
    summed = "how many held-out examples there are, and how many got each label rightly or wrongly, or lack it"
    least_labels = 1
    partial_labels = True
    options = frozenset({"pair"})
    first_label = 1

    def shape(self, task: Task) -> tuple[int, ...]:
        return (1 + 4 * len(task.labels),)

    def sums(self, task: Task, *facts: Any) -> Sums:
        truth, predicted = facts
        return multi_label_sums(truth, predicted, task.annotated)

    def metrics(self, task: Task, sums: Sums) -> dict[str, float]:
        return _of_labels(_decisions(sums))

    def by_label(self, task: Task, sums: Sums) -> dict[str, dict[str, float]]:
        return of_names(task.labels, _decisions(sums))

    def groups(self, task: Task) -> tuple[RowGroup, ...]:
        labels = len(task.labels)
        return EXAMPLES, RowGroup("labels", 3 * labels, math.sqrt(2 * labels), 9 / 10, OF_LABELS)

    def rows(self, task: Task, *facts: Any) -> Vector:
        return label_rows(task, *facts)

    def figures(self, task: Task, vector: Vector) -> dict[str, float]:
        return {"examples": max(1.0, float(vector[0]))} | self.metrics(task, _sums(vector))

    def label_figures(self, task: Task, vector: Vector) -> dict[str, dict[str, float]]:
        return self.by_label(task, _sums(vector))


def multi_label_sums(truth: NDArray[np.bool_], predicted: NDArray[np.bool_], annotated: Sequence[int]) -> Sums:
    """Count right and wrong decisions about each label.

    Args:
        truth, predicted: shape (examples, labels).
        annotated: indices of the labels that are counted; of the others the truth says nothing.
    """
    counts = np.zeros((truth.shape[1], 4), np.float64)
    for label in annotated:
        t, p = truth[:, label], predicted[:, label]
        counts[label] = [(t & p).sum(), (~t & p).sum(), (t & ~p).sum(), (~t & ~p).sum()]
    return np.concatenate([[float(len(truth))], counts.reshape(-1)])


def label_rows(task: Task, truth: NDArray[np.bool_], predicted: NDArray[np.bool_]) -> Vector:
    """Return the sum of the rows of examples with several labels; arguments as `multi_label_sums` has them."""
    counts = np.zeros((len(truth), len(task.labels), 3))
    for label in task.annotated:
        t, p = truth[:, label], predicted[:, label]
        counts[:, label] = np.stack([t & p, ~t & p, t & ~p], axis=1)
    return added(np.concatenate([np.ones((len(truth), 1)), counts.reshape(len(truth), -1)], axis=1))


def _sums(vector: Vector) -> Sums:
    """Return the sums that a sum of rows stands for; true negatives, which no metric needs, are 0."""
    counts = vector[1:].reshape(-1, 3)
    each = np.concatenate([counts, np.zeros((len(counts), 1))], axis=1)
    return np.concatenate([[max(1.0, float(vector[0]))], each.reshape(-1)])


def _decisions(sums: Sums) -> Sums:
    """Return how often each label was found, predicted, and true: shape (labels, 3)."""
    found, wrong, missed, _ = sums[1:].reshape(-1, 4).T
    return np.stack([found, found + wrong, found + missed], axis=1)


def _of_labels(counts: Sums) -> dict[str, float]:
    f1 = [f1_of(*row) for row in counts if row[2] > 0]
    return {"macro-f1": mean(f1), "micro-f1": f1_of(*counts.sum(axis=0))}
