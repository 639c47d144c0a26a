"""A tag of the IOB2 scheme for each word: the entities of a text.

The sums are (1 + 3·types,): n, then for each type of entity those found, those predicted and those in truth.

Metrics: `entity-f1`, `precision` and `recall` of all entities, and `macro-f1` (mean over the types that occur in the
truth or among the predictions).

| group | share | entries of a row | sensitivity Δ (L2) |
|---|---|---|---|
| examples | 1/10 | 1 | 1 |
| entities | 1/2 | found, predicted too much, missed, over all types | √2·b |
| types | 2/5 | the same for each type | √2·b |

All counts of an example are multiplied by min(1, b / ‖(found, too much, missed)‖), b = ENTITIES or a sixteenth of
`max-length`, whichever is more. Counts by type have no greater norm than their sums.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from gramfuse_protocol.tasks.registry import Measure, TaskKind, register
from gramfuse_protocol.tasks.rows import EXAMPLES, RowGroup, Vector, added, counts_of
from gramfuse_protocol.tasks.scores import MACRO_F1, Sums, f1_of, mean, of_names, share

if TYPE_CHECKING:
    from gramfuse_protocol.contract.task import Task

OUTSIDE = "O"
"""The tag of a word that is part of no entity."""

ENTITIES = 8.0
"""Norm that an example's counts of entities are clipped to, where `max-length` is at most 128."""


@register
class TokenClassification(TaskKind):
    """A tag for each word."""

    name = "token-classification"
    primary = "entity-f1"
    measures = {
        "entity-f1": Measure("F1 over entities, each of which must have the right type, beginning and end"),
        "precision": Measure("share of what was found that is right"),
        "recall": Measure("share of what is there that was found"),
        "macro-f1": Measure(MACRO_F1),
    }
    summed = (
        "how many held-out examples there are, and how many entities of each type are in them, were predicted, and "
        "were found"
    )
    least_labels = 2
    unit = ("type of entity", "types of entities")
    first_label = 4

    def check(self, task: Task) -> None:
        """Raise ValueError if the labels are no tags."""
        begins = {tag[2:] for tag in task.labels if tag.startswith("B-")}
        insides = {tag[2:] for tag in task.labels if tag.startswith("I-")}
        odd = [tag for tag in task.labels if tag != OUTSIDE and tag[:2] not in ("B-", "I-")]
        if odd or OUTSIDE not in task.labels or begins != insides or "" in begins:
            raise ValueError(
                "the labels of task 'token-classification' are the tags of the IOB2 scheme: \"O\", and for each type X "
                '"B-X" and "I-X"' + (f"; found {odd[0]!r}" if odd else "")
            )

    def names(self, task: Task) -> tuple[str, ...]:
        """Return the types of entities."""
        return task.entities

    def shape(self, task: Task) -> tuple[int, ...]:
        return (1 + 3 * len(task.entities),)

    def sums(self, task: Task, *facts: Any) -> Sums:
        truth, predicted = facts
        return entity_sums(truth, predicted, task.entities)

    def metrics(self, task: Task, sums: Sums) -> dict[str, float]:
        counts = sums[1:].reshape(-1, 3)
        return of_entities(counts.sum(axis=0), counts)

    def by_label(self, task: Task, sums: Sums) -> dict[str, dict[str, float]]:
        return of_names(task.entities, sums[1:].reshape(-1, 3))

    def groups(self, task: Task) -> tuple[RowGroup, ...]:
        sensitivity = math.sqrt(2) * bound(task)
        entities = "how many entities were found, predicted too much, and missed, each example's clipped"
        return (
            EXAMPLES,
            RowGroup("entities", 3, sensitivity, 1 / 2, entities),
            RowGroup("types", 3 * len(task.entities), sensitivity, 2 / 5, "the same for each type of entity"),
        )

    def rows(self, task: Task, *facts: Any) -> Vector:
        return entity_rows(task, *facts)

    def figures(self, task: Task, vector: Vector) -> dict[str, float]:
        totals = counts_of(vector[1:4])[0]
        return {"examples": float(vector[0])} | of_entities(totals, counts_of(vector[4:]))

    def label_figures(self, task: Task, vector: Vector) -> dict[str, dict[str, float]]:
        return of_names(task.entities, counts_of(vector[4:]))


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


def entity_rows(task: Task, truth: Sequence[Sequence[str]], predicted: Sequence[Sequence[str]]) -> Vector:
    """Return the sum of the rows of tagged examples; arguments as `entity_sums` has them."""
    rows = []
    for t, p in zip(truth, predicted, strict=True):
        found, guessed, true = entity_sums([t], [p], task.entities)[1:].reshape(-1, 3).T
        counts = np.stack([found, guessed - found, true - found], axis=1)
        totals = counts.sum(axis=0)
        clip = min(1.0, bound(task) / max(1.0, float(np.linalg.norm(totals))))
        rows.append(np.concatenate([[1.0], clip * totals, clip * counts.reshape(-1)]))
    return added(np.array(rows).reshape(-1, 4 + 3 * len(task.entities)))


def bound(task: Task) -> float:
    """Return the norm that an example's counts of entities are clipped to."""
    return max(ENTITIES, task.max_length / 16)


def of_entities(totals: Sums, counts: Sums) -> dict[str, float]:
    """Return the metrics of entities.

    Args:
        totals: how many were found, predicted, and true.
        counts: the same by type: shape (types, 3).
    """
    found, predicted, truth = totals
    return {
        "entity-f1": f1_of(found, predicted, truth),
        "precision": share(found, predicted),
        "recall": share(found, truth),
        "macro-f1": mean([f1_of(*row) for row in counts if row[1] + row[2] > 0]),
    }
