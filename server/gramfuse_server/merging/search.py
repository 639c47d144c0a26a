"""Searches over merges of the same silos: α, silo weights, order, and what each silo adds.

All of it is deterministic: candidates come in a fixed order, and only a higher score replaces what was found before.
Where the score comes from is the caller's: held-out examples that are not those of the report, it is hoped.
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
"""Most merges that a search over weights measures."""

SMALLEST_WEIGHT = 1 / 16
"""Of a silo, relative to the largest."""

Weights = Mapping[str, float]
"""By silo, what its weight c in the sums is multiplied by; a silo that is not named is not in the merge."""


class Judgement(NamedTuple):
    """How good a merge is: the score that it is ranked by, higher is better, and whatever else was measured."""

    score: float
    metrics: Mapping[str, Any]


Judge = Callable[[Deltas], Judgement]
"""Measures a merged model, which is given as its differences from the base."""


@dataclass(frozen=True)
class Trial:
    """A merge that was tried. Its score is NaN if it could not be measured."""

    alpha: float
    weights: Weights
    score: float
    metrics: Mapping[str, Any]


class Trials:
    """Merges that were tried, each once.

    Args:
        layout: that of the contributions.
        contributions: by silo, in roster order.
        judge: measures a merge.
        weighting: the plan's, which weights are factors on.
        tell: is told every new trial.
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
        self._known: dict[tuple[float, tuple[tuple[str, float], ...]], Trial] = {}
        self._last: tuple[Weights, Accumulator] | None = None

    @property
    def uniform(self) -> Weights:
        """All silos, each with the weight that the plan gives it."""
        return dict.fromkeys(self.contributions, 1.0)

    def sum(self, alpha: float, weights: Weights) -> Accumulator:
        """Add up the silos that weights names, in roster order: bit for bit the sums of an exchange."""
        sums = Accumulator(self.layout, alpha=alpha, weighting=self.weighting)
        for silo in self.contributions:
            if silo in weights:
                self._fold(sums, silo, weights[silo])
        return sums

    def measure(self, alpha: float, weights: Weights, sums: Callable[[], Accumulator] | None = None) -> Trial:
        """Merge and measure, unless that was done before.

        Args:
            sums: returns what there is to merge, if it is at hand already.
        """
        key = alpha, tuple((silo, weights[silo]) for silo in self.contributions if silo in weights)
        if key not in self._known:
            try:
                merged = (sums() if sums else self.near(alpha, weights)).merge()
                judgement = self.judge(merged.deltas)
            except ContributionError:  # beyond float32, as an ill-conditioned merge may be: no reason to stop a sweep
                judgement = Judgement(math.nan, {})
            self._known[key] = Trial(alpha, dict(key[1]), *judgement)
            self.tell(self._known[key])
        return self._known[key]

    def near(self, alpha: float, weights: Weights) -> Accumulator:
        """Return the sums, equal to rounding: those added up last, changed where they differ, if that is less work."""
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


def best(trials: Sequence[Trial], *, own: float | None = None) -> Trial:
    """Return the trial with the highest score: among equals one with the α `own`, if there is one, else the first.

    Raises:
        ContributionError: if none could be measured.
    """
    measured = [trial for trial in trials if not math.isnan(trial.score)]
    if not measured:
        raise ContributionError(
            f"none of {len(trials)} merges could be measured; a silo's training diverged. Lower training.learning-rate"
        )
    top = max(trial.score for trial in measured)
    equals = [trial for trial in measured if trial.score == top]
    return next((trial for trial in equals if trial.alpha == own), equals[0])


def sweep(trials: Trials, alphas: Sequence[float]) -> tuple[Trial, ...]:
    """Try every α, in the given order, with the plan's weights. However many there are, silos are added up twice."""
    zero, one = (trials.sum(end, trials.uniform) for end in (0.0, 1.0))
    return tuple(trials.measure(alpha, trials.uniform, partial(zero.between, one, alpha)) for alpha in alphas)


def search_weights(trials: Trials, alpha: float, limit: int = WEIGHTS_TRIED) -> tuple[Trial, ...]:
    """Try weights on the grid of powers of two: the largest is 1, and none is below `SMALLEST_WEIGHT`.

    Starts from the plan's weights. Each silo's weight in turn, in roster order, is doubled for as long as the score
    rises, or else halved; this is repeated until no silo's is changed any more, or `limit` merges were measured. It
    ends where no single doubling or halving helps, which need not be the best point of the grid.

    Returns:
        What was tried, in order, each once; the first are the plan's weights.
    """
    found = trials.measure(alpha, trials.uniform)
    tried = {tuple(found.weights.items()): found}
    moved = True
    while moved:
        moved = False
        for silo in trials.contributions:
            for factor in (2.0, 0.5):
                rises = True
                while rises:
                    weights = _scaled({**found.weights, silo: found.weights[silo] * factor})
                    key = tuple(weights.items())
                    if min(weights.values()) < SMALLEST_WEIGHT or (key not in tried and len(tried) >= limit):
                        break
                    trial = tried[key] = trials.measure(alpha, weights)
                    rises = trial.score > found.score
                    if rises:
                        found, moved = trial, True
    return tuple(tried.values())


def given_order(trials: Trials, alpha: float, weights: Weights) -> tuple[Trial, ...]:
    """Try the first silo, the first two, …, all, in roster order."""
    silos = list(trials.contributions)
    return tuple(
        trials.measure(alpha, {silo: weights[silo] for silo in silos[:count]}) for count in range(1, len(silos) + 1)
    )


def greedy_order(trials: Trials, alpha: float, weights: Weights) -> tuple[Trial, ...]:
    """Begin with the silo that is best alone, and add at each step the one with which the merge is best.

    Tries N(N + 1)/2 merges of N silos.

    Returns:
        The best merge of one silo, of two, …, of all; each has one silo more than the one before.
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
    """Try the merge without each silo, by its name; empty if there is but one silo."""
    if len(weights) == 1:
        return {}
    return {
        silo: trials.measure(alpha, {other: weight for other, weight in weights.items() if other != silo})
        for silo in weights
    }


def _scaled(weights: Weights) -> dict[str, float]:
    """Return weights whose largest is 1, which give the same merge."""
    largest = max(weights.values())
    return {silo: weight / largest for silo, weight in weights.items()}
