"""`gramfuse tune`: chooses α and silo weights, and tries orders and leave-one-out, on validation examples."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from gramfuse_cli import options
from gramfuse_cli.options import compare_option
from gramfuse_cli.show.progress import RunProgress
from gramfuse_cli.show.results import check_sound, show_checks, show_models, show_report, show_steps
from gramfuse_deployment.terminal import Table, say, show_json
from gramfuse_model.project import Project
from gramfuse_protocol.contract.plan import Plan
from gramfuse_protocol.errors import PlanError
from gramfuse_server.report.choices import Tuning
from gramfuse_simulation.labelled_rows import row_options
from gramfuse_simulation.simulate import run_simulation
from gramfuse_simulation.terms import Term
from gramfuse_simulation.tuning import TuningData, Wanted, tune_files

GRID = ",".join(f"{n / 10:g}" for n in range(11))

FILE_OPTIONS = ("base", "validation", "test", "text", "text_pair", "image", "label", "labels", "skip_bad")
PROJECT_OPTIONS = ("compare", "opened", "settings", "seed")


def _grid(_: click.Context, __: click.Parameter, text: str) -> tuple[float, ...]:
    try:
        values = tuple(float(value) for value in text.split(","))
    except ValueError:
        raise click.BadParameter(f"expected numbers such as {GRID} (got {text!r})") from None
    if not all(0 <= value <= 1 for value in values):
        raise click.BadParameter(f"expected values from 0 to 1 (got {text!r})")
    return tuple(dict.fromkeys(values))


@click.command()
@click.argument(
    "sources", metavar="DIR | STATS...", nargs=-1, required=True, type=click.Path(path_type=Path, exists=True)
)
@click.option(
    "--alpha",
    "alphas",
    metavar="α,α,…",
    default=GRID,
    show_default=True,
    callback=_grid,
    help="Values to try, each from 0 to 1.",
)
@click.option("--weights", is_flag=True, help="Also search silo weights, by doubling and halving one at a time.")
@click.option(
    "--order",
    type=click.Choice(["given", "greedy"]),
    help="Try merges of 1, 2, … silos: in roster order (files: by name), or adding the silo that helps most.",
)
@click.option("--influence", is_flag=True, help="Try the merge without each silo in turn.")
@click.option("--base", metavar="BASE", help="Files: the base model on this machine. Required.")
@click.option("--validation", metavar="DATA", help="Files: examples to choose by. Required.")
@click.option("--test", metavar="DATA", help="Files: examples to report on. Required.")
@options.columns
@row_options("Files: ")
@compare_option
@options.open_mode
@options.settings
@options.as_json
@click.pass_context
def tune(
    context: click.Context,
    /,
    sources: tuple[Path, ...],
    alphas: tuple[float, ...],
    weights: bool,
    order: Any,
    influence: bool,
    base: str | None,
    validation: str | None,
    test: str | None,
    labels: str | None,
    skip_bad: int,
    compare: tuple[Term, ...],
    opened: bool,
    settings: tuple[str, ...],
    seed: int | None,
    out: Path | None,
    as_json: bool,
    **columns: str | None,
) -> None:
    """Choose α, and with --weights the silos' weights, on validation examples that the report does not use.

    \b
    gramfuse tune DIR --open
    gramfuse tune mine.safetensors yours.safetensors --base BASE --validation DATA --test DATA -o merged

    The first form simulates all silos of DIR/plan.toml; they train once. It ranks merges on data.validation of each
    silo file, or on one half of the silo's held-out examples if the file names none. The report, and the models of
    --compare, use only the other held-out examples. This needs open mode: a secure sum is made with one α.

    The second form takes STATS, files made by gramfuse measure. DATA is a source as that command takes it.

    The chosen merge is written as the model, and report.json lists everything that was tried under "tuning". Orders and
    influences are for you to judge: tune never leaves a silo out on its own.
    """
    wanted = Wanted(alphas, weights, order, influence)
    is_project = len(sources) == 1 and (sources[0].is_dir() or sources[0].name == "plan.toml")
    for name in FILE_OPTIONS if is_project else PROJECT_OPTIONS:
        if context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE:
            option = {"opened": "open", "settings": "set"}.get(name, name.replace("_", "-"))
            expected = "statistics files" if is_project else "a project directory"
            raise click.UsageError(f"--{option} is for {expected}")
    if is_project:
        project = Project.read(sources[0], options.all_settings(settings, seed, opened=opened))
        check_tunable(project.plan)
        run = options.run_path(out, project.plan)
        report = run_simulation(project, run, RunProgress, tune=wanted, compare=compare, opened=opened)
        if not as_json and report.tuning is not None:
            show_tuning(report.tuning)
        show_report(report, run, as_json)
        return
    if validation is None or test is None or out is None:
        raise click.UsageError("files need --validation DATA, --test DATA and -o MODEL")
    report = tune_files(
        sources, base, TuningData(validation, test, columns, labels, skip_bad), wanted, out.absolute(), _say
    )
    if as_json:
        check_sound(report, out.absolute())
        show_json({**report.document(), "run": str(out.absolute())})
        return
    if report.left_out:
        say(f"left out {len(report.left_out)} bad rows:", *report.left_out, err=True)
    if report.tuning is not None:
        show_tuning(report.tuning)
    show_models(report, on="test examples")
    show_steps(report.solve)
    show_checks(report)
    say("", str(out))
    check_sound(report, out.absolute())


def _say(line: str) -> None:
    say(f"  {line}", err=True)


def check_tunable(plan: Plan) -> None:
    """Raise PlanError, with what to do, if merges under a plan cannot be compared."""
    if plan.privacy.secure_aggregation:
        raise PlanError(
            "tune needs each silo's statistics; with privacy.secure-aggregation the coordinator has only a sum, for "
            "one α and one set of weights. Agree on merge.alpha before the run; or, if this machine may see all data, "
            "tune in the clear with --open, and write the α that it finds into the plan"
        )
    if plan.privacy.metrics == "none":
        raise PlanError(
            'tune compares merges by held-out metrics, but under privacy.metrics = "none" silos send none; '
            "use --set privacy.metrics=sum"
        )
    if not plan.training.epochs:
        raise PlanError(
            "tune works on a merge of fine-tuned models, but training.epochs = 0 trains none; use --set "
            "training.epochs=5, for instance"
        )
    if plan.merge.rounds > 1 or plan.merge.refit:
        raise PlanError(
            "tune works on the merge of one round of training; use --set merge.rounds=1 --set merge.refit=false, and "
            "then the α that it finds"
        )
    if plan.merge.method != "regmean":
        raise PlanError('tune searches α, and merge.method = "average" has none; use --set merge.method=regmean')


def show_tuning(tuning: Tuning) -> None:
    """Print every merge that was tried, with the chosen one marked."""
    metric, chosen = tuning.metric, tuning.chosen
    examples = sum(tuning.examples.values())
    say(f"Chosen on {examples:,} validation examples, which the report does not use:")
    table = Table(plain=False)
    table.column("merge", fold=True)
    table.column(metric, justify="right", fold=True)
    for trial in tuning.alpha:
        is_chosen = trial.alpha == chosen.alpha and not tuning.weights
        _row(table, f"α = {trial.alpha:g}", trial.score, is_chosen)
    for weighted in tuning.weights:
        text = f"α = {chosen.alpha:g}, " + ", ".join(f"{silo} × {w:g}" for silo, w in weighted.weights.items())
        _row(table, text, weighted.score, weighted.weights == chosen.weights)
    for step in tuning.order:
        *_, last = step.silos
        _row(table, f"{len(step.silos)} silos, with {last}" if len(step.silos) > 1 else last, step.score)
    for entry in tuning.influence:
        _row(table, f"without {entry.silo}", entry.without)
    table.show()


def _row(table: Table, merge: str, score: float | None, chosen: bool = False) -> None:
    cell = "-" if score is None else f"{score:.3f}"
    table.row(f"{merge}, chosen" if chosen else merge, cell, style="bold" if chosen else "")
