"""A silo's data: every format reads alike, and every error says which file and which line."""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from gramfuse_client.data import Examples, load
from gramfuse_client.silo import Data, Limits, Silo, SiloFile
from gramfuse_protocol.errors import DataError
from gramfuse_protocol.task import MaskedTask, Task

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


def as_csv(path: Path, rows: list[dict[str, Any]], encoding: str = "utf-8") -> str:
    with (path / "rows.csv").open("w", encoding=encoding, newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    return "rows.csv"


def as_csv_from_a_spreadsheet(path: Path, rows: list[dict[str, Any]]) -> str:
    return as_csv(path, rows, encoding="utf-8-sig")


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
        as_csv,
        as_csv_from_a_spreadsheet,
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


def test_integer_labels_match_the_plans_names(tmp_path: Path) -> None:
    task = Task(task="classification", labels=("0", "1"))
    rows = [{"text": "a cat", "label": 1}, {"text": "rain", "label": 0}]
    assert read(tmp_path, as_jsonl(tmp_path, rows), task).labels == [1, 0]


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


def test_an_unlabelled_row_of_a_class_label_column_is_refused(tmp_path: Path) -> None:
    # Hugging Face datasets write -1 where a test set hides its labels.
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=list(LABELS))})
    datasets.Dataset.from_list([{"text": "a cat", "label": -1}], features=features).save_to_disk(
        str(tmp_path / "saved")
    )
    assert "hf:saved: row 1: unknown label -1" in failure(tmp_path, "hf:saved")


@pytest.mark.parametrize("source", ["hf:saved#validation", "hf:./nowhere", "hf:folder"])
def test_a_dataset_that_cannot_be_loaded_is_named(source: str, tmp_path: Path) -> None:
    datasets.Dataset.from_list(ROWS).save_to_disk(str(tmp_path / "saved-flat"))
    datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)}).save_to_disk(str(tmp_path / "saved"))
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "train.jsonl").write_text("{broken\n")
    assert failure(tmp_path, source).startswith(f"{source}: ")


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
    "an image that is none": (LOOK, {"image": "rows.jsonl", "label": "red"}, ["'image'", "not a readable image"]),
    "no image": (LOOK, {"picture": "1.png", "label": "red"}, ["'image'", "'picture'", "[data]"]),
    "an image that is a number": (LOOK, {"image": 7, "label": "red"}, ["'image'", "path", "7"]),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_a_row_that_does_not_fit_its_task_is_named(case: str, tmp_path: Path) -> None:
    task, row, quoted = BAD_ROWS[case]
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
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
