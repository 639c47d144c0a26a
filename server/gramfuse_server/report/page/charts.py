"""Numbers as text, bars and curves. Every number has a rendering, and none overflows its space."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from gramfuse_server.report.page.blocks import Bar, Curve, Dot

NONE = "–"
"""Placeholder for a missing number."""

HEIGHT = 200.0
"""Height of a curve's plot, in pixels."""
TOP = 24.0
"""Space above the plot, in pixels."""
MOST = 1000.0
"""No curve is drawn with larger values; ranking metrics are at most 1."""
LEFT, RIGHT = 13.0, 96.0
"""Left and right end of the plot, in percent of the width."""


def score(value: float | None) -> str:
    """Format a metric with three decimals, large ones with four digits."""
    if value is None or not math.isfinite(value):
        return NONE
    return (f"{value:.3f}" if abs(value) < 1000 else f"{value:.4g}").replace("-", "−")


def difference(value: float) -> str:
    """Format a difference in words: higher, lower, or the same."""
    shown = score(abs(value))
    if shown in (NONE, "0.000"):
        return "the same"
    return f"{shown} {'higher' if value > 0 else 'lower'}"


def signed(value: float | None) -> str:
    """Format a difference with its sign."""
    shown = score(value)
    return f"+{shown}" if value is not None and value > 0 and shown not in (NONE, "0.000") else shown


def size(count: float) -> str:
    """Format a number of bytes with a fitting unit."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= factor:
            return f"{count / factor:.1f} {unit}"
    return f"{count:.0f} B"


def duration(seconds: float) -> str:
    """Format seconds with fitting units."""
    if seconds < 60:
        return f"{seconds:.2f} s" if seconds < 1 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def count(number: float, plural: str) -> str:
    """Format a number with a noun, given in the plural, and thousands separators."""
    return f"{number:,.0f} {plural}" if number != 1 else f"1 {plural.removesuffix('s')}"


def bars(values: Sequence[float | None], strong: Iterable[int] = (), most: float | None = None) -> list[Bar | None]:
    """Return a bar for each value, on a common scale that includes zero; None for values that are not finite.

    Args:
        strong: indices of the bars of the merged model.
        most: the end of the scale unless a value exceeds it; by default the largest value.
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
    """Return the curve of a metric; None if it has fewer than two finite values, or one beyond MOST.

    Args:
        points: (x, metric).
        chosen: the x to mark, if any.
        ranked: name of the metric.
    """
    finite = sorted((x, y) for x, y in points if y is not None and math.isfinite(y))
    if len({x for x, _ in finite}) < 2 or max(abs(y) for _, y in finite) > MOST:
        return None
    low, high = min(y for _, y in finite), max(y for _, y in finite)
    step = _step(high - low)
    low, high = math.floor(low / step) * step, math.ceil(high / step) * step
    low, high = (low - step, high + step) if low == high else (low, high)
    left, right = finite[0][0], finite[-1][0]

    def place(y: float) -> float:
        return round(TOP + HEIGHT * (high - y) / (high - low), 1)

    dots, last = [], -math.inf
    for x, y in finite:
        at = LEFT + (RIGHT - LEFT) * (x - left) / (right - left)
        labelled = at - last >= 6  # closer labels would overlap on a phone
        last = at if labelled else last
        dots.append(Dot(round(at, 2), place(y), f"{x:g}" if labelled else "", strong=x == chosen))
    best = max(finite, key=lambda point: point[1])
    worst = min(finite, key=lambda point: point[1])
    description = f"{axis} from {left:g} to {right:g}. Highest {ranked} {score(best[1])} at {best[0]:g}, lowest "
    description += f"{score(worst[1])} at {worst[0]:g}."
    if chosen is not None:
        description += f" Chosen: {chosen:g}."
    ticks = [(place(low + step * part), score(low + step * part)) for part in range(round((high - low) / step) + 1)]
    return Curve(title, description, axis, dots, ticks)


def _step(span: float) -> float:
    """Return a round distance between ticks, with at most four steps over a span; 0.01 for an empty span."""
    if span < 1e-9:
        return 0.01
    power = 10.0 ** math.floor(math.log10(span / 4))
    return next(factor * power for factor in (1.0, 2.0, 2.5, 5.0, 10.0) if factor * power >= span / 4)
