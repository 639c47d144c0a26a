"""What was measured: the sections of a page on results, models, silos, labels, and the search."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from gramfuse_protocol.held_out.metrics import primary
from gramfuse_protocol.tasks.registry import KINDS
from gramfuse_server.report.page import charts
from gramfuse_server.report.page.blocks import (
    Block,
    Cell,
    Column,
    Facts,
    Folded,
    Notice,
    PageSection,
    Row,
    Table,
    Text,
    Tile,
    Tiles,
)
from gramfuse_server.report.page.charts import count, score
from gramfuse_server.report.page.view import Reading
from gramfuse_server.report.page.words import MERGES, columns, name_of, noise, off_by, words_of, words_of_metric
from gramfuse_server.report.ranges import Metrics
from gramfuse_server.report.schema import LabelFigures, Measured, Tried, Tuning

OPENLY = 24
"""Most labels that are all shown at once."""
ENDS = 10
"""Of more labels, so many of the best and of the worst are."""

At = Callable[[Mapping[str, Metrics] | None, str], float | None]
"""Returns the metric that ranks models at a silo, from metrics by silo."""


def result(reading: Reading) -> PageSection:
    """The merged model beside what there is without it."""
    merged = reading.one("regmean")
    if merged is None:
        why = reading.report.unmeasured
        text = (
            f"No metrics: {why}."
            if why
            else "Nothing was measured: files of statistics hold no held-out examples. gramfuse tune measures merges "
            "of files on data of your own."
        )
        return PageSection("result", "Result", [Notice("Not measured", text)])
    others = [
        ("Best silo alone" if reading.alone and reading.alone.kind == "silo" else "Silos alone", reading.alone),
        ("Simple average", reading.one("simple")),
        ("Joint training", reading.one("joint")),
    ]
    shown = [("Merged model", merged), *((title, model) for title, model in others if model is not None)]
    values = [reading.value(model) for _, model in shown]
    bars = charts.bars(values, strong=[0], most=1.0)
    tiles = [
        Tile(
            title,
            _said(model, reading.ranked, value),
            _beside(reading, model, values[0] - value),
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
    if (said := noise(reading.report, reading.ranked)) is not None:
        blocks.append(Text(said))
    if reading.tuning is not None:
        blocks.append(Text("The merge was chosen on other examples than these; see the search below."))
    if reading.unsolved:
        groups = count(len(reading.unsolved), "groups")
        blocks.append(
            Notice("Note", f"{groups} of weights were not solved as they stand; see the quality of the solve.")
        )
    return PageSection("result", "Result", blocks)


def _said(model: Measured, metric: str, value: float | None) -> str:
    """Return a metric of a model, and how far the exact one may be from it."""
    off = off_by(model, metric)
    return score(value) + ("" if off is None else f" ± {score(off)}")


def _beside(reading: Reading, model: Measured, ahead: float) -> str:
    if model.kind == "regmean":
        return "RegMean"
    told = f"the merge is {charts.difference(ahead)}"
    return f"{model.name}; {told}" if model.kind == "silo" else told


def models(reading: Reading) -> PageSection | None:
    """All models and metrics."""
    earlier = reading.rounds if reading.failure is not None else reading.rounds[:-1]
    listed = [(m.known, of.round) for of in earlier for m in of.models if m.kind in MERGES]
    listed += [(model, reading.last) for model in reading.models]
    if not listed:
        return None
    found = [columns(model, reading.tasks) for model, _ in listed]
    titles = list(dict.fromkeys([reading.ranked, *(title for row in found for title in row)]))
    drawn = charts.bars(
        [row.get(reading.ranked) for row in found],
        strong=[place for place, (model, _) in enumerate(listed) if model.kind == "regmean"],
        most=1.0,
    )
    timed = any(model.has("seconds") for model, _ in listed)
    sent = any(model.has("bytes") for model, _ in listed)
    rows = []
    for (model, number), row, bar in zip(listed, found, drawn, strict=True):
        cells = [
            Cell(_said(model, title, row.get(title)), bar if title == reading.ranked else None) for title in titles
        ]
        cells += [Cell(charts.duration(model.seconds) if model.has("seconds") else charts.NONE)] if timed else []
        cells += [Cell(charts.size(sum(model.bytes.values())) if model.has("bytes") else charts.NONE)] if sent else []
        name = name_of(model) + (f", round {number}" if earlier and model.kind in MERGES else "")
        merged = model.kind == "regmean"
        note = "the merged model" if merged and number == reading.last else model.note
        rows.append(Row(name, cells, note=note, strong=merged))
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
    blocks.append(Folded("What these models and metrics are", [Facts(glossary)]))
    return PageSection("models", "Models", blocks)


def _of_task(reading: Reading, task: str) -> Table:
    measured = [model for model in reading.models if task in model.tasks]
    titles = list(dict.fromkeys(title for model in measured for title in model.tasks[task] if title != "examples"))
    ranked = primary(reading.tasks[task])
    drawn = charts.bars(
        [model.tasks[task].get(ranked) for model in measured],
        strong=[place for place, model in enumerate(measured) if model.kind == "regmean"],
        most=1.0,
    )
    rows = [
        Row(
            name_of(model),
            [Cell(score(model.tasks[task].get(title)), bar if title == ranked else None) for title in titles],
            strong=model.kind == "regmean",
        )
        for model, bar in zip(measured, drawn, strict=True)
    ]
    examples = count(measured[0].tasks[task]["examples"], "held-out examples") if measured else ""
    return Table(f"Task “{task}”, on {examples}", [Column("Model"), *(Column(title) for title in titles)], rows)


def by_silo(reading: Reading) -> PageSection | None:
    """The models at each silo, where the report has that."""
    measured = [model for model in reading.models if model.silos]
    merged = next((model for model in measured if model.kind == "regmean"), None)
    if merged is None:
        return None
    silos = list(merged.silos)
    own = {model.name: model.silos for model in measured if model.kind == "silo"}
    alone = next((model.silos for model in measured if model.kind == "alone"), None)
    simple = next((model.silos for model in measured if model.kind == "simple"), None)

    def at(found: Mapping[str, Metrics] | None, silo: str) -> float | None:
        metrics = (found or {}).get(silo)
        return None if metrics is None else metrics.get(reading.primary(silo, metrics))

    each = [("Merged model", {silo: at(merged.silos, silo) for silo in silos})]
    if simple:
        each.append(("Simple average", {silo: at(simple, silo) for silo in silos}))
    if own or alone:
        each.append(("Its own model", {silo: at(alone or own.get(silo), silo) for silo in silos}))
    flat = [values[silo] for silo in silos for _, values in each]
    drawn = charts.bars(flat, strong=range(0, len(flat), len(each)), most=1.0)
    several = len(reading.tasks) > 1
    rows = []
    for place, silo in enumerate(silos):
        mine = slice(place * len(each), (place + 1) * len(each))
        cells = [Cell(score(value), bar) for value, bar in zip(flat[mine], drawn[mine], strict=True)]
        examples = count(merged.silos[silo]["examples"], "examples")
        metric = f"{reading.primary(silo, merged.silos[silo])}, " if several else ""
        rows.append(Row(silo, cells, note=f"{metric}{examples}"))
    metric = "the metric of its task" if several else reading.ranked
    blocks: list[Block] = [
        Table(
            f"By the held-out examples of each silo: {metric}",
            [Column("Silo"), *(Column(title) for title, _ in each)],
            rows,
        ),
        Folded("All models at all silos", [_matrix(reading, measured, silos, at)]),
        Folded("All metrics of the merged model at each silo", [_metrics_by_silo(merged)]),
    ]
    return PageSection("silos", "By silo", blocks)


def _matrix(reading: Reading, measured: Sequence[Measured], silos: Sequence[str], at: At) -> Table:
    rows = [
        Row(
            name_of(model),
            [Cell(score(at(model.silos, silo))) for silo in silos],
            strong=model.kind == "regmean",
        )
        for model in measured
    ]
    metric = reading.ranked if len(reading.tasks) == 1 else "the metric of each silo's task"
    return Table(f"All models at all silos: {metric}", [Column("Model"), *map(Column, silos)], rows)


def _metrics_by_silo(merged: Measured) -> Table:
    found = merged.silos
    titles = list(dict.fromkeys(title for metrics in found.values() for title in metrics if title != "examples"))
    rows = [
        Row(silo, [Cell(f"{metrics['examples']:,.0f}"), *(Cell(score(metrics.get(title))) for title in titles)])
        for silo, metrics in found.items()
    ]
    return Table("The merged model at each silo", [Column("Silo"), Column("examples"), *map(Column, titles)], rows)


def by_label(reading: Reading) -> PageSection | None:
    """F1 of each label, where the report has that."""
    merged = reading.one("regmean")
    blocks: list[Block] = []
    for task, labels in (merged.labels if merged is not None else {}).items():
        blocks += _labels_of(reading, task, labels)
    return PageSection("labels", "By label", blocks) if blocks else None


def _labels_of(reading: Reading, task: str, merged: Mapping[str, LabelFigures]) -> list[Block]:
    others = [("simple average", reading.one("simple"))]
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
            rows.append(Row(name, cells, note=count(everything[name].examples, "examples")))
        titles = [*(f"F1, {title}" for title, _ in each), "precision, merged model", "recall, merged model"]
        return Table(caption, [Column(unit.capitalize()), *map(Column, titles)], rows)

    unit, what = KINDS[reading.tasks[task]].unit
    of = f" of task “{task}”" if task else ""
    if reading.alone is not None and reading.alone.kind == "silo":
        of += f", beside {reading.alone.name} alone"
    if len(order) <= OPENLY:
        return [table(f"All {len(order)} {what}{of}, the best first", order)]
    middle = order[ENDS:-ENDS]
    return [
        table(f"The {ENDS} best of {len(order)} {what}{of}", order[:ENDS]),
        table(f"The {ENDS} worst of {len(order)} {what}{of}", order[-ENDS:]),
        Folded(f"The {len(middle)} {what} between", [table(f"The {len(middle)} {what} between{of}", middle)]),
    ]


def _between(interval: Sequence[float] | None) -> str:
    """Return the interval that a value may lie in, if it is not exact."""
    return "" if interval is None else f" [{score(interval[0])}, {score(interval[1])}]"


def search(reading: Reading) -> PageSection | None:
    """What `gramfuse tune` tried."""
    tuning = reading.tuning
    if tuning is None:
        return None
    ranked, chosen = tuning.metric, tuning.chosen
    on = count(sum(tuning.examples.values()), "validation examples")
    blocks: list[Block] = [
        Text(f"Merges were ranked by {ranked} on {on}, none of which is among those that models are reported on.")
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
        blocks.append(
            weights if len(trials) <= ENDS else Folded(f"All {len(trials)} weights that were tried", [weights])
        )
    if tuning.order:
        trials = [(f"{place}. with {step.silos[-1]}", step, False) for place, step in enumerate(tuning.order, 1)]
        blocks.append(_trials("Silos added one after the other", "Merge", trials, ranked))
    if tuning.influence:
        blocks.append(_influence(tuning, ranked))
    return PageSection("search", "Search", blocks)


def _trials(
    caption: str, what: str, trials: Sequence[tuple[str, Tried, bool]], ranked: str, *, drawn: bool = True
) -> Table:
    chosen = [place for place, (_, _, mark) in enumerate(trials) if mark]
    scores = [trial.score for _, trial, _ in trials]
    bars = charts.bars(scores, strong=chosen, most=1.0) if drawn else [None] * len(scores)
    rows = [
        Row(f"{name}, chosen" if mark else name, [Cell(score(trial.score), bar)], strong=mark)
        for (name, trial, mark), bar in zip(trials, bars, strict=True)
    ]
    return Table(caption, [Column(what), Column(ranked)], rows)


def _influence(tuning: Tuning, ranked: str) -> Table:
    rows = [
        Row(
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
