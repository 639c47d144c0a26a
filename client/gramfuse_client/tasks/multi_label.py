"""Any number of labels for each text.

| input | label |
|---|---|
| `text` (and `text-pair`): text | a list of labels, [] if none applies; or one |
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from gramfuse_client.data.columns import Input, Reader, unpacked
from gramfuse_client.data.formats import Row
from gramfuse_client.tasks.registry import Loss, TaskAtSilo, Terms, Variant, register
from gramfuse_client.tasks.words import of_labels
from gramfuse_protocol.contract.task import Task
from gramfuse_protocol.errors import DataError
from gramfuse_protocol.text import listed, quoted

if TYPE_CHECKING:
    import torch

    from gramfuse_client.data.examples import Examples
    from gramfuse_client.training.outputs import Batch, Outputs

SEVERAL = re.compile(r"[,;|]|^\s*\[")
"""What is in a text that may stand for several labels."""


@register
class MultiLabelAtSilo(TaskAtSilo):
    """Any number of labels: 0.0 or 1.0 for each, NaN where the silo does not annotate it."""

    name = "multi-label"
    fisher = ("hard", "soft", "empirical")

    def label(self, row: Row, given: Input, reader: Reader, where: str) -> tuple[int, ...]:
        """Return the indices of all labels that apply, in the plan's order."""
        column, known = reader.columns.label, reader.known
        value = reader.value(row, column, where)
        if value is None or value == "":
            raise DataError(
                f"{where}: column {column!r} is empty; write [] if none of the labels applies, or leave the example "
                "out if nobody looked"
            )
        found = unpacked(value)
        if isinstance(value, str):
            single = value in known or value in reader.task.labels
            if single and isinstance(found, list):
                raise DataError(
                    f"{where}: column {column!r} holds {quoted(value)}, which is a label and a list of labels; write "
                    f"{json.dumps([value], ensure_ascii=False)} for that label"
                )
            if not single and found is value and SEVERAL.search(value):
                raise DataError(
                    f"{where}: unknown label {quoted(value)}; several labels are a list as in JSON: "
                    f'["a", "b"], or [] if none applies. {reader.words.labels.capitalize()} are {listed(known, 20)}'
                )
        indices = [reader.index(one, where) for one in (found if isinstance(found, list) else [value])]
        if len(set(indices)) < len(indices):
            raise DataError(f"{where}: column {column!r} has a label twice: {quoted(value)}")
        return tuple(sorted(indices))

    def targets(self, examples: Examples, encoded: Any, tokenizer: Any, task: Task) -> list[list[float]]:
        own, labels = set(task.annotated), range(len(task.labels))
        applying: Sequence[Any] = examples.labels
        return [[float(label in one) if label in own else math.nan for label in labels] for one in applying]

    def loss(self, task: Task) -> Loss:
        """Return the mean of the binary cross-entropies of the labels that are not NaN."""
        from torch.nn.functional import binary_cross_entropy_with_logits

        def loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
            real = ~labels.isnan()
            return binary_cross_entropy_with_logits(outputs.logits[real], labels[real])

        return loss

    def log_likelihoods(self, model: torch.nn.Module, example: Batch, task: Task, variant: Variant) -> Terms:
        """Yield the log-likelihood of a set of independent labels.

        For `soft`, the expectation over all sets is a sum over labels, since ∂ log p(y)/∂z = y − σ(z) has the mean 0
        and the variance σ(z)(1 − σ(z)): Σ σ(1 − σ) (∂z/∂θ)².
        """
        from torch.nn.functional import binary_cross_entropy_with_logits

        from gramfuse_client.training.outputs import inputs_of

        own = list(task.annotated)
        z = model(**inputs_of(example)).logits[0][own]
        if variant == "soft":
            for one in z:
                p = float(one.detach().sigmoid())
                yield p * (1 - p), one
            return
        true = variant == "empirical"
        y = (example["labels"][0][own] if true else z.detach().sigmoid() >= task.threshold).to(z.dtype)
        yield 1.0, -binary_cross_entropy_with_logits(z, y, reduction="sum")

    def facts(self, batch: Mapping[str, torch.Tensor], found: Outputs, task: Task, tokenizer: Any) -> tuple[Any, ...]:
        return batch["labels"].bool().numpy(), (found.logits.sigmoid() >= task.threshold).numpy()

    def counted(self, examples: Examples, task: Task) -> str:
        found = Counter(task.labels[i] for one in examples.labels if isinstance(one, tuple) for i in one)
        return of_labels(task, found, f"; none of them {sum(not one for one in examples.labels):,}")
