"""Finds the maximum text length of a base model by running it, since configurations specify it in many ways."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

from gramfuse_model.heads import is_encoder_decoder
from gramfuse_model.loading.base_model import Base
from gramfuse_model.probing.hooks import MESSAGE_CHARACTERS, observing
from gramfuse_model.probing.public_text import PUBLIC_TEXT
from gramfuse_protocol.contract.task import Task
from gramfuse_protocol.errors import ModelError, PlanError
from gramfuse_protocol.text import one_line

LENGTHS = ((7, 6), (17, 11))
"""Number of input and target tokens in two runs; they grow by different numbers, to distinguish them."""

LONGEST = 127
"""Maximum number of tokens of a test text: a prime, so that it is no multiple of a model's block size."""

TEXT_SIDES = ("input", "target")
SETTINGS = {"input": "max-length", "target": "target-length"}

ModelInput = dict[str, torch.Tensor]
Lookup = tuple[torch.Tensor, torch.Tensor]
"""An embedding table and the indices that were looked up in it."""


BATCH_DEPENDENT = ("dynamic", "longrope")
"""Types of rotary embeddings that change for all texts of a batch if its longest text exceeds a length."""


TEXT = (
    "text",
    "Texts can have any length up to max-length, and gramfuse pads them to the longest in their batch; use a base "
    "model that supports this",
)
PAIR = (
    "pair of texts",
    "Its tokenizer sets token_type_ids of the second text to 1; use a base model that supports them (type_vocab_size "
    "in config.json is 2 or more), or omit 'pair'",
)
"""The kind of input on which a model fails, and what to do."""


class Room(NamedTuple):
    """A model's maximum number of tokens, and the reason, which completes a sentence that begins with "the model"."""

    tokens: int
    reason: str


def check_lengths(base: Base, tasks: Iterable[Task], *, trains: bool) -> None:
    """Check that a base model can process texts of all lengths that some tasks allow.

    Args:
        trains: whether it will be trained; some models support other lengths in training than in evaluation.

    Raises:
        PlanError: if the tasks allow more tokens than the model has positions, or than its rotary embeddings can
            encode independently of the batch.
        ModelError: if the model fails on texts of some length.
    """
    if base.takes_images:
        return
    tasks = tuple(tasks)
    wanted = {"input": max(task.max_length for task in tasks), "target": max(task.target_length for task in tasks)}
    for kind, room in room_of(base, *wanted.values()).items():
        if wanted[kind] > room.tokens:
            raise PlanError(
                f"{SETTINGS[kind]} is {wanted[kind]:,}, but the model {room.reason}; set {SETTINGS[kind]} to at most "
                f"{room.tokens:,}, or use a base model for longer texts"
            )
    limits = [min(LONGEST, wanted[kind]) for kind in TEXT_SIDES]
    rows = [_row(base, "a", *wanted.values()), _row(base, " ".join(PUBLIC_TEXT), *limits)]
    if any(task.pair for task in tasks):
        rows.append(_row(base, PUBLIC_TEXT[0], *limits, second=PUBLIC_TEXT[1]))
    for row in rows:
        _run(base.model, row)
        if trains and not any(
            isinstance(module, _BatchNorm) for module in base.model.modules()
        ):  # training mode would update its statistics
            _run(base.model, row, trains=True)


def room_of(base: Base, longest: int, target: int) -> Mapping[str, Room]:
    """Return a model's maximum numbers of tokens for `input` and `target`; unbounded ones are omitted.

    A bound comes from a position table, of which a text of n tokens uses n consecutive rows, or from rotary embeddings
    that are independent of the batch only up to a length.

    Args:
        longest, target: maximum numbers of input and target tokens of interest.

    Raises:
        ModelError: if the model fails on short texts.
    """
    if base.takes_images:
        return {}
    text = " ".join(PUBLIC_TEXT)
    rows = [_row(base, text, min(tokens, longest), min(targets, target)) for tokens, targets in LENGTHS]
    lookups = [_run(base.model, row) for row in rows]
    names = {id(tensor): name for name, tensor in (*base.model.named_parameters(), *base.model.named_buffers())}
    buffers = {buffer.untyped_storage().data_ptr(): buffer for buffer in base.model.buffers() if buffer.numel()}
    rooms: dict[str, Room] = {}
    for kind, key, wanted in zip(TEXT_SIDES, ("input_ids", "labels"), (longest, target), strict=True):
        if key not in rows[0]:
            continue
        tokens = tuple(row[key].shape[1] for row in rows)
        for table, indices in lookups[1]:
            for before in (i for t, i in lookups[0] if t is table):
                positions = _positions(table, before, indices, tokens)
                if positions is None and kind == "input":
                    positions = _positions_in_windows(base, table, before, indices, tokens, wanted)
                if positions is not None:
                    limit = min(positions, _index_limit(indices, buffers, positions))
                    name = names.get(id(table), "positions")
                    room = Room(limit, f"has positions for {limit:,} tokens ({name!r})")
                    rooms[kind] = min(room, rooms.get(kind, room))
                    break
        for room in _rotary(base.model.config.to_dict()):
            rooms[kind] = min(room, rooms.get(kind, room))
    return rooms


def shortened(base: Base, task: Task) -> Task:
    """Return a task with its lengths reduced to what a model takes.

    Raises:
        ModelError: if the model fails on short texts.
    """
    rooms = room_of(base, task.max_length, task.target_length)
    keys = {"input": "max_length", "target": "target_length"}
    return task.model_copy(
        update={keys[kind]: min(room.tokens, getattr(task, keys[kind])) for kind, room in rooms.items()}
    )


def _rotary(config: Mapping[str, Any], length: int | None = None) -> Iterator[Room]:
    """Yield the maximum lengths up to which rotary embeddings are independent of the batch, if they are bounded.

    Args:
        config: a configuration, or a nested one.
        length: `max_position_embeddings` of the enclosing configuration.
    """
    length = config.get("max_position_embeddings", length)
    kind = config.get("rope_type")
    if kind in BATCH_DEPENDENT:
        tokens = length if kind == "dynamic" else config.get("original_max_position_embeddings")
        if isinstance(tokens, int):
            reason = f"changes its position embeddings for a whole batch if a text has more than {tokens:,} tokens"
            yield Room(tokens, f"{reason} (rope_type is {kind!r}), so an output would depend on the rest of its batch")
    for part in config.values():
        if isinstance(part, Mapping):
            yield from _rotary(part, length)


def _positions(table: torch.Tensor, before: torch.Tensor, indices: torch.Tensor, tokens: tuple[int, ...]) -> int | None:
    """Return a table's number of positions, if the indices of two texts have one position for each token."""
    shorter, longer = tokens
    ends = _last(before, shorter), _last(indices, longer)
    if ends[0] is None or ends[1] is None or not ends[1] - ends[0] == longer - shorter > 0:
        return None
    return table.shape[0] - (ends[1] + 1 - longer)


def _positions_in_windows(
    base: Base, table: torch.Tensor, before: torch.Tensor, indices: torch.Tensor, tokens: tuple[int, ...], wanted: int
) -> int | None:
    """Return a table's number of positions in whole windows, for a model that pads texts to windows, such as LED.

    A text that is one token longer than the window excludes models that look up a constant number of positions.

    Args:
        wanted: maximum number of tokens of interest.
    """
    counts = [i.numel() for i in (before, indices)]
    window = math.gcd(*counts)
    if not all(_counts_up(i) for i in (before, indices)) or before.flatten()[0] != indices.flatten()[0]:
        return None
    if window < 2 or [-(-n // window) * window for n in tokens] != counts or counts == list(tokens):
        return None
    positions = int(table.shape[0] - indices.flatten()[0]) // window * window
    if counts[0] == counts[1] and positions < wanted:
        text = " ".join(PUBLIC_TEXT * (1 + window // 50))
        try:
            longer = _run(base.model, _row(base, text, window + 1, LENGTHS[1][1]))
        except ModelError:
            return positions
        if all(i.numel() == window for t, i in longer if t is table):
            return None
    return positions


def _counts_up(indices: torch.Tensor) -> bool:
    """Return whether indices are consecutive numbers of one text."""
    flat = indices.flatten()
    return flat.numel() == indices.shape[-1] and bool((flat.diff() == 1).all())


def _index_limit(indices: torch.Tensor, buffers: Mapping[int, torch.Tensor], positions: int) -> int:
    """Return how many tokens a model can index, if its indices are a slice of a buffer."""
    buffer = buffers.get(indices.untyped_storage().data_ptr())
    return positions if buffer is None else int(buffer.numel() - indices.storage_offset())


def _last(indices: torch.Tensor, tokens: int) -> int | None:
    """Return the highest index of one text, if the indices count up to it, one for each token; None otherwise."""
    if indices.dim() > 2 or (indices.dim() == 2 and indices.shape[0] != 1):
        return None
    distinct = set(indices.flatten().tolist())
    last = max(distinct)
    return last if distinct.issuperset(range(last + 1 - tokens, last)) else None


def _is_table(tensor: torch.Tensor) -> bool:
    return tensor.dim() == 2 and tensor.is_floating_point()


class _Lookups(TorchFunctionMode):
    """Records lookups in embedding tables."""

    def __init__(self) -> None:
        super().__init__()
        self.lookups: list[Lookup] = []

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is functional.embedding:
            self.lookups.append((args[1], args[0]))
        elif function is torch.Tensor.__getitem__ and _is_table(args[0]):
            first, *rest = args[1] if isinstance(args[1], tuple) else (args[1],)
            if isinstance(first, torch.Tensor) and first.dtype == torch.int64 and all(r == slice(None) for r in rest):
                self.lookups.append((args[0], first))
        return function(*args, **(kwargs or {}))


def _row(base: Base, text: str, tokens: int, targets: int, *, second: str | None = None) -> ModelInput:
    """Return a text or a pair, truncated to `tokens` (and `targets`) tokens, as keyword arguments of forward."""
    row = dict(base.tokenizer(text, second, truncation=True, max_length=tokens, return_tensors="pt"))
    if is_encoder_decoder(base.model):
        target = base.tokenizer(text_target=text, truncation=True, max_length=targets, return_tensors="pt")
        row["labels"] = target["input_ids"]
    return row


def _run(model: nn.Module, row: ModelInput, *, trains: bool = False) -> list[Lookup]:
    """Run a model on one text or pair, and return its embedding lookups."""
    device = next(model.parameters()).device
    with observing(model, []), torch.random.fork_rng(devices=[]), _Lookups() as recorder:
        model.train(trains)
        try:
            model(**{key: value.to(device) for key, value in row.items()})
        except Exception as error:  # models raise all kinds of errors
            noun, remedy = PAIR if "token_type_ids" in row and bool(row["token_type_ids"].any()) else TEXT
            when = " in training" if trains else ""
            reason = one_line(str(error), MESSAGE_CHARACTERS).removesuffix(".")
            raise ModelError(
                f"the base model cannot compute a {noun} of {row['input_ids'].shape[1]} tokens{when}: "
                f"{type(error).__name__}: {reason}. {remedy}"
            ) from error
    lookups: list[Lookup] = recorder.lookups
    return lookups
