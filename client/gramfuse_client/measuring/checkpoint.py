"""Measures a model that was fine-tuned elsewhere, on its training data, the way a silo measures its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoConfig

from gramfuse_client.data.batches import Encoded, batch_order, batches
from gramfuse_client.data.examples import Examples
from gramfuse_client.measuring.collect import collect_statistics
from gramfuse_client.measuring.failing_rows import naming_rows
from gramfuse_model.added_tokens import Growth, growth_of
from gramfuse_model.buffers import first_difference, saved_buffers
from gramfuse_model.derive_layout import plan_layout
from gramfuse_model.digests import config_document
from gramfuse_model.loading.auto_classes import kind_of_checkpoint
from gramfuse_model.loading.base_model import Base, library_message, load_base
from gramfuse_model.loading.same_inputs import new_tokens, other_inputs
from gramfuse_model.loading.source import check_files, download, locate
from gramfuse_model.loading.zero_head import load_zero_headed, plan_for
from gramfuse_model.parameters import trainable
from gramfuse_model.probing.lengths import check_lengths, shortened
from gramfuse_model.probing.suitable import check_suitable
from gramfuse_protocol.contract.layout import Layout, delta_block
from gramfuse_protocol.contract.plan import Plan
from gramfuse_protocol.contract.plan_sections import Training
from gramfuse_protocol.contract.task import Task, TaskName
from gramfuse_protocol.documents import build
from gramfuse_protocol.errors import ModelError
from gramfuse_protocol.statistics.about import AddedTokens
from gramfuse_protocol.statistics.contribution import Statistics
from gramfuse_protocol.tasks.registry import TASK_KINDS
from gramfuse_protocol.text import quoted

IGNORED_KEYS = {"use_cache", "return_dict", "output_hidden_states", "initializer_range", "initializer_factor"}
"""Configuration keys that affect neither what a model computes from its weights nor how it is trained."""


@dataclass(frozen=True)
class Checkpoint:
    """A fine-tuned model and its base, checked to belong together.

    Args:
        base: the base model, with a head of zeros.
        layout: without scales, which only secure sums need, and which differ between machines.
        growth: the added tokens and their rows, if the model has any.
    """

    tuned: Base
    base: Base
    task: Task
    layout: Layout
    growth: Growth | None = None

    @property
    def added(self) -> AddedTokens | None:
        """Tokens that the model has besides those of its base, with their rows; None if there are none."""
        return None if self.growth is None else self.growth.added(self.tuned.model)


def task_of_model(model: str, directory: Path, override: TaskName | None = None, **settings: Any) -> Task:
    """Return the task that a model was fine-tuned for, with kind and labels from its configuration.

    Args:
        model: hub id, directory or bundled name.
        directory: relative paths start here.
        override: the kind of task, if the configuration lacks it or has it wrong.
        settings: further keys of the task, in kebab case: `pair`, `max-length`, ….

    Raises:
        ModelError: if there is no such model, or its configuration does not name a known task.
        PlanError: if its labels are not valid for such a task.
    """
    config = config_of_model(model, directory)
    kind = override or kind_of_checkpoint(config)
    if kind is None:
        raise ModelError(
            f"model {model!r}: its configuration names the architecture {', '.join(config.architectures or ('?',))}, "
            "which is not for a task that gramfuse knows; MODEL must be the fine-tuned model, including its head. If "
            "it is, name its task with --task"
        )
    labels = [config.id2label[index] for index in sorted(config.id2label)] if TASK_KINDS[kind].least_labels else []
    return build(Task, {"task": kind, "labels": labels, **settings}, f"model {model!r}")


def config_of_model(model: str, directory: Path) -> Any:
    """Return the configuration of a model.

    Args:
        model, directory: as in `task_of_model`.

    Raises:
        ModelError: if there is no such model, or its configuration cannot be loaded.
    """
    where = locate(model, directory, "model")
    source = where if Path(where).is_dir() else download(where, called="model").directory
    try:
        return AutoConfig.from_pretrained(check_files(source), trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"model {model!r} ({source}) cannot be loaded: {library_message(error)}") from None


def open_checkpoint(
    model: str,
    base: str,
    task: Task,
    directory: Path,
    *,
    freeze: tuple[str, ...] = (),
    gram: Mapping[str, str] | None = None,
    shorten: bool = False,
) -> Checkpoint:
    """Load a fine-tuned model and its base, and check that they belong together.

    Args:
        model, base: hub ids, directories or bundled names.
        directory: relative paths start here.
        freeze: patterns of parameters that fine-tuning did not change; they are not measured.
        gram: structures of Gram matrices by pattern.
        shorten: reduce the task's lengths to what the model takes, instead of raising PlanError.

    Raises:
        ModelError: if the two do not belong together; names the parameter, if one does not fit.
        PlanError: if the task's texts are longer than the model takes.
    """
    tuned = load_base(plan_for("model", model, task, freeze=freeze), directory, whole=True)
    plan = plan_for("base", base, task, freeze=freeze, gram=gram)
    origin = load_zero_headed(plan, directory)
    growth = _check_belong_together(model, base, tuned, origin)
    if shorten:
        task = shortened(origin, task)
        plan = plan_for("base", base, task, freeze=freeze, gram=gram)
    check_lengths(origin, [task], trains=False)
    check_suitable(origin, task)
    layout = layout_of_files(plan, origin)
    _check_buffers(model, base, tuned, origin, layout, growth)
    return Checkpoint(tuned, origin, task, layout, growth)


def layout_of_files(plan: Plan, base: Base) -> Layout:
    """Return the layout of a statistics file without a plan: without scales, which only secure sums need."""
    document = plan_layout(plan, base).model_dump()
    for group in document["groups"]:
        group["exponents"] = ()
    return Layout.model_validate(document)


def _check_belong_together(model: str, base: str, tuned: Base, origin: Base) -> Growth | None:
    architecture = type(tuned.model).__name__
    saved = tuned.model.config.architectures or ()
    if architecture not in saved:
        raise ModelError(
            f"model {model!r} is a {', '.join(saved) or 'model without a head'}, but this task needs a {architecture}, "
            "so its head would be newly initialised. MODEL must be the fine-tuned model, including its head"
        )
    kinds = tuned.model.config.model_type, origin.model.config.model_type
    if kinds[0] != kinds[1]:
        raise ModelError(
            f"model {model!r} has type {kinds[0]!r}, but base {base!r} has type {kinds[1]!r}; --base must be the model "
            "that it was fine-tuned from"
        )
    growth = _growth(model, base, tuned, origin)
    mine, theirs = (dict(one.model.named_parameters()) | saved_buffers(one.model) for one in (tuned, origin))
    for name in sorted(mine.keys() | theirs.keys()):
        shapes = [tuple(tensors[name].shape) if name in tensors else "missing" for tensors in (mine, theirs)]
        if growth is not None and name in growth.axes and "missing" not in shapes:
            shapes[0] = tuple(growth.shared(name, mine[name], theirs[name]).shape)
        if shapes[0] != shapes[1]:
            raise ModelError(
                f"parameter {name!r} is {shapes[0]} in model {model!r}, but {shapes[1]} in base {base!r}; --base must "
                "be the model that it was fine-tuned from"
            )
        common = mine[name] if growth is None else growth.shared(name, mine[name], theirs[name])
        if _is_frozen(mine[name]) and not _same(common, theirs[name]):
            raise ModelError(
                f"--freeze covers parameter {name!r}, but it differs between model {model!r} and base {base!r}: "
                "fine-tuning changed it, or --base is another model. Leave it out of --freeze"
            )
    if tuned.pins.sha256 == origin.pins.sha256:
        raise ModelError(
            f"model {model!r} and base {base!r} have the same weights, so there is no difference to merge; --base must "
            "be the model before fine-tuning"
        )
    differing = _differing_settings(tuned, origin, growth)
    if differing:
        raise ModelError(
            f"the configurations of model {model!r} and base {base!r} differ in {differing[0]!r}, so the same weights "
            "do not compute the same function; --base must be the model that it was fine-tuned from"
        )
    return growth


def _growth(model: str, base: str, tuned: Base, origin: Base) -> Growth | None:
    """Return the tokens added to a model, or None; raise ModelError if it otherwise encodes inputs differently."""
    growth = growth_of(tuned, origin)
    if growth is not None and growth.rows < growth.common:
        raise ModelError(
            f"the token embedding has {growth.rows:,} rows in model {model!r}, but {growth.common:,} in base {base!r}; "
            "--base must be the model that it was fine-tuned from. If the embedding was cut to the tokenizer's tokens, "
            f"load the model, call its resize_token_embeddings({growth.common}), and save it in another directory"
        )
    other = other_inputs(tuned.tokenizer, origin.tokenizer)
    if other is not None:
        raise ModelError(
            f"model {model!r} and base {base!r} have different tokenizers or image processors ({other}), so they "
            "encode inputs differently; a model must use its base's, apart from added tokens. If fine-tuning did use "
            "the base's, save it beside the model's weights; if not, fine-tune again with it"
        )
    new = new_tokens(tuned.tokenizer, origin.tokenizer)
    rowless = next((token for token in new if growth is None or token not in growth.tokens), None)
    if rowless is not None:
        raise ModelError(
            f"token {quoted(rowless, 60)} was added to the tokenizer of model {model!r}, but the model has no "
            "embedding row for it; load the model, call its resize_token_embeddings(len(tokenizer)), and save it; or "
            "use the base's tokenizer"
        )
    return growth


def _same(tuned: torch.Tensor, origin: torch.Tensor) -> bool:
    """Return whether a parameter is unchanged, apart from rounding to half precision."""
    halves = (origin.to(half).float() for half in (torch.bfloat16, torch.float16))
    return any(torch.equal(tuned, values) for values in (origin, *halves))


def _is_frozen(tensor: torch.Tensor) -> bool:
    return isinstance(tensor, torch.nn.Parameter) and not tensor.requires_grad


def _check_buffers(model: str, base: str, tuned: Base, origin: Base, layout: Layout, growth: Growth | None) -> None:
    mine, theirs = saved_buffers(tuned.model), saved_buffers(origin.model)
    if growth is not None:
        mine = {name: growth.shared(name, buffer, theirs[name]) for name, buffer in mine.items()}
    merged = {tensor.name for tensor in layout.tensors}
    differing = first_difference({name: buffer for name, buffer in mine.items() if name not in merged}, theirs)
    if differing is not None:
        raise ModelError(
            f"the buffer {differing!r} differs between model {model!r} and base {base!r}, but training does not change "
            "it; --base must be the model that it was fine-tuned from"
        )


def _differing_settings(tuned: Base, origin: Base, growth: Growth | None) -> list[str]:
    """Return the configuration keys in which two models differ, among those that transformers defines.

    Differences that only matter in training (dropout), or that only add outputs, are allowed.
    """
    mine, theirs = (_without_vocabulary(config_document(one.model)["config"], growth) for one in (tuned, origin))
    keys = {field.name for field in fields(type(origin.model.config))} - IGNORED_KEYS
    differing = sorted(key for key in keys if "drop" not in key and mine.get(key) != theirs.get(key))
    added = set() if growth is None else set(growth.tokens.values())
    return [key for key in differing if key != "pad_token_id" or mine.get(key) not in added]


def _without_vocabulary(config: Mapping[str, Any], growth: Growth | None) -> dict[str, Any]:
    """Return a configuration; if tokens were added, without `vocab_size`, at any depth."""
    return {
        key: _without_vocabulary(value, growth) if isinstance(value, Mapping) else value
        for key, value in config.items()
        if growth is None or key != "vocab_size"
    }


def measure(
    checkpoint: Checkpoint,
    examples: Examples,
    names: tuple[str, str] = ("MODEL", "the data"),
    *,
    limit: int,
    batch_size: int,
    device: torch.device,
    progress: Callable[[int, int], None],
) -> Statistics:
    """Return the statistics of a fine-tuned model on its training data.

    Args:
        examples: the training data, used in random order up to the limit.
        names: names of the model and the data, for errors.
        limit: maximum token rows for one Gram matrix.
        progress: called with (batches done, batches in all).

    Raises:
        ContributionError: naming the tensor, if a value is NaN or infinite.
        ModelError: naming the rows, if the model cannot compute a batch of the data.
    """
    growth = checkpoint.growth
    encoded = Encoded(examples, (checkpoint.base if growth is None else checkpoint.tuned).tokenizer, checkpoint.task)
    order = batch_order(encoded, seed=Training().seed)
    with naming_rows(names, encoded, order, batch_size) as done:
        statistics = collect_statistics(
            checkpoint.tuned.model.to(device),
            batches(encoded, batch_size, device, seed=Training().seed),
            checkpoint.layout if growth is None else _with_added_rows(checkpoint.layout, growth),
            base=_start(checkpoint),
            examples=len(examples),
            limit=limit,
            progress=lambda batches: progress(done(batches), -(-len(encoded) // batch_size)),
        )
    return statistics if growth is None else _without_added_rows(statistics, growth)


def _start(checkpoint: Checkpoint) -> dict[str, NDArray[np.float32]]:
    """Return the values that differences are computed from: the base's, and zeros for added tokens."""
    start, growth = trainable(checkpoint.base.model), checkpoint.growth
    if growth is None:
        return start
    return {name: growth.padded(name, torch.from_numpy(values)).numpy() for name, values in start.items()}


def _with_added_rows(layout: Layout, growth: Growth) -> Layout:
    """Return the base's layout with rows for the added tokens."""
    document = layout.model_dump()
    for tensor in document["tensors"]:
        axis = growth.axes.get(tensor["name"])
        if axis is not None:
            shape = list(tensor["shape"])
            shape[axis] = growth.rows
            tensor["shape"] = tuple(shape)
    for group in document["groups"]:
        for weight in group["weights"]:
            if weight["weight"] in growth.axes:
                weight["d_out"] = growth.rows
    return Layout.model_validate(document)


def _without_added_rows(statistics: Statistics, growth: Growth) -> Statistics:
    """Return statistics without the rows of added tokens; a base row that such a token uses has difference zero."""
    blocks = dict(statistics.blocks)
    for name, axis in growth.axes.items():
        block = delta_block(name)
        if block in blocks:
            wide = torch.from_numpy(np.asarray(blocks[block]))
            unchanged = torch.zeros_like(wide.narrow(axis, 0, growth.common))
            blocks[block] = growth.shared(name, wide, unchanged).contiguous().numpy()
    return Statistics(statistics.examples, statistics.tokens, blocks)
