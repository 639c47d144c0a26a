"""What a study of a merge finds: for whoever has all silos' statistics and data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from gramfuse_protocol.contract.task import TaskKind
from gramfuse_server.report.schema import Measured, Tuning


class Studied(NamedTuple):
    """What it adds to a report, under the same names."""

    models: tuple[Measured, ...] = ()
    """Further models, with what was measured."""
    tuning: Tuning | None = None
    """What was tried, if something was."""
    tasks: Mapping[str, TaskKind] | None = None
    """Kind of each task, where files do not say it."""
    left_out: tuple[str, ...] | None = None
    """What is wrong with each row of data that was left out, where some may be."""
