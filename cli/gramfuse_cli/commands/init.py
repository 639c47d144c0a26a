"""`gramfuse init`: a project to start from."""

from __future__ import annotations

import importlib.resources
import shutil
from pathlib import Path

import click

from gramfuse_cli.options import as_json as json_option
from gramfuse_deployment.terminal import say, show_json
from gramfuse_protocol.contract.task import Task
from gramfuse_protocol.errors import DataError, PlanError

DESK = Path(str(importlib.resources.files("gramfuse_cli"))) / "desk"
"""The demo project: four front desks, one task."""

REGRESSION = Task(task="regression")


@click.command()
@click.argument("directory", metavar="DIR", type=click.Path(path_type=Path))
@click.option(
    "--targets",
    metavar="DATA",
    help="Have the plan be about regression, with a centre, scale and range that fit the targets in DATA.",
)
@click.option("--text", default="text", show_default=True, help="With --targets: column of DATA with the text.")
@click.option("--label", default="label", show_default=True, help="With --targets: column of DATA with the target.")
@json_option
def init(directory: Path, targets: str | None, text: str, label: str, as_json: bool) -> None:
    """Make a project in DIR to start from: a plan, four silo files and the demo's data.

    It runs as it is (gramfuse simulate DIR). To make it yours, name your silos in DIR/plan.toml, give each a file
    DIR/silos/NAME.toml that points to its data, and set the labels. Every key is explained where it stands.

    With --targets, the plan is one for regression. DATA is read here, and nothing of it is kept but four rounded
    numbers in DIR/plan.toml. All silos will read them: agree on numbers that fit all.
    """
    lines = None if targets is None else _target_lines(targets, text, label)
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise PlanError(f"{directory} exists already and is not empty; choose another name")
    try:
        shutil.copytree(DESK, directory, dirs_exist_ok=True)
    except (OSError, shutil.Error) as error:
        raise PlanError(f"{directory} cannot be made: {error}") from None
    if lines is not None:
        _have_regression(directory / "plan.toml", lines)
    if as_json:
        show_json({"directory": str(directory.absolute())})
        return
    say(f"{directory} made. Next:")
    if lines is not None:
        say(f"  name the silos' data in {directory}/silos/*.toml; the demo's are no regression")
    say(f"  gramfuse plan show {directory}", f"  gramfuse simulate {directory}", copied=True)


def _target_lines(source: str, text: str, label: str) -> tuple[str, ...]:
    """Return the lines of a plan that fit the targets of a source, which is read as a silo reads its own."""
    from gramfuse_client.data.examples import load_training
    from gramfuse_client.data.setting_names import of_options
    from gramfuse_client.data.targets import check_apart, propose
    from gramfuse_client.silo_file import Data, Silo, SiloFile

    data = Data(train=source, held_out=0.5, text=text, label=label)
    words = of_options(("--text", "--label"), skip=False)
    silo = Silo(Path.cwd() / "--targets", SiloFile(name="targets", data=data), words=words)
    labels = load_training(silo, REGRESSION).labels
    targets = [target for target in labels if isinstance(target, float)]
    check_apart(source, targets)
    fitting = propose(targets)
    if fitting is None:
        raise DataError(f"{source}: all targets are the same number, so there is nothing to learn; name other data")
    return fitting.lines


def _have_regression(plan: Path, lines: tuple[str, ...]) -> None:
    """Turn the demo's plan into one for regression, and keep its comments."""
    text = plan.read_text(encoding="utf-8").replace('task = "classification"', 'task = "regression"', 1)
    of_labels = next(line for line in text.splitlines() if line.startswith("labels = "))
    centre, scale, span = lines
    told = (
        f"{centre} # taken off each target before training; about their mean, over all silos",
        f"{scale} # what the rest is divided by; about their standard deviation",
        f"{span} # lowest and highest target; one beyond is an error",
    )
    plan.write_text(text.replace(of_labels, "\n".join(told), 1), encoding="utf-8")
