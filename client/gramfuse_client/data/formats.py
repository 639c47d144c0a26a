"""A silo's rows as they come: from files in several formats, and from Hugging Face datasets.

| suffix, in any case | what is in it                                                                                |
|---------------------|----------------------------------------------------------------------------------------------|
| `.jsonl`, `.ndjson` | a JSON object on each line                                                                   |
| `.json`             | an array of JSON objects, or an object on each line                                          |
| `.csv`              | a header and rows; of `,`, `;`, tab and bar, the delimiter gives the header its columns      |
| `.tsv`              | the same between tabs; quotation marks as in CSV, or as part of the text (`delimited`)       |
| `.parquet`          | a table                                                                                      |

All but Parquet may be packed with gzip (`.csv.gz`). Text is UTF-8.
"""

from __future__ import annotations

import gzip
import json
import tempfile
import zlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from gramfuse_client.data.delimited import DELIMITERS, delimited
from gramfuse_protocol.errors import DataError
from gramfuse_protocol.text import listed, quoted

READABLE = ".jsonl, .ndjson, .json, .csv, .tsv (all with .gz too), .parquet, or hf:<hub id or folder>[:config][#split]"

HUB = "hf:"
"""How a source begins that is a Hugging Face dataset."""

FEATURES = b"huggingface"
"""Where in a Parquet file the datasets library writes what its columns are."""

Row = dict[str, Any]

Rows = Iterator[tuple[str, Row | DataError]]
"""(Where: the file and line; the row there, or what is wrong with it)."""


class Dataset(NamedTuple):
    """What a source names that begins with `hf:`; `config` and `split` are empty where it does not say."""

    name: str
    config: str
    split: str

    @staticmethod
    def parse(source: str, directory: Path) -> Dataset:
        """Parse `hf:<hub id or folder>[:config][#split]`; a folder may have a colon in its name."""
        whole, _, split = source.removeprefix(HUB).partition("#")
        name, _, config = (whole, "", "") if (directory / whole).is_dir() else whole.rpartition(":")
        return Dataset(name or whole, config if name else "", split)

    def folder(self, directory: Path) -> Path | None:
        """Return the folder that it is, if it is none of the hub's."""
        folder = directory / self.name
        return folder if folder.is_dir() else None


def rows(source: str, directory: Path, columns: Collection[str]) -> Rows:
    """Yield the rows of a source.

    Args:
        directory: where relative paths start.
        columns: names that are looked for, by which the delimiter of a .csv file is told.

    Raises:
        DataError: naming the file and the line, if the source cannot be read, or from there on.
    """
    if source.startswith(HUB):
        yield from _hugging_face(source, directory)
        return
    path = directory / source
    if not path.is_file():
        raise DataError(f"{path}: no such file; a source is {READABLE}")
    kind, packed = _format(path)
    if kind == ".parquet" and not packed:
        yield from _parquet(path)
        return
    if kind not in (".jsonl", ".ndjson", ".json", ".csv", ".tsv"):
        raise DataError(f"{path}: not a format that is read here; a source is {READABLE}")
    try:
        with (gzip.open if packed else open)(path, "rt", encoding="utf-8-sig", newline="") as lines:
            if kind in (".csv", ".tsv"):
                yield from delimited(path, lines.read(), "\t" if kind == ".tsv" else DELIMITERS, columns)
            elif kind == ".json":
                yield from _json(path, lines)
            else:
                yield from _json_lines(path, lines)
    except UnicodeDecodeError:
        raise DataError(f"{path}:{_line_not_utf8(path, packed=packed)}: is not UTF-8") from None
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read: {error}") from None


def _format(path: Path) -> tuple[str, bool]:
    """Return a file's suffix in small letters, and whether .gz stands behind it."""
    packed = path.suffix.lower() == ".gz"
    return Path(path.stem if packed else path.name).suffix.lower(), packed


def _line_not_utf8(path: Path, *, packed: bool) -> int:
    """Return the number of the first line that is not UTF-8; text is decoded in chunks, which know no lines."""
    with (gzip.open if packed else open)(path, "rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError:
                return number
    return number


def _json(path: Path, lines: TextIO) -> Rows:
    """Yield the objects of an array, or those on each line if the file is no array."""
    text = lines.read()
    if not text.lstrip().startswith("["):
        lines.seek(0)
        yield from _json_lines(path, lines)
        return
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{path}:{error.lineno}: not valid JSON: {error.msg} at column {error.colno}") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: JSON that cannot be read here: {error}") from None
    for where, row in _table(str(path), found):
        yield where, row if isinstance(row, dict) else _no_object(where, row)


def _json_lines(path: Path, lines: TextIO) -> Rows:
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
            yield where, DataError(f"{where}: JSON that cannot be read here: {error}")
        else:
            yield where, row if isinstance(row, dict) else _no_object(where, row)


def _check_lines(path: Path, lines: TextIO) -> None:
    """Raise one DataError, in place of one for each line, if no line is JSON by itself; lines start anew."""
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
        raise DataError(f"{path}:{begin}: one JSON value goes on to line {last}; {expected}")


def _is_json(line: str) -> bool:
    """Whether there is JSON in a line, and nothing else."""
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _no_object(where: str, row: Any) -> DataError:
    return DataError(f"{where}: expected a JSON object, found {type(row).__name__}")


def _parquet(path: Path) -> Rows:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path)
        found = table.to_pylist()
    except pyarrow.ArrowException as error:
        raise DataError(f"{path}: not a readable Parquet file: {error}") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error}") from None
    given: Rows = _table(str(path), found)
    if about := (table.schema.metadata or {}).get(FEATURES):
        import datasets

        try:
            features = datasets.Features.from_dict(json.loads(about).get("info", {}).get("features") or {})
        except (ValueError, TypeError, AttributeError, KeyError) as error:
            raise DataError(
                f"{path}: what the datasets library wrote into it of its columns cannot be read: {error}; write the "
                "file again"
            ) from None
        given = _with_names(given, features)
    yield from given


def _hugging_face(source: str, directory: Path) -> Rows:
    import datasets

    named = Dataset.parse(source, directory)
    folder = named.folder(directory)
    datasets.disable_progress_bars()
    # From a folder, the library copies into a cache that all can read; a silo's data must not stay there.
    with tempfile.TemporaryDirectory(prefix="gramfuse-") as cache:
        settings = {"path": named.name if folder is None else str(folder), "name": named.config or None}
        if folder is not None:
            settings["cache_dir"] = cache
        try:
            if folder is not None and any((folder / name).exists() for name in ("state.json", "dataset_dict.json")):
                dataset = _split(datasets.load_from_disk(str(folder)), named.split, source)
            else:
                dataset = datasets.load_dataset(**settings, split=named.split or "train")
        except DataError:
            raise
        except Exception as error:  # noqa: BLE001  # the library raises its own and its dependencies' errors alike
            first, *_ = str(error).splitlines() or [type(error).__name__]
            raise DataError(
                f"{source}: the datasets library cannot load it: {first}{_offered(named, settings)}"
            ) from None
        features = dataset.features
        for column, feature in features.items():
            if isinstance(feature, datasets.Image):
                dataset = dataset.cast_column(column, datasets.Image(decode=False))
        yield from _with_names(_table(source, dataset), features)


def _split(saved: Any, split: str, source: str) -> Any:
    """Return what `save_to_disk` wrote, or the split of it."""
    if not isinstance(saved, dict):
        if split and split != str(saved.split):
            raise DataError(f"{source}: holds one data set without splits; leave #{split} out")
        return saved
    if (split or "train") not in saved:
        raise DataError(f"{source}: has no split {quoted(split or 'train')}; its splits are {listed(saved, 20)}")
    return saved[split or "train"]


def _offered(named: Dataset, settings: dict[str, Any]) -> str:
    """Say which configurations or splits a dataset has, as far as it can be found out."""
    import datasets

    about = {key: value for key, value in settings.items() if key != "name"}
    try:
        configs = datasets.get_dataset_config_names(**about)
        if named.config not in configs and (named.config or len(configs) > 1):
            return f"; its configurations are {listed(configs, 20)}: name one as {HUB}{named.name}:CONFIG"
        splits = datasets.get_dataset_split_names(**about, config_name=named.config or None)
    except Exception:  # noqa: BLE001  # what is said without it is enough
        return ""
    return "" if (named.split or "train") in splits else f"; its splits are {listed(splits, 20)}"


def _with_names(found: Iterator[tuple[str, Any]], features: Mapping[str, Any]) -> Rows:
    """Yield rows with the names of labels that the datasets library numbers."""
    import datasets

    lists = datasets.List | datasets.LargeList
    inner = {name: feature.feature if isinstance(feature, lists) else feature for name, feature in features.items()}
    labels = {name: feature.names for name, feature in inner.items() if isinstance(feature, datasets.ClassLabel)}
    for where, row in found:
        try:
            yield where, row | {name: _named(row[name], labels[name]) for name in labels if name in row}
        except IndexError:
            yield where, DataError(f"{where}: a label's number is beyond the names that the data set has for them")


def _named(value: Any, names: Sequence[str]) -> Any:
    """Return the name of a label that a dataset numbers, or the names of several; what has none stays."""
    if isinstance(value, list):
        return [_named(one, names) for one in value]
    return names[value] if isinstance(value, int) and value >= 0 else value


def _table(source: str, found: Any) -> Iterator[tuple[str, Any]]:
    for number, row in enumerate(found, 1):
        yield f"{source}: row {number}", row
