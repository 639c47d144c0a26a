"""Which examples are in the sums that a head is fitted from: none by which a label's sum would be about very few."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gramfuse_client.data.alike import alike
from gramfuse_client.data.examples import Examples
from gramfuse_client.tasks.registry import at_silo
from gramfuse_protocol.contract.task import Task

SETS = st.lists(st.frozensets(st.integers(0, 3)).map(lambda found: tuple(sorted(found))), min_size=1, max_size=30)


@given(SETS, st.integers(1, 4))
def test_each_label_in_the_sums_of_a_head_has_and_lacks_enough_examples(labels: list[Any], least: int) -> None:
    task = Task(task="multi-label", labels=("a", "b", "c", "d"))
    examples = Examples([str(number) for number in range(len(labels))], None, labels)
    kept = at_silo(task).common(examples, task, least, alike(examples, task))
    assert kept == sorted(set(kept))
    for label in range(4):
        have = sum(label in labels[index] for index in kept)
        assert have == 0 or have >= least
        assert have in (0, len(kept)) or len(kept) - have >= least
    if least == 1:
        assert len(kept) == len(labels)


def test_examples_of_a_rare_label_are_in_no_sums_of_a_head_and_all_targets_are() -> None:
    one = Task(task="classification", labels=("a", "b", "c"))
    examples = Examples(list("vwxyz"), None, [0, 1, 0, 2, 2])
    assert at_silo(one).common(examples, one, 2, alike(examples, one)) == [0, 2, 3, 4]
    number = Task(task="regression")
    numbers = Examples(list("vw"), None, [0.5, 0.7])
    assert at_silo(number).common(numbers, number, 2, alike(numbers, number)) == [0, 1]


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("the old cat", "THE  old\tCat", True),
        ("the old cat", "the old cat of the dog", True),  # cut off
        ("the old cat", "the old dog", False),
    ],
)
@pytest.mark.parametrize("kind", ["classification", "multi-label"])
def test_texts_that_a_model_takes_for_the_same_are_one_example(
    pico_tokenizer: Any, kind: str, one: str, other: str, same: bool
) -> None:
    task = Task(task=kind, labels=("a", "b"), max_length=len(pico_tokenizer("the old cat")["input_ids"]))
    labels = [0, 0, 1, 1] if kind == "classification" else [(0,), (0,), (1,), (1,)]
    examples = Examples([one, other, "a dog", "a horse"], None, labels)
    kept = at_silo(task).common(examples, task, 2, alike(examples, task, pico_tokenizer))
    assert kept == ([2, 3] if same else [0, 1, 2, 3])
    pairs = Examples(["x", "x"], [one, other], [0, 0])
    assert len(set(alike(pairs, task))) == (1 if one.casefold().split() == other.casefold().split() else 2)
