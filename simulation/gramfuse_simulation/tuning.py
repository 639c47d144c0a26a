"""What `gramfuse tune` does with statistics: one part of the held-out data chooses, the other is reported."""

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
    from gramfuse_server.merging.files import Collection
    from gramfuse_server.merging.regmean import Weighting
    from gramfuse_server.merging.search import Judgement, Trial, Trials
    from gramfuse_server.report.schema import Report, TriedOrder, Tuning
    from gramfuse_server.report.studies import Studied
    from gramfuse_server.run.conductor import Observer
    from gramfuse_simulation.all_silos import AllSilos, Bench, Deltas, Split

Measure = Callable[["Deltas", "Split"], Mapping[str, Sums]]
"""Measures a merge, by its differences from the base, on a part of the held-out data; sums by silo."""


@dataclass(frozen=True)
class Wanted:
    """What is searched.

    Args:
        alphas: values of α, tried in this order.
        weights: whether silo weights are searched too, with the α that was found.
        order: whether merges of the first 1, 2, … silos are tried, and in which order they are added.
        influence: whether merges without each silo are tried.
    """

    alphas: tuple[float, ...]
    weights: bool = False
    order: Literal["given", "greedy"] | None = None
    influence: bool = False


def tune(laboratory: AllSilos, wanted: Wanted, merged: Merged, observer: Observer) -> tuple[Merged, Studied]:
    """Search, and return the chosen merge and what is added to the report: a study of an exchange.

    Args:
        merged: with the plan's α and weights; its mean stays what `simple` means in the report.
    """
    from gramfuse_server.merging.search import Trials
    from gramfuse_server.report.studies import Studied
    from gramfuse_server.run.evaluation import described

    plan, measure = laboratory.plan, laboratory.measure
    trials = Trials(
        laboratory.layout,
        laboratory.contributions,
        lambda deltas: joint(plan, measure(deltas, "validation")),
        weighting=plan.merge.weighting,
        tell=lambda trial: observer({"phase": "study", "state": "measured", "name": _named(trial)}),
    )
    chosen, best, tuning = search(trials, wanted, plan, measure)
    studied = Studied(tuning=tuning)
    if (chosen.alpha, chosen.weights) != (plan.merge.alpha, trials.uniform):
        untuned = described(plan, "untuned", "untuned", measure(merged.deltas, "held-out"))
        studied = studied._replace(models=(untuned,))
    return replace(best, mean=merged.mean), studied


@dataclass(frozen=True)
class TuningData:
    """Where examples are for merges of files.

    Args:
        validation, test: sources, as `[data]` of a silo file has them: what is chosen by, and what is reported on.
        columns: `text`, `text_pair`, `image` and `label`, as `[data]` has them too.
        labels: --labels, if it is given.
        skip_bad: most bad rows of a source that are left out.
    """

    validation: str
    test: str
    columns: Mapping[str, Any]
    labels: str | None = None
    skip_bad: int = 0


def tune_files(
    paths: Sequence[Path], base: str | None, data: TuningData, wanted: Wanted, out: Path, tell: Callable[[str], None]
) -> Report:
    """Search over merges of statistics files, write the one that is chosen, and return its report.

    Args:
        paths: of the files.
        base: where the base model is, if not where the files say.
        out: directory of the model; must not exist.
        tell: is told what was measured.

    Raises:
        PlanError: if the files are to keep heads of their own, so that no one model comes of them.
        GramfuseError: as `gramfuse_server.merging.files.merge_files` and `gramfuse_client.data.examples.load` raise.
    """
    from gramfuse_protocol.statistics.file import read_statistics
    from gramfuse_server.merging.files import Collection, Settings, merge_files
    from gramfuse_server.merging.search import Trials
    from gramfuse_server.report.studies import Studied
    from gramfuse_server.run.evaluation import described
    from gramfuse_server.run_directory import check_free

    check_free(out)
    collection = Collection([read_statistics(path) for path in paths])
    if collection.heads == "own":
        raise PlanError(
            "tune ranks one model for one task, and under this plan silos keep their heads; use gramfuse merge"
        )
    if grown := [file for file in collection.files if file.added]:
        raise PlanError(
            f"tune measures models with the base's tokens only, and {grown[0].name!r} was fine-tuned with others "
            f"({listed(grown[0].added, 5)}): what it found would be of other models. Merge them with gramfuse "
            "merge --tokenizer DIR, or measure models without added tokens"
        )
    alpha, weighting = _agreed(collection)
    bench = _bench(collection, base, data)

    def measure(deltas: Deltas, part: Split) -> Mapping[str, Sums]:
        return {bench.silo.name: bench.measure(deltas, part)}

    trials = Trials(
        collection.layout,
        {file.name: file for file in collection.files},
        lambda deltas: joint(bench.plan, measure(deltas, "validation")),
        weighting=weighting,
        tell=lambda trial: tell(_named(trial)),
    )
    chosen, best, tuning = search(trials, wanted, bench.plan, measure, own=alpha)
    untuned = trials.sum(alpha, trials.uniform).merge()
    models: list[tuple[str, str, Deltas]] = [
        (file.name, "silo", {t.name: file.block(delta_block(t.name)) for t in collection.layout.tensors})
        for file in collection.files
    ]
    models.append(("simple", "simple", untuned.mean))
    models.append(("regmean", "regmean", best.deltas))
    if (chosen.alpha, chosen.weights) != (alpha, trials.uniform):
        models.append(("untuned", "untuned", untuned.deltas))
    measured = (described(bench.plan, name, kind, measure(deltas, "held-out")) for name, kind, deltas in models)
    studied = Studied(
        models=tuple(measured),
        tuning=tuning,
        tasks={"": bench.task.task},
        left_out=tuple(row for part in bench.parts.values() for row in part.examples.left_out),
    )
    settings = Settings(alpha=chosen.alpha, weighting=weighting, weights=chosen.weights, base=base)
    return merge_files(paths, out, settings, Path.cwd(), studied)


def _agreed(collection: Collection) -> tuple[float, Weighting]:
    """Return the α and the weighting that files are merged with where nothing is searched."""
    from gramfuse_protocol.contract.plan_sections import Merge

    merge = collection.plan.merge if collection.plan else Merge()
    return merge.alpha, merge.weighting


def _bench(collection: Collection, base: str | None, data: TuningData) -> Bench:
    """Return what merges of files are measured on.

    The examples to be reported are both the training and the held-out examples of a silo, so that those to choose by
    are without them.
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
    trials: Trials, wanted: Wanted, plan: Plan, measure: Measure, own: float | None = None
) -> tuple[Trial, Merged, Tuning]:
    """Return which merge of all silos is the best, the merge, and `tuning` of the report: all that was tried.

    What is measured on the part `held-out` is written down and chooses nothing.

    Args:
        plan: says by which metric merges are ranked.
        own: the α that is chosen among equals, if not the plan's.
    """
    from gramfuse_server.merging.search import best, given_order, greedy_order, leave_one_out, search_weights, sweep
    from gramfuse_server.report.schema import Chosen, Influence, ReportedOn, TriedAlpha, TriedWeights, Tuning
    from gramfuse_server.run.evaluation import ranked_by

    curve = sweep(trials, wanted.alphas)
    chosen = best(curve, own=plan.merge.alpha if own is None else own)
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
    metrics = joint(plan, reported).metrics

    def influence(silo: str, trial: Trial) -> Influence:
        difference: Mapping[str, float] = {}
        if not math.isnan(trial.score):
            rest = trials.near(trial.alpha, trial.weights).merge().deltas
            difference = _difference(joint(plan, measure(rest, "held-out")).metrics, metrics)
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
    return {silo: int(examples_in(found)) for silo, found in sums.items()}


def _order(steps: Iterable[Trial]) -> tuple[TriedOrder, ...]:
    from gramfuse_server.report.schema import TriedOrder

    silos: list[str] = []
    found = []
    for step in steps:
        silos += [silo for silo in step.weights if silo not in silos]
        found.append(TriedOrder(silos=tuple(silos), **_measured(step)))
    return tuple(found)


def _difference(without: Mapping[str, Any], with_all: Mapping[str, Any]) -> dict[str, float]:
    """Return, of each metric, the merge without a silo minus that with all."""
    numbers = {name: value for name, value in with_all.items() if isinstance(value, float) and name != "examples"}
    return {name: without[name] - value for name, value in numbers.items() if name in without}


def _measured(trial: Trial) -> dict[str, Any]:
    return {"score": _number(trial.score), "metrics": trial.metrics}


def _number(value: float) -> float | None:
    """Return what JSON can hold: None for the score of a merge that could not be measured."""
    return None if math.isnan(value) else value


def _named(trial: Trial) -> str:
    weights = " ".join(f"{silo} {weight:g}" for silo, weight in trial.weights.items())
    return f"alpha {trial.alpha:g}, {weights}"


def joint(plan: Plan, sums: Mapping[str, Sums]) -> Judgement:
    """Return the metrics of all silos together, and the one among them that merges are ranked by.

    Args:
        sums: by silo; if they are none, as those of a model that says NaN, neither are the metrics.
    """
    from gramfuse_server.merging.search import Judgement
    from gramfuse_server.run.evaluation import described, ranked_by

    if not all(are_sums(plan.task_of(silo), found) for silo, found in sums.items()):
        return Judgement(math.nan, {})
    model = described(plan, "", "", sums)
    found = {**model.metrics, **({"tasks": model.tasks} if plan.task else {})}
    return Judgement(model.metrics[ranked_by(plan)], found)
