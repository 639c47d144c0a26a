"""Reads a silo's rows from files in several formats, and from Hugging Face datasets.

| suffix, in any case | content                                                                                      |
|---------------------|----------------------------------------------------------------------------------------------|
| `.jsonl`, `.ndjson` | a JSON object on each line                                                                   |
| `.json`             | an array of JSON objects, or an object on each line                                          |
| `.csv`              | a header and rows; the delimiter is the one of `,`, `;`, tab and bar that fits the header    |
| `.tsv`              | the same, between tabs; quotation marks as in CSV, or as part of the text (`delimited`)      |
| `.parquet`          | a table                                                                                      |

All except Parquet can be compressed with gzip (`.csv.gz`). Text is UTF-8.
"""

from __future__ import annotations

import gzip
import json
import tempfile
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from gramfuse_client.data.delimited import DELIMITERS, delimited
from gramfuse_protocol.errors import DataError
from gramfuse_protocol.text import listed, quoted

HUB = "hf:"
"""Prefix of a source that is a Hugging Face dataset."""

FEATURES = b"huggingface"
"""Metadata key of a Parquet file under which the datasets library stores its features."""

Row = dict[str, Any]

Rows = Iterator[tuple[str, Row | DataError]]
"""(file and line, the row or its error)."""


class Dataset(NamedTuple):
    """A source that begins with `hf:`; `config` and `split` are empty if it does not name them."""

    name: str
    config: str
    split: str

    @staticmethod
    def parse(source: str, directory: Path) -> Dataset:
        """Parse `hf:<hub id or folder>[:config][#split]`; a folder's name can contain a colon."""
        whole, _, split = source.removeprefix(HUB).partition("#")
        name, _, config = (whole, "", "") if (directory / whole).is_dir() else whole.rpartition(":")
        return Dataset(name or whole, config if name else "", split)

    def folder(self, directory: Path) -> Path | None:
        """Return its local folder, or None if it is on the hub."""
        folder = directory / self.name
        return folder if folder.is_dir() else None


def rows(source: str, directory: Path, columns: Collection[str]) -> Rows:
    """Yield the rows of a source.

    Args:
        directory: relative paths start here.
        columns: names of wanted columns, which decide the delimiter of a .csv file.

    Raises:
        DataError: naming the file and the line, if the source cannot be read, or cannot be read further.
    """
    if source.startswith(HUB):
        yield from _hugging_face(source, directory)
        return
    path = directory / source
    if not path.is_file():
        raise DataError(f"{path}: no such file; a source is {READABLE}")
    kind, packed = _format(path)
    if kind in TABLES and not packed:
        yield from TABLES[kind](path)
        return
    if kind not in TEXTS:
        raise DataError(f"{path}: unsupported format; a source is {READABLE}")
    try:
        with (gzip.open if packed else open)(path, "rt", encoding="utf-8-sig", newline="") as lines:
            yield from TEXTS[kind](path, lines, columns)
    except UnicodeDecodeError:
        raise DataError(f"{path}:{_line_not_utf8(path, packed=packed)}: is not UTF-8") from None
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read: {error}") from None


def _format(path: Path) -> tuple[str, bool]:
    """Return a file's suffix in lower case, without .gz, and whether it had .gz."""
    packed = path.suffix.lower() == ".gz"
    return Path(path.stem if packed else path.name).suffix.lower(), packed


def _csv(path: Path, lines: TextIO, columns: Collection[str]) -> Rows:
    """Yield the rows of a table with a delimiter that fits its header."""
    yield from delimited(path, lines.read(), DELIMITERS, columns)


def _tsv(path: Path, lines: TextIO, columns: Collection[str]) -> Rows:
    """Yield the rows of a table between tabs."""
    yield from delimited(path, lines.read(), "\t", columns)


def _line_not_utf8(path: Path, *, packed: bool) -> int:
    """Return the number of the first line that is not UTF-8; a UnicodeDecodeError knows only its chunk."""
    with (gzip.open if packed else open)(path, "rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError:
                return number
    return number


def _json(path: Path, lines: TextIO, columns: Collection[str]) -> Rows:
    """Yield the objects of a JSON array; if the file is not an array, the object on each line."""
    text = lines.read()
    if not text.lstrip().startswith("["):
        lines.seek(0)
        yield from _json_lines(path, lines, columns)
        return
    try:
        items = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{path}:{error.lineno}: not valid JSON: {error.msg} at column {error.colno}") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: cannot read this JSON: {error}") from None
    for where, row in _table(str(path), items):
        yield where, row if isinstance(row, dict) else _not_an_object(where, row)


def _json_lines(path: Path, lines: TextIO, columns: Collection[str]) -> Rows:
    _check_lines(path, lines)
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            yield where, DataError(f"{where}: not valid JSON: {error.msg} at column {error.colno}")
        except (ValueError, RecursionError) as error:
            yield where, DataError(f"{where}: cannot read this JSON: {error}")
        else:
            yield where, row if isinstance(row, dict) else _not_an_object(where, row)


def _check_lines(path: Path, lines: TextIO) -> None:
    """Raise one DataError, instead of one per line, if no line is JSON by itself; then rewind `lines`."""
    first = next(filter(str.strip, lines), "")
    lines.seek(0)
    if not first or _is_json(first):
        return
    text = lines.read()
    lines.seek(0)
    start = text.index(first)
    begin = text.count("\n", 0, start) + 1
    expected = "expected an object on each line, or in a .json file an array of objects: [{…}, {…}]"
    try:
        end = json.JSONDecoder().raw_decode(text, start + len(first) - len(first.lstrip()))[1]
    except json.JSONDecodeError as error:
        several = list(filter(str.strip, text.splitlines()))
        if len(several) > 1 and not any(map(_is_json, several)):
            raise DataError(
                f"{path}:{error.lineno}: not valid JSON: {error.msg} at column {error.colno}; {expected}"
            ) from None
    except (ValueError, RecursionError):
        return
    else:
        last = text.count("\n", 0, end) + 1
        raise DataError(f"{path}:{begin}: one JSON value extends to line {last}; {expected}")


def _is_json(line: str) -> bool:
    """Return whether a line is exactly one JSON value."""
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _not_an_object(where: str, row: Any) -> DataError:
    return DataError(f"{where}: expected a JSON object, found {type(row).__name__}")


def _parquet(path: Path) -> Rows:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path)
        records = table.to_pylist()
    except pyarrow.ArrowException as error:
        raise DataError(f"{path}: not a readable Parquet file: {error}") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error}") from None
    rows: Rows = _table(str(path), records)
    if metadata := (table.schema.metadata or {}).get(FEATURES):
        import datasets

        try:
            features = datasets.Features.from_dict(json.loads(metadata).get("info", {}).get("features") or {})
        except (ValueError, TypeError, AttributeError, KeyError) as error:
            raise DataError(
                f"{path}: cannot read the features that the datasets library stored in it: {error}; write the file "
                "again"
            ) from None
        rows = _with_names(rows, features)
    yield from rows


def _hugging_face(source: str, directory: Path) -> Rows:
    import datasets

    parsed = Dataset.parse(source, directory)
    folder = parsed.folder(directory)
    datasets.disable_progress_bars()
    # The library copies a folder's data into a cache that all users can read; a silo's data must not stay there.
    with tempfile.TemporaryDirectory(prefix="gramfuse-") as cache:
        settings = {"path": parsed.name if folder is None else str(folder), "name": parsed.config or None}
        if folder is not None:
            settings["cache_dir"] = cache
        try:
            if folder is not None and any((folder / name).exists() for name in ("state.json", "dataset_dict.json")):
                dataset = _split(datasets.load_from_disk(str(folder)), parsed.split, source)
            else:
                dataset = datasets.load_dataset(**settings, split=parsed.split or "train")
        except DataError:
            raise
        except Exception as error:  # noqa: BLE001  # the library raises its own and its dependencies' errors
            first, *_ = str(error).splitlines() or [type(error).__name__]
            raise DataError(
                f"{source}: the datasets library cannot load it: {first}{_choices(parsed, settings)}"
            ) from None
        features = dataset.features
        for column, feature in features.items():
            if isinstance(feature, datasets.Image):
                dataset = dataset.cast_column(column, datasets.Image(decode=False))
        yield from _with_names(_table(source, dataset), features)


def _split(saved: Any, split: str, source: str) -> Any:
    """Return the named split of a dataset from `load_from_disk`, or the dataset if it has no splits."""
    if not isinstance(saved, dict):
        if split and split != str(saved.split):
            raise DataError(f"{source}: the dataset has no splits; leave #{split} out")
        return saved
    if (split or "train") not in saved:
        raise DataError(f"{source}: has no split {quoted(split or 'train')}; its splits are {listed(saved, 20)}")
    return saved[split or "train"]


def _choices(dataset: Dataset, settings: dict[str, Any]) -> str:
    """List a dataset's configurations or splits, if it lacks the wanted one; empty if they are unknown."""
    import datasets

    arguments = {key: value for key, value in settings.items() if key != "name"}
    try:
        configs = datasets.get_dataset_config_names(**arguments)
        if dataset.config not in configs and (dataset.config or len(configs) > 1):
            return f"; its configurations are {listed(configs, 20)}: name one as {HUB}{dataset.name}:CONFIG"
        splits = datasets.get_dataset_split_names(**arguments, config_name=dataset.config or None)
    except Exception:  # noqa: BLE001  # this is only a hint, added to another error
        return ""
    return "" if (dataset.split or "train") in splits else f"; its splits are {listed(splits, 20)}"


def _with_names(rows: Iterator[tuple[str, Any]], features: Mapping[str, Any]) -> Rows:
    """Yield rows, with label numbers of the datasets library replaced by names."""
    import datasets

    lists = datasets.List | datasets.LargeList
    inner = {name: feature.feature if isinstance(feature, lists) else feature for name, feature in features.items()}
    labels = {name: feature.names for name, feature in inner.items() if isinstance(feature, datasets.ClassLabel)}
    for where, row in rows:
        try:
            yield where, row | {name: _label_name(row[name], labels[name]) for name in labels if name in row}
        except IndexError:
            yield where, DataError(f"{where}: a label number is beyond the label names of the dataset")


def _label_name(value: Any, names: Sequence[str]) -> Any:
    """Replace a label number, or each number in a list, by its name; return any other value unchanged."""
    if isinstance(value, list):
        return [_label_name(item, names) for item in value]
    return names[value] if isinstance(value, int) and value >= 0 else value


def _table(source: str, rows: Any) -> Iterator[tuple[str, Any]]:
    for number, row in enumerate(rows, 1):
        yield f"{source}: row {number}", row


TEXTS: Mapping[str, Callable[[Path, TextIO, Collection[str]], Rows]] = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json,
    ".csv": _csv,
    ".tsv": _tsv,
}
"""Readers of text files, by suffix. To add a format, add its reader here; help and errors name it."""

TABLES: Mapping[str, Callable[[Path], Rows]] = {".parquet": _parquet}
"""Readers of files that are not text and cannot be compressed, by suffix."""

READABLE = f"{', '.join(TEXTS)} (all with .gz too), {', '.join(TABLES)}, or {HUB}<hub id or folder>[:config][#split]"
"""All sources, for help and errors."""
