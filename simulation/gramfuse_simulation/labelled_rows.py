"""Options for data without a plan or silo file: names of labels, and skipping of bad rows."""

from __future__ import annotations

import csv
from collections.abc import Callable
from typing import Any, TypeVar

import click

from gramfuse_protocol.contract.task import Task
from gramfuse_protocol.errors import PlanError
from gramfuse_protocol.text import listed

F = TypeVar("F", bound=Callable[..., Any])


COLUMNS = ("--text", "--text-pair", "--image", "--label")
"""Options that name columns."""


def skip_bad(command: F, lead: str = "") -> F:
    """Add --skip-bad.

    Args:
        lead: prefix of its help text.
    """
    return click.option(
        "--skip-bad",
        type=click.IntRange(0),
        default=0,
        show_default=True,
        metavar="N",
        help=f"{lead}Skip at most N bad rows of DATA.",
    )(command)


def row_options(lead: str = "") -> Callable[[F], F]:
    """Return a decorator that adds --labels and --skip-bad.

    Args:
        lead: prefix of their help texts.
    """

    def add(command: F) -> F:
        names = click.option(
            "--labels",
            metavar="NAME,…",
            help=f"{lead}Names in DATA of MODEL's outputs, in order.  [default: those of its config, or 0, 1, …]",
        )
        return names(skip_bad(command, lead))

    return add


def parse_names(option: str) -> tuple[str, ...]:
    """Return names that are separated by commas; those with commas are in double quotes."""
    return tuple(next(csv.reader([option], skipinitialspace=True), []))


def label_names(option: str | None, task: Task) -> tuple[str, ...]:
    """Parse --labels; empty if the option is missing.

    Raises:
        PlanError: unless there is one distinct name for each output of the task's model.
    """
    if option is None:
        return ()
    names = parse_names(option)
    if len(names) != len(task.labels) or len({*names, ""}) <= len(names):
        raise PlanError(
            f"--labels {option}: expected {len(task.labels)} different names, one for each output of MODEL: "
            f"{listed(task.labels, 20) or 'it has no outputs that are labels'}"
        )
    return names
