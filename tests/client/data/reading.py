"""Tasks, rows and silos whose data are read."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from gramfuse_client.data.examples import Examples, load
from gramfuse_client.silo_file import Data, Limits, Silo, SiloFile
from gramfuse_protocol.contract.task import Task
from gramfuse_protocol.errors import DataError

LABELS = ("animals", "weather", "kitchen")
CLASSIFY = Task(task="classification", labels=LABELS)
PAIRS = Task(task="classification", labels=LABELS, pair=True)
REGRESS = Task(task="regression")
APPLY = Task(task="multi-label", labels=LABELS)
TAG = Task(task="token-classification", labels=("O", "B-PER", "I-PER"))
WRITE = Task(task="sequence-to-sequence")
SPEAK = Task(task="causal-lm")
LOOK = Task(task="image-classification", labels=("red", "blue"))


# The texts hold what formats get wrong: quotes, separators, newlines, tabs, signs beyond ASCII and Latin-1.
ROWS = [
    {"text": "a cat, a dog", "label": "animals"},
    {"text": 'said "rain" and left', "label": "weather"},
    {"text": "first line\nsecond line", "label": "kitchen"},
    {"text": "Müller\tΣ 猫 🐈", "label": "animals"},
    {"text": "  spaces stay  ", "label": "weather"},
]

EXAMPLES = Examples([row["text"] for row in ROWS], None, [LABELS.index(row["label"]) for row in ROWS])


def silo(directory: Path, train: str, held_out: str | float = 0.5, **data: Any) -> Silo:
    """Return a silo whose file lies in `directory`."""
    return Silo(
        directory / "silo.toml",
        SiloFile(name="silo-a", data=Data(train=train, held_out=held_out, **data), limits=Limits()),
    )


def read(directory: Path, source: str, task: Task = CLASSIFY, **data: Any) -> Examples:
    """Read one source as both the training and the held-out examples; they must be the same."""
    train, held_out = load(silo(directory, source, source, **data), task)
    assert held_out == train
    return train


def failure(directory: Path, source: str, task: Task = CLASSIFY, **data: Any) -> str:
    """Return the message of the DataError that reading a source must raise."""
    with pytest.raises(DataError) as caught:
        load(silo(directory, source, source, **data), task)
    assert caught.value.reason == DataError.summary, "what crosses to the coordinator quotes no data"
    return str(caught.value)


def as_jsonl(path: Path, rows: list[dict[str, Any]]) -> str:
    # A byte-for-byte JSON line, a blank line and CRLF are all the same to a reader.
    lines = [json.dumps(row, ensure_ascii=n % 2 == 0) for n, row in enumerate(rows)]
    (path / "rows.jsonl").write_text("\r\n\n".join(lines), encoding="utf-8", newline="")
    return "rows.jsonl"


def as_gzip(path: Path, rows: list[dict[str, Any]]) -> str:
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (path / "rows.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    return "rows.jsonl.gz"


def as_newline_delimited(path: Path, rows: list[dict[str, Any]]) -> str:
    (path / as_jsonl(path, rows)).rename(path / "rows.NDJSON")
    return "rows.NDJSON"


def as_json_array(path: Path, rows: list[dict[str, Any]]) -> str:
    (path / "rows.json").write_text("\ufeff\n" + json.dumps(rows, indent=1), encoding="utf-8")
    return "rows.json"


def as_json_of_lines(path: Path, rows: list[dict[str, Any]]) -> str:
    (path / as_jsonl(path, rows)).rename(path / "rows.json")
    return "rows.json"


def as_csv(
    path: Path, rows: list[dict[str, Any]], encoding: str = "utf-8", delimiter: str = ",", name: str = "rows.csv"
) -> str:
    with (path / name).open("w", encoding=encoding, newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys(), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)
    return name


def as_csv_from_a_spreadsheet(path: Path, rows: list[dict[str, Any]]) -> str:
    return as_csv(path, rows, encoding="utf-8-sig")


def as_csv_with_semicolons(path: Path, rows: list[dict[str, Any]]) -> str:
    # A column that nobody asks for has more commas in its name than there are semicolons.
    wide = [{**row, "remarks, if any, or none, or other": "a, b"} for row in rows]
    return as_csv(path, wide, encoding="utf-8-sig", delimiter=";", name="rows.CSV")


def as_csv_with_tabs(path: Path, rows: list[dict[str, Any]]) -> str:
    return as_csv(path, rows, delimiter="\t")


def as_tsv(path: Path, rows: list[dict[str, Any]]) -> str:
    return as_csv(path, rows, delimiter="\t", name="rows.Tsv")


def as_gzipped_csv(path: Path, rows: list[dict[str, Any]]) -> str:
    plain = path / as_csv(path, rows, delimiter=";")
    (path / "rows.csv.GZ").write_bytes(gzip.compress(plain.read_bytes()))
    plain.unlink()
    return "rows.csv.GZ"


def as_parquet(path: Path, rows: list[dict[str, Any]]) -> str:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path / "rows.parquet")
    return "rows.parquet"


def as_saved_dataset(path: Path, rows: list[dict[str, Any]]) -> str:
    # The names are in another order than the plan's: what counts is the label's name, not its number there.
    dataset = datasets.Dataset.from_list(rows).cast_column("label", datasets.ClassLabel(names=sorted(LABELS)))
    dataset.save_to_disk(str(path / "saved"))
    return "hf:saved"


def as_saved_split(path: Path, rows: list[dict[str, Any]]) -> str:
    decoy = datasets.Dataset.from_list([{"text": "decoy", "label": "kitchen"}])
    datasets.DatasetDict({"train": decoy, "mine": datasets.Dataset.from_list(rows)}).save_to_disk(str(path / "splits"))
    return "hf:splits#mine"


def as_folder_of_jsonl(path: Path, rows: list[dict[str, Any]]) -> str:
    (path / "folder").mkdir()
    (path / "folder" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return "hf:folder"


def as_folder_of_csv(path: Path, rows: list[dict[str, Any]]) -> str:
    (path / "folder").mkdir()
    as_csv(path, rows)
    (path / "rows.csv").rename(path / "folder" / "train.csv")
    return "hf:folder"
