"""A silo's examples: read, checked against the plan, split."""

from __future__ import annotations

import csv
import gzip
import hashlib
import json
import math
import random
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gramfuse_client.silo import Silo
from gramfuse_protocol.errors import DataError
from gramfuse_protocol.plan import Model

READABLE = ".jsonl, .jsonl.gz, .csv, .parquet, or hf:<hub id or folder>[#split]"


@dataclass(frozen=True)
class Examples:
    """Examples of one task.

    Args:
        texts: the first (or only) text of each example.
        pairs: the second text of each, or None.
        labels: label indices for classification, float targets for regression.
    """

    texts: Sequence[str]
    pairs: Sequence[str] | None
    labels: Sequence[int] | Sequence[float]

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, indices: Sequence[int]) -> Examples:
        """Return these examples in this order."""
        return Examples(
            [self.texts[i] for i in indices],
            None if self.pairs is None else [self.pairs[i] for i in indices],
            [self.labels[i] for i in indices],
        )

    @property
    def digest(self) -> str:
        """SHA-256 over all examples in order; tells whether a silo's data changed. It stays at the silo."""
        hasher = hashlib.sha256()
        for i, text in enumerate(self.texts):
            row = [text, None if self.pairs is None else self.pairs[i], self.labels[i]]
            hasher.update(json.dumps(row, ensure_ascii=False).encode() + b"\n")
        return hasher.hexdigest()


def load(silo: Silo, model: Model) -> tuple[Examples, Examples]:
    """Return a silo's training and held-out examples.

    Raises:
        DataError: naming the file, the line and what was expected.
    """
    data = silo.file.data
    if model.pair and data.text_pair is None:
        raise DataError(
            f"{silo.path}: the plan is about text pairs (model.pair); name the second column in data.text-pair"
        )
    train = _read(data.train, silo, model)
    if isinstance(data.held_out, str):
        return train, _read(data.held_out, silo, model)
    order = list(range(len(train)))
    random.Random(data.split_seed).shuffle(order)  # noqa: S311  # a split, not a secret
    aside = max(1, round(data.held_out * len(train)))
    if aside >= len(train):
        raise DataError(
            f"{silo.path}: data.held-out = {data.held_out} leaves nothing of {len(train)} examples to train on"
        )
    return train.take(sorted(order[aside:])), train.take(sorted(order[:aside]))


def _read(source: str, silo: Silo, model: Model) -> Examples:
    columns = silo.file.data
    texts: list[str] = []
    pairs: list[str] = []
    labels: list[Any] = []
    indices = {label: index for index, label in enumerate(model.labels)}
    for where, row in _rows(source, silo.directory):
        texts.append(_text(row, columns.text, where))
        if model.pair and columns.text_pair is not None:
            pairs.append(_text(row, columns.text_pair, where))
        value = _column(row, columns.label, where)
        labels.append(_label(value, indices, where) if indices else _target(value, where))
    if not texts:
        where = source if source.startswith("hf:") else str(silo.directory / source)
        raise DataError(f"{where}: holds no examples; expected at least one")
    return Examples(texts, pairs if model.pair else None, labels)


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
        names = {
            column: feature for column, feature in dataset.features.items() if isinstance(feature, datasets.ClassLabel)
        }
        for where, row in _table(source, dataset):
            for column, feature in names.items():
                if isinstance(row[column], int) and row[column] >= 0:
                    row[column] = feature.int2str(row[column])
            yield where, row


def _table(source: str, rows: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, row in enumerate(rows, 1):
        yield f"{source}: row {number}", row


def _column(row: dict[str, Any], column: str, where: str) -> Any:
    if column not in row:
        raise DataError(
            f"{where}: column {column!r} is missing; columns here: {', '.join(map(repr, row))}. "
            "Name yours in [data] of the silo file (text, text-pair, label)"
        )
    return row[column]


def _text(row: dict[str, Any], column: str, where: str) -> str:
    value = _column(row, column, where)
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{where}: column {column!r} must hold text, found {value!r}")
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise DataError(f"{where}: column {column!r} holds half of a surrogate pair, which is no text: {value!r}")
    return value


def _label(value: Any, indices: dict[str, int], where: str) -> int:
    index = indices.get(str(value))
    if index is None:
        known = ", ".join(list(indices)[:20]) + (", …" if len(indices) > 20 else "")
        raise DataError(
            f"{where}: unknown label {value!r}; the plan's labels are {known}. "
            "All silos must use the plan's labels: rename it here, or agree on a plan that has it"
        )
    return index


def _target(value: Any, where: str) -> float:
    try:
        target = float(value)
    except (TypeError, ValueError, OverflowError):
        target = math.nan
    if not math.isfinite(target):
        raise DataError(f"{where}: the target must be a finite number, found {value!r}")
    return target
