"""The examples that something is chosen by: none of them is trained on or reported on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gramfuse_client.data.examples import Examples, load, load_validation
from gramfuse_client.silo_file import Silo
from gramfuse_protocol.contract.task import Task
from gramfuse_protocol.errors import DataError, PlanError

TASK = Task(task="classification", labels=("even", "odd"))


def write(path: Path, numbers: Any) -> None:
    rows = [{"text": f"text {n}", "label": TASK.labels[n % 2]} for n in numbers]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def silo(place: Path, *lines: str) -> Silo:
    path = place / "north.toml"
    path.write_text("\n".join(['name = "north"', "[data]", 'train = "train.jsonl"', *lines]) + "\n")
    return Silo.read(path)


def texts(examples: Examples) -> list[Any]:
    return list(examples.inputs)


@pytest.mark.parametrize(
    "held_out", ['held-out = "held-out.jsonl"', "held-out = 0.5"], ids=["a file", "a fraction of train"]
)
@pytest.mark.parametrize("seed", [0, 1])
def test_a_fraction_of_the_held_out_examples_is_set_aside(tmp_path: Path, held_out: str, seed: int) -> None:
    write(tmp_path / "train.jsonl", range(60))
    write(tmp_path / "held-out.jsonl", range(100, 130))
    before, everything = load(silo(tmp_path, held_out, f"split-seed = {seed}"), TASK)
    with_validation = silo(tmp_path, held_out, f"split-seed = {seed}", "validation = 0.2")
    train, reported = load(with_validation, TASK)
    validation = load_validation(with_validation, TASK)
    assert train == before
    assert sorted([*texts(reported), *texts(validation)]) == sorted(texts(everything))
    assert len(validation) == 6
    assert load_validation(with_validation, TASK) == validation


def test_without_a_word_it_is_half_and_that_half_is_still_reported_by_whoever_does_not_tune(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", range(10))
    write(tmp_path / "held-out.jsonl", range(100, 130))
    plain = silo(tmp_path, 'held-out = "held-out.jsonl"')
    validation = load_validation(plain, TASK)
    assert len(validation) == 15
    assert len(load(plain, TASK)[1]) == 30
    halved = silo(tmp_path, 'held-out = "held-out.jsonl"', "validation = 0.5")
    assert load_validation(halved, TASK) == validation
    assert not set(texts(load(halved, TASK)[1])) & set(texts(validation))


def test_a_source_loses_what_is_trained_or_reported_on(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", range(10))
    write(tmp_path / "held-out.jsonl", range(20, 30))
    write(tmp_path / "other.jsonl", range(5, 35))
    named = silo(tmp_path, 'held-out = "held-out.jsonl"', 'validation = "other.jsonl"')
    assert texts(load_validation(named, TASK)) == [f"text {n}" for n in (*range(10, 20), *range(30, 35))]
    assert len(load(named, TASK)[1]) == 10


def test_nothing_to_choose_by_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", range(10))
    write(tmp_path / "held-out.jsonl", range(20, 21))
    write(tmp_path / "copy.jsonl", range(20, 21))
    with pytest.raises(DataError, match=r"all 1 examples of data\.validation"):
        load_validation(silo(tmp_path, 'held-out = "held-out.jsonl"', 'validation = "copy.jsonl"'), TASK)
    with pytest.raises(DataError, match=r"data\.validation = 0\.5 leaves none of the 1 examples"):
        load_validation(silo(tmp_path, 'held-out = "held-out.jsonl"'), TASK)
    with pytest.raises(PlanError, match="fraction between 0 and 1"):
        silo(tmp_path, 'held-out = "held-out.jsonl"', "validation = 1.5")
