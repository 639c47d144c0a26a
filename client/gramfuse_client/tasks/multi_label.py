"""Multi-label classification: any number of labels for each text.

| input | label |
|---|---|
| `text` (and `text-pair`): text | a list of labels, [] if none applies; or a single label |
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from gramfuse_client.data.columns import Input, Reader, unpacked
from gramfuse_client.data.formats import Row
from gramfuse_client.tasks.registry import Loss, TaskAtSilo, Terms, Variant, register
from gramfuse_client.tasks.words import list_label_counts
from gramfuse_protocol.contract.task import Task
from gramfuse_protocol.errors import DataError
from gramfuse_protocol.text import listed, quoted

if TYPE_CHECKING:
    import torch

    from gramfuse_client.data.examples import Examples
    from gramfuse_client.training.outputs import Outputs
    from gramfuse_model.probing.batch import Batch

SEVERAL = re.compile(r"[,;|]|^\s*\[")
"""Matches a text that may be meant as several labels."""


@register
class MultiLabelAtSilo(TaskAtSilo):
    """Multi-label classification. A target is 0.0 or 1.0 for each label, NaN if the silo does not annotate it."""

    name = "multi-label"
    fisher = ("hard", "soft", "empirical")

    def label(self, row: Row, given: Input, reader: Reader, where: str) -> tuple[int, ...]:
        """Return the indices of all labels that apply, in the plan's order."""
        column, known = reader.columns.label, reader.known
        value = reader.value(row, column, where)
        if value is None or value == "":
            raise DataError(
                f"{where}: column {column!r} is empty; write [] if no label applies, or leave the example out if "
                "nobody labelled it"
            )
        parsed = unpacked(value)
        if isinstance(value, str):
            is_label = value in known or value in reader.task.labels
            if is_label and isinstance(parsed, list):
                raise DataError(
                    f"{where}: column {column!r} holds {quoted(value)}, which is both a label and a list of labels; "
                    f"write {json.dumps([value], ensure_ascii=False)} for that label"
                )
            if not is_label and parsed is value and SEVERAL.search(value):
                raise DataError(
                    f"{where}: unknown label {quoted(value)}; write several labels as a JSON list: "
                    f'["a", "b"], or [] if none applies. {reader.words.labels.capitalize()} are {listed(known, 20)}'
                )
        indices = [reader.index(label, where) for label in (parsed if isinstance(parsed, list) else [value])]
        if len(set(indices)) < len(indices):
            raise DataError(f"{where}: column {column!r} has a label twice: {quoted(value)}")
        return tuple(sorted(indices))

    def targets(self, examples: Examples, encoded: Any, tokenizer: Any, task: Task) -> list[list[float]]:
        annotated, labels = set(task.annotated), range(len(task.labels))
        by_example: Sequence[Any] = examples.labels
        return [
            [float(label in applying) if label in annotated else math.nan for label in labels]
            for applying in by_example
        ]

    def common(self, examples: Examples, task: Task, least: int, keys: Sequence[Hashable]) -> list[int]:
        """Return the indices of the examples of whose labels each applies to at least so many different ones of these.

        The same holds of the examples that an annotated label does not apply to. An example that is left out counts for
        none of its labels any more.
        """
        kept: list[int] = list(range(len(examples)))
        while kept:
            different = len({keys[index] for index in kept})
            pairs = {(keys[index], label) for index in kept for label in self._applying(examples, index)}
            counts = Counter(label for _, label in pairs)
            rare = {label for label, count in counts.items() if count < least}
            usual = {label for label, count in counts.items() if different - least < count < different}
            left = [
                index
                for index in kept
                if not rare & (applying := self._applying(examples, index)) and usual <= applying
            ]
            if len(left) == len(kept):
                break
            kept = left
        return kept

    @staticmethod
    def _applying(examples: Examples, index: int) -> set[int]:
        labels: Any = examples.labels[index]
        return set(labels)

    def loss(self, task: Task) -> Loss:
        """Return the mean of the binary cross-entropies of the labels that are not NaN."""
        from torch.nn.functional import binary_cross_entropy_with_logits

        def loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
            real = ~labels.isnan()
            return binary_cross_entropy_with_logits(outputs.logits[real], labels[real])

        return loss

    def log_likelihoods(self, model: torch.nn.Module, example: Batch, task: Task, variant: Variant) -> Terms:
        """Yield the log-likelihood of a set of independent labels.

        For `soft`, the expectation over all sets is a sum over labels, because ∂ log p(y)/∂z = y − σ(z) has mean 0 and
        variance σ(z)(1 − σ(z)): Σ σ(1 − σ) (∂z/∂θ)².
        """
        from torch.nn.functional import binary_cross_entropy_with_logits

        from gramfuse_model.probing.batch import inputs_of

        annotated = list(task.annotated)
        z = model(**inputs_of(example)).logits[0][annotated]
        if variant == "soft":
            for logit in z:
                p = float(logit.detach().sigmoid())
                yield p * (1 - p), logit
            return
        true = variant == "empirical"
        y = (example["labels"][0][annotated] if true else z.detach().sigmoid() >= task.threshold).to(z.dtype)
        yield 1.0, -binary_cross_entropy_with_logits(z, y, reduction="sum")

    def facts(self, batch: Mapping[str, torch.Tensor], outputs: Outputs, task: Task, tokenizer: Any) -> tuple[Any, ...]:
        return batch["labels"].bool().numpy(), (outputs.logits.sigmoid() >= task.threshold).numpy()

    def describe_labels(self, examples: Examples, task: Task) -> str:
        counts = Counter(task.labels[i] for labels in examples.labels if isinstance(labels, tuple) for i in labels)
        return list_label_counts(task, counts, f"; no label {sum(not labels for labels in examples.labels):,}")
