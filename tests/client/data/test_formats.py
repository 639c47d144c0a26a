"""Every format gives identical examples, under the silo's own names."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.client.data.reading import (
    EXAMPLES,
    ROWS,
    as_csv,
    as_csv_from_a_spreadsheet,
    as_csv_with_semicolons,
    as_csv_with_tabs,
    as_folder_of_csv,
    as_folder_of_jsonl,
    as_gzip,
    as_gzipped_csv,
    as_json_array,
    as_json_of_lines,
    as_jsonl,
    as_newline_delimited,
    as_parquet,
    as_saved_dataset,
    as_saved_split,
    as_tsv,
    read,
)


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
