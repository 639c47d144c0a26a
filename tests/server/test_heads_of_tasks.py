"""Heads in closed form of a regression and of several labels: equal to scikit-learn's on all examples together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from sklearn.covariance import OAS
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import Ridge

from gramfuse_protocol.contract.task import Task
from gramfuse_protocol.errors import MergeError
from gramfuse_protocol.statistics.head_sums import HeadSums
from gramfuse_protocol.tasks.registry import kind_of
from gramfuse_server.merging.closed_form_head import without_bias
from gramfuse_server.merging.head_solvers import SOLVERS
from gramfuse_server.merging.label_heads import fit_labels
from gramfuse_server.merging.ridge_head import fit_ridge

NUMBERS = Task(task="regression", centre=3.0, scale=2.0)
LABELS = Task(task="multi-label", labels=("a", "b", "c", "d"))


def sums_of(task: Task, x: np.ndarray, y: np.ndarray, silos: np.ndarray | None = None) -> HeadSums:
    """The sums over all examples, silo by silo."""
    silos = np.zeros(len(x), int) if silos is None else silos
    parts = [HeadSums.of(x[silos == n], kind_of(task).targets(task, y[silos == n])) for n in np.unique(silos)]
    return sum(parts[1:], parts[0])


def features(rng: np.random.Generator, count: int = 400, width: int = 12) -> np.ndarray:
    return rng.normal(size=(count, width)) @ rng.normal(size=(width, width)) / 2 + rng.normal(size=width)


def sets_of_labels(rng: np.random.Generator, x: np.ndarray) -> np.ndarray:
    """Which of four labels apply, from frequent to rare."""
    towards = rng.normal(size=(x.shape[1], 4)) / 3
    noisy = (x - x.mean(axis=0)) @ towards + rng.normal(size=(len(x), 4))
    return (noisy > np.quantile(noisy, [0.4, 0.6, 0.8, 0.95], axis=0).diagonal()).astype(float)


@pytest.mark.parametrize("seed", range(3))
def test_a_regression_is_the_ridge_of_all_examples_together(seed: int) -> None:
    rng = np.random.default_rng(seed)
    x = features(rng)
    y = x @ rng.normal(size=12) + rng.normal(size=400) + 5
    sums = sums_of(NUMBERS, x, y, rng.integers(0, 3, 400))
    head = fit_ridge(sums)
    covariance = np.cov(x.T, bias=True)
    found = head.shrinkage / (1 + head.shrinkage)
    assert found == pytest.approx(OAS().fit(x).shrinkage_, rel=0.1)  # scikit-learn leaves out the 2/p
    strength = head.shrinkage * np.trace(covariance) / 12
    oracle = Ridge(alpha=strength * 400, solver="cholesky").fit(x, y)
    assert np.allclose(x @ head.weight[0] + head.bias[0], oracle.predict(x), rtol=1e-9, atol=1e-9)
    assert (x @ head.weight[0] + head.bias[0]).mean() == pytest.approx(y.mean())


def test_the_mean_of_targets_is_kept_however_strong_the_shrinkage() -> None:
    rng = np.random.default_rng(4)
    x, y = features(rng, count=6, width=40), rng.normal(size=6) + 100
    head = fit_ridge(sums_of(NUMBERS, x, y))
    assert head.shrinkage > 0.1
    assert (x @ head.weight[0] + head.bias[0]).mean() == pytest.approx(y.mean())


class _Shrunk:
    """A label's own covariance with our shrinkage, as scikit-learn asks for one."""

    def __init__(self, added: float = 0.0) -> None:
        self.added = added

    def fit(self, x: np.ndarray) -> _Shrunk:
        self.covariance_ = np.cov(x.T, bias=True) + self.added * np.eye(x.shape[1])
        return self

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        return {"added": self.added}

    def set_params(self, **parameters: Any) -> _Shrunk:
        return _Shrunk(**parameters)


@pytest.mark.parametrize("seed", range(3))
def test_each_label_is_the_discriminant_of_those_that_have_it_and_those_that_do_not(seed: int) -> None:
    rng = np.random.default_rng(seed)
    x = features(rng)
    y = sets_of_labels(rng, x)
    head = fit_labels(sums_of(LABELS, x, y, rng.integers(0, 3, 400)), start=None)
    added = head.shrinkage * np.trace(np.cov(x.T, bias=True)) / 12
    for label in range(4):
        oracle = LinearDiscriminantAnalysis(
            solver="lsqr", covariance_estimator=_Shrunk(added), priors=np.bincount(y[:, label].astype(int)) / 400
        ).fit(x, y[:, label])
        assert np.allclose(x @ head.weight[label] + head.bias[label], oracle.decision_function(x), atol=1e-8), label


def test_a_label_that_some_silos_do_not_annotate_is_fitted_to_the_examples_of_the_others() -> None:
    rng = np.random.default_rng(8)
    x = features(rng, count=9000)
    y, silos = sets_of_labels(rng, x), rng.integers(0, 3, 9000)
    whole = fit_labels(sums_of(LABELS, x, y, silos), start=None)
    y[np.ix_(silos == 2, [1, 3])] = np.nan
    masked = fit_labels(sums_of(LABELS, x, y, silos), start=None)
    assert np.allclose(masked.weight[[0, 2]], whole.weight[[0, 2]])  # no other label is touched
    for label in (1, 3):
        groups = [y[:, label] == 1, y[:, label] == 0, np.isnan(y[:, label])]
        within = sum(group.mean() * np.cov(x[group].T, bias=True) for group in groups)
        shrunk = within + masked.shrinkage * np.trace(np.cov(x.T, bias=True)) / 12 * np.eye(12)
        one, other = (x[group].mean(axis=0) for group in groups[:2])
        direction = np.linalg.solve(shrunk, one - other)
        prior = np.log(groups[0].sum() / groups[1].sum())
        assert np.allclose(masked.weight[label], direction)
        assert masked.bias[label] == pytest.approx(prior - (one + other) @ direction / 2)
        assert np.corrcoef(x @ direction, x @ whole.weight[label])[0, 1] > 0.98


def test_probabilities_are_those_by_which_labels_occur() -> None:
    """The threshold is one on them: so the prior is in the bias."""
    rng = np.random.default_rng(3)
    y = (rng.random((20_000, 1)) < 0.1).astype(float)
    x = rng.normal(size=(20_000, 6)) + 1.5 * y
    head = fit_labels(sums_of(Task(task="multi-label", labels=("a",)), x, y), start=None)
    probability = 1 / (1 + np.exp(-(x @ head.weight[0] + head.bias[0])))
    for low in (0.05, 0.3, 0.6):
        some = (probability > low) & (probability < low + 0.2)
        assert y[some].mean() == pytest.approx(probability[some].mean(), abs=0.05)


def test_training_starts_from_how_often_each_label_occurs() -> None:
    rng = np.random.default_rng(5)
    x = features(rng)
    y = sets_of_labels(rng, x)
    head, whole = (fit_labels(sums_of(LABELS, x, y), start=start) for start in (0.2, None))
    share = y.mean(axis=0)
    assert np.allclose(x.mean(axis=0) @ head.weight.T + head.bias, np.log(share / (1 - share)))
    assert np.allclose(head.weight, 0.2 * whole.weight)


def test_a_label_that_no_example_has_or_every_one_says_so_whatever_the_features() -> None:
    rng = np.random.default_rng(6)
    x = features(rng)
    y = sets_of_labels(rng, x)
    y[:, 1], y[:, 2] = 0, 1
    head = fit_labels(sums_of(LABELS, x, y), start=None)
    assert head.absent == (1, 2)
    assert not head.weight[[1, 2]].any()
    assert head.bias[1] == pytest.approx(np.log(0.5 / 400.5))
    assert head.bias[2] == pytest.approx(np.log(400.5 / 0.5))
    assert np.isfinite(head.weight).all()


@pytest.mark.parametrize("fit", ["ridge", "labels"])
def test_a_layer_without_bias_gives_nearly_the_same_outputs(fit: str) -> None:
    rng = np.random.default_rng(7)
    x = np.concatenate([features(rng), 1 + 1e-3 * rng.normal(size=(400, 1))], axis=1)
    task, y = (NUMBERS, x[:, 0] + 7) if fit == "ridge" else (LABELS, sets_of_labels(rng, x))
    sums, solver = sums_of(task, x, y), SOLVERS[fit]
    head = solver.fit(sums, start=None)
    bare = without_bias(head, sums, relative=solver.relative)
    assert not bare.bias.any()
    outputs = x @ head.weight.T + head.bias
    assert np.abs(x @ bare.weight.T - outputs).max() < 0.05 * np.abs(outputs).max()


def _scaled(sums: HeadSums, column: int, factor: float) -> HeadSums:
    first = sums.first.copy()
    first[:-1, column] *= factor
    return HeadSums(sums.second, first)


def test_what_gives_no_head_is_refused() -> None:
    rng = np.random.default_rng(9)
    x = features(rng)
    y = sets_of_labels(rng, x)
    ones = np.ones_like(x)
    nowhere = y.copy()
    nowhere[:, 2] = np.nan
    cases: Sequence[tuple[str, Callable[[], Any]]] = (
        ("vary", lambda: fit_ridge(sums_of(NUMBERS, ones, y[:, 0]))),
        ("two examples", lambda: fit_ridge(sums_of(NUMBERS, x[:1], y[:1, 0]))),
        ("vary", lambda: fit_labels(sums_of(LABELS, ones, y), start=None)),
        ("label 2", lambda: fit_labels(sums_of(LABELS, x, nowhere), start=None)),
        ("of no examples", lambda: fit_labels(_scaled(sums_of(LABELS, x, y), 0, 1e3), start=None)),
    )
    for words, attempt in cases:
        with pytest.raises(MergeError, match=words):
            attempt()


def test_more_examples_of_a_label_than_annotated_ones_are_a_bad_check() -> None:
    rng = np.random.default_rng(10)
    x = features(rng)
    sums = sums_of(LABELS, x, sets_of_labels(rng, x))
    assert {check.verdict for check in SOLVERS["labels"].checks(sums)} == {"ok"}
    first = sums.first.copy()
    first[-1, 3] = 401
    verdicts = [check.verdict for check in SOLVERS["labels"].checks(HeadSums(sums.second, first))]
    assert "bad" in verdicts
