"""Bad days: processes that are killed while a run is under way. It ends with the model that it would have had."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest

Run = Callable[..., Any]


def weights(running: Any) -> bytes:
    """The merged model of a run that is complete."""
    content: bytes = (running.out / "model" / "model.safetensors").read_bytes()
    return content


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("phases", "metrics"),
    [(("join", "train", "keys", "shares"), "none"), (("masked", "survivors", "unmask", "evaluate"), "sum")],
)
def test_a_supernode_is_killed_as_a_request_arrives(
    deploy: Run, pico_project: Run, undisturbed: Run, phases: tuple[str, ...], metrics: str
) -> None:
    project = pico_project(silos=3, secure=True)
    project.replace(project.plan, 'metrics = "sum"', f'metrics = "{metrics}"')
    deployment = deploy(project)
    deployment.start_server()
    deployment.register()
    deployment.hasten()
    silos = {name: deployment.start_silo(name) for name in project.names}
    running = deployment.start_run()
    trained = {}
    for number, phase in enumerate(phases):
        name = project.names[number % 3]
        log = silos[name].directory / "supernode.log"
        arrived = "Receiving: " + (phase if phase in ("train", "evaluate") else f"query.{phase}")
        deadline = time.monotonic() + 150
        while arrived not in log.read_text():
            assert running.process.poll() is None, running.log.read_text()
            assert time.monotonic() < deadline, f"{phase}: {running.log.read_text()}{log.read_text()}"
            time.sleep(0.02)
        silos[name].one("flower-supernode").kill()
        if phase not in ("join", "train"):
            trained = trained or deployment.trained()
    report = running.report()
    assert report["lost"] == []
    assert report["unmeasured"] is None or metrics == "none"
    assert deployment.trained() == trained
    assert weights(running) == undisturbed(project)
    deployment.check_silos()
