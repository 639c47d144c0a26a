"""Runs without Ray: the grid in this process."""

from tests.grid import _task_identity, in_process_grid, no_waiting  # noqa: F401  # fixtures
