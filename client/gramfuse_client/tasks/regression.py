"""Regression: one number for each text.

| input | label |
|---|---|
| `text` (and `text-pair`): text | a finite number; within the plan's range, if results leave in a secure sum |
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gramfuse_client.data.columns import Input, Reader
from gramfuse_client.data.formats import Row
from gramfuse_client.data.targets import check_targets, describe_targets
from gramfuse_client.tasks.registry import TaskAtSilo, Terms, Variant, register
from gramfuse_protocol.contract.task import Task
from gramfuse_protocol.errors import DataError
from gramfuse_protocol.text import quoted

if TYPE_CHECKING:
    import torch

    from gramfuse_client.data.examples import Examples
    from gramfuse_client.training.outputs import Outputs
    from gramfuse_model.probing.batch import Batch


@register
class RegressionAtSilo(TaskAtSilo):
    """Regression. A model learns (target − centre) / scale; errors are measured on the targets' own scale."""

    name = "regression"
    fisher = ("empirical",)

    def label(self, row: Row, given: Input, reader: Reader, where: str) -> float:
        value, allowed = reader.value(row, reader.columns.label, where), reader.task.range
        try:
            target = math.nan if isinstance(value, bool) or "_" in str(value) else float(value)
        except (TypeError, ValueError, OverflowError):
            target = math.nan
        if not math.isfinite(target):
            raise DataError(f"{where}: the target must be a finite number, found {quoted(value)}")
        if allowed is not None and not allowed[0] <= target <= allowed[1]:
            raise DataError(
                f"{where}: the target {target:g} is outside {reader.words.range} of {allowed[0]:g} to {allowed[1]:g}; "
                f"{reader.words.beyond}"
            )
        return target

    def check_labels(self, path: Path, task: Task, labels: Sequence[Any]) -> None:
        check_targets(path, task, labels)

    def targets(self, examples: Examples, encoded: Any, tokenizer: Any, task: Task) -> list[float]:
        labels: Sequence[Any] = examples.labels
        return [(target - task.centre) / task.scale for target in labels]

    def log_likelihoods(self, model: torch.nn.Module, example: Batch, task: Task, variant: Variant) -> Terms:
        """Yield the log-likelihood of a Gaussian with variance 1."""
        from gramfuse_model.probing.batch import inputs_of

        logits = model(**inputs_of(example)).logits
        yield 1.0, -0.5 * (logits.reshape(()) - example["labels"].reshape(())).square()

    def facts(self, batch: Mapping[str, torch.Tensor], outputs: Outputs, task: Task, tokenizer: Any) -> tuple[Any, ...]:
        truth_and_prediction = batch["labels"], outputs.logits.squeeze(-1)
        return tuple((task.centre + task.scale * values.double()).numpy() for values in truth_and_prediction)

    def describe_labels(self, examples: Examples, task: Task) -> str:
        return describe_targets(task, examples.labels)[0]

    def notice(self, examples: Examples, task: Task) -> str:
        return describe_targets(task, examples.labels)[1]
