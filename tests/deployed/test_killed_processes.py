"""kill -9 in the middle of a secure run: a SuperNode is left out, a ServerApp is resumed. Five real SuperNodes."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from safetensors.numpy import load_file

from gramfuse_client.state.state import State
from gramfuse_model.loading.base_model import load_base
from gramfuse_protocol.contract.layout import Layout
from gramfuse_protocol.contract.plan import Plan
from gramfuse_server.merging.accumulator import Accumulator
from loopback import BIN, CONNECTION, deployment

LOST, LEFT = "silo-e", ("silo-a", "silo-b", "silo-c", "silo-d")


def gramfuse(*arguments: str, environment: dict[str, str] | None = None) -> dict[str, Any]:
    """Run the command as a user does and return its JSON."""
    command = [str(BIN / "gramfuse"), *arguments, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **(environment or {})})
    assert done.returncode == 0, done.stderr + done.stdout
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def agree(project: Any) -> str:
    """Lock the plan and have every silo approve it. Returns the plan's digest."""
    digest: str = gramfuse("plan", "lock", str(project.directory))["plan_digest"]
    for name in project.names:
        project.replace(project.silo(name), "approved = []", f'approved = ["{digest}"]')
    return digest


def wait_for(what: Callable[[], object], running: subprocess.Popen[bytes], log: Path) -> None:
    """Wait until something is true, as long as the command runs; pytest's own limit is the limit."""
    while not what():
        assert running.poll() is None, log.read_text()
        time.sleep(0.05)


def messages(run: Path) -> list[tuple[str, str, str]]:
    """(direction, silo, phase) of everything that the coordinator's transcript holds so far."""
    try:
        lines = (run / "transcript.jsonl").read_text().splitlines()
    except FileNotFoundError:
        return []
    found = []
    for line in lines:
        entry = json.loads(line)
        direction = "to" if "to" in entry else "from"
        found.append((direction, entry[direction], entry["phase"]))
    return found


def kill(command: str, argument: str, home: Path) -> None:
    """kill -9 the process of one of Flower's commands, under this FLWR_HOME, that has the argument."""
    for process in psutil.process_iter():
        try:
            line = process.cmdline()
            ours = process.environ().get("FLWR_HOME") == str(home)
        except psutil.Error:
            continue
        if ours and any(command in part for part in line[:2]) and any(argument in part for part in line):
            process.kill()
            return
    raise AssertionError(f"no {command}")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_killed_silo_is_left_out_and_a_killed_coordinator_goes_on(
    tmp_path: Path, pico_project: Callable[..., Any]
) -> None:
    project = pico_project(silos=5, secure=True)
    project.replace(project.plan, 'metrics = "sum"', 'metrics = "none"')
    digest = agree(project)
    out, partial = tmp_path / "run", tmp_path / "run.partial"
    arguments = ("run", str(project.directory), CONNECTION)
    log = tmp_path / "run.log"
    with deployment(tmp_path / "deployment", [project.silo(name) for name in project.names]) as home:
        environment = {"FLWR_HOME": str(home)}
        with log.open("wb") as output:
            running = subprocess.Popen(
                [str(BIN / "gramfuse"), *arguments, "--out", str(out)],
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **environment},
            )
        try:
            wait_for(lambda: ("from", LOST, "shares") in messages(partial), running, log)
            kill("flower-supernode", f"{LOST}.toml", home)
            wait_for(lambda: ("to", LEFT[0], "survivors") in messages(partial), running, log)
            kill("flwr-serverapp", "", home)
        finally:
            running.kill()
            running.wait()
        before = messages(partial)
        assert ("from", LOST, "masked") not in before
        trained = {name: statistics(project, name, digest).stat().st_mtime_ns for name in LEFT}

        report = gramfuse(*arguments, "--resume", str(out), environment=environment)

    assert [silo["name"] for silo in report["silos"]] == list(LEFT)
    again = messages(out)[len(before) :]
    assert {phase for _, _, phase in again} == {"join", "survivors", "unmask"}
    assert {name: statistics(project, name, digest).stat().st_mtime_ns for name in LEFT} == trained

    # The model is the open merge of the four.
    plan, layout = Plan.read(project.plan), Layout.read(project.directory / "layout.json")
    accumulator = Accumulator(layout, alpha=plan.merge.alpha, weighting=plan.merge.weighting)
    for name in LEFT:
        accumulator.fold(State(project.directory / "state" / name, digest).contribution(), name)
    base = {name: p.detach().numpy() for name, p in load_base(plan, project.directory).model.named_parameters()}
    merged = load_file(out / "model" / "model.safetensors")
    for name, delta in accumulator.merge().deltas.items():
        expected = base[name] + delta
        assert np.linalg.norm(merged[name] - expected) <= 1e-6 * np.linalg.norm(expected), name

    # Nothing that could open a mask is left at the survivors, and nothing of this run is left over.
    for name in LEFT:
        (session,) = (project.directory / "state" / name / digest / "sessions").iterdir()
        assert [path.name for path in session.iterdir()] == ["session.json"]
        assert json.loads((session / "session.json").read_text())["member"] is None
    assert {path.name for path in out.iterdir()} == {
        "SHA256SUMS", "layout.json", "model", "plan.toml", "report.html", "report.json", "transcript.jsonl",
    }  # fmt: skip


def statistics(project: Any, name: str, digest: str) -> Path:
    """Where a silo keeps its statistics."""
    path: Path = project.directory / "state" / name / digest / "statistics.safetensors"
    return path
