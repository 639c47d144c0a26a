"""Noise on held-out counts: the sampler, how much of it there is, and by how much one example can move a vector."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from dp_accounting import GaussianDpEvent
from dp_accounting.pld import PLDAccountant
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from gramfuse_client.training.evaluate import evaluate_for_sum, rows
from gramfuse_client.training.outputs import Outputs
from gramfuse_protocol.contract.plan import Plan
from gramfuse_protocol.contract.task import Task
from gramfuse_protocol.held_out.metrics import by_label, metrics
from gramfuse_protocol.held_out.noise import (
    composed_epsilon,
    deviations,
    discrete_gaussian,
    noise_multiplier,
    noisy_words,
    variances,
)
from gramfuse_protocol.held_out.sums import LOSS, Vector, figures, groups, is_sum, label_figures, range_of, size
from gramfuse_protocol.secure_sum.fixed_point import decode
from gramfuse_protocol.secure_sum.scales import METRICS_SCALE
from gramfuse_protocol.tasks.causal_lm import language_rows, language_sums
from gramfuse_protocol.tasks.classification import Answers, class_rows, classification_sums
from gramfuse_protocol.tasks.multi_label import label_rows, multi_label_sums
from gramfuse_protocol.tasks.registry import kind_of
from gramfuse_protocol.tasks.regression import moment_rows, regression_sums
from gramfuse_protocol.tasks.scores import Tokens
from gramfuse_protocol.tasks.sequence_to_sequence import generation_rows, generation_sums
from gramfuse_protocol.tasks.token_classification import entity_rows, entity_sums
from tests.answers import sure


def sure_rows(task: Any, truth: Any, predicted: Any) -> Any:
    """The rows of a classifier that has no doubt."""
    return class_rows(task, sure(truth, predicted))


TAGS = ("O", "B-X", "I-X", "B-Y", "I-Y")
TASK_SETTINGS = {
    "classification": 'labels = ["a", "b", "c"]',
    "image-classification": 'labels = ["a", "b", "c"]',
    "regression": "range = [-1, 3]",
    "multi-label": 'labels = ["a", "b", "c"]',
    "token-classification": f"labels = {list(TAGS)}",
    "sequence-to-sequence": "target-length = 6",
    "causal-lm": "max-length = 16",
    "prompt-completion": "target-length = 6",
}


def tokens_of(targets: Any, losses: Any, correct: Any) -> Tokens:
    """Predictions whose losses need no clipping."""
    return Tokens(*(np.array(values, np.float64) for values in (targets, losses, losses, correct)))


def plan(kind: str, silos: int = 4, **privacy: Any) -> Plan:
    """A secure plan of one task."""
    roster = "".join(f'[[silo]]\nname = "{name}"\n' for name in "abcdefgh"[:silos])
    terms = "".join(f"{key.replace('_', '-')} = {value!r}\n" for key, value in privacy.items())
    text = (
        f'[plan]\nname = "p"\n[model]\nbase = "b"\ntask = "{kind}"\n{TASK_SETTINGS[kind]}\n[privacy]\n{terms}{roster}'
    )
    return Plan.parse(text)


def entropy(seed: int) -> Callable[[int], bytes]:
    return random.Random(seed).randbytes


# The sampler


@pytest.mark.parametrize("variance", [1, 2, 9, 100])
def test_the_sampler_draws_from_the_discrete_gaussian_distribution(variance: int) -> None:
    count, source = 6000, entropy(variance)
    found = Counter(discrete_gaussian(variance, source) for _ in range(count))
    reach = int(6 * math.sqrt(variance)) + 3
    support = np.arange(-reach, reach + 1)
    mass = np.exp(-(support**2) / (2 * variance))
    mass /= mass.sum()
    likely = count * mass >= 8  # the rest is one class, as a test by chi squared needs it
    expected = np.append(count * mass[likely], count * mass[~likely].sum() + 1e-9)
    observed = np.array([found[int(x)] for x in support[likely]])
    observed = np.append(observed, count - observed.sum())
    assert stats.chisquare(observed, expected * count / expected.sum()).pvalue > 1e-3


def test_the_sampler_has_the_variance_that_it_is_asked_for_at_the_size_that_is_used() -> None:
    variance, source = 2**45 + 12345, entropy(7)
    drawn = np.array([discrete_gaussian(variance, source) for _ in range(2000)], np.float64)
    assert stats.kstest(drawn / math.sqrt(variance), "norm").pvalue > 1e-3
    assert abs(drawn.var() / variance - 1) < 5 * math.sqrt(2 / 2000)
    again = entropy(7)
    assert [discrete_gaussian(variance, again) for _ in range(5)] == drawn[:5].tolist()


# How much


@pytest.mark.parametrize("epsilon", [0.25, 1.0, 2.0, 8.0])
def test_the_multiplier_is_that_of_the_gaussian_mechanism(epsilon: float) -> None:
    """The closed form of Balle and Wang (2018): δ = Φ(1/2z − εz) − e^ε Φ(−1/2z − εz)."""
    z = noise_multiplier(epsilon)

    def delta(of: float, z: float = z) -> float:
        return float(stats.norm.cdf(1 / (2 * z) - of * z) - math.exp(of) * stats.norm.cdf(-1 / (2 * z) - of * z))

    assert 0.999e-5 < delta(epsilon) <= 1e-5
    for releases in (2, 6):
        assert delta(composed_epsilon(epsilon, releases), z / math.sqrt(releases)) == pytest.approx(1e-5, rel=1e-4)
    assert composed_epsilon(epsilon, 1) == epsilon


def test_the_cost_of_all_releases_is_that_of_an_accountant_of_privacy_loss() -> None:
    accountant = PLDAccountant()
    accountant.compose(GaussianDpEvent(noise_multiplier(2.0)), 4)
    assert composed_epsilon(2.0, 4) == pytest.approx(accountant.get_epsilon(1e-5), rel=1e-3)
    assert composed_epsilon(100.0, 2**53) > 1e15, "whatever a plan says, there is an answer, and soon"


@pytest.mark.parametrize("kind", TASK_SETTINGS)
def test_what_is_left_without_those_that_dropped_out_and_those_that_collude_is_private(kind: str) -> None:
    """A group with the least silos, less those of the coordinator, still has noise z·Δ/√s, and shares add up."""
    terms = plan(kind, 5, colluding=1, minimum_survivors=4)
    task, z, start = terms.task_of("a"), noise_multiplier(2.0), 0
    left = 3 * np.array(variances(terms, task), np.float64)
    spent = 0.0
    for group in groups(task):
        entries = left[start : start + group.size]
        moved = group.sensitivity * METRICS_SCALE + math.sqrt(group.size)
        assert (entries >= z**2 * moved**2 / group.share).all()
        spent += float((moved**2 / entries).max())
        start += group.size
    assert start == size(task)
    assert spent <= 1 / z**2, "all groups together are one mechanism with the multiplier z"
    np.testing.assert_allclose(deviations(terms, task, 4), np.sqrt(4 / 3 * left) / METRICS_SCALE)


@pytest.mark.parametrize("privacy", [{"metrics_epsilon": "none"}, {"secure_aggregation": "FALSE"}])
def test_without_noise_the_words_are_the_vector(privacy: dict[str, Any]) -> None:
    if "secure_aggregation" in privacy:
        terms = plan("classification").override(["privacy.secure-aggregation=false"])
    else:
        terms = plan("classification", **privacy)
    task, vector = terms.task_of("a"), np.arange(22.0)
    assert terms.epsilon is None
    assert decode(noisy_words(terms, task, vector, entropy(1)), METRICS_SCALE).tolist() == vector.tolist()


def test_words_are_the_vector_and_noise_of_the_promised_strength() -> None:
    terms = plan("causal-lm")
    task, vector, source = terms.task_of("a"), np.array([700.0, 12.5, 4.25, 100.125]), entropy(3)
    drawn = np.array([decode(noisy_words(terms, task, vector, source), METRICS_SCALE) for _ in range(1000)])
    assert (np.abs(drawn.mean(axis=0) - vector) < 5 * deviations(terms, task, 1) / math.sqrt(1000)).all()
    np.testing.assert_allclose(drawn.std(axis=0), deviations(terms, task, 1), rtol=0.12)
    same = [noisy_words(terms, task, vector, entropy(9)).tolist() for _ in range(2)]
    assert same[0] == same[1]


@pytest.mark.parametrize("odd", [math.nan, math.inf, -math.inf, 1e300, -1e300])
def test_whatever_a_vector_holds_there_are_words(odd: float) -> None:
    terms = plan("regression")
    words = noisy_words(terms, terms.task_of("a"), np.full(7, odd), entropy(2))
    assert (words.dtype, words.shape) == (np.uint64, (7,))


# One example


def example(task: Task, draw: st.DrawFn) -> Vector:
    """The row of one example, whatever it is and whatever the model says of it."""
    word = st.sampled_from(["red", "cat", "old"])
    number = st.floats(width=32) | st.floats(-2, 4, width=32)
    match task.task:
        case "classification" | "image-classification":
            truth, predicted = (np.array([draw(st.integers(0, 2))]) for _ in range(2))
            loss, confidence = (np.array([draw(number)]) for _ in range(2))
            return class_rows(task, Answers(truth, predicted, loss, confidence))
        case "regression":
            truth = draw(st.floats(-1, 3))
            return moment_rows(task, np.array([truth]), np.array([draw(number)], np.float32))
        case "multi-label":
            flags = st.lists(st.booleans(), min_size=3, max_size=3)
            return label_rows(task, *(np.array([draw(flags)]) for _ in range(2)))
        case "token-classification":
            length = draw(st.integers(1, 60))
            tags = st.lists(st.sampled_from(TAGS), min_size=length, max_size=length)
            return entity_rows(task, [draw(tags)], [draw(tags)])
        case "sequence-to-sequence":
            texts = [" ".join(draw(st.lists(word, max_size=6))) for _ in range(2)]
            tokens = draw(st.integers(1, 9))  # more than the plan allows: no tokenizer is trusted
            losses = draw(st.floats(0, 1)) * tokens * LOSS
            return generation_rows(task, texts[:1], texts[1:], np.array([tokens]), np.array([losses]))
        case "prompt-completion":
            texts = [" ".join(draw(st.lists(word, max_size=6))) for _ in range(2)]
            tokens = draw(st.integers(1, 9))
            right, losses = draw(st.integers(0, tokens)), draw(st.floats(0, 1)) * tokens * LOSS
            return kind_of(task).rows(task, texts[:1], texts[1:], tokens_of([tokens], [losses], [right]))
        case "causal-lm":
            tokens = draw(st.integers(1, 40))
            right, losses = draw(st.integers(0, tokens)), draw(st.floats(0, 1)) * tokens * LOSS
            return language_rows(task, *(np.array([value]) for value in (tokens, losses, right)))


@pytest.mark.parametrize("kind", TASK_SETTINGS)
@settings(max_examples=150)
@given(data=st.data())
def test_one_example_moves_no_group_by_more_than_its_sensitivity(kind: str, data: st.DataObject) -> None:
    """Replaced by another, added, or removed."""
    task = plan(kind).task_of("a")
    one, other = (example(task, data.draw) for _ in range(2))
    assert np.isfinite(one).all()
    assert (one * METRICS_SCALE == np.rint(one * METRICS_SCALE)).all(), "sums of such rows are exact"
    start = 0
    for group in groups(task):
        mine = slice(start, start + group.size)
        start += group.size
        rounding = math.sqrt(group.size) / METRICS_SCALE
        for moved in (one[mine] - other[mine], one[mine]):
            assert np.linalg.norm(moved) <= group.sensitivity + rounding, group.name


@pytest.mark.parametrize(
    ("kind", "pair"),
    [
        ("classification", [((0,), (0,)), ((1,), (1,))]),
        ("multi-label", [([[1, 1, 1]], [[1, 1, 1]]), ([[1, 1, 1]], [[0, 0, 0]])]),
        ("regression", [((-1.0,), (-1.0,)), ((3.0,), (3.0,))]),
    ],
)
def test_sensitivities_are_reached(kind: str, pair: Any) -> None:
    """No group could do with less noise, but for `labels` of a classifier, whose wrong examples move most."""
    task = plan(kind).task_of("a")
    makes: dict[str, Any] = {"classification": sure_rows, "multi-label": label_rows, "regression": moment_rows}
    dtype = bool if kind == "multi-label" else None
    one, other = (makes[kind](task, *(np.array(side, dtype) for side in sides)) for sides in pair)
    if kind == "classification":
        wrong, also = (sure_rows(task, *sides) for sides in (((0,), (1,)), ((1,), (2,))))
        doubtful = class_rows(task, Answers(np.array([0]), np.array([0]), np.array([0.0]), np.array([0.95])))
        assert np.linalg.norm((one - wrong)[:2]) == pytest.approx(math.sqrt(2))
        assert np.linalg.norm((doubtful - wrong)[2:13]) > 1.45  # of √5: who is sure and right has little left
        assert np.linalg.norm((wrong - also)[13:]) == pytest.approx(2)
    elif kind == "multi-label":
        assert np.linalg.norm((one - other)[1:]) == pytest.approx(math.sqrt(6))
    else:
        assert np.linalg.norm((one - other)[1:3]) == pytest.approx(math.sqrt(8))


def measured(kind: str, count: int = 40) -> tuple[Task, Any, Vector]:
    """Sums of some examples of a kind, and the same as rows."""
    rng = np.random.default_rng(5)
    task = plan(kind).task_of("a")
    match kind:
        case "classification" | "image-classification":
            truth, predicted = rng.integers(0, 3, (2, count))
            return task, classification_sums(sure(truth, predicted), 3), sure_rows(task, truth, predicted)
        case "regression":
            truth, predicted = rng.uniform(-1, 3, (2, count))
            return task, regression_sums(truth, predicted), moment_rows(task, truth, predicted)
        case "multi-label":
            truth, predicted = rng.random((2, count, 3)) < 0.4
            return task, multi_label_sums(truth, predicted, (0, 1, 2)), label_rows(task, truth, predicted)
        case "token-classification":
            tags = rng.choice(TAGS, (2, count, 6)).tolist()
            return task, entity_sums(*tags, task.entities), entity_rows(task, *tags)
        case "sequence-to-sequence":
            texts = [[" ".join(row) for row in rng.choice(["red", "cat"], (count, 3))] for _ in range(2)]
            tokens, losses = rng.integers(1, 6, count), rng.uniform(0, 5, count)
            sums = generation_sums(*texts, int(tokens.sum()), float(losses.sum()))
            return task, sums, generation_rows(task, *texts, tokens, losses)
        case "prompt-completion":
            texts = [[" ".join(row) for row in rng.choice(["red", "cat"], (count, 3))] for _ in range(2)]
            tokens, losses = rng.integers(1, 6, count), rng.uniform(0, 5, count)
            facts = *texts, tokens_of(tokens, losses, rng.binomial(tokens, 0.4))
            return task, kind_of(task).sums(task, *facts), kind_of(task).rows(task, *facts)
        case _:
            tokens, losses = rng.integers(1, 15, count), rng.uniform(0, 9, count)
            right = rng.binomial(tokens, 0.4)
            sums = language_sums(count, int(tokens.sum()), float(losses.sum()), int(right.sum()))
            return task, sums, language_rows(task, tokens, losses, right)


@pytest.mark.parametrize("kind", TASK_SETTINGS)
def test_without_noise_the_figures_are_the_exact_ones(kind: str) -> None:
    task, sums, vector = measured(kind)
    assert is_sum(task, vector)
    assert figures(task, vector) == pytest.approx(metrics(task, sums), abs=1e-4)
    assert label_figures(task, vector) == {name: pytest.approx(of) for name, of in by_label(task, sums).items()}


@pytest.mark.parametrize("kind", TASK_SETTINGS)
def test_figures_of_nothing_but_noise_are_in_their_range(kind: str) -> None:
    task, source = plan(kind).task_of("a"), np.random.default_rng(1)
    for _ in range(50):
        vector = source.normal(0, 20, size(task))
        assert is_sum(task, vector)
        found = figures(task, vector)
        assert np.isfinite(list(found.values())).all()
        for name, value in found.items():
            low, high = range_of(task, name)
            assert low <= value <= high, name
    words = source.integers(0, 2**64, size(task), np.uint64)
    assert not is_sum(task, decode(words, METRICS_SCALE)), "masks that do not cancel"
    assert not is_sum(task, np.full(size(task), math.nan))


# What the model says


def batch_of(labels: Any) -> dict[str, torch.Tensor]:
    """A batch in which, if it is one of words, each word has a token."""
    truth = torch.tensor(labels)
    return {"labels": truth, "words": torch.stack([torch.ones_like(truth), truth], dim=-1)}


def test_predictions_that_are_no_numbers_are_counted_as_something_that_no_data_decides() -> None:
    nan, inf = math.nan, math.inf
    regress = plan("regression").task_of("a")
    said = [rows(batch_of([2.0]), Outputs(torch.tensor([[value]])), regress, None) for value in (nan, inf, -inf)]
    expected = [moment_rows(regress, np.array([2.0]), np.array([value])) for value in (1.0, 3.0, -1.0)]
    np.testing.assert_array_equal(said, expected)

    speak = plan("causal-lm").task_of("a")
    for odd in (nan, inf, -inf):
        row = rows(batch_of([[0, 1, 1]]), Outputs(torch.full((1, 3, 4), odd)), speak, None)
        np.testing.assert_allclose(row[[0, 3]], [1, 2 / 16])
        assert row[1] + row[2] == 2 / 16
    for kind, shape, labels in (
        ("classification", (1, 3), [1]),
        ("multi-label", (1, 3), [[1.0, 0.0, 1.0]]),
        ("token-classification", (1, 2, 5), [[1, 0]]),
    ):
        task = plan(kind).task_of("a")
        row = rows(batch_of(labels), Outputs(torch.full(shape, nan)), task, None)
        assert row.shape == (size(task),)
        assert np.isfinite(row).all()


class Nosy(torch.nn.Module):
    """A model that says of all examples in a batch how wide the batch is: what crafted weights make of padding."""

    def forward(self, input_ids: torch.Tensor, **_: Any) -> Any:
        width = input_ids.shape[1]
        logits = torch.zeros(len(input_ids), 3)
        logits[:, 0 if width > 5 else 1] = 1.0
        return type("Said", (), {"logits": logits})


class Given:
    """Encoded examples: of each, how long it is."""

    def __init__(self, lengths: list[int]) -> None:
        self.all = lengths

    def __len__(self) -> int:
        return len(self.all)

    def __getitem__(self, index: int) -> dict[str, int]:
        return {"length": self.all[index]}

    def collate(self, chosen: list[dict[str, int]]) -> dict[str, torch.Tensor]:
        return {
            "input_ids": torch.zeros(len(chosen), max(row["length"] for row in chosen), dtype=torch.long),
            "labels": torch.zeros(len(chosen), dtype=torch.long),
        }


def test_what_a_model_says_of_one_example_does_not_depend_on_another() -> None:
    """One long text among many: in a batch, all of them would be padded to its length, and the model sees that."""
    task, device = plan("classification").task_of("a"), torch.device("cpu")
    without, with_one = (
        evaluate_for_sum(Nosy(), Given([3] * 20 + [last]), device, task, None)  # type: ignore[arg-type]
        for last in (3, 9)
    )
    assert np.linalg.norm((with_one - without)[:2]) == pytest.approx(math.sqrt(2))
    assert with_one[:2].tolist() == [1, 20]
