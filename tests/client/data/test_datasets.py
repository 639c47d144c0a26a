"""What the datasets library saved: its own labels, configurations and splits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from gramfuse_protocol.contract.task import Task
from tests.client.data.reading import LABELS, ROWS, failure, read


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
        ({"info": {"features": {"label": {"names": ["animals"], "_type": "ClassLabel"}}}}, "row 2: a label number"),
        ({"info": {"features": {"label": {"_type": "Nothing"}}}}, "cannot read the features"),
        ([], "cannot read the features"),
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
