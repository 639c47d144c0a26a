"""A model that was fine-tuned elsewhere, measured on its training data as a silo measures its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from gramfuse_client.batches import Encoded, batches
from gramfuse_client.data import Examples
from gramfuse_client.statistics import collect_statistics
from gramfuse_model.base import Base, load_base, trainable
from gramfuse_model.buffers import first_difference, saved_buffers
from gramfuse_model.digests import config_document, processor_document
from gramfuse_model.lengths import check_lengths, room_of
from gramfuse_model.source import check_files, download, locate
from gramfuse_model.tasks import kind_of_checkpoint
from gramfuse_model.tracing import plan_layout
from gramfuse_model.vocabulary import token_table
from gramfuse_model.zero_head import load_zero_headed, plan_for
from gramfuse_protocol.documents import build
from gramfuse_protocol.errors import ModelError
from gramfuse_protocol.layout import Layout
from gramfuse_protocol.plan import Training
from gramfuse_protocol.statistics import Statistics
from gramfuse_protocol.task import Kind, Task
from gramfuse_protocol.tasks.registry import KINDS
from gramfuse_protocol.text import listed

RETURNED = {"use_cache", "return_dict", "output_hidden_states", "initializer_range", "initializer_factor"}
"""Keys of a configuration that change neither what a model computes from its weights nor how it is trained."""

PADDING = {"pad_token", "padding_side", "model_max_length"} | {
    "clean_up_tokenization_spaces",
    "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output",
}
"""What a tokenizer pads with and where, what each call says, and how tokens become a text again."""


@dataclass(frozen=True)
class Checkpoint:
    """A fine-tuned model and its base, of which it was checked that they belong together.

    Args:
        base: with a head of zeros.
        layout: without scales, which only secure sums need, and which differ between machines.
    """

    tuned: Base
    base: Base
    task: Task
    layout: Layout


def task_of_model(model: str, directory: Path, given: Kind | None = None, **settings: Any) -> Task:
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
    where = locate(model, directory)
    source = where if Path(where).is_dir() else download(where).directory
    try:
        config = AutoConfig.from_pretrained(check_files(source), trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"model {model!r} ({source}) cannot be loaded: {error}") from None
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
    _check_belong_together(model, base, tuned, origin)
    if shorten:
        rooms = room_of(origin, task.max_length, task.target_length)
        keys = {"input": "max_length", "target": "target_length"}
        least = {keys[kind]: min(room.tokens, getattr(task, keys[kind])) for kind, room in rooms.items()}
        task = task.model_copy(update=least)
        plan = plan_for("base", base, task, freeze=freeze, gram=gram)
    check_lengths(origin, [task], trains=False)
    document = plan_layout(plan, origin).model_dump()
    for group in document["groups"]:
        group["exponents"] = ()
    layout = Layout.model_validate(document)
    _check_buffers(model, base, tuned, origin, layout)
    return Checkpoint(tuned, origin, task, layout)


def _check_belong_together(model: str, base: str, tuned: Base, origin: Base) -> None:
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
    _check_tables(model, base, tuned, origin)
    mine, theirs = (dict(one.model.named_parameters()) | saved_buffers(one.model) for one in (tuned, origin))
    for name in sorted(mine.keys() | theirs.keys()):
        shapes = [tuple(one[name].shape) if name in one else "not there" for one in (mine, theirs)]
        if shapes[0] != shapes[1]:
            raise ModelError(
                f"parameter {name!r} is {shapes[0]} in model {model!r} and {shapes[1]} in base {base!r}; --base must "
                "be the model that it was fine-tuned from"
            )
        if _is_frozen(mine[name]) and not _same(mine[name], theirs[name]):
            raise ModelError(
                f"parameter {name!r} is to be frozen and is not the same in model {model!r} and base {base!r}: fine-"
                "tuning changed it, or --base is another model. Leave it out of --freeze"
            )
    if tuned.pins.sha256 == origin.pins.sha256:
        raise ModelError(
            f"model {model!r} and base {base!r} have the same weights, so the difference to merge is zero; --base must "
            "be the model as it was before fine-tuning"
        )
    odd = _other_settings(tuned, origin)
    if odd:
        raise ModelError(
            f"model {model!r} and base {base!r} have another {odd[0]!r} in their configurations, so the same weights "
            "do not compute the same in both; --base must be the model that it was fine-tuned from"
        )
    other = _other_inputs(tuned.tokenizer, origin.tokenizer)
    if other is not None:
        raise ModelError(
            f"model {model!r} and base {base!r} have different tokenizers or image processors ({other!r} is another), "
            "so their inputs are not the same; only models with that of their base can be merged"
        )


def _check_tables(model: str, base: str, tuned: Base, origin: Base) -> None:
    """Refuse a model that was given other tokens, since nobody else's has rows for them."""
    mine, theirs = token_table(tuned.model), token_table(origin.model)
    if mine is None or theirs is None or mine.num_embeddings == theirs.num_embeddings:
        return
    rows = mine.num_embeddings
    added = sorted(tuned.tokenizer.get_vocab().keys() - origin.tokenizer.get_vocab().keys())
    raise ModelError(
        f"the table of tokens has {rows:,} rows in model {model!r} and {theirs.num_embeddings:,} in base {base!r}"
        + (f"; its tokenizer has {listed(added, 3)} beside the base's" if added else "")
        + ". Only models with the same tokens can be merged: load the base, call its "
        f"resize_token_embeddings({rows}), save it in another directory with the tokenizer of the model, and give that "
        "directory as --base for all models that are to be merged"
    )


def _same(tuned: torch.Tensor, origin: torch.Tensor) -> bool:
    """Whether a parameter was not trained; it may have been saved in half precision since."""
    halves = (origin.to(half).float() for half in (torch.bfloat16, torch.float16))
    return any(torch.equal(tuned, one) for one in (origin, *halves))


def _is_frozen(tensor: torch.Tensor) -> bool:
    return isinstance(tensor, torch.nn.Parameter) and not tensor.requires_grad


def _check_buffers(model: str, base: str, tuned: Base, origin: Base, layout: Layout) -> None:
    mine, theirs = saved_buffers(tuned.model), saved_buffers(origin.model)
    merged = {tensor.name for tensor in layout.tensors}
    odd = first_difference({name: buffer for name, buffer in mine.items() if name not in merged}, theirs)
    if odd is not None:
        raise ModelError(
            f"the buffer {odd!r} is not the same in model {model!r} and base {base!r}, and training does not change "
            "it; --base must be the model that it was fine-tuned from"
        )


def _other_settings(tuned: Base, origin: Base) -> list[str]:
    """Return the keys of two configurations that differ, of those that transformers' models know.

    What a model does in training only (dropout) is its owner's choice, and so is what it gives back beside its outputs.
    """
    mine, theirs = (config_document(one.model)["config"] for one in (tuned, origin))
    known = {field.name for field in fields(type(origin.model.config))} - RETURNED
    return sorted(key for key in known if "drop" not in key and mine.get(key) != theirs.get(key))


def _other_inputs(tuned: Any, origin: Any) -> str | None:
    """Return what decides the tensors that are made of an example, and differs between two processors, if anything.

    The base's is the one that is measured with, so what comes with each call, and how it pads, does not count. Versions
    of transformers have classes of tokenizers of their own; where these differ, what both know is compared.
    """
    mine, theirs = processor_document(tuned), processor_document(origin)
    both = mine["settings"].keys() & theirs["settings"].keys() if mine["class"] != theirs["class"] else None
    for part in ("backend", "special", "settings"):
        one, other = mine.get(part, {}), theirs.get(part, {})
        for key in sorted(one.keys() | other.keys()):
            counts = key not in PADDING and (part != "settings" or both is None or key in both)
            if counts and one.get(key) != other.get(key):
                return f"{part}.{key}"
    return None


def measure(
    checkpoint: Checkpoint,
    examples: Examples,
    *,
    limit: int,
    batch_size: int,
    device: torch.device,
    progress: Callable[[int, int], None],
) -> Statistics:
    """Return the statistics of a fine-tuned model on its training data.

    Args:
        examples: the training data; where the limit does not take all, examples are drawn.
        limit: most token rows for one Gram matrix.
        progress: called with (batches done, batches in all).

    Raises:
        ContributionError: naming the tensor, if a value is NaN or infinite.
        ModelError: if the model cannot compute a batch of the data.
    """
    encoded = Encoded(examples, checkpoint.base.tokenizer, checkpoint.task)
    total = -(-len(encoded) // batch_size)
    try:
        return collect_statistics(
            checkpoint.tuned.model.to(device),
            batches(encoded, batch_size, device, seed=Training().seed),
            checkpoint.layout,
            base=trainable(checkpoint.base.model),
            examples=len(examples),
            limit=limit,
            progress=lambda done: progress(done, total),
        )
    except (RuntimeError, ValueError, IndexError) as error:  # what torch and transformers raise where shapes do not fit
        raise ModelError(
            f"the model cannot compute a batch of the data: {type(error).__name__}: {error}. It may not take texts of "
            "that length, or the device has too little memory: try another --max-length or --batch-size"
        ) from error
