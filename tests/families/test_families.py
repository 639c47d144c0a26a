"""The table of architectures in docs/tasks.md: its rows are the script's, and what it says is so."""

from __future__ import annotations

from pathlib import Path

import pytest

from architectures import ARCHITECTURES
from families import line

DOCUMENT = (Path(__file__).parents[2] / "docs" / "tasks.md").read_text(encoding="utf-8")
TABLE = DOCUMENT.partition("<!-- table families -->")[2].partition("<!-- end -->")[0]
ROWS = [row for row in TABLE.splitlines() if row.startswith("| ") and "| `" in row]
SAMPLE = (
    *("bert", "deberta", "deberta-v3", "longformer", "xlnet", "funnel", "led", "bart-classifier", "falcon", "mixtral"),
    *("qwen2", "swin, padded inside", "resnet", "fnet", "reformer"),
)


def test_the_table_has_a_row_for_each_architecture_that_the_script_tries() -> None:
    assert sorted(row.split(" | ")[0].removeprefix("| ") for row in ROWS) == sorted(ARCHITECTURES)
    merged = [row.split("|")[4:9] for row in ROWS if row.count("|") > 4]
    assert len(merged) >= 45
    for _, sizes, other, itself, loaded in merged:
        assert {sizes, itself, loaded} == {" same "}
        assert other.strip() in ("same", "refused", "")


@pytest.mark.parametrize("name", SAMPLE)
def test_an_architecture_does_what_the_table_says(name: str) -> None:
    assert line(name)[0] in ROWS
