"""Sets of examples: folders with train, validation and test as JSON lines, or data sets of the Hugging Face hub."""

from __future__ import annotations

import gzip
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Row = dict[str, Any]
Rows = list[Row]

HUB = "hf:"

SENTENCES = {"sentence1": "text", "sentence2": "text_pair"}
GLUE_COLUMNS = {
    "cola": {"sentence": "text"},
    "sst2": {"sentence": "text"},
    "mrpc": SENTENCES,
    "stsb": SENTENCES,
    "rte": SENTENCES,
    "mnli": {"premise": "text", "hypothesis": "text_pair"},
}
"""Our names of the columns of the hub's GLUE tasks."""


@dataclass(frozen=True)
class Source:
    """The source of sets.

    Args:
        place: a folder with a subfolder for each set, or `hf:OWNER` with data sets of the same names and columns; GLUE
            then comes from `nyu-mll/glue`.
    """

    place: str

    def read(self, name: str, split: str) -> Rows:
        """Read one split of a set; exits if it does not exist.

        In a folder, the file is `<split>.jsonl.gz` or `<split>.jsonl`.
        """
        if self.place.startswith(HUB):
            return _from_hub(self.place.removeprefix(HUB), name, split)
        folder = Path(self.place) / name
        for path, opener in ((folder / f"{split}.jsonl.gz", gzip.open), (folder / f"{split}.jsonl", open)):
            if path.is_file():
                with opener(path, "rt", encoding="utf-8") as lines:
                    return [json.loads(line) for line in lines]
        raise SystemExit(f"{folder}: has neither {split}.jsonl.gz nor {split}.jsonl")


def _from_hub(owner: str, name: str, split: str) -> Rows:
    from datasets import ClassLabel, load_dataset

    task = name.removeprefix("glue_")
    if name == task:
        return [dict(row) for row in load_dataset(f"{owner}/{name}", split=split)]
    # GLUE's test labels are not public: we test on its validation set, and validate on the end of its train set.
    part = {"train": "train[:90%]", "validation": "train[90%:]", "test": "validation"}[split]
    if task == "mnli" and split == "test":
        part = "validation_matched"
    dataset = load_dataset("nyu-mll/glue", task, split=part)
    label = dataset.features["label"]
    columns = GLUE_COLUMNS[task]
    rows = []
    for source in dataset:
        row = {ours: source[theirs] for theirs, ours in columns.items()}
        rows.append(
            {**row, "label": label.int2str(source["label"]) if isinstance(label, ClassLabel) else source["label"]}
        )
    return rows


def labels_of(rows: Rows, column: str = "label") -> list[str]:
    """Return the distinct labels, sorted; lists in the column are flattened."""
    values = [row[column] for row in rows]
    return sorted({label for value in values for label in (value if isinstance(value, list) else [value])})
