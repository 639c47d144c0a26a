"""What a model is fine-tuned for: its kind of task, labels and text lengths."""

from __future__ import annotations

import math
from typing import Annotated, Any

from pydantic import AfterValidator, Field, field_validator, model_validator

from gramfuse_protocol.bounds import VALUES, Many
from gramfuse_protocol.documents import Section
from gramfuse_protocol.tasks.registry import check_kind, kind_of

TaskName = Annotated[str, AfterValidator(check_kind)]
"""The name of a kind of task (`gramfuse_protocol.tasks`)."""

LabelName = Annotated[str, Field(min_length=1, max_length=200)]
Labels = Annotated[Many[LabelName], Field(max_length=VALUES)]

KIND_SETTINGS: tuple[tuple[tuple[str, ...], str], ...] = (
    (("centre", "scale"), "has no targets with a 'centre' and a 'scale'"),
    (("first_token",), "generates no texts with a 'first-token'"),
    (("pair",), "has no pairs of texts"),
)
"""Settings that only some kinds accept, and the error text for the others."""


class TaskSettings(Section):
    """The settings of a task, except its kind."""

    labels: Labels = ()
    """Labels; for `token-classification` the tags of the IOB2 scheme: O, and B-X and I-X for each type X."""
    pair: bool = False
    """Whether an example is two texts."""
    max_length: Annotated[int, Field(ge=2, le=131072)] = 128
    """Maximum number of tokens in an example, both texts together."""
    target_length: Annotated[int, Field(ge=2, le=131072)] = 32
    """`sequence-to-sequence`: maximum number of tokens in a target, and in a generated text during evaluation."""
    first_token: Annotated[str, Field(min_length=1, max_length=200)] | None = None
    """`sequence-to-sequence`: the forced first token of every generated text during evaluation.

    Multilingual models select the language this way ("de_DE"). By default no token is forced, regardless of the base
    model's own generation settings.
    """
    threshold: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """`multi-label`: minimum probability at which a label counts as predicted."""
    centre: Annotated[float, Field(allow_inf_nan=False)] = 0.0
    """`regression`: the value subtracted from each target before training; about the targets' mean.

    Metrics, and the outputs of the written model, always use the targets' own scale.
    """
    scale: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    """`regression`: the divisor of each target after `centre` is subtracted; about the targets' standard deviation."""
    range: tuple[float, float] | None = None
    """`regression`: lowest and highest target; a target outside this range is an error.

    If held-out results leave in a secure sum, the default is one `scale` on each side of `centre`, and predictions are
    clipped to the range in that sum. Otherwise there is no default.
    """

    @field_validator("range")
    @classmethod
    def _check_range(cls, value: tuple[float, float] | None) -> tuple[float, float] | None:
        if value is not None and not (-math.inf < value[0] < value[1] < math.inf):
            raise ValueError("'range' must be two finite numbers, the lower one first")
        return value


class Task(TaskSettings):
    """A complete task: a kind and its settings.

    Example:
        >>> gramfuse.Task(task="classification", labels=("no", "yes")).max_length
        128
    """

    task: TaskName

    @property
    def annotated(self) -> tuple[int, ...]:
        """Indices of the annotated labels: all labels, unless this is a `MaskedTask`."""
        return tuple(range(len(self.labels)))

    @property
    def masked(self) -> bool:
        """Whether some label is not annotated."""
        return len(self.annotated) < len(self.labels)

    @property
    def entities(self) -> tuple[str, ...]:
        """`token-classification`: the entity types, in the order of their B- tags."""
        return tuple(tag[2:] for tag in self.labels if tag.startswith("B-"))

    @property
    def generation(self) -> dict[str, Any] | None:
        """Generation settings during evaluation, for reports; None for tasks that generate no text."""
        return kind_of(self).generation(self)

    @model_validator(mode="after")
    def _settings_fit_the_kind(self) -> Task:
        kind = kind_of(self)
        if not kind.least_labels and self.labels:
            raise ValueError(f"task {self.task!r} has no labels")
        if len(self.labels) < kind.least_labels:
            minimum = {1: "one label", 2: "two labels"}.get(kind.least_labels, f"{kind.least_labels} labels")
            raise ValueError(f"task {self.task!r} needs at least {minimum}")
        if len(set(self.labels)) != len(self.labels):
            raise ValueError("a label is listed twice")
        for names, why in KIND_SETTINGS:
            is_set = any(getattr(self, name) != TaskSettings.model_fields[name].default for name in names)
            if is_set and not kind.options.issuperset(names):
                raise ValueError(f"task {self.task!r} {why}")
        kind.check(self)
        return self


class MaskedTask(Task):
    """A task at a silo that annotates only some of the labels; its data say nothing about the others."""

    annotates: Labels

    @property
    def annotated(self) -> tuple[int, ...]:
        """Indices of the annotated labels, in the task's order."""
        annotates = set(self.annotates)
        return tuple(index for index, label in enumerate(self.labels) if label in annotates)
