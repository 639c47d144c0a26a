"""Measures a model on a silo's held-out examples: exactly, or for a sum that leaves with noise."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from gramfuse_client.data.batches import Encoded, batches
from gramfuse_client.tasks.registry import at_silo
from gramfuse_client.training.afresh import Afresh
from gramfuse_client.training.outputs import ANSWERS, Outputs
from gramfuse_protocol.contract.task import Task
from gramfuse_protocol.held_out.metrics import Sums, sums_shape
from gramfuse_protocol.held_out.sums import Vector, size
from gramfuse_protocol.tasks.registry import kind_of


def outputs(model: Any, batch: Mapping[str, torch.Tensor], task: Task, tokenizer: Any) -> Outputs:
    """Run a model on a batch, without autograd; it must be in evaluation mode.

    Texts are generated as `gramfuse_model.generation` says.
    """
    with torch.no_grad():
        return at_silo(task).outputs(model, batch, task, tokenizer)


def count(batch: Mapping[str, torch.Tensor], found: Outputs, task: Task, tokenizer: Any) -> Sums:
    """Return the sums of one batch (`gramfuse_protocol.held_out.metrics`), exactly.

    Labels that the silo does not annotate are neither predicted nor counted. Of `token-classification`, all words
    count: of one without a token, or behind `max_length`, a model says nothing, which is O. A target text is compared
    as the tokenizer gives it back, `target_length` tokens long.

    Args:
        batch: `labels` included, and `words` (`gramfuse_client.data.batches.batches`).
        found: of a model, or of several together.
    """
    return kind_of(task).sums(task, *_facts(batch, found, task, tokenizer))


def rows(batch: Mapping[str, torch.Tensor], found: Outputs, task: Task, tokenizer: Any) -> Vector:
    """Return the sum of the rows of one batch (`gramfuse_protocol.held_out.sums`): bounded, whatever the model says.

    Arguments as `count` has them, and otherwise counted as there.
    """
    return kind_of(task).rows(task, *_facts(batch, found, task, tokenizer))


def evaluate(model: Any, batches: Iterable[Mapping[str, torch.Tensor]], task: Task, tokenizer: Any) -> Sums:
    """Return the held-out sums of a model (`gramfuse_protocol.held_out.metrics`), exactly.

    Args:
        batches: as `gramfuse_client.data.batches.batches` yields them, `labels` included.
        task: the silo's own.
        tokenizer: what the batches were made with.
    """
    return _total(model, batches, task, tokenizer, count, np.zeros(sums_shape(task), np.float64))


def evaluate_for_sum(model: Any, encoded: Encoded, device: torch.device, task: Task, tokenizer: Any) -> Vector:
    """Return the sum of a model's rows (`gramfuse_protocol.held_out.sums`), for a sum that leaves with noise.

    Examples are measured one by one, so that what a model says of one cannot depend on another: in a batch it could,
    since a model with crafted weights sees the padding. What the model kept of one is gone before the next.

    Args:
        encoded: held-out examples.
        device: where the model is.
        task, tokenizer: as `evaluate` has them.
    """
    return _total(model, _each_afresh(model, batches(encoded, 1, device)), task, tokenizer, rows, np.zeros(size(task)))


def _each_afresh(model: Any, given: Iterable[Mapping[str, torch.Tensor]]) -> Iterator[Mapping[str, torch.Tensor]]:
    before = Afresh(model)
    for batch in given:
        before.restore()
        yield batch


def _total(
    model: Any,
    given: Iterable[Mapping[str, torch.Tensor]],
    task: Task,
    tokenizer: Any,
    counted: Callable[[Mapping[str, torch.Tensor], Outputs, Task, Any], NDArray[np.float64]],
    total: NDArray[np.float64],
) -> NDArray[np.float64]:
    model.eval()
    for batch in given:
        total += counted(batch, outputs(model, batch, task, tokenizer), task, tokenizer)
    return total


def _facts(batch: Mapping[str, torch.Tensor], found: Outputs, task: Task, tokenizer: Any) -> tuple[Any, ...]:
    """Return truth and prediction of each example, as what counts a task's examples takes them."""
    on_cpu = {key: value.cpu() for key, value in batch.items() if key in ANSWERS}
    return at_silo(task).facts(on_cpu, found._replace(logits=found.logits.float().cpu()), task, tokenizer)
