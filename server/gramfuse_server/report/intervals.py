"""Confidence intervals for metrics that were released with noise.

The noise's distribution is public, so we draw plausible exact vectors: the released one minus noise. The metric's
spread over these draws shows its uncertainty, and, where the metric is not linear, its bias. An interval is the hull of
the central draws and of their mirror image about the released value, widened by the bias on both sides; it contains the
exact metric in at least 95% of cases. A metric that noise only ever adds to, as a sum of absolute values is, has an
interval as wide as the noise can have moved it. Where the data cannot support that, the interval is the metric's whole
range. The effect of clipping is not included.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from gramfuse_protocol.contract.plan import Plan
from gramfuse_protocol.contract.task import Task
from gramfuse_protocol.held_out.noise import DELTA, deviations, spent
from gramfuse_protocol.held_out.sums import SHARE, Vector, figures, label_counts, label_figures, range_of
from gramfuse_protocol.tasks.registry import kind_of
from gramfuse_server.report.schema import LabelFigures, Measured, PrivacyOfReport, PrivacyTotal

COVERAGE = 0.98
"""Share of the draws in an interval: above 95%, to allow for the approximation."""
DRAWS = 1000
UNCLEAR = 1 / 4
"""If more than this share of labels is as rare as the noise is strong, macro-F1 is meaningless."""


def with_intervals(plan: Plan, name: str, task: Task, vector: Vector, silos: int) -> Measured:
    """Return the report's entry for a model from a noisy sum.

    Args:
        name: of the model; also its kind.
        vector: the sum (`gramfuse_protocol.held_out.sums`).
        silos: number of silos in the sum.

    Returns:
        `metrics`, each with its `intervals`; `labels`, each F1 with its `interval`; and `privacy`. Deterministic for a
        given sum.
    """
    noise = deviations(plan, task, silos)
    seed = int.from_bytes(hashlib.sha256(plan.digest.encode() + vector.tobytes()).digest(), "big")
    draws = vector - np.random.default_rng(seed).normal(0.0, 1.0, (DRAWS, vector.size)) * noise
    measured = figures(task, vector)
    drawn = [figures(task, draw) for draw in draws]
    intervals = {}
    for metric, value in measured.items():
        moved = kind_of(task).moved(task, metric, vector, vector - draws)
        limits = range_of(task, metric)
        if moved is None:
            intervals[metric] = _interval(value, np.array([each[metric] for each in drawn]), limits)
        else:
            most = float(np.quantile(moved, COVERAGE))
            intervals[metric] = (max(limits[0], value - most), min(limits[1], value + most))
    if "macro-f1" in measured and _unclear(task, vector, noise):
        intervals["macro-f1"] = SHARE
    spent_in_all = spent(plan)
    assert plan.epsilon is not None and spent_in_all is not None  # noqa: S101, PT018
    total = PrivacyTotal(epsilon=spent_in_all, releases=plan.releases)
    privacy = PrivacyOfReport(epsilon=plan.epsilon, delta=DELTA, total=total)
    model = Measured(name=name, kind=name, metrics=measured, intervals=intervals, privacy=privacy)
    if labels := label_figures(task, vector):
        return model.updated(labels={"": _labels(task, vector, draws, noise, labels)})
    return model


def _interval(value: float, drawn: NDArray[np.float64], limits: tuple[float, float]) -> tuple[float, float]:
    """Return the interval of one metric, within its limits."""
    low, high = np.quantile(drawn, [(1 - COVERAGE) / 2, (1 + COVERAGE) / 2])
    bias = abs(value - float(drawn.mean()))
    ends = min(low, 2 * value - high) - bias, max(high, 2 * value - low) + bias
    least, most = (min(max(float(end), limits[0]), limits[1]) for end in ends)
    return least, most


def _unclear(task: Task, vector: Vector, noise: Vector) -> bool:
    """Whether too many labels are so rare that noise hides whether they occur at all."""
    return float((_strength(task, vector, noise) < 1).mean()) > UNCLEAR


def _strength(task: Task, vector: Vector, noise: Vector) -> NDArray[np.float64]:
    """Return the denominator of each label's F1, in standard deviations of its noise."""
    parts = np.array([2.0, 1.0, 1.0])
    spread = np.sqrt((label_counts(task, noise) ** 2) @ parts**2)
    strength: NDArray[np.float64] = (label_counts(task, vector) @ parts) / spread
    return strength


def _labels(
    task: Task, vector: Vector, draws: Vector, noise: Vector, labels: Mapping[str, Mapping[str, float]]
) -> dict[str, LabelFigures]:
    """Return the figures of each label, with the interval of its F1."""
    counts = label_counts(task, draws)
    sizes = counts @ np.array([2.0, 1.0, 1.0])
    drawn = np.clip(2 * counts[..., 0] / np.where(sizes > 0, sizes, np.inf), 0.0, 1.0)
    names = kind_of(task).names(task)
    clear = dict(zip(names, _strength(task, vector, noise) > 2, strict=True))
    columns = dict(zip(names, drawn.T, strict=True))
    return {
        name: LabelFigures(**label, interval=_interval(label["f1"], columns[name], SHARE) if clear[name] else SHARE)
        for name, label in labels.items()
    }
