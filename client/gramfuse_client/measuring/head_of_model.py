"""Measures what a model's head is fitted from, on data of a silo without a network."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gramfuse_client.data.alike import alike
from gramfuse_client.data.batches import Encoded, batch_order, batches
from gramfuse_client.data.examples import Examples
from gramfuse_client.measuring.checkpoint import config_of_model
from gramfuse_client.measuring.failing_rows import naming_rows
from gramfuse_client.measuring.head_sums import collect_head_sums
from gramfuse_client.tasks.registry import at_silo
from gramfuse_model.derive_head import load_for_head, probe_for_head
from gramfuse_model.loading.auto_classes import kind_of_checkpoint
from gramfuse_model.loading.base_model import Base, has_class
from gramfuse_model.probing.lengths import shortened
from gramfuse_protocol.contract.head_layout import HeadLayout
from gramfuse_protocol.contract.task import Task, TaskName
from gramfuse_protocol.documents import build
from gramfuse_protocol.errors import DataError, PlanError
from gramfuse_protocol.statistics.head_file import fitted_by_files
from gramfuse_protocol.statistics.head_sums import HeadSums
from gramfuse_protocol.tasks.registry import TASK_KINDS


@dataclass(frozen=True)
class Headed:
    """A model whose head is to be fitted.

    Args:
        head: its last layer.
        task: with the labels of the head, and with lengths that the model takes.
    """

    model: Base
    head: HeadLayout
    task: Task

    @property
    def random(self) -> tuple[str, ...]:
        """Names of parameters before the last layer that the model's files lack, so that they are random numbers."""
        return tuple(sorted(self.model.fresh - set(self.head.tensors)))


@dataclass(frozen=True)
class Measured:
    """What was measured.

    Args:
        rare: how many examples were left out, by label, since too few have the label.
    """

    sums: HeadSums
    rare: dict[str, int]


def task_of_head(
    model: str, directory: Path, kind: TaskName | None, labels: Sequence[str] | None, **settings: Any
) -> Task:
    """Return the task of a head that is to be fitted.

    Args:
        model: hub id, directory or bundled name; fine-tuned or not.
        directory: relative paths start here.
        kind: by default that of the model's configuration, or if it has no head, the first that it can have one for.
        labels: of the head, in order; by default those of the configuration.
        settings: further keys of the task, in kebab case.

    Raises:
        ModelError: if there is no such model.
        PlanError: if such a head has no closed form, or there are no labels, or they are invalid.
    """
    config = config_of_model(model, directory)
    own = kind_of_checkpoint(config)
    own = None if own is not None and TASK_KINDS[own].headless else own
    fitting = [name for name, each in TASK_KINDS.items() if fitted_by_files(each)]
    kind = kind or own or next((name for name in fitting if has_class(config, name)), fitting[0])
    if kind not in fitting:
        raise PlanError(
            f"model {model!r} is for {kind}; a head can be fitted in closed form for {' or '.join(fitting)} only. To "
            "fit one of these to its features, name it with --task, and the labels with --labels"
        )
    if labels is None:
        if own not in fitting:
            raise PlanError(
                f"model {model!r} has no labels in its configuration; name those of the head with --labels, at all "
                "silos in the same order"
            )
        labels = [config.id2label[index] for index in sorted(config.id2label)]
    return build(Task, {"task": kind, "labels": list(labels), **settings}, f"model {model!r}")


def open_headed(model: str, task: Task, directory: Path, *, shorten: bool) -> Headed:
    """Load a model whose head is to be fitted.

    Args:
        model, directory: as in `task_of_head`.
        shorten: reduce the task's lengths to what the model takes, instead of raising PlanError.

    Raises:
        ModelError: if it cannot be loaded, or its head has no closed form.
        PlanError: if the task's texts are longer than the model takes.
    """
    base = load_for_head(model, task, directory)
    task = shortened(base, task) if shorten else task
    return Headed(base, probe_for_head(model, base, task), task)


def measure_head(
    headed: Headed,
    examples: Examples,
    names: tuple[str, str],
    *,
    least: int,
    batch_size: int,
    device: torch.device,
    progress: Callable[[int, int], None],
) -> Measured:
    """Sum the moments of the features that enter a model's head.

    Args:
        examples: with labels.
        names: names of the model and the data, for errors.
        least: labels with fewer examples are left out.
        progress: called with (batches done, batches in all).

    Raises:
        DataError: if no label has as many examples.
        ModelError: naming the rows, if the model cannot compute a batch of the data.
        ContributionError: if a feature is NaN or infinite.
    """
    counts = Counter(headed.task.labels[label] for label in examples.labels if isinstance(label, int))
    keys = alike(examples, headed.task, headed.model.tokenizer)
    kept = examples.take(at_silo(headed.task).common(examples, headed.task, least, keys))
    if not kept:
        raise DataError(
            f"{names[1]}: no example is left for the sums that a head is fitted from: each has a label of which there "
            f"are fewer than {least} different examples (--minimum-label-examples)"
        )
    encoded = Encoded(kept, headed.model.tokenizer, headed.task)
    order = batch_order(encoded, by_length=True)
    with naming_rows(names, encoded, order, batch_size) as done:
        sums = collect_head_sums(
            headed.model.model.to(device),
            batches(encoded, batch_size, device, by_length=True),
            headed.task,
            progress=lambda batches: progress(done(batches), -(-len(encoded) // batch_size)),
        )
    return Measured(sums, {label: count for label, count in counts.items() if count < least})
