"""Multi-label classification: any number of labels for each example.

The sums are (1 + 4·labels,): n, then for each label true positives, false positives, false negatives and true negatives
over the examples in which it is annotated.

Metrics: `macro-f1` (mean over the labels that occur in the truth) and `micro-f1`.

| group | share | row entries | sensitivity Δ (L2) |
|---|---|---|---|
| examples | 1/10 | 1 | 1 |
| labels | 9/10 | for each of l labels: true positive, false positive, false negative | √(2l) |

A row has at most one 1 for each label, so two rows differ by at most √2 at each label.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gramfuse_protocol.tasks.registry import Measure, TaskKind, register
from gramfuse_protocol.tasks.rows import EXAMPLES, LABEL_COUNTS, RowGroup, Vector, sum_rows
from gramfuse_protocol.tasks.scores import MACRO_F1, Sums, f1_of, mean, scores_by_name

if TYPE_CHECKING:
    from gramfuse_protocol.contract.task import Task


@register
class MultiLabel(TaskKind):
    """Any number of labels."""

    name = "multi-label"
    primary = "macro-f1"
    measures = {
        "macro-f1": Measure(MACRO_F1),
        "micro-f1": Measure("F1 over all decisions, about all labels together"),
    }
    summed = "the number of held-out examples, and for each label the numbers of true and false positives and negatives"
    least_labels = 1
    partial_labels = True
    options = frozenset({"pair"})
    first_label = 1
    fit = "labels"
    fit_says = (
        "for each label, two sums of the head's input features, with the numbers of examples in them: over its "
        "examples, and over all whose silo annotates it"
    )
    fit_tells = (
        "The sums of a head have two columns for each label. For a label that only one silo has, the first is that "
        "silo's own: the mean of its features, and how many examples it has. Where one label's examples are all among "
        "another's, the difference of two columns is about the rest of them, however few."
    )

    def columns(self, task: Task) -> int:
        return 2 * len(task.labels)

    def targets(self, task: Task, labels: NDArray[Any]) -> NDArray[np.float64]:
        """Return for each example which labels it has, and then which are annotated."""
        annotated = ~np.isnan(labels)
        return np.concatenate([np.where(annotated, labels, 0.0), annotated], axis=1).astype(np.float64)

    def shape(self, task: Task) -> tuple[int, ...]:
        return (1 + 4 * len(task.labels),)

    def sums(self, task: Task, *facts: Any) -> Sums:
        truth, predicted = facts
        return multi_label_sums(truth, predicted, task.annotated)

    def metrics(self, task: Task, sums: Sums) -> dict[str, float]:
        return _label_metrics(_label_counts(sums))

    def by_label(self, task: Task, sums: Sums) -> dict[str, dict[str, float]]:
        return scores_by_name(task.labels, _label_counts(sums))

    def groups(self, task: Task) -> tuple[RowGroup, ...]:
        labels = len(task.labels)
        return EXAMPLES, RowGroup("labels", 3 * labels, math.sqrt(2 * labels), 9 / 10, LABEL_COUNTS)

    def rows(self, task: Task, *facts: Any) -> Vector:
        return label_rows(task, *facts)

    def figures(self, task: Task, vector: Vector) -> dict[str, float]:
        return {"examples": max(1.0, float(vector[0]))} | self.metrics(task, _sums(vector))

    def label_figures(self, task: Task, vector: Vector) -> dict[str, dict[str, float]]:
        return self.by_label(task, _sums(vector))


def multi_label_sums(truth: NDArray[np.bool_], predicted: NDArray[np.bool_], annotated: Sequence[int]) -> Sums:
    """Count correct and wrong decisions about each label.

    Args:
        truth, predicted: shape (examples, labels).
        annotated: indices of the labels to count; the data say nothing about the others.
    """
    counts = np.zeros((truth.shape[1], 4), np.float64)
    for label in annotated:
        t, p = truth[:, label], predicted[:, label]
        counts[label] = [(t & p).sum(), (~t & p).sum(), (t & ~p).sum(), (~t & ~p).sum()]
    return np.concatenate([[float(len(truth))], counts.reshape(-1)])


def label_rows(task: Task, truth: NDArray[np.bool_], predicted: NDArray[np.bool_]) -> Vector:
    """Return the sum of the rows of multi-label examples; arguments as in `multi_label_sums`."""
    counts = np.zeros((len(truth), len(task.labels), 3))
    for label in task.annotated:
        t, p = truth[:, label], predicted[:, label]
        counts[:, label] = np.stack([t & p, ~t & p, t & ~p], axis=1)
    return sum_rows(np.concatenate([np.ones((len(truth), 1)), counts.reshape(len(truth), -1)], axis=1))


def _sums(vector: Vector) -> Sums:
    """Convert a sum of rows to sums; true negatives, which no metric needs, are 0."""
    counts = vector[1:].reshape(-1, 3)
    with_negatives = np.concatenate([counts, np.zeros((len(counts), 1))], axis=1)
    return np.concatenate([[max(1.0, float(vector[0]))], with_negatives.reshape(-1)])


def _label_counts(sums: Sums) -> Sums:
    """Return true positives, predictions and true examples of each label, shape (labels, 3)."""
    hits, wrong, missed, _ = sums[1:].reshape(-1, 4).T
    return np.stack([hits, hits + wrong, hits + missed], axis=1)


def _label_metrics(counts: Sums) -> dict[str, float]:
    f1 = [f1_of(*row) for row in counts if row[2] > 0]
    return {"macro-f1": mean(f1), "micro-f1": f1_of(*counts.sum(axis=0))}
