"""Reads a silo's examples, checks them against the task, and splits them.

The file of each kind of task in `gramfuse_client.tasks` defines what its columns contain (`text`, `text-pair`, `image`,
`label`, as named in [data]). All bad rows are counted; `skip-bad` of [data] is the number to leave out at most.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from gramfuse_client.data.alike import alike
from gramfuse_client.data.columns import Input, Reader, Target
from gramfuse_client.data.formats import HUB, Dataset, Row, rows
from gramfuse_client.data.setting_names import SettingNames
from gramfuse_client.silo_file import Data, Silo
from gramfuse_client.tasks.registry import at_silo
from gramfuse_protocol.contract.task import Task
from gramfuse_protocol.errors import DataError

HALF = 0.5
"""Default share of the held-out examples that is set aside for validation."""

SHOWN = 5
"""Number of bad rows that an error describes."""

NUMBER = re.compile(r"-?[0-9]+")


@dataclass(frozen=True)
class Examples:
    """Examples of one task.

    Args:
        inputs: each example's input; all of one type.
        pairs: each example's second text, or None.
        labels: each example's label; all of one type, or all None if they are unknown or the task has none.
        left_out: describes each bad row of the source that was left out.
        numbers: each example's row or line number in the source; empty without a source.
    """

    inputs: Sequence[Input]
    pairs: Sequence[str] | None
    labels: Sequence[Target]
    left_out: Sequence[str] = field(default=(), compare=False)
    numbers: Sequence[int] = field(default=(), compare=False)

    def __len__(self) -> int:
        return len(self.inputs)

    def take(self, indices: Sequence[int]) -> Examples:
        """Return these examples in this order."""
        return Examples(
            [self.inputs[i] for i in indices],
            None if self.pairs is None else [self.pairs[i] for i in indices],
            [self.labels[i] for i in indices],
            self.left_out,
            [self.numbers[i] for i in indices] if self.numbers else (),
        )

    @property
    def input_keys(self) -> list[tuple[str | tuple[str, ...], str | None]]:
        """Each example's input as a hashable key, with its second text; an image is the SHA-256 of its file."""
        return [(_key(each), None if self.pairs is None else self.pairs[i]) for i, each in enumerate(self.inputs)]

    @property
    def digest(self) -> str:
        """SHA-256 over all examples in order, to detect changes of a silo's data. It never leaves the silo."""
        hasher = hashlib.sha256()
        for i, each in enumerate(self.inputs):
            row = [_key(each), None if self.pairs is None else self.pairs[i], self.labels[i]]
            hasher.update(json.dumps(row, ensure_ascii=False).encode() + b"\n")
        return hasher.hexdigest()


def _key(value: Input) -> str | tuple[str, ...]:
    """Return an input itself, or the SHA-256 of an image's file."""
    if isinstance(value, Path):
        value = value.read_bytes()
    return hashlib.sha256(value).hexdigest() if isinstance(value, bytes) else value


def load(silo: Silo, task: Task, names: Mapping[str, int] | None = None) -> tuple[Examples, Examples]:
    """Return a silo's training and held-out examples, without those set aside for `gramfuse tune`.

    Args:
        task: the silo's task (`gramfuse_protocol.contract.plan.Plan.task_of`).
        names: index of each label by its name in the data; by default the task's names.

    Raises:
        DataError: naming the file, the line and what was expected.
    """
    train, held_out = _train_and_held_out(silo, task, names)
    fraction = silo.file.data.validation
    if isinstance(fraction, float):
        held_out, _ = _set_aside(held_out, fraction, silo, "validation")
    return train, held_out


def load_validation(silo: Silo, task: Task, names: Mapping[str, int] | None = None) -> Examples:
    """Return the validation examples for `gramfuse tune`: from `data.validation`, by default half of the held-out ones.

    Examples whose input also occurs among the training or the remaining held-out examples are left out.

    Args:
        task, names: as for `load`.

    Raises:
        DataError: as for `load`, and if no example is left.
    """
    train, held_out = _train_and_held_out(silo, task, names)
    source = silo.file.data.validation
    if isinstance(source, str):
        validation = _read(source, silo, task, names)
    else:
        held_out, validation = _set_aside(held_out, HALF if source is None else source, silo, "validation")
    used = {*alike(train, task), *alike(held_out, task)}
    unused = validation.take([i for i, key in enumerate(alike(validation, task)) if key not in used])
    if not unused:
        raise DataError(silo.words.validation.format(path=silo.path, count=len(validation)))
    return unused


def load_training(silo: Silo, task: Task, names: Mapping[str, int] | None = None) -> Examples:
    """Return all examples of `data.train`, including those set aside. Arguments and errors are those of `load`."""
    return _read(silo.file.data.train, silo, task, names)


def left_out(train: Examples, held_out: Examples) -> tuple[str, ...]:
    """Return a description of each bad row that was left out, once for each source."""
    return (*train.left_out, *(() if held_out.left_out is train.left_out else held_out.left_out))


def load_measured(silo: Silo, task: Task, names: Sequence[str] = (), *, labelled: bool = False) -> Examples:
    """Return all examples of `data.train`, to measure a model that was fine-tuned on them.

    Statistics need labels only as inputs of a decoder (`sequence-to-sequence`), so all other labels are dropped. But a
    label that is present must be one of the model's, or the data are not the model's: by name, or by index if no name
    is a number itself.

    Args:
        task: the model's task.
        names: names of the model's outputs in the data, in order; by default the task's.
        labelled: whether each row must have a label.

    Raises:
        DataError: as for `load`.
    """
    examples = _read(silo.file.data.train, silo, task, outputs(task, names), labelled=labelled)
    if at_silo(task).label_is_input:
        return examples
    return replace(examples, labels=[None] * len(examples))


def outputs(task: Task, names: Sequence[str] = ()) -> dict[str, int]:
    """Return the index of each output of a task's model by its names in the data, and by number if no name is a number.

    Args:
        names: names of the outputs, in order; by default the task's.
    """
    names = names or task.labels
    indices = {name: index for index, name in enumerate(names)}
    if not any(NUMBER.fullmatch(name) for name in names):
        indices |= {str(index): index for index in range(len(names))}
    return {name: index for name, index in indices.items() if index in task.annotated}


def _train_and_held_out(silo: Silo, task: Task, names: Mapping[str, int] | None) -> tuple[Examples, Examples]:
    data, train = silo.file.data, load_training(silo, task, names)
    if isinstance(data.held_out, str):
        return train, _read(data.held_out, silo, task, names)
    return _set_aside(train, data.held_out, silo, "held-out")


def _set_aside(examples: Examples, fraction: float, silo: Silo, key: str) -> tuple[Examples, Examples]:
    """Split examples randomly by `data.split-seed`, and return those that stay and those set aside, both in order.

    Args:
        fraction: share to set aside.
        key: the key of [data] with the fraction, for the error.
    """
    order = list(range(len(examples)))
    random.Random(silo.file.data.split_seed).shuffle(order)  # noqa: S311  # a split, not a secret
    aside = max(1, round(fraction * len(examples)))
    if aside >= len(examples):
        raise DataError(f"{silo.path}: data.{key} = {fraction} leaves none of the {len(examples)} examples")
    return examples.take(sorted(order[aside:])), examples.take(sorted(order[:aside]))


def _read(
    source: str, silo: Silo, task: Task, names: Mapping[str, int] | None = None, *, labelled: bool = True
) -> Examples:
    """Read a source.

    Args:
        names: index of each label by its name in the data; by default the task's names.
        labelled: whether each row must have a label; a target text is always required.
    """
    columns = silo.file.data
    if task.pair and columns.text_pair is None:
        raise DataError(silo.words.pair.format(path=silo.path))
    at_silo(task).check_ready()
    known = {task.labels[index]: index for index in task.annotated} if names is None else names
    reader = Reader(columns, task, known, _folder(source, silo.directory), silo.words, labelled)
    good: list[tuple[Input, str, Target, int]] = []
    bad: list[str] = []
    count = 0
    for count, (where, row) in enumerate(rows(source, silo.directory, _names(columns)), 1):
        try:
            if isinstance(row, DataError):
                raise row
            good.append((*_example(reader, row, where), int(where.rpartition(":")[2].removeprefix(" row "))))
        except DataError as error:
            if count - len(good) <= max(columns.skip_bad, SHOWN):
                bad.append(str(error))
    where = source if source.startswith(HUB) else str(silo.directory / source)
    if count - len(good) > columns.skip_bad or (count and not good):
        raise DataError(_complaint(where, bad, count - len(good), count, columns.skip_bad, silo.words))
    if not good:
        raise DataError(f"{where}: holds no examples; expected at least one")
    inputs, pairs, labels, numbers = map(list, zip(*good, strict=True))
    return Examples(inputs, pairs if task.pair else None, labels, tuple(bad), numbers)


def _example(reader: Reader, row: Row, where: str) -> tuple[Input, str, Target]:
    """Return a row's input, second text and label.

    Args:
        where: file and line, for errors.
    """
    kind, columns = at_silo(reader.task), reader.columns
    given = kind.input(row, reader, where)
    pair = reader.text(row, columns.text_pair, where) if reader.task.pair and columns.text_pair is not None else ""
    if not reader.labelled and not kind.label_is_input and row.get(columns.label) is None:
        return given, pair, None
    return given, pair, kind.label(row, given, reader, where)


def _names(columns: Data) -> set[str]:
    """Return the names of the columns to use."""
    return {columns.text, columns.image, columns.label, *filter(None, [columns.text_pair])}


def _folder(source: str, directory: Path) -> Path:
    """Return the directory that image paths are relative to."""
    if source.startswith(HUB):
        return (directory / Dataset.parse(source, directory).name).resolve()
    return (directory / source).resolve().parent


def _complaint(where: str, bad: Sequence[str], count: int, rows: int, allowed: int, words: SettingNames) -> str:
    """Return the error about bad rows: the full message for one row, a list of the first few for several.

    Args:
        where: the source.
        bad: the errors of the first bad rows.
        count, rows: number of bad rows, and of all rows.
        allowed: number of bad rows to leave out.
        words: names of settings.
    """
    if count == 1:
        return bad[0]
    remedy = bad[0].partition("; ")[2] or "correct them"
    shown = [error.partition("; ")[0] for error in bad[:SHOWN]]
    more = [f"and {count - SHOWN:,} more"] if count > SHOWN else []
    hint = words.skipping if count < rows else ""
    allowance = f", and {words.skip_bad} allows {allowed:,}" if hint else ""
    skipping = f". {hint.format(count=count)}" if hint else ""
    return (
        f"{where}: {count:,} of {rows:,} rows cannot be used{allowance}:\n"
        + "\n".join((*shown, *more))
        + f"; {remedy}{skipping}"
    )
