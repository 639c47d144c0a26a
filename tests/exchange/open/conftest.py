"""The honest exchange, which is made once, and where runs go."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gramfuse_model.loading.base_model import load_base
from gramfuse_model.project import Project
from gramfuse_server.app import coordinate
from tests.exchange.open.runs import SILOS, Honest, Recorder, laboratory, simulated


@pytest.fixture(scope="session")
def _kept() -> list[Honest]:
    return []


@pytest.fixture
def honest(
    _kept: list[Honest], pico_project: Any, in_process_grid: Any, tmp_path_factory: pytest.TempPathFactory
) -> Honest:
    """The honest exchange; it is made once."""
    if not _kept:
        project = pico_project(silos=3, name="honest")
        plan, layout = Project.read(project.directory).locked()
        place = tmp_path_factory.mktemp("honest")
        recorder = Recorder()
        grid = in_process_grid(simulated(project, plan, place / "state"), fault=recorder)
        simulated_all = laboratory(project, plan, layout, place / "state")
        report = coordinate(grid, plan, layout, project.directory, place / "run", simulated=simulated_all).document()
        sums = {name: recorder.sums(name) for name in SILOS}
        base = load_base(plan, project.directory)
        _kept.append(Honest(project, plan, layout, place / "run", report, grid.sent, recorder.statistics(), sums, base))
    return _kept[0]


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    """Where runs of this test go."""
    directory = tmp_path / "runs"
    directory.mkdir()
    return directory
