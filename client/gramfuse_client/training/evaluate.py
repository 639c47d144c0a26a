"""Evaluates a model on a silo's held-out examples: exactly, or bounded for a noisy sum."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from gramfuse_client.data.batches import Encoded, batches
from gramfuse_client.tasks.registry import at_silo
from gramfuse_client.training.outputs import Outputs
from gramfuse_client.training.snapshot import Snapshot
from gramfuse_model.probing.batch import ANSWERS
from gramfuse_protocol.contract.task import Task
from gramfuse_protocol.held_out.metrics import Sums, sums_shape
from gramfuse_protocol.held_out.sums import Vector, size
from gramfuse_protocol.tasks.registry import kind_of


def outputs(model: Any, batch: Mapping[str, torch.Tensor], task: Task, tokenizer: Any) -> Outputs:
    """Run a model on a batch, without autograd. The model must be in evaluation mode.

    Texts are generated with the settings of `gramfuse_model.generation`.
    """
    with torch.no_grad():
        return at_silo(task).outputs(model, batch, task, tokenizer)


def count(batch: Mapping[str, torch.Tensor], outputs: Outputs, task: Task, tokenizer: Any) -> Sums:
    """Return the exact sums of one batch (`gramfuse_protocol.held_out.metrics`).

    Labels that the silo does not annotate are neither predicted nor counted. For `token-classification`, all words
    count; a word without a token, or cut off by `max_length`, is predicted as O. A target text is compared after a
    round trip through the tokenizer, cut to `target_length` tokens.

    Args:
        batch: includes `labels`, and `words` for `token-classification` (`gramfuse_client.data.batches.batches`).
        outputs: of one model, or combined from several.
        task: the silo's task.
    """
    return kind_of(task).sums(task, *_facts(batch, outputs, task, tokenizer))


def rows(batch: Mapping[str, torch.Tensor], outputs: Outputs, task: Task, tokenizer: Any) -> Vector:
    """Return the sum of one batch's rows (`gramfuse_protocol.held_out.sums`), bounded for any model output.

    Takes the same arguments as `count`, and counts the same way.
    """
    return kind_of(task).rows(task, *_facts(batch, outputs, task, tokenizer))


def evaluate(model: Any, batches: Iterable[Mapping[str, torch.Tensor]], task: Task, tokenizer: Any) -> Sums:
    """Return the exact held-out sums of a model (`gramfuse_protocol.held_out.metrics`).

    Args:
        batches: from `gramfuse_client.data.batches.batches`, including `labels`.
        task: the silo's task.
        tokenizer: the one that the batches were made with.
    """
    return _total(model, batches, task, tokenizer, count, np.zeros(sums_shape(task), np.float64))


def evaluate_for_sum(model: Any, encoded: Encoded, device: torch.device, task: Task, tokenizer: Any) -> Vector:
    """Return the sum of a model's rows (`gramfuse_protocol.held_out.sums`), for a noisy sum.

    Examples run one by one, and the model's state is reset before each, so that the output for one example cannot
    depend on another. In a batch it could: crafted weights can make a model sensitive to the padding.

    Args:
        encoded: held-out examples.
        device: the model's device.
        task, tokenizer: as for `evaluate`.
    """
    one_by_one = _with_resets(model, batches(encoded, 1, device))
    return _total(model, one_by_one, task, tokenizer, rows, np.zeros(size(task)))


def _with_resets(model: Any, batches: Iterable[Mapping[str, torch.Tensor]]) -> Iterator[Mapping[str, torch.Tensor]]:
    """Yield batches; before each, restore the model's state."""
    snapshot = Snapshot(model)
    for batch in batches:
        snapshot.restore()
        yield batch


def _total(
    model: Any,
    batches: Iterable[Mapping[str, torch.Tensor]],
    task: Task,
    tokenizer: Any,
    count_batch: Callable[[Mapping[str, torch.Tensor], Outputs, Task, Any], NDArray[np.float64]],
    total: NDArray[np.float64],
) -> NDArray[np.float64]:
    model.eval()
    for batch in batches:
        total += count_batch(batch, outputs(model, batch, task, tokenizer), task, tokenizer)
    return total


def _facts(batch: Mapping[str, torch.Tensor], outputs: Outputs, task: Task, tokenizer: Any) -> tuple[Any, ...]:
    """Return the truth and prediction of each example, as arguments for a task kind's `sums` and `rows`."""
    on_cpu = {key: value.cpu() for key, value in batch.items() if key in ANSWERS}
    return at_silo(task).facts(on_cpu, outputs._replace(logits=outputs.logits.float().cpu()), task, tokenizer)
