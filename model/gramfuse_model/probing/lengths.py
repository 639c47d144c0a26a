"""How long a text a base model takes: found by running it on public text, since configurations say it in many ways."""

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
from gramfuse_model.probing.hooks import MOST, observing
from gramfuse_model.probing.public_text import PUBLIC_TEXT
from gramfuse_protocol.contract.task import Task
from gramfuse_protocol.errors import ModelError, PlanError
from gramfuse_protocol.text import one_line

TRIED = ((7, 6), (17, 11))
"""Tokens of input and target in two runs; the two grow by different numbers, so that they can be told apart."""

LONGEST = 127
"""Most tokens of a text that is tried: a prime, which no model that works in blocks takes by chance."""

KINDS = ("input", "target")
SETTINGS = {"input": "max-length", "target": "target-length"}

Row = dict[str, torch.Tensor]
Lookup = tuple[torch.Tensor, torch.Tensor]
"""A table of embeddings, and the indices of what was looked up in it."""


DEPEND = ("dynamic", "longrope")
"""Kinds of rotary positions that are others for all texts of a batch once its longest has a number of tokens."""


TEXT = (
    "text",
    "Texts have any length up to max-length, and gramfuse pads them to the longest of their batch; take a base model "
    "that takes them",
)
PAIR = (
    "pair of texts",
    "Its tokenizer gives the second text of a pair token_type_ids of 1; take a base model that knows them "
    "(type_vocab_size in config.json is 2 or more), or leave out 'pair'",
)
"""What a model fails on, and what to do."""


class Room(NamedTuple):
    """How many tokens a model takes, and why no more: what follows the words "the model"."""

    tokens: int
    reason: str


def check_lengths(base: Base, tasks: Iterable[Task], *, trains: bool) -> None:
    """Check that a base model takes the texts of some tasks, from a single letter on.

    Args:
        trains: whether it is to be trained, when some models take other lengths than in evaluation.

    Raises:
        PlanError: if the model's table of positions has fewer places than the tasks allow tokens, or its rotary
            positions depend on the batch before that.
        ModelError: if the model cannot compute texts of some length.
    """
    if base.takes_images:
        return
    tasks = tuple(tasks)
    wanted = {"input": max(task.max_length for task in tasks), "target": max(task.target_length for task in tasks)}
    for kind, room in room_of(base, *wanted.values()).items():
        if wanted[kind] > room.tokens:
            raise PlanError(
                f"{SETTINGS[kind]} is {wanted[kind]:,}, and the model {room.reason}; set {SETTINGS[kind]} to "
                f"{room.tokens:,} at most, or take a base for longer texts"
            )
    most = [min(LONGEST, wanted[kind]) for kind in KINDS]
    rows = [_row(base, "a", *wanted.values()), _row(base, " ".join(PUBLIC_TEXT), *most)]
    if any(task.pair for task in tasks):
        rows.append(_row(base, PUBLIC_TEXT[0], *most, second=PUBLIC_TEXT[1]))
    for row in rows:
        _run(base.model, row)
        if trains and not any(isinstance(module, _BatchNorm) for module in base.model.modules()):  # it would learn
            _run(base.model, row, trains=True)


def room_of(base: Base, longest: int, target: int) -> Mapping[str, Room]:
    """Return how many tokens a model takes, of `input` and of `target`, each only if there is a bound.

    It has a table of places, of which a text of n tokens takes n rows in a row, and a longer text as many more; or its
    rotary positions are the same in every batch up to so many tokens.

    Args:
        longest, target: most tokens of an input and of a target that are of interest.

    Raises:
        ModelError: if the model cannot compute short texts.
    """
    if base.takes_images:
        return {}
    text = " ".join(PUBLIC_TEXT)
    rows = [_row(base, text, min(tokens, longest), min(targets, target)) for tokens, targets in TRIED]
    lookups = [_run(base.model, row) for row in rows]
    names = {id(tensor): name for name, tensor in (*base.model.named_parameters(), *base.model.named_buffers())}
    numbers = {buffer.untyped_storage().data_ptr(): buffer for buffer in base.model.buffers() if buffer.numel()}
    found: dict[str, Room] = {}
    for kind, key, wanted in zip(KINDS, ("input_ids", "labels"), (longest, target), strict=True):
        if key not in rows[0]:
            continue
        tokens = tuple(row[key].shape[1] for row in rows)
        for table, indices in lookups[1]:
            for before in (i for t, i in lookups[0] if t is table):
                places = _places(table, before, indices, tokens)
                if places is None and kind == "input":
                    places = _places_of_whole_windows(base, table, before, indices, tokens, wanted)
                if places is not None:
                    most = min(places, _numbered(indices, numbers, places))
                    name = names.get(id(table), "positions")
                    room = Room(most, f"has places for {most:,} tokens ({name!r})")
                    found[kind] = min(room, found.get(kind, room))
                    break
        for room in _rotary(base.model.config.to_dict()):
            found[kind] = min(room, found.get(kind, room))
    return found


def _rotary(config: Mapping[str, Any], length: int | None = None) -> Iterator[Room]:
    """Yield up to how many tokens rotary positions are the same in every batch, for those of which that is not all.

    Args:
        config: a configuration, or a part of one.
        length: `max_position_embeddings` of what it is a part of.
    """
    length = config.get("max_position_embeddings", length)
    kind = config.get("rope_type")
    if kind in DEPEND:
        tokens = length if kind == "dynamic" else config.get("original_max_position_embeddings")
        if isinstance(tokens, int):
            reason = f"computes other positions for a batch with a text of more than {tokens:,} tokens"
            yield Room(tokens, f"{reason} (rope_type is {kind!r}), so that it would depend on what else is in it")
    for part in config.values():
        if isinstance(part, Mapping):
            yield from _rotary(part, length)


def _places(table: torch.Tensor, before: torch.Tensor, indices: torch.Tensor, tokens: tuple[int, ...]) -> int | None:
    """Return for how many tokens a table has places, if the indices of two texts have one for each token."""
    less, more = tokens
    ends = _last(before, less), _last(indices, more)
    if ends[0] is None or ends[1] is None or not ends[1] - ends[0] == more - less > 0:
        return None
    return table.shape[0] - (ends[1] + 1 - more)


def _places_of_whole_windows(
    base: Base, table: torch.Tensor, before: torch.Tensor, indices: torch.Tensor, tokens: tuple[int, ...], wanted: int
) -> int | None:
    """Return for how many tokens a table has places in whole windows, if a model pads each text to such, as LED does.

    A model that looks up a number of places that has nothing to do with the text is told apart by a text that is one
    token longer than the window.

    Args:
        wanted: most tokens that are of interest.
    """
    counts = [i.numel() for i in (before, indices)]
    window = math.gcd(*counts)
    if not all(_counts_up(i) for i in (before, indices)) or before.flatten()[0] != indices.flatten()[0]:
        return None
    if window < 2 or [-(-n // window) * window for n in tokens] != counts or counts == list(tokens):
        return None
    places = int(table.shape[0] - indices.flatten()[0]) // window * window
    if counts[0] == counts[1] and places < wanted:
        text = " ".join(PUBLIC_TEXT * (1 + window // 50))
        try:
            longer = _run(base.model, _row(base, text, window + 1, TRIED[1][1]))
        except ModelError:
            return places
        if all(i.numel() == window for t, i in longer if t is table):
            return None
    return places


def _counts_up(indices: torch.Tensor) -> bool:
    """Whether indices are consecutive numbers of one text."""
    flat = indices.flatten()
    return flat.numel() == indices.shape[-1] and bool((flat.diff() == 1).all())


def _numbered(indices: torch.Tensor, numbers: Mapping[int, torch.Tensor], places: int) -> int:
    """Return how many tokens a model can number, where it takes the indices from a buffer of numbers."""
    buffer = numbers.get(indices.untyped_storage().data_ptr())
    return places if buffer is None else int(buffer.numel() - indices.storage_offset())


def _last(indices: torch.Tensor, tokens: int) -> int | None:
    """Return the highest of the indices of one text, if those before it count up to it, one for each token."""
    if indices.dim() > 2 or (indices.dim() == 2 and indices.shape[0] != 1):
        return None
    different = set(indices.flatten().tolist())
    last = max(different)
    return last if different.issuperset(range(last + 1 - tokens, last)) else None


def _is_table(tensor: torch.Tensor) -> bool:
    return tensor.dim() == 2 and tensor.is_floating_point()


class _Lookups(TorchFunctionMode):
    """Notes what is looked up in which table of embeddings."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Lookup] = []

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is functional.embedding:
            self.found.append((args[1], args[0]))
        elif function is torch.Tensor.__getitem__ and _is_table(args[0]):
            first, *rest = args[1] if isinstance(args[1], tuple) else (args[1],)
            if isinstance(first, torch.Tensor) and first.dtype == torch.int64 and all(r == slice(None) for r in rest):
                self.found.append((args[0], first))
        return function(*args, **(kwargs or {}))


def _row(base: Base, text: str, tokens: int, targets: int, *, second: str | None = None) -> Row:
    """Return one public text, or a pair, of so many tokens at most, as keyword arguments of forward."""
    row = dict(base.tokenizer(text, second, truncation=True, max_length=tokens, return_tensors="pt"))
    if is_encoder_decoder(base.model):
        target = base.tokenizer(text_target=text, truncation=True, max_length=targets, return_tensors="pt")
        row["labels"] = target["input_ids"]
    return row


def _run(model: nn.Module, row: Row, *, trains: bool = False) -> list[Lookup]:
    """Run a model on one text or pair, and return the tables that it looked something up in, with the indices."""
    device = next(model.parameters()).device
    with observing(model, []), torch.random.fork_rng(devices=[]), _Lookups() as lookups:
        model.train(trains)
        try:
            model(**{key: value.to(device) for key, value in row.items()})
        except Exception as error:  # models raise what they like
            what, remedy = PAIR if "token_type_ids" in row and bool(row["token_type_ids"].any()) else TEXT
            when, said = " in training" if trains else "", one_line(str(error), MOST).removesuffix(".")
            raise ModelError(
                f"the base model cannot compute a {what} of {row['input_ids'].shape[1]} tokens{when}: "
                f"{type(error).__name__}: {said}. {remedy}"
            ) from error
    found: list[Lookup] = lookups.found
    return found
