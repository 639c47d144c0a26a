"""`gramfuse server register`: registers the silos of a plan."""

from __future__ import annotations

from pathlib import Path

import click

from gramfuse_cli.commands.server import directory_argument
from gramfuse_cli.options import as_json as json_option
from gramfuse_deployment.superlink import Link
from gramfuse_deployment.terminal import say, show_json
from gramfuse_model.project import Project


@click.command()
@directory_argument
@click.argument("project", metavar="PROJECT", type=click.Path(path_type=Path, exists=True))
@json_option
def register(directory: Path, project: Path, as_json: bool) -> None:
    """Register the silos of a plan, so that they can connect before its first run, which also registers them.

    The server in DIR must be running. PROJECT is the directory of the plan; its roster has the silos' node keys.
    """
    plan = Project.read(project).plan
    Link.of_server(directory).admit(plan)
    if as_json:
        show_json({"registered": list(plan.names)})
        return
    say(f"registered: {', '.join(plan.names)}")
