"""A silo's examples: read, checked against the task, split.

What the columns of a source hold, by kind of task (`text`, `text-pair`, `image`, `label` as [data] names them):

| kind                 | input                                     | label                                            |
|----------------------|-------------------------------------------|--------------------------------------------------|
| classification       | `text` (and `text-pair`): text            | a label of the plan: text, or a whole number     |
| regression           | `text` (and `text-pair`): text            | a finite number; in the plan's range, if results |
|                      |                                           | leave in a secure sum                            |
| multi-label          | `text` (and `text-pair`): text            | a list of labels, [] if none applies; or one     |
| token-classification | `text`: a list of words, or words between | a list of tags, or tags between spaces; as many  |
|                      | white space                               | as words                                         |
| sequence-to-sequence | `text`: text                              | text                                             |
| causal-lm            | `text`: text                              | none                                             |
| image-classification | `image`: a path from where the source is, | a label of the plan                              |
|                      | or bytes of an image file                 |                                                  |

A label that is a whole number is known by its digits, 1.0 by those of 1. Whatever else is no text (nothing, NaN, true)
is no label. Rows that do not fit are all counted; `skip-bad` of [data] says how many may be left out.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from gramfuse_client.images import check_image, check_pillow
from gramfuse_client.silo import Data, Silo
from gramfuse_client.sources import HUB, Dataset, Row, rows
from gramfuse_protocol.errors import DataError
from gramfuse_protocol.task import Task
from gramfuse_protocol.text import listed, quoted

HALF = 0.5
"""Share of the held-out examples that is set aside for validation, where the silo file does not say."""

SHOWN = 5
"""Of so many bad rows a message says what is wrong with each."""

NUMBER = re.compile(r"-?[0-9]+")
WHOLE = re.compile(r"-?[0-9]+\.0+")
"""A whole number as tables write it whose column has gaps."""

Input = str | tuple[str, ...] | Path | bytes
"""A text; words; an image, as a file or as what is in one."""

Label = int | float | tuple[int, ...] | str | None
"""Index of a label; a number; indices of labels, or of a tag for each word; a target text; nothing."""


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
        task: the silo's own (`gramfuse_protocol.plan.Plan.task_of`).
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
        raise DataError(
            f"{silo.path}: all {len(validation)} examples of data.validation are among the training or held-out "
            "examples too; name others, or leave data.validation out"
        )
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
    if task.task == "sequence-to-sequence":
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
        raise DataError(
            f"{silo.path}: the plan is about text pairs (model.pair); name the second column in data.text-pair"
        )
    if task.task == "image-classification":
        check_pillow()
    known = {task.labels[index]: index for index in task.annotated} if names is None else names
    folder = _folder(source, silo.directory)
    good: list[tuple[Input, str, Label, int]] = []
    bad: list[str] = []
    count = 0
    for count, (where, row) in enumerate(rows(source, silo.directory, _names(columns)), 1):
        try:
            if isinstance(row, DataError):
                raise row
            example = _example(row, columns, task, known, folder, where, labelled=labelled)
            good.append((*example, int(where.rpartition(":")[2].removeprefix(" row "))))
        except DataError as error:
            if count - len(good) <= max(columns.skip_bad, SHOWN):
                bad.append(str(error))
    place = source if source.startswith(HUB) else str(silo.directory / source)
    if count - len(good) > columns.skip_bad:
        raise DataError(_complaint(place, bad, count - len(good), count, columns.skip_bad))
    if not good:
        raise DataError(f"{place}: holds no examples; expected at least one")
    inputs, pairs, labels, numbers = map(list, zip(*good, strict=True))
    return Examples(inputs, pairs if task.pair else None, labels, tuple(bad), numbers)


def _example(
    row: Row, columns: Data, task: Task, known: Mapping[str, int], folder: Path, where: str, *, labelled: bool
) -> tuple[Input, str, Label]:
    """Return the input, its second text and the label in a row; arguments as `_read` has them."""
    given = _input(row, columns, task, folder, where)
    pair = _text(row, columns.text_pair, where) if task.pair and columns.text_pair is not None else ""
    if not labelled and task.task != "sequence-to-sequence" and row.get(columns.label) is None:
        return given, pair, None
    return given, pair, _label(row, columns.label, task, known, given, where)


def _names(columns: Data) -> set[str]:
    """Return the names of the columns that count."""
    return {columns.text, columns.image, columns.label, *filter(None, [columns.text_pair])}


def _folder(source: str, directory: Path) -> Path:
    """Return the directory that paths of images start at."""
    if source.startswith(HUB):
        return (directory / Dataset.parse(source, directory).name).resolve()
    return (directory / source).resolve().parent


def _complaint(place: str, bad: Sequence[str], count: int, rows: int, allowed: int) -> str:
    """Say what is wrong with rows: all of it of a single one, and of several what is wrong with the first.

    Args:
        bad: what is wrong with each of the first.
        count, rows: how many are bad, of how many.
    """
    if count == 1:
        return bad[0]
    remedy = bad[0].partition("; ")[2] or "correct them"
    shown = [one.partition("; ")[0] for one in bad[:SHOWN]]
    more = [f"and {count - SHOWN:,} more"] if count > SHOWN else []
    return (
        f"{place}: {count:,} of {rows:,} rows cannot be used, and data.skip-bad allows {allowed:,}:\n"
        + "\n".join((*shown, *more))
        + f"; {remedy}. With skip-bad = {count} under [data] of the silo file they are left out"
    )


def _input(row: Row, columns: Data, task: Task, folder: Path, where: str) -> Input:
    match task.task:
        case "token-classification":
            return _words(row, columns.text, where)
        case "image-classification":
            return _image(_column(row, columns.image, where), columns.image, folder, where)
        case _:
            return _text(row, columns.text, where)


def _label(row: Row, column: str, task: Task, known: Mapping[str, int], given: Input, where: str) -> Label:
    if task.task == "causal-lm":
        return None
    if task.task == "sequence-to-sequence":
        return _text(row, column, where)
    value = _column(row, column, where)
    match task.task:
        case "regression":
            return _target(value, task, where)
        case "multi-label":
            return _labels(value, column, task, known, where)
        case "token-classification":
            assert isinstance(given, tuple)  # noqa: S101
            return _tags(value, column, task, known, given, where)
        case _:
            return _index(value, task, known, where)


def _column(row: Row, column: str, where: str) -> Any:
    if column not in row:
        raise DataError(
            f"{where}: column {column!r} is missing; columns here: {listed(row, 20)}. "
            "Name yours in [data] of the silo file (text, text-pair, image, label)"
        )
    return row[column]


def _text(row: Row, column: str, where: str) -> str:
    value = _column(row, column, where)
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{where}: column {column!r} must hold text, found {quoted(value)}")
    _check_characters(value, column, where)
    return value


def _check_characters(text: str, column: str, where: str) -> None:
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise DataError(f"{where}: column {column!r} holds half of a surrogate pair, which is no text: {quoted(text)}")


def _words(row: Row, column: str, where: str) -> tuple[str, ...]:
    value = _column(row, column, where)
    words = value.split() if isinstance(value, str) else value
    if not isinstance(words, list) or not words:
        raise DataError(
            f"{where}: column {column!r} must hold a list of words, or words between spaces, found {quoted(value)}"
        )
    for position, word in enumerate(words, 1):
        if not isinstance(word, str) or not word.strip():
            raise DataError(f"{where}: column {column!r}: word {position} must be text, found {quoted(word)}")
        _check_characters(word, column, where)
    return tuple(words)


def _image(value: Any, column: str, folder: Path, where: str) -> Path | bytes:
    """Return an image after a look at its first bytes; a dataset's column holds `bytes` or `path`, or both."""
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if not isinstance(value, str | bytes) or not value:
        raise DataError(f"{where}: column {column!r} must hold the path of an image, found {quoted(value)}")
    image = folder / value if isinstance(value, str) else value
    if isinstance(image, Path) and not image.is_file():
        raise DataError(f"{where}: column {column!r}: no such file {image}")
    check_image(image, f"{where}: column {column!r}")
    return image


def _index(value: Any, task: Task, known: Mapping[str, int], where: str) -> int:
    name = _name(value)
    if name is None:
        raise DataError(
            f"{where}: a label must be text or a whole number, found {quoted(value)}; write it as text, or leave the "
            "row out. The datasets library makes None of NA, null and empty fields of CSV, and True of true: name the "
            ".csv file itself to have them as they are"
        )
    if name not in known and name not in task.labels and WHOLE.fullmatch(name):
        name = name.partition(".")[0]
    index = known.get(name)
    if index is not None:
        return index
    if name in task.labels:
        raise DataError(
            f"{where}: label {quoted(value)} is not among those that the plan says this silo annotates "
            f"({_few(known)}); leave the example out, or agree on a plan that lists the label in this silo's 'labels'"
        )
    raise DataError(
        f"{where}: unknown label {quoted(value)}; the plan's labels are {_few(known)}. "
        "All silos must use the plan's labels: rename it here, or agree on a plan that has it. Where a silo annotates "
        "only some of them, the plan lists those as 'labels' of its [[silo]]"
    )


def _name(value: Any) -> str | None:
    """Return what a label is called; None if it is none."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value) if isinstance(value, str | int) and not isinstance(value, bool) and value != "" else None


def _few(labels: Mapping[str, int]) -> str:
    return listed(labels, 20)


def _labels(value: Any, column: str, task: Task, known: Mapping[str, int], where: str) -> tuple[int, ...]:
    """Return the indices of all labels that apply, in the plan's order."""
    if value is None or value == "":
        raise DataError(
            f"{where}: column {column!r} is empty; write [] if none of the labels applies, or leave the example out "
            "if nobody looked"
        )
    values = value if isinstance(value, list) else [value]
    indices = [_index(one, task, known, where) for one in values]
    if len(set(indices)) < len(indices):
        raise DataError(f"{where}: column {column!r} has a label twice: {quoted(value)}")
    return tuple(sorted(indices))


def _tags(
    value: Any, column: str, task: Task, known: Mapping[str, int], words: tuple[str, ...], where: str
) -> tuple[int, ...]:
    """Return the index of each word's tag. An I-X with no B-X before it begins an entity, as metrics have it."""
    tags = value.split() if isinstance(value, str) else value
    if not isinstance(tags, list) or len(tags) != len(words):
        many = f"{len(tags)}" if isinstance(tags, list) else quoted(value)
        raise DataError(
            f"{where}: column {column!r} must hold one tag for each of the {len(words)} words, found {many}"
        )
    return tuple(_index(tag, task, known, where) for tag in tags)


def _target(value: Any, task: Task, where: str) -> float:
    try:
        target = math.nan if isinstance(value, bool) or "_" in str(value) else float(value)
    except (TypeError, ValueError, OverflowError):
        target = math.nan
    if not math.isfinite(target):
        raise DataError(f"{where}: the target must be a finite number, found {quoted(value)}")
    if task.range is not None and not task.range[0] <= target <= task.range[1]:
        raise DataError(
            f"{where}: the target {target:g} is outside of the plan's range of {task.range[0]:g} to {task.range[1]:g}; "
            "correct it, or agree on a plan with a wider 'model.range'"
        )
    return target
