"""Other merges than RegMean, against the papers' formulas written element by element."""

from __future__ import annotations

import math

import numpy as np
import pytest

from gramfuse_server.merging.methods.arithmetic import weighted_mean
from gramfuse_server.merging.methods.fisher import fisher_mean, normalised
from gramfuse_server.merging.methods.task_arithmetic import task_arithmetic
from gramfuse_server.merging.methods.ties import ties

RNG = np.random.default_rng(3)
SHAPES = {"w": (4, 5), "b": (4,)}
SILOS = 3


def drawn(scale: float = 1.0) -> list[dict[str, np.ndarray]]:
    return [{n: (scale * RNG.standard_normal(s)).astype(np.float32) for n, s in SHAPES.items()} for _ in range(SILOS)]


DIFFERENCES = drawn()
FISHERS = [{name: np.abs(values) for name, values in fisher.items()} for fisher in drawn()]
WEIGHTS = [{name: np.array(c) for name in SHAPES} for c in (1.0, 2.0, 5.0)]


def flat(one: dict[str, np.ndarray]) -> list[float]:
    return [float(value) for name in SHAPES for value in one[name].ravel()]


def test_weighted_mean_is_the_mean_by_hand_and_a_row_without_a_silo_stays() -> None:
    expected = [
        sum(c * v for c, v in zip((1, 2, 5), column, strict=True)) / 8
        for column in zip(*map(flat, DIFFERENCES), strict=True)
    ]
    np.testing.assert_allclose(flat(weighted_mean(DIFFERENCES, WEIGHTS)), expected, rtol=1e-14)

    # Row 0 of the weight is the third silo's alone, row 1 is nobody's.
    rows = [np.array([0.0, 0, 2, 2]), np.array([0.0, 0, 1, 1]), np.array([3.0, 0, 1, 1])]
    parted = [{"w": row.reshape(-1, 1), "b": row} for row in rows]
    merged = weighted_mean(DIFFERENCES, parted)["w"]
    np.testing.assert_allclose(merged[0], DIFFERENCES[2]["w"][0])
    np.testing.assert_array_equal(merged[1], np.zeros(5))


def test_fisher_mean_is_equation_4_and_falls_back_to_the_mean() -> None:
    merged = fisher_mean(DIFFERENCES, FISHERS, WEIGHTS)
    for value, deltas, fishers in zip(
        flat(merged), zip(*map(flat, DIFFERENCES), strict=True), zip(*map(flat, FISHERS), strict=True), strict=True
    ):
        weighted = [c * f for c, f in zip((1, 2, 5), fishers, strict=True)]
        exact = sum(w * d for w, d in zip(weighted, deltas, strict=True)) / sum(weighted)
        assert value == pytest.approx(exact, abs=1e-3)  # the floor moves it by a millionth of the mean Fisher value
    nothing = [{name: np.zeros(shape) for name, shape in SHAPES.items()}] * SILOS
    np.testing.assert_allclose(
        flat(fisher_mean(DIFFERENCES, nothing, WEIGHTS)), flat(weighted_mean(DIFFERENCES, WEIGHTS)), rtol=1e-12
    )


@pytest.mark.parametrize("norm", ["per tensor", "per model", "none"])
def test_normalised_divides_by_the_norm_that_it_says(norm: str) -> None:
    fisher = {"w": np.array([[3.0, 4.0]]), "b": np.array([12.0]), "unused": np.zeros(2)}
    divisor = {"per tensor": {"w": 5, "b": 12}, "per model": {"w": 13, "b": 13}, "none": {"w": 1, "b": 1}}[norm]
    found = normalised(fisher, norm)  # type: ignore[arg-type]
    assert found["w"].tolist() == [[3 / divisor["w"], 4 / divisor["w"]]]
    assert found["b"].tolist() == [12 / divisor["b"]]
    assert found["unused"].tolist() == [0, 0]


def test_task_arithmetic_adds_scaled_differences() -> None:
    expected = [0.3 * math.fsum(column) for column in zip(*map(flat, DIFFERENCES), strict=True)]
    np.testing.assert_allclose(flat(task_arithmetic(DIFFERENCES)), expected, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("density", [0.2, 0.5, 1.0])
def test_ties_trims_elects_and_averages_as_algorithm_1_says(density: float) -> None:
    trimmed = []
    for difference in DIFFERENCES:
        values = flat(difference)
        kept = sorted(values, key=abs, reverse=True)[: round(density * len(values))]
        trimmed.append([value if value in kept else 0.0 for value in values])
    expected = []
    for column in zip(*trimmed, strict=True):
        positive, negative = sum(v for v in column if v > 0), -sum(v for v in column if v < 0)
        agreeing = [v for v in column if (v > 0 and positive > negative) or (v < 0 and negative > positive)]
        expected.append(sum(agreeing) / len(agreeing) if agreeing else 0.0)
    np.testing.assert_allclose(flat(ties(DIFFERENCES, density)), expected, rtol=1e-13)
