"""How long a text a base model takes: found by running it on public text, since configurations say it in many ways."""

from __future__ import annotations

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
    found: dict[str, Room] = {}
    for kind, key in zip(KINDS, ("input_ids", "labels"), strict=True):
        if key not in rows[0]:
            continue
        less, more = (row[key].shape[1] for row in rows)
        for table, indices in lookups[1]:
            before = next((_last(i, less) for t, i in lookups[0] if t is table and _last(i, less) is not None), None)
            last = _last(indices, more)
            if last is not None and before is not None and last - before == more - less > 0:
                room = Room(table.shape[0] - (last + 1 - more), names.get(id(table), "positions"))
                found[kind] = min(room, found.get(kind, room))
    return found


def _last(indices: torch.Tensor, tokens: int) -> int | None:
    """Return the highest of the indices of one text, if those before it count up to it, one for each token."""
    if indices.dim() > 2 or (indices.dim() == 2 and indices.shape[0] != 1):
        return None
    different = set(indices.flatten().tolist())
    last = max(different)
    return last if different.issuperset(range(last + 1 - tokens, last)) else None


class _Lookups(TorchFunctionMode):
    """Notes what is looked up in which table of embeddings."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Lookup] = []

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is functional.embedding:
            self.found.append((args[1], args[0]))
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
