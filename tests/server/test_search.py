"""Searches over merges against brute force, with a score that is known: nearness to a given model."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from gramfuse_protocol.contract.layout import Group, Layout, Linear, Tensor
from gramfuse_protocol.contract.plan import Plan
from gramfuse_protocol.errors import ContributionError
from gramfuse_protocol.statistics.contribution import Statistics
from gramfuse_protocol.tasks.classification import CALIBRATION
from gramfuse_server.merging.accumulator import Accumulator, Deltas
from gramfuse_server.merging.search import (
    Judgement,
    Trials,
    best,
    given_order,
    greedy_order,
    leave_one_out,
    search_weights,
    sweep,
)
from gramfuse_simulation.tuning import Wanted, judgement_of, search

ALPHAS = tuple(n / 10 for n in range(11))
NAMES = ("north", "east", "south", "west")
LAYOUT = Layout(
    groups=(
        Group(
            name="linear",
            d_in=6,
            structure="full",
            weights=(Linear(weight="linear.weight", d_out=3, transposed=True),),
        ),
    ),
    tensors=(
        Tensor(name="linear.weight", shape=(3, 6), merge="regmean"),
        Tensor(name="linear.bias", shape=(3,), merge="mean"),
    ),
    frozen=(),
)


def silos(count: int, seed: int = 1, only_east: int | None = None) -> dict[str, Statistics]:
    """Silos that learned different things from inputs that are correlated in different ways.

    Args:
        only_east: a feature that is zero at all silos but east.
    """
    rng = np.random.default_rng(seed)
    found = {}
    for silo in NAMES[:count]:
        x = rng.standard_normal((40, 6)) @ rng.standard_normal((6, 6))
        if only_east is not None and silo != "east":
            x[:, only_east] = 0
        blocks = {
            "gram:linear": LAYOUT.groups[0].blocks.pack([(x.T @ x / 40)[None]]).astype(np.float32),
            "delta:linear.weight": rng.standard_normal((3, 6)).astype(np.float32),
            "delta:linear.bias": rng.standard_normal(3).astype(np.float32),
        }
        found[silo] = Statistics(int(rng.integers(10, 100)), {"linear": 40}, blocks)
    return found


def distance(one: Deltas, other: Deltas) -> float:
    return sum(float(((one[name] - other[name]) ** 2).sum()) for name in one)


class Nearness:
    """Scores a merge by how near it is to a target; counts how often it is asked."""

    def __init__(self, target: Deltas) -> None:
        self.target = target
        self.asked = 0

    def __call__(self, deltas: Deltas) -> Judgement:
        self.asked += 1
        return Judgement(-distance(deltas, self.target), {"squared": distance(deltas, self.target)})


def merged(found: Mapping[str, Statistics], alpha: float, weights: Mapping[str, float]) -> Deltas:
    """The merge with the weights as copies of whole silos, which need no explicit weight."""
    accumulator = Accumulator(LAYOUT, alpha=alpha)
    for silo, weight in weights.items():
        for _ in range(round(16 * weight)):
            accumulator.fold(found[silo], silo)
    return accumulator.merge().deltas


def test_a_weight_counts_as_copies_of_the_silo_and_a_share_of_minus_one_takes_it_out() -> None:
    found = silos(4)
    weights = {"north": 1.0, "east": 0.25, "south": 0.5, "west": 1.0}
    trials = Trials(LAYOUT, found, Nearness(merged(found, 0.7, weights)))
    assert trials.measure(0.7, weights).score == pytest.approx(0, abs=1e-18)

    accumulator = Accumulator(LAYOUT, alpha=0.7, weighting="examples")
    for silo, statistics in found.items():
        accumulator.fold(statistics, silo)
    accumulator.fold(found["east"], "east", share=-1)
    trials = Trials(LAYOUT, found, Nearness({}), weighting="examples")
    without = trials.sum(0.7, {silo: 1.0 for silo in NAMES if silo != "east"}).merge()
    for name, delta in accumulator.merge().deltas.items():
        np.testing.assert_allclose(delta, without.deltas[name], rtol=1e-10, atol=1e-12)


def test_a_sweep_finds_the_alpha_that_was_hidden_in_two_passes() -> None:
    found = silos(3)
    hidden = merged(found, 0.3, dict.fromkeys(found, 1 / 16))
    told: list[float] = []
    trials = Trials(LAYOUT, found, Nearness(hidden), tell=lambda trial: told.append(trial.alpha))
    curve = sweep(trials, ALPHAS)
    assert [trial.alpha for trial in curve] == told == list(ALPHAS)
    exact = [-distance(merged(found, alpha, dict.fromkeys(found, 1 / 16)), hidden) for alpha in ALPHAS]
    assert [trial.score for trial in curve] == pytest.approx(exact, rel=1e-9, abs=1e-18)
    assert best(curve).alpha == 0.3
    assert best(curve).metrics == {"squared": pytest.approx(0, abs=1e-18)}


def test_of_equals_the_plan_s_alpha_is_chosen_and_else_the_first() -> None:
    trials = Trials(LAYOUT, silos(2), lambda deltas: Judgement(1.0, {}))
    curve = sweep(trials, (0.5, 0.0, 0.9))
    assert best(curve).alpha == 0.5
    assert best(curve, preferred=0.9).alpha == 0.9
    assert best(curve, preferred=0.2).alpha == 0.5


def test_a_merge_that_cannot_be_measured_is_passed_over() -> None:
    broken = silos(2)
    broken["north"].blocks["delta:linear.bias"][0] = np.float32(3e38)  # type: ignore[index]
    trials = Trials(LAYOUT, broken, lambda deltas: Judgement(1.0, {}))
    good, bad = trials.measure(0.1, {"east": 1.0}), trials.measure(0.1, {"north": 1.0})
    assert math.isnan(bad.score)
    assert best([bad, good]) is good
    with pytest.raises(ContributionError, match="none of 1 merges could be measured"):
        best([bad])


@pytest.mark.parametrize("hidden", [(1.0, 0.125), (0.5, 1.0), (1.0, 1.0)])
def test_weights_of_two_silos_are_those_of_brute_force(hidden: tuple[float, float]) -> None:
    found = silos(2)
    target = merged(found, 0.9, dict(zip(found, hidden, strict=True)))
    trials = Trials(LAYOUT, found, Nearness(target))
    tried = search_weights(trials, 0.9)
    grid = [1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0]
    everything = [
        trials.measure(0.9, dict(zip(found, pair, strict=True)))
        for pair in itertools.product(grid, grid)
        if max(pair) == 1
    ]
    assert best(tried) == best(everything)
    assert tuple(best(tried).weights.values()) == hidden
    assert tried[0].weights == trials.uniform


def test_weights_of_four_silos_end_where_no_step_helps_and_within_the_limit() -> None:
    found = silos(4)
    target = merged(found, 0.9, {"north": 0.5, "east": 1.0, "south": 0.25, "west": 0.5})
    judge = Nearness(target)
    tried = search_weights(Trials(LAYOUT, found, judge), 0.9)
    assert judge.asked == len(tried) == len({tuple(trial.weights.items()) for trial in tried})
    top = best(tried)
    for silo, factor in itertools.product(NAMES, (0.5, 2.0)):
        weights = {**top.weights, silo: top.weights[silo] * factor}
        weights = {name: weight / max(weights.values()) for name, weight in weights.items()}
        if min(weights.values()) >= 1 / 16:
            assert any(trial.weights == weights and trial.score <= top.score for trial in tried)
    judge.asked = 0
    few = search_weights(Trials(LAYOUT, found, judge), 0.9, limit=7)
    assert judge.asked == 7
    assert few == tried[:7]


def test_greedy_order_is_that_of_brute_force_and_the_given_order_is_the_roster_s() -> None:
    found = silos(4, seed=3)
    weights = {"north": 1.0, "east": 0.5, "south": 1.0, "west": 0.5}
    target = merged(found, 0.8, {"west": 1.0, "south": 0.5})
    trials = Trials(LAYOUT, found, Nearness(target))
    left, chosen = list(NAMES), []
    for step in greedy_order(trials, 0.8, weights):
        scores = {
            silo: -distance(trials.sum(0.8, {name: weights[name] for name in [*chosen, silo]}).merge().deltas, target)
            for silo in left
        }
        chosen.append(max(scores, key=scores.__getitem__))
        left.remove(chosen[-1])
        assert step.score == pytest.approx(scores[chosen[-1]], rel=1e-9)
        assert step.weights == {name: weights[name] for name in chosen}
    assert chosen != list(NAMES)
    steps = given_order(trials, 0.8, weights)
    assert [list(step.weights) for step in steps] == [list(NAMES[:k]) for k in (1, 2, 3, 4)]
    assert steps[-1] == trials.measure(0.8, weights)


def test_influence_is_of_the_merge_without_the_silo() -> None:
    found = silos(3)
    trials = Trials(LAYOUT, found, Nearness(merged(found, 0.5, {"north": 1 / 16, "south": 1 / 16})))
    without = leave_one_out(trials, 0.5, trials.uniform)
    assert list(without) == list(NAMES[:3])
    assert without["east"].score == pytest.approx(0, abs=1e-18)
    for silo, trial in without.items():
        rest: dict[str, Any] = {name: 1.0 for name in NAMES[:3] if name != silo}
        assert trial == trials.measure(0.5, rest)


def test_without_the_only_silo_that_has_a_feature_nothing_of_it_is_left() -> None:
    found = silos(4, only_east=2)
    weights = {"north": 0.5, "east": 0.25, "south": 1.0, "west": 1.0}
    rest = {name: weight for name, weight in weights.items() if name != "east"}
    expected = merged(found, 0.9, rest)
    trials = Trials(LAYOUT, found, Nearness(expected))
    trials.measure(0.9, weights)  # from here on, what differs is taken out
    assert leave_one_out(trials, 0.9, weights)["east"].score == pytest.approx(0, abs=1e-18)


def test_one_silo_has_no_influence() -> None:
    one = silos(1)
    assert leave_one_out(Trials(LAYOUT, one, Nearness({})), 0.5, {"north": 1.0}) == {}


def test_what_is_found_is_plain_json_even_where_a_merge_could_not_be_measured() -> None:
    plan = Plan.parse(
        """plan = { name = "p" }
model = { base = "b", task = "classification", labels = ["yes", "no"] }
privacy = { secure-aggregation = false }
silo = [{ name = "north" }, { name = "east" }]"""
    )
    found = silos(2)
    none_at_all = merged(found, 1.0, dict.fromkeys(found, 1 / 16))
    asked = []

    def measure(deltas: Deltas, part: str) -> dict[str, np.ndarray]:
        asked.append(part)
        hopeless = distance(deltas, none_at_all) < 1e-12
        right = min(9.0, distance(deltas, none_at_all) // 0.01)
        matrix = [math.nan if hopeless else right, 10 - right, 0, 10]
        sums = np.array([sum(matrix), *[0.0] * CALIBRATION, *matrix])
        return dict.fromkeys(found, sums)

    trials = Trials(LAYOUT, found, lambda deltas: judgement_of(plan, measure(deltas, "validation")))
    wanted = Wanted(alphas=(1.0, 0.0, 0.9), weights=True, order="given", influence=True)
    chosen, best_merge, found_tuning = search(trials, wanted, plan, measure)
    tuning = found_tuning.document()
    assert [entry["score"] is None for entry in tuning["alpha"]] == [True, False, False]
    assert tuning["alpha"][0]["metrics"] == {}
    assert json.loads(json.dumps(tuning, allow_nan=False)) == tuning
    assert tuning["chosen"]["alpha"] == chosen.alpha != 1.0
    assert distance(best_merge.deltas, trials.sum(chosen.alpha, chosen.weights).merge().deltas) == 0
    assert tuning["metric"] == "accuracy"
    assert tuning["examples"] == {"north": 20, "east": 20}
    # What is reported on is looked at for the chosen merge, and without each silo.
    assert asked.count("held-out") == 3
    assert set(tuning["influence"][0]["reported"]) == {"accuracy", "macro-f1", "mcc", "nll", "ece"}
