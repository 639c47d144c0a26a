"""Regression: one number for each example.

The sums are (8,): n, Σt, Σp, Σt², Σp², Σtp, Σ|t−p|, Σ(t−p)² for truth t and prediction p.

Metrics: `pearson` (0 if truth or prediction has no variance), `rmse` and `mae`.

| group | share | row entries | sensitivity Δ (L2) |
|---|---|---|---|
| examples | 1/10 | 1 | 1 |
| means | 1/5 | x, y | √8 |
| squares | 3/5 | x², y², √2·xy | √8 |
| error | 1/10 | abs(x − y) / 2 | 1 |

x and y are truth and prediction, mapped from the plan's range to [−1, 1]. (x, y) lies in a square with diagonal √8.
(x², √2·xy, y²) is the outer product of (x, y) with itself; its norm is x² + y² ≤ 2, and inner products of two such
vectors are squares, so ‖u − v‖² ≤ 8.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gramfuse_protocol.tasks.registry import Measure, TaskKind, register
from gramfuse_protocol.tasks.rows import EXAMPLES, RowGroup, Vector, sum_rows
from gramfuse_protocol.tasks.scores import Sums

if TYPE_CHECKING:
    from gramfuse_protocol.contract.task import Task


@register
class Regression(TaskKind):
    """One number."""

    name = "regression"
    primary = "pearson"
    measures = {
        "pearson": Measure("correlation of truth and prediction, from −1 to 1", (-1.0, 1.0)),
        "rmse": Measure("root of the mean squared error; lower is better", (0.0, math.inf)),
        "mae": Measure("mean absolute error; lower is better", (0.0, math.inf)),
    }
    summed = "eight moments of truth, prediction and error, summed over the held-out examples"
    options = frozenset({"pair", "centre", "scale"})

    fit = "ridge"
    fit_says = (
        "the sum of the head's input features, each times the example's target on the plan's scale, and the sum of the "
        "targets"
    )

    def outputs(self, task: Task) -> int:
        return 1

    def targets(self, task: Task, labels: NDArray[Any]) -> NDArray[np.float64]:
        """Return each example's target on the scale that models learn."""
        return np.asarray(labels, np.float64).reshape(-1, 1)

    def for_sum(self, task: Task) -> Task:
        """Return the task with a range; the default is one `scale` on each side of `centre`."""
        if task.range is not None:
            return task
        return task.model_copy(update={"range": (task.centre - task.scale, task.centre + task.scale)})

    def shape(self, task: Task) -> tuple[int, ...]:
        return (8,)

    def sums(self, task: Task, *facts: Any) -> Sums:
        return regression_sums(*facts)

    def counts(self, sums: Sums) -> NDArray[Any]:
        return sums[[0, 3, 4, 6, 7]]

    def metrics(self, task: Task, sums: Sums) -> dict[str, float]:
        return _moment_metrics(sums)

    def groups(self, task: Task) -> tuple[RowGroup, ...]:
        diagonal = 2 * math.sqrt(2)
        means = "the sums of truth and prediction, mapped from the plan's range to [-1, 1]"
        return (
            EXAMPLES,
            RowGroup("means", 2, diagonal, 1 / 5, means),
            RowGroup("squares", 3, diagonal, 3 / 5, "the sums of their squares and of their product"),
            RowGroup("error", 1, 1.0, 1 / 10, "the sum of their absolute differences"),
        )

    def rows(self, task: Task, *facts: Any) -> Vector:
        return moment_rows(task, *facts)

    def figures(self, task: Task, vector: Vector) -> dict[str, float]:
        middle, half = range_of(task)
        n, x, y, xx, yy, xy, error = (float(value) for value in vector)
        n, xy = max(1.0, n), xy / math.sqrt(2)
        t, p = half * x + middle * n, half * y + middle * n
        squares = [half * half * a + 2 * middle * half * b + middle * middle * n for a, b in ((xx, x), (yy, y))]
        product = half * half * xy + middle * half * (x + y) + middle * middle * n
        sums = np.array([n, t, p, *squares, product, 2 * half * error, half * half * (xx + yy - 2 * xy)])
        return {"examples": n} | _moment_metrics(sums)


def regression_sums(truth: NDArray[Any], predicted: NDArray[Any]) -> Sums:
    """Sum the moments of truth and prediction, each of shape (examples,)."""
    t, p = truth.astype(np.float64), predicted.astype(np.float64)
    return np.array([t.size, t.sum(), p.sum(), t @ t, p @ p, t @ p, np.abs(t - p).sum(), (t - p) @ (t - p)], np.float64)


def moment_rows(task: Task, truth: NDArray[Any], predicted: NDArray[Any]) -> Vector:
    """Return the sum of the rows of a regression's examples.

    Args:
        truth, predicted: shape (examples,). A NaN prediction counts as the middle of the plan's range.
    """
    middle, half = range_of(task)
    x, y = ((np.asarray(values, np.float64) - middle) / half for values in (truth, predicted))
    x, y = (np.clip(np.nan_to_num(values, nan=0.0), -1.0, 1.0) for values in (x, y))
    ones = np.ones_like(x)
    return sum_rows(np.stack([ones, x, y, x * x, y * y, math.sqrt(2) * x * y, np.abs(x - y) / 2], axis=1))


def range_of(task: Task) -> tuple[float, float]:
    """Return the middle and the half width of a task's range."""
    assert task.range is not None  # noqa: S101  # `for_sum` has set it
    low, high = task.range
    return (low + high) / 2, (high - low) / 2


def _moment_metrics(sums: Sums) -> dict[str, float]:
    n, t, p, tt, pp, tp, absolute, squared = (float(value) for value in sums)
    spread = _spread(tt, t, n) * _spread(pp, p, n)
    pearson = min(1.0, max(-1.0, (tp - t * p / n) / math.sqrt(spread))) if spread > 0 else 0.0
    return {"pearson": pearson, "rmse": math.sqrt(max(0.0, squared / n)), "mae": absolute / n}


def _spread(squares: float, total: float, n: float) -> float:
    """Return the sum of squared deviations, or 0 if it is within rounding error of 0."""
    spread = squares - total * total / n
    return spread if spread > 1e-12 * squares else 0.0
