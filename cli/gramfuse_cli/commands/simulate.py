"""`gramfuse simulate`: runs a whole exchange on one machine, with Flower's simulation engine."""

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
    """Run a whole exchange on this machine: all silos of DIR/plan.toml, with Flower's simulation engine.

    Each silo works from its own file (DIR/silos/NAME.toml) as it would in a deployment, except that it need not approve
    the plan, and that its key is made for the run. The silos' own models, their simple average and the RegMean merge
    are measured on all silos' held-out examples together. Use --set to try other values without changing the plan, and
    --compare to measure other ways of combining the silos' models or data.
    """
    project = Project.read(directory, options.all_settings(settings, seed, opened=opened))
    run = options.run_path(out, project.plan)
    show_report(run_simulation(project, run, RunProgress, compare=compare, opened=opened), run, as_json)
