"""Sets of examples on disk: a folder for each, with train, validation and test as JSON lines."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

Row = dict[str, Any]
Rows = list[Row]


def read(folder: Path, split: str) -> Rows:
    """Read one split, `<split>.jsonl.gz` or `<split>.jsonl`; ends the program if there is none."""
    for path, opener in ((folder / f"{split}.jsonl.gz", gzip.open), (folder / f"{split}.jsonl", open)):
        if path.is_file():
            with opener(path, "rt", encoding="utf-8") as lines:
                return [json.loads(line) for line in lines]
    raise SystemExit(f"{folder}: has neither {split}.jsonl.gz nor {split}.jsonl")


def labels_of(rows: Rows, column: str = "label") -> list[str]:
    """Return the labels that occur, sorted; a column of lists gives those in the lists."""
    values = [row[column] for row in rows]
    return sorted({label for value in values for label in (value if isinstance(value, list) else [value])})
