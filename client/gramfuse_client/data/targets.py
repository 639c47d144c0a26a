"""The targets of a regression: how large they are here, and which centre, scale and range of a plan fit them.

A model learns numbers of about 1. What a plan's `centre` and `scale` should be, a silo finds in its own data; it is for
the silos to agree on one pair, and what is proposed here is rounded so that no target can be read from it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gramfuse_protocol.contract.task import Task
from gramfuse_protocol.errors import DataError

LEARNABLE = (0.01, 100.0)
"""Deviation of (target − centre) / scale beyond which nothing of use is learned."""

REACHABLE = 10.0
"""Mean of it, above or below 0, that training does not come to from there."""

USUAL, NEAR = (0.1, 2.0), 2.0
"""The same, within which all is as it should be."""

STEPS = 8.0
"""Fewest steps of a number of 32 bits in a deviation, for a model's answers to be told apart."""


@dataclass(frozen=True)
class Proposal:
    """What fits some targets, in round numbers.

    Args:
        centre: about their mean.
        scale: about their standard deviation; a power of ten times 1 to 10.
        low, high: what none of them is beyond.
    """

    centre: float
    scale: float
    low: float
    high: float

    @property
    def lines(self) -> tuple[str, str, str]:
        """As they stand in a plan."""
        return f"centre = {self.centre}", f"scale = {self.scale}", f"range = [{self.low}, {self.high}]"


def propose(targets: Sequence[float] | NDArray[np.float64]) -> Proposal | None:
    """Return what fits targets, or None if all of them are the same number."""
    values = np.asarray(targets, np.float64)
    deviation = float(values.std())
    if not deviation > 1e-9 * float(np.abs(values).max()):
        return None
    step = 10.0 ** math.floor(math.log10(deviation))

    def rounded(steps: float) -> float:
        return float(f"{steps * step:.12g}")

    low, high = math.floor(values.min() / step), math.ceil(values.max() / step)
    scale = max(1, round(deviation / step))
    return Proposal(rounded(round(values.mean() / step)), rounded(scale), rounded(low), rounded(max(high, low + 1)))


def learned(task: Task, targets: Sequence[float]) -> tuple[float, float]:
    """Return the mean and the deviation of targets as a model learns them: less the plan's centre, over its scale."""
    values = (np.asarray(targets, np.float64) - task.centre) / task.scale
    return float(values.mean()), float(values.std()) if values.min() < values.max() else 0.0


def check_targets(path: Path, task: Task, labels: Sequence[Any]) -> None:
    """Raise DataError if, by the plan's centre and scale, nothing can be learned of targets.

    Args:
        path: of the silo file, for the error.
        labels: of the training examples. Where all are the same number, only how far from the centre that is.
    """
    check_apart(str(path), labels)
    mean, deviation = learned(task, labels)
    if abs(mean) <= REACHABLE and (not deviation or LEARNABLE[0] <= deviation <= LEARNABLE[1]):
        return
    fitting = propose(labels)
    here = f"all targets are {labels[0]:g}" if fitting is None else f"it would be: {', '.join(fitting.lines)}"
    raise DataError(
        f"{path}: the targets of data.train, less the plan's centre of {task.centre:g} and over its scale of "
        f"{task.scale:g}, have a mean of {mean:.3g} and a deviation of {deviation:.3g}, and a model learns numbers of "
        f"about 1 around 0; agree on a plan with what fits all silos. Here {here}"
    )


def check_apart(where: str, targets: Sequence[float]) -> None:
    """Raise DataError if targets differ, but by less than a model can say: its answers are numbers of 32 bits."""
    values = np.asarray(targets, np.float64)
    largest, deviation = float(np.abs(values).max()), float(values.std())
    if values.min() == values.max():
        return
    if largest > float(np.finfo(np.float32).max) or not deviation:
        raise DataError(
            f"{where}: the targets are up to {largest:.2g} and have a deviation of {deviation:.2g}, and a model's "
            "answers are numbers of 32 bits; give them in another unit"
        )
    step = float(np.spacing(np.float32(largest)))
    if deviation >= STEPS * step:
        return
    size = 10.0 ** math.floor(math.log10(deviation))
    taken = float(f"{round(values.mean() / size) * size:.12g}")
    fitting = propose(values - taken)
    rest = "" if fitting is None else f", and agree on a plan with what then fits: {', '.join(fitting.lines)}"
    raise DataError(
        f"{where}: the targets are about {values.mean():g} and differ by about {deviation:.2g}, and a model's answers "
        f"are numbers of 32 bits, which at that size are {step:.2g} apart; take the same number off all of them at "
        f"every silo, such as {taken}{rest}"
    )


def described(task: Task, labels: Sequence[Any]) -> tuple[str, str]:
    """Return what is to be said of targets to their owner, and, if centre and scale do not fit, what would."""
    values = np.asarray(labels, np.float64)
    what = f"targets from {values.min():g} to {values.max():g}, mean {values.mean():.3g}, deviation {values.std():.3g}"
    fitting, (mean, deviation) = propose(labels), learned(task, labels)
    if fitting is None or (USUAL[0] <= deviation <= USUAL[1] and abs(mean) <= NEAR):
        return what, ""
    return what, f"the plan's centre and scale do not fit them; by these data: {', '.join(fitting.lines)}"
