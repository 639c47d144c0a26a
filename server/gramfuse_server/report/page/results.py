"""Sections of a page on measurements: result, models, silos, labels, and the search."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from gramfuse_protocol.held_out.metrics import primary
from gramfuse_protocol.tasks.registry import TASK_KINDS
from gramfuse_server.report.choices import Tried, Tuning
from gramfuse_server.report.page import charts
from gramfuse_server.report.page.blocks import (
    Block,
    Cell,
    Column,
    Facts,
    Folded,
    Notice,
    PageSection,
    Table,
    TableRow,
    Text,
    Tile,
    Tiles,
)
from gramfuse_server.report.page.charts import count, score
from gramfuse_server.report.page.view import Reading
from gramfuse_server.report.page.words import MERGES, columns, name_of, noise, off_by, words_of, words_of_metric
from gramfuse_server.report.ranges import Metrics
from gramfuse_server.report.schema import LabelFigures, Measured

OPENLY = 24
"""Most labels to show unfolded."""
ENDS = 10
"""If there are more, number of best and of worst labels to show unfolded."""

At = Callable[[Mapping[str, Metrics] | None, str], float | None]
"""Returns the ranking metric at a silo, from metrics by silo."""


def result(reading: Reading) -> PageSection:
    """The merged model next to its alternatives."""
    merged = reading.one(reading.merged)
    if merged is None:
        why = reading.report.unmeasured
        text = (
            f"No metrics: {why}."
            if why
            else "Nothing was measured: statistics files contain no held-out examples. gramfuse tune measures merges "
            "of files on your own data."
        )
        return PageSection("result", "Result", [Notice("Not measured", text)])
    others = [
        ("Best silo alone" if reading.alone and reading.alone.kind == "silo" else "Silos alone", reading.alone),
        ("Simple average", reading.one("simple") if reading.merged != "simple" else None),
        ("Joint training", reading.one("joint")),
    ]
    shown = [("Merged model", merged), *((title, model) for title, model in others if model is not None)]
    values = [reading.value(model) for _, model in shown]
    bars = charts.bars(values, strong=[0], most=1.0)
    tiles = [
        Tile(
            title,
            _with_error(model, reading.ranked, value),
            name_of(model) if model is merged else _compared(model, values[0] - value),
            bar,
            strong=model is merged,
        )
        for (title, model), value, bar in zip(shown, values, bars, strict=True)
    ]
    examples = count(merged.metrics["examples"], "held-out examples")
    meaning = words_of_metric(reading.ranked) or ""
    blocks: list[Block] = [
        Text(f"{reading.ranked.capitalize()} on {examples} of all silos together: {meaning}. Higher is better."),
        Tiles(tiles),
    ]
    if (sentence := noise(reading.report, reading.ranked)) is not None:
        blocks.append(Text(sentence))
    if reading.tuning is not None:
        blocks.append(Text("The merge was chosen on other examples; see the search below."))
    if reading.unsolved:
        groups = count(len(reading.unsolved), "groups")
        blocks.append(Notice("Note", f"{groups} of weights were not solved exactly; see the quality of the solve."))
    return PageSection("result", "Result", blocks)


def _with_error(model: Measured, metric: str, value: float | None) -> str:
    """Return a metric of a model, with its error if it is noisy."""
    off = off_by(model, metric)
    return score(value) + ("" if off is None else f" ± {score(off)}")


def _compared(model: Measured, lead: float) -> str:
    note = f"the merge is {charts.difference(lead)}"
    return f"{model.name}; {note}" if model.kind == "silo" else note


def models(reading: Reading) -> PageSection | None:
    """All models and metrics."""
    last = reading.session(reading.first) if reading.earlier else ""
    listed = [(model, place) for place, model in reading.earlier]
    listed += [(model, last if model.kind in MERGES else "") for model in reading.models]
    if not listed:
        return None
    values = [columns(model, reading.tasks) for model, _ in listed]
    titles = list(dict.fromkeys([reading.ranked, *(title for row in values for title in row)]))
    drawn = charts.bars(
        [row.get(reading.ranked) for row in values],
        strong=[place for place, (model, _) in enumerate(listed) if model.kind == reading.merged],
        most=1.0,
    )
    timed = any(model.has("seconds") for model, _ in listed)
    sent = any(model.has("bytes") for model, _ in listed)
    rows = []
    for (model, place), row, bar in zip(listed, values, drawn, strict=True):
        cells = [
            Cell(_with_error(model, title, row.get(title)), bar if title == reading.ranked else None)
            for title in titles
        ]
        cells += [Cell(charts.duration(model.seconds) if model.has("seconds") else charts.NONE)] if timed else []
        cells += [Cell(charts.size(sum(model.bytes.values())) if model.has("bytes") else charts.NONE)] if sent else []
        name = name_of(model) + (f", {place}" if place else "")
        merged = model.kind == reading.merged
        note = "the merged model" if merged and place == last else model.note
        rows.append(TableRow(name, cells, note=note, strong=merged))
    examples = count(listed[-1][0].metrics["examples"], "held-out examples")
    head = [Column("Model"), *(Column(title) for title in titles)]
    head += [*([Column("Time")] if timed else []), *([Column("Sent")] if sent else [])]
    blocks: list[Block] = [Table(f"Models on {examples} of all silos together", head, rows)]
    for task in reading.tasks if len(reading.tasks) > 1 else []:
        blocks.append(_of_task(reading, task))
    kinds = dict.fromkeys(model.kind for model, _ in listed)
    words = [title.rpartition(": ")[2] for title in titles]
    glossary = [
        (next(name_of(m) for m, _ in listed if m.kind == kind), about)
        for kind in kinds
        if (about := words_of(kind)) is not None
    ]
    glossary += [(word, about) for word in dict.fromkeys(words) if (about := words_of_metric(word)) is not None]
    blocks.append(Folded("What these models and metrics mean", [Facts(glossary)]))
    return PageSection("models", "Models", blocks)


def _of_task(reading: Reading, task: str) -> Table:
    measured = [model for model in reading.models if task in model.tasks]
    titles = list(dict.fromkeys(title for model in measured for title in model.tasks[task] if title != "examples"))
    ranked = primary(reading.tasks[task])
    drawn = charts.bars(
        [model.tasks[task].get(ranked) for model in measured],
        strong=[place for place, model in enumerate(measured) if model.kind == reading.merged],
        most=1.0,
    )
    rows = [
        TableRow(
            name_of(model),
            [Cell(score(model.tasks[task].get(title)), bar if title == ranked else None) for title in titles],
            strong=model.kind == reading.merged,
        )
        for model, bar in zip(measured, drawn, strict=True)
    ]
    examples = count(measured[0].tasks[task]["examples"], "held-out examples") if measured else ""
    return Table(f"Task “{task}”, on {examples}", [Column("Model"), *(Column(title) for title in titles)], rows)


def by_silo(reading: Reading) -> PageSection | None:
    """The models at each silo, if the report has metrics by silo."""
    measured = [model for model in reading.models if model.silos]
    merged = next((model for model in measured if model.kind == reading.merged), None)
    if merged is None:
        return None
    silos = list(merged.silos)
    silo_models = {model.name: model.silos for model in measured if model.kind == "silo"}
    alone = next((model.silos for model in measured if model.kind == "alone"), None)
    simple = next((model.silos for model in measured if model.kind == "simple" and model is not merged), None)

    def at(by_silo: Mapping[str, Metrics] | None, silo: str) -> float | None:
        metrics = (by_silo or {}).get(silo)
        return None if metrics is None else metrics.get(reading.primary(silo, metrics))

    each = [("Merged model", {silo: at(merged.silos, silo) for silo in silos})]
    if simple:
        each.append(("Simple average", {silo: at(simple, silo) for silo in silos}))
    if silo_models or alone:
        each.append(("Its own model", {silo: at(alone or silo_models.get(silo), silo) for silo in silos}))
    flat = [values[silo] for silo in silos for _, values in each]
    drawn = charts.bars(flat, strong=range(0, len(flat), len(each)), most=1.0)
    several = len(reading.tasks) > 1
    rows = []
    for place, silo in enumerate(silos):
        mine = slice(place * len(each), (place + 1) * len(each))
        cells = [Cell(score(value), bar) for value, bar in zip(flat[mine], drawn[mine], strict=True)]
        examples = count(merged.silos[silo]["examples"], "examples")
        metric = f"{reading.primary(silo, merged.silos[silo])}, " if several else ""
        rows.append(TableRow(silo, cells, note=f"{metric}{examples}"))
    metric = "the metric of its task" if several else reading.ranked
    blocks: list[Block] = [
        Table(
            f"On each silo's held-out examples: {metric}",
            [Column("Silo"), *(Column(title) for title, _ in each)],
            rows,
        ),
        Folded("All models at all silos", [_matrix(reading, measured, silos, at)]),
        Folded("All metrics of the merged model at each silo", [_metrics_by_silo(merged)]),
    ]
    return PageSection("silos", "By silo", blocks)


def _matrix(reading: Reading, measured: Sequence[Measured], silos: Sequence[str], at: At) -> Table:
    rows = [
        TableRow(
            name_of(model),
            [Cell(score(at(model.silos, silo))) for silo in silos],
            strong=model.kind == reading.merged,
        )
        for model in measured
    ]
    metric = reading.ranked if len(reading.tasks) == 1 else "the metric of each silo's task"
    return Table(f"All models at all silos: {metric}", [Column("Model"), *map(Column, silos)], rows)


def _metrics_by_silo(merged: Measured) -> Table:
    by_silo = merged.silos
    titles = list(dict.fromkeys(title for metrics in by_silo.values() for title in metrics if title != "examples"))
    rows = [
        TableRow(silo, [Cell(f"{metrics['examples']:,.0f}"), *(Cell(score(metrics.get(title))) for title in titles)])
        for silo, metrics in by_silo.items()
    ]
    return Table("The merged model at each silo", [Column("Silo"), Column("examples"), *map(Column, titles)], rows)


def by_label(reading: Reading) -> PageSection | None:
    """F1 of each label, if the report has figures by label."""
    merged = reading.one(reading.merged)
    blocks: list[Block] = []
    for task, labels in (merged.labels if merged is not None else {}).items():
        blocks += _labels_of(reading, task, labels)
    return PageSection("labels", "By label", blocks) if blocks else None


def _labels_of(reading: Reading, task: str, merged: Mapping[str, LabelFigures]) -> list[Block]:
    others = [("simple average", reading.one("simple"))] if reading.merged != "simple" else []
    if reading.alone is not None:
        others.append(("best silo alone" if reading.alone.kind == "silo" else "silos alone", reading.alone))
    beside = [(title, model.labels.get(task, {})) for title, model in others if model is not None]
    beside = [(title, labels) for title, labels in beside if labels]
    everything: dict[str, LabelFigures] = {}
    for _, labels in [*reversed(beside), ("", merged)]:
        everything.update(labels)
    order = sorted(everything, key=lambda label: (-merged[label].f1 if label in merged else 1.0, label))
    each = [("merged model", merged), *beside]

    def table(caption: str, names: Sequence[str]) -> Table:
        flat = [labels[name].f1 if name in labels else None for name in names for _, labels in each]
        drawn = charts.bars(flat, strong=range(0, len(flat), len(each)), most=1.0)
        rows = []
        for place, name in enumerate(names):
            mine = slice(place * len(each), (place + 1) * len(each))
            spans = [labels[name].interval if name in labels else None for _, labels in each]
            cells = [
                Cell(score(value) + _between(span), bar)
                for value, bar, span in zip(flat[mine], drawn[mine], spans, strict=True)
            ]
            ours = merged.get(name)
            cells.append(Cell(score(None if ours is None else ours.precision)))
            cells.append(Cell(score(None if ours is None else ours.recall)))
            rows.append(TableRow(name, cells, note=count(everything[name].examples, "examples")))
        titles = [*(f"F1, {title}" for title, _ in each), "precision, merged model", "recall, merged model"]
        return Table(caption, [Column(unit.capitalize()), *map(Column, titles)], rows)

    unit, units = TASK_KINDS[reading.tasks[task]].unit
    scope = f" of task “{task}”" if task else ""
    if reading.alone is not None and reading.alone.kind == "silo":
        scope += f", beside {reading.alone.name} alone"
    if len(order) <= OPENLY:
        return [table(f"All {len(order)} {units}{scope}, the best first", order)]
    middle = order[ENDS:-ENDS]
    return [
        table(f"The {ENDS} best of {len(order)} {units}{scope}", order[:ENDS]),
        table(f"The {ENDS} worst of {len(order)} {units}{scope}", order[-ENDS:]),
        Folded(f"The {len(middle)} {units} between", [table(f"The {len(middle)} {units} between{scope}", middle)]),
    ]


def _between(interval: Sequence[float] | None) -> str:
    """Return a noisy value's interval in brackets, or nothing for an exact one."""
    return "" if interval is None else f" [{score(interval[0])}, {score(interval[1])}]"


def search(reading: Reading) -> PageSection | None:
    """What `gramfuse tune` tried."""
    tuning = reading.tuning
    if tuning is None:
        return None
    ranked, chosen = tuning.metric, tuning.chosen
    examples = count(sum(tuning.examples.values()), "validation examples")
    blocks: list[Block] = [
        Text(f"Merges were ranked by {ranked} on {examples}, none of which is among the reported examples.")
    ]
    curve = charts.curve(
        f"{ranked.capitalize()} over α on validation examples",
        "α",
        [(trial.alpha, trial.score) for trial in tuning.alpha],
        chosen.alpha,
        ranked,
    )
    blocks += [curve] if curve is not None else []
    trials: list[tuple[str, Tried, bool]]
    trials = [(f"{trial.alpha:g}", trial, trial.alpha == chosen.alpha) for trial in tuning.alpha]
    blocks.append(_trials("Values of α", "α", trials, ranked, drawn=curve is None))
    if tuning.weights:
        trials = [
            (
                ", ".join(f"{silo} × {weight:g}" for silo, weight in trial.weights.items()),
                trial,
                trial.weights == chosen.weights,
            )
            for trial in tuning.weights
        ]
        weights = _trials(f"Weights of the silos, at α {chosen.alpha:g}", "Weights", trials, ranked)
        blocks.append(weights if len(trials) <= ENDS else Folded(f"All {len(trials)} tried weights", [weights]))
    if tuning.order:
        trials = [(f"{place}. with {step.silos[-1]}", step, False) for place, step in enumerate(tuning.order, 1)]
        blocks.append(_trials("Silos added one after the other", "Merge", trials, ranked))
    if tuning.influence:
        blocks.append(_influence(tuning, ranked))
    return PageSection("search", "Search", blocks)


def _trials(
    caption: str, head: str, trials: Sequence[tuple[str, Tried, bool]], ranked: str, *, drawn: bool = True
) -> Table:
    chosen = [place for place, (_, _, mark) in enumerate(trials) if mark]
    scores = [trial.score for _, trial, _ in trials]
    bars = charts.bars(scores, strong=chosen, most=1.0) if drawn else [None] * len(scores)
    rows = [
        TableRow(f"{name}, chosen" if mark else name, [Cell(score(trial.score), bar)], strong=mark)
        for (name, trial, mark), bar in zip(trials, bars, strict=True)
    ]
    return Table(caption, [Column(head), Column(ranked)], rows)


def _influence(tuning: Tuning, ranked: str) -> Table:
    rows = [
        TableRow(
            f"without {entry.silo}",
            [
                Cell(score(entry.without)),
                Cell(charts.signed(entry.difference)),
                Cell(charts.signed(entry.reported.get(ranked))),
            ],
        )
        for entry in tuning.influence
    ]
    titles = [Column("Merge"), Column(ranked), Column("difference"), Column("difference on reported examples")]
    return Table("The merge without each silo", titles, rows)
