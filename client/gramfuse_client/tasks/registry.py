"""The registry of kinds of task at a silo: how examples are read, encoded, learned from, measured, and told of.

To add a kind, write a file in this folder with a class that has all that is abstract here, or what differs from
another kind:

    @register
    class OrdinalAtSilo(ClassificationAtSilo):
        name = "ordinal"

Another package can do the same before it reads data. What the kind is on the wire stands in
`gramfuse_protocol.tasks.registry`. A file must not load torch when it is imported: data are read without it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from gramfuse_client.data.columns import Input, Label, Reader
from gramfuse_client.data.formats import Row
from gramfuse_protocol.contract.task import Task
from gramfuse_protocol.errors import PlanError

if TYPE_CHECKING:
    import torch

    from gramfuse_client.data.examples import Examples
    from gramfuse_client.training.outputs import Batch, Outputs
    from gramfuse_model.loading.base_model import Base

Variant = Literal["hard", "soft", "empirical"]
"""Of which label the likelihood is taken for Fisher information: the one that the model finds most likely, all of them,
weighed by how likely the model finds them, or the true one."""

Loss = Callable[..., "torch.Tensor"]
"""(a model's outputs, labels) → mean over the batch; as the transformers Trainer takes it."""

Terms = Iterator[tuple[float, "torch.Tensor"]]
"""(weight, log-likelihood): the weighted squares of their gradients add up to an example's Fisher information."""


class TaskAtSilo(ABC):
    """One kind of task at a silo. What is not abstract is that of texts with one answer each."""

    name: ClassVar[str]
    """In a plan."""
    of: ClassVar[str] = "texts"
    """What examples are."""
    fisher: ClassVar[tuple[Variant, ...]]
    """What Fisher information it can have, the usual one first."""
    label_is_input: ClassVar[bool] = False
    """Whether a model needs the label to compute anything, so that every row must have one."""
    learns_inputs: ClassVar[bool] = False
    """Whether what is to be learned follows from the inputs, so that no row needs a label."""
    nothing_to_learn: ClassVar[str] = ""
    """What is wrong with examples that `unlearnable` counts."""

    # Reading

    def check_ready(self) -> None:
        """Raise DataError if a library that reads the inputs is not installed."""
        return

    def input(self, row: Row, reader: Reader, where: str) -> Input:
        """Return the input in a row.

        Args:
            reader: reads columns, and knows all that is the same for all rows.
            where: file and line, for errors.

        Raises:
            DataError: if it is none.
        """
        return reader.text(row, reader.columns.text, where)

    @abstractmethod
    def label(self, row: Row, given: Input, reader: Reader, where: str) -> Label:
        """Return the label in a row.

        Args:
            given: the input.
            reader, where: as `input` has them.

        Raises:
            DataError: if it is none.
        """

    def check_labels(self, path: Path, task: Task, labels: Sequence[Any]) -> None:
        """Raise DataError, naming the silo file, if nothing is learned from the labels of all training examples."""
        return

    # Encoding

    def encode(self, examples: Examples, tokenizer: Any, task: Task) -> list[dict[str, Any]] | None:
        """Return a row of arrays and `labels` for each example; None if each is made when it is asked for."""
        encoded = tokenizer(
            list(examples.inputs),
            None if examples.pairs is None else list(examples.pairs),
            truncation=True,
            max_length=task.max_length,
        )
        known = self.learns_inputs or examples.labels[0] is not None
        labels = self.targets(examples, encoded, tokenizer, task) if known else examples.labels
        return [{**{key: encoded[key][i] for key in encoded}, "labels": label} for i, label in enumerate(labels)]

    def encode_one(self, examples: Examples, index: int, tokenizer: Any) -> dict[str, Any]:
        """Return one row, where `encode` returns None."""
        raise NotImplementedError

    def targets(self, examples: Examples, encoded: Any, tokenizer: Any, task: Task) -> Sequence[Any]:
        """Return what is to be learned of each example, as its row has it.

        Args:
            encoded: what the tokenizer made of all inputs.
        """
        return examples.labels

    def unlearnable(self, rows: Sequence[Mapping[str, Any]]) -> int:
        """Return how many examples have nothing to learn: of a batch of such, the loss is no number."""
        return 0

    def inputs(self, rows: Sequence[dict[str, Any]], tokenizer: Any) -> Batch:
        """Return the inputs of rows as one batch."""
        return dict(tokenizer.pad(rows, return_attention_mask=True, return_tensors="pt"))

    def label_tensors(self, batch: Batch, labels: Sequence[Any]) -> Batch:
        """Return `labels` of a batch, and what else follows from them."""
        import torch

        return {"labels": torch.tensor(labels)}

    # Training

    def loss(self, task: Task) -> Loss | None:
        """Return the loss over a silo's own labels, or None where the model's own loss is the right one."""
        return None

    @abstractmethod
    def log_likelihoods(self, model: torch.nn.Module, example: Batch, task: Task, variant: Variant) -> Terms:
        """Yield weights and log-likelihoods for the Fisher information of one example."""

    # Measuring

    def outputs(self, model: Any, batch: Mapping[str, torch.Tensor], task: Task, tokenizer: Any) -> Outputs:
        """Return what a model says of a batch."""
        from gramfuse_client.training.outputs import Outputs, inputs_of

        return Outputs(model(**inputs_of(batch)).logits)

    @abstractmethod
    def facts(self, batch: Mapping[str, torch.Tensor], found: Outputs, task: Task, tokenizer: Any) -> tuple[Any, ...]:
        """Return truth and prediction of each example, as `gramfuse_protocol.tasks` counts them.

        Args:
            batch: `labels`, and `words` if there are any, on the CPU.
            found: float32, on the CPU.
        """

    # Words

    @abstractmethod
    def counted(self, examples: Examples, task: Task) -> str:
        """Say what labels examples have, and how many of each."""

    def notice(self, examples: Examples, task: Task) -> str:
        """Say what does not fit the labels in the plan, if anything."""
        return ""

    def misfit(self, examples: Examples, task: Task) -> str:
        """Say what labels examples have if there is a `notice`, and the notice; otherwise nothing."""
        notice = self.notice(examples, task)
        return f"{self.counted(examples, task)}: {notice}" if notice else ""

    def rows_of(self, base: Base, task: Task) -> int:
        """Return how many rows one example has in a layer at most."""
        return task.max_length


AT_SILO: dict[str, TaskAtSilo] = {}
"""All kinds by name."""


def register(kind: type[TaskAtSilo]) -> type[TaskAtSilo]:
    """Register a kind; raises ValueError if there is one of this name."""
    if kind.name in AT_SILO:
        raise ValueError(f"there is a kind of task {kind.name!r} already")
    AT_SILO[kind.name] = kind()
    return kind


def at_silo(task: Task) -> TaskAtSilo:
    """Return the kind of a task.

    Raises:
        PlanError: if it is one that plans may have, and that nothing here can read.
    """
    if task.task not in AT_SILO:
        raise PlanError(
            f"silos cannot do task {task.task!r}, only {', '.join(sorted(AT_SILO))}; whatever adds that kind must "
            "register it in gramfuse_client.tasks too"
        )
    return AT_SILO[task.task]
