"""Sites, and two open rounds that are run once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gramfuse_client.exchange import local_model
from gramfuse_client.silo_file import Silo
from gramfuse_client.state.state import State
from gramfuse_protocol.contract.plan import Plan
from gramfuse_protocol.messages.phases import EvaluateRequest, TrainRequest
from tests.exchange.rounds.runs import QUICK, Arrays, Done, Site


@pytest.fixture(autouse=True)
def trainings(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each silo trained in each round."""
    counted: Counter[str] = Counter()
    train = local_model.train

    def count(silo: Silo, plan: Plan, layout: Any, base: Any, examples: Any, state: State) -> Any:
        counted[f"{silo.name} {state.round}"] += 1
        return train(silo, plan, layout, base, examples, state)

    monkeypatch.setattr(local_model, "train", count)
    return counted


@pytest.fixture
def site(pico_project: Any, in_process_grid: Any, tmp_path: Path) -> Callable[..., Site]:
    def make(*settings: str, silos: int = 3, rounds: int = 2, secure: bool = False, name: str = "rounds") -> Site:
        project = pico_project(silos=silos, examples=16, name=name, secure=secure)
        settings += QUICK
        for silo in project.names if secure else ():
            project.replace(project.silo(silo), "open-uploads = false", "open-uploads = true\nexact-metrics = true")
        return Site(project, in_process_grid, tmp_path / name / "place", rounds, *settings)

    return make


@pytest.fixture(scope="session")
def _kept() -> list[Done]:
    return []


@pytest.fixture
def done(_kept: list[Done], site: Callable[..., Site], trainings: Counter[str]) -> Done:
    """The two rounds; they are run once."""
    if not _kept:
        here = site('merge.context-free="full"')  # so that a Gram matrix behind frozen layers is there
        sent: dict[tuple[int, str], Arrays] = {}

        def change(_: str, request: Any) -> Any:
            if isinstance(request, EvaluateRequest):
                sent[request.round, request.candidate] = request.arrays
            if isinstance(request, TrainRequest):
                sent[request.round, "start"] = request.arrays
            return request

        report = here.run(simulated=here.laboratory, change=change)
        _kept.append(Done(here, report, trainings, sent))
    return _kept[0]
