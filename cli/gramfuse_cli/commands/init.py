"""`gramfuse init`: makes a project to start from."""

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
    help="Make a plan for regression, with a centre, scale and range that fit the targets in DATA.",
)
@click.option("--text", default="text", show_default=True, help="With --targets: the text column of DATA.")
@click.option("--label", default="label", show_default=True, help="With --targets: the target column of DATA.")
@json_option
def init(directory: Path, targets: str | None, text: str, label: str, as_json: bool) -> None:
    """Make a project in DIR to start from: a plan, four silo files and the demo's data.

    You can run it at once (gramfuse simulate DIR). To make it yours, name your silos in DIR/plan.toml, give each a file
    DIR/silos/NAME.toml that points to its data, and set the labels. Comments in the files explain every key.

    With --targets, the plan is for regression. DATA is read here, and only four rounded numbers from it are kept, in
    DIR/plan.toml. All silos will read them: agree on numbers that fit all silos' data.
    """
    lines = None if targets is None else _target_lines(targets, text, label)
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise PlanError(f"{directory} exists and is not empty; choose another name")
    try:
        shutil.copytree(DESK, directory, dirs_exist_ok=True)
    except (OSError, shutil.Error) as error:
        raise PlanError(f"{directory} cannot be made: {error}") from None
    if lines is not None:
        _convert_to_regression(directory / "plan.toml", lines)
    if as_json:
        show_json({"directory": str(directory.absolute())})
        return
    say(f"{directory} made. Next:")
    if lines is not None:
        say(f"  name the silos' data in {directory}/silos/*.toml; the demo's data are not for regression")
    say(f"  gramfuse plan show {directory}", f"  gramfuse simulate {directory}", copied=True)
    if lines is None:
        say("  or first only a head in closed form on the base model, without fine-tuning:")
        say(f"  gramfuse simulate {directory} --set training.epochs=0", copied=True)


def _target_lines(source: str, text: str, label: str) -> tuple[str, ...]:
    """Return lines for a plan that fit the targets of a source, read as a silo reads its own data."""
    from gramfuse_client.data.examples import load_training
    from gramfuse_client.data.setting_names import option_settings
    from gramfuse_client.data.targets import check_apart, propose
    from gramfuse_client.silo_file import Data, Silo, SiloFile

    data = Data(train=source, held_out=0.5, text=text, label=label)
    words = option_settings(("--text", "--label"), skip=False)
    silo = Silo(Path.cwd() / "--targets", SiloFile(name="targets", data=data), words=words)
    labels = load_training(silo, REGRESSION).labels
    targets = [target for target in labels if isinstance(target, float)]
    check_apart(source, targets)
    fitting = propose(targets)
    if fitting is None:
        raise DataError(f"{source}: all targets are equal, so there is nothing to learn; name other data")
    return fitting.lines


def _convert_to_regression(plan: Path, lines: tuple[str, ...]) -> None:
    """Turn the demo's plan into one for regression; keep its comments."""
    text = plan.read_text(encoding="utf-8").replace('task = "classification"', 'task = "regression"', 1)
    text = text.replace('head = "fitted"', 'head = "same"', 1)
    labels = next(line for line in text.splitlines() if line.startswith("labels = "))
    centre, scale, span = lines
    commented = (
        f"{centre} # subtracted from each target before training; about the mean over all silos",
        f"{scale} # divides the difference; about the standard deviation",
        f"{span} # lowest and highest target; any other target is an error",
    )
    plan.write_text(text.replace(labels, "\n".join(commented), 1), encoding="utf-8")
