"""Metrics that left with noise: how often the exact one lies in the interval, and how wide it is."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from importlib.resources import files
from typing import Any

import numpy as np
import pytest

from gramfuse_protocol.contract.plan import Plan
from gramfuse_protocol.contract.task import Task
from gramfuse_protocol.held_out.noise import deviations
from gramfuse_protocol.held_out.sums import Vector, figures
from gramfuse_protocol.tasks.causal_lm import language_rows
from gramfuse_protocol.tasks.classification import class_rows
from gramfuse_protocol.tasks.multi_label import label_rows
from gramfuse_protocol.tasks.registry import kind_of
from gramfuse_protocol.tasks.regression import moment_rows
from gramfuse_protocol.tasks.scores import Tokens
from gramfuse_protocol.tasks.sequence_to_sequence import generation_rows
from gramfuse_protocol.tasks.token_classification import entity_rows
from gramfuse_server.report.intervals import with_intervals
from gramfuse_server.report.schema import Measured
from tests.answers import sure

TYPES = ("PER", "LOC", "ORG", "MISC")
TAGS = ["O", *(f"{place}-{kind}" for kind in TYPES for place in "BI")]
DRAWS = 200

Made = tuple[Plan, Callable[[Task], Vector]]


def secure(model: str) -> Plan:
    """A secure plan of four silos, of which one may drop out and one may collude; ε is the default."""
    roster = "".join(f'[[silo]]\nname = "{name}"\n' for name in "abcd")
    return Plan.parse(f'[plan]\nname = "p"\n[model]\nbase = "b"\n{model}\n{roster}')


def classes(labels: int, count: int, rng: np.random.Generator) -> Made:
    truth = rng.integers(0, labels, count)
    predicted = np.where(rng.random(count) < 0.8, truth, rng.integers(0, labels, count))
    names = [f"label {n}" for n in range(labels)]
    return secure(f'task = "classification"\nlabels = {names}'), lambda task: class_rows(task, sure(truth, predicted))


def numbers(count: int, rng: np.random.Generator) -> Made:
    truth = np.clip(rng.normal(0, 0.4, count), -1, 1)
    predicted = 0.8 * truth + rng.normal(0, 0.15, count)
    return secure('task = "regression"'), lambda task: moment_rows(task, truth, predicted)


def tagged(count: int, rng: np.random.Generator) -> Made:
    truth = [[f"B-{rng.choice(TYPES)}" if rng.random() < 0.2 else "O" for _ in range(8)] for _ in range(count)]
    changed = [[str(rng.choice(TAGS)) if rng.random() < 0.1 else tag for tag in tags] for tags in truth]
    plan = secure(f'task = "token-classification"\nlabels = {TAGS}')
    return plan, lambda task: entity_rows(task, truth, changed)


def spoken(count: int, rng: np.random.Generator) -> Made:
    tokens = rng.integers(20, 120, count)
    right = rng.binomial(tokens, 0.4)
    return secure('task = "causal-lm"'), lambda task: language_rows(task, tokens, 3.1 * tokens, right)


def written(count: int, rng: np.random.Generator) -> Made:
    truth = [" ".join(rng.choice(list("abcd"), 5)) for _ in range(count)]
    said = [" ".join(word if rng.random() < 0.8 else "z" for word in text.split()) for text in truth]
    tokens = np.full(count, 9.0)
    plan = secure('task = "sequence-to-sequence"')
    return plan, lambda task: generation_rows(task, truth, said, tokens, 2 * tokens)


def completed(count: int, rng: np.random.Generator) -> Made:
    truth = [" ".join(rng.choice(list("abcd"), 5)) for _ in range(count)]
    said = [" ".join(word if rng.random() < 0.8 else "z" for word in text.split()) for text in truth]
    tokens = Tokens(*np.array([[9.0, 18.0, 18.0, 6.0]] * count).T)
    return secure('task = "prompt-completion"'), lambda task: kind_of(task).rows(task, truth, said, tokens)


def several(count: int, rng: np.random.Generator) -> Made:
    truth = rng.random((count, 5)) < 0.3
    predicted = truth ^ (rng.random((count, 5)) < 0.1)
    plan = secure('task = "multi-label"\nlabels = ["a", "b", "c", "d", "e"]')
    return plan, lambda task: label_rows(task, truth, predicted)


CASES: dict[str, Callable[[np.random.Generator], Made]] = {
    "8 labels": lambda rng: classes(8, 1200, rng),
    "64 labels, about 20 of each": lambda rng: classes(64, 1280, rng),
    "3 labels, 20 of each": lambda rng: classes(3, 60, rng),
    "numbers": lambda rng: numbers(1500, rng),
    "few numbers": lambda rng: numbers(100, rng),
    "entities": lambda rng: tagged(800, rng),
    "tokens": lambda rng: spoken(800, rng),
    "texts": lambda rng: written(500, rng),
    "completions": lambda rng: completed(500, rng),
    "several labels": lambda rng: several(800, rng),
}


@pytest.mark.parametrize("name", CASES)
def test_the_exact_metric_lies_in_its_interval_in_93_of_100_draws(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gramfuse_server.report.intervals.DRAWS", 400)  # which is quicker, and makes intervals no wider
    rng = np.random.default_rng(20)
    plan, make = CASES[name](rng)
    task = plan.task_of("a")
    vector = make(task)
    exact, noise = figures(task, vector), deviations(plan, task, 4)
    held: Counter[str] = Counter()
    for _ in range(DRAWS):
        said = with_intervals(plan, "regmean", task, vector + noise * rng.normal(size=vector.size), 4)
        assert said.intervals.keys() == exact.keys()
        held.update(metric for metric, (low, high) in said.intervals.items() if low <= exact[metric] <= high)
        assert all(low <= said.metrics[metric] <= high for metric, (low, high) in said.intervals.items())
    assert {metric: held[metric] for metric in exact if held[metric] < 0.93 * DRAWS} == {}


def test_a_report_says_what_was_measured_what_is_known_and_what_it_cost() -> None:
    plan, make = classes(8, 1200, np.random.default_rng(3))
    plan = plan.override(["merge.rounds=3"])
    task = plan.task_of("a")
    vector = make(task)
    said = with_intervals(plan, "regmean", task, vector, 4)
    assert Measured.read(said.document()) == said == with_intervals(plan, "regmean", task, vector, 4), (
        "the same every time"
    )
    assert said.metrics == figures(task, vector)
    assert said.privacy is not None
    assert said.privacy.epsilon == 2.0
    assert said.privacy.delta == 1e-5
    assert said.privacy.total.document() == {"epsilon": pytest.approx(5.7, abs=0.2), "releases": 6}
    for label in said.labels[""].values():
        low, high = label.interval or (-1, -1)
        assert 0 <= low <= label.f1 <= high <= 1
        assert high - low < 0.25


def test_the_mean_over_labels_that_the_noise_hides_says_nothing() -> None:
    plan, make = classes(64, 300, np.random.default_rng(4))
    task = plan.task_of("a")
    noise = deviations(plan, task, 4) * np.random.default_rng(1).normal(size=13 + 3 * 64)
    said = with_intervals(plan, "regmean", task, make(task) + noise, 4)
    assert said.intervals["macro-f1"] == (0, 1)
    assert said.intervals["accuracy"][1] - said.intervals["accuracy"][0] < 0.1
    assert (0, 1) in [label.interval for label in said.labels[""].values()]


def test_the_demo_shows_accuracy_to_less_than_two_points(record_property: Callable[[str, Any], None]) -> None:
    """The demo's own held-out messages, of which a model gets about four in five right."""
    desk, rng = files("gramfuse_cli") / "desk", np.random.default_rng(1)
    plan = Plan.parse((desk / "plan.toml").read_text(encoding="utf-8"))
    assert (len(plan.names), plan.minimum_survivors, plan.privacy.colluding, plan.epsilon) == (4, 3, 1, 2.0)
    task = plan.task_of(plan.names[0])
    vector: Any = 0
    for name in plan.names:
        lines = (desk / "data" / name / "held-out.jsonl").read_text(encoding="utf-8").splitlines()
        truth = np.array([task.labels.index(json.loads(line)["label"]) for line in lines])
        vector = vector + class_rows(task, sure(truth, np.where(rng.random(len(truth)) < 0.8, truth, (truth + 1) % 8)))
    widths = []
    for silos in (4, 3):
        noise = deviations(plan, task, silos) * rng.normal(size=vector.size)
        low, high = with_intervals(plan, "regmean", task, vector + noise, silos).intervals["accuracy"]
        widths.append((high - low) / 2)
    record_property("half width of the demo's accuracy", widths)
    assert max(widths) < 0.012
