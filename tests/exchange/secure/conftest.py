"""The silos, which are trained once, and one whole honest session."""

from __future__ import annotations

import copy
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from gramfuse_client.data.examples import load
from gramfuse_client.exchange import local_model, secure_phases
from gramfuse_client.silo_file import Silo
from gramfuse_client.state.session import Session
from gramfuse_model.loading.base_model import load_base
from gramfuse_model.project import Project
from gramfuse_protocol.statistics.contribution import Statistics
from gramfuse_server.run import exchange as exchange_module
from tests.exchange.secure.coordinator import STEPS, Coordinator
from tests.exchange.secure.runs import NAMES, Arrays, Site, Watched, leaves


@pytest.fixture(scope="session")
def _kept() -> list[Site]:
    return []


@pytest.fixture
def site(_kept: list[Site], pico_project: Any) -> Site:
    """The silos; they are trained once."""
    if not _kept:
        project = pico_project(silos=5, name="secure", secure=True)
        structures = '"*" = "block:5", "*attention*" = "full", "*encoder.layer.0.*" = "diagonal"'
        project.replace(project.plan, '"*" = "full"', structures)
        for n, name in enumerate(NAMES):
            lines = project.train(name).read_text().splitlines(keepends=True)
            project.train(name).write_text("".join(lines[: 12 + 2 * n]))
        plan, layout = Project.read(project.directory).locked()
        assert {group.structure for group in layout.groups} == {"full", "block:5", "diagonal"}
        base = load_base(plan, project.directory)
        statistics = {}
        for name in NAMES:
            silo = Silo.read(project.silo(name))
            examples, _ = load(silo, plan.task_of(name))
            found = local_model.train(silo, plan, layout, copy.deepcopy(base), examples)
            # Weighed by examples, an integer leaves 18 bits to their number: let them be as many as silos have.
            statistics[name] = replace(found, examples=100 * len(examples))
        _kept.append(Site(project, base, layout, statistics))
    return _kept[0]


@pytest.fixture(autouse=True)
def watched(site: Site, monkeypatch: pytest.MonkeyPatch) -> Watched:
    """Silos take their statistics and their base model from the site; the merged model is written as differences."""
    seen = Watched()
    write_masked, write = secure_phases.write_masked, Session.write

    def train(silo: Silo, *_: Any) -> Statistics:
        seen.trained[silo.name] += 1
        return site.statistics[silo.name]

    def counted(path: Path, *arguments: Any) -> None:
        seen.masked[path] += 1
        write_masked(path, *arguments)

    def spied(session: Session, record: Any) -> None:
        if record.member is not None:
            document = record.member.model_dump(mode="json")
            seen.secrets |= set(leaves(document["secrets"]))
            seen.shares |= set(leaves([document["own_shares"], document["held"]]))
        write(session, record)

    def write_model(directory: Path, _: Any, deltas: Arrays, *__: Any, **___: Any) -> None:
        (directory / "model").mkdir(exist_ok=True)
        save_file({name: np.ascontiguousarray(delta) for name, delta in deltas.items()}, directory / "model" / "deltas")

    monkeypatch.setattr(local_model, "train", train)
    monkeypatch.setattr(local_model, "load_base", lambda *_, **__: copy.deepcopy(site.base))
    monkeypatch.setattr(local_model, "plan_layout", lambda *_: site.layout)
    monkeypatch.setattr(secure_phases, "write_masked", counted)
    monkeypatch.setattr(Session, "write", spied)
    monkeypatch.setattr(exchange_module, "write_model", write_model)
    return seen


@pytest.fixture
def place(tmp_path: Path) -> Path:
    directory = tmp_path / "place"
    directory.mkdir()
    return directory


@pytest.fixture(scope="session")
def _script() -> list[Coordinator]:
    return []


@pytest.fixture
def script(
    _script: list[Coordinator], site: Site, watched: Watched, tmp_path_factory: pytest.TempPathFactory
) -> Coordinator:
    """A whole honest session; the silos' state before each step is kept in a directory of the step's name."""
    if not _script:
        place = tmp_path_factory.mktemp("script")
        coordinator = Coordinator(site, site.plan(), place)
        # The most careless umask there is: what is private must be so by the code's own doing.
        before = os.umask(0)
        try:
            for step in STEPS:
                if (place / "state").exists():
                    shutil.copytree(place / "state", place / step / "state")
                coordinator.do(step)
        finally:
            os.umask(before)
        coordinator.secrets = watched.secrets | watched.shares
        _script.append(coordinator)
    return _script[0]
