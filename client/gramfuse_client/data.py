"""A silo's examples: read, checked against the task, split.

What the columns of a source hold, by kind of task (`text`, `text-pair`, `image`, `label` as [data] names them):

| kind                 | input                                     | label                                            |
|----------------------|-------------------------------------------|--------------------------------------------------|
| classification       | `text` (and `text-pair`): text            | a label of the plan                              |
| regression           | `text` (and `text-pair`): text            | a finite number; in the plan's range, if results |
|                      |                                           | leave in a secure sum                            |
| multi-label          | `text` (and `text-pair`): text            | a list of labels, [] if none applies; or one     |
| token-classification | `text`: a list of words, or words between | a list of tags, or tags between spaces; as many  |
|                      | white space                               | as words                                         |
| sequence-to-sequence | `text`: text                              | text                                             |
| causal-lm            | `text`: text                              | none                                             |
| image-classification | `image`: a path from where the source is, | a label of the plan                              |
|                      | or bytes of an image file                 |                                                  |
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import json
import math
import random
import tempfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

from gramfuse_client.silo import Data, Silo
from gramfuse_protocol.errors import DataError
from gramfuse_protocol.task import Task
from gramfuse_protocol.text import listed

HALF = 0.5
"""Share of the held-out examples that is set aside for validation, where the silo file does not say."""

READABLE = ".jsonl, .jsonl.gz, .csv, .parquet, or hf:<hub id or folder>[#split]"

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
        labels: what is to be learned of each: all of one type.
    """

    inputs: Sequence[Input]
    pairs: Sequence[str] | None
    labels: Sequence[Label]

    def __len__(self) -> int:
        return len(self.inputs)

    def take(self, indices: Sequence[int]) -> Examples:
        """Return these examples in this order."""
        return Examples(
            [self.inputs[i] for i in indices],
            None if self.pairs is None else [self.pairs[i] for i in indices],
            [self.labels[i] for i in indices],
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


def load(silo: Silo, task: Task) -> tuple[Examples, Examples]:
    """Return a silo's training and held-out examples; what is set aside for `gramfuse tune` is in neither.

    Args:
        task: the silo's own (`gramfuse_protocol.plan.Plan.task_of`).

    Raises:
        DataError: naming the file, the line and what was expected.
    """
    train, held_out = _train_and_held_out(silo, task)
    fraction = silo.file.data.validation
    if isinstance(fraction, float):
        held_out, _ = _set_aside(held_out, fraction, silo, "validation")
    return train, held_out


def load_validation(silo: Silo, task: Task) -> Examples:
    """Return the examples that `gramfuse tune` chooses by: as `data.validation` says, half of the held-out ones if not.

    What a model was trained on or is reported on tells nothing, so examples whose input is also a training or a
    held-out example's are left out.

    Raises:
        DataError: as `load`, and if nothing is left.
    """
    train, held_out = _train_and_held_out(silo, task)
    source = silo.file.data.validation
    if isinstance(source, str):
        validation = _read(source, silo, task)
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


def load_training(silo: Silo, task: Task) -> Examples:
    """Return all examples of `data.train`, those that are set aside of it too; raises as `load`."""
    data = silo.file.data
    if task.pair and data.text_pair is None:
        raise DataError(
            f"{silo.path}: the plan is about text pairs (model.pair); name the second column in data.text-pair"
        )
    return _read(data.train, silo, task)


def _train_and_held_out(silo: Silo, task: Task) -> tuple[Examples, Examples]:
    data, train = silo.file.data, load_training(silo, task)
    if isinstance(data.held_out, str):
        return train, _read(data.held_out, silo, task)
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


def _read(source: str, silo: Silo, task: Task) -> Examples:
    columns = silo.file.data
    known = {task.labels[index]: index for index in task.annotated}
    folder = (silo.directory / source.removeprefix("hf:").partition("#")[0]).resolve()
    folder = folder if source.startswith("hf:") else folder.parent
    inputs: list[Input] = []
    pairs: list[str] = []
    labels: list[Label] = []
    for where, row in _rows(source, silo.directory):
        given = _input(row, columns, task, folder, where)
        inputs.append(given)
        if task.pair and columns.text_pair is not None:
            pairs.append(_text(row, columns.text_pair, where))
        labels.append(_label(row, columns.label, task, known, given, where))
    if not inputs:
        where = source if source.startswith("hf:") else str(silo.directory / source)
        raise DataError(f"{where}: holds no examples; expected at least one")
    return Examples(inputs, pairs if task.pair else None, labels)


def _input(row: dict[str, Any], columns: Data, task: Task, folder: Path, where: str) -> Input:
    match task.task:
        case "token-classification":
            return _words(row, columns.text, where)
        case "image-classification":
            return _image(_column(row, columns.image, where), columns.image, folder, where)
        case _:
            return _text(row, columns.text, where)


def _label(row: dict[str, Any], column: str, task: Task, known: Mapping[str, int], given: Input, where: str) -> Label:
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


def _rows(source: str, directory: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (where, row): where is the file and line, for errors."""
    if source.startswith("hf:"):
        yield from _hugging_face(source, directory)
        return
    path = directory / source
    if not path.is_file():
        raise DataError(f"{path}: no such file; a source is {READABLE}")
    try:
        if source.endswith((".jsonl", ".jsonl.gz")):
            yield from _json_lines(path)
        elif source.endswith(".csv"):
            with path.open(encoding="utf-8-sig", newline="") as lines:
                reader = csv.DictReader(lines, strict=True)
                for row in reader:
                    where = f"{path}:{reader.line_num}"
                    if None in row or None in row.values():
                        raise DataError(
                            f"{where}: has not as many fields as the header's {len(reader.fieldnames or ())}"
                        )
                    yield where, row
        elif source.endswith(".parquet"):
            yield from _table(str(path), _parquet(path))
        else:
            raise DataError(f"{path}: not a format that is read here; a source is {READABLE}")
    except UnicodeDecodeError:
        raise DataError(f"{path}:{_line_not_utf8(path)}: is not UTF-8") from None
    except csv.Error as error:
        raise DataError(f"{path}:{reader.reader.line_num}: not valid CSV: {error}") from None
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read: {error}") from None


def _line_not_utf8(path: Path) -> int:
    """Return the number of the first line that is not UTF-8; text is decoded in chunks, which know no lines."""
    with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError:
                return number
    return number


def _json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    open_text = gzip.open if path.suffix == ".gz" else open
    with open_text(path, "rt", encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            where = f"{path}:{number}"
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(f"{where}: not valid JSON: {error.msg} at column {error.colno}") from None
            except (ValueError, RecursionError) as error:
                raise DataError(f"{where}: JSON that cannot be read here: {error}") from None
            if not isinstance(row, dict):
                raise DataError(f"{where}: expected a JSON object, found {type(row).__name__}")
            yield where, row


def _parquet(path: Path) -> Any:
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.read_table(path).to_pylist()
    except pyarrow.ArrowException as error:
        raise DataError(f"{path}: not a readable Parquet file: {error}") from None


def _hugging_face(source: str, directory: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    import datasets

    name, _, split = source.removeprefix("hf:").partition("#")
    folder = directory / name
    datasets.disable_progress_bars()
    # From a folder, the library copies into a cache that all can read; a silo's data must not stay there.
    with tempfile.TemporaryDirectory(prefix="gramfuse-") as cache:
        try:
            if (folder / "state.json").exists() or (folder / "dataset_dict.json").exists():
                dataset = datasets.load_from_disk(str(folder))
                if isinstance(dataset, datasets.DatasetDict):
                    dataset = dataset[split or "train"]
            elif folder.is_dir():
                dataset = datasets.load_dataset(str(folder), split=split or "train", cache_dir=cache)
            else:
                dataset = datasets.load_dataset(name, split=split or "train")
        except Exception as error:  # noqa: BLE001  # the library raises its own and its dependencies' errors alike
            raise DataError(f"{source}: the datasets library cannot load it: {error}") from None
        names = {}
        for column, feature in dataset.features.items():
            if isinstance(feature, datasets.Image):
                dataset = dataset.cast_column(column, datasets.Image(decode=False))
            elif isinstance(feature, datasets.List | datasets.ClassLabel):
                names[column] = getattr(feature, "feature", feature)
        for where, row in _table(source, dataset):
            for column, feature in names.items():
                if isinstance(feature, datasets.ClassLabel):
                    row[column] = _named(row[column], feature)
            yield where, row


def _named(value: Any, feature: Any) -> Any:
    """Return the name of a label that a dataset numbers, or the names of several; what has none stays."""
    if isinstance(value, list):
        return [_named(one, feature) for one in value]
    return feature.int2str(value) if isinstance(value, int) and value >= 0 else value


def _table(source: str, rows: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, row in enumerate(rows, 1):
        yield f"{source}: row {number}", row


def _column(row: dict[str, Any], column: str, where: str) -> Any:
    if column not in row:
        raise DataError(
            f"{where}: column {column!r} is missing; columns here: {', '.join(map(repr, row))}. "
            "Name yours in [data] of the silo file (text, text-pair, image, label)"
        )
    return row[column]


def _text(row: dict[str, Any], column: str, where: str) -> str:
    value = _column(row, column, where)
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{where}: column {column!r} must hold text, found {value!r}")
    _check_characters(value, column, where)
    return value


def _check_characters(text: str, column: str, where: str) -> None:
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise DataError(f"{where}: column {column!r} holds half of a surrogate pair, which is no text: {text!r}")


def _words(row: dict[str, Any], column: str, where: str) -> tuple[str, ...]:
    value = _column(row, column, where)
    words = value.split() if isinstance(value, str) else value
    if not isinstance(words, list) or not words:
        raise DataError(
            f"{where}: column {column!r} must hold a list of words, or words between spaces, found {value!r}"
        )
    for position, word in enumerate(words, 1):
        if not isinstance(word, str) or not word.strip():
            raise DataError(f"{where}: column {column!r}: word {position} must be text, found {word!r}")
        _check_characters(word, column, where)
    return tuple(words)


def _image(value: Any, column: str, folder: Path, where: str) -> Path | bytes:
    """Return an image after a look at its first bytes; a dataset's column holds `bytes` or `path`, or both."""
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if not isinstance(value, str | bytes) or not value:
        raise DataError(f"{where}: column {column!r} must hold the path of an image, found {value!r}")
    image = folder / value if isinstance(value, str) else value
    if isinstance(image, Path) and not image.is_file():
        raise DataError(f"{where}: column {column!r}: no such file {image}")
    with open_image(image, f"{where}: column {column!r}"):
        return image


def open_image(image: Path | bytes, where: str) -> Any:
    """Open an image with Pillow.

    Raises:
        DataError: if Pillow is not installed, or cannot read it.
    """
    try:
        from PIL import Image
    except ImportError:
        raise DataError("reading images needs Pillow; run: pip install 'gramfuse[images]'") from None
    try:
        return Image.open(image if isinstance(image, Path) else BytesIO(image))
    except (OSError, ValueError) as error:
        raise DataError(f"{where}: not a readable image: {error}") from None


def _index(value: Any, task: Task, known: Mapping[str, int], where: str) -> int:
    index = known.get(str(value))
    if index is not None:
        return index
    if str(value) in task.labels:
        raise DataError(
            f"{where}: label {value!r} is not among those that the plan says this silo annotates "
            f"({_few(known)}); leave the example out, or agree on a plan that lists the label in this silo's 'labels'"
        )
    raise DataError(
        f"{where}: unknown label {value!r}; the plan's labels are {_few(known)}. "
        "All silos must use the plan's labels: rename it here, or agree on a plan that has it. Where a silo annotates "
        "only some of them, the plan lists those as 'labels' of its [[silo]]"
    )


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
        raise DataError(f"{where}: column {column!r} has a label twice: {value!r}")
    return tuple(sorted(indices))


def _tags(
    value: Any, column: str, task: Task, known: Mapping[str, int], words: tuple[str, ...], where: str
) -> tuple[int, ...]:
    """Return the index of each word's tag. An I-X with no B-X before it begins an entity, as metrics have it."""
    tags = value.split() if isinstance(value, str) else value
    if not isinstance(tags, list) or len(tags) != len(words):
        many = f"{len(tags)}" if isinstance(tags, list) else f"{value!r}"
        raise DataError(
            f"{where}: column {column!r} must hold one tag for each of the {len(words)} words, found {many}"
        )
    return tuple(_index(tag, task, known, where) for tag in tags)


def _target(value: Any, task: Task, where: str) -> float:
    try:
        target = float(value)
    except (TypeError, ValueError, OverflowError):
        target = math.nan
    if not math.isfinite(target):
        raise DataError(f"{where}: the target must be a finite number, found {value!r}")
    if task.range is not None and not task.range[0] <= target <= task.range[1]:
        raise DataError(
            f"{where}: the target {target:g} is outside of the plan's range of {task.range[0]:g} to {task.range[1]:g}; "
            "correct it, or agree on a plan with a wider 'model.range'"
        )
    return target
