"""Targets of a regression: checks them against a plan's centre and scale, and proposes values that fit.

A model learns best if targets are about 1 in size. Each silo finds a `centre` and `scale` that fit its own data, and
the silos agree on one pair. A proposal is rounded, so that it reveals no single target.
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
"""Range of the standard deviation of (target − centre) / scale in which a model can learn anything useful."""

REACHABLE = 10.0
"""Largest absolute mean of (target − centre) / scale that training can reach."""

USUAL, NEAR = (0.1, 2.0), 2.0
"""Good values of the standard deviation, and of the absolute mean."""

STEPS = 8.0
"""Minimum standard deviation, in float32 steps at the targets' size, for outputs to be distinguishable."""


@dataclass(frozen=True)
class Proposal:
    """Round numbers that fit some targets.

    Args:
        centre: about their mean.
        scale: about their standard deviation: a power of ten times 1 to 10.
        low, high: bounds of all targets.
    """

    centre: float
    scale: float
    low: float
    high: float

    @property
    def lines(self) -> tuple[str, str, str]:
        """The lines for a plan."""
        return f"centre = {self.centre}", f"scale = {self.scale}", f"range = [{self.low}, {self.high}]"


def propose(targets: Sequence[float] | NDArray[np.float64]) -> Proposal | None:
    """Return a proposal that fits the targets, or None if all targets are equal."""
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


def scaled_moments(task: Task, targets: Sequence[float]) -> tuple[float, float]:
    """Return the mean and standard deviation of (target − centre) / scale, which a model learns."""
    values = (np.asarray(targets, np.float64) - task.centre) / task.scale
    return float(values.mean()), float(values.std()) if values.min() < values.max() else 0.0


def check_targets(path: Path, task: Task, labels: Sequence[Any]) -> None:
    """Raise DataError if a model could not learn the targets with the plan's centre and scale.

    Args:
        path: the silo file, for the error.
        labels: the training targets. If all are equal, only their distance from the centre is checked.
    """
    check_apart(str(path), labels)
    mean, deviation = scaled_moments(task, labels)
    if abs(mean) <= REACHABLE and (not deviation or LEARNABLE[0] <= deviation <= LEARNABLE[1]):
        return
    fitting = propose(labels)
    hint = f"all targets are {labels[0]:g}" if fitting is None else f"this would fit: {', '.join(fitting.lines)}"
    raise DataError(
        f"{path}: with the plan's centre {task.centre:g} and scale {task.scale:g}, the targets of data.train, (target "
        f"− centre) / scale, have mean {mean:.3g} and standard deviation {deviation:.3g}, but a model learns numbers "
        f"of about 1 around 0; agree on a plan with values that fit all silos. Here, {hint}"
    )


def check_apart(where: str, targets: Sequence[float]) -> None:
    """Raise DataError if the targets differ by less than float32 outputs can distinguish."""
    values = np.asarray(targets, np.float64)
    largest, deviation = float(np.abs(values).max()), float(values.std())
    if values.min() == values.max():
        return
    if largest > float(np.finfo(np.float32).max) or not deviation:
        raise DataError(
            f"{where}: the targets are up to {largest:.2g}, with standard deviation {deviation:.2g}, which a model's "
            "float32 outputs cannot represent; use another unit"
        )
    step = float(np.spacing(np.float32(largest)))
    if deviation >= STEPS * step:
        return
    size = 10.0 ** math.floor(math.log10(deviation))
    offset = float(f"{round(values.mean() / size) * size:.12g}")
    fitting = propose(values - offset)
    rest = "" if fitting is None else f", and agree on a plan with values that then fit: {', '.join(fitting.lines)}"
    raise DataError(
        f"{where}: the targets are about {values.mean():g} and differ by about {deviation:.2g}, but a model's float32 "
        f"outputs of that size are {step:.2g} apart; subtract the same number from all targets at every silo, such as "
        f"{offset}{rest}"
    )


def describe_targets(task: Task, labels: Sequence[Any]) -> tuple[str, str]:
    """Return a description of the targets for their owner, and a proposal if the plan's centre and scale do not fit."""
    values = np.asarray(labels, np.float64)
    text = (
        f"targets from {values.min():g} to {values.max():g}, mean {values.mean():.3g}, standard deviation "
        f"{values.std():.3g}"
    )
    fitting, (mean, deviation) = propose(labels), scaled_moments(task, labels)
    if fitting is None or (USUAL[0] <= deviation <= USUAL[1] and abs(mean) <= NEAR):
        return text, ""
    return text, f"the plan's centre and scale do not fit them; for these data: {', '.join(fitting.lines)}"
