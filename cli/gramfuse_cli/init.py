"""`gramfuse init`: a project to start from."""

from __future__ import annotations

import importlib.resources
import shutil
from pathlib import Path

import click

from gramfuse_cli.options import as_json as json_option
from gramfuse_cli.terminal import say, show_json
from gramfuse_protocol.errors import PlanError

DESK = Path(str(importlib.resources.files("gramfuse_cli"))) / "desk"
"""The demo project: four front desks, one task."""


@click.command()
@click.argument("directory", metavar="DIR", type=click.Path(path_type=Path))
@json_option
def init(directory: Path, as_json: bool) -> None:
    """Make a project in DIR to start from: a plan, four silo files and the demo's data.

    It runs as it is (gramfuse simulate DIR). To make it yours, name your silos in DIR/plan.toml, give each a file
    DIR/silos/NAME.toml that points to its data, and set the labels. Every key is explained where it stands.
    """
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise PlanError(f"{directory} exists already and is not empty; choose another name")
    try:
        shutil.copytree(DESK, directory, dirs_exist_ok=True)
    except (OSError, shutil.Error) as error:
        raise PlanError(f"{directory} cannot be made: {error}") from None
    if as_json:
        show_json({"directory": str(directory.absolute())})
        return
    say(f"{directory} made. Next:")
    say(f"  gramfuse plan show {directory}", f"  gramfuse simulate {directory}", copied=True)
