"""What the commands that measure a model on data have in common."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gramfuse_deployment.terminal import bars, say
from gramfuse_protocol.contract.task import Task
from gramfuse_protocol.errors import RunDirectoryError
from gramfuse_simulation.labelled_rows import COLUMNS

if TYPE_CHECKING:
    import torch

    from gramfuse_client.silo_file import Silo

LENGTH = Task.model_fields["max_length"].default
"""Default maximum number of tokens in an example."""

FEW = 100
"""Warn if there are fewer examples; also the default of a silo's `limits.minimum-examples`."""

EVERY = 50
"""Steps between two lines of progress without a terminal."""


def name_of_file(given: str | None, model: str) -> str:
    """Return the name of a model in a file: the one given, or the last part of the model's own.

    Raises:
        click.UsageError: if it is not allowed.
    """
    name = given or re.sub(r"[^a-z0-9]+", "-", Path(model).resolve().name.lower()).strip("-")[:63]
    if not re.fullmatch(r"[a-z0-9][a-z0-9-]{0,62}", name):
        raise click.UsageError(f"--name {name!r}: expected at most 63 lowercase letters, digits and '-'")
    return name


def check_absent(out: Path) -> None:
    """Raise RunDirectoryError if a file exists already, or its directory does not."""
    if out.exists():
        raise RunDirectoryError(f"{out} exists already; choose another -o, or remove it")
    if not out.absolute().parent.is_dir():
        raise RunDirectoryError(f"{out}: no directory {out.absolute().parent}; make it first")


def prepare(options: Mapping[str, Any]) -> torch.device:
    """Apply --threads and --device."""
    import torch

    from gramfuse_client.training.finetune import choose_device

    device = choose_device(options["device"])
    if options["threads"]:
        torch.set_num_threads(options["threads"])
    return device


def silo_of(name: str, options: Mapping[str, Any], *, labelled: bool) -> Silo:
    """Return the silo file that options stand for: data, columns and bad rows.

    Args:
        labelled: whether each row must have a label.
    """
    from gramfuse_client.data.setting_names import option_settings
    from gramfuse_client.silo_file import Data, Silo, SiloFile

    columns = {key: options[key] for key in ("text", "text_pair", "image", "label")}
    data = Data(train=options["data"], held_out=0.5, skip_bad=options["skip_bad"], **columns)
    words = option_settings(COLUMNS, unlabelled=not labelled)
    return Silo(Path.cwd() / "--data", SiloFile(name=name, data=data), words=words)


def say_left_out(rows: Sequence[str]) -> None:
    """Print the bad rows that were left out."""
    if rows:
        say(f"left out {len(rows)} bad rows:", *rows, err=True)


@contextmanager
def show_progress() -> Iterator[Any]:
    """Yield a function (phase, done, total) that shows a phase's progress on standard error."""
    names = {"train": "fine-tune", "measure": "measure"}
    with bars("{task.description:<10}") as progress:
        tasks: dict[str, Any] = {}

        def show(phase: str, done: int, total: int) -> None:
            if phase not in tasks:
                tasks[phase] = progress.add_task(names.get(phase, phase), total=total)
            progress.update(tasks[phase], completed=done)
            if not progress.console.is_terminal and (done % EVERY == 0 or done == total):
                say(f"{names.get(phase, phase)}: {done} of {total}", err=True)

        yield show
