"""Token classification: an IOB2 tag for each word, scored by entities.

The sums are (1 + 3·types,): n, then for each entity type the entities found, predicted and true.

Metrics: `entity-f1`, `precision` and `recall` over all entities, and `macro-f1` (mean over the types that occur in
truth or prediction).

| group | share | row entries | sensitivity Δ (L2) |
|---|---|---|---|
| examples | 1/10 | 1 | 1 |
| entities | 1/2 | true positives, false positives, false negatives, over all types | √2·b |
| types | 2/5 | the same for each type | √2·b |

All counts of an example are multiplied by min(1, b / ‖counts over all types‖), where b is the larger of ENTITIES and
`max-length` / 16. The norm of the counts by type is no greater than that of their sums.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gramfuse_protocol.tasks.registry import Measure, TaskKind, register
from gramfuse_protocol.tasks.rows import EXAMPLES, RowGroup, Vector, counts_of, sum_rows
from gramfuse_protocol.tasks.scores import MACRO_F1, Sums, f1_of, mean, scores_by_name, share

if TYPE_CHECKING:
    from gramfuse_protocol.contract.task import Task

OUTSIDE = "O"
"""The tag of a word outside all entities."""

ENTITIES = 8.0
"""Norm to which an example's entity counts are clipped if `max-length` is at most 128."""


@register
class TokenClassification(TaskKind):
    """A tag for each word."""

    name = "token-classification"
    primary = "entity-f1"
    measures = {
        "entity-f1": Measure("F1 over entities; type, start and end must all match"),
        "precision": Measure("share of predicted entities that are correct"),
        "recall": Measure("share of true entities that were found"),
        "macro-f1": Measure(MACRO_F1),
    }
    summed = (
        "the number of held-out examples, and for each entity type the numbers of true, predicted and found entities"
    )
    least_labels = 2
    unit = ("entity type", "entity types")
    fit = "discriminant"
    fits_words = True
    fit_says = "for each tag, the sum of the head's input features over its training words, and their number"
    fit_tells = (
        "The sums of a head have a column for each tag. For a tag that only one silo has, it is that silo's own: the "
        "mean of the features of its words, which tells which words they are if they are few."
    )
    first_label = 4

    def check(self, task: Task) -> None:
        """Raise ValueError if the labels are not a complete set of IOB2 tags."""
        begins = {tag[2:] for tag in task.labels if tag.startswith("B-")}
        insides = {tag[2:] for tag in task.labels if tag.startswith("I-")}
        invalid = [tag for tag in task.labels if tag != OUTSIDE and tag[:2] not in ("B-", "I-")]
        if invalid or OUTSIDE not in task.labels or begins != insides or "" in begins:
            raise ValueError(
                'the labels of task \'token-classification\' must be IOB2 tags: "O", and "B-X" and "I-X" for each '
                "entity type X" + (f"; found {invalid[0]!r}" if invalid else "")
            )

    def targets(self, task: Task, labels: NDArray[Any]) -> NDArray[np.float64]:
        """Return each word's tag as a one-hot vector."""
        one_hot: NDArray[np.float64] = np.eye(len(task.labels))[labels]
        return one_hot

    def names(self, task: Task) -> tuple[str, ...]:
        """Return the entity types."""
        return task.entities

    def shape(self, task: Task) -> tuple[int, ...]:
        return (1 + 3 * len(task.entities),)

    def sums(self, task: Task, *facts: Any) -> Sums:
        truth, predicted = facts
        return entity_sums(truth, predicted, task.entities)

    def metrics(self, task: Task, sums: Sums) -> dict[str, float]:
        counts = sums[1:].reshape(-1, 3)
        return entity_metrics(counts.sum(axis=0), counts)

    def by_label(self, task: Task, sums: Sums) -> dict[str, dict[str, float]]:
        return scores_by_name(task.entities, sums[1:].reshape(-1, 3))

    def groups(self, task: Task) -> tuple[RowGroup, ...]:
        sensitivity = math.sqrt(2) * bound(task)
        entities = "the numbers of true positive, false positive and false negative entities, clipped for each example"
        return (
            EXAMPLES,
            RowGroup("entities", 3, sensitivity, 1 / 2, entities),
            RowGroup("types", 3 * len(task.entities), sensitivity, 2 / 5, "the same for each entity type"),
        )

    def rows(self, task: Task, *facts: Any) -> Vector:
        return entity_rows(task, *facts)

    def figures(self, task: Task, vector: Vector) -> dict[str, float]:
        totals = counts_of(vector[1:4])[0]
        return {"examples": float(vector[0])} | entity_metrics(totals, counts_of(vector[4:]))

    def label_figures(self, task: Task, vector: Vector) -> dict[str, dict[str, float]]:
        return scores_by_name(task.entities, counts_of(vector[4:]))


def entities(tags: Sequence[str]) -> set[tuple[str, int, int]]:
    """Return the entities (type, index of the first word, index after the last word) of one sequence of IOB2 tags.

    As in conlleval and in seqeval's default mode, I-X after anything but B-X or I-X also begins an entity.
    """
    spans, start, inside = set(), 0, ""
    for position, tag in enumerate([*tags, "O"]):
        begins, _, kind = tag.partition("-")
        if inside and (begins != "I" or kind != inside):
            spans.add((inside, start, position))
            inside = ""
        if kind and not inside:
            inside, start = kind, position
    return spans


def entity_sums(truth: Iterable[Sequence[str]], predicted: Iterable[Sequence[str]], types: Sequence[str]) -> Sums:
    """Count entities by type: found (same type, first and last word), predicted, and true.

    Args:
        truth, predicted: the tags of each example's words.
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


def entity_rows(task: Task, truth: Sequence[Sequence[str]], predicted: Sequence[Sequence[str]]) -> Vector:
    """Return the sum of the rows of tagged examples; arguments as in `entity_sums`."""
    rows = []
    for t, p in zip(truth, predicted, strict=True):
        hits, guessed, true = entity_sums([t], [p], task.entities)[1:].reshape(-1, 3).T
        counts = np.stack([hits, guessed - hits, true - hits], axis=1)
        totals = counts.sum(axis=0)
        clip = min(1.0, bound(task) / max(1.0, float(np.linalg.norm(totals))))
        rows.append(np.concatenate([[1.0], clip * totals, clip * counts.reshape(-1)]))
    return sum_rows(np.array(rows).reshape(-1, 4 + 3 * len(task.entities)))


def bound(task: Task) -> float:
    """Return the norm to which an example's entity counts are clipped."""
    return max(ENTITIES, task.max_length / 16)


def entity_metrics(totals: Sums, counts: Sums) -> dict[str, float]:
    """Return the metrics over entities.

    Args:
        totals: numbers of entities found, predicted and true, shape (3,).
        counts: the same by type, shape (types, 3).
    """
    hits, predicted, truth = totals
    return {
        "entity-f1": f1_of(hits, predicted, truth),
        "precision": share(hits, predicted),
        "recall": share(hits, truth),
        "macro-f1": mean([f1_of(*row) for row in counts if row[1] + row[2] > 0]),
    }
