"""A silo's examples: read, checked against the task, split.

What the columns of a source hold (`text`, `text-pair`, `image`, `label`, as [data] names them), the file of each kind
of task in `gramfuse_client.tasks` says. Rows that do not fit are all counted; `skip-bad` of [data] says how many may be
left out.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from gramfuse_client.data.columns import Input, Label, Reader
from gramfuse_client.data.formats import HUB, Dataset, Row, rows
from gramfuse_client.data.setting_names import SettingNames
from gramfuse_client.silo_file import Data, Silo
from gramfuse_client.tasks.registry import at_silo
from gramfuse_protocol.contract.task import Task
from gramfuse_protocol.errors import DataError

HALF = 0.5
"""Share of the held-out examples that is set aside for validation, where the silo file does not say."""

SHOWN = 5
"""Of so many bad rows a message says what is wrong with each."""

NUMBER = re.compile(r"-?[0-9]+")


@dataclass(frozen=True)
class Examples:
    """Examples of one task.

    Args:
        inputs: what is given of each example: all of one type.
        pairs: the second text of each, or None.
        labels: what is to be learned of each: all of one type; None of each where that is not known, or there is none.
        left_out: what is wrong with each row of the source that was left out.
        numbers: of each example's row or line in the source; nothing if there is no source.
    """

    inputs: Sequence[Input]
    pairs: Sequence[str] | None
    labels: Sequence[Label]
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
    def given(self) -> list[tuple[str | tuple[str, ...], str | None]]:
        """What tells an example's input from others."""
        return [(_stated(one), None if self.pairs is None else self.pairs[i]) for i, one in enumerate(self.inputs)]

    @property
    def digest(self) -> str:
        """SHA-256 over all examples in order; tells whether a silo's data changed. It stays at the silo."""
        hasher = hashlib.sha256()
        for i, given in enumerate(self.inputs):
            row = [_stated(given), None if self.pairs is None else self.pairs[i], self.labels[i]]
            hasher.update(json.dumps(row, ensure_ascii=False).encode() + b"\n")
        return hasher.hexdigest()


def _stated(given: Input) -> str | tuple[str, ...]:
    """Return what an example's input is to its digest: an image is what is in its file."""
    if isinstance(given, Path):
        given = given.read_bytes()
    return hashlib.sha256(given).hexdigest() if isinstance(given, bytes) else given


def load(silo: Silo, task: Task, names: Mapping[str, int] | None = None) -> tuple[Examples, Examples]:
    """Return a silo's training and held-out examples; what is set aside for `gramfuse tune` is in neither.

    Args:
        task: the silo's own (`gramfuse_protocol.contract.plan.Plan.task_of`).
        names: index of each label by what the data call it; by default by the task's names.

    Raises:
        DataError: naming the file, the line and what was expected.
    """
    train, held_out = _train_and_held_out(silo, task, names)
    fraction = silo.file.data.validation
    if isinstance(fraction, float):
        held_out, _ = _set_aside(held_out, fraction, silo, "validation")
    return train, held_out


def load_validation(silo: Silo, task: Task, names: Mapping[str, int] | None = None) -> Examples:
    """Return the examples that `gramfuse tune` chooses by: as `data.validation` says, half of the held-out ones if not.

    What a model was trained on or is reported on tells nothing, so examples whose input is also a training or a
    held-out example's are left out.

    Args:
        task, names: as `load` has them.

    Raises:
        DataError: as `load`, and if nothing is left.
    """
    train, held_out = _train_and_held_out(silo, task, names)
    source = silo.file.data.validation
    if isinstance(source, str):
        validation = _read(source, silo, task, names)
    else:
        held_out, validation = _set_aside(held_out, HALF if source is None else source, silo, "validation")
    known = {*train.given, *held_out.given}
    left = validation.take([i for i, given in enumerate(validation.given) if given not in known])
    if not left:
        raise DataError(silo.words.validation.format(path=silo.path, count=len(validation)))
    return left


def load_training(silo: Silo, task: Task, names: Mapping[str, int] | None = None) -> Examples:
    """Return all examples of `data.train`, those that are set aside of it too; takes and raises what `load` does."""
    return _read(silo.file.data.train, silo, task, names)


def left_out(train: Examples, held_out: Examples) -> tuple[str, ...]:
    """Return what is wrong with each row that was left out; those of one source once."""
    return (*train.left_out, *(() if held_out.left_out is train.left_out else held_out.left_out))


def load_measured(silo: Silo, task: Task, names: Sequence[str] = (), *, labelled: bool = False) -> Examples:
    """Return all examples of `data.train`, for statistics of a model that was fine-tuned on them.

    Statistics need no labels, except as the inputs of a decoder (`sequence-to-sequence`), so all others are None. A
    label that is there must be one of the model's all the same, or the data are not the model's: by name, or by the
    number of the model's output where no name is a number itself.

    Args:
        task: of the model.
        names: what the data call the model's outputs, in their order; by default as the task does.
        labelled: whether each row must have a label.

    Raises:
        DataError: as `load`.
    """
    examples = _read(silo.file.data.train, silo, task, outputs(task, names), labelled=labelled)
    if at_silo(task).label_is_input:
        return examples
    return replace(examples, labels=[None] * len(examples))


def outputs(task: Task, names: Sequence[str] = ()) -> dict[str, int]:
    """Return the outputs of a task's model by what data call them: a name, or a number where no name is one itself.

    Args:
        names: of the outputs, in their order; by default the task's.
    """
    names = names or task.labels
    known = {name: index for index, name in enumerate(names)}
    if not any(NUMBER.fullmatch(name) for name in names):
        known |= {str(index): index for index in range(len(names))}
    return {name: index for name, index in known.items() if index in task.annotated}


def _train_and_held_out(silo: Silo, task: Task, names: Mapping[str, int] | None) -> tuple[Examples, Examples]:
    data, train = silo.file.data, load_training(silo, task, names)
    if isinstance(data.held_out, str):
        return train, _read(data.held_out, silo, task, names)
    return _set_aside(train, data.held_out, silo, "held-out")


def _set_aside(examples: Examples, fraction: float, silo: Silo, key: str) -> tuple[Examples, Examples]:
    """Return the examples that stay and those that are set aside, drawn by `data.split-seed`; both in order.

    Args:
        key: where the silo file says how many, for the error.
    """
    order = list(range(len(examples)))
    random.Random(silo.file.data.split_seed).shuffle(order)  # noqa: S311  # a split, not a secret
    aside = max(1, round(fraction * len(examples)))
    if aside >= len(examples):
        raise DataError(f"{silo.path}: data.{key} = {fraction} leaves nothing of {len(examples)} examples")
    return examples.take(sorted(order[aside:])), examples.take(sorted(order[:aside]))


def _read(
    source: str, silo: Silo, task: Task, names: Mapping[str, int] | None = None, *, labelled: bool = True
) -> Examples:
    """Read a source.

    Args:
        names: index of each label by what the data call it; by default by the task's names.
        labelled: whether each row must have a label; a target text it must have in any case.
    """
    columns = silo.file.data
    if task.pair and columns.text_pair is None:
        raise DataError(silo.words.pair.format(path=silo.path))
    at_silo(task).check_ready()
    known = {task.labels[index]: index for index in task.annotated} if names is None else names
    reader = Reader(columns, task, known, _folder(source, silo.directory), silo.words, labelled)
    good: list[tuple[Input, str, Label, int]] = []
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
    place = source if source.startswith(HUB) else str(silo.directory / source)
    if count - len(good) > columns.skip_bad or (count and not good):
        raise DataError(_complaint(place, bad, count - len(good), count, columns.skip_bad, silo.words))
    if not good:
        raise DataError(f"{place}: holds no examples; expected at least one")
    inputs, pairs, labels, numbers = map(list, zip(*good, strict=True))
    return Examples(inputs, pairs if task.pair else None, labels, tuple(bad), numbers)


def _example(reader: Reader, row: Row, where: str) -> tuple[Input, str, Label]:
    """Return the input, its second text and the label in a row.

    Args:
        where: the file and the line, for errors.
    """
    kind, columns = at_silo(reader.task), reader.columns
    given = kind.input(row, reader, where)
    pair = reader.text(row, columns.text_pair, where) if reader.task.pair and columns.text_pair is not None else ""
    if not reader.labelled and not kind.label_is_input and row.get(columns.label) is None:
        return given, pair, None
    return given, pair, kind.label(row, given, reader, where)


def _names(columns: Data) -> set[str]:
    """Return the names of the columns that count."""
    return {columns.text, columns.image, columns.label, *filter(None, [columns.text_pair])}


def _folder(source: str, directory: Path) -> Path:
    """Return the directory that paths of images start at."""
    if source.startswith(HUB):
        return (directory / Dataset.parse(source, directory).name).resolve()
    return (directory / source).resolve().parent


def _complaint(place: str, bad: Sequence[str], count: int, rows: int, allowed: int, words: SettingNames) -> str:
    """Say what is wrong with rows: all of it of a single one, and of several what is wrong with the first.

    Args:
        bad: what is wrong with each of the first.
        count, rows: how many are bad, of how many.
        words: what settings are called.
    """
    if count == 1:
        return bad[0]
    remedy = bad[0].partition("; ")[2] or "correct them"
    shown = [one.partition("; ")[0] for one in bad[:SHOWN]]
    more = [f"and {count - SHOWN:,} more"] if count > SHOWN else []
    left = words.skipping if count < rows else ""
    allowance = f", and {words.skip_bad} allows {allowed:,}" if left else ""
    skipping = f". {left.format(count=count)}" if left else ""
    return (
        f"{place}: {count:,} of {rows:,} rows cannot be used{allowance}:\n"
        + "\n".join((*shown, *more))
        + f"; {remedy}{skipping}"
    )
