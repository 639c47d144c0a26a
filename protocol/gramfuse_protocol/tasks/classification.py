"""One label of several for each example.

The sums are the confusion matrix, shape (labels, labels): rows are the truth, columns the prediction.

Metrics: `accuracy`, `macro-f1` (mean F1 over the labels that occur in the truth or among the predictions) and `mcc`
(Matthews' correlation; 0 if truth or prediction is one label only).

| group | share | entries of a row | sensitivity Δ (L2) |
|---|---|---|---|
| outcome | 1/2 | right, wrong | √2 |
| labels | 1/2 | for each label: found, predicted too much, missed | 2 |

An example is one cell of the confusion matrix; replaced, it moves two counts by 1 each (L1 2, L2 √2), and so are right
and wrong. In `labels` a row has one 1 (found) or two (too much at one label, missed at another): ‖u‖² ≤ 2, so two
differ by at most √4. The whole confusion matrix is never released: no metric of a report needs more than these counts,
and in them the noise of F1 does not grow with the number of labels.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gramfuse_protocol.tasks.registry import Measure, TaskKind, register
from gramfuse_protocol.tasks.rows import OF_LABELS, RowGroup, Vector, added, counts_of
from gramfuse_protocol.tasks.scores import MACRO_F1, Sums, examples_in, mean, of_names, share

if TYPE_CHECKING:
    from gramfuse_protocol.contract.task import Task


@register
class Classification(TaskKind):
    """One label of several."""

    name = "classification"
    primary = "accuracy"
    measures = {
        "accuracy": Measure("share of examples that are right"),
        "macro-f1": Measure(MACRO_F1),
        "mcc": Measure("Matthews' correlation of truth and prediction, from −1 to 1; 0 is chance", (-1.0, 1.0)),
    }
    summed = "how many held-out examples of each label got which label"
    least_labels = 2
    partial_labels = True
    exclusive = True
    options = frozenset({"pair"})
    first_label = 2

    def shape(self, task: Task) -> tuple[int, ...]:
        return (len(task.labels), len(task.labels))

    def sums(self, task: Task, *facts: Any) -> Sums:
        truth, predicted = facts
        return classification_sums(truth, predicted, len(task.labels))

    def metrics(self, task: Task, sums: Sums) -> dict[str, float]:
        return of_classes(float(np.trace(sums)), examples_in(sums), _of_confusion(sums))

    def by_label(self, task: Task, sums: Sums) -> dict[str, dict[str, float]]:
        return of_names(task.labels, _of_confusion(sums))

    def groups(self, task: Task) -> tuple[RowGroup, ...]:
        outcome = "how many held-out examples the model is right about, and how many wrong"
        return (
            RowGroup("outcome", 2, math.sqrt(2), 1 / 2, outcome),
            RowGroup("labels", 3 * len(task.labels), 2.0, 1 / 2, OF_LABELS),
        )

    def rows(self, task: Task, *facts: Any) -> Vector:
        return class_rows(task, *facts)

    def figures(self, task: Task, vector: Vector) -> dict[str, float]:
        n = max(1.0, float(vector[0] + vector[1]))
        return {"examples": n} | of_classes(float(vector[0]), n, counts_of(vector[2:]))

    def label_figures(self, task: Task, vector: Vector) -> dict[str, dict[str, float]]:
        return of_names(task.labels, counts_of(vector[2:]))


def classification_sums(truth: NDArray[Any], predicted: NDArray[Any], labels: int) -> Sums:
    """Count (truth, prediction) pairs.

    Args:
        truth, predicted: label indices, shape (examples,), each in [0, labels).
    """
    sums = np.zeros((labels, labels), np.float64)
    np.add.at(sums, (truth, predicted), 1.0)
    return sums


def class_rows(task: Task, truth: NDArray[Any], predicted: NDArray[Any]) -> Vector:
    """Return the sum of the rows of a classifier's examples.

    Args:
        truth, predicted: label indices, shape (examples,).
    """
    rows, right, each = np.zeros((len(truth), 2 + 3 * len(task.labels))), truth == predicted, np.arange(len(truth))
    rows[:, 0], rows[:, 1] = right, ~right
    rows[each, 2 + 3 * truth] += right
    rows[each, 3 + 3 * predicted] += ~right
    rows[each, 4 + 3 * truth] += ~right
    return added(rows)


def of_classes(right: float, n: float, counts: Sums) -> dict[str, float]:
    """Return the metrics of a classifier, but for the number of examples.

    Args:
        right: examples whose label was found, of n.
        counts: how often each label was found, predicted, and true: shape (labels, 3).
    """
    hits, predicted, truth = counts.T
    seen = truth + predicted > 0
    f1 = np.clip(2 * hits[seen] / (truth + predicted)[seen], 0.0, 1.0)
    squares = n * n - truth @ truth, n * n - predicted @ predicted
    mcc = (right * n - truth @ predicted) / math.sqrt(squares[0] * squares[1]) if min(squares) > 0 else 0.0
    return {"accuracy": share(right, n), "macro-f1": mean(f1.tolist()), "mcc": min(1.0, max(-1.0, float(mcc)))}


def _of_confusion(sums: Sums) -> Sums:
    """Return how often each label was found, predicted, and true: shape (labels, 3)."""
    return np.stack([np.diag(sums), sums.sum(axis=0), sums.sum(axis=1)], axis=1)
