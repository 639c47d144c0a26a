"""Held-out metrics as sums that add up over silos.

A silo turns its predictions into one small float64 array; the arrays of several silos are added, and only the
sum is turned into numbers. So a joint metric over all silos is exact, and no single prediction leaves a silo.

* classification, image-classification: the confusion matrix, shape (labels, labels), rows are the truth, columns the
  prediction.
* regression: (8,): n, Σt, Σp, Σt², Σp², Σtp, Σ|t−p|, Σ(t−p)² for truth t and prediction p.
* multi-label: (1 + 4·labels,): n, then for each label true positives, false positives, false negatives and true
  negatives over the examples for which it is annotated.
* token-classification: (1 + 3·types,): n, then for each type of entity those found, those predicted and those in truth.
* sequence-to-sequence: (5,): n, exact matches, Σ token-F1, target tokens, their negative log-likelihood.
* causal-lm: (4,): n, predicted tokens, their negative log-likelihood, tokens predicted right.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gramfuse_protocol.task import Kind, Task

Sums = NDArray[np.float64]

PRIMARY: dict[Kind, str] = {
    "classification": "accuracy",
    "regression": "pearson",
    "multi-label": "macro-f1",
    "token-classification": "entity-f1",
    "sequence-to-sequence": "token-f1",
    "causal-lm": "token-accuracy",
    "image-classification": "accuracy",
}
"""The metric that models of a task are ranked by; higher is better."""

MOST_EXAMPLES = 2**30
"""More held-out examples than this are none: what a sum opens to whose masks do not cancel is far beyond."""


def primary(task: Task) -> str:
    """Return the name of the metric that models of this task are ranked by."""
    return PRIMARY[task.task]


def classification_sums(truth: NDArray[Any], predicted: NDArray[Any], labels: int) -> Sums:
    """Count (truth, prediction) pairs.

    Args:
        truth, predicted: label indices, shape (examples,), each in [0, labels).
    """
    sums = np.zeros((labels, labels), np.float64)
    np.add.at(sums, (truth, predicted), 1.0)
    return sums


def regression_sums(truth: NDArray[Any], predicted: NDArray[Any]) -> Sums:
    """Sum the moments of truth and prediction, each of shape (examples,)."""
    t, p = truth.astype(np.float64), predicted.astype(np.float64)
    return np.array([t.size, t.sum(), p.sum(), t @ t, p @ p, t @ p, np.abs(t - p).sum(), (t - p) @ (t - p)], np.float64)


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


def entities(tags: Sequence[str]) -> set[tuple[str, int, int]]:
    """Return the entities (type, first word, word after the last) of one sequence of IOB2 tags.

    As the conlleval script and seqeval by default have it: I-X after anything but B-X or I-X begins an entity too.
    """
    found, start, inside = set(), 0, ""
    for position, tag in enumerate([*tags, "O"]):
        begins, _, kind = tag.partition("-")
        if inside and (begins != "I" or kind != inside):
            found.add((inside, start, position))
            inside = ""
        if kind and not inside:
            inside, start = kind, position
    return found


def entity_sums(truth: Iterable[Sequence[str]], predicted: Iterable[Sequence[str]], types: Sequence[str]) -> Sums:
    """Count entities, by type: found (same type, first and last word), predicted, and in truth.

    Args:
        truth, predicted: the tags of each example's words, equally many.
        types: every type that occurs.
    """
    rows = {kind: row for row, kind in enumerate(types)}
    counts, n = np.zeros((len(types), 3), np.float64), 0
    for t, p in zip(truth, predicted, strict=True):
        n += 1
        true, guessed = entities(t), entities(p)
        for column, group in enumerate((true & guessed, guessed, true)):
            for kind, _, _ in group:
                counts[rows[kind], column] += 1
    return np.concatenate([[float(n)], counts.reshape(-1)])


def generation_sums(truth: Sequence[str], generated: Sequence[str], tokens: int, nll: float) -> Sums:
    """Compare texts as sequences of words, which white space separates.

    Args:
        truth, generated: texts, equally many.
        tokens, nll: target tokens of all texts, and the model's negative log-likelihood of them (natural logarithm).
    """
    pairs = [(t.split(), g.split()) for t, g in zip(truth, generated, strict=True)]
    exact = sum(t == g for t, g in pairs)
    return np.array([len(pairs), exact, sum(token_f1(t, g) for t, g in pairs), tokens, nll], np.float64)


def token_f1(truth: Sequence[str], generated: Sequence[str]) -> float:
    """Return the F1 of two bags of words; of two empty ones it is 1."""
    if not truth and not generated:
        return 1.0
    return 2 * (Counter(truth) & Counter(generated)).total() / (len(truth) + len(generated))


def language_sums(n: int, tokens: int, nll: float, correct: int) -> Sums:
    """Put together what a causal language model did on n texts.

    Args:
        tokens: those that were to be predicted: all but the first of each text.
        nll: their negative log-likelihood (natural logarithm).
        correct: how many had the highest probability.
    """
    return np.array([n, tokens, nll, correct], np.float64)


def sums_shape(task: Task) -> tuple[int, ...]:
    """Shape of the sums of a task."""
    match task.task:
        case "classification" | "image-classification":
            return (len(task.labels), len(task.labels))
        case "regression":
            return (8,)
        case "multi-label":
            return (1 + 4 * len(task.labels),)
        case "token-classification":
            return (1 + 3 * len(task.entities),)
        case "sequence-to-sequence":
            return (5,)
        case "causal-lm":
            return (4,)


def examples_in(sums: Sums) -> float:
    """Return how many examples sums are of: the entries of a confusion matrix together, or else the first entry."""
    return float(sums.sum() if sums.ndim == 2 else sums[0])


def are_sums(task: Task, sums: NDArray[Any]) -> bool:
    """Whether an array can be the sums of 1 to MOST_EXAMPLES examples: shape, dtype, and values in their range."""
    if sums.dtype != np.float64 or sums.shape != sums_shape(task) or not np.isfinite(sums).all():
        return False
    least = sums[[0, 3, 4, 6, 7]] if task.task == "regression" else sums
    return bool(least.min() >= 0) and 1 <= examples_in(sums) <= MOST_EXAMPLES


def metrics(task: Task, sums: Sums) -> dict[str, float]:
    """Turn added sums, of one example at least, into metrics.

    Returns:
        `examples`, and by kind:

        * classification, image-classification: `accuracy`, `macro-f1` (mean F1 over the labels that occur in the truth
          or among the predictions) and `mcc` (Matthews' correlation; 0 if truth or prediction is one label only).
        * regression: `pearson` (0 without variance on either side), `rmse` and `mae`.
        * multi-label: `macro-f1` (mean over the labels that occur in the truth) and `micro-f1`.
        * token-classification: `entity-f1`, `precision` and `recall` of all entities, and `macro-f1` (mean over the
          types that occur in the truth or among the predictions).
        * sequence-to-sequence: `exact-match`, `token-f1` (mean over examples) and `perplexity` of the target tokens.
        * causal-lm: `perplexity` and `token-accuracy`.
    """
    n = {"examples": examples_in(sums)}
    match task.task:
        case "classification" | "image-classification":
            return n | of_classes(float(np.trace(sums)), n["examples"], _of_confusion(sums))
        case "regression":
            return n | _of_moments(sums)
        case "multi-label":
            return n | _of_labels(_decisions(sums))
        case "token-classification":
            counts = sums[1:].reshape(-1, 3)
            return n | of_entities(counts.sum(axis=0), counts)
        case "sequence-to-sequence":
            count, exact, f1, tokens, nll = (float(value) for value in sums)
            shares = {"exact-match": _share(exact, count), "token-f1": _share(f1, count)}
            return n | shares | {"perplexity": _perplexity(nll, tokens)}
        case "causal-lm":
            _, tokens, nll, correct = (float(value) for value in sums)
            return n | {"perplexity": _perplexity(nll, tokens), "token-accuracy": _share(correct, max(tokens, 1.0))}


def by_label(task: Task, sums: Sums) -> dict[str, dict[str, float]]:
    """Turn added sums into what they say of each label, or of each type of entity.

    Returns:
        By label, in the task's order: `examples` (how often it is in the truth), `precision` (0 of what was never
        predicted), `recall` (0 of what is never true) and `f1`. A label that is neither true nor predicted is left
        out. Empty for tasks without labels.
    """
    match task.task:
        case "classification" | "image-classification":
            return of_names(task.labels, _of_confusion(sums))
        case "multi-label":
            return of_names(task.labels, _decisions(sums))
        case "token-classification":
            return of_names(task.entities, sums[1:].reshape(-1, 3))
        case _:
            return {}


def of_names(names: Sequence[str], counts: Sums) -> dict[str, dict[str, float]]:
    """Return what `by_label` does.

    Args:
        counts: how often each was found, predicted, and true: shape (names, 3).
    """
    return {
        name: {
            "examples": float(truth),
            "precision": _share(found, predicted),
            "recall": _share(found, truth),
            "f1": _f1(found, predicted, truth),
        }
        for name, (found, predicted, truth) in zip(names, counts, strict=True)
        if predicted + truth > 0
    }


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
    return {"accuracy": _share(right, n), "macro-f1": _mean(f1.tolist()), "mcc": float(mcc)}


def _of_confusion(sums: Sums) -> Sums:
    """Return how often each label was found, predicted, and true: shape (labels, 3)."""
    return np.stack([np.diag(sums), sums.sum(axis=0), sums.sum(axis=1)], axis=1)


def _of_moments(sums: Sums) -> dict[str, float]:
    n, t, p, tt, pp, tp, absolute, squared = (float(value) for value in sums)
    spread = _spread(tt, t, n) * _spread(pp, p, n)
    pearson = min(1.0, max(-1.0, (tp - t * p / n) / math.sqrt(spread))) if spread > 0 else 0.0
    return {"pearson": pearson, "rmse": math.sqrt(max(0.0, squared / n)), "mae": absolute / n}


def _decisions(sums: Sums) -> Sums:
    """Return how often each label of a multi-label task was found, predicted, and true: shape (labels, 3)."""
    found, wrong, missed, _ = sums[1:].reshape(-1, 4).T
    return np.stack([found, found + wrong, found + missed], axis=1)


def _of_labels(counts: Sums) -> dict[str, float]:
    f1 = [_f1(*row) for row in counts if row[2] > 0]
    return {"macro-f1": _mean(f1), "micro-f1": _f1(*counts.sum(axis=0))}


def of_entities(totals: Sums, counts: Sums) -> dict[str, float]:
    """Return the metrics of entities.

    Args:
        totals: how many were found, predicted, and true.
        counts: the same by type: shape (types, 3).
    """
    found, predicted, truth = totals
    return {
        "entity-f1": _f1(found, predicted, truth),
        "precision": _share(found, predicted),
        "recall": _share(found, truth),
        "macro-f1": _mean([_f1(*row) for row in counts if row[1] + row[2] > 0]),
    }


def _share(found: float, of: float) -> float:
    """Return which share was found; 0 of nothing. Counts with noise may be below 0."""
    return min(1.0, max(0.0, float(found / of))) if of > 0 else 0.0


def _f1(found: float, predicted: float, truth: float) -> float:
    """Return the harmonic mean of precision and recall; 0 where there is neither."""
    return _share(2 * found, predicted + truth)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def _perplexity(nll: float, tokens: float) -> float:
    """Return e to the mean negative log-likelihood; of a model that is beyond all numbers, the largest there is."""
    return math.exp(min(nll / max(tokens, 1.0), 709.0))


def _spread(squares: float, total: float, n: float) -> float:
    """Return the sum of squared deviations, or 0 where it is no more than what rounding leaves of none."""
    spread = squares - total * total / n
    return spread if spread > 1e-12 * squares else 0.0
