"""Metrics from sums, against scikit-learn, seqeval, numpy and scipy on the predictions themselves."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import pearsonr
from seqeval import metrics as seqeval
from seqeval.metrics.sequence_labeling import get_entities
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

from gramfuse_protocol.contract.task import Task
from gramfuse_protocol.held_out.metrics import are_sums, by_label, metrics, primary, sums_shape
from gramfuse_protocol.tasks.causal_lm import language_sums
from gramfuse_protocol.tasks.classification import Answers, classification_sums, confusion
from gramfuse_protocol.tasks.multi_label import multi_label_sums
from gramfuse_protocol.tasks.registry import TASK_KINDS
from gramfuse_protocol.tasks.regression import regression_sums
from gramfuse_protocol.tasks.sequence_to_sequence import generation_sums
from gramfuse_protocol.tasks.token_classification import entities, entity_sums
from tests.answers import sure

LABELS = 6
CLASSIFY = Task(task="classification", labels=tuple("abcdef"))
REGRESS = Task(task="regression")
APPLY = Task(task="multi-label", labels=("a", "b", "c"))
TAGS = ("O", "B-PER", "I-PER", "B-LOC", "I-LOC")
TAG = Task(task="token-classification", labels=TAGS)
WRITE = Task(task="sequence-to-sequence")
SPEAK = Task(task="causal-lm")
COMPLETE = Task(task="prompt-completion")
ALL = (CLASSIFY, REGRESS, APPLY, TAG, WRITE, SPEAK, COMPLETE, Task(task="image-classification", labels=("a", "b")))
PAIRS = st.lists(st.tuples(st.integers(0, LABELS - 1), st.integers(0, LABELS - 1)), min_size=1, max_size=40)


@pytest.mark.filterwarnings("ignore:A single label was found")
@given(pairs=PAIRS)
def test_accuracy_macro_f1_and_correlation_are_those_of_scikit_learn(pairs: list[tuple[int, int]]) -> None:
    truth, predicted = np.array(pairs).T
    found = metrics(CLASSIFY, classification_sums(sure(truth, predicted), LABELS))
    assert found["examples"] == len(pairs)
    assert found["accuracy"] == pytest.approx(accuracy_score(truth, predicted), rel=1e-14)
    assert found["mcc"] == pytest.approx(matthews_corrcoef(truth, predicted), abs=1e-12)
    # Without `labels`, scikit-learn too takes the labels that occur in the truth or among the predictions.
    assert found["macro-f1"] == pytest.approx(f1_score(truth, predicted, average="macro", zero_division=0), rel=1e-14)


@pytest.mark.parametrize(
    ("truth", "predicted", "expected"),
    [
        # Labels 0 and 3 occur nowhere; label 2 is never predicted; label 4 is predicted and never true.
        ([1, 1, 2, 1], [1, 4, 4, 1], (0.5, (0.8 + 0 + 0) / 3)),
        ([5, 5], [0, 0], (0.0, 0.0)),
        ([3, 3], [3, 3], (1.0, 1.0)),
    ],
)
def test_labels_that_are_absent_on_one_side_count_and_absent_on_both_do_not(
    truth: list[int], predicted: list[int], expected: tuple[float, float]
) -> None:
    found = metrics(CLASSIFY, classification_sums(sure(truth, predicted), LABELS))
    assert (found["accuracy"], found["macro-f1"]) == pytest.approx(expected)


def test_rows_are_the_truth_and_columns_the_prediction() -> None:
    sums = classification_sums(sure([0, 0, 0, 1], [1, 1, 0, 1]), 3)
    np.testing.assert_array_equal(confusion(sums), [[1, 2, 0], [0, 1, 0], [0, 0, 0]])
    assert sums.dtype == np.float64


@given(
    rows=st.lists(st.tuples(st.booleans(), st.floats(0, 1), st.floats(0, 20)), min_size=1, max_size=60),
)
def test_loss_and_calibration_error_are_those_of_a_count_over_the_examples(
    rows: list[tuple[bool, float, float]],
) -> None:
    hits, confidence, loss = (np.array(column) for column in zip(*rows, strict=True))
    answers = Answers(np.zeros(len(rows), int), np.where(hits, 0, 1), loss, confidence)
    found = metrics(CLASSIFY, classification_sums(answers, LABELS))
    bins = np.clip(np.digitize(confidence, np.arange(1, 10) / 10), 0, 9)
    error = sum(abs((hits[bins == b] - confidence[bins == b]).sum()) for b in range(10)) / len(rows)
    assert found["ece"] == pytest.approx(min(1.0, error), abs=1e-12)
    assert found["nll"] == pytest.approx(np.minimum(loss, 16).mean())


def test_answers_that_are_no_numbers_count_as_wrong_and_sure() -> None:
    nan = np.array([np.nan])
    found = metrics(CLASSIFY, classification_sums(Answers(np.array([0]), np.array([1]), nan, nan), LABELS))
    assert (found["nll"], found["ece"]) == (16.0, 1.0)


def _regression(offset: float, scale: float, error: float, n: int = 400) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(5)
    truth = offset + scale * rng.normal(size=n)
    return truth, truth + error * rng.normal(size=n)


@pytest.mark.parametrize(
    ("offset", "scale", "error"),
    [(0, 1, 0.5), (0, 1e-4, 1e-4), (2.5, 1.5, 0.1), (-40, 10, 30), (2000, 20, 1), (1e5, 1e4, 1e3), (1e4, 10, 0.01)],
)
def test_pearson_rmse_and_mae_are_those_of_numpy_and_scipy(offset: float, scale: float, error: float) -> None:
    truth, predicted = _regression(offset, scale, error)
    found = metrics(REGRESS, regression_sums(truth, predicted))
    assert found["examples"] == truth.size
    assert found["pearson"] == pytest.approx(pearsonr(truth, predicted).statistic, abs=1e-6)
    assert found["rmse"] == pytest.approx(np.sqrt(np.mean((truth - predicted) ** 2)), rel=1e-6)
    assert found["mae"] == pytest.approx(np.mean(np.abs(truth - predicted)), rel=1e-9)


def test_an_opposite_prediction_has_a_negative_correlation() -> None:
    truth, _ = _regression(3, 1, 0)
    assert metrics(REGRESS, regression_sums(truth, 5 - 2 * truth))["pearson"] == pytest.approx(-1)


@pytest.mark.parametrize("offset", [0, 1, 100, 1000, 12345.6789])
@pytest.mark.parametrize("sign", [1, -1])
def test_a_correlation_never_leaves_its_range(offset: float, sign: int) -> None:
    truth, _ = _regression(offset, 1, 0)
    found = metrics(REGRESS, regression_sums(truth, sign * (truth + 0.3)))["pearson"]
    assert -1 <= found <= 1
    assert found == pytest.approx(sign, abs=1e-6)


def test_sums_in_float32_predictions_are_added_in_float64() -> None:
    truth = np.full(2**14, 4097, np.float32)
    found = metrics(REGRESS, regression_sums(truth, truth + 1))
    assert (found["rmse"], found["mae"]) == (1, 1)


@pytest.mark.parametrize("constant", [0.0, 1.0, 0.1, 0.7, 1 / 3, 3.3, 1e6 + 0.1, -2.2])
@pytest.mark.parametrize("n", [1, 2, 7, 100, 1000])
def test_the_correlation_with_a_side_without_variance_is_zero(constant: float, n: int) -> None:
    varied, same = 0.37 * np.arange(n), np.full(n, constant)
    for truth, predicted in ((varied, same), (same, varied), (same, same), (same, varied * 1e-3 + 5)):
        assert metrics(REGRESS, regression_sums(truth, predicted))["pearson"] == 0


@given(pairs=PAIRS, cuts=st.lists(st.integers(0, 40), max_size=3))
def test_sums_of_several_silos_add_up_to_those_of_all_examples(pairs: list[tuple[int, int]], cuts: list[int]) -> None:
    truth, predicted = np.array(pairs).T
    silos = list(zip(np.split(truth, sorted(cuts)), np.split(predicted, sorted(cuts)), strict=True))
    joint = sum(classification_sums(sure(t, p), LABELS) for t, p in silos)
    np.testing.assert_array_equal(joint, classification_sums(sure(truth, predicted), LABELS))

    t, p = truth * 0.3 - 1, predicted * 0.7
    moments = sum(regression_sums(a * 0.3 - 1, b * 0.7) for a, b in silos)
    assert moments.shape == sums_shape(REGRESS) == regression_sums(t, p).shape
    np.testing.assert_allclose(moments, regression_sums(t, p), rtol=1e-12, atol=1e-12)


def test_the_joint_metric_is_not_the_mean_of_the_silos() -> None:
    rare = classification_sums(sure([0], [1]), 2)
    common = classification_sums(sure([0] * 9, [0] * 9), 2)
    assert metrics(CLASSIFY, rare + common)["accuracy"] == 0.9


@given(
    rows=st.lists(
        st.tuples(st.lists(st.booleans(), min_size=3, max_size=3), st.lists(st.booleans(), min_size=3, max_size=3)),
        min_size=1,
        max_size=30,
    ),
    cut=st.integers(0, 30),
)
def test_f1_of_several_labels_is_that_of_scikit_learn_over_the_labels_that_are_true(
    rows: list[tuple[list[bool], list[bool]]], cut: int
) -> None:
    truth, predicted = (np.array(side) for side in zip(*rows, strict=True))
    joint = sum(
        multi_label_sums(t, p, (0, 1, 2)) for t, p in ((truth[:cut], predicted[:cut]), (truth[cut:], predicted[cut:]))
    )
    found = metrics(APPLY, joint)
    assert found["examples"] == len(rows)
    occurring = np.flatnonzero(truth.any(axis=0))
    expected = f1_score(truth, predicted, average=None, zero_division=0)[occurring]
    assert found["macro-f1"] == pytest.approx(expected.mean() if len(occurring) else 0)
    assert found["micro-f1"] == pytest.approx(f1_score(truth, predicted, average="micro", zero_division=0))


def test_a_label_counts_only_where_it_is_annotated() -> None:
    truth = np.array([[1, 0, 1], [1, 1, 0]], bool)
    predicted = np.array([[1, 1, 0], [0, 1, 0]], bool)
    sums = multi_label_sums(truth, predicted, (0, 2))
    # For each label: right, too much, missed, rightly left out.
    assert sums.tolist() == [2, *(1, 0, 1, 0), *(0, 0, 0, 0), *(0, 0, 1, 1)]
    assert metrics(APPLY, sums) == {"examples": 2, "macro-f1": (2 / 3 + 0) / 2, "micro-f1": 2 / 4}


@given(tags=st.lists(st.sampled_from([*TAGS, "B-ORG", "I-ORG"]), max_size=12))
def test_entities_are_those_of_seqeval(tags: list[str]) -> None:
    assert entities(tags) == {(kind, first, last + 1) for kind, first, last in get_entities(tags)}


def test_an_inside_tag_by_itself_begins_an_entity() -> None:
    assert entities(["I-PER", "I-PER", "I-LOC", "O", "B-LOC", "B-LOC", "I-LOC"]) == {
        ("PER", 0, 2),
        ("LOC", 2, 3),
        ("LOC", 4, 5),
        ("LOC", 5, 7),
    }


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.UndefinedMetricWarning")
@given(truth=st.lists(st.lists(st.sampled_from(TAGS), min_size=1, max_size=8), min_size=1, max_size=6), data=st.data())
def test_entity_metrics_are_those_of_seqeval(truth: list[list[str]], data: st.DataObject) -> None:
    predicted = [data.draw(st.lists(st.sampled_from(TAGS), min_size=len(t), max_size=len(t))) for t in truth]
    found = metrics(TAG, entity_sums(truth, predicted, TAG.entities))
    assert found["examples"] == len(truth)
    for name, score in (
        ("entity-f1", seqeval.f1_score),
        ("precision", seqeval.precision_score),
        ("recall", seqeval.recall_score),
    ):
        assert found[name] == pytest.approx(score(truth, predicted, zero_division=0)), name
    if any(entities(tags) for tags in (*truth, *predicted)):
        assert found["macro-f1"] == pytest.approx(seqeval.f1_score(truth, predicted, average="macro", zero_division=0))


IMAGES = Task(task="image-classification", labels=tuple("abcdef"))


def counted(task: Task, pairs: list[tuple[set[str], set[str]]]) -> dict[str, Any]:
    """What `by_label` must return, from what is true and what is predicted of each example."""
    found = {}
    for label in task.labels:
        both = sum(label in true and label in guessed for true, guessed in pairs)
        of_truth = sum(label in true for true, _ in pairs)
        of_guesses = sum(label in guessed for _, guessed in pairs)
        if of_truth or of_guesses:
            precision, recall = both / of_guesses if of_guesses else 0, both / of_truth if of_truth else 0
            f1 = 2 * precision * recall / (precision + recall) if both else 0
            values = {"examples": of_truth, "precision": precision, "recall": recall, "f1": f1}
            found[label] = pytest.approx(values)
    return found


@pytest.mark.parametrize("task", [CLASSIFY, IMAGES], ids=lambda task: task.task)
@given(pairs=PAIRS)
def test_each_label_has_the_values_of_a_count_over_the_examples(task: Task, pairs: list[tuple[int, int]]) -> None:
    truth, predicted = np.array(pairs).T
    found = by_label(task, classification_sums(sure(truth, predicted), LABELS))
    assert found == counted(task, [({task.labels[t]}, {task.labels[p]}) for t, p in pairs])


@given(
    rows=st.lists(st.tuples(*(st.sets(st.sampled_from(APPLY.labels)) for _ in range(2))), min_size=1, max_size=20),
    annotated=st.sets(st.integers(0, 2), min_size=1),
)
def test_each_of_several_labels_has_the_values_of_a_count_over_the_examples(
    rows: list[tuple[set[str], set[str]]], annotated: set[int]
) -> None:
    truth, predicted = (np.array([[label in row[side] for label in APPLY.labels] for row in rows]) for side in (0, 1))
    names = {APPLY.labels[label] for label in annotated}
    found = by_label(APPLY, multi_label_sums(truth, predicted, sorted(annotated)))
    assert found == counted(APPLY, [(true & names, guessed & names) for true, guessed in rows])


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.UndefinedMetricWarning")
@given(truth=st.lists(st.lists(st.sampled_from(TAGS), min_size=1, max_size=8), min_size=1, max_size=6), data=st.data())
def test_each_type_of_entity_has_the_values_of_seqeval(truth: list[list[str]], data: st.DataObject) -> None:
    predicted = [data.draw(st.lists(st.sampled_from(TAGS), min_size=len(t), max_size=len(t))) for t in truth]
    found = by_label(TAG, entity_sums(truth, predicted, TAG.entities))
    if any(entities(tags) for tags in (*truth, *predicted)):
        report = seqeval.classification_report(truth, predicted, output_dict=True, zero_division=0)
        names = {"examples": "support", "precision": "precision", "recall": "recall", "f1": "f1-score"}
        expected = {kind: {mine: report[kind][theirs] for mine, theirs in names.items()} for kind in found}
        assert report.keys() - {"micro avg", "macro avg", "weighted avg"} == found.keys()
        assert found == {kind: pytest.approx(of) for kind, of in expected.items()}
    else:
        assert found == {}


@pytest.mark.parametrize("task", [REGRESS, WRITE, SPEAK], ids=lambda task: task.task)
def test_tasks_without_labels_have_none(task: Task) -> None:
    assert by_label(task, np.ones(sums_shape(task))) == {}


def test_generated_texts_are_compared_word_by_word() -> None:
    truth = ["a red  cat", "two dogs", "", "one one two"]
    generated = ["a red cat", "two big dogs", "", "one two three"]
    found = metrics(WRITE, generation_sums(truth, generated, 8, 8 * np.log(3)))
    f1 = (1 + 2 * 2 / 5 + 1 + 2 * 2 / 6) / 4
    assert found == pytest.approx({"examples": 4, "exact-match": 0.5, "token-f1": f1, "perplexity": 3})


def test_next_tokens_give_perplexity_and_accuracy() -> None:
    sums = language_sums(2, 10, 10 * np.log(7), 4) + language_sums(1, 10, 10 * np.log(7), 1)
    assert metrics(SPEAK, sums) == pytest.approx({"examples": 3, "perplexity": 7, "token-accuracy": 0.25})
    assert np.isfinite(metrics(SPEAK, language_sums(1, 1, 1e6, 0))["perplexity"]), "JSON knows no infinity"


@pytest.mark.parametrize("task", ALL, ids=lambda task: task.task)
def test_sums_that_cannot_be_are_told_from_those_that_can(task: Task) -> None:
    good = np.ones(sums_shape(task))
    assert are_sums(task, good)
    assert metrics(task, good)["examples"] >= 1
    assert primary(task.task) in metrics(task, good)
    of_noise = good * 2**31
    wrong_form = good.astype(np.float32), good[..., :-1]
    for bad in (*wrong_form, np.zeros_like(good), good * np.nan, good * np.inf, -good, of_noise):
        assert not are_sums(task, bad)


def test_every_kind_has_a_metric() -> None:
    assert {task.task for task in ALL} == TASK_KINDS.keys()
