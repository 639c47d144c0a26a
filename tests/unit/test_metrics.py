"""Metrics from sums, against scikit-learn, numpy and scipy on the predictions themselves."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import pearsonr
from sklearn.metrics import accuracy_score, f1_score

from gramfuse_protocol.metrics import classification_sums, metrics, regression_sums, sums_shape

LABELS = 6
PAIRS = st.lists(st.tuples(st.integers(0, LABELS - 1), st.integers(0, LABELS - 1)), min_size=1, max_size=40)


@given(pairs=PAIRS)
def test_accuracy_and_macro_f1_are_those_of_scikit_learn(pairs: list[tuple[int, int]]) -> None:
    truth, predicted = np.array(pairs).T
    found = metrics(classification_sums(truth, predicted, LABELS))
    assert found["examples"] == len(pairs)
    assert found["accuracy"] == pytest.approx(accuracy_score(truth, predicted), rel=1e-14)
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
    found = metrics(classification_sums(np.array(truth), np.array(predicted), LABELS))
    assert (found["accuracy"], found["macro-f1"]) == pytest.approx(expected)


def test_rows_are_the_truth_and_columns_the_prediction() -> None:
    sums = classification_sums(np.array([0, 0, 0, 1]), np.array([1, 1, 0, 1]), 3)
    np.testing.assert_array_equal(sums, [[1, 2, 0], [0, 1, 0], [0, 0, 0]])
    assert sums.shape == sums_shape(3)
    assert sums.dtype == np.float64


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
    found = metrics(regression_sums(truth, predicted))
    assert found["examples"] == truth.size
    assert found["pearson"] == pytest.approx(pearsonr(truth, predicted).statistic, abs=1e-6)
    assert found["rmse"] == pytest.approx(np.sqrt(np.mean((truth - predicted) ** 2)), rel=1e-6)
    assert found["mae"] == pytest.approx(np.mean(np.abs(truth - predicted)), rel=1e-9)


def test_an_opposite_prediction_has_a_negative_correlation() -> None:
    truth, _ = _regression(3, 1, 0)
    assert metrics(regression_sums(truth, 5 - 2 * truth))["pearson"] == pytest.approx(-1)


@pytest.mark.parametrize("offset", [0, 1, 100, 1000, 12345.6789])
@pytest.mark.parametrize("sign", [1, -1])
def test_a_correlation_never_leaves_its_range(offset: float, sign: int) -> None:
    truth, _ = _regression(offset, 1, 0)
    found = metrics(regression_sums(truth, sign * (truth + 0.3)))["pearson"]
    assert -1 <= found <= 1
    assert found == pytest.approx(sign, abs=1e-6)


def test_sums_in_float32_predictions_are_added_in_float64() -> None:
    truth = np.full(2**14, 4097, np.float32)
    found = metrics(regression_sums(truth, truth + 1))
    assert (found["rmse"], found["mae"]) == (1, 1)


@pytest.mark.parametrize("constant", [0.0, 1.0, 0.1, 0.7, 1 / 3, 3.3, 1e6 + 0.1, -2.2])
@pytest.mark.parametrize("n", [1, 2, 7, 100, 1000])
def test_the_correlation_with_a_side_without_variance_is_zero(constant: float, n: int) -> None:
    varied, same = 0.37 * np.arange(n), np.full(n, constant)
    for truth, predicted in ((varied, same), (same, varied), (same, same), (same, varied * 1e-3 + 5)):
        assert metrics(regression_sums(truth, predicted))["pearson"] == 0


@given(pairs=PAIRS, cuts=st.lists(st.integers(0, 40), max_size=3))
def test_sums_of_several_silos_add_up_to_those_of_all_examples(pairs: list[tuple[int, int]], cuts: list[int]) -> None:
    truth, predicted = np.array(pairs).T
    silos = list(zip(np.split(truth, sorted(cuts)), np.split(predicted, sorted(cuts)), strict=True))
    joint = sum(classification_sums(t, p, LABELS) for t, p in silos)
    np.testing.assert_array_equal(joint, classification_sums(truth, predicted, LABELS))

    t, p = truth * 0.3 - 1, predicted * 0.7
    moments = sum(regression_sums(a * 0.3 - 1, b * 0.7) for a, b in silos)
    assert moments.shape == sums_shape(0) == regression_sums(t, p).shape
    np.testing.assert_allclose(moments, regression_sums(t, p), rtol=1e-12, atol=1e-12)


def test_the_joint_metric_is_not_the_mean_of_the_silos() -> None:
    rare = classification_sums(np.array([0]), np.array([1]), 2)
    common = classification_sums(np.array([0] * 9), np.array([0] * 9), 2)
    assert metrics(rare + common)["accuracy"] == 0.9
