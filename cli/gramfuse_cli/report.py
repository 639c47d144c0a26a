"""Shows the report of a run."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from gramfuse_protocol.errors import MergeError
from gramfuse_server.pages.wording import MERGES, MODES, columns, explain, explain_check, name_of
from gramfuse_server.run import PAGE, REPORT
from gramfuse_server.verdicts import told, worst


def show_report(report: Mapping[str, Any], run: Path, as_json: bool) -> None:
    """Print a report: one JSON object, or a table and how to load the model.

    Raises:
        MergeError: if a check of the merge is bad; then no JSON is printed, and the error names the report.
    """
    if as_json:
        check_sound(report, run)
        click.echo(json.dumps({**report, "run": str(run)}))
        return
    console = Console()
    if report["models"]:
        show_models(console, report)
    else:
        console.print(f"[yellow]No metrics: {report['unmeasured']}[/]", highlight=False, soft_wrap=True)
    for lost in report["lost"]:
        console.print(f"[yellow]Lost on the way: {lost['name']}: {lost['reason']}[/]", highlight=False, soft_wrap=True)
    show_steps(console, report["solve"])
    show_checks(console, report)
    sent = sum(sum(phases.values()) for phases in report["bytes"].values())
    seen = MODES[report["mode"]]
    if report["mode"] == "secure":
        seen += f" Their keys are {report['identities']}."
    console.print(
        f"\n{len(report['silos'])} silos sent {sent / 1e6:.1f} MB in all, in {sum(report['seconds'].values()):.0f} s. "
        f"{seen}\nplan    {report['plan_digest']}\nrun     {run}\nreport  {run / PAGE}\n\n"
        f"{_how_to_load(report, run)}",
        highlight=False,
        soft_wrap=True,
    )
    check_sound(report, run)


def check_sound(report: Mapping[str, Any], run: Path) -> None:
    """Raise MergeError if a check of the merge is bad.

    Args:
        run: directory of the report.
    """
    if worst(report["checks"]) == "bad":
        error = MergeError(
            f"{run}: {told(report['checks'])}. A silo's training diverged, or a silo did not send what it measured; "
            "the sum does not say which. The model is there to be looked at, not to be used"
        )
        error.report = run / REPORT
        raise error


def show_checks(console: Console, report: Mapping[str, Any]) -> None:
    """Print the checks that are not ok."""
    for check in report["checks"]:
        if check["verdict"] != "ok":
            style = "bold red" if check["verdict"] == "bad" else "yellow"
            console.print(Text(explain_check(check), style), soft_wrap=True)


def show_models(
    console: Console, report: Mapping[str, Any], on: str = "held-out examples of all silos together"
) -> None:
    """Print the models that were measured, and their metrics; of the rounds before the last, the merges only.

    Args:
        on: what they were measured on.
    """
    examples = int(report["models"][0]["metrics"]["examples"])
    console.print(f"On the {examples:,} {on}:")
    *earlier, last = report.get("rounds") or [{"round": 1}]
    models = [(model, each["round"]) for each in earlier for model in each["models"] if model["kind"] in MERGES]
    models += [(model, last["round"]) for model in report["models"]]
    rows = [columns(model, report["tasks"]) for model, _ in models]
    titles = list(dict.fromkeys(title for row in rows for title in row))
    table = Table()
    table.add_column("model")
    for title in titles:
        table.add_column(title, justify="right")
    for (model, number), row in zip(models, rows, strict=True):
        style = "bold" if model["kind"] == "regmean" else ""
        cells = [f"{row[title]:.3f}" if title in row else "" for title in titles]
        name = name_of(model)
        table.add_row(f"{name}, round {number}" if earlier and model["kind"] in MERGES else name, *cells, style=style)
    console.print(table)
    for model in report["models"]:
        if "note" in model:
            console.print(f"[dim]{model['name']}: {model['note']}[/]", highlight=False, soft_wrap=True)


def _how_to_load(report: Mapping[str, Any], run: Path) -> str:
    auto = report["auto_class"]
    lines = f'from transformers import {auto}\nmodel = {auto}.from_pretrained("{run / "model"}")'
    if report["head"] != "own":
        return lines
    kept = run / "models"
    where = f"in {kept}" if kept.is_dir() else "at each silo, in 'model' beside its statistics"
    return f"{lines}  # the body; with each silo's own head it is {where}"


def show_steps(console: Console, steps: Sequence[Mapping[str, Any]]) -> None:
    """Print how each group was solved for which it was not plain."""
    for step in steps:
        if step["outcome"] != "clean":
            console.print(f"[yellow]{step['group']}: {explain(step)}[/]", highlight=False, soft_wrap=True)
