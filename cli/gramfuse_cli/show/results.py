"""Prints the report of a run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from gramfuse_deployment.terminal import Table, say, say_text, show_json
from gramfuse_protocol.contract import who_sees_what
from gramfuse_protocol.contract.plan import Plan
from gramfuse_protocol.errors import MergeError
from gramfuse_server.report.loading import loading_of
from gramfuse_server.report.page.view import Reading
from gramfuse_server.report.page.words import (
    MERGES,
    columns,
    describe_choice,
    explain,
    explain_check,
    name_of,
    noise,
    off_by,
    ranked_by,
)
from gramfuse_server.report.schema import Measured, Report, Step
from gramfuse_server.report.verdicts import describe_bad, worst
from gramfuse_server.run_directory import PAGE, PLAN, REPORT


def show_report(report: Report, run: Path, as_json: bool) -> None:
    """Print a report: one JSON object, or a table and the code that loads the model.

    Args:
        run: the run directory.

    Raises:
        MergeError: if a check of the merge is bad. The error names the report; no JSON is printed.
    """
    if as_json:
        check_sound(report, run)
        show_json({**report.document(), "run": str(run)})
        return
    if report.models:
        show_models(report, _plan_of(run))
    else:
        say(f"No metrics: {report.unmeasured}", style="yellow")
    if report.unfitted:
        say(f"The head was not fitted again: {report.unfitted}", style="yellow")
    if report.head_choice is not None:
        say(f"Head kept: {describe_choice(report.head_choice)}")
    for lost in report.lost:
        say(f"Lost during the run: {lost.name}: {lost.reason}", style="yellow")
    show_steps(report.solve)
    show_checks(report)
    sent = sum(sum(phases.values()) for phases in report.bytes.values())
    seen = who_sees_what.seen(report.mode, past=True)
    sentence = f"{seen[0].upper()}{seen[1:]}."
    if report.mode == "secure":
        sentence += f" Their keys are {report.identities}."
    amount = f"{sent / 1e6:.1f} MB in all, in {report.total_seconds:.0f} s"
    say("", f"{len(report.silos)} silos sent {amount}. {sentence}")
    say(f"plan    {report.plan_digest}", f"run     {run}", f"report  {run / PAGE}", "", copied=True)
    say_text(_how_to_load(report, run), copied=True)
    check_sound(report, run)


def check_sound(report: Report, run: Path) -> None:
    """Raise MergeError if a check of the merge is bad.

    Args:
        run: the run directory.
    """
    if worst(report.checks) == "bad":
        error = MergeError(
            f"{run}: {describe_bad(report.checks)}. A silo's training diverged, or a silo did not send what it "
            "measured; the sum does not show which. Do not use the model; it is kept for inspection only"
        )
        error.report = run / REPORT
        raise error


def show_checks(report: Report, *, err: bool = False) -> None:
    """Print the checks that are not ok."""
    for check in report.checks:
        if check.verdict != "ok":
            say(explain_check(check), style="bold red" if check.verdict == "bad" else "yellow", err=err)


def _plan_of(run: Path) -> Plan:
    return Plan.read(run / PLAN)


def show_models(report: Report, plan: Plan | None = None, on: str = "held-out examples of all silos together") -> None:
    """Print all measured models and their metrics; for rounds before the last, only the merged models.

    Args:
        plan: of the run; None for files.
        on: the examples that they were measured on.
    """
    reading = Reading(report, plan)
    last = reading.session(reading.first) if reading.earlier else ""
    models = [(model, place) for place, model in reading.earlier]
    models += [(model, last if model.kind in MERGES else "") for model in reading.models]
    measured = models[-1][0]
    about = "about " if measured.privacy is not None else ""
    say(f"On the {about}{measured.metrics['examples']:,.0f} {on}:")
    rows = [columns(model, report.tasks) for model, _ in models]
    titles = list(dict.fromkeys(title for row in rows for title in row))
    table = Table(plain=False)
    table.column("model", fold=True)
    for title in titles:
        table.column(title, justify="right", fold=True)
    for (model, place), row in zip(models, rows, strict=True):
        style = "bold" if model.kind == reading.merged else ""
        cells = [f"{row[title]:.3f}{_spread(model, title)}" if title in row else "" for title in titles]
        table.row(name_of(model) + (f", {place}" if place else ""), *cells, style=style)
    table.show()
    if (sentence := noise(report, ranked_by(report.tasks))) is not None:
        say(sentence)
    for model in report.models:
        if model.note:
            say(f"{model.name}: {model.note}", style="dim")


def _spread(model: Measured, title: str) -> str:
    spread = off_by(model, title)
    return "" if spread is None else f" ± {spread:.3f}"


def _how_to_load(report: Report, run: Path) -> str:
    lines = loading_of(report, str(run))
    if report.head != "own":
        return lines
    models = run / "models"
    where = f"in {models}" if models.is_dir() else "at each silo, in 'model' beside its statistics"
    return f"{lines}  # the body; the models with each silo's own head are {where}"


def show_steps(steps: Sequence[Step], *, err: bool = False) -> None:
    """Print each group whose solve was not clean, and how it was solved; with `err`, on standard error."""
    for step in steps:
        if step.outcome != "clean":
            say(f"{step.group}: {explain(step)}", style="yellow", err=err)
