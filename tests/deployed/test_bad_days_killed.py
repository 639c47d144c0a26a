"""Bad days: processes that are killed while a run is under way. It ends with the model that it would have had."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

Run = Callable[..., Any]


def wait_for(what: Callable[[], Any], running: Any, seconds: float = 300) -> Any:
    """Wait until something is there, as long as the run goes on, and return it."""
    deadline = time.monotonic() + seconds
    while not (found := what()):
        assert running.process.poll() is None, running.log.read_text()
        assert time.monotonic() < deadline, running.log.read_text()
        time.sleep(0.02)
    return found


def wait_for_line(log: Path, text: str, running: Any) -> None:
    """Wait until a log has something in it."""
    wait_for(lambda: text in log.read_text(), running)


def wait_for_request(silo: Any, phase: str, running: Any) -> None:
    """Wait until a silo's SuperNode has a request of a phase."""
    kind = phase if phase in ("train", "evaluate") else f"query.{phase}"
    wait_for_line(silo.directory / "supernode.log", f"Receiving: {kind} ", running)


def killed_in(silo: Any, phase: str) -> bool:
    """Kill a silo's worker once its log says that it is at work on a phase; it works in short steps until then."""
    log = silo.directory / "superexec.log"
    for starter in silo.one("gramfuse_client.runner").children():
        for worker in starter.children():
            with contextlib.suppress(psutil.NoSuchProcess):
                while worker.is_running():
                    worker.suspend()
                    if f"phase {phase}" in log.read_text().rpartition("phase join")[2]:
                        worker.kill()
                        return True
                    worker.resume()
                    time.sleep(0.01)
    return False


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("phases", "metrics"),
    [(("join", "train", "keys", "shares"), "none"), (("masked", "survivors", "unmask", "evaluate"), "sum")],
    ids=["first", "last"],
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
        silo = silos[project.names[number % 3]]
        wait_for_request(silo, phase, running)
        silo.one("flower-supernode").kill()
        if phase not in ("join", "train"):
            trained = trained or deployment.trained()
    report = running.report()
    assert report["lost"] == []
    assert report["unmeasured"] is None or metrics == "none"
    assert deployment.trained() == trained
    assert running.weights() == undisturbed(project)
    deployment.check_silos()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_worker_and_a_supernode_are_killed_and_missed_when_flower_misses_them(
    deploy: Run, pico_project: Run, undisturbed: Run
) -> None:
    project = pico_project(silos=3, secure=True)
    project.replace(project.plan, 'metrics = "sum"', 'metrics = "none"')
    deployment = deploy(project)
    deployment.start_server()
    deployment.register()
    silos = {name: deployment.start_silo(name) for name in project.names}
    running = deployment.start_run()
    wait_for_request(silos["silo-b"], "masked", running)
    silos["silo-b"].one("flower-supernode").kill()
    trained = deployment.trained()
    wait_for(lambda: killed_in(silos["silo-a"], "masked"), running)
    assert running.report()["lost"] == []
    assert deployment.trained() == trained
    assert running.weights() == undisturbed(project)
    deployment.check_silos()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_worker_fails_before_it_has_its_message(deploy: Run, pico_project: Run, tmp_path: Path) -> None:
    project = pico_project(silos=2)
    deployment = deploy(project)
    stumble = tmp_path / "stumble"
    stumble.touch()
    deployment.change("STUMBLE", str(stumble))
    deployment.start_server()
    deployment.register()
    silo = deployment.start_silo("silo-a")
    deployment.environment.clear()
    deployment.start_silo("silo-b")
    running = deployment.start_run()
    silo.wait_for("restarting the SuperNode", seconds=300)
    assert running.report()["lost"] == []
    assert not stumble.exists()
    deployment.check_silos()


@pytest.mark.timeout(900)
def test_a_serverapp_is_killed_and_a_run_interrupted_and_each_time_it_goes_on(
    deploy: Run, pico_project: Run, undisturbed: Run
) -> None:
    project = pico_project(silos=3, secure=True)
    project.replace(project.plan, 'metrics = "sum"', 'metrics = "none"')
    deployment = deploy(project)
    deployment.hasten()
    server = deployment.start_server()
    deployment.register()
    for name in project.names:
        deployment.start_silo(name)

    def kill() -> None:
        server.one("flwr-serverapp").kill()
        code, error = running.end()
        assert code == 16
        assert f"gramfuse run {project.directory}" in error["message"]
        assert f"--resume {running.out}" in error["message"]

    running = deployment.start_run()
    running.wait_for("to", "silo-a", "keys")
    trained = deployment.trained()
    kill()

    running = deployment.resume()
    running.wait_for("to", "silo-a", "shares")
    running.process.send_signal(signal.SIGINT)
    assert running.end()[0] == 130
    assert f"--resume {running.out}" in running.log.read_text()

    running = deployment.resume()
    running.wait_for("from", "silo-a", "masked")
    kill()

    running = deployment.resume()
    assert running.report()["lost"] == []
    assert deployment.trained() == trained
    assert running.weights() == undisturbed(project)
    deployment.check_silos()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_superlink_is_killed_twice_and_the_run_goes_on(deploy: Run, pico_project: Run, undisturbed: Run) -> None:
    project = pico_project(silos=3, secure=True)
    project.replace(project.plan, 'metrics = "sum"', 'metrics = "none"')
    deployment = deploy(project)
    server = deployment.start_server()
    deployment.register()
    silos = [deployment.start_silo(name) for name in project.names]
    running = deployment.start_run()
    for phase in ("train", "masked"):
        wait_for_line(silos[0].directory / "superexec.log", f"phase {phase}", running)
        server.one("flower-superlink").kill()
    assert running.report()["lost"] == []
    assert server.said.count("  SuperLink ") == 2  # that it ended, and was started again
    assert running.weights() == undisturbed(project)
    deployment.check_silos()
    for name in project.names:
        log = (deployment.state(name).parent / "node" / "superexec.log").read_text()
        assert log.count("train: 1 of ") == 1, name
