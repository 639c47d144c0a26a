"""Bad days: two runs at the same time. Each ends with its own model, or with an exit code that says why not."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

Run = Callable[..., Any]


@dataclass(frozen=True)
class Other:
    """Another plan of the same silos."""

    directory: Path
    first: Any

    @property
    def plan(self) -> Path:
        return self.directory / "plan.toml"

    @property
    def names(self) -> tuple[str, ...]:
        names: tuple[str, ...] = self.first.names
        return names

    def silo(self, name: str) -> Path:
        path: Path = self.first.silo(name)
        return path


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_plans_are_run_at_the_same_time(deploy: Run, pico_project: Run, undisturbed: Run, gramfuse: Run) -> None:
    project = pico_project(silos=3, secure=True)
    project.replace(project.plan, 'metrics = "sum"', 'metrics = "none"')
    deployment = deploy(project)
    other = Other(project.directory.with_name("other"), project)
    other.directory.mkdir()
    shutil.copy(project.plan, other.plan)
    project.replace(other.plan, "epochs = 2", "epochs = 1")
    project.replace(other.plan, "alpha = 0.9", "alpha = 0.5")
    digest = gramfuse("plan", "lock", other.directory)["plan_digest"]
    for name in project.names:
        project.replace(project.silo(name), "approved = [", f'approved = ["{digest}", ')
    deployment.start_server()
    deployment.register()
    for name in project.names:
        deployment.start_silo(name)
    runs = {
        "one": (deployment.start_run(out="one"), project),
        "other": (deployment.start_run(project=other, out="other"), other),
    }
    for running, _ in runs.values():
        assert running.report()["lost"] == []
    models = {name: undisturbed(of) for name, (_, of) in runs.items()}
    assert models["one"] != models["other"]
    assert {name: running.weights() for name, (running, _) in runs.items()} == models
    deployment.check_silos()


@pytest.mark.timeout(900)
def test_a_run_into_the_directory_of_one_that_goes_on_ends_and_leaves_it_alone(
    deploy: Run, pico_project: Run, undisturbed: Run
) -> None:
    project = pico_project(silos=3, secure=True)
    project.replace(project.plan, 'metrics = "sum"', 'metrics = "none"')
    deployment = deploy(project)
    deployment.start_server()
    deployment.register()
    both = [deployment.start_run(), deployment.start_run()]  # neither is there yet for the other to see
    while not (ended := [running for running in both if running.process.poll() is not None]):
        time.sleep(0.1)
    (running,) = [running for running in both if running not in ended]
    late = [*ended, deployment.start_run()]
    for name in project.names:
        deployment.start_silo(name)
    running.wait_for("from", "silo-a", "keys")
    late += [deployment.start_run(), deployment.resume()]
    for refused in late:
        code, error = refused.end(60)
        assert code == 15
        assert "run.partial" in error["message"]
    assert running.report()["lost"] == []
    assert running.weights() == undisturbed(project)
    deployment.check_silos()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_same_plan_is_run_twice_at_the_same_time(deploy: Run, pico_project: Run, undisturbed: Run) -> None:
    project = pico_project(silos=3, secure=True)
    project.replace(project.plan, 'metrics = "sum"', 'metrics = "none"')
    deployment = deploy(project)
    deployment.start_server()
    deployment.register()
    for name in project.names:
        deployment.start_silo(name)
    first = deployment.start_run(out="first")
    first.wait_for("to", "silo-a", "keys")
    trained = deployment.trained()
    second = deployment.start_run(out="second")
    assert second.report()["lost"] == []
    code, error = first.end()
    assert code in (13, 16)
    assert "session is over" in error["message"]
    assert not first.out.exists()
    failed = first.out.with_name("first.failed")
    assert error["report"] == str(failed / "report.html")
    assert str(error["report"]) in first.log.read_text()
    assert {path.name for path in failed.iterdir()} == {"plan.toml", "report.html", "report.json", "transcript.jsonl"}
    assert "session is over" in json.loads((failed / "report.json").read_text())["failure"]["message"]
    assert deployment.trained() == trained
    assert second.weights() == undisturbed(project)
    deployment.check_silos()
