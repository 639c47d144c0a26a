"""`gramfuse demo`: simulates a merge of four front desks."""

from __future__ import annotations

from pathlib import Path

import click

from gramfuse_cli import options
from gramfuse_cli.commands.init import DESK
from gramfuse_cli.options import as_json as json_option
from gramfuse_cli.options import settings as settings_options
from gramfuse_cli.show.progress import RunProgress
from gramfuse_cli.show.results import show_report
from gramfuse_deployment.terminal import say
from gramfuse_model.project import Project
from gramfuse_simulation.simulate import run_simulation


@click.command()
@settings_options
@json_option
def demo(settings: tuple[str, ...], seed: int | None, out: Path | None, as_json: bool) -> None:
    """Merge four front desks: a hospital, a bank, a telephone company and a town hall, simulated on this machine.

    All four classify incoming messages by what the writer wants, with the same eight labels, but each sees mostly two
    of them. One exchange fits a head for all. Each fine-tunes MiniLM (22 million parameters) with it, on about 300
    messages; another exchange merges the models.
    """
    project = Project.read(DESK, options.all_settings(settings, seed))
    say(
        "Four silos, about 300 messages each; eight labels, of which each silo sees mostly two.",
        "One exchange fits a head for all; each silo fine-tunes MiniLM with it; another exchange merges the models.",
        "",
        err=True,
    )
    run = options.run_path(out, project.plan)
    show_report(run_simulation(project, run, RunProgress), run, as_json)
