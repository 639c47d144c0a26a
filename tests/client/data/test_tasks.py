"""Rows of tasks other than one label for a text."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
from PIL import Image

from gramfuse_client.data.examples import Examples, load_measured
from gramfuse_protocol.contract.task import Task
from gramfuse_protocol.errors import DataError
from tests.client.data.reading import APPLY, LOOK, SPEAK, TAG, WRITE, as_csv, as_jsonl, as_parquet, failure, read, silo


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
        ("", "write [] if no"),
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
    assert 'write ["[]"]' in message


@pytest.mark.parametrize("printed", ["['EU', 'left']", "['EU' 'left']", "[\"EU\", 'left']"])
def test_words_as_python_prints_them_are_not_taken_for_words(printed: str, tmp_path: Path) -> None:
    source = as_csv(tmp_path, [{"text": printed, "label": "O O"}])
    assert "write a JSON list" in failure(tmp_path, source, TAG)
    with pytest.raises(DataError, match="JSON list"):
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
    "an image of a long path": (
        LOOK,
        {"image": "a" * 5000, "label": "red"},
        ["'image'", "no such file", "more characters"],
    ),
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
