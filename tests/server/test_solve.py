"""The solver against numpy, and what it does with Gram matrices that no textbook would accept."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from gramfuse_protocol.contract.layout import Group, Linear
from gramfuse_server.merging.solve import Step, solve

OUT = 3


def a_group(d: int, structure: str = "full") -> Group:
    return Group(name="g", d_in=d, structure=structure, weights=(Linear(weight="w", d_out=OUT, transposed=False),))


def run(group: Group, s: np.ndarray, t: np.ndarray, mean: np.ndarray) -> tuple[np.ndarray, Step]:
    """Solve with S given as a whole matrix; what lies outside the blocks is not looked at."""
    parts = [
        np.stack([s[i : i + width, i : i + width] for i in range(first, first + count * width, width)])
        for first, count, width in group.blocks.parts
    ]
    solution, step = solve(group, group.blocks.pack(parts), torch.from_numpy(t), torch.from_numpy(mean))
    return solution.numpy(), step


def spd(rng: np.random.Generator, d: int) -> np.ndarray:
    x = rng.standard_normal((4 * d, d))
    return x.T @ x / (4 * d)


def rotated(rng: np.random.Generator, eigenvalues: np.ndarray) -> np.ndarray:
    q, _ = np.linalg.qr(rng.standard_normal((len(eigenvalues), len(eigenvalues))))
    return (q * eigenvalues) @ q.T


def test_a_well_conditioned_system_is_solved_exactly_and_reported_clean() -> None:
    rng = np.random.default_rng(1)
    s, t, mean = spd(rng, 20), rng.standard_normal((20, OUT)), rng.standard_normal((20, OUT))
    solution, step = run(a_group(20), s, t, mean)
    np.testing.assert_allclose(solution, np.linalg.solve(s, t), rtol=1e-10, atol=1e-12)
    assert (step.group, step.outcome, step.jitter, step.dead_features, step.mean_blocks, step.blocks) == (
        "g",
        "clean",
        0.0,
        0,
        0,
        1,
    )


def test_features_of_very_different_size_need_no_ridge() -> None:
    rng = np.random.default_rng(2)
    scale = 10.0 ** rng.uniform(-9, 9, 20)
    s, truth = spd(rng, 20), rng.standard_normal((20, OUT))
    solution, step = run(
        a_group(20), s * scale * scale[:, None], scale[:, None] * (s @ truth), np.zeros_like(truth)
    )  # (D S D) (D⁻¹ x) = D S x
    np.testing.assert_allclose(solution * scale[:, None], truth, rtol=1e-8)
    assert step.outcome == "clean"


@pytest.mark.parametrize("condition", [1e12, 1e15])
def test_a_condition_beyond_float32_takes_a_named_ridge_and_still_fits_what_the_data_say(condition: float) -> None:
    rng = np.random.default_rng(3)
    d = 24
    s, truth = rotated(rng, np.geomspace(1, 1 / condition, d)), rng.standard_normal((d, OUT))
    t = s @ truth
    solution, step = run(a_group(d), s, t, np.zeros((d, OUT)))
    assert np.isfinite(solution).all()
    assert step.outcome == "jitter"
    assert 0 < step.jitter <= 1e-4
    assert step.mean_blocks == 0
    np.testing.assert_allclose(s @ solution, t, atol=1e-4 * np.abs(t).max())


def test_fewer_tokens_than_features_fits_the_tokens_and_takes_the_mean_elsewhere() -> None:
    rng = np.random.default_rng(4)
    d, n = 30, 8
    x = rng.standard_normal((n, d))
    s, truth, mean = x.T @ x / n, rng.standard_normal((d, OUT)), rng.standard_normal((d, OUT))
    solution, step = run(a_group(d), s, s @ truth, mean)
    assert step.outcome == "jitter"
    np.testing.assert_allclose(x @ solution, x @ truth, atol=1e-3)
    # Of all that fit the tokens, the solution is the one closest to the mean, each feature measured by its own size.
    root = np.sqrt(np.diag(s))[:, None]
    closest = mean + np.linalg.pinv(x / root.T) @ (x @ (truth - mean)) / root
    np.testing.assert_allclose(solution, closest, atol=1e-3)


def test_a_singular_system_of_equal_silos_gives_back_their_weights() -> None:
    rng = np.random.default_rng(5)
    x, delta = rng.standard_normal((5, 16)), rng.standard_normal((16, OUT))
    s = x.T @ x
    solution, _ = run(a_group(16), s, s @ delta, delta)
    np.testing.assert_allclose(solution, delta, rtol=1e-7)


def test_a_direction_lost_in_float32_rounding_does_not_push_weights_away_from_all_silos() -> None:
    # Centred features, as behind a LayerNorm: their sum is zero on every token, and rounding is all that the
    # float32 Gram matrices hold in that direction.
    rng = np.random.default_rng(6)
    d, silos, direction = 96, 4, np.full(96, 96**-0.5)
    deltas, grams = [], []
    for _ in range(silos):
        x = rng.standard_normal((1000, d)) * np.exp(rng.standard_normal(d) / 2) + rng.standard_normal(d) / 3
        x -= x.mean(axis=1, keepdims=True)
        x /= x.std(axis=1, keepdims=True)
        grams.append((x.T @ x / len(x)).astype(np.float32).astype(np.float64))
        deltas.append(rng.standard_normal((d, OUT)))
    mean = sum(deltas) / silos
    solution, _ = run(a_group(d), sum(grams), sum(g @ w for g, w in zip(grams, deltas, strict=True)), mean)
    farthest = max(np.linalg.norm(direction @ (w - mean)) for w in deltas)
    assert np.linalg.norm(direction @ (solution - mean)) <= farthest


def test_a_singular_system_is_visible_in_the_report() -> None:
    rng = np.random.default_rng(7)
    x = rng.standard_normal((5, 16))
    _, step = run(a_group(16), x.T @ x, np.zeros((16, OUT)), np.zeros((16, OUT)))
    assert step.smallest_eigenvalue < 1e-6, "the ridge hides how little the statistics hold"


def test_a_feature_that_is_always_zero_takes_the_mean_and_changes_no_other_row() -> None:
    rng = np.random.default_rng(8)
    d, dead = 12, 5
    alive = np.delete(np.arange(d), dead)
    s, t, mean = spd(rng, d), rng.standard_normal((d, OUT)), rng.standard_normal((d, OUT))
    s[dead, :] = s[:, dead] = t[dead] = 0
    solution, step = run(a_group(d), s, t, mean)
    np.testing.assert_array_equal(solution[dead], mean[dead])
    np.testing.assert_allclose(
        solution[alive], np.linalg.solve(s[np.ix_(alive, alive)], t[alive]), rtol=1e-10, atol=1e-12
    )
    assert (step.outcome, step.dead_features, step.mean_blocks) == ("clean", 1, 0)


def test_no_token_anywhere_gives_the_mean_and_is_named_empty() -> None:
    mean = np.random.default_rng(9).standard_normal((10, OUT))
    for structure in ("full", "block:4", "diagonal"):
        solution, step = run(a_group(10, structure), np.zeros((10, 10)), np.zeros((10, OUT)), mean)
        np.testing.assert_array_equal(solution, mean)
        assert (step.outcome, step.dead_features) == ("empty", 10)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", ["an entry", "the diagonal", "everywhere", "the right-hand side"])
def test_what_is_not_finite_gives_the_mean_and_is_named_so(bad: float, where: str) -> None:
    rng = np.random.default_rng(10)
    s, t, mean = spd(rng, 8), rng.standard_normal((8, OUT)), rng.standard_normal((8, OUT))
    if where == "an entry":
        s[2, 3] = s[3, 2] = bad
    elif where == "the diagonal":
        s[3, 3] = bad
    elif where == "everywhere":
        s[:] = bad
    else:
        t[3, 1] = bad
    solution, step = run(a_group(8), s, t, mean)
    np.testing.assert_array_equal(solution, mean)
    assert (step.outcome, step.mean_blocks, step.dead_features) == ("mean", 1, 0)


def test_a_matrix_that_no_ridge_makes_definite_gives_the_mean() -> None:
    rng = np.random.default_rng(11)
    s, mean = np.eye(6), rng.standard_normal((6, OUT))
    s[0, 1] = s[1, 0] = 2.0
    solution, step = run(a_group(6), s, rng.standard_normal((6, OUT)), mean)
    np.testing.assert_array_equal(solution, mean)
    assert (step.outcome, step.mean_blocks) == ("mean", 1)


def test_a_bad_block_costs_no_other_block_anything() -> None:
    # Blocks of 4, 4, 4 and a rest of 2: not finite, clean, singular, clean.
    rng = np.random.default_rng(12)
    group = a_group(14, "block:4")
    s, t, mean = spd(rng, 14), rng.standard_normal((14, OUT)), rng.standard_normal((14, OUT))
    s[1, 1] = np.nan
    x = rng.standard_normal((2, 4))
    s[8:12, 8:12] = x.T @ x
    t[8:12] = s[8:12, 8:12] @ rng.standard_normal((4, OUT))
    solution, step = run(group, s, t, mean)
    np.testing.assert_array_equal(solution[:4], mean[:4])
    for rows in (slice(4, 8), slice(12, 14)):
        np.testing.assert_allclose(solution[rows], np.linalg.solve(s[rows, rows], t[rows]), rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(s[8:12, 8:12] @ solution[8:12], t[8:12], atol=1e-4)
    assert (step.outcome, step.mean_blocks, step.blocks, step.dead_features) == ("mean", 1, 4, 0)
    assert step.jitter > 0


@pytest.mark.parametrize("structure", ["full", "block:5", "diagonal"])
def test_nothing_learned_stays_exactly_nothing_even_when_singular(structure: str) -> None:
    x = np.random.default_rng(13).standard_normal((3, 12))
    solution, _ = run(a_group(12, structure), x.T @ x, np.zeros((12, OUT)), np.zeros((12, OUT)))
    np.testing.assert_array_equal(solution, 0)
