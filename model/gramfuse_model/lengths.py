"""How long a text a base model takes: found by running it on public text, since configurations say it in many ways."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

from gramfuse_model.base import Base
from gramfuse_model.heads import answers
from gramfuse_model.observation import observing
from gramfuse_model.public_text import PUBLIC_TEXT
from gramfuse_protocol.errors import ModelError, PlanError
from gramfuse_protocol.task import Task

TRIED = ((7, 6), (17, 11))
"""Tokens of input and target in two runs; the two grow by different numbers, so that they can be told apart."""

LONGEST = 127
"""Most tokens of a text that is tried: a prime, which no model that works in blocks takes by chance."""

KINDS = ("input", "target")
SETTINGS = {"input": "max-length", "target": "target-length"}

Row = dict[str, torch.Tensor]
Lookup = tuple[torch.Tensor, torch.Tensor]
"""A table of embeddings, and the indices of what was looked up in it."""


class Room(NamedTuple):
    """How many tokens a model has places for, and the table that they stand in."""

    tokens: int
    table: str


def check_lengths(base: Base, tasks: Iterable[Task], *, trains: bool) -> None:
    """Check that a base model takes the texts of some tasks, from a single letter on.

    Args:
        trains: whether it is to be trained, when some models take other lengths than in evaluation.

    Raises:
        PlanError: if the model's table of positions has fewer places than the tasks allow tokens.
        ModelError: if the model cannot compute texts of some length.
    """
    if base.model.main_input_name == "pixel_values":
        return
    tasks = tuple(tasks)
    wanted = {"input": max(task.max_length for task in tasks), "target": max(task.target_length for task in tasks)}
    for kind, room in room_of(base, *wanted.values()).items():
        if wanted[kind] > room.tokens:
            raise PlanError(
                f"{SETTINGS[kind]} is {wanted[kind]:,}, and the model has places for {room.tokens:,} tokens "
                f"({room.table!r}); set {SETTINGS[kind]} to {room.tokens:,} at most, or take a base for longer texts"
            )
    word = _row(base, "a", *wanted.values())
    text = _row(base, " ".join(PUBLIC_TEXT), min(LONGEST, wanted["input"]), min(LONGEST, wanted["target"]))
    for row in (word, text):
        _run(base.model, row)
        if trains and not any(isinstance(module, _BatchNorm) for module in base.model.modules()):  # it would learn
            _run(base.model, row, trains=True)


def room_of(base: Base, longest: int, target: int) -> Mapping[str, Room]:
    """Return for how many tokens a model has places, of `input` and of `target`, each only if it has such a table.

    From such a table, a text of n tokens takes n rows in a row, and a longer text as many more.

    Args:
        longest, target: most tokens of an input and of a target that are of interest.

    Raises:
        ModelError: if the model cannot compute short texts.
    """
    if base.model.main_input_name == "pixel_values":
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
                    room = Room(most, names.get(id(table), "positions"))
                    found[kind] = min(room, found.get(kind, room))
                    break
    return found


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


def _row(base: Base, text: str, tokens: int, targets: int) -> Row:
    """Return one public text of so many tokens at most, as keyword arguments of forward."""
    row = dict(base.tokenizer(text, truncation=True, max_length=tokens, return_tensors="pt"))
    if answers(base.model):
        target = base.tokenizer(text_target=text, truncation=True, max_length=targets, return_tensors="pt")
        row["labels"] = target["input_ids"]
    return row


def _run(model: nn.Module, row: Row, *, trains: bool = False) -> list[Lookup]:
    """Run a model on one text, and return the tables that it looked something up in, with the indices."""
    device = next(model.parameters()).device
    with observing(model, []), torch.random.fork_rng(devices=[]), _Lookups() as lookups:
        model.train(trains)
        try:
            model(**{key: value.to(device) for key, value in row.items()})
        except Exception as error:  # models raise what they like
            raise ModelError(
                f"the base model cannot compute a text of {row['input_ids'].shape[1]} tokens"
                f"{' in training' if trains else ''}: {type(error).__name__}: {error}. Texts have any length up to "
                "max-length, and gramfuse pads them to the longest of their batch; take a base model that takes them"
            ) from error
    found: list[Lookup] = lookups.found
    return found
