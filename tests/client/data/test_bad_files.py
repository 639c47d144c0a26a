"""Errors that say which file and which line."""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest

from gramfuse_client.data.examples import Examples, left_out, load
from gramfuse_protocol.errors import DataError
from tests.client.data.reading import (
    CLASSIFY,
    EXAMPLES,
    LABELS,
    REGRESS,
    ROWS,
    as_csv,
    as_folder_of_jsonl,
    as_jsonl,
    as_parquet,
    failure,
    read,
    silo,
)

GOOD = '{"text": "a cat", "label": "animals"}\n'
HEADER = "text,label\n"


# Each: file name, its bytes, where the message must point to after the path, and what it must quote.
BAD_FILES: dict[str, tuple[str, bytes, str, list[str]]] = {
    "a missing column in JSONL": (
        "rows.jsonl",
        (GOOD + '{"txt": "a cat", "label": "animals"}\n').encode(),
        ":2",
        ["'text'", "'txt'", "[data]"],
    ),
    "a missing column in CSV": ("rows.csv", b"text,topic\na cat,animals\n", ":2", ["'label'", "'topic'"]),
    "an unknown label in JSONL": (
        "rows.jsonl",
        (GOOD + "\n" + '{"text": "a cat", "label": "pets"}\n').encode(),
        ":3",
        ["'pets'", *LABELS],
    ),
    "an unknown label in CSV": ("rows.csv", (HEADER + "a cat,animals\na dog,pets\n").encode(), ":3", ["'pets'"]),
    "a label that is null": ("rows.jsonl", b'{"text": "a cat", "label": null}\n', ":1", ["label"]),
    "an empty JSONL file": ("rows.jsonl", b"", "", ["no examples"]),
    "a JSONL file of blank lines": ("rows.jsonl", b"\n\n  \n", "", ["no examples"]),
    "an empty CSV file": ("rows.csv", b"", "", ["no examples"]),
    "a CSV file with nothing but a header": ("rows.csv", HEADER.encode(), "", ["no examples"]),
    "an empty gzip": ("rows.jsonl.gz", gzip.compress(b""), "", ["no examples"]),
    "a malformed JSON line": ("rows.jsonl", (GOOD + '{"text": "a cat", "label"\n').encode(), ":2", ["JSON", "column"]),
    "a malformed JSON line in a gzip": ("rows.jsonl.gz", gzip.compress((GOOD + "{\n").encode()), ":2", ["JSON"]),
    "JSON that is not an object": ("rows.jsonl", (GOOD + '["a cat", "animals"]\n').encode(), ":2", ["object", "list"]),
    "JSON nested beyond reason": ("rows.jsonl", (GOOD + "[" * 100_000 + "\n").encode(), ":2", ["JSON"]),
    "half of a surrogate pair": (
        "rows.jsonl",
        (GOOD + '{"text": "cut \\ud83d", "label": "animals"}\n').encode(),
        ":2",
        ["'text'"],
    ),
    "a CSV row with too few fields": ("rows.csv", (HEADER + "a cat,animals\na dog\n").encode(), ":3", ["fields", "2"]),
    "a CSV row with too many fields": (
        "rows.csv",
        (HEADER + "a cat, a dog,animals\n").encode(),
        ":2",
        ["fields", "2"],
    ),
    "a CSV quote that is never closed": ("rows.csv", (HEADER + '"a cat,animals\n').encode(), ":2", ["CSV"]),
    "text after a CSV quote": ("rows.csv", (HEADER + 'a cat,animals\n"a" dog,animals\n').encode(), ":3", ["CSV"]),
    "JSONL that is not UTF-8": (
        "rows.jsonl",
        (GOOD * 3).encode() + '{"text": "Müller", "label": "animals"}\n'.encode("latin-1"),
        ":4",
        ["UTF-8"],
    ),
    "CSV that is not UTF-8": (
        "rows.csv",
        (HEADER + "a cat,animals\nMüller,animals\n").encode("latin-1"),
        ":3",
        ["UTF-8"],
    ),
    "gzip in name only": ("rows.jsonl.gz", GOOD.encode(), "", ["gzip"]),
    "a gzip cut short": ("rows.jsonl.gz", gzip.compress(GOOD.encode() * 50)[:-12], "", ["cannot be read"]),
    "a gzip with a damaged middle": (
        "rows.jsonl.gz",
        gzip.compress(GOOD.encode())[:10] + b"\xff" * 30,
        "",
        ["cannot be read"],
    ),
    "Parquet in name only": ("rows.parquet", GOOD.encode(), "", ["Parquet"]),
    "an empty file called Parquet": ("rows.parquet", b"", "", ["Parquet"]),
    "an empty text": ("rows.jsonl", (GOOD + '{"text": " ", "label": "animals"}\n').encode(), ":2", ["'text'"]),
    "an empty text in CSV": ("rows.csv", (HEADER + ",animals\n").encode(), ":2", ["'text'"]),
    "a JSON array that is broken": ("rows.json", b'[{"text": "a cat"},\n{"text" "a dog"}]', ":2", ["JSON", "column"]),
    "a JSON array of something else": ("rows.json", b'[["a cat", "animals"]]', ": row 1", ["object", "list"]),
    "JSON that is spread over lines": (
        "rows.json",
        b'{\n "text": "a cat",\n "label": "animals"\n}\n{\n "text": "a dog",\n "label": "animals"\n}\n',
        ":1",
        ["extends to line 4"],
    ),
    "lines of JSON that are spread over lines": (
        "rows.jsonl",
        b'\n{"text": "a cat",\r\n "label": "animals"}\n',
        ":2",
        ["extends to line 3"],
    ),
    "JSON that is spread over lines and broken": (
        "rows.json",
        b'{\n "text": "a cat"\n "label": "animals"\n}\n',
        ":3",
        ["JSON", "column 2"],
    ),
    "a column twice": ("rows.csv", b"text,label,label\na cat,animals,weather\n", ":1", ["'label'", "two columns"]),
    "a TSV file with commas": ("rows.tsv", b"text,label\na cat,animals\n", ":2", ["'text,label'"]),
    "gzipped CSV that is not UTF-8": (
        "rows.csv.gz",
        gzip.compress((HEADER + "a cat,animals\nMüller,animals\n").encode("latin-1")),
        ":3",
        ["UTF-8"],
    ),
    "a text that is a number": ("rows.jsonl", b'{"text": 7, "label": "animals"}\n', ":1", ["'text'", "7"]),
    "an unknown suffix": ("rows.xlsx", GOOD.encode(), "", [".jsonl", ".csv", ".parquet", "hf:"]),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_bad_file_is_named_with_its_line_and_what_was_expected(case: str, tmp_path: Path) -> None:
    name, content, line, quoted = BAD_FILES[case]
    (tmp_path / name).write_bytes(content)
    message = failure(tmp_path, name)
    assert f"{tmp_path / name}{line}: " in message
    for words in quoted:
        assert words in message
    assert "rows cannot be used" not in message


def test_all_bad_rows_are_counted_and_the_first_are_shown(tmp_path: Path) -> None:
    rows = [{"text": f"text {n}", "label": "pets" if n % 2 else "animals"} for n in range(20)]
    rows[8] = {"text": "", "label": "animals"}
    lines = [json.dumps(row) for row in rows]
    lines[2] = "{broken"
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    message = failure(tmp_path, "rows.jsonl")
    assert f"{tmp_path / 'rows.jsonl'}: 12 of 20 rows cannot be used" in message
    assert [int(line.split(":")[1]) for line in message.splitlines()[1:6]] == [2, 3, 4, 6, 8]
    assert "and 7 more" in message
    assert "skip-bad = 12" in message


def test_as_many_bad_rows_are_left_out_as_the_silo_allows(tmp_path: Path) -> None:
    rows = [*ROWS, {"text": "a cat", "label": "pets"}, {"text": None, "label": "animals"}]
    source = as_jsonl(tmp_path, rows)
    (tmp_path / source).write_text((tmp_path / source).read_text() + "\n{broken\n")
    assert "skip-bad = 3" in failure(tmp_path, source, skip_bad=2)
    examples = read(tmp_path, source, skip_bad=3)
    assert examples == EXAMPLES
    assert examples.digest == EXAMPLES.digest
    assert len(examples.left_out) == 3
    for part, quoted in zip(examples.left_out, ("'pets'", "'text'", "JSON"), strict=True):
        assert quoted in part
    train, held_out = load(silo(tmp_path, source, 0.4, skip_bad=5), CLASSIFY)
    assert left_out(train, held_out) == examples.left_out, "rows of one source are told once"


def test_of_a_file_of_bad_rows_only_it_is_said_what_is_wrong_with_them(tmp_path: Path) -> None:
    source = as_jsonl(tmp_path, [{"text": "a cat", "label": "pets"}] * 3)
    message = failure(tmp_path, source, skip_bad=9)
    assert "3 of 3" in message
    assert "'pets'" in message
    assert "allows" not in message


def test_a_field_may_be_longer_than_131072_characters(tmp_path: Path) -> None:
    limit = csv.field_size_limit()
    rows = [{"text": "word " * 40_000, "label": "animals"}, {"text": "a cat", "label": "weather"}]
    found = read(tmp_path, as_csv(tmp_path, rows))
    assert found == Examples([row["text"] for row in rows], None, [0, 1])
    assert csv.field_size_limit() == limit, "which is one for the whole process, and not ours"


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.csv", "rows.parquet"])
def test_a_missing_file_is_named(name: str, tmp_path: Path) -> None:
    message = failure(tmp_path, f"elsewhere/{name}")
    assert str(tmp_path / "elsewhere" / name) in message
    assert "no such file" in message


@pytest.mark.parametrize(
    "target",
    ['"many"', "null", '"inf"', '"-Infinity"', "NaN", "1e400", '""', "[1]", "1" + "0" * 400, "1" + "0" * 5000],
    ids=["word", "null", "inf", "minus infinity", "NaN", "1e400", "empty", "list", "10^400", "10^5000"],
)
def test_a_target_that_is_not_a_finite_number_names_file_and_line(target: str, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(f'{{"text": "a cat", "label": 1}}\n{{"text": "a dog", "label": {target}}}\n')
    message = failure(tmp_path, "rows.jsonl", REGRESS)
    assert f"{tmp_path / 'rows.jsonl'}:2: " in message


@pytest.mark.parametrize(
    ("rows", "row", "quoted"),
    [
        ([*ROWS, {"text": "a cat", "label": "pets"}], "row 6", "'pets'"),
        ([{"text": "a cat", "label": "animals"}, {"text": "", "label": "animals"}], "row 2", "'text'"),
        ([{"text": "a cat", "label": "animals"}, {"text": None, "label": "animals"}], "row 2", "'text'"),
        ([{"words": "a cat", "label": "animals"}], "row 1", "'words'"),
    ],
    ids=["unknown label", "empty text", "null text", "missing column"],
)
@pytest.mark.parametrize("write", [as_parquet, as_folder_of_jsonl])
def test_a_bad_row_of_a_table_is_named_with_its_row(
    write: Callable[[Path, list[dict[str, Any]]], str],
    rows: list[dict[str, Any]],
    row: str,
    quoted: str,
    tmp_path: Path,
) -> None:
    source = write(tmp_path, rows)
    message = failure(tmp_path, source)
    where = str(tmp_path / source) if write is as_parquet else source
    assert f"{where}: {row}: " in message
    assert quoted in message


def test_a_class_label_that_the_plan_lacks_is_named_not_numbered(tmp_path: Path) -> None:
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["animals", "pets"])}
    )
    rows = [{"text": "a cat", "label": 0}, {"text": "a dog", "label": 1}]
    datasets.Dataset.from_list(rows, features=features).save_to_disk(str(tmp_path / "saved"))
    message = failure(tmp_path, "hf:saved")
    assert "hf:saved: row 2: unknown label 'pets'" in message


def test_the_held_out_source_is_checked_like_the_training_source(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text(GOOD)
    (tmp_path / "held-out.jsonl").write_text(GOOD + '{"text": "a dog", "label": "pets"}\n')
    with pytest.raises(DataError) as caught:
        load(silo(tmp_path, "train.jsonl", "held-out.jsonl"), CLASSIFY)
    assert f"{tmp_path / 'held-out.jsonl'}:2: unknown label 'pets'" in str(caught.value)
