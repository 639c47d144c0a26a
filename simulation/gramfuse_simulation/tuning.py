"""The search of `gramfuse tune`: validation examples choose the merge, held-out examples are for the report."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from gramfuse_protocol.contract.layout import delta_block
from gramfuse_protocol.contract.plan import Plan
from gramfuse_protocol.errors import PlanError
from gramfuse_protocol.held_out.metrics import Sums, are_sums, examples_in
from gramfuse_protocol.text import listed
from gramfuse_simulation.labelled_rows import COLUMNS, label_names

if TYPE_CHECKING:
    from gramfuse_server.merging.accumulator import Merged
    from gramfuse_server.merging.collection import Collection
    from gramfuse_server.merging.regmean import Weighting
    from gramfuse_server.merging.search import Judgement, Trial, Trials
    from gramfuse_server.report.choices import TriedOrder, Tuning
    from gramfuse_server.report.schema import Report
    from gramfuse_server.report.studies import Studied
    from gramfuse_server.run.conductor import Observer
    from gramfuse_simulation.all_silos import AllSilos, Bench, Deltas, Split

Measure = Callable[["Deltas", "Split"], Mapping[str, Sums]]
"""Measures a merge, given as differences from the base, on a part of the examples; returns sums by silo."""


@dataclass(frozen=True)
class Wanted:
    """What to search.

    Args:
        alphas: values of α to try, in order.
        weights: whether to search silo weights too, at the best α.
        order: order in which silos are added for merges of the first 1, 2, … silos; None to skip these.
        influence: whether to try the merge without each silo.
    """

    alphas: tuple[float, ...]
    weights: bool = False
    order: Literal["given", "greedy"] | None = None
    influence: bool = False


def tune(laboratory: AllSilos, wanted: Wanted, merged: Merged, observer: Observer) -> tuple[Merged, Studied]:
    """Search over merges of an exchange, and return the chosen merge and additions to the report.

    Args:
        merged: the merge with the plan's α and weights; its mean remains the report's `simple`.
    """
    from gramfuse_server.merging.search import Trials
    from gramfuse_server.report.studies import Studied
    from gramfuse_server.run.evaluation import to_measured

    plan, measure = laboratory.plan, laboratory.measure
    trials = Trials(
        laboratory.layout,
        laboratory.contributions,
        lambda deltas: judgement_of(plan, measure(deltas, "validation")),
        weighting=plan.merge.weighting,
        tell=lambda trial: observer({"phase": "study", "state": "measured", "name": _name_of(trial)}),
    )
    chosen, best, tuning = search(trials, wanted, plan, measure)
    studied = Studied(tuning=tuning)
    if (chosen.alpha, chosen.weights) != (plan.merge.alpha, trials.uniform):
        untuned = to_measured(plan, "untuned", "untuned", measure(merged.deltas, "held-out"))
        studied = studied._replace(models=(untuned,))
    return replace(best, mean=merged.mean), studied


@dataclass(frozen=True)
class TuningData:
    """The examples for merges of files.

    Args:
        validation, test: sources for choosing and for reporting, as in `[data]` of a silo file.
        columns: `text`, `text_pair`, `image` and `label`, as in `[data]`.
        labels: the option --labels, or None.
        skip_bad: most bad rows to skip in a source.
    """

    validation: str
    test: str
    columns: Mapping[str, Any]
    labels: str | None = None
    skip_bad: int = 0


def tune_files(
    paths: Sequence[Path], base: str | None, data: TuningData, wanted: Wanted, out: Path, tell: Callable[[str], None]
) -> Report:
    """Search over merges of statistics files, write the chosen one, and return its report.

    Args:
        paths: of the files.
        base: the base model, as in `gramfuse_server.merging.files.Settings`.
        out: directory for the model; must not exist.
        tell: called with the name of each measured merge.

    Raises:
        PlanError: if the files keep their own heads, so that there is no single merged model, or have added tokens.
        GramfuseError: as raised by `gramfuse_server.merging.files.merge_files` and
            `gramfuse_client.data.examples.load`.
    """
    from gramfuse_protocol.statistics.file import read_statistics
    from gramfuse_server.merging.collection import Collection
    from gramfuse_server.merging.files import Settings, merge_files
    from gramfuse_server.merging.search import Trials
    from gramfuse_server.report.studies import Studied
    from gramfuse_server.run.evaluation import to_measured
    from gramfuse_server.run_directory import check_free

    check_free(out)
    collection = Collection([read_statistics(path) for path in paths])
    if collection.heads == "own":
        raise PlanError("tune needs one merged model, but silos keep their heads under this plan; use gramfuse merge")
    if grown := [file for file in collection.files if file.added]:
        raise PlanError(
            f"tune measures models with the base's tokens only, but {grown[0].name!r} has added tokens "
            f"({listed(grown[0].added, 5)}), so the results would not apply. Use gramfuse merge --tokenizer DIR, or "
            "measure models without added tokens"
        )
    alpha, weighting = _defaults(collection)
    bench = _bench(collection, base, data)

    def measure(deltas: Deltas, part: Split) -> Mapping[str, Sums]:
        return {bench.silo.name: bench.measure(deltas, part)}

    trials = Trials(
        collection.layout,
        {file.name: file for file in collection.files},
        lambda deltas: judgement_of(bench.plan, measure(deltas, "validation")),
        weighting=weighting,
        tell=lambda trial: tell(_name_of(trial)),
    )
    chosen, best, tuning = search(trials, wanted, bench.plan, measure, preferred=alpha)
    untuned = trials.sum(alpha, trials.uniform).merge()
    models: list[tuple[str, str, Deltas]] = [
        (file.name, "silo", {t.name: file.block(delta_block(t.name)) for t in collection.layout.tensors})
        for file in collection.files
    ]
    models.append(("simple", "simple", untuned.mean))
    models.append(("regmean", "regmean", best.deltas))
    if (chosen.alpha, chosen.weights) != (alpha, trials.uniform):
        models.append(("untuned", "untuned", untuned.deltas))
    measured = (to_measured(bench.plan, name, kind, measure(deltas, "held-out")) for name, kind, deltas in models)
    studied = Studied(
        models=tuple(measured),
        tuning=tuning,
        tasks={"": bench.task.task},
        left_out=tuple(row for part in bench.parts.values() for row in part.examples.left_out),
    )
    settings = Settings(alpha=chosen.alpha, weighting=weighting, weights=chosen.weights, base=base)
    return merge_files(paths, out, settings, Path.cwd(), studied)


def _defaults(collection: Collection) -> tuple[float, Weighting]:
    """Return the α and the weighting for merging files without a search."""
    from gramfuse_protocol.contract.plan_sections import Merge

    merge = collection.plan.merge if collection.plan else Merge()
    return merge.alpha, merge.weighting


def _bench(collection: Collection, base: str | None, data: TuningData) -> Bench:
    """Return the bench that measures merges of files.

    The test source is both the training and the held-out data of its silo, so that no test example can be among the
    validation examples.
    """
    from gramfuse_client.data.examples import outputs
    from gramfuse_client.data.setting_names import option_settings
    from gramfuse_client.silo_file import Data as Sources
    from gramfuse_client.silo_file import Silo, SiloFile
    from gramfuse_model.loading.zero_head import plan_for
    from gramfuse_simulation.all_silos import Bench, Split

    first = collection.files[0]
    model = collection.load_base(first, base, Path.cwd())
    sources = Sources(
        train=data.test, held_out=data.test, validation=data.validation, skip_bad=data.skip_bad, **data.columns
    )
    file, task = SiloFile(name=first.name, data=sources), first.about.task
    silo = Silo(Path.cwd() / "--validation", file, words=option_settings(COLUMNS))
    names = outputs(task, label_names(data.labels, task))
    bench = Bench(silo, plan_for(first.name, str(base), task), model, {}, names)
    for part in get_args(Split):
        bench.parts[part]
    return bench


def search(
    trials: Trials, wanted: Wanted, plan: Plan, measure: Measure, preferred: float | None = None
) -> tuple[Trial, Merged, Tuning]:
    """Return the best trial over all silos, its merge, and the report's `tuning` with all trials.

    Held-out measurements are reported but take no part in the choice.

    Args:
        plan: determines the ranking metric.
        preferred: the α that wins ties; by default the plan's.
    """
    from gramfuse_server.merging.search import best, given_order, greedy_order, leave_one_out, search_weights, sweep
    from gramfuse_server.report.choices import Chosen, Influence, ReportedOn, TriedAlpha, TriedWeights, Tuning
    from gramfuse_server.run.evaluation import ranked_by

    curve = sweep(trials, wanted.alphas)
    chosen = best(curve, preferred=plan.merge.alpha if preferred is None else preferred)
    weighted = search_weights(trials, chosen.alpha) if wanted.weights else ()
    if weighted:
        chosen = best(weighted)
    steps: Iterable[Trial] = ()
    if wanted.order is not None:
        add = {"given": given_order, "greedy": greedy_order}[wanted.order]
        steps = add(trials, chosen.alpha, chosen.weights)
    without = leave_one_out(trials, chosen.alpha, chosen.weights) if wanted.influence else {}
    merged = trials.sum(chosen.alpha, chosen.weights).merge()
    reported = measure(merged.deltas, "held-out")
    metrics = judgement_of(plan, reported).metrics

    def influence(silo: str, trial: Trial) -> Influence:
        difference: Mapping[str, float] = {}
        if not math.isnan(trial.score):
            rest = trials.near(trial.alpha, trial.weights).merge().deltas
            difference = _difference(judgement_of(plan, measure(rest, "held-out")).metrics, metrics)
        return Influence(
            silo=silo,
            without=_number(trial.score),
            difference=_number(trial.score - chosen.score),
            reported=difference,
        )

    tuning = Tuning(
        metric=ranked_by(plan),
        part="validation",
        examples=_sizes(measure(merged.deltas, "validation")),
        reported=ReportedOn(part="held-out", examples=_sizes(reported)),
        alpha=tuple(TriedAlpha(alpha=trial.alpha, **_measured(trial)) for trial in curve),
        weights=tuple(TriedWeights(weights=trial.weights, **_measured(trial)) for trial in weighted),
        order=_order(steps),
        influence=tuple(influence(silo, trial) for silo, trial in without.items()),
        chosen=Chosen(alpha=chosen.alpha, weights=chosen.weights, **_measured(chosen)),
    )
    return chosen, merged, tuning


def _sizes(sums: Mapping[str, Sums]) -> dict[str, int]:
    return {silo: int(examples_in(counted)) for silo, counted in sums.items()}


def _order(steps: Iterable[Trial]) -> tuple[TriedOrder, ...]:
    from gramfuse_server.report.choices import TriedOrder

    silos: list[str] = []
    order = []
    for step in steps:
        silos += [silo for silo in step.weights if silo not in silos]
        order.append(TriedOrder(silos=tuple(silos), **_measured(step)))
    return tuple(order)


def _difference(without: Mapping[str, Any], with_all: Mapping[str, Any]) -> dict[str, float]:
    """Return the metrics of the merge without a silo minus those of the merge with all."""
    numbers = {name: value for name, value in with_all.items() if isinstance(value, float) and name != "examples"}
    return {name: without[name] - value for name, value in numbers.items() if name in without}


def _measured(trial: Trial) -> dict[str, Any]:
    return {"score": _number(trial.score), "metrics": trial.metrics}


def _number(value: float) -> float | None:
    """Replace NaN, the score of a merge that could not be measured, by None for JSON."""
    return None if math.isnan(value) else value


def _name_of(trial: Trial) -> str:
    weights = " ".join(f"{silo} {weight:g}" for silo, weight in trial.weights.items())
    return f"alpha {trial.alpha:g}, {weights}"


def judgement_of(plan: Plan, sums: Mapping[str, Sums]) -> Judgement:
    """Return the metrics of all silos together, and the one that ranks merges.

    Args:
        sums: by silo. If they are invalid, for example because the model outputs NaN, the score is NaN and there are no
            metrics.
    """
    from gramfuse_server.merging.search import Judgement
    from gramfuse_server.run.evaluation import ranked_by, to_measured

    if not all(are_sums(plan.task_of(silo), counted) for silo, counted in sums.items()):
        return Judgement(math.nan, {})
    model = to_measured(plan, "", "", sums)
    metrics = {**model.metrics, **({"tasks": model.tasks} if plan.task else {})}
    return Judgement(model.metrics[ranked_by(plan)], metrics)
