"""A model that was fine-tuned elsewhere, measured on its training data as a silo measures its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoConfig

from gramfuse_client.data.batches import Encoded, batches, drawn
from gramfuse_client.data.examples import Examples
from gramfuse_client.measuring.collect import collect_statistics
from gramfuse_model.added_tokens import Growth, growth_of
from gramfuse_model.buffers import first_difference, saved_buffers
from gramfuse_model.derive_layout import plan_layout
from gramfuse_model.digests import config_document
from gramfuse_model.loading.auto_classes import kind_of_checkpoint
from gramfuse_model.loading.base_model import Base, library_message, load_base, trainable
from gramfuse_model.loading.same_inputs import new_tokens, other_inputs
from gramfuse_model.loading.source import check_files, download, locate
from gramfuse_model.loading.zero_head import load_zero_headed, plan_for
from gramfuse_model.probing.lengths import check_lengths, room_of
from gramfuse_model.probing.suitable import check_suitable
from gramfuse_protocol.contract.layout import Layout, delta_block
from gramfuse_protocol.contract.plan_sections import Training
from gramfuse_protocol.contract.task import Task, TaskKind
from gramfuse_protocol.documents import build
from gramfuse_protocol.errors import GramfuseError, ModelError
from gramfuse_protocol.statistics.about import AddedTokens
from gramfuse_protocol.statistics.contribution import Statistics
from gramfuse_protocol.tasks.registry import KINDS
from gramfuse_protocol.text import one_line, quoted

RETURNED = {"use_cache", "return_dict", "output_hidden_states", "initializer_range", "initializer_factor"}
"""Keys of a configuration that change neither what a model computes from its weights nor how it is trained."""

MOST = 64
"""Most rows that an error names."""


@dataclass(frozen=True)
class Checkpoint:
    """A fine-tuned model and its base, of which it was checked that they belong together.

    Args:
        base: with a head of zeros.
        layout: without scales, which only secure sums need, and which differ between machines.
        growth: what the model has beyond its base, if tokens were added to it.
    """

    tuned: Base
    base: Base
    task: Task
    layout: Layout
    growth: Growth | None = None

    @property
    def added(self) -> AddedTokens | None:
        """Tokens that the model has beside those of its base, with their rows, if there are any."""
        return None if self.growth is None else self.growth.added(self.tuned.model)


def task_of_model(model: str, directory: Path, given: TaskKind | None = None, **settings: Any) -> Task:
    """Return what a model was fine-tuned for, by its configuration: kind and labels.

    Args:
        model: hub id, directory or bundled name.
        directory: where a relative path starts.
        given: the kind, if the configuration does not say it or says it wrongly.
        settings: what else a task has, with kebab-case keys: `pair`, `max-length`, ….

    Raises:
        ModelError: if there is no such model, or its configuration does not say what it is for.
        PlanError: if its labels are none of such a task.
    """
    where = locate(model, directory, "model")
    source = where if Path(where).is_dir() else download(where, called="model").directory
    try:
        config = AutoConfig.from_pretrained(check_files(source), trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"model {model!r} ({source}) cannot be loaded: {library_message(error)}") from None
    kind = given or kind_of_checkpoint(config)
    if kind is None:
        raise ModelError(
            f"model {model!r}: its configuration says that it is a {', '.join(config.architectures or ('?',))}, which "
            "is no task that gramfuse knows; MODEL must be the fine-tuned model, head included. If it is, say what it "
            "is for with --task"
        )
    labels = [config.id2label[index] for index in sorted(config.id2label)] if KINDS[kind].least_labels else []
    return build(Task, {"task": kind, "labels": labels, **settings}, f"model {model!r}")


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
        directory: where relative paths start.
        freeze: patterns of the parameters that are as they are in the base; they are not measured.
        gram: structures of Gram matrices by pattern.
        shorten: whether the task's lengths are no more than a wish: texts are cut to what the model has places for.

    Raises:
        ModelError: naming the parameter, if there is one that does not fit.
        PlanError: if the task's texts are longer than the model takes.
    """
    tuned = load_base(plan_for("model", model, task, freeze=freeze), directory, whole=True)
    plan = plan_for("base", base, task, freeze=freeze, gram=gram)
    origin = load_zero_headed(plan, directory)
    growth = _check_belong_together(model, base, tuned, origin)
    if shorten:
        rooms = room_of(origin, task.max_length, task.target_length)
        keys = {"input": "max_length", "target": "target_length"}
        least = {keys[kind]: min(room.tokens, getattr(task, keys[kind])) for kind, room in rooms.items()}
        task = task.model_copy(update=least)
        plan = plan_for("base", base, task, freeze=freeze, gram=gram)
    check_lengths(origin, [task], trains=False)
    check_suitable(origin, task)
    document = plan_layout(plan, origin).model_dump()
    for group in document["groups"]:
        group["exponents"] = ()
    layout = Layout.model_validate(document)
    _check_buffers(model, base, tuned, origin, layout, growth)
    return Checkpoint(tuned, origin, task, layout, growth)


def _check_belong_together(model: str, base: str, tuned: Base, origin: Base) -> Growth | None:
    architecture = type(tuned.model).__name__
    saved = tuned.model.config.architectures or ()
    if architecture not in saved:
        raise ModelError(
            f"model {model!r} is a {', '.join(saved) or 'model without a head'}, and this task needs a {architecture}: "
            "its head would be a new one. MODEL must be the fine-tuned model, head included"
        )
    kinds = tuned.model.config.model_type, origin.model.config.model_type
    if kinds[0] != kinds[1]:
        raise ModelError(
            f"model {model!r} is of type {kinds[0]!r} and base {base!r} of type {kinds[1]!r}; --base must be the model "
            "that it was fine-tuned from"
        )
    growth = _growth(model, base, tuned, origin)
    mine, theirs = (dict(one.model.named_parameters()) | saved_buffers(one.model) for one in (tuned, origin))
    for name in sorted(mine.keys() | theirs.keys()):
        shapes = [tuple(one[name].shape) if name in one else "not there" for one in (mine, theirs)]
        if growth is not None and name in growth.axes and "not there" not in shapes:
            shapes[0] = tuple(growth.shared(name, mine[name], theirs[name]).shape)
        if shapes[0] != shapes[1]:
            raise ModelError(
                f"parameter {name!r} is {shapes[0]} in model {model!r} and {shapes[1]} in base {base!r}; --base must "
                "be the model that it was fine-tuned from"
            )
        common = mine[name] if growth is None else growth.shared(name, mine[name], theirs[name])
        if _is_frozen(mine[name]) and not _same(common, theirs[name]):
            raise ModelError(
                f"parameter {name!r} is to be frozen and is not the same in model {model!r} and base {base!r}: fine-"
                "tuning changed it, or --base is another model. Leave it out of --freeze"
            )
    if tuned.pins.sha256 == origin.pins.sha256:
        raise ModelError(
            f"model {model!r} and base {base!r} have the same weights, so the difference to merge is zero; --base must "
            "be the model as it was before fine-tuning"
        )
    odd = _other_settings(tuned, origin, growth)
    if odd:
        raise ModelError(
            f"model {model!r} and base {base!r} have another {odd[0]!r} in their configurations, so the same weights "
            "do not compute the same in both; --base must be the model that it was fine-tuned from"
        )
    return growth


def _growth(model: str, base: str, tuned: Base, origin: Base) -> Growth | None:
    """Return what a model has beyond its base, if tokens were added to it; else the two take the same inputs."""
    growth = growth_of(tuned, origin)
    if growth is not None and growth.rows < growth.common:
        raise ModelError(
            f"the table of tokens has {growth.rows:,} rows in model {model!r} and {growth.common:,} in base {base!r}; "
            "--base must be the model that it was fine-tuned from. If the table was cut to its tokenizer's tokens, "
            f"load the model, call its resize_token_embeddings({growth.common}), and save it in another directory"
        )
    other = other_inputs(tuned.tokenizer, origin.tokenizer)
    if other is not None:
        raise ModelError(
            f"model {model!r} and base {base!r} have different tokenizers or image processors ({other}), so their "
            "inputs are not the same; only models with that of their base can be merged, or with tokens that were "
            "added to it. If fine-tuning did not use another, save the base's beside the model's weights; if it did, "
            "fine-tune again with the base's"
        )
    new = new_tokens(tuned.tokenizer, origin.tokenizer)
    rowless = next((token for token in new if growth is None or token not in growth.tokens), None)
    if rowless is not None:
        raise ModelError(
            f"token {quoted(rowless, 60)} was added to the tokenizer of model {model!r}, and the model has no row for "
            "it; load the model, call its resize_token_embeddings(len(tokenizer)), and save it; or take the base's "
            "tokenizer"
        )
    return growth


def _same(tuned: torch.Tensor, origin: torch.Tensor) -> bool:
    """Whether a parameter was not trained; it may have been saved in half precision since."""
    halves = (origin.to(half).float() for half in (torch.bfloat16, torch.float16))
    return any(torch.equal(tuned, one) for one in (origin, *halves))


def _is_frozen(tensor: torch.Tensor) -> bool:
    return isinstance(tensor, torch.nn.Parameter) and not tensor.requires_grad


def _check_buffers(model: str, base: str, tuned: Base, origin: Base, layout: Layout, growth: Growth | None) -> None:
    mine, theirs = saved_buffers(tuned.model), saved_buffers(origin.model)
    if growth is not None:
        mine = {name: growth.shared(name, buffer, theirs[name]) for name, buffer in mine.items()}
    merged = {tensor.name for tensor in layout.tensors}
    odd = first_difference({name: buffer for name, buffer in mine.items() if name not in merged}, theirs)
    if odd is not None:
        raise ModelError(
            f"the buffer {odd!r} is not the same in model {model!r} and base {base!r}, and training does not change "
            "it; --base must be the model that it was fine-tuned from"
        )


def _other_settings(tuned: Base, origin: Base, growth: Growth | None) -> list[str]:
    """Return the keys of two configurations that differ, of those that transformers' models know.

    What a model does in training only (dropout) is its owner's choice, and so is what it gives back beside its outputs.
    """
    mine, theirs = (_settled(config_document(one.model)["config"], growth) for one in (tuned, origin))
    known = {field.name for field in fields(type(origin.model.config))} - RETURNED
    odd = sorted(key for key in known if "drop" not in key and mine.get(key) != theirs.get(key))
    added = set() if growth is None else set(growth.tokens.values())
    return [key for key in odd if key != "pad_token_id" or mine.get(key) not in added]


def _settled(config: Mapping[str, Any], growth: Growth | None) -> dict[str, Any]:
    """Return a configuration, without the number of tokens where tokens were added, in those of its parts too."""
    return {
        key: _settled(value, growth) if isinstance(value, Mapping) else value
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
        examples: the training data; where the limit does not take all, examples are drawn.
        names: of the model and of the data, for errors.
        limit: most token rows for one Gram matrix.
        progress: called with (batches done, batches in all).

    Raises:
        ContributionError: naming the tensor, if a value is NaN or infinite.
        ModelError: naming the rows, if the model cannot compute a batch of the data.
    """
    growth = checkpoint.growth
    encoded = Encoded(examples, (checkpoint.base if growth is None else checkpoint.tuned).tokenizer, checkpoint.task)
    total = -(-len(encoded) // batch_size)
    done = 0

    def note(batches: int) -> None:
        nonlocal done
        done = batches
        progress(done, total)

    try:
        statistics = collect_statistics(
            checkpoint.tuned.model.to(device),
            batches(encoded, batch_size, device, seed=Training().seed),
            checkpoint.layout if growth is None else _widened(checkpoint.layout, growth),
            base=_start(checkpoint),
            examples=len(examples),
            limit=limit,
            progress=note,
        )
    except GramfuseError:
        raise
    except Exception as error:  # models raise what they like
        batch = drawn(len(encoded), Training().seed)[done * batch_size : (done + 1) * batch_size]
        rows = sorted(examples.numbers[i] for i in batch) if examples.numbers else []
        raise ModelError(
            f"model {names[0]!r} cannot compute a batch of {names[1]}, {_told(rows)}: {type(error).__name__}: "
            f"{one_line(str(error), 1000)}. {_remedy(checkpoint.task)}; with --batch-size 1, the row is named that it "
            "cannot compute"
        ) from error
    return statistics if growth is None else _narrowed(statistics, growth)


def _remedy(task: Task) -> str:
    """Say what may be the matter with a batch that a model cannot compute, and what to try."""
    if task.task == "image-classification":
        return "The device may have too little memory: try another --batch-size"
    return (
        "It may not take texts of that length, or the device has too little memory: try another --max-length or "
        "--batch-size"
    )


def _told(rows: Sequence[int]) -> str:
    """Name rows, of many the first."""
    more = f" and {len(rows) - MOST:,} more" if len(rows) > MOST else ""
    return f"row {', '.join(map(str, rows[:MOST]))}{more}"


def _start(checkpoint: Checkpoint) -> dict[str, NDArray[np.float32]]:
    """Return what differences are taken from: of added tokens, zeros."""
    start, growth = trainable(checkpoint.base.model), checkpoint.growth
    if growth is None:
        return start
    return {name: growth.padded(name, torch.from_numpy(values)).numpy() for name, values in start.items()}


def _widened(layout: Layout, growth: Growth) -> Layout:
    """Return the layout of a model with added tokens: that of its base, with rows for them."""
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


def _narrowed(statistics: Statistics, growth: Growth) -> Statistics:
    """Return what was measured without the rows of added tokens; where these took rows of the base, nothing changed."""
    blocks = dict(statistics.blocks)
    for name, axis in growth.axes.items():
        block = delta_block(name)
        if block in blocks:
            wide = torch.from_numpy(np.asarray(blocks[block]))
            unchanged = torch.zeros_like(wide.narrow(axis, 0, growth.common))
            blocks[block] = growth.shared(name, wide, unchanged).contiguous().numpy()
    return Statistics(statistics.examples, statistics.tokens, blocks)
