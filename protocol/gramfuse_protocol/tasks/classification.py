"""Classification: exactly one of several labels for each example.

The sums are the confusion matrix, shape (labels, labels): rows are the truth, columns the prediction.

Metrics: `accuracy`, `macro-f1` (mean F1 over the labels that occur in truth or prediction) and `mcc` (Matthews
correlation coefficient; 0 if truth or prediction is a single label).

| group | share | row entries | sensitivity Δ (L2) |
|---|---|---|---|
| outcome | 1/2 | correct, wrong | √2 |
| labels | 1/2 | for each label: true positive, false positive, false negative | 2 |

In `outcome`, replacing an example changes both counts by at most 1: L2 √2. In `labels`, a row has one 1 (a true
positive) or two (a false positive of one label, a false negative of another): ‖u‖² ≤ 2, so two rows differ by at most
√4. The whole confusion matrix is never released: all metrics follow from these counts, in which the noise of F1 does
not grow with the number of labels.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gramfuse_protocol.tasks.registry import Measure, TaskKind, register
from gramfuse_protocol.tasks.rows import LABEL_COUNTS, RowGroup, Vector, counts_of, sum_rows
from gramfuse_protocol.tasks.scores import MACRO_F1, Sums, examples_in, mean, scores_by_name, share

if TYPE_CHECKING:
    from gramfuse_protocol.contract.task import Task


@register
class Classification(TaskKind):
    """Exactly one of several labels."""

    name = "classification"
    primary = "accuracy"
    measures = {
        "accuracy": Measure("share of examples that are classified correctly"),
        "macro-f1": Measure(MACRO_F1),
        "mcc": Measure("Matthews correlation of truth and prediction, from −1 to 1; 0 is chance", (-1.0, 1.0)),
    }
    summed = "the confusion matrix: how many held-out examples of each label got which label"
    least_labels = 2
    partial_labels = True
    exclusive = True
    fit = "discriminant"
    fit_says = "for each label, the sum of the head's input features over its training examples, and their number"
    fit_tells = (
        "The sums of a head have a column for each label. For a label that only one silo has, it is that silo's own: "
        "the mean of its features, and how many examples it has."
    )
    options = frozenset({"pair"})
    first_label = 2

    def targets(self, task: Task, labels: NDArray[Any]) -> NDArray[np.float64]:
        """Return each example's label as a one-hot vector."""
        one_hot: NDArray[np.float64] = np.eye(len(task.labels))[labels]
        return one_hot

    def shape(self, task: Task) -> tuple[int, ...]:
        return (len(task.labels), len(task.labels))

    def sums(self, task: Task, *facts: Any) -> Sums:
        truth, predicted = facts
        return classification_sums(truth, predicted, len(task.labels))

    def metrics(self, task: Task, sums: Sums) -> dict[str, float]:
        return class_metrics(float(np.trace(sums)), examples_in(sums), _label_counts(sums))

    def by_label(self, task: Task, sums: Sums) -> dict[str, dict[str, float]]:
        return scores_by_name(task.labels, _label_counts(sums))

    def groups(self, task: Task) -> tuple[RowGroup, ...]:
        outcome = "how many held-out examples the model classifies correctly, and how many wrongly"
        return (
            RowGroup("outcome", 2, math.sqrt(2), 1 / 2, outcome),
            RowGroup("labels", 3 * len(task.labels), 2.0, 1 / 2, LABEL_COUNTS),
        )

    def rows(self, task: Task, *facts: Any) -> Vector:
        return class_rows(task, *facts)

    def figures(self, task: Task, vector: Vector) -> dict[str, float]:
        n = max(1.0, float(vector[0] + vector[1]))
        return {"examples": n} | class_metrics(float(vector[0]), n, counts_of(vector[2:]))

    def label_figures(self, task: Task, vector: Vector) -> dict[str, dict[str, float]]:
        return scores_by_name(task.labels, counts_of(vector[2:]))


def classification_sums(truth: NDArray[Any], predicted: NDArray[Any], labels: int) -> Sums:
    """Return the confusion matrix, float64 (labels, labels).

    Args:
        truth, predicted: label indices in [0, labels), shape (examples,).
    """
    sums = np.zeros((labels, labels), np.float64)
    np.add.at(sums, (truth, predicted), 1.0)
    return sums


def class_rows(task: Task, truth: NDArray[Any], predicted: NDArray[Any]) -> Vector:
    """Return the sum of the rows of a classifier's examples.

    Args:
        truth, predicted: label indices, shape (examples,).
    """
    rows, correct = np.zeros((len(truth), 2 + 3 * len(task.labels))), truth == predicted
    example = np.arange(len(truth))
    rows[:, 0], rows[:, 1] = correct, ~correct
    rows[example, 2 + 3 * truth] += correct
    rows[example, 3 + 3 * predicted] += ~correct
    rows[example, 4 + 3 * truth] += ~correct
    return sum_rows(rows)


def class_metrics(correct: float, n: float, counts: Sums) -> dict[str, float]:
    """Return the metrics of a classifier, without the number of examples.

    Args:
        correct: number of correctly classified examples, of n.
        counts: true positives, predictions and true examples of each label, shape (labels, 3).
    """
    hits, predicted, truth = counts.T
    occurs = truth + predicted > 0
    f1 = np.clip(2 * hits[occurs] / (truth + predicted)[occurs], 0.0, 1.0)
    squares = n * n - truth @ truth, n * n - predicted @ predicted
    mcc = (correct * n - truth @ predicted) / math.sqrt(squares[0] * squares[1]) if min(squares) > 0 else 0.0
    return {"accuracy": share(correct, n), "macro-f1": mean(f1.tolist()), "mcc": min(1.0, max(-1.0, float(mcc)))}


def _label_counts(sums: Sums) -> Sums:
    """Return true positives, predictions and true examples of each label, shape (labels, 3)."""
    return np.stack([np.diag(sums), sums.sum(axis=0), sums.sum(axis=1)], axis=1)
