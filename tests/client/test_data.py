"""A silo's data: every format reads alike, and every error says which file and which line."""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from gramfuse_client.data.examples import Examples, left_out, load, load_measured
from gramfuse_client.silo_file import Data, Limits, Silo, SiloFile
from gramfuse_protocol.contract.task import MaskedTask, Task
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


@pytest.fixture(autouse=True)
def _datasets_stay_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets-cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


@pytest.mark.parametrize(
    "write",
    [
        as_jsonl,
        as_gzip,
        as_newline_delimited,
        as_json_array,
        as_json_of_lines,
        as_csv,
        as_csv_from_a_spreadsheet,
        as_csv_with_semicolons,
        as_csv_with_tabs,
        as_tsv,
        as_gzipped_csv,
        as_parquet,
        as_saved_dataset,
        as_saved_split,
        as_folder_of_jsonl,
        as_folder_of_csv,
    ],
)
def test_every_format_gives_identical_examples(
    write: Callable[[Path, list[dict[str, Any]]], str], tmp_path: Path
) -> None:
    source = write(tmp_path, ROWS)
    examples = read(tmp_path, source)
    assert examples == EXAMPLES
    assert examples.digest == EXAMPLES.digest


@pytest.mark.parametrize("write", [as_jsonl, as_csv, as_parquet])
def test_columns_are_taken_by_the_silos_own_names(
    write: Callable[[Path, list[dict[str, Any]]], str], tmp_path: Path
) -> None:
    # The columns that have the default names are decoys.
    rows = [{"text": "decoy", "body": row["text"], "label": "decoy", "topic": row["label"]} for row in ROWS]
    assert read(tmp_path, write(tmp_path, rows), text="body", label="topic") == EXAMPLES


@pytest.mark.parametrize("write", [as_jsonl, as_csv, as_parquet, as_folder_of_jsonl])
def test_text_pairs_keep_their_sides(write: Callable[[Path, list[dict[str, Any]]], str], tmp_path: Path) -> None:
    rows = [{"premise": row["text"], "claim": f"so {n}", "label": row["label"]} for n, row in enumerate(ROWS)]
    source = write(tmp_path, rows)
    examples = read(tmp_path, source, PAIRS, text="premise", text_pair="claim")
    assert examples == Examples(EXAMPLES.inputs, ["so 0", "so 1", "so 2", "so 3", "so 4"], EXAMPLES.labels)
    swapped = read(tmp_path, source, PAIRS, text="claim", text_pair="premise")
    assert swapped == Examples(examples.pairs, examples.inputs, examples.labels)
    assert swapped.digest != examples.digest


def test_a_plan_about_pairs_without_a_second_column_names_the_key(tmp_path: Path) -> None:
    message = failure(tmp_path, as_jsonl(tmp_path, ROWS), PAIRS)
    assert str(tmp_path / "silo.toml") in message
    assert "data.text-pair" in message


@pytest.mark.parametrize("write", [as_jsonl, as_csv, as_parquet])
def test_regression_targets_are_numbers_however_they_are_written(
    write: Callable[[Path, list[dict[str, Any]]], str], tmp_path: Path
) -> None:
    targets = [-1.5, 0.0, 1e-3, 12.0, 7.25]
    rows = [{"text": row["text"], "label": target} for row, target in zip(ROWS, targets, strict=True)]
    assert read(tmp_path, write(tmp_path, rows), REGRESS).labels == targets


@pytest.mark.parametrize("write", [as_jsonl, as_csv, as_parquet, as_folder_of_csv])
@pytest.mark.parametrize("labels", [[1, 0, 2], [1.0, 0.0, 2.0]])
def test_whole_numbers_are_the_labels_that_they_are_written_as(
    write: Callable[[Path, list[dict[str, Any]]], str], labels: list[Any], tmp_path: Path
) -> None:
    task = Task(task="classification", labels=("0", "1", "2"))
    rows = [{"text": f"text {n}", "label": label} for n, label in enumerate(labels)]
    assert read(tmp_path, write(tmp_path, rows), task).labels == [1, 0, 2]


def test_a_label_that_looks_like_a_whole_number_is_taken_by_its_name_first(tmp_path: Path) -> None:
    source = as_csv(tmp_path, [{"text": "x", "label": "1.0"}, {"text": "y", "label": "1"}])
    assert read(tmp_path, source, Task(task="classification", labels=("1", "1.0"))).labels == [1, 0]
    split = MaskedTask(task="classification", labels=("1", "1.0", "2"), annotates=("1", "2"))
    assert "label '1.0' is not among those" in failure(tmp_path, source, split)


NO_LABELS = ("None", "nan", "NaN", "True", "False", "1.5", "inf", "['x']", "", "NA", "true", "<NA>")
"""What str() makes of values that are no labels, and what they are called elsewhere: a plan may have all of these."""


@pytest.mark.parametrize("value", [None, float("nan"), float("inf"), True, False, 1.5, ["x"], {"x": 1}, ""], ids=repr)
@pytest.mark.parametrize("kind", ["classification", "multi-label", "token-classification"])
def test_what_is_no_label_is_never_made_one(kind: Any, value: Any, tmp_path: Path) -> None:
    names = [name for name in NO_LABELS if name]
    labels = ["O", *(f"{mark}-X" for mark in "BI")] if kind == "token-classification" else names
    good, bad = labels[0], value
    if kind != "classification":
        good, bad = [good], [value]
    rows = [{"text": "word", "label": good}, {"text": "word", "label": bad}]
    message = failure(tmp_path, as_jsonl(tmp_path, rows), Task(task=kind, labels=tuple(labels)))
    # Two lines further on: the writer leaves a blank line between two rows.
    assert f"{tmp_path / 'rows.jsonl'}:3: a label must be text or a whole number, found {value!r}" in message


@pytest.mark.parametrize("lost", ["NA", "", "null", "None", "nan"])
def test_a_field_that_the_datasets_library_makes_nothing_of_is_refused_by_its_row(lost: str, tmp_path: Path) -> None:
    task = Task(task="classification", labels=("None", "NA", "nan", "null", "EU"))
    source = as_folder_of_csv(tmp_path, [{"text": "a cat", "label": "EU"}, {"text": "a dog", "label": lost}])
    message = failure(tmp_path, source, task)
    assert "hf:folder: row 2: a label must be text or a whole number, found None" in message
    if lost:  # named itself, the file gives what stands in it
        (tmp_path / "folder" / "train.csv").rename(tmp_path / "rows.csv")
        assert read(tmp_path, "rows.csv", task).labels == [4, task.labels.index(lost)]


def test_a_target_that_is_true_or_has_underscores_is_no_number(tmp_path: Path) -> None:
    for target in ("true", '"1_000"'):
        (tmp_path / "rows.jsonl").write_text(f'{{"text": "a cat", "label": {target}}}\n')
        assert "must be a finite number" in failure(tmp_path, "rows.jsonl", REGRESS)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    count=st.integers(2, 60),
    fraction=st.floats(0.01, 0.99),
    seed=st.integers(0, 2**32 - 1),
)
def test_a_split_by_seed_is_disjoint_complete_and_deterministic(
    count: int, fraction: float, seed: int, tmp_path: Path
) -> None:
    texts = [f"text {n}" for n in range(count)]
    source = as_gzip(tmp_path, [{"text": text, "label": LABELS[n % 3]} for n, text in enumerate(texts)])
    if max(1, round(fraction * count)) >= count:
        with pytest.raises(DataError, match=r"silo\.toml: data\.held-out"):
            load(silo(tmp_path, source, fraction, split_seed=seed), CLASSIFY)
        return
    train, held_out = load(silo(tmp_path, source, fraction, split_seed=seed), CLASSIFY)
    assert sorted([*train.inputs, *held_out.inputs]) == sorted(texts)
    assert abs(len(held_out) - fraction * count) <= 1
    assert len(held_out) >= 1
    for examples in (train, held_out):
        assert examples.labels == [int(text.split()[1]) % 3 for text in examples.inputs]
    assert load(silo(tmp_path, source, fraction, split_seed=seed), CLASSIFY) == (train, held_out)


def test_another_split_seed_sets_other_examples_aside(tmp_path: Path) -> None:
    source = as_gzip(tmp_path, [{"text": f"text {n}", "label": LABELS[n % 3]} for n in range(50)])
    aside = {tuple(load(silo(tmp_path, source, 0.4, split_seed=seed), CLASSIFY)[1].inputs) for seed in range(4)}
    assert len(aside) == 4


def test_the_digest_tells_every_kind_of_change() -> None:
    variants = [
        EXAMPLES,
        Examples([*EXAMPLES.inputs[:-1], "other"], None, EXAMPLES.labels),
        Examples(EXAMPLES.inputs, None, [*EXAMPLES.labels[:-1], 0]),
        Examples(EXAMPLES.inputs, EXAMPLES.inputs, EXAMPLES.labels),
        EXAMPLES.take([1, 0, 2, 3, 4]),
        EXAMPLES.take([0, 1, 2, 3]),
    ]
    assert len({variant.digest for variant in variants}) == len(variants)


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
        ["goes on to line 4; expected an object on each line"],
    ),
    "lines of JSON that are spread over lines": (
        "rows.jsonl",
        b'\n{"text": "a cat",\r\n "label": "animals"}\n',
        ":2",
        ["goes on to line 3; expected an object on each line"],
    ),
    "JSON that is spread over lines and broken": (
        "rows.json",
        b'{\n "text": "a cat"\n "label": "animals"\n}\n',
        ":3",
        ["JSON", "column 2; expected an object on each line"],
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
    assert "3 of 3 rows cannot be used" in message
    assert "unknown label 'pets'" in message
    assert "allows" not in message


def test_a_field_may_be_longer_than_131072_characters(tmp_path: Path) -> None:
    limit = csv.field_size_limit()
    rows = [{"text": "word " * 40_000, "label": "animals"}, {"text": "a cat", "label": "weather"}]
    found = read(tmp_path, as_csv(tmp_path, rows))
    assert found == Examples([row["text"] for row in rows], None, [0, 1])
    assert csv.field_size_limit() == limit, "which is one for the whole process, and not ours"


# Each: what stands in the file, and the texts that whoever wrote it meant; None if that cannot be known.
MARKED_FILES: dict[str, tuple[str, list[str] | None]] = {
    "a sentence begins with a mark and another ends with one": (
        '"Wait, he said\tanimals\nfine\tweather\nhe left"\tweather\nok\tkitchen\n',
        ['"Wait, he said', "fine", 'he left"', "ok"],
    ),
    "a quotation begins a sentence": (
        'he said "no" to me\tanimals\n"yes" he said\tweather\n',
        ['he said "no" to me', '"yes" he said'],
    ),
    "one sentence is a quotation, others have some": (
        '"Yes."\tanimals\nhe said "no"\tweather\n',
        ['"Yes."', 'he said "no"'],
    ),
    "marks inside only": ('he said "no"\tanimals\n', ['he said "no"']),
    "marks as in CSV, doubled": (
        '"said ""rain"" and left"\tanimals\n"Yes."\tweather\n',
        ['said "rain" and left', "Yes."],
    ),
    "marks as in CSV around a tab": ('"a\tb"\tanimals\n"Yes."\tweather\n', ["a\tb", "Yes."]),
    "marks as in CSV around the end of a line": ('"a\nb"\tanimals\nc\tweather\n', ["a\nb", "c"]),
    "one sentence is a quotation": ('"Yes."\tanimals\nno\tweather\n', None),
    "all sentences are": ('"Yes."\tanimals\n"No."\tweather\n', None),
    "some of both": ('"said ""rain"""\tanimals\nhe said "no"\tweather\n', None),
    "marks after a backslash": ('"said \\"rain\\" ok"\tanimals\n', None),
    "a row that is too short beside a mark that begins one": ('"yes" he said\tanimals\nshort\n', None),
}


@pytest.mark.parametrize("name", ["rows.tsv", "rows.csv"])
@pytest.mark.parametrize("case", MARKED_FILES)
def test_quotation_marks_between_tabs_never_swallow_rows_or_become_part_of_texts(
    case: str, name: str, tmp_path: Path
) -> None:
    content, meant = MARKED_FILES[case]
    (tmp_path / name).write_text("text\tlabel\n" + content)
    if meant is not None:
        assert read(tmp_path, name).inputs == meant
        return
    message = failure(tmp_path, name)
    assert f"{tmp_path / name}:2: " in message
    assert "csv.QUOTE_ALL" in message
    if content.startswith('"Yes."'):
        (tmp_path / name).write_text('"text"\t"label"\n' + content)
        assert read(tmp_path, name).inputs[0] == "Yes.", "the header says that marks are those of CSV"


@pytest.mark.parametrize("delimiter", [",", ";", "|"])
def test_rows_of_csv_that_may_have_been_swallowed_are_told(delimiter: str, tmp_path: Path) -> None:
    lines = ["text;label", "he left;animals", '"Wait;animals', 'fine";weather']
    (tmp_path / "rows.csv").write_text("\n".join(lines).replace(";", delimiter))
    if delimiter == "|":
        assert read(tmp_path, "rows.csv").inputs == ["he left", '"Wait', 'fine"']
        return
    assert f"{tmp_path / 'rows.csv'}:3: quotation marks" in failure(tmp_path, "rows.csv")
    letter = ["text;label", '"Dear all;', 'it rains";weather']
    (tmp_path / "rows.csv").write_text("\n".join(letter).replace(";", delimiter))
    assert read(tmp_path, "rows.csv").inputs == [f"Dear all{delimiter}\nit rains"]
    sure = [*lines, '"said ""rain""; and left";weather']
    (tmp_path / "rows.csv").write_text("\n".join(sure).replace(";", delimiter))
    assert len(read(tmp_path, "rows.csv")) == 3


SIGNS = st.text(st.sampled_from('ab" \t\n,'), min_size=1, max_size=6).filter(lambda text: text.strip() != "")


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts=st.lists(SIGNS, min_size=1, max_size=5), as_csv=st.booleans())
def test_a_table_between_tabs_is_read_as_it_was_written_or_refused(
    texts: list[str], as_csv: bool, tmp_path: Path
) -> None:
    if as_csv:
        texts = [text.replace("\n", " ") if "\t" in text else text for text in texts]
        with (tmp_path / "rows.tsv").open("w", newline="") as file:
            csv.writer(file, delimiter="\t").writerows([("text", "label"), *((text, "animals") for text in texts)])
    else:
        texts = [text.replace("\t", " ").replace("\n", " ").replace('""', '"-"') for text in texts]
        (tmp_path / "rows.tsv").write_text("text\tlabel\n" + "".join(f"{text}\tanimals\n" for text in texts))
    with suppress(DataError):
        assert read(tmp_path, "rows.tsv").inputs == texts


@pytest.mark.parametrize("first", ["", "sep=|\n", "SEP=|\r\n", "\ufeffsep=|\n"])
def test_bars_and_a_spreadsheets_own_line_tell_the_delimiter(first: str, tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text(f"{first}text|label\na cat; a dog, a|animals\na dog|pets\n", newline="")
    message = failure(tmp_path, "rows.csv")
    assert f"{tmp_path / 'rows.csv'}:{4 if first else 3}: unknown label 'pets'" in message
    assert read(tmp_path, "rows.csv", skip_bad=1).inputs == ["a cat; a dog, a"]


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


@pytest.mark.parametrize("kind", ["classification", "multi-label"])
def test_a_parquet_file_of_the_datasets_library_gives_the_labels_that_it_gives_itself(
    kind: Any, tmp_path: Path
) -> None:
    names = datasets.ClassLabel(names=["1", "0"])  # by number, each would be the other
    several = kind == "multi-label"
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.List(names) if several else names}
    )
    labels = [[0], [1], [0, 1], []] if several else [0, 1, 1, 0]
    rows = [{"text": f"text {n}", "label": label} for n, label in enumerate(labels)]
    dataset = datasets.Dataset.from_list(rows, features=features)
    dataset.save_to_disk(str(tmp_path / "saved"))
    (tmp_path / "folder").mkdir()
    dataset.to_parquet(str(tmp_path / "folder" / "train.parquet"))
    task = Task(task=kind, labels=("0", "1"))
    found = [read(tmp_path, source, task).labels for source in ("folder/train.parquet", "hf:folder", "hf:saved")]
    assert found == [[(1,), (0,), (0, 1), ()] if several else [1, 0, 0, 1]] * 3


@pytest.mark.parametrize(
    ("about", "expected"),
    [
        ({"info": {"features": {"label": {"names": ["animals"], "_type": "ClassLabel"}}}}, "row 2: a label's number"),
        ({"info": {"features": {"label": {"_type": "Nothing"}}}}, "cannot be read: "),
        ([], "cannot be read: "),
    ],
)
def test_what_a_parquet_file_says_of_its_labels_is_never_passed_over(about: Any, expected: str, tmp_path: Path) -> None:
    table = pyarrow.table({"text": ["a cat", "a dog"], "label": pyarrow.array([0, 1], pyarrow.int8())})
    table = table.replace_schema_metadata({"huggingface": json.dumps(about)})
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    message = failure(tmp_path, "rows.parquet")
    assert message.startswith(f"{tmp_path / 'rows.parquet'}: ")
    assert expected in message


def test_an_unlabelled_row_of_a_class_label_column_is_refused(tmp_path: Path) -> None:
    # Hugging Face datasets write -1 where a test set hides its labels.
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=list(LABELS))})
    datasets.Dataset.from_list([{"text": "a cat", "label": -1}], features=features).save_to_disk(
        str(tmp_path / "saved")
    )
    assert "hf:saved: row 1: unknown label -1" in failure(tmp_path, "hf:saved")


@pytest.mark.parametrize("source", ["hf:saved#validation", "hf:saved-flat#test", "hf:./nowhere", "hf:folder"])
def test_a_dataset_that_cannot_be_loaded_is_named(source: str, tmp_path: Path) -> None:
    datasets.Dataset.from_list(ROWS).save_to_disk(str(tmp_path / "saved-flat"))
    datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)}).save_to_disk(str(tmp_path / "saved"))
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "train.jsonl").write_text("{broken\n")
    assert failure(tmp_path, source).startswith(f"{source}: ")


def folder_with_configurations(path: Path) -> None:
    for file, animal in (("a/train.csv", "cat"), ("a/test.csv", "dog"), ("b/train.csv", "hen")):
        (path / "folder" / file).parent.mkdir(parents=True, exist_ok=True)
        (path / "folder" / file).write_text(f"text,label\na {animal},animals\n")
    (path / "folder" / "README.md").write_text(
        "---\nconfigs:\n- config_name: early\n  data_files:\n  - split: train\n    path: a/train.csv\n  - split: test\n"
        "    path: a/test.csv\n- config_name: late\n  data_files: b/train.csv\n---\n"
    )


def test_a_dataset_with_several_configurations_is_read_by_name(tmp_path: Path) -> None:
    folder_with_configurations(tmp_path)
    for source, animal in (("folder:early", "cat"), ("folder:early#test", "dog"), ("folder:late#train", "hen")):
        assert read(tmp_path, f"hf:{source}").inputs == [f"a {animal}"]
    (tmp_path / "folder").rename(tmp_path / "with:colon")
    assert read(tmp_path, "hf:with:colon:late").inputs == ["a hen"]


@pytest.mark.parametrize(
    ("source", "offered"),
    [
        ("hf:folder", ["'early', 'late'", "hf:folder:CONFIG"]),
        ("hf:folder:wrong#train", ["'early', 'late'"]),
        ("hf:folder:early#validation", ["'train', 'test'"]),
        ("hf:saved#validation", ["'train', 'mine'"]),
    ],
)
def test_a_missing_configuration_or_split_is_told_with_those_that_there_are(
    source: str, offered: list[str], tmp_path: Path
) -> None:
    folder_with_configurations(tmp_path)
    parts = {name: datasets.Dataset.from_list(ROWS) for name in ("train", "mine")}
    datasets.DatasetDict(parts).save_to_disk(str(tmp_path / "saved"))
    message = failure(tmp_path, source)
    assert message.startswith(f"{source}: ")
    for words in offered:
        assert words in message


MODEL_LABELS = Task(task="classification", labels=("LABEL_0", "LABEL_1", "LABEL_2"))


def measured(directory: Path, labels: list[Any], task: Task = MODEL_LABELS, names: tuple[str, ...] = ()) -> Examples:
    """Return what `gramfuse measure` takes of rows with these labels."""
    texts = [f"text {n}" for n in range(len(labels))]
    rows = [
        {"text": text, **({} if label is ... else {"label": label})} for text, label in zip(texts, labels, strict=True)
    ]
    found = load_measured(silo(directory, as_jsonl(directory, rows)), task, names)
    assert found.inputs == texts
    return found


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        ([0, 1, 2], ()),
        ([2.0, "1", "LABEL_0"], ()),
        ([..., None, 1], ()),
        (["good", "bad", 2], ("bad", "so-so", "good")),
        ([5, 3, 4], ("3", "4", "5")),
    ],
)
def test_a_models_labels_are_its_names_or_numbers_and_need_not_be_there(
    labels: list[Any], names: tuple[str, ...], tmp_path: Path
) -> None:
    assert measured(tmp_path, labels, names=names).labels == [None] * 3, "statistics need none"


@pytest.mark.parametrize(
    ("label", "names"),
    [(3, ()), (-1, ()), ("good", ()), (True, ()), ("LABEL_0", ("bad", "so-so", "good")), (0, ("3", "4", "5"))],
)
def test_a_label_that_is_none_of_the_models_is_refused(label: Any, names: tuple[str, ...], tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"rows\.jsonl:1: .*label"):
        measured(tmp_path, [label], names=names)


def test_a_target_text_is_needed_to_measure_a_model(tmp_path: Path) -> None:
    assert measured(tmp_path, ["a", "b"], WRITE).labels == ["a", "b"]
    with pytest.raises(DataError, match=r"rows\.jsonl:1: column 'label' is missing"):
        measured(tmp_path, [...], WRITE)


def test_the_held_out_source_is_checked_like_the_training_source(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text(GOOD)
    (tmp_path / "held-out.jsonl").write_text(GOOD + '{"text": "a dog", "label": "pets"}\n')
    with pytest.raises(DataError) as caught:
        load(silo(tmp_path, "train.jsonl", "held-out.jsonl"), CLASSIFY)
    assert f"{tmp_path / 'held-out.jsonl'}:2: unknown label 'pets'" in str(caught.value)


def test_several_labels_apply_or_one_or_none(tmp_path: Path) -> None:
    labels = [["kitchen", "animals"], "weather", []]
    rows = [{"text": f"text {n}", "label": label} for n, label in enumerate(labels)]
    assert read(tmp_path, as_jsonl(tmp_path, rows), APPLY).labels == [(0, 2), (1,), ()]


def test_several_labels_or_none_stand_in_a_field_of_csv_as_in_json(tmp_path: Path) -> None:
    fields = ['["kitchen", "animals"]', "weather", "[]", ' [ "weather" ] ', "[]"]
    source = as_csv(tmp_path, [{"text": f"text {n}", "label": field} for n, field in enumerate(fields)])
    assert read(tmp_path, source, APPLY).labels == [(0, 2), (1,), (), (1,), ()]
    numbers = Task(task="multi-label", labels=("0", "1", "2"))
    source = as_csv(tmp_path, [{"text": "x", "label": "[2, 0.0]"}, {"text": "y", "label": "1"}])
    assert read(tmp_path, source, numbers).labels == [(0, 2), (1,)]


@pytest.mark.parametrize(
    ("field", "said"),
    [
        ("kitchen,animals", '["a", "b"], or [] if none applies'),
        ("kitchen|animals", '["a", "b"], or [] if none applies'),
        ("['kitchen', 'animals']", '["a", "b"], or [] if none applies'),
        ('["kitchen", "pets"]', "unknown label 'pets'"),
        ('["kitchen", null]', "found None"),
        ('["kitchen", "kitchen"]', "twice"),
        ("[]]", '["a", "b"], or [] if none applies'),
        ("", "write [] if none"),
    ],
)
def test_a_field_that_is_no_list_of_labels_is_refused_with_how_to_write_one(
    field: str, said: str, tmp_path: Path
) -> None:
    source = as_csv(tmp_path, [{"text": "x", "label": field}])
    message = failure(tmp_path, source, APPLY)
    assert f"{tmp_path / source}:2: " in message
    assert said in message


def test_a_label_that_looks_like_a_list_of_labels_is_not_guessed(tmp_path: Path) -> None:
    task = Task(task="multi-label", labels=("[]", "a, b", "a"))
    rows = [{"text": "x", "label": "a, b"}, {"text": "x", "label": '["[]", "a"]'}]
    assert read(tmp_path, as_csv(tmp_path, rows), task).labels == [(1,), (0, 2)]
    message = failure(tmp_path, as_csv(tmp_path, [{"text": "x", "label": "[]"}]), task)
    assert 'which is a label and a list of labels; write ["[]"]' in message


@pytest.mark.parametrize("printed", ["['EU', 'left']", "['EU' 'left']", "[\"EU\", 'left']"])
def test_words_as_python_prints_them_are_not_taken_for_words(printed: str, tmp_path: Path) -> None:
    source = as_csv(tmp_path, [{"text": printed, "label": "O O"}])
    assert "write it as in JSON" in failure(tmp_path, source, TAG)
    with pytest.raises(DataError, match="as in JSON"):
        load_measured(silo(tmp_path, source), TAG)
    source = as_csv(tmp_path, [{"text": '["EU", "left"]', "label": '["B-PER", "O"]'}])
    assert read(tmp_path, source, TAG) == Examples([("EU", "left")], None, [(1, 0)])


@pytest.mark.parametrize("write", [as_jsonl, as_parquet])
def test_words_and_tags_are_lists_or_stand_between_spaces(
    write: Callable[[Path, list[dict[str, Any]]], str], tmp_path: Path
) -> None:
    words, tags = [["Anna", "Maria", "left"], ["no", "one"]], [["B-PER", "I-PER", "O"], ["O", "O"]]
    listed = [{"text": w, "label": t} for w, t in zip(words, tags, strict=True)]
    spaced = [{"text": "  ".join(w), "label": " ".join(t)} for w, t in zip(words, tags, strict=True)]
    expected = Examples([("Anna", "Maria", "left"), ("no", "one")], None, [(1, 2, 0), (0, 0)])
    for rows in (listed, spaced):
        found = read(tmp_path, write(tmp_path, rows), TAG)
        assert found == expected
        assert found.digest == expected.digest


def test_tags_that_a_dataset_numbers_are_taken_by_name(tmp_path: Path) -> None:
    names = datasets.ClassLabel(names=["B-PER", "I-PER", "O"])
    features = datasets.Features({"tokens": datasets.List(datasets.Value("string")), "ner_tags": datasets.List(names)})
    rows = [{"tokens": ["Anna", "left"], "ner_tags": [0, 2]}]
    datasets.Dataset.from_list(rows, features=features).save_to_disk(str(tmp_path / "saved"))
    found = read(tmp_path, "hf:saved", TAG, text="tokens", label="ner_tags")
    assert found == Examples([("Anna", "left")], None, [(1, 0)])


def test_a_target_is_a_text_and_a_language_model_has_none(tmp_path: Path) -> None:
    source = as_jsonl(tmp_path, [{"text": "a cat", "label": "eine Katze"}])
    assert read(tmp_path, source, WRITE) == Examples(["a cat"], None, ["eine Katze"])
    assert read(tmp_path, as_jsonl(tmp_path, [{"text": "a cat"}]), SPEAK) == Examples(["a cat"], None, [None])


def test_images_lie_beside_their_file_or_in_it(tmp_path: Path) -> None:
    (tmp_path / "data" / "images").mkdir(parents=True)
    path = tmp_path / "data" / "images" / "1.png"
    Image.new("RGB", (4, 4), (250, 0, 0)).save(path)
    rows = [{"picture": "images/1.png", "label": "red"}]
    found = read(tmp_path, f"data/{as_jsonl(tmp_path / 'data', rows)}", LOOK, image="picture")
    assert found == Examples([path], None, [0])
    inside = [{"image": {"bytes": path.read_bytes(), "path": None}, "label": "red"}]
    for write in (as_parquet, as_saved_images):
        kept = read(tmp_path, write(tmp_path, inside), LOOK)
        assert kept == Examples([path.read_bytes()], None, [0])
        assert kept.digest == found.digest, "an image is what is in its file"
    before = found.digest
    Image.new("RGB", (4, 4), (0, 0, 250)).save(path)
    assert found.digest != before


def as_saved_images(path: Path, rows: list[dict[str, Any]]) -> str:
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("string")})
    datasets.Dataset.from_list(rows, features=features).save_to_disk(str(path / "pictures"))
    return "hf:pictures"


BAD_ROWS: dict[str, tuple[Task, dict[str, Any], list[str]]] = {
    "an unknown label among several": (
        APPLY,
        {"text": "x", "label": ["animals", "pets"]},
        ["'pets'", "'animals', 'weather'"],
    ),
    "a label twice": (APPLY, {"text": "x", "label": ["animals", "animals"]}, ["twice"]),
    "no list of labels": (APPLY, {"text": "x", "label": None}, ["'label'", "[]"]),
    "an empty string of labels": (APPLY, {"text": "x", "label": ""}, ["'label'", "[]"]),
    "fewer tags than words": (TAG, {"text": ["Anna", "left"], "label": ["B-PER"]}, ["2 words", "found 1"]),
    "more tags than words": (TAG, {"text": "Anna left", "label": "B-PER O O"}, ["2 words", "found 3"]),
    "no tags": (TAG, {"text": ["Anna"], "label": None}, ["1 words", "None"]),
    "an image of fractions": (LOOK, {"image": "fractions.tif", "label": "red"}, ["'image'", "white", "8 or 16 bits"]),
    "an unknown tag": (TAG, {"text": ["Paris"], "label": ["B-LOC"]}, ["'B-LOC'", "B-PER"]),
    "no words": (TAG, {"text": [], "label": []}, ["'text'", "words"]),
    "words that are no list": (TAG, {"text": 7, "label": ["O"]}, ["'text'", "7"]),
    "a word that is none": (TAG, {"text": ["Anna", None], "label": ["O", "O"]}, ["word 2", "None"]),
    "a word of nothing": (TAG, {"text": ["Anna", " "], "label": ["O", "O"]}, ["word 2"]),
    "half of a surrogate pair in a word": (TAG, {"text": ["\ud83d"], "label": ["O"]}, ["surrogate"]),
    "an empty target": (WRITE, {"text": "x", "label": " "}, ["'label'", "text"]),
    "a target that is a number": (WRITE, {"text": "x", "label": 7}, ["'label'", "7"]),
    "a text that is none": (SPEAK, {"text": None}, ["'text'"]),
    "an image that is not there": (LOOK, {"image": "nowhere.png", "label": "red"}, ["'image'", "no such file"]),
    "an image of a long path": (
        LOOK,
        {"image": "a" * 5000, "label": "red"},
        ["'image'", "no such file", "characters more"],
    ),
    "an image that is none": (LOOK, {"image": "rows.jsonl", "label": "red"}, ["'image'", "not a readable image"]),
    "no image": (LOOK, {"picture": "1.png", "label": "red"}, ["'image'", "'picture'", "[data]"]),
    "an image that is a number": (LOOK, {"image": 7, "label": "red"}, ["'image'", "path", "7"]),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_a_row_that_does_not_fit_its_task_is_named(case: str, tmp_path: Path) -> None:
    task, row, quoted = BAD_ROWS[case]
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    Image.new("F", (2, 2)).save(tmp_path / "fractions.tif")
    message = failure(tmp_path, "rows.jsonl", task)
    assert f"{tmp_path / 'rows.jsonl'}:1: " in message
    for words in quoted:
        assert words in message


@pytest.mark.parametrize(("kind", "label"), [("multi-label", ["weather", "kitchen"]), ("classification", "kitchen")])
def test_a_label_that_is_not_the_silos_to_annotate_is_refused(kind: Any, label: Any, tmp_path: Path) -> None:
    task = MaskedTask(task=kind, labels=LABELS, annotates=("weather", "animals"))
    source = as_jsonl(tmp_path, [{"text": "x", "label": "weather"}, {"text": "x", "label": label}])
    message = failure(tmp_path, source, task)
    assert "label 'kitchen' is not among those" in message
    assert "'animals', 'weather'" in message
    assert "this silo's 'labels'" in message
