"""Four silos, made once."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from gramfuse_client.exchange import local_model
from gramfuse_server.run import delivery
from gramfuse_server.run import exchange as exchange_module
from tests.adversarial.hostile_silo.runs import Federation
from tests.grid import _task_identity  # noqa: F401  # a fixture


@pytest.fixture(scope="session")
def _made() -> list[Federation]:
    return []


@pytest.fixture
def federation(_made: list[Federation], pico_project: Any, monkeypatch: pytest.MonkeyPatch) -> Federation:
    if not _made:
        _made.append(Federation(pico_project(silos=4, name="hostile", secure=True)))
    federation = _made[0]

    def write_model(directory: Path, _: Any, deltas: Mapping[str, Any], *__: Any, **___: Any) -> None:
        (directory / "model").mkdir(exist_ok=True)
        save_file({name: np.ascontiguousarray(delta) for name, delta in deltas.items()}, directory / "model" / "deltas")

    monkeypatch.setattr(local_model, "train", lambda silo, *_: federation.statistics[silo.name])
    monkeypatch.setattr(local_model, "load_base", lambda *_, **__: copy.deepcopy(federation.base))
    monkeypatch.setattr(local_model, "plan_layout", lambda *_: federation.layout)
    monkeypatch.setattr(exchange_module, "write_model", write_model)
    monkeypatch.setattr(delivery.time, "sleep", lambda _: None)
    return federation
