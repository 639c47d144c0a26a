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
"""What the columns of the hub's GLUE tasks are called here."""


@dataclass(frozen=True)
class Source:
    """Where sets come from.

    Args:
        place: a folder with a folder for each set, or `hf:OWNER`, whose data sets have the folders' names and columns;
            GLUE is taken from `nyu-mll/glue` then.
    """

    place: str

    def read(self, name: str, split: str) -> Rows:
        """Read one split of a set; ends the program if there is none.

        From a folder, `<split>.jsonl.gz` or `<split>.jsonl` in it.
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
    # GLUE's own test labels are not public: its validation set is the test, and the end of its train set validates.
    part = {"train": "train[:90%]", "validation": "train[90%:]", "test": "validation"}[split]
    if task == "mnli" and split == "test":
        part = "validation_matched"
    found = load_dataset("nyu-mll/glue", task, split=part)
    label = found.features["label"]
    columns = GLUE_COLUMNS[task]
    rows = []
    for given in found:
        row = {ours: given[theirs] for theirs, ours in columns.items()}
        rows.append(
            {**row, "label": label.int2str(given["label"]) if isinstance(label, ClassLabel) else given["label"]}
        )
    return rows


def labels_of(rows: Rows, column: str = "label") -> list[str]:
    """Return the labels that occur, sorted; a column of lists gives those in the lists."""
    values = [row[column] for row in rows]
    return sorted({label for value in values for label in (value if isinstance(value, list) else [value])})
