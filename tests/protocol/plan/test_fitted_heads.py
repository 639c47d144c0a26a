"""Which plans may fit a head in closed form, and which are refused for what the sums would tell."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pytest

from gramfuse_client.guard.disclosure import disclose
from gramfuse_protocol.contract.head_layout import FIRST, HeadLayout
from gramfuse_protocol.contract.layout import Layout, Tensor
from gramfuse_protocol.contract.plan import Plan
from gramfuse_protocol.contract.task import Task
from gramfuse_protocol.errors import PlanError
from gramfuse_protocol.tasks.registry import TASK_KINDS, kind_of

ABC = 'labels = ["a", "b", "c"]'
TASKS = {
    "classification": ABC,
    "image-classification": ABC,
    "multi-label": ABC,
    "regression": "",
    "token-classification": 'labels = ["O", "B-X", "I-X"]',
    "causal-lm": "",
    "sequence-to-sequence": "",
    "prompt-completion": "",
}
HEADS = {"fitted": 'head = "fitted"', "refit": "[merge]\nrefit = true", "alone": "[training]\nepochs = 0"}
FITTED = ("classification", "image-classification", "multi-label", "regression", "token-classification")


def plan(task: str, how: str = "fitted", silos: Mapping[str, Sequence[str]] | None = None, privacy: str = "") -> Plan:
    silos = dict.fromkeys("abc", ()) if silos is None else silos
    roster = "".join(
        f'[[silo]]\nname = "{name}"\n' + (f"labels = {list(labels)}\n" if labels else "")
        for name, labels in silos.items()
    )
    privacy = f"[privacy]\n{privacy}\n" if privacy else '[privacy]\nsecure-aggregation = false\nmetrics = "none"\n'
    return Plan.parse(
        f'[plan]\nname = "x"\n[model]\nbase = "x"\ntask = "{task}"\n{TASKS[task]}\n{HEADS[how]}\n{privacy}{roster}'
    )


@pytest.mark.parametrize("how", HEADS)
@pytest.mark.parametrize("task", TASKS)
def test_the_tasks_with_a_closed_form_are_fitted_and_others_say_why_not(task: str, how: str) -> None:
    if task in FITTED:
        assert plan(task, how).model.task == task
        return
    with pytest.raises(PlanError, match=task):
        plan(task, how)


SECURE = "colluding = 1\nminimum-survivors = {least}"


def test_silos_that_annotate_the_same_labels_are_so_many_that_no_difference_is_about_few() -> None:
    alike = dict.fromkeys("abc", ()) | dict.fromkeys("def", ("a", "b"))
    secure = SECURE.format(least=6)
    plan("multi-label", silos=alike, privacy=secure)
    for how in ("fitted", "refit"):
        with pytest.raises(PlanError, match=r"exactly the labels of f: 1.*at least 3"):
            plan("multi-label", how, alike | {"f": ("a",), "g": ("a", "b")}, SECURE.format(least=7))
    plan("multi-label", silos={"a": ("a",), "b": ("b", "c"), "c": ("a", "b")})  # open: all is read anyway


def test_an_example_with_one_label_is_not_fitted_where_it_could_have_another() -> None:
    masked = {"a": ("a", "b"), "b": ("b", "c"), "c": ()}
    with pytest.raises(PlanError, match="'a' annotates some"):
        plan("classification", silos=masked)


def test_what_is_multiplied_with_features_is_what_the_layout_says() -> None:
    found = {}
    labels = {
        "classification": np.array([2, 0]),
        "regression": np.array([0.5, -2.0]),
        "multi-label": np.array([[1.0, 0.0, np.nan], [0.0, 1.0, 1.0]]),
    }
    for name, given in labels.items():
        task = Task(task=name, labels=() if name == "regression" else ("a", "b", "c"))
        found[name] = kind_of(task).targets(task, given)
        assert found[name].shape == (2, kind_of(task).columns(task))
        assert found[name].dtype == np.float64
    assert found["classification"].tolist() == [[0, 0, 1], [1, 0, 0]]
    assert found["regression"].tolist() == [[0.5], [-2.0]]
    assert found["multi-label"].tolist() == [[1, 0, 0, 1, 1, 0], [0, 1, 1, 1, 1, 1]]


@pytest.mark.parametrize("task", ["classification", "regression", "multi-label", "token-classification"])
def test_a_silo_reads_what_the_sums_of_its_task_are_and_tell(task: str) -> None:
    here, kind = plan(task, privacy="colluding = 1"), TASK_KINDS[task]
    outputs, columns = kind.outputs(here.model.single_task), kind.columns(here.model.single_task)
    assert kind.fit is not None
    head = HeadLayout(
        fit=kind.fit, weight="w", bias=None, features=2, outputs=outputs, columns=columns, exponents=(0, 0)
    )
    tensor = Tensor(name="w", shape=(outputs, 2), merge="mean")
    found = disclose("a", here, Layout(groups=(), tensors=(tensor,), frozen=(), head=head))
    (part,) = {part for departure in found.departures for part in departure.parts if part.name == FIRST}
    assert part.shape == (3, columns)
    assert part.what == kind.fit_says
    assert (kind.fit_tells in found.claims) == (task != "regression")
