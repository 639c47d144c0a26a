"""Searches over merges of the same silos: α, silo weights, order, and the influence of each silo.

All searches are deterministic: candidates come in a fixed order, and only a strictly higher score replaces the best.
The caller provides the score; it should come from held-out examples other than those of the report.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

from gramfuse_protocol.contract.layout import Layout
from gramfuse_protocol.errors import ContributionError
from gramfuse_protocol.statistics.contribution import Contribution
from gramfuse_server.merging.accumulator import Accumulator, Deltas

WEIGHTS_TRIED = 50
"""Most merges to measure in a search over weights."""

SMALLEST_WEIGHT = 1 / 16
"""Smallest weight of a silo, relative to the largest."""

Weights = Mapping[str, float]
"""Factor on each silo's weight c in the sums, by silo; silos that are missing are not in the merge."""


class Judgement(NamedTuple):
    """The score that ranks a merge, higher is better, and its other metrics."""

    score: float
    metrics: Mapping[str, Any]


Judge = Callable[[Deltas], Judgement]
"""Measures a merged model, given as differences from the base."""


@dataclass(frozen=True)
class Trial:
    """A tried merge; the score is NaN if it could not be measured."""

    alpha: float
    weights: Weights
    score: float
    metrics: Mapping[str, Any]


class Trials:
    """Tries merges, each at most once.

    Args:
        layout: of the contributions.
        contributions: by silo, in roster order.
        judge: measures a merge.
        weighting: the plan's; weights are factors on it.
        tell: called with every new trial.
    """

    def __init__(
        self,
        layout: Layout,
        contributions: Mapping[str, Contribution],
        judge: Judge,
        *,
        weighting: Literal["uniform", "examples"] = "uniform",
        tell: Callable[[Trial], None] = lambda trial: None,
    ) -> None:
        self.layout = layout
        self.contributions = contributions
        self.judge = judge
        self.weighting = weighting
        self.tell = tell
        self._trials: dict[tuple[float, tuple[tuple[str, float], ...]], Trial] = {}
        self._last: tuple[Weights, Accumulator] | None = None

    @property
    def uniform(self) -> Weights:
        """The factor 1 for every silo."""
        return dict.fromkeys(self.contributions, 1.0)

    def sum(self, alpha: float, weights: Weights) -> Accumulator:
        """Sum the silos in `weights`, in roster order: bit for bit the sums of an exchange."""
        sums = Accumulator(self.layout, alpha=alpha, weighting=self.weighting)
        for silo in self.contributions:
            if silo in weights:
                self._fold(sums, silo, weights[silo])
        return sums

    def measure(self, alpha: float, weights: Weights, sums: Callable[[], Accumulator] | None = None) -> Trial:
        """Merge and measure, unless this merge was tried before.

        Args:
            sums: returns the sums to merge; by default they are computed.
        """
        key = alpha, tuple((silo, weights[silo]) for silo in self.contributions if silo in weights)
        if key not in self._trials:
            try:
                merged = (sums() if sums else self.near(alpha, weights)).merge()
                judgement = self.judge(merged.deltas)
            except ContributionError:  # an ill-conditioned merge can exceed float32, which must not stop a sweep
                judgement = Judgement(math.nan, {})
            self._trials[key] = Trial(alpha, dict(key[1]), *judgement)
            self.tell(self._trials[key])
        return self._trials[key]

    def near(self, alpha: float, weights: Weights) -> Accumulator:
        """Return the sums up to rounding, by updating the last ones where that is less work."""
        if self._last is not None and self._last[1].alpha == alpha:
            before, last = self._last
            changes = {silo: weights.get(silo, 0) - before.get(silo, 0) for silo in self.contributions}
            changes = {silo: share for silo, share in changes.items() if share}
            if len(changes) < len(weights):
                sums = last.copy()
                for silo, share in changes.items():
                    self._fold(sums, silo, share)
                return sums
        self._last = weights, self.sum(alpha, weights)
        return self._last[1]

    def _fold(self, sums: Accumulator, silo: str, share: float) -> None:
        sums.fold(self.contributions[silo], f"silo {silo!r}", silo=silo, share=share)


def best(trials: Sequence[Trial], *, preferred: float | None = None) -> Trial:
    """Return the trial with the highest score; ties go to a trial with the α `preferred`, else to the first.

    Raises:
        ContributionError: if no trial could be measured.
    """
    measured = [trial for trial in trials if not math.isnan(trial.score)]
    if not measured:
        raise ContributionError(
            f"none of {len(trials)} merges could be measured: a silo's training diverged. Lower training.learning-rate"
        )
    top = max(trial.score for trial in measured)
    equals = [trial for trial in measured if trial.score == top]
    return next((trial for trial in equals if trial.alpha == preferred), equals[0])


def sweep(trials: Trials, alphas: Sequence[float]) -> tuple[Trial, ...]:
    """Try every α, in the given order, with the plan's weights. Sums the silos only twice, for any number of α."""
    zero, one = (trials.sum(end, trials.uniform) for end in (0.0, 1.0))
    return tuple(trials.measure(alpha, trials.uniform, partial(zero.between, one, alpha)) for alpha in alphas)


def search_weights(trials: Trials, alpha: float, limit: int = WEIGHTS_TRIED) -> tuple[Trial, ...]:
    """Search weights by coordinate ascent on powers of two: the largest is 1, and none is below `SMALLEST_WEIGHT`.

    Starts from the plan's weights. Doubles each silo's weight in turn, in roster order, while the score rises, or else
    halves it; repeats until no weight changes or `limit` merges were measured. Ends where no single doubling or halving
    helps, which is not necessarily the best point of the grid.

    Returns:
        The distinct trials, in order; the first has the plan's weights.
    """
    top = trials.measure(alpha, trials.uniform)
    tried = {tuple(top.weights.items()): top}
    moved = True
    while moved:
        moved = False
        for silo in trials.contributions:
            for factor in (2.0, 0.5):
                rises = True
                while rises:
                    weights = _scaled({**top.weights, silo: top.weights[silo] * factor})
                    key = tuple(weights.items())
                    if min(weights.values()) < SMALLEST_WEIGHT or (key not in tried and len(tried) >= limit):
                        break
                    trial = tried[key] = trials.measure(alpha, weights)
                    rises = trial.score > top.score
                    if rises:
                        top, moved = trial, True
    return tuple(tried.values())


def given_order(trials: Trials, alpha: float, weights: Weights) -> tuple[Trial, ...]:
    """Try the first silo, the first two, …, all, in roster order."""
    silos = list(trials.contributions)
    return tuple(
        trials.measure(alpha, {silo: weights[silo] for silo in silos[:count]}) for count in range(1, len(silos) + 1)
    )


def greedy_order(trials: Trials, alpha: float, weights: Weights) -> tuple[Trial, ...]:
    """Start with the best single silo, and add at each step the silo that gives the best merge.

    Tries N(N + 1)/2 merges of N silos.

    Returns:
        The chosen merges of one silo, two, …, all; each adds one silo to the one before.
    """
    chosen: dict[str, float] = {}
    steps = []
    while len(chosen) < len(trials.contributions):
        candidates = {
            silo: trials.measure(alpha, {**chosen, silo: weights[silo]})
            for silo in trials.contributions
            if silo not in chosen
        }
        step = best(list(candidates.values()))
        silo = next(silo for silo, trial in candidates.items() if trial is step)
        chosen[silo] = weights[silo]
        steps.append(step)
    return tuple(steps)


def leave_one_out(trials: Trials, alpha: float, weights: Weights) -> dict[str, Trial]:
    """Try the merge without each silo, by its name; empty for a single silo."""
    if len(weights) == 1:
        return {}
    return {
        silo: trials.measure(alpha, {other: weight for other, weight in weights.items() if other != silo})
        for silo in weights
    }


def _scaled(weights: Weights) -> dict[str, float]:
    """Scale weights to a maximum of 1, which gives the same merge."""
    largest = max(weights.values())
    return {silo: weight / largest for silo, weight in weights.items()}
