"""Draws charts of the experiments' results, as SVG.

    python benchmarks/accuracy/charts.py --out benchmarks/out --to docs/charts

Charts without results are left out.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

from tables import Content, read

matplotlib.use("svg")

from matplotlib import pyplot  # after choosing the backend
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, NullLocator

Point = tuple[float, float]
Place = Callable[[dict[str, Any]], Any]
"""Returns the x value of a row, or None to skip it."""

COLOURS = {
    "RegMean": "#0b6e99",
    "RegMean, masked": "#7fb5cc",
    "simple average": "#8a6d00",
    "Fisher": "#7a3e9d",
    "ensemble": "#4d7c0f",
    "FedAvg": "#b3401f",
    "joint training": "#555555",
}
MARKERS = dict(zip(COLOURS, "ooD^svx", strict=True))

STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "gramfuse",
    "font.family": "sans-serif",
    "font.sans-serif": ["Helvetica", "Arial", "DejaVu Sans"],
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e3e3e3",
    "figure.facecolor": "white",
    "legend.edgecolor": "white",
    "legend.framealpha": 1.0,
}


def main() -> None:
    """Draw all charts that have results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/out"), help="directory of results")
    parser.add_argument("--to", type=Path, default=Path("docs/charts"), help="directory for charts")
    options = parser.parse_args()
    options.to.mkdir(parents=True, exist_ok=True)
    for name, draw in CHARTS.items():
        with pyplot.rc_context(STYLE):
            figure, axes = pyplot.subplots(figsize=(7.2, 4.2), layout="constrained")
            if draw(axes, options.out):
                figure.savefig(options.to / f"{name}.svg", metadata={"Date": None, "Title": axes.get_title()})
                print(options.to / f"{name}.svg")
            pyplot.close(figure)


def alpha(axes: Axes, out: Path) -> bool:
    """Accuracy over α."""
    contents = _with(read("hwu64", out), _fixed("alpha"))
    if not contents:
        return False
    _line(axes, "RegMean", _curve(contents, _fixed("alpha")))
    _level(axes, "simple average", contents, "simple")
    _level(axes, "joint training", contents, "joint")
    title = "One exchange over α (hwu64, 4 silos, 85% skew)"
    _finish(axes, contents, title, "α: share of the off-diagonal that is kept", legend=(0.66, 0.2))
    return True


def structure(axes: Axes, out: Path) -> bool:
    """Accuracy over the structure of the Gram matrices, with the bytes that each silo sends."""
    contents = _with(read("hwu64", out), _fixed("structure"))
    rows = [row for content in contents for row in content["rows"] if "structure" in row and "curve" not in row]
    chosen = {row["model"]: row for content in contents for row in content["rows"] if row["model"].endswith("α chosen")}
    if not rows:
        return False
    for name, mode in (("RegMean", "open"), ("RegMean, masked", "secure")):
        points = [
            (row["bytes"][mode] / 1e6, chosen[f"{row['model']}, α chosen"]["in"][contents[0]["metric"]])
            for row in rows
            if f"{row['model']}, α chosen" in chosen
        ]
        _line(axes, name, points)
        if mode == "open":
            for row, (x, y) in zip(rows, points, strict=False):
                offset = (6, 5) if row["structure"] == "full" else (7, -11)
                axes.annotate(row["structure"], (x, y), offset, textcoords="offset points", fontsize=9)
    _level(axes, "simple average", contents, "simple")
    axes.set_xlim(left=0)
    _finish(axes, contents, "Structure of the Gram matrices (hwu64, α chosen)", "MB that each silo sends")
    return True


def tokens(axes: Axes, out: Path) -> bool:
    """Accuracy over the number of token rows behind a Gram matrix."""
    contents = _with(read("hwu64", out), _fixed("tokens"))
    if not contents:
        return False
    _line(axes, "RegMean", _curve(contents, _fixed("tokens")))
    _level(axes, "simple average", contents, "simple")
    _logarithmic(axes)
    _finish(axes, contents, "Token rows for a Gram matrix (hwu64, α = 0.9)", "most token rows that each silo measures")
    return True


def silos(axes: Axes, out: Path) -> bool:
    """Accuracy over the number of silos that are merged."""
    contents = read("hwu64-8", out)
    if not contents:
        return False
    for name, model in (("RegMean", "regmean"), ("simple average", "simple"), ("Fisher", "fisher")):
        _line(
            axes, name, _curve(contents, lambda row, model=model: len(row["silos"]) if row["model"] == model else None)
        )
    _finish(axes, contents, "Silos in the merge (hwu64, 8 silos, on the data of all)", "silos that are merged")
    return True


def skew(axes: Axes, out: Path) -> bool:
    """Accuracy over label skew."""
    by_skew = {int(name.split("-")[1]): read(name, out) for name in (f"skew-{n}" for n in (25, 50, 70, 95, 100))}
    by_skew[85] = [content for content in read("hwu64", out) if content["seed"] in _seeds(by_skew.values())]
    by_skew = {share: contents for share, contents in sorted(by_skew.items()) if contents}
    if len(by_skew) < 2:
        return False
    names = {"RegMean": "regmean", "simple average": "simple", "Fisher": "fisher", "ensemble": "ensemble"}
    for name, model in names.items():
        points = [(float(share), _mean(contents, model)) for share, contents in by_skew.items()]
        _line(axes, name, [(x, y) for x, y in points if y is not None])
    contents = next(iter(by_skew.values()))
    title = "Label skew (hwu64, 4 silos; 25% is iid)"
    _finish(axes, contents, title, "% of each intent's requests at one silo")
    return True


def traffic(axes: Axes, out: Path) -> bool:
    """Accuracy over the bytes that each silo sends: rounds of RegMean, and rounds of FedAvg."""
    contents = _with(read("hwu64", out), _fixed("rounds"))
    if not contents:
        return False
    content = contents[0]
    metric, fedavg = content["metric"], _row(content, "fedavg")
    assert fedavg is not None
    models = ["regmean", "regmean, round 2", "regmean, round 3"]
    scores = [row["in"][metric] for model in models if (row := _row(content, model))]
    for name, mode in (("RegMean", "open"), ("RegMean, masked", "secure")):
        sent = content["upload"][mode] / 1e6
        _line(axes, name, [(number * sent, score) for number, score in enumerate(scores, 1)])
    each = fedavg["bytes"] / 1e6
    _line(axes, "FedAvg", [(n * each, metrics[metric]) for n, metrics in enumerate(fedavg["rounds"], 1)])
    _level(axes, "joint training", contents, "joint")
    _logarithmic(axes)
    _finish(axes, contents, "Bytes sent (hwu64; each point is a round)", "MB that each silo sends in all")
    return True


CHARTS: dict[str, Callable[[Axes, Path], bool]] = {
    "alpha": alpha,
    "structure": structure,
    "tokens": tokens,
    "silos": silos,
    "skew": skew,
    "bytes": traffic,
}


def _fixed(key: str) -> Place:
    """Return a function for a row's value of a key; None for rows that chose it on validation data."""
    return lambda row: None if "curve" in row else row.get(key)


def _with(contents: Sequence[Content], place: Place) -> list[Content]:
    """Return the results of the seeds that have a row with an x value."""
    return [content for content in contents if any(place(row) is not None for row in content["rows"])]


def _curve(contents: Sequence[Content], place: Place) -> list[Point]:
    """Return (x, mean of the metric over seeds) for all rows with an x value."""
    scores: dict[float, list[float]] = {}
    for content in contents:
        for row in content["rows"]:
            x = place(row)
            if x is not None:
                scores.setdefault(float(x), []).append(row.get("all", row["in"])[content["metric"]])
    return [(x, statistics.fmean(values)) for x, values in sorted(scores.items())]


def _row(content: Content, model: str) -> dict[str, Any] | None:
    everyone = list(content["examples"])
    return next((row for row in content["rows"] if row["model"] == model and row["silos"] == everyone), None)


def _mean(contents: Sequence[Content], model: str) -> float | None:
    values = [row["in"][content["metric"]] for content in contents if (row := _row(content, model))]
    return statistics.fmean(values) if values else None


def _seeds(results: Any) -> set[int]:
    return {content["seed"] for contents in results for content in contents}


def _line(axes: Axes, name: str, points: Sequence[Point]) -> None:
    if points:
        x, y = zip(*points, strict=True)
        axes.plot(x, y, color=COLOURS[name], marker=MARKERS[name], label=name, linewidth=2, markersize=6)


def _level(axes: Axes, name: str, contents: Sequence[Content], model: str) -> None:
    value = _mean(contents, model)
    if value is not None:
        axes.axhline(value, color=COLOURS[name], linestyle="--", linewidth=1.5, label=f"{name} ({value:.3f})")


def _logarithmic(axes: Axes) -> None:
    """Make the x axis logarithmic, with plain numbers as labels."""
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.xaxis.set_minor_locator(NullLocator())


def _finish(axes: Axes, contents: Sequence[Content], title: str, x: str, legend: str | Point = "best") -> None:
    seeds = ", ".join(str(content["seed"]) for content in contents)
    axes.set_title(title, loc="left", fontsize=12, fontweight="bold")
    axes.set_xlabel(x)
    axes.set_ylabel(f"{contents[0]['metric']} (seed {seeds})" if "," not in seeds else f"{contents[0]['metric']}, mean")
    axes.legend(loc=legend, fontsize=9)


if __name__ == "__main__":
    main()
