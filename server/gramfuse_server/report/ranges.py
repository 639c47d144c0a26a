"""Valid ranges of the numbers in a report."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, TypeVar

from pydantic import AfterValidator, Field

from gramfuse_protocol.tasks.registry import SHARE, TASK_KINDS
from gramfuse_protocol.text import quoted

Range = tuple[float, float]

Figure = TypeVar("Figure", float, float | Mapping[str, Mapping[str, float]])

ANY: Range = (-math.inf, math.inf)


def _limits() -> dict[str, Range]:
    """Return the lowest and highest value of each metric.

    Range ends beyond 1 only clip noisy values; exact values can exceed them, so they are infinite here.
    """
    of_kinds = {name: measure.range for kind in TASK_KINDS.values() for name, measure in kind.measures.items()}
    exact = {name: (least, most if most <= SHARE[1] else math.inf) for name, (least, most) in of_kinds.items()}
    return {**exact, "mean-score": (-1.0, 1.0), "examples": (0.0, math.inf)}


def _check(name: str, values: tuple[float, ...], limits: Range) -> None:
    least, most = limits
    for value in values:
        if value < least or value > most:
            raise ValueError(f"{quoted(name)} is {value:g}, expected {least:g} to {most:g}")


def _check_metrics(metrics: Mapping[str, Figure]) -> Mapping[str, Figure]:
    limits = _limits()
    for name, value in metrics.items():
        if not isinstance(value, Mapping):
            _check(name, (value,), limits.get(name, ANY))
    return metrics


def _check_intervals(intervals: Mapping[str, Range]) -> Mapping[str, Range]:
    limits = _limits()
    for name, ends in intervals.items():
        _check(name, ends, limits.get(name, ANY))
        _in_order(ends)
    return intervals


def _in_order(ends: Range) -> Range:
    if ends[0] > ends[1]:
        raise ValueError(f"the lowest value {ends[0]:g} is above the highest, {ends[1]:g}")
    return ends


Count = Annotated[int, Field(ge=0)]
Number = Annotated[int, Field(ge=1)]
"""Counted from 1."""
Seconds = Annotated[float, Field(ge=0)]
Amount = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]
ShareInterval = Annotated[tuple[Share, Share], AfterValidator(_in_order)]
Metrics = Annotated[Mapping[str, float], AfterValidator(_check_metrics)]
"""Metrics by name; `examples` is the number of held-out examples, 0 or more. Values can be NaN."""
MetricsOfTasks = Annotated[Mapping[str, float | Mapping[str, Metrics]], AfterValidator(_check_metrics)]
"""Metrics by name; with several tasks, `tasks` has those of each."""
Intervals = Annotated[Mapping[str, Range], AfterValidator(_check_intervals)]
"""Lowest and highest value by metric."""
