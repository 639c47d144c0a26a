"""Sites with a base whose features vary: a pico model's pooler says nearly the same of all texts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.exchange.rounds.conftest import trainings  # noqa: F401  # a fixture
from tests.exchange.rounds.runs import QUICK, Site


@pytest.fixture
def site(pico_project: Any, loud_bert: Path, in_process_grid: Any, tmp_path: Path) -> Callable[..., Site]:
    """Return a function that makes a site of a plan with a fitted head, if its settings do not say otherwise."""

    def make(*settings: str, silos: int = 3, rounds: int = 1, secure: bool = False, name: str = "pico") -> Site:
        project = pico_project(silos=silos, examples=24, base=loud_bert, secure=secure, name=name)
        for silo in project.names if secure else ():
            project.replace(project.silo(silo), "open-uploads = false", "open-uploads = true\nexact-metrics = true")
        chosen = ('model.head="fitted"', "training.learning-rate=1e-3", *QUICK, *settings)
        return Site(project, in_process_grid, tmp_path / f"place-{name}", rounds, *chosen)

    return make
