"""The registry of kinds of task: their settings in a plan, and how held-out results add up over silos.

To add a kind, write a file in this folder with a class that implements all abstract members:

    @register
    class Ordinal(Classification):
        name = "ordinal"
        primary = "within-one"
        measures = Classification.measures | {"within-one": Measure("share of examples at most one label off")}

        def metrics(self, task: Task, sums: Sums) -> dict[str, float]:
            near = sum(float(np.trace(confusion(sums), offset)) for offset in (-1, 0, 1))
            return super().metrics(task, sums) | {"within-one": share(near, examples_in(sums))}

Another package can register a kind too, before it reads a plan. `gramfuse_client.tasks.registry` defines how a silo
processes its examples, `gramfuse_model.loading.auto_classes.FORMS` the model class.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gramfuse_protocol.tasks.rows import RowGroup, Vector
from gramfuse_protocol.tasks.scores import Sums
from gramfuse_protocol.text import quoted

if TYPE_CHECKING:
    from gramfuse_protocol.contract.task import Task

SHARE = (0.0, 1.0)


class Measure(NamedTuple):
    """One metric.

    Args:
        words: description in one line; higher is better unless it says otherwise.
        range: lowest and highest value.
    """

    words: str
    range: tuple[float, float] = SHARE


class TaskKind(ABC):
    """One kind of task.

    A silo turns the facts (truth and prediction, as arrays or lists with one entry for each example) into `sums`, which
    add up exactly, or, if results leave with noise, into `rows`: bounded vectors (`gramfuse_protocol.held_out.sums`).
    `figures` computes the same metrics from the sum of rows.
    """

    name: ClassVar[str]
    """Name in a plan."""
    primary: ClassVar[str]
    """The metric that ranks models; higher is better."""
    measures: ClassVar[Mapping[str, Measure]]
    """All metrics by name, except `examples`."""
    summed: ClassVar[str]
    """What the sums contain, in words."""
    least_labels: ClassVar[int] = 0
    """Minimum number of labels in a plan; 0 for a kind without labels."""
    partial_labels: ClassVar[bool] = False
    """Whether a silo may annotate only some of the labels."""
    exclusive: ClassVar[bool] = False
    """Whether an example has exactly one label, so that all others are absent."""
    fit: ClassVar[str | None] = None
    """How a head is fitted in closed form (`gramfuse_server.merging.head_solvers`); None if it cannot be."""
    unfit: ClassVar[str] = "of which no head is fitted in closed form"
    """Why a head cannot be fitted: the end of a sentence that begins with the task."""
    fits_words: ClassVar[bool] = False
    """Whether the rows that a head is fitted from are words, so that their number is not that of examples."""
    fit_says: ClassVar[str] = ""
    """What `targets` add to the sums of features that a head is fitted from, in words."""
    fit_tells: ClassVar[str] = ""
    """What those sums tell of a single silo in a secure sum, as a sentence; empty if it is nothing in particular."""
    headless: ClassVar[bool] = False
    """Whether the task needs no new head: the base model's pretrained output layer predicts tokens."""
    options: ClassVar[frozenset[str]] = frozenset()
    """Which of the settings `pair`, `centre`, `scale` and `first_token` the kind accepts."""
    unit: ClassVar[tuple[str, str]] = ("label", "labels")
    """What results are listed by, in singular and plural."""
    first_label: ClassVar[int | None] = None
    """Index in a row of the first label's counts (true positive, false positive, false negative); None if there are
    none."""

    def check(self, task: Task) -> None:
        """Raise ValueError if a task's labels are invalid for this kind."""
        return

    def names(self, task: Task) -> tuple[str, ...]:
        """Return the names that results are listed by: labels, or entity types."""
        return task.labels

    def for_sum(self, task: Task) -> Task:
        """Return the task with defaults that it needs if held-out results leave only in a secure sum."""
        return task

    def generation(self, task: Task) -> dict[str, Any] | None:
        """Return the generation settings of evaluation, for reports; None if no text is generated."""
        return None

    def outputs(self, task: Task) -> int:
        """Return the number of outputs of the head's last layer."""
        return len(task.labels)

    def columns(self, task: Task) -> int:
        """Return the number of columns of `targets`."""
        return self.outputs(task)

    def targets(self, task: Task, labels: NDArray[Any]) -> NDArray[np.float64]:
        """Return what features are multiplied with in the sums that a head is fitted from.

        Args:
            labels: the training target of each row, as a model's loss takes them, (rows, …). A row is an example, or
                a word (`fits_words`).

        Returns:
            float64 (rows, columns); about 1 in size, or smaller.
        """
        raise NotImplementedError

    @abstractmethod
    def shape(self, task: Task) -> tuple[int, ...]:
        """Return the shape of the sums, a vector whose first entry is the number of examples."""

    @abstractmethod
    def sums(self, task: Task, *facts: Any) -> Sums:
        """Compute the sums of examples."""

    def counts(self, sums: Sums) -> NDArray[Any]:
        """Return those entries of sums that cannot be negative."""
        return sums

    @abstractmethod
    def metrics(self, task: Task, sums: Sums) -> dict[str, float]:
        """Compute all metrics, except `examples`."""

    def by_label(self, task: Task, sums: Sums) -> dict[str, dict[str, float]]:
        """Compute scores for each label; see `gramfuse_protocol.held_out.metrics.by_label`."""
        return {}

    @abstractmethod
    def groups(self, task: Task) -> tuple[RowGroup, ...]:
        """Return the groups of a row, in order; their shares add up to 1."""

    @abstractmethod
    def rows(self, task: Task, *facts: Any) -> Vector:
        """Compute the sum of the rows of examples."""

    @abstractmethod
    def figures(self, task: Task, vector: Vector) -> dict[str, float]:
        """Compute `examples` and all metrics from a sum of rows, not yet clipped to their ranges."""

    def moved(self, task: Task, metric: str, vector: Vector, noise: Vector) -> NDArray[Any] | None:
        """Return how far noise moves a metric at most, for one that noise only ever adds to; None for others.

        Args:
            vector: a sum of rows, with noise.
            noise: draws of it, (draws, entries).

        Returns:
            (draws,).
        """
        return None

    def label_figures(self, task: Task, vector: Vector) -> dict[str, dict[str, float]]:
        """Compute scores for each label, as `by_label` does, from a sum of rows."""
        return {}


TASK_KINDS: dict[str, TaskKind] = {}
"""All kinds by name."""


def register(kind: type[TaskKind]) -> type[TaskKind]:
    """Register a kind of task; raises ValueError if the name is taken."""
    if kind.name in TASK_KINDS:
        raise ValueError(f"task {kind.name!r} is already registered")
    TASK_KINDS[kind.name] = kind()
    return kind


def check_kind(name: str) -> str:
    """Return the name if it is a registered kind; raises ValueError with the known names otherwise."""
    if name not in TASK_KINDS:
        raise ValueError(f"unknown task {quoted(name)}; choose from {', '.join(sorted(TASK_KINDS))}")
    return name


def kind_of(task: Task) -> TaskKind:
    """Return the kind of a task."""
    return TASK_KINDS[task.task]
