"""Rows of data where there is neither plan nor silo file: what they call labels, and which of them are left out."""

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
"""The options that name columns."""


def row_options(lead: str = "") -> Callable[[F], F]:
    """Return a decorator that adds --labels and --skip-bad.

    Args:
        lead: what their help begins with.
    """

    def add(command: F) -> F:
        skip = click.option(
            "--skip-bad",
            type=click.IntRange(0),
            default=0,
            show_default=True,
            metavar="N",
            help=f"{lead}Leave out as many bad rows of DATA at most.",
        )
        names = click.option(
            "--labels",
            metavar="NAME,…",
            help=f"{lead}What DATA call the outputs of MODEL, in their order.  [default: as its config does, or 0, 1, "
            "…]",
        )
        return names(skip(command))

    return add


def label_names(given: str | None, task: Task) -> tuple[str, ...]:
    """Return --labels, of which one with a comma in it stands in double quotes; none if it is not given.

    Raises:
        PlanError: if they are not one different name for each output of a task's model.
    """
    if given is None:
        return ()
    names = tuple(next(csv.reader([given], skipinitialspace=True), []))
    if len(names) != len(task.labels) or len({*names, ""}) <= len(names):
        raise PlanError(
            f"--labels {given}: expected {len(task.labels)} different names, one for each output of MODEL: "
            f"{listed(task.labels, 20) or 'it has none that are labels'}"
        )
    return names
