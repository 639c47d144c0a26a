"""From certificates to a merged model, by the commands that the coordinator's and the silos' operators type."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gramfuse_client.guard.ledger import Ledger
from gramfuse_client.silo_file import Silo
from gramfuse_deployment.processes import BIN

Run = Callable[..., Any]


@pytest.mark.timeout(900)
def test_silos_and_a_coordinator_merge(deploy: Run, pico_project: Run) -> None:
    project = pico_project(silos=2)
    project.replace(project.plan, 'metrics = "silo"', 'metrics = "none"')
    deployment = deploy(project)
    server = deployment.start_server()
    silos = {name: deployment.start_silo(name, "--once", connected=False) for name in project.names}
    report = deployment.run()
    assert [silo["name"] for silo in report["silos"]] == list(project.names)
    for name, silo in silos.items():
        # Each ended by itself, after its last answer, and said what its ledger says.
        assert silo.process.wait(60) == 0, silo.said
        assert not silo.processes()
        file = Silo.read(project.silo(name))
        entries = [line.entry for line in Ledger(file.ledger, name).lines()]
        assert [entry.phase for entry in entries][-1] == "finish"
        for entry in entries:
            assert f"sent {entry.phase}: {entry.bytes:,} bytes, {entry.form}" in silo.said
        assert silo.said.splitlines()[-1].endswith(f"{name}: ended")
    assert server.process.poll() is None


@pytest.mark.timeout(900)
def test_a_head_is_fitted_before_training_and_after_the_merge(deploy: Run, pico_project: Run, loud_bert: Path) -> None:
    project = pico_project(silos=3, base=loud_bert, secure=True)
    plan = project.plan.read_text()
    project.plan.write_text(
        plan.replace('head = "same"', 'head = "fitted"')
        .replace("[merge]", "[merge]\nrefit = true")
        .replace("learning-rate = 2e-3", "learning-rate = 1e-3")
        .replace('metrics = "sum"', 'metrics = "none"')
    )
    deployment = deploy(project)
    deployment.start_server()
    silos = {name: deployment.start_silo(name, "--once", connected=False) for name in project.names}
    report = deployment.run()
    assert [one["work"] for one in report["rounds"]] == ["fit", "train", "refit"]
    assert (report["mode"], report["unfitted"], report["lost"]) == ("secure", None, [])
    for name, silo in silos.items():
        assert silo.process.wait(60) == 0, silo.said
        phases = [line.entry.phase for line in Ledger(Silo.read(project.silo(name)).ledger, name).lines()]
        assert phases.count("masked") == 3
        assert phases[-1] == "finish"
    deployment.check_silos()


@pytest.mark.timeout(900)
def test_a_run_survives_that_all_of_the_coordinators_processes_but_the_serverapp_are_killed(
    deploy: Run, pico_project: Run, tmp_path: Path
) -> None:
    project = pico_project(silos=2)
    project.replace(project.plan, 'metrics = "silo"', 'metrics = "none"')
    deployment = deploy(project)
    server = deployment.start_server()
    deployment.register()
    silos = [deployment.start_silo(name) for name in project.names]
    out = tmp_path / "run"
    command = [str(BIN / "gramfuse"), "run", str(project.directory), str(deployment.coordinator), "--out", str(out)]
    with subprocess.Popen([*command, "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as running:
        try:
            silos[0].wait_for("join: ")
            server.one("flower-superlink").kill()
            server.one("nginx: master").kill()
            stdout, stderr = running.communicate(timeout=600)
        finally:
            running.kill()
    assert running.returncode == 0, stderr + server.said + silos[0].said
    assert json.loads(stdout)["run"] == str(out)
    # Nothing was shown twice, although Flower's log was read again from its beginning.
    assert stderr.count("silos join\n") == 1
