"""Shows the report of a run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

MODES = {
    "open": "The coordinator saw each silo's statistics.",
    "secure": "The coordinator saw their sums only.",
}

NAMES = {"silo": "{name} alone", "simple": "simple average", "regmean": "RegMean"}


def show_report(report: Mapping[str, Any], run: Path, as_json: bool) -> None:
    """Print a report: one JSON object, or a table and how to load the model."""
    if as_json:
        click.echo(json.dumps({**report, "run": str(run)}))
        return
    console = Console()
    if report["models"]:
        metrics = [name for name in report["models"][0]["metrics"] if name != "examples"]
        examples = int(report["models"][0]["metrics"]["examples"])
        console.print(f"On the {examples:,} held-out examples of all silos together:")
        table = Table()
        table.add_column("model")
        for metric in metrics:
            table.add_column(metric, justify="right")
        for model in report["models"]:
            style = "bold" if model["kind"] == "regmean" else ""
            cells = [f"{model['metrics'][metric]:.3f}" for metric in metrics]
            table.add_row(NAMES[model["kind"]].format(name=model["name"]), *cells, style=style)
        console.print(table)
    else:
        console.print(f"[yellow]No metrics: {report['unmeasured']}[/]", highlight=False, soft_wrap=True)
    for lost in report["lost"]:
        console.print(f"[yellow]Lost on the way: {lost['name']}: {lost['reason']}[/]", highlight=False, soft_wrap=True)
    for step in report["solve"]:
        if step["outcome"] != "clean":
            console.print(f"[yellow]{step['group']}: {_explain(step)}[/]", highlight=False, soft_wrap=True)
    sent = sum(sum(phases.values()) for phases in report["bytes"].values())
    seen = MODES[report["mode"]]
    if report["mode"] == "secure":
        seen += f" Their keys are {report['identities']}."
    console.print(
        f"\n{len(report['silos'])} silos sent {sent / 1e6:.1f} MB in all, in {sum(report['seconds'].values()):.0f} s. "
        f"{seen}\nplan {report['plan_digest']}\nrun  {run}\n\n"
        "from transformers import AutoModelForSequenceClassification\n"
        f'model = AutoModelForSequenceClassification.from_pretrained("{run / "model"}")',
        highlight=False,
        soft_wrap=True,
    )


def _explain(step: Mapping[str, Any]) -> str:
    match step["outcome"]:
        case "jitter":
            return f"ill-conditioned; solved with a relative ridge of {step['jitter']:g} towards the simple average"
        case "empty":
            return "no silo saw a token there; took the simple average"
        case _:
            return f"{step['mean_blocks']} of {step['blocks']} blocks could not be solved; they took the simple average"
