"""Shows the report of a run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from gramfuse_deployment.terminal import Table, say, say_text, show_json
from gramfuse_protocol.contract import who_sees_what
from gramfuse_protocol.errors import MergeError
from gramfuse_server.report.page.words import (
    MERGES,
    columns,
    explain,
    explain_check,
    name_of,
    noise,
    off_by,
    ranked_by,
)
from gramfuse_server.report.schema import Measured, Report, Step
from gramfuse_server.report.verdicts import describe_bad, worst
from gramfuse_server.run_directory import PAGE, REPORT


def show_report(report: Report, run: Path, as_json: bool) -> None:
    """Print a report: one JSON object, or a table and how to load the model.

    Raises:
        MergeError: if a check of the merge is bad; then no JSON is printed, and the error names the report.
    """
    if as_json:
        check_sound(report, run)
        show_json({**report.document(), "run": str(run)})
        return
    if report.models:
        show_models(report)
    else:
        say(f"No metrics: {report.unmeasured}", style="yellow")
    for lost in report.lost:
        say(f"Lost on the way: {lost.name}: {lost.reason}", style="yellow")
    show_steps(report.solve)
    show_checks(report)
    sent = sum(sum(phases.values()) for phases in report.bytes.values())
    said = who_sees_what.seen(report.mode, past=True)
    seen = f"{said[0].upper()}{said[1:]}."
    if report.mode == "secure":
        seen += f" Their keys are {report.identities}."
    sums = f"{sent / 1e6:.1f} MB in all, in {report.total_seconds:.0f} s"
    say("", f"{len(report.silos)} silos sent {sums}. {seen}")
    say(f"plan    {report.plan_digest}", f"run     {run}", f"report  {run / PAGE}", "", copied=True)
    say_text(_how_to_load(report, run), copied=True)
    check_sound(report, run)


def check_sound(report: Report, run: Path) -> None:
    """Raise MergeError if a check of the merge is bad.

    Args:
        run: directory of the report.
    """
    if worst(report.checks) == "bad":
        error = MergeError(
            f"{run}: {describe_bad(report.checks)}. A silo's training diverged, or a silo did not send what it "
            "measured; the sum does not say which. The model is there to be looked at, not to be used"
        )
        error.report = run / REPORT
        raise error


def show_checks(report: Report, *, err: bool = False) -> None:
    """Print the checks that are not ok."""
    for check in report.checks:
        if check.verdict != "ok":
            say(explain_check(check), style="bold red" if check.verdict == "bad" else "yellow", err=err)


def show_models(report: Report, on: str = "held-out examples of all silos together") -> None:
    """Print the models that were measured, and their metrics; of the rounds before the last, the merges only.

    Args:
        on: what they were measured on.
    """
    earlier, last = report.rounds[:-1], report.rounds[-1].round if report.rounds else 1
    models = [(model.without_noise, each.round) for each in earlier for model in each.models if model.kind in MERGES]
    models += [(model.without_noise, last) for model in report.models]
    measured = models[-1][0]
    about = "about " if measured.privacy is not None else ""
    say(f"On the {about}{measured.metrics['examples']:,.0f} {on}:")
    rows = [columns(model, report.tasks) for model, _ in models]
    titles = list(dict.fromkeys(title for row in rows for title in row))
    table = Table(plain=False)
    table.column("model", fold=True)
    for title in titles:
        table.column(title, justify="right", fold=True)
    for (model, number), row in zip(models, rows, strict=True):
        style = "bold" if model.kind == "regmean" else ""
        cells = [f"{row[title]:.3f}{_spread(model, title)}" if title in row else "" for title in titles]
        name = name_of(model)
        table.row(f"{name}, round {number}" if earlier and model.kind in MERGES else name, *cells, style=style)
    table.show()
    if (said := noise(report, ranked_by(report.tasks))) is not None:
        say(said)
    for model in report.models:
        if model.note:
            say(f"{model.name}: {model.note}", style="dim")


def _spread(model: Measured, title: str) -> str:
    off = off_by(model, title)
    return "" if off is None else f" ± {off:.3f}"


def _how_to_load(report: Report, run: Path) -> str:
    auto = report.auto_class
    lines = f'from transformers import {auto}\nmodel = {auto}.from_pretrained("{run / "model"}")'
    if report.head != "own":
        return lines
    kept = run / "models"
    where = f"in {kept}" if kept.is_dir() else "at each silo, in 'model' beside its statistics"
    return f"{lines}  # the body; with each silo's own head it is {where}"


def show_steps(steps: Sequence[Step], *, err: bool = False) -> None:
    """Print how each group was solved for which it was not plain; with `err` on standard error."""
    for step in steps:
        if step.outcome != "clean":
            say(f"{step.group}: {explain(step)}", style="yellow", err=err)
