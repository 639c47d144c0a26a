"""The closed-form head: equal to scikit-learn's discriminant on all examples, whatever silos they lie at."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

from gramfuse_protocol.contract.head_layout import FIRST, SECOND, HeadLayout
from gramfuse_protocol.errors import ContributionError, MergeError
from gramfuse_protocol.secure_sum.scales import scales
from gramfuse_protocol.statistics.head_sums import HeadSums
from gramfuse_server.merging.closed_form_head import approximating_shrinkage, fit_head
from gramfuse_server.merging.head_checks import check_head
from gramfuse_server.merging.head_solvers import SOLVERS, quieting


class _Shrunk:
    """Our covariance, as scikit-learn asks for one."""

    def fit(self, x: np.ndarray) -> _Shrunk:
        within = np.cov(x.T, bias=True)
        shrunk = self.shrinkage * np.trace(self.whole) / len(within)
        self.covariance_ = (within + shrunk * np.eye(len(within))) / (1 + self.shrinkage)
        return self

    def __init__(self, shrinkage: float = 0.0, whole: Any = None) -> None:
        self.shrinkage = shrinkage
        self.whole = whole

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        return {"shrinkage": self.shrinkage, "whole": self.whole}

    def set_params(self, **parameters: Any) -> _Shrunk:
        return _Shrunk(**parameters)


def examples(seed: int, count: int = 400, features: int = 12, labels: int = 5) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    y = rng.choice(labels, count, p=np.arange(1, labels + 1) / sum(range(1, labels + 1)))
    mix = rng.normal(size=(features, features)) / 3
    return rng.normal(size=(labels, features))[y] + rng.normal(size=(count, features)) @ mix + 2, y


def sums_of(x: np.ndarray, y: np.ndarray, labels: int = 5) -> HeadSums:
    return HeadSums.of(x, np.eye(labels)[y])


@pytest.mark.parametrize("seed", range(5))
def test_it_is_the_discriminant_of_all_examples_together(seed: int) -> None:
    x, y = examples(seed)
    silos = np.random.default_rng(seed).integers(0, 3, len(y))
    first, *others = (sums_of(x[silos == silo], y[silos == silo]) for silo in range(3))
    total = sum(others, first)
    head = fit_head(total, prior=True)

    within = sum((y == c).mean() * np.cov(x[y == c].T, bias=True) for c in range(5))
    oracle = LinearDiscriminantAnalysis(
        solver="lsqr", covariance_estimator=_Shrunk(head.shrinkage, within), priors=np.bincount(y) / len(y)
    ).fit(x, y)
    ours = x @ head.weight.T + head.bias
    theirs = oracle.decision_function(x)
    differences = (ours - ours[:, :1]) - (theirs - theirs[:, :1])  # softmax and argmax see no common term
    assert np.abs(differences).max() < 1e-8 * np.abs(theirs).max()


@pytest.mark.parametrize("loud", [1.0, 1e2, 1e4])
def test_one_feature_that_is_much_louder_than_the_others_does_not_drown_them(loud: float) -> None:
    x, y = examples(1, count=800, features=64)
    quiet = SOLVERS["discriminant"].fit(sums_of(x, y), start=None)
    x[:, 3] *= loud
    head = SOLVERS["discriminant"].fit(sums_of(x, y), start=None)
    accuracy = float(np.mean((x @ head.weight.T + head.bias).argmax(axis=1) == y))
    x[:, 3] /= loud
    assert accuracy >= float(np.mean((x @ quiet.weight.T + quiet.bias).argmax(axis=1) == y)) - 0.01
    if loud == 1:
        plain = fit_head(sums_of(x, y), prior=True).calibrated
        assert np.allclose(plain.weight, head.weight)


def test_labels_without_examples_are_never_predicted_and_others_are_as_without_them() -> None:
    x, y = examples(3)
    lacking = fit_head(sums_of(x, y, labels=7), prior=True)
    whole = fit_head(sums_of(x, y), prior=True)
    assert lacking.absent == (5, 6)
    assert np.array_equal(lacking.weight[:5], whole.weight)
    assert not lacking.weight[5:].any()
    assert (x @ lacking.weight.T + lacking.bias).argmax(axis=1).max() <= 4


def test_without_prior_a_rare_label_counts_as_much_as_a_frequent_one() -> None:
    x, y = examples(4)
    with_prior, without = fit_head(sums_of(x, y), prior=True), fit_head(sums_of(x, y), prior=False)
    assert np.array_equal(with_prior.weight, without.weight)
    assert np.allclose(with_prior.bias - without.bias, np.log(np.bincount(y) / len(y)))


def test_it_is_surer_with_more_examples_and_less_sure_with_more_labels() -> None:
    x, y = examples(7, count=4000)
    heads = [fit_head(sums_of(x[:n], y[:n]), prior=True) for n in (100, 400, 4000)]
    assert 0 < heads[0].certainty < heads[1].certainty < heads[2].certainty < 1
    whole, few = heads[2], fit_head(sums_of(x[y < 2], y[y < 2], 2), prior=True)
    assert (1 / whole.certainty - 1) * 4000 / 5 == pytest.approx((1 / few.certainty - 1) * (y < 2).sum() / 2, rel=0.1)
    assert np.array_equal(whole.calibrated.weight, whole.certainty * whole.weight)


def test_shrinkage_falls_with_examples_and_is_bounded() -> None:
    covariance = np.diag(np.arange(1.0, 9.0))
    few, many = approximating_shrinkage(covariance, 10), approximating_shrinkage(covariance, 10_000)
    assert 0 < many < few
    assert approximating_shrinkage(np.eye(4), 100) == 1e6


def test_what_gives_no_head_is_refused() -> None:
    x, y = examples(6)
    with pytest.raises(MergeError):
        fit_head(sums_of(x[y == 0], y[y == 0]), prior=True)
    with pytest.raises(MergeError):
        fit_head(sums_of(np.ones_like(x), y), prior=True)
    with pytest.raises(ContributionError):
        _ = sums_of(x, y) + sums_of(x[:, :3], y)


@pytest.mark.parametrize("quiet", [0.0, 1e-12, 1e-8, 1e-6, 1e-4])
@pytest.mark.parametrize("silos", [3, 100])
def test_a_feature_that_is_quieter_than_on_public_data_is_no_bad_sum(quiet: float, silos: int) -> None:
    x, y = examples(3)
    x[:, 0] = quiet * (1 + 0.1 * (np.arange(len(x)) == 7))
    head = HeadLayout(fit="discriminant", weight="w", bias="b", features=12, outputs=5, columns=5, exponents=(1,) * 12)
    exact = sums_of(x, y)
    (_, scale), _ = scales(head, silos, "uniform")
    packed = head.packing.pack([exact.second[None]])
    off = np.random.default_rng(1).integers(-silos, silos + 1, packed.shape)  # what each silo's rounding adds
    blocks = {SECOND: np.rint(packed * scale + off) / scale, FIRST: exact.first}
    rounded = HeadSums.read(head, blocks.__getitem__)
    for sums in (exact, rounded):
        assert [check for check in check_head(sums, head, silos, secure=True) if check.verdict == "bad"] == []
    solver = SOLVERS["discriminant"]
    open_head, secure_head = (solver.fit(sums, start=None) for sums in (exact, rounded))
    difference = np.abs(secure_head.weight - open_head.weight).max()
    assert difference <= 1e-6 * np.abs(open_head.weight).max()


def test_sums_of_no_examples_are_bad_or_refused_and_never_break_down() -> None:
    x, y = examples(3)
    head = HeadLayout(fit="discriminant", weight="w", bias="b", features=12, outputs=5, columns=5, exponents=(1,) * 12)
    second = sums_of(x, y).second
    for size in (1e4, 1e150, 1e300):
        wrong = second.copy()
        wrong[0, 0] = wrong[1, 1] = -size
        wrong[0, 1] = wrong[1, 0] = size
        sums = HeadSums(wrong, sums_of(x, y).first)
        assert "bad" in {check.verdict for check in check_head(sums, head, 3, secure=False)}
    singular = HeadSums(np.zeros_like(second), np.zeros_like(sums_of(x, y).first))
    with pytest.raises(MergeError):
        SOLVERS["discriminant"].fit(singular, start=None)


@pytest.mark.parametrize("constant", [0.0, 0.7, 5.0, 100.0])
def test_constant_features_do_not_count_as_varying(constant: float) -> None:
    x, y = examples(4)
    more = np.concatenate([x, np.full((len(x), 40), constant)], axis=1)
    assert quieting(sums_of(more, y)).min() > 0.5
    head = SOLVERS["discriminant"].fit(sums_of(more, y), start=None)
    assert (np.argmax(more @ head.weight.T + head.bias, axis=1) == y).mean() > 0.8


def test_examples_that_are_all_the_same_within_labels_have_no_head() -> None:
    x, y = examples(5)
    first = np.array([np.flatnonzero(y == label)[0] for label in range(5)])
    with pytest.raises(MergeError, match="vary"):
        SOLVERS["discriminant"].fit(sums_of(np.repeat(x[first], 3, axis=0) + 0.3, np.repeat(y[first], 3)), start=None)
