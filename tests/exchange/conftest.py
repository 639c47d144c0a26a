"""Runs without Ray: the grid in this process, and nobody waits."""

from __future__ import annotations

import pytest

from tests.grid import _task_identity, in_process_grid, no_waiting  # noqa: F401  # fixtures


@pytest.fixture(autouse=True)
def _no_waiting(no_waiting: None) -> None:  # noqa: F811
    """In every test of this folder."""
