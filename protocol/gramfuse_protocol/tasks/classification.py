"""Classification: exactly one of several labels for each example.

The sums are (1 + 1 + 10 + labels²,): n; the negative log-likelihood of the true labels, each at most LOSS; for each of
ten bins of equal width of the model's confidence, hits minus confidence; and the confusion matrix, row by row, in which
rows are the truth, columns the prediction.

Metrics: `accuracy`, `macro-f1` (mean F1 over the labels that occur in truth or prediction), `mcc` (Matthews
correlation coefficient; 0 if truth or prediction is a single label), `nll` (mean negative log-likelihood) and `ece`
(expected calibration error: Guo et al., "On calibration of modern neural networks", ICML 2017).

| group | share | row entries | sensitivity Δ (L2) |
|---|---|---|---|
| outcome | 2/5 | correct, wrong | √2 |
| calibration | 1/5 | loss / LOSS; for each bin, hit minus confidence | √5 |
| labels | 2/5 | for each label: true positive, false positive, false negative | 2 |

In `outcome`, replacing an example changes both counts by at most 1: L2 √2. In `calibration`, the loss changes by at
most 1, and one bin by at most 2 or two bins by at most 1 each: √(1 + 4). In `labels`, a row has one 1 (a true positive)
or two (a false positive of one label, a false negative of another): ‖u‖² ≤ 2, so two rows differ by at most √4. The
whole confusion matrix is never released: all metrics follow from these counts, in which the noise of F1 does not grow
with the number of labels.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gramfuse_protocol.tasks.registry import Measure, TaskKind, register
from gramfuse_protocol.tasks.rows import LABEL_COUNTS, LOSS, RowGroup, Vector, counts_of, sum_rows
from gramfuse_protocol.tasks.scores import MACRO_F1, Sums, examples_in, mean, scores_by_name, share

if TYPE_CHECKING:
    from gramfuse_protocol.contract.task import Task

BINS = 10
"""Bins of equal width of a model's confidence."""

CALIBRATION = 1 + BINS
"""Entries for loss and calibration: the loss, then one for each bin."""


@register
class Classification(TaskKind):
    """Exactly one of several labels."""

    name = "classification"
    primary = "accuracy"
    measures = {
        "accuracy": Measure("share of examples that are classified correctly"),
        "macro-f1": Measure(MACRO_F1),
        "mcc": Measure("Matthews correlation of truth and prediction, from −1 to 1; 0 is chance", (-1.0, 1.0)),
        "nll": Measure("mean negative log-likelihood of the true label; lower is better", (0.0, LOSS)),
        "ece": Measure("expected calibration error: how far confidence is from accuracy; lower is better"),
    }
    summed = (
        "their number, the loss, how far the model's confidence is from its hits, and the confusion matrix: how many "
        "held-out examples of each label got which label"
    )
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
    first_label = 2 + CALIBRATION

    def targets(self, task: Task, labels: NDArray[Any]) -> NDArray[np.float64]:
        """Return each example's label as a one-hot vector."""
        one_hot: NDArray[np.float64] = np.eye(len(task.labels))[labels]
        return one_hot

    def shape(self, task: Task) -> tuple[int, ...]:
        return (1 + CALIBRATION + len(task.labels) ** 2,)

    def counts(self, sums: Sums) -> NDArray[Any]:
        return np.delete(sums, slice(2, 1 + CALIBRATION))

    def sums(self, task: Task, *facts: Any) -> Sums:
        (answers,) = facts
        return classification_sums(answers, len(task.labels))

    def metrics(self, task: Task, sums: Sums) -> dict[str, float]:
        matrix = confusion(sums)
        scores = class_metrics(float(np.trace(matrix)), examples_in(sums), _label_counts(matrix))
        return scores | calibration_metrics(sums[1 : 1 + CALIBRATION], examples_in(sums))

    def by_label(self, task: Task, sums: Sums) -> dict[str, dict[str, float]]:
        return scores_by_name(task.labels, _label_counts(confusion(sums)))

    def groups(self, task: Task) -> tuple[RowGroup, ...]:
        outcome = "how many held-out examples the model classifies correctly, and how many wrongly"
        calibration = "the loss, and in ten bins of the model's confidence how far it is from the hits"
        return (
            RowGroup("outcome", 2, math.sqrt(2), 2 / 5, outcome),
            RowGroup("calibration", CALIBRATION, math.sqrt(5), 1 / 5, calibration),
            RowGroup("labels", 3 * len(task.labels), 2.0, 2 / 5, LABEL_COUNTS),
        )

    def rows(self, task: Task, *facts: Any) -> Vector:
        (answers,) = facts
        return class_rows(task, answers)

    def figures(self, task: Task, vector: Vector) -> dict[str, float]:
        n = max(1.0, float(vector[0] + vector[1]))
        calibration = vector[2 : 2 + CALIBRATION] * np.array([LOSS, *[1.0] * BINS])
        scores = class_metrics(float(vector[0]), n, counts_of(vector[2 + CALIBRATION :]))
        return {"examples": n} | scores | calibration_metrics(calibration, n)

    def label_figures(self, task: Task, vector: Vector) -> dict[str, dict[str, float]]:
        return scores_by_name(task.labels, counts_of(vector[2 + CALIBRATION :]))

    def moved(self, task: Task, metric: str, vector: Vector, noise: Vector) -> NDArray[np.float64] | None:
        if metric != "ece":
            return None
        n = max(1.0, float(vector[0] + vector[1]))
        total: NDArray[np.float64] = np.abs(noise[:, 3 : 2 + CALIBRATION]).sum(axis=1) / n
        return total


class Answers(NamedTuple):
    """A classifier's answers to examples: arrays of shape (examples,).

    Args:
        truth, predicted: label indices in [0, labels).
        loss: negative log-likelihood of the true label, in [0, LOSS]; NaN counts as LOSS.
        confidence: probability of the predicted label, in [0, 1]; NaN counts as 1.
    """

    truth: NDArray[Any]
    predicted: NDArray[Any]
    loss: NDArray[np.float64]
    confidence: NDArray[np.float64]

    @property
    def calibration(self) -> NDArray[np.float64]:
        """Each example's loss, and in the bin of its confidence hit minus confidence, (examples, CALIBRATION)."""
        confidence = np.clip(np.nan_to_num(self.confidence, nan=1.0), 0.0, 1.0)
        entries = np.zeros((len(self.truth), CALIBRATION))
        entries[:, 0] = np.clip(np.nan_to_num(self.loss, nan=LOSS), 0.0, LOSS)
        bins = np.minimum((confidence * BINS).astype(int), BINS - 1)
        entries[np.arange(len(bins)), 1 + bins] = (self.truth == self.predicted) - confidence
        return entries


def classification_sums(answers: Answers, labels: int) -> Sums:
    """Return the sums of a classifier's answers, float64 (1 + CALIBRATION + labels²,)."""
    matrix = np.zeros((labels, labels), np.float64)
    np.add.at(matrix, (answers.truth, answers.predicted), 1.0)
    return np.concatenate([[matrix.sum()], answers.calibration.sum(axis=0), matrix.reshape(-1)])


def confusion(sums: Sums) -> Sums:
    """Return the confusion matrix in a classifier's sums, (labels, labels): rows are the truth."""
    flat = sums[1 + CALIBRATION :]
    return flat.reshape(math.isqrt(len(flat)), -1)


def class_rows(task: Task, answers: Answers) -> Vector:
    """Return the sum of the rows of a classifier's examples."""
    truth, predicted = answers.truth, answers.predicted
    first = 2 + CALIBRATION
    rows, correct = np.zeros((len(truth), first + 3 * len(task.labels))), truth == predicted
    example = np.arange(len(truth))
    rows[:, 0], rows[:, 1] = correct, ~correct
    rows[:, 2:first] = answers.calibration / np.array([LOSS, *[1.0] * BINS])
    rows[example, first + 3 * truth] += correct
    rows[example, first + 1 + 3 * predicted] += ~correct
    rows[example, first + 2 + 3 * truth] += ~correct
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


def calibration_metrics(entries: NDArray[np.float64], n: float) -> dict[str, float]:
    """Return loss and calibration error.

    Args:
        entries: sum of `Answers.calibration`, (CALIBRATION,).
        n: number of examples.
    """
    return {"nll": float(entries[0] / n), "ece": share(float(np.abs(entries[1:]).sum()), n)}


def _label_counts(matrix: Sums) -> Sums:
    """Return true positives, predictions and true examples of each label, shape (labels, 3)."""
    return np.stack([np.diag(matrix), matrix.sum(axis=0), matrix.sum(axis=1)], axis=1)
