"""The registry of kinds of task: what a plan may say of each, and how results of held-out examples add up over silos.

To add a kind, write a file in this folder with a class that has all that is abstract here:

    @register
    class Ordinal(Classification):
        name = "ordinal"
        primary = "within-one"
        measures = Classification.measures | {"within-one": Measure("share of examples at most one label off")}

        def metrics(self, task: Task, sums: Sums) -> dict[str, float]:
            near = sum(float(np.trace(sums, offset)) for offset in (-1, 0, 1))
            return super().metrics(task, sums) | {"within-one": share(near, examples_in(sums))}

Another package can do the same before it reads a plan. What a silo does with its examples stands in
`gramfuse_client.tasks.registry`, and the model class in `gramfuse_model.loading.auto_classes.FORMS`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

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
        words: what it says, in one line; higher is better unless it says otherwise.
        range: its lowest and highest value.
    """

    words: str
    range: tuple[float, float] = SHARE


class TaskKind(ABC):
    """One kind of task.

    A silo turns truth and prediction of its examples (the facts, arrays or lists of one entry for each example) into
    `sums`, which add up exactly, or into `rows` where they leave with noise: bounded vectors
    (`gramfuse_protocol.held_out.sums`), whose sum `figures` turns into the same metrics.
    """

    name: ClassVar[str]
    """In a plan."""
    primary: ClassVar[str]
    """The metric that models are ranked by; higher is better."""
    measures: ClassVar[Mapping[str, Measure]]
    """All metrics by name, but for `examples`."""
    summed: ClassVar[str]
    """What the sums say, in words."""
    least_labels: ClassVar[int] = 0
    """How many labels a plan must list; 0 for a kind without labels."""
    partial_labels: ClassVar[bool] = False
    """Whether a silo may annotate some of the labels only."""
    exclusive: ClassVar[bool] = False
    """Whether one label of an example says that all others are absent."""
    headless: ClassVar[bool] = False
    """Whether models have no head for the task: what they predict tokens with came with the base model."""
    options: ClassVar[frozenset[str]] = frozenset()
    """Of the settings `pair`, `centre`, `scale` and `first_token` of a task, those that it has."""
    unit: ClassVar[tuple[str, str]] = ("label", "labels")
    """What results are told by: one, and several."""
    first_label: ClassVar[int | None] = None
    """Where in a row the entries of labels begin: found, too much, missed; None if there are none."""

    def check(self, task: Task) -> None:
        """Raise ValueError if the labels of a task are none of this kind."""
        return

    def names(self, task: Task) -> tuple[str, ...]:
        """Return what results are told by: labels, or what they are about."""
        return task.labels

    def for_sum(self, task: Task) -> Task:
        """Return a task with what it needs where held-out results leave in a secure sum only."""
        return task

    def generation(self, task: Task) -> dict[str, Any] | None:
        """Return how texts are generated when models are measured, for reports; None if none are."""
        return None

    @abstractmethod
    def shape(self, task: Task) -> tuple[int, ...]:
        """Return the shape of the sums: a confusion matrix, or a vector that begins with the number of examples."""

    @abstractmethod
    def sums(self, task: Task, *facts: Any) -> Sums:
        """Return the sums of examples."""

    def counts(self, sums: Sums) -> NDArray[Any]:
        """Return the entries of sums that cannot be negative."""
        return sums

    @abstractmethod
    def metrics(self, task: Task, sums: Sums) -> dict[str, float]:
        """Return all metrics, but for `examples`."""

    def by_label(self, task: Task, sums: Sums) -> dict[str, dict[str, float]]:
        """Return what `gramfuse_protocol.held_out.metrics.by_label` does."""
        return {}

    @abstractmethod
    def groups(self, task: Task) -> tuple[RowGroup, ...]:
        """Return the groups of a row, in order; their shares add up to 1."""

    @abstractmethod
    def rows(self, task: Task, *facts: Any) -> Vector:
        """Return the sum of the rows of examples."""

    @abstractmethod
    def figures(self, task: Task, vector: Vector) -> dict[str, float]:
        """Return `examples` and all metrics of a sum of rows, before they are clipped to their ranges."""

    def label_figures(self, task: Task, vector: Vector) -> dict[str, dict[str, float]]:
        """Return what `by_label` does, of a sum of rows."""
        return {}


KINDS: dict[str, TaskKind] = {}
"""All kinds by name."""


def register(kind: type[TaskKind]) -> type[TaskKind]:
    """Register a kind; raises ValueError if there is one of this name."""
    if kind.name in KINDS:
        raise ValueError(f"there is a kind of task {kind.name!r} already")
    KINDS[kind.name] = kind()
    return kind


def check_kind(name: str) -> str:
    """Return the name of a kind, or raise ValueError that lists what there is."""
    if name not in KINDS:
        raise ValueError(f"there is no kind of task {quoted(name)}; there are {', '.join(sorted(KINDS))}")
    return name


def kind_of(task: Task) -> TaskKind:
    """Return the kind of a task."""
    return KINDS[task.task]
