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

from gramfuse_protocol.errors import DataError
from gramfuse_protocol.task import Task

LEARNABLE = (0.01, 100.0)
"""Root mean square of (target − centre) / scale beyond which nothing of use is learned."""

USUAL = (0.3, 2.0)
"""The same, within which all is as it should be."""


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


def propose(targets: Sequence[float]) -> Proposal | None:
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


def size(task: Task, targets: Sequence[float]) -> float:
    """Return the root mean square of targets as a model learns them: less the plan's centre, over its scale."""
    learned = (np.asarray(targets, np.float64) - task.centre) / task.scale
    return float(np.sqrt(np.mean(learned * learned)))


def check_targets(path: Path, task: Task, labels: Sequence[Any]) -> None:
    """Raise DataError if targets are so large or so small, by the plan's centre and scale, that nothing is learned.

    Args:
        path: of the silo file, for the error.
        labels: of the training examples.
    """
    fitting = propose(labels)
    if fitting is None or LEARNABLE[0] <= (found := size(task, labels)) <= LEARNABLE[1]:
        return
    raise DataError(
        f"{path}: the targets of data.train, less the plan's centre of {task.centre:g} and over its scale of "
        f"{task.scale:g}, have a size of {found:.3g}, and a model learns numbers of about 1; agree on a plan with what "
        f"fits all silos. Here it would be: {', '.join(fitting.lines)}"
    )


def described(task: Task, labels: Sequence[Any]) -> tuple[str, str]:
    """Return what is to be said of targets to their owner, and, if centre and scale do not fit, what would."""
    values = np.asarray(labels, np.float64)
    what = f"targets from {values.min():g} to {values.max():g}, mean {values.mean():.3g}, deviation {values.std():.3g}"
    fitting = propose(labels)
    if fitting is None or USUAL[0] <= size(task, labels) <= USUAL[1]:
        return what, ""
    return what, f"the plan's centre and scale do not fit them; by these data: {', '.join(fitting.lines)}"
