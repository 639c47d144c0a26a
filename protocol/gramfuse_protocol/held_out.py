"""What one held-out example adds to the sum of metrics that leaves with noise, and how far that can be moved.

In a secure sum, a silo's held-out examples become one vector, the sum of a row for each example. A row is bounded
whatever the model says: predictions, losses and counts are clipped example by example, and NaN or infinity become a
fixed value. Its entries are rounded to multiples of 1 / SCALE, so that sums are exact in float64.

Neighbours are two sets of held-out examples of which one example was *replaced* by any other: its text changed, or its
label corrected. Entries of a row are 0 or above where nothing else is said, and two rows of a group then differ by
‖u − v‖² = ‖u‖² + ‖v‖² − 2⟨u, v⟩ ≤ ‖u‖² + ‖v‖². That covers an example that is added or removed too: it moves a group by
the norm of one row, which is no more than the sensitivity. (To count additions and removals only would let most of the
noise be smaller by √2, and give away more than ε where an example is changed.)

| kind | group | share | entries of a row | sensitivity Δ (L2) |
|---|---|---|---|---|
| classification, image-classification | outcome | 1/2 | right, wrong | √2 |
| | labels | 1/2 | for each label: found, predicted too much, missed | 2 |
| multi-label | examples | 1/10 | 1 | 1 |
| | labels | 9/10 | for each of l labels: found, predicted too much, missed | √(2l) |
| token-classification | examples | 1/10 | 1 | 1 |
| | entities | 1/2 | found, predicted too much, missed, over all types | √2·b |
| | types | 2/5 | the same for each type | √2·b |
| regression | examples | 1/10 | 1 | 1 |
| | means | 1/5 | x, y | √8 |
| | squares | 3/5 | x², y², √2·xy | √8 |
| | error | 1/10 | abs(x − y) / 2 | 1 |
| sequence-to-sequence | overlap | 1/2 | f, 1 − f, f being the token-F1 | √2 |
| | exact | 1/4 | 1 if the text is exactly right | 1 |
| | tokens | 1/4 | target tokens / L, their loss / (LC) | √2 |
| causal-lm | examples | 1/10 | 1 | 1 |
| | tokens | 1/2 | tokens predicted right / L, wrong / L | √2 |
| | loss | 2/5 | loss of the tokens / (LC) | 1 |

Why these are the sensitivities:

* An example is one cell of the confusion matrix; replaced, it moves two counts by 1 each (L1 2, L2 √2), and so are
  right and wrong. In `labels` a row has one 1 (found) or two (too much at one label, missed at another): ‖u‖² ≤ 2, so
  two differ by at most √4. The whole confusion matrix is never released: no metric of a report needs more than these
  counts, and in them the noise of F1 does not grow with the number of labels.
* `multi-label`: at each label a row has at most one 1, so at each label two rows differ by at most √2.
* Entities: all counts of an example are multiplied by min(1, b / ‖(found, too much, missed)‖), b = ENTITIES or a
  sixteenth of `max-length`, whichever is more. Counts by type have no greater norm than their sums.
* `regression`: x and y are truth and prediction moved from the plan's range to [−1, 1]. (x, y) lies in a square with
  diagonal √8. (x², √2·xy, y²) is the outer product of (x, y) with itself, of norm x² + y² ≤ 2, and inner products of
  two are squares: ‖u − v‖² ≤ 8.
* Tokens and their loss: L is `target-length`, or for `causal-lm` `max-length`, which no example exceeds; the loss of a
  token is clipped to [0, C], C = LOSS. Rows are points of a triangle whose longest side is √2.
* Rounding moves each entry of a row by at most half a unit, so the difference of two rows by at most 1 unit in each of
  d entries: √d units in L2, which `gramfuse_protocol.noise` adds to Δ.

Examples are measured one by one: in a batch, the padding of one would depend on the length of another, and a crafted
model can make something of that.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gramfuse_protocol.metrics import (
    MOST_EXAMPLES,
    Sums,
    by_label,
    entity_sums,
    metrics,
    of_classes,
    of_entities,
    of_names,
    token_f1,
)
from gramfuse_protocol.scales import METRICS_SCALE
from gramfuse_protocol.task import Task

Vector = NDArray[np.float64]

ENTITIES = 8.0
"""Norm that an example's counts of entities are clipped to, where `max-length` is at most 128."""
LOSS = 16.0
"""What the negative log-likelihood of one token is clipped to; e^16 is more than any vocabulary has tokens."""


SHARE = (0.0, 1.0)
RANGES = {
    "examples": (1.0, math.inf),
    "mcc": (-1.0, 1.0),
    "pearson": (-1.0, 1.0),
    "rmse": (0.0, math.inf),
    "mae": (0.0, math.inf),
    "perplexity": (1.0, math.exp(LOSS)),
}
"""What metrics can be; all others are a SHARE."""


class Group(NamedTuple):
    """Entries of the vector that share a sensitivity.

    Args:
        size: how many entries.
        sensitivity: by how much replacing one example moves them, in L2.
        share: of the privacy budget; those of a task add up to 1.
    """

    name: str
    size: int
    sensitivity: float
    share: float


def groups(task: Task) -> tuple[Group, ...]:
    """Return the groups of a task's vector, in order."""
    labels, root = len(task.labels), math.sqrt(2)
    match task.task:
        case "classification" | "image-classification":
            return Group("outcome", 2, root, 1 / 2), Group("labels", 3 * labels, 2.0, 1 / 2)
        case "multi-label":
            return Group("examples", 1, 1.0, 1 / 10), Group("labels", 3 * labels, math.sqrt(2 * labels), 9 / 10)
        case "token-classification":
            bound = root * _entities(task)
            return (
                Group("examples", 1, 1.0, 1 / 10),
                Group("entities", 3, bound, 1 / 2),
                Group("types", 3 * len(task.entities), bound, 2 / 5),
            )
        case "regression":
            return (
                Group("examples", 1, 1.0, 1 / 10),
                Group("means", 2, 2 * root, 1 / 5),
                Group("squares", 3, 2 * root, 3 / 5),
                Group("error", 1, 1.0, 1 / 10),
            )
        case "sequence-to-sequence":
            return Group("overlap", 2, root, 1 / 2), Group("exact", 1, 1.0, 1 / 4), Group("tokens", 2, root, 1 / 4)
        case "causal-lm":
            return Group("examples", 1, 1.0, 1 / 10), Group("tokens", 2, root, 1 / 2), Group("loss", 1, 1.0, 2 / 5)


def size(task: Task) -> int:
    """Return how many entries a task's vector has."""
    return sum(group.size for group in groups(task))


def class_rows(task: Task, truth: NDArray[Any], predicted: NDArray[Any]) -> Vector:
    """Return the sum of the rows of a classifier's examples.

    Args:
        truth, predicted: label indices, shape (examples,).
    """
    rows, right, each = np.zeros((len(truth), size(task))), truth == predicted, np.arange(len(truth))
    rows[:, 0], rows[:, 1] = right, ~right
    rows[each, 2 + 3 * truth] += right
    rows[each, 3 + 3 * predicted] += ~right
    rows[each, 4 + 3 * truth] += ~right
    return _added(rows)


def label_rows(task: Task, truth: NDArray[np.bool_], predicted: NDArray[np.bool_]) -> Vector:
    """Return the sum of the rows of examples with several labels; arguments as `multi_label_sums` has them."""
    counts = np.zeros((len(truth), len(task.labels), 3))
    for label in task.annotated:
        t, p = truth[:, label], predicted[:, label]
        counts[:, label] = np.stack([t & p, ~t & p, t & ~p], axis=1)
    return _added(np.concatenate([np.ones((len(truth), 1)), counts.reshape(len(truth), -1)], axis=1))


def entity_rows(task: Task, truth: Sequence[Sequence[str]], predicted: Sequence[Sequence[str]]) -> Vector:
    """Return the sum of the rows of tagged examples; arguments as `entity_sums` has them."""
    rows = []
    for t, p in zip(truth, predicted, strict=True):
        found, guessed, true = entity_sums([t], [p], task.entities)[1:].reshape(-1, 3).T
        counts = np.stack([found, guessed - found, true - found], axis=1)
        totals = counts.sum(axis=0)
        clip = min(1.0, _entities(task) / max(1.0, float(np.linalg.norm(totals))))
        rows.append(np.concatenate([[1.0], clip * totals, clip * counts.reshape(-1)]))
    return _added(np.array(rows).reshape(-1, size(task)))


def moment_rows(task: Task, truth: NDArray[Any], predicted: NDArray[Any]) -> Vector:
    """Return the sum of the rows of a regression's examples.

    Args:
        truth, predicted: shape (examples,). A prediction that is NaN counts as the middle of the plan's range.
    """
    middle, half = _range(task)
    x, y = ((np.asarray(values, np.float64) - middle) / half for values in (truth, predicted))
    x, y = (np.clip(np.nan_to_num(values, nan=0.0), -1.0, 1.0) for values in (x, y))
    ones = np.ones_like(x)
    return _added(np.stack([ones, x, y, x * x, y * y, math.sqrt(2) * x * y, np.abs(x - y) / 2], axis=1))


def generation_rows(
    task: Task, truth: Sequence[str], generated: Sequence[str], tokens: NDArray[Any], losses: NDArray[Any]
) -> Vector:
    """Return the sum of the rows of generated texts.

    Args:
        truth, generated: texts, equally many.
        tokens: how many target tokens each has.
        losses: the negative log-likelihood of each one's target tokens, every token's clipped to [0, LOSS].
    """
    pairs = [(t.split(), g.split()) for t, g in zip(truth, generated, strict=True)]
    f1 = np.array([token_f1(t, g) for t, g in pairs])
    exact = np.array([t == g for t, g in pairs], np.float64)
    said, lost = _shares(task.target_length, tokens, losses / LOSS)
    return _added(np.stack([f1, 1 - f1, exact, said, lost], axis=1))


def language_rows(task: Task, tokens: NDArray[Any], losses: NDArray[Any], right: NDArray[Any]) -> Vector:
    """Return the sum of the rows of texts whose tokens were predicted one after the other.

    Args:
        tokens, losses: as `generation_rows` has them.
        right: how many tokens of each were predicted right.
    """
    hits, misses, lost = _shares(task.max_length, right, tokens - right, losses / LOSS, of=tokens)
    return _added(np.stack([np.ones(len(tokens)), hits, misses, lost], axis=1))


def is_sum(task: Task, vector: Vector) -> bool:
    """Whether a vector can be the sum of rows of at most MOST_EXAMPLES examples, and noise.

    What a sum opens to whose masks do not cancel is far beyond; a negative count is not.
    """
    most = MOST_EXAMPLES * max(1.0, *(group.sensitivity for group in groups(task)))
    return vector.shape == (size(task),) and bool(np.isfinite(vector).all() and np.abs(vector).max() <= most)


def figures(task: Task, vector: Vector) -> dict[str, float]:
    """Turn a vector, with noise or without, into metrics: those of `gramfuse_protocol.metrics.metrics`.

    Without noise and clipping they are the same. With noise, each is clipped to RANGES.
    """
    match task.task:
        case "classification" | "image-classification":
            n = max(1.0, float(vector[0] + vector[1]))
            found = {"examples": n} | of_classes(float(vector[0]), n, _counts(vector[2:]))
        case "token-classification":
            totals = _counts(vector[1:4])[0]
            found = {"examples": float(vector[0])} | of_entities(totals, _counts(vector[4:]))
        case _:
            found = metrics(task, _sums(task, vector))
    limits = {name: RANGES.get(name, SHARE) for name in found}
    return {name: min(max(value, limits[name][0]), limits[name][1]) for name, value in found.items()}


def label_figures(task: Task, vector: Vector) -> dict[str, dict[str, float]]:
    """Turn a vector into what it says of each label: as `gramfuse_protocol.metrics.by_label`."""
    match task.task:
        case "classification" | "image-classification":
            return of_names(task.labels, _counts(vector[2:]))
        case "token-classification":
            return of_names(task.entities, _counts(vector[4:]))
        case _:
            return by_label(task, _sums(task, vector))


def label_counts(task: Task, vector: NDArray[Any]) -> NDArray[Any]:
    """Return the entries of each label or type: found, too much, missed; shape (…, labels, 3), of none elsewhere."""
    first = {"classification": 2, "image-classification": 2, "multi-label": 1, "token-classification": 4}
    start = first.get(task.task, vector.shape[-1])
    return vector[..., start:].reshape(*vector.shape[:-1], -1, 3)


def _added(rows: Vector) -> Vector:
    """Return the sum of rows, each on the grid of the fixed-point scale."""
    total: Vector = np.rint(rows * METRICS_SCALE).sum(axis=0) / METRICS_SCALE
    return total


def _shares(most: int, *counts: NDArray[Any], of: NDArray[Any] | None = None) -> list[Vector]:
    """Return counts of tokens as shares of the most that an example may have; of a longer one, as if it had so many.

    Args:
        of: how many tokens each example has; by default the first of the counts.
    """
    long = np.maximum(counts[0] if of is None else of, most)
    return [count / long for count in counts]


def _entities(task: Task) -> float:
    return max(ENTITIES, task.max_length / 16)


def _range(task: Task) -> tuple[float, float]:
    assert task.range is not None  # noqa: S101  # a plan whose results leave in a sum has one
    low, high = task.range
    return (low + high) / 2, (high - low) / 2


def _counts(entries: Vector) -> Sums:
    """Return how often each was found, predicted, and true, from found, too much and missed: shape (…, 3)."""
    found, wrong, missed = entries.reshape(-1, 3).T
    return np.stack([found, found + wrong, found + missed], axis=1)


def _sums(task: Task, vector: Vector) -> Sums:
    """Return the sums (`gramfuse_protocol.metrics`) that a vector stands for, of kinds other than classes and tags."""
    match task.task:
        case "regression":
            middle, half = _range(task)
            n, x, y, xx, yy, xy, error = (float(value) for value in vector)
            n, xy = max(1.0, n), xy / math.sqrt(2)
            t, p = half * x + middle * n, half * y + middle * n
            squares = [half * half * a + 2 * middle * half * b + middle * middle * n for a, b in ((xx, x), (yy, y))]
            product = half * half * xy + middle * half * (x + y) + middle * middle * n
            return np.array([n, t, p, *squares, product, 2 * half * error, half * half * (xx + yy - 2 * xy)])
        case "multi-label":
            counts = vector[1:].reshape(-1, 3)
            each = np.concatenate([counts, np.zeros((len(counts), 1))], axis=1)
            return np.concatenate([[max(1.0, float(vector[0]))], each.reshape(-1)])
        case "sequence-to-sequence":
            f1, rest, exact, tokens, loss = (float(value) for value in vector)
            long = task.target_length
            return np.array([max(1.0, f1 + rest), exact, f1, tokens * long, loss * long * LOSS])
        case _:
            n, right, wrong, loss = (float(value) for value in vector)
            long = task.max_length
            return np.array([max(1.0, n), (right + wrong) * long, loss * long * LOSS, right * long])
