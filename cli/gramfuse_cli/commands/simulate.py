"""`gramfuse simulate`: a whole exchange on one machine, with Flower's simulation engine."""

from __future__ import annotations

from pathlib import Path

import click

from gramfuse_cli import options
from gramfuse_cli.options import as_json as json_option
from gramfuse_cli.options import compare_option, project_directory
from gramfuse_cli.options import settings as settings_options
from gramfuse_cli.show.progress import RunProgress
from gramfuse_cli.show.results import show_report
from gramfuse_model.project import Project
from gramfuse_simulation.simulate import run_simulation
from gramfuse_simulation.terms import Term


@click.command()
@project_directory
@compare_option
@options.open_mode
@settings_options
@json_option
def simulate(
    directory: Path,
    compare: tuple[Term, ...],
    opened: bool,
    settings: tuple[str, ...],
    seed: int | None,
    out: Path | None,
    as_json: bool,
) -> None:
    """Run a whole exchange on this machine: all silos of DIR/plan.toml, by Flower's simulation engine.

    Each silo works from its own file (DIR/silos/NAME.toml) as it would in a deployment, but for the approval of the
    plan, and for its key, which is made for the run. Every silo's own model, their simple average and the RegMean merge
    are measured on all silos' held-out examples together. With --set, other values can be tried without touching the
    plan, and with --compare, other ways to put the silos' models or data together are measured too.
    """
    project = Project.read(directory, options.all_settings(settings, seed, opened=opened))
    run = options.run_path(out, project.plan)
    show_report(run_simulation(project, run, RunProgress, compare=compare, opened=opened), run, as_json)
