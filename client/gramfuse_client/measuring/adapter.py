"""Opens an adapter that was trained elsewhere, and its base, to measure it on its training data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoConfig

from gramfuse_client.measuring.checkpoint import IGNORED_KEYS, Checkpoint, layout_of_files
from gramfuse_model.adapters.attach import NAME, adapters_of
from gramfuse_model.adapters.frozen_matrix import frozen_digest
from gramfuse_model.adapters.read import Adapter, kind_of_adapter, read_adapter, rows_of_head, stacked
from gramfuse_model.digests import HEAD_SETTINGS, UNUSED_SETTINGS
from gramfuse_model.heads import head_parameters, last_linear
from gramfuse_model.loading.base_model import base_without_weights, load_base
from gramfuse_model.loading.zero_head import load_with_adapter, plan_for
from gramfuse_model.parameters import set_values
from gramfuse_model.probing.lengths import check_lengths, shortened
from gramfuse_model.probing.suitable import check_suitable
from gramfuse_protocol.contract.task import Task, TaskName
from gramfuse_protocol.documents import build
from gramfuse_protocol.errors import ModelError
from gramfuse_protocol.tasks.registry import TASK_KINDS


class OpenAdapter(NamedTuple):
    """An adapter, ready to be measured.

    Args:
        checkpoint: the base with and without it.
        adapter: its matrices; if it was stacked beside others, those of all.
        adapters: the number of different A that are stacked.
    """

    checkpoint: Checkpoint
    adapter: Adapter
    adapters: int


def task_of_adapter(directory: Path, base: str, here: Path, override: TaskName | None = None, **settings: Any) -> Task:
    """Return the task that an adapter was trained for: its labels from a `config.json` beside it, or numbers.

    Args:
        directory: of the adapter.
        base: hub id, directory or bundled name of its base.
        here: relative paths start here.
        override: the kind of task, if the adapter's configuration lacks it or has it wrong.
        settings: further keys of the task, in kebab case.

    Raises:
        ModelError: if its configuration names no known task, or it has no head for it.
    """
    kind = override or kind_of_adapter(directory)
    if kind is None:
        raise ModelError(f"{directory}: its configuration names no task that gramfuse knows; name it with --task")
    if not TASK_KINDS[kind].least_labels:
        return build(Task, {"task": kind, **settings}, str(directory))
    if (directory / "config.json").exists():
        config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
        labels = [config.id2label[index] for index in sorted(config.id2label)]
    else:
        labels = [f"LABEL_{n}" for n in range(_outputs(directory, base, here, kind))]
    return build(Task, {"task": kind, "labels": labels, **settings}, str(directory))


def _outputs(directory: Path, base: str, here: Path, kind: TaskName) -> int:
    """Return the number of outputs of an adapter's head."""
    any_labels = Task(task=kind, labels=("0", "1"))
    model = base_without_weights(plan_for("base", base, any_labels), here)
    last = last_linear(model, len(any_labels.labels))
    rows = None if last is None else rows_of_head(directory, last.weight)
    if rows is None:
        raise ModelError(
            f"{directory}: the adapter has no head for {kind} (modules_to_save); a head that is in no file was random "
            "and is lost. Train again with the head in modules_to_save"
        )
    return rows


def _check_configuration(directory: Path, base: str, config: Any) -> None:
    """Check that an adapter with a `config.json` beside it was trained on a base that computes as this one does.

    Args:
        config: of the base.

    Raises:
        ModelError: naming the first key that differs.
    """
    if not (directory / "config.json").exists():
        return
    own = AutoConfig.from_pretrained(directory, trust_remote_code=False)
    keys = {field.name for field in fields(type(config))} - IGNORED_KEYS - HEAD_SETTINGS - UNUSED_SETTINGS
    differing = sorted(
        key for key in keys if "drop" not in key and getattr(own, key, None) != getattr(config, key, None)
    )
    if type(own) is not type(config) or differing:
        what = repr(differing[0]) if differing else "their types"
        raise ModelError(
            f"{directory / 'config.json'}: the base that the adapter was trained on and {base!r} differ in {what}, so "
            "the same weights do not compute the same function; --base must be the model that it was trained on, with "
            "its settings"
        )


def open_adapter(
    directory: Path,
    base: str,
    task: Task,
    here: Path,
    *,
    beside: Iterable[Mapping[str, torch.Tensor]] = (),
    gram: Mapping[str, str] | None = None,
    shorten: bool = False,
) -> OpenAdapter:
    """Load an adapter and its base, and check that they belong together.

    Args:
        directory: of the adapter.
        base: hub id, directory or bundled name.
        here: relative paths start here.
        beside: A of the other adapters of a merge, by module, if they differ. All are then measured over the rows of
            all A, in which each adapter is exact.
        gram: structures of Gram matrices by pattern.
        shorten: reduce the task's lengths to what the model takes, instead of raising PlanError.

    Raises:
        ModelError: if the two do not belong together, or the adapter is of a kind that cannot be merged.
        PlanError: if the task's texts are longer than the model takes.
    """
    plan = plan_for("base", base, task, gram=gram)
    unchanged = load_base(plan, here, as_saved=True)
    _check_configuration(directory, base, unchanged.model.config)
    new = head_parameters(unchanged.model) | unchanged.fresh
    own = read_adapter(unchanged.model, directory)
    lost = sorted(new - own.whole.keys())
    if lost:
        raise ModelError(
            f"{directory}: {lost[0]!r} is neither in the adapter (modules_to_save) nor in base {base!r}, so it was "
            "random and is lost. Train again with its module in modules_to_save"
        )
    beside = tuple(beside)
    adapter, adapters = stacked(own, beside), len({own.digest, *map(frozen_digest, beside)})
    origin = load_with_adapter(plan, here, adapter.frozen, adapter.saved)
    if shorten:
        task = shortened(origin, task)
        plan = plan_for("base", base, task, gram=gram)
    check_lengths(origin, [task], trains=False)
    check_suitable(origin, task)
    layout = layout_of_files(plan, origin)
    tuned = load_with_adapter(plan, here, adapter.frozen, adapter.saved)
    set_values(tuned.model, adapter.whole)
    with torch.no_grad():
        for name, layer in adapters_of(tuned.model):
            if name in adapter.trained:
                layer.lora_B[NAME].weight.copy_(adapter.trained[name])
    return OpenAdapter(Checkpoint(tuned, origin, task, layout), adapter, adapters)
