"""Formats the results of experiments as Markdown tables."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

Content = dict[str, Any]
ResultRow = dict[str, Any]

NAMES = {
    "simple": "simple average",
    "task-arithmetic": "task arithmetic, scale chosen",
    "ties": "TIES",
    "fisher": "Fisher",
    "fisher, norm chosen": "Fisher, norm chosen",
    "transport": "optimal transport",
    "ensemble": "ensemble (mean of logits)",
    "regmean": "**RegMean**, α = 0.9",
    "regmean, α chosen": "**RegMean**, α chosen",
    "regmean, by examples": "RegMean, α = 0.9, weighted by examples",
    "joint": "joint training",
    "probe": "head only, on the untouched base",
    "probe, mean-pooled": "head only, on the untouched base, mean-pooled",
    "regmean, refit": "RegMean, head fitted again",
    "simple, fitted": "simple average, fitted head",
    "regmean, fitted": "**RegMean, fitted head** (the default)",
    "simple, both": "simple average, fitted head, fitted again",
    "regmean, both": "RegMean, fitted head, fitted again",
    "simple, chosen": "simple average, fitted head, better of both on validation data",
    "regmean, chosen": "RegMean, fitted head, better of both on validation data",
    "joint, fitted": "joint training from the fitted head",
}
"""Display names of models, in the order of a table."""

DOMAINS = ("emotion", "ner", "sent")

ELSEWHERE = ("task-arithmetic", "ties", "fisher, norm chosen", "regmean, α chosen", "regmean, by examples")
"""Models that the tables of heads leave to the others."""


def read(experiment: str, out: Path) -> list[Content]:
    """Return the results of an experiment, sorted by seed."""
    contents = [json.loads(path.read_text(encoding="utf-8")) for path in out.glob(f"{experiment}-seed*.json")]
    return sorted(contents, key=lambda content: int(content["seed"]))


def table(name: str, experiments: Sequence[str], out: Path) -> str:
    """Return the tables of some experiments, with their captions and notes."""
    results = {experiment: contents for experiment in experiments if (contents := read(experiment, out))}
    if not results:
        return f"{name}: no results yet"
    if name.startswith("heads"):
        for content in (content for contents in results.values() for content in contents):
            content["rows"] = [row for row in content["rows"] if row["model"] not in ELSEWHERE]
    parts = [_seeded(results)]
    if name in DOMAINS:
        parts += [domains(contents) for contents in results.values()]
    elif name == "tasks":
        parts.append(pairs(results["tasks"]))
    else:
        parts += [columns(results), versus(results), behind(results)]
    parts.append(alphas(results))
    parts += [line for experiment, contents in results.items() if (line := fedavg(experiment, contents))]
    parts.append(_cost([content for contents in results.values() for content in contents]))
    return "\n\n".join(filter(None, parts))


def insert(document: Path, name: str, text: str) -> None:
    """Replace the text between `<!-- table NAME -->` and `<!-- end -->` in a Markdown document.

    Raises:
        ValueError: if the document lacks these markers.
    """
    before, begin, rest = document.read_text(encoding="utf-8").partition(f"<!-- table {name} -->\n")
    _, end, after = rest.partition("<!-- end -->")
    if not begin or not end:
        raise ValueError(f"{document} has no markers for the table {name}")
    temporary = document.with_suffix(".partial")
    temporary.write_text(f"{before}{begin}\n{text}\n\n{end}{after}", encoding="utf-8")
    temporary.replace(document)


def columns(results: dict[str, list[Content]]) -> str:
    """Return a table with a column for each experiment, and a column of their mean if there are several."""
    heads = [f"{experiment} ({contents[0]['metric']})" for experiment, contents in results.items()]
    rows = []
    for model, title in _models(results.values()):
        values = [[_whole(content, model) for content in contents] for contents in results.values()]
        rows.append(
            (title, [*map(_spread, values), _mean_over(values)] if len(results) > 1 else [*map(_spread, values)])
        )
    return _markdown([*heads, "mean"] if len(results) > 1 else heads, rows)


def versus(results: dict[str, list[Content]]) -> str:
    """Return a sentence on the lead of RegMean over other models, over all experiments and seeds."""
    contents = [content for each in results.values() for content in each]
    lines = []
    for model in ("simple", "fisher", "ensemble"):
        differences = [_whole(content, "regmean") - _whole(content, model) for content in contents]
        measured = _measured(differences)
        if len(measured) > 1:
            above, below = sum(d > 0 for d in measured), sum(d < 0 for d in measured)
            error = statistics.stdev(measured) / len(measured) ** 0.5
            counts = f"above in {above}, below in {below} of {len(measured)}"
            lines.append(f"{statistics.fmean(measured):+.3f} ± {error:.3f} against {NAMES[model]} ({counts})")
    if not lines:
        return ""
    return f"RegMean, α = 0.9, mean ± standard error over experiments and seeds: {'; '.join(lines)}."


def behind(results: dict[str, list[Content]]) -> str:
    """Return a sentence on how far models with fitted heads are from joint training that starts from the same head."""
    lines = []
    for model in ("regmean, fitted", "regmean, chosen", "simple, chosen"):
        by_experiment = {
            experiment: _measured([_whole(content, "joint, fitted") - _whole(content, model) for content in contents])
            for experiment, contents in results.items()
        }
        means = {experiment: statistics.fmean(each) for experiment, each in by_experiment.items() if each}
        if means:
            most = max(means, key=lambda experiment: means[experiment])
            name = NAMES[model].replace("*", "")
            mean = f"{statistics.fmean(means.values()):.3f} in the mean"
            lines.append(f"{name}: {mean}, {means[most]:.3f} at most ({most})")
    return f"Behind joint training from the fitted head: {'; '.join(lines)}." if lines else ""


def alphas(results: dict[str, list[Content]]) -> str:
    """Return a table of RegMean's validation score over α, averaged over all merges and seeds."""
    curves = {
        experiment: [row["curve"] for content in contents for row in _rows(content, "regmean, α chosen")]
        for experiment, contents in results.items()
    }
    heads: list[str] = []
    rows = []
    for experiment, each in curves.items():
        points = [list(place) for place in zip(*each, strict=True)]
        heads = heads or [f"α = {point[0]['alpha']:g}" for point in points]
        rows.append((experiment, [f"{_mean([one['validation'] for one in point]):.3f}" for point in points]))
    title = "RegMean on validation data, over α, mean over all merges and seeds:"
    return f"{title}\n\n{_markdown(heads, rows, 'experiment')}" if heads else ""


def domains(contents: Sequence[Content]) -> str:
    """Return a table of merges of pairs, in and out of their domains, and of all domains.

    Values are means over domains of the metric on each domain's held-out data.
    """
    whole = len(contents[0]["examples"])
    kinds: list[tuple[str, Callable[[ResultRow], float | None]]] = [
        ("pairs, in domain", lambda row: _by(row, inside=True) if len(row["silos"]) == 2 else None),
        ("pairs, out of domain", lambda row: _by(row, inside=False) if len(row["silos"]) == 2 else None),
        (f"all {whole}", lambda row: _by(row, inside=True) if len(row["silos"]) == whole else None),
    ]
    rows = [("each on its own data", ["", "", _spread([_own(content) for content in contents])])]
    rows.append(("one for all, mean", ["", "", _spread([_mean(_all_of_alone(content)) for content in contents])]))
    rows.append(("one for all, best", ["", "", _spread([max(_all_of_alone(content)) for content in contents])]))
    for model, title in list(_models([contents]))[2:]:
        cells = []
        for _, value in kinds:
            seeds = [[v for row in _rows(content, model) if (v := value(row)) is not None] for content in contents]
            cells.append(_spread([_mean(seed) for seed in seeds]))
        rows.append((title, cells))
    metric = contents[0]["metric"]
    return f"`{contents[0]['experiment']}`, {metric}:\n\n" + _markdown([head for head, _ in kinds], rows)


def pairs(contents: Sequence[Content]) -> str:
    """Return a table of merges of two tasks: the mean over partners for each task, and the mean over tasks."""
    names = list(contents[0]["examples"])
    rows = [("each task's own", _pair_cells(contents, "alone", names))]
    rows += [(title, _pair_cells(contents, model, names)) for model, title in list(_models([contents]))[2:]]
    return _markdown([*names, "mean"], rows)


def _pair_cells(contents: Sequence[Content], model: str, names: Sequence[str]) -> list[str]:
    by_task = [[_mean([row["by"][n] for row in _rows(c, model) if n in row["silos"]]) for c in contents] for n in names]
    return [*map(_spread, by_task), _mean_over(by_task)]


def fedavg(experiment: str, contents: Sequence[Content]) -> str:
    """Return a sentence on the rounds and bytes that FedAvg needs to match one exchange of RegMean."""
    for content in contents:
        for row in _rows(content, "fedavg"):
            metric, goal = content["metric"], row["goal"]
            curve = [metrics[metric] for metrics in row["rounds"]]
            sent = row["bytes"] / 1e6
            matched = next((number for number, value in enumerate(curve, 1) if value >= goal), 0)
            end = (
                f"matches it after {_rounds(matched)} ({matched * sent:.0f} MB from each silo)"
                if matched
                else f"does not match it in {_rounds(len(curve))} ({len(curve) * sent:.0f} MB from each silo)"
            )
            upload = content["upload"]
            return (
                f"{experiment}, seed {content['seed']}: one exchange of RegMean gives {goal:.3f} for "
                f"{upload['open'] / 1e6:.0f} MB from each silo (open; {upload['secure'] / 1e6:.0f} MB masked). FedAvg "
                f"with as much training in each round {end}: {', '.join(f'{value:.3f}' for value in curve)}."
            )
    return ""


def _rounds(number: int) -> str:
    return f"{number} round{'s' if number > 1 else ''}"


def _models(results: Iterable[Sequence[Content]]) -> Iterable[tuple[str, str]]:
    """Yield the measured models and their display names, starting with two rows for the silos alone."""
    measured = {row["model"] for contents in results for content in contents for row in content["rows"]}
    yield "alone, mean", "silos alone, mean"
    yield "alone, best", "best silo alone"
    yield from ((model, title) for model, title in NAMES.items() if model in measured)


def _whole(content: Content, model: str) -> float:
    """Return the score of a merge of all silos on all their data together; NaN if it was not measured."""
    if model.startswith("alone"):
        scores = [row["all"][content["metric"]] for row in _rows(content, "alone")]
        return max(scores) if model == "alone, best" else _mean(scores)
    count = len(content["examples"])
    scores = [row["in"][content["metric"]] for row in _rows(content, model) if len(row["silos"]) == count]
    return scores[0] if scores else float("nan")


def _rows(content: Content, model: str) -> list[ResultRow]:
    return [row for row in content["rows"] if row["model"] == model]


def _by(row: ResultRow, *, inside: bool) -> float:
    return _mean([score for silo, score in row["by"].items() if (silo in row["silos"]) == inside])


def _own(content: Content) -> float:
    return _mean([row["by"][row["silos"][0]] for row in _rows(content, "alone")])


def _all_of_alone(content: Content) -> list[float]:
    return [_mean(list(row["by"].values())) for row in _rows(content, "alone")]


def _mean(values: Sequence[float]) -> float:
    return statistics.fmean(values) if values else float("nan")


def _mean_over(columns: Sequence[Sequence[float]]) -> str:
    """Return mean ± deviation over seeds of the mean over columns, for the seeds that all columns have."""
    return _spread([_mean(values) for values in zip(*columns, strict=False)])


def _measured(values: Sequence[float]) -> list[float]:
    return [value for value in values if value == value]  # NaN is not itself


def _spread(values: Sequence[float]) -> str:
    """Return mean ± sample standard deviation, with the number of values if some are missing (NaN)."""
    measured = _measured(values)
    if not measured:
        return ""
    deviation = f" ± {statistics.stdev(measured):.3f}" if len(measured) > 1 else ""
    number = "" if len(measured) == len(values) else f" ({len(measured)} of {len(values)})"
    return f"{statistics.fmean(measured):.3f}{deviation}{number}"


def _markdown(heads: Sequence[str], rows: Sequence[tuple[str, Sequence[str]]], first: str = "model") -> str:
    lines = [f"| {first} | {' | '.join(heads)} |", "|---|" + "---|" * len(heads)]
    lines += [f"| {title} | {' | '.join(cells)} |" for title, cells in rows]
    return "\n".join(lines)


def _seeded(results: dict[str, list[Content]]) -> str:
    """Return a sentence on the seeds, by experiment unless they are all the same."""
    seeds = {
        experiment: ", ".join(str(content["seed"]) for content in contents) for experiment, contents in results.items()
    }
    if len(set(seeds.values())) == 1:
        return f"Seeds: {next(iter(seeds.values()))}."
    return f"Seeds: {'; '.join(f'{experiment} {numbers}' for experiment, numbers in seeds.items())}."


def _cost(contents: Sequence[Content]) -> str:
    upload = statistics.fmean(content["upload"]["open"] for content in contents) / 1e6
    masked = statistics.fmean(content["upload"]["secure"] for content in contents) / 1e6
    training = statistics.fmean(content["train-seconds"] for content in contents)
    measuring = statistics.fmean(sum(row["seconds"] for row in content["rows"]) for content in contents)
    machines = sorted({content["machine"] for content in contents})
    return (
        f"Each silo sends {upload:.1f} MB open, {masked:.1f} MB masked. On average, training all silos took "
        f"{training:.0f} s, everything else {measuring:.0f} s ({'; '.join(machines)})."
    )
