"""The registry of kinds of task at a silo: how to read, encode, learn, measure and describe examples.

To add a kind, write a file in this folder with a class that implements all abstract methods, or that overrides another
kind:

    @register
    class OrdinalAtSilo(ClassificationAtSilo):
        name = "ordinal"

Another package can do the same before it reads data. `gramfuse_protocol.tasks.registry` defines the kind on the wire.
A file here must not import torch at import time, because reading data does not need it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from gramfuse_client.data.columns import Input, Reader, Target
from gramfuse_client.data.formats import Row
from gramfuse_protocol.contract.task import Task
from gramfuse_protocol.errors import PlanError

if TYPE_CHECKING:
    import torch

    from gramfuse_client.data.examples import Examples
    from gramfuse_client.training.outputs import Outputs
    from gramfuse_model.loading.base_model import Base
    from gramfuse_model.probing.batch import Batch

Variant = Literal["hard", "soft", "empirical"]
"""The label whose likelihood defines the Fisher information: the most likely one under the model ("hard"), all labels
weighted by their probability under the model ("soft"), or the true one ("empirical")."""

Loss = Callable[..., "torch.Tensor"]
"""(a model's outputs, labels) → mean over the batch, in the form that the transformers Trainer calls."""

Terms = Iterator[tuple[float, "torch.Tensor"]]
"""(weight, log-likelihood): the weighted squares of their gradients sum to an example's Fisher information."""


class TaskAtSilo(ABC):
    """One kind of task at a silo. The defaults are for texts with one answer each."""

    name: ClassVar[str]
    """Its name in a plan."""
    inputs_name: ClassVar[str] = "texts"
    """What the inputs are, in the plural."""
    fisher: ClassVar[tuple[Variant, ...]]
    """The variants of Fisher information that it supports, the usual one first."""
    label_is_input: ClassVar[bool] = False
    """Whether the model needs the label in its forward pass, so that every row must have one."""
    learns_inputs: ClassVar[bool] = False
    """Whether the targets follow from the inputs, so that no row needs a label."""
    nothing_to_learn: ClassVar[str] = ""
    """Describes the examples that `unlearnable` counts, for an error."""

    # Reading

    def check_ready(self) -> None:
        """Raise DataError if a library that reads the inputs is not installed."""
        return

    def input(self, row: Row, reader: Reader, where: str) -> Input:
        """Return a row's input.

        Args:
            reader: reads columns, and has the settings of the whole source.
            where: file and line, for errors.

        Raises:
            DataError: if it is missing or invalid.
        """
        return reader.text(row, reader.columns.text, where)

    @abstractmethod
    def label(self, row: Row, given: Input, reader: Reader, where: str) -> Target:
        """Return a row's label.

        Args:
            given: the row's input.
            reader, where: as for `input`.

        Raises:
            DataError: if it is missing or invalid.
        """

    def check_labels(self, path: Path, task: Task, labels: Sequence[Any]) -> None:
        """Raise DataError, naming the silo file, if a model could not learn from the training labels.

        Args:
            path: the silo file.
            labels: labels of all training examples.
        """
        return

    # Encoding

    def encode(self, examples: Examples, tokenizer: Any, task: Task) -> list[dict[str, Any]] | None:
        """Return a row of arrays and `labels` for each example; None if rows are made lazily by `encode_one`."""
        encoded = tokenizer(
            list(examples.inputs),
            None if examples.pairs is None else list(examples.pairs),
            truncation=True,
            max_length=task.max_length,
        )
        has_targets = self.learns_inputs or examples.labels[0] is not None
        labels = self.targets(examples, encoded, tokenizer, task) if has_targets else examples.labels
        return [{**{key: encoded[key][i] for key in encoded}, "labels": label} for i, label in enumerate(labels)]

    def encode_one(self, examples: Examples, index: int, tokenizer: Any) -> dict[str, Any]:
        """Return one example's row, if `encode` returns None."""
        raise NotImplementedError

    def targets(self, examples: Examples, encoded: Any, tokenizer: Any, task: Task) -> Sequence[Any]:
        """Return the training target of each example, as `labels` of its row.

        Args:
            encoded: the tokenizer's encoding of all inputs.
        """
        return examples.labels

    def unlearnable(self, rows: Sequence[Mapping[str, Any]]) -> int:
        """Return the number of examples with nothing to learn; a batch of only such examples has loss NaN."""
        return 0

    def inputs(self, rows: Sequence[dict[str, Any]], tokenizer: Any) -> Batch:
        """Return the inputs of rows as one batch."""
        return dict(tokenizer.pad(rows, return_attention_mask=True, return_tensors="pt"))

    def label_tensors(self, batch: Batch, labels: Sequence[Any]) -> Batch:
        """Return `labels` of a batch, and further tensors derived from them."""
        import torch

        return {"labels": torch.tensor(labels)}

    # Fitting a head in closed form

    def common(self, examples: Examples, task: Task, least: int, keys: Sequence[Hashable]) -> list[int]:
        """Return the indices of the examples that may be in the sums that a head is fitted from: by default all.

        Args:
            least: the silo's `limits.minimum-label-examples`.
            keys: of `gramfuse_client.data.alike.alike`: examples with equal ones count as one.
        """
        return list(range(len(examples)))

    def hide_rare(self, examples: Examples, rows: Sequence[dict[str, Any]], least: int) -> None:
        """Take out of encoded examples, in place, what may not be in the sums that a head is fitted from.

        That is for targets that are only parts of an example; `common` leaves out whole ones.

        Args:
            rows: of `encode`.
            least: the silo's `limits.minimum-label-examples`.
        """
        return

    # Training

    def loss(self, task: Task) -> Loss | None:
        """Return a loss over the silo's own labels, or None to use the model's own loss."""
        return None

    @abstractmethod
    def log_likelihoods(self, model: torch.nn.Module, example: Batch, task: Task, variant: Variant) -> Terms:
        """Yield (weight, log-likelihood) terms for the Fisher information of one example."""

    # Measuring

    def outputs(self, model: Any, batch: Mapping[str, torch.Tensor], task: Task, tokenizer: Any) -> Outputs:
        """Return a model's outputs for a batch."""
        from gramfuse_client.training.outputs import Outputs
        from gramfuse_model.probing.batch import inputs_of

        return Outputs(model(**inputs_of(batch)).logits)

    @abstractmethod
    def facts(self, batch: Mapping[str, torch.Tensor], outputs: Outputs, task: Task, tokenizer: Any) -> tuple[Any, ...]:
        """Return the truth and prediction of each example, as arguments for the protocol kind's `sums` and `rows`.

        Args:
            batch: `labels`, and `words` if there are any, on the CPU.
            outputs: the model's outputs, float32, on the CPU.
        """

    # Description

    @abstractmethod
    def describe_labels(self, examples: Examples, task: Task) -> str:
        """Describe the examples' labels: which ones, and how many of each."""

    def notice(self, examples: Examples, task: Task) -> str:
        """Describe how labels do not fit the plan; empty if they fit."""
        return ""

    def misfit(self, examples: Examples, task: Task) -> str:
        """Return the label description followed by the `notice`; empty without a notice."""
        notice = self.notice(examples, task)
        return f"{self.describe_labels(examples, task)}: {notice}" if notice else ""

    def rows_of(self, base: Base, task: Task) -> int:
        """Return the maximum number of rows of one example in a layer."""
        return task.max_length


AT_SILO: dict[str, TaskAtSilo] = {}
"""All kinds by name."""


def register(kind: type[TaskAtSilo]) -> type[TaskAtSilo]:
    """Register a kind of task; raise ValueError if its name is taken."""
    if kind.name in AT_SILO:
        raise ValueError(f"a kind of task {kind.name!r} is registered already")
    AT_SILO[kind.name] = kind()
    return kind


def at_silo(task: Task) -> TaskAtSilo:
    """Return the kind of a task.

    Raises:
        PlanError: if the kind is valid in a plan, but not registered here.
    """
    if task.task not in AT_SILO:
        raise PlanError(
            f"silos do not support task {task.task!r}, only {', '.join(sorted(AT_SILO))}; the package that adds this "
            "kind must register it in gramfuse_client.tasks too"
        )
    return AT_SILO[task.task]
