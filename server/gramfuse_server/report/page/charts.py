"""Numbers as text, bars and curves. Whatever number comes, something is shown, and nothing outside its room."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from gramfuse_server.report.page.blocks import Bar, Curve, Dot

NONE = "–"
"""Stands where there is no number."""

HEIGHT = 200.0
"""Of a curve's plot, in pixels."""
TOP = 24.0
"""Over it."""
MOST = 1000.0
"""Metrics that rank models are 1 at most."""
LEFT, RIGHT = 13.0, 96.0
"""Where it begins and ends, in percent of the width."""


def score(value: float | None) -> str:
    """Return a metric with three decimals, or large ones with four digits."""
    if value is None or not math.isfinite(value):
        return NONE
    return (f"{value:.3f}" if abs(value) < 1000 else f"{value:.4g}").replace("-", "−")


def difference(value: float) -> str:
    """Return how much higher or lower something is, in words."""
    shown = score(abs(value))
    if shown in (NONE, "0.000"):
        return "the same"
    return f"{shown} {'higher' if value > 0 else 'lower'}"


def signed(value: float | None) -> str:
    """Return a difference with its sign."""
    shown = score(value)
    return f"+{shown}" if value is not None and value > 0 and shown not in (NONE, "0.000") else shown


def size(count: float) -> str:
    """Return a number of bytes in a unit that fits."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= factor:
            return f"{count / factor:.1f} {unit}"
    return f"{count:.0f} B"


def duration(seconds: float) -> str:
    """Return seconds in units that fit."""
    if seconds < 60:
        return f"{seconds:.2f} s" if seconds < 1 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def count(number: float, of: str) -> str:
    """Return a number of things, in thousands with commas."""
    return f"{number:,.0f} {of}" if number != 1 else f"1 {of.removesuffix('s')}"


def bars(values: Sequence[float | None], strong: Iterable[int] = (), most: float | None = None) -> list[Bar | None]:
    """Return a bar for each value, all on one scale with zero in it; None for what is no number.

    Args:
        strong: places of those of the merged model.
        most: the end of the scale, if no value is above it; by default the largest value.
    """
    numbers = [value for value in values if value is not None and math.isfinite(value)]
    low, high = min([0.0, *numbers]), max([0.0, *numbers, *([most] if most is not None else [])])
    span = high - low
    if not 0 < span < math.inf:
        return [None] * len(values)
    marked = set(strong)
    return [
        None
        if value is None or not math.isfinite(value)
        else Bar(
            round(100 * ((min(value, 0.0) - low) / span), 2),
            round(100 * (abs(value) / span), 2),
            strong=place in marked,
        )
        for place, value in enumerate(values)
    ]


def curve(
    title: str, axis: str, points: Sequence[tuple[float, float | None]], chosen: float | None, ranked: str
) -> Curve | None:
    """Return the curve of a metric; None if fewer than two of its values are numbers, or one is beyond MOST.

    Args:
        points: x and the metric.
        chosen: the x that is marked, if any.
        ranked: what the metric is called.
    """
    known = sorted((x, y) for x, y in points if y is not None and math.isfinite(y))
    if len({x for x, _ in known}) < 2 or max(abs(y) for _, y in known) > MOST:
        return None
    low, high = min(y for _, y in known), max(y for _, y in known)
    step = _step(high - low)
    low, high = math.floor(low / step) * step, math.ceil(high / step) * step
    low, high = (low - step, high + step) if low == high else (low, high)
    left, right = known[0][0], known[-1][0]

    def place(y: float) -> float:
        return round(TOP + HEIGHT * (high - y) / (high - low), 1)

    dots, last = [], -math.inf
    for x, y in known:
        at = LEFT + (RIGHT - LEFT) * (x - left) / (right - left)
        labelled = at - last >= 6  # more labels than that run into each other on a phone
        last = at if labelled else last
        dots.append(Dot(round(at, 2), place(y), f"{x:g}" if labelled else "", strong=x == chosen))
    best = max(known, key=lambda point: point[1])
    worst = min(known, key=lambda point: point[1])
    told = f"{axis} from {left:g} to {right:g}. Highest {ranked} {score(best[1])} at {best[0]:g}, lowest "
    told += f"{score(worst[1])} at {worst[0]:g}."
    if chosen is not None:
        told += f" Chosen: {chosen:g}."
    ticks = [(place(low + step * part), score(low + step * part)) for part in range(round((high - low) / step) + 1)]
    return Curve(title, told, axis, dots, ticks)


def _step(span: float) -> float:
    """Return a round distance between ticks, so that there are four at most over a span; 0.01 where there is none."""
    if span < 1e-9:
        return 0.01
    power = 10.0 ** math.floor(math.log10(span / 4))
    return next(factor * power for factor in (1.0, 2.0, 2.5, 5.0, 10.0) if factor * power >= span / 4)
