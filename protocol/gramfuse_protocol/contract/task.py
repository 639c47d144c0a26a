"""What a model is fine-tuned for: the kind of its output, its labels, and how long its texts are."""

from __future__ import annotations

import math
from typing import Annotated, Any

from pydantic import AfterValidator, Field, field_validator, model_validator

from gramfuse_protocol.bounds import VALUES, Many
from gramfuse_protocol.documents import Section
from gramfuse_protocol.tasks.registry import check_kind, kind_of

TaskKind = Annotated[str, AfterValidator(check_kind)]
"""Name of a kind of task (`gramfuse_protocol.tasks`)."""

Label = Annotated[str, Field(min_length=1, max_length=200)]
Labels = Annotated[Many[Label], Field(max_length=VALUES)]

OWNED: tuple[tuple[tuple[str, ...], str], ...] = (
    (("centre", "scale"), "has no targets with a 'centre' and a 'scale'"),
    (("first_token",), "generates no texts with a 'first-token'"),
    (("pair",), "has no pairs of texts"),
)
"""Settings that only some kinds have, and what is said of others."""


class TaskSettings(Section):
    """What belongs to a task, but for its kind."""

    labels: Labels = ()
    """Labels; for `token-classification` the tags of the IOB2 scheme: O, and B-X and I-X for each type X."""
    pair: bool = False
    """Whether an example is two texts."""
    max_length: Annotated[int, Field(ge=2, le=131072)] = 128
    """Most tokens of an example, both texts together."""
    target_length: Annotated[int, Field(ge=2, le=131072)] = 32
    """`sequence-to-sequence`: most tokens of a target, and of what is generated when the model is measured."""
    first_token: Annotated[str, Field(min_length=1, max_length=200)] | None = None
    """`sequence-to-sequence`: the token that every generated text begins with when the model is measured.

    Multilingual models name the language so ("de_DE"). By default none is forced, whatever the base model's own
    settings for generation say.
    """
    threshold: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """`multi-label`: the probability from which on a label counts as predicted."""
    centre: Annotated[float, Field(allow_inf_nan=False)] = 0.0
    """`regression`: what is taken off each target before training; about their mean.

    Metrics, and what the model that is written gives, are on the targets' own scale whatever this is.
    """
    scale: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    """`regression`: what each target, less `centre`, is divided by; about their standard deviation."""
    range: tuple[float, float] | None = None
    """`regression`: lowest and highest target; a target outside of it is an error.

    Where held-out results leave in a secure sum, it is one `scale` on each side of `centre` by default, and in that sum
    a prediction outside of it counts as the nearer end. Elsewhere there is none by default.
    """

    @field_validator("range")
    @classmethod
    def _range_is_one(cls, value: tuple[float, float] | None) -> tuple[float, float] | None:
        if value is not None and not (-math.inf < value[0] < value[1] < math.inf):
            raise ValueError("'range' is two finite numbers, the lower one first")
        return value


class Task(TaskSettings):
    """A whole task.

    Example:
        >>> gramfuse.Task(task="classification", labels=("no", "yes")).max_length
        128
    """

    task: TaskKind

    @property
    def annotated(self) -> tuple[int, ...]:
        """Indices of the labels that are annotated: all of them, unless this is a `MaskedTask`."""
        return tuple(range(len(self.labels)))

    @property
    def masked(self) -> bool:
        """Whether a label is not annotated."""
        return len(self.annotated) < len(self.labels)

    @property
    def entities(self) -> tuple[str, ...]:
        """`token-classification`: the types of entities, in the order of their B- tags."""
        return tuple(tag[2:] for tag in self.labels if tag.startswith("B-"))

    @property
    def generation(self) -> dict[str, Any] | None:
        """How texts are generated when models are measured, for reports; None for tasks that generate none."""
        return kind_of(self).generation(self)

    @model_validator(mode="after")
    def _settings_fit_the_kind(self) -> Task:
        kind = kind_of(self)
        if not kind.least_labels and self.labels:
            raise ValueError(f"task {self.task!r} has no labels")
        if len(self.labels) < kind.least_labels:
            least = {1: "one label", 2: "two labels"}.get(kind.least_labels, f"{kind.least_labels} labels")
            raise ValueError(f"task {self.task!r} needs at least {least}")
        if len(set(self.labels)) != len(self.labels):
            raise ValueError("a label is listed twice")
        for names, why in OWNED:
            given = any(getattr(self, name) != TaskSettings.model_fields[name].default for name in names)
            if given and not kind.options.issuperset(names):
                raise ValueError(f"task {self.task!r} {why}")
        kind.check(self)
        return self


class MaskedTask(Task):
    """A task at a silo that annotates only some of its labels: of the others it says nothing, neither yes nor no."""

    annotates: Labels

    @property
    def annotated(self) -> tuple[int, ...]:
        """Indices of the labels that are annotated, in the task's order."""
        annotates = set(self.annotates)
        return tuple(index for index, label in enumerate(self.labels) if label in annotates)
