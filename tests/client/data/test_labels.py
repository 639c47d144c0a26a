"""Labels, pairs and targets, as they are written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gramfuse_client.data.examples import Examples, load_measured
from gramfuse_protocol.contract.task import MaskedTask, Task
from gramfuse_protocol.errors import DataError
from tests.client.data.reading import (
    EXAMPLES,
    LABELS,
    PAIRS,
    REGRESS,
    ROWS,
    WRITE,
    as_csv,
    as_folder_of_csv,
    as_folder_of_jsonl,
    as_jsonl,
    as_parquet,
    failure,
    read,
    silo,
)


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
    assert all(part in message for part in (f"{tmp_path / 'rows.jsonl'}:3: a label ", f"found {value!r}"))


@pytest.mark.parametrize("lost", ["NA", "", "null", "None", "nan"])
def test_a_field_that_the_datasets_library_makes_nothing_of_is_refused_by_its_row(lost: str, tmp_path: Path) -> None:
    task = Task(task="classification", labels=("None", "NA", "nan", "null", "EU"))
    source = as_folder_of_csv(tmp_path, [{"text": "a cat", "label": "EU"}, {"text": "a dog", "label": lost}])
    message = failure(tmp_path, source, task)
    assert all(part in message for part in ("hf:folder: row 2: a label ", "found None"))
    if lost:  # named itself, the file gives what stands in it
        (tmp_path / "folder" / "train.csv").rename(tmp_path / "rows.csv")
        assert read(tmp_path, "rows.csv", task).labels == [4, task.labels.index(lost)]


def test_a_target_that_is_true_or_has_underscores_is_no_number(tmp_path: Path) -> None:
    for target in ("true", '"1_000"'):
        (tmp_path / "rows.jsonl").write_text(f'{{"text": "a cat", "label": {target}}}\n')
        assert "finite number" in failure(tmp_path, "rows.jsonl", REGRESS)


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


@pytest.mark.parametrize(("kind", "label"), [("multi-label", ["weather", "kitchen"]), ("classification", "kitchen")])
def test_a_label_that_is_not_the_silos_to_annotate_is_refused(kind: Any, label: Any, tmp_path: Path) -> None:
    task = MaskedTask(task=kind, labels=LABELS, annotates=("weather", "animals"))
    source = as_jsonl(tmp_path, [{"text": "x", "label": "weather"}, {"text": "x", "label": label}])
    message = failure(tmp_path, source, task)
    assert "label 'kitchen'" in message
    assert "'animals', 'weather'" in message
    assert "this silo's 'labels'" in message
