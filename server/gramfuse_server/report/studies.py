"""Results of a study of a merge, which needs all silos' statistics and data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from gramfuse_protocol.contract.task import TaskName
from gramfuse_server.report.choices import Tuning
from gramfuse_server.report.schema import Measured


class Studied(NamedTuple):
    """What a study adds to a report, under the same keys."""

    models: tuple[Measured, ...] = ()
    """Additional measured models."""
    tuning: Tuning | None = None
    """What the search tried, if there was one."""
    tasks: Mapping[str, TaskName] | None = None
    """Kind of each task, for merges of files."""
    left_out: tuple[str, ...] | None = None
    """What is wrong with each skipped row of data; None if rows cannot be skipped."""
