"""`gramfuse simulate` as a process: Ctrl-C, and failures that only show while it runs."""

from __future__ import annotations

import json
import os
import re
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from gramfuse_protocol.errors import FederationError
from gramfuse_simulation import simulate
from loopback import BIN

RAYS = re.compile(r"((?:/var)?/tmp/gf-\w{8})(?=/ray/session_)")
"""A private directory of Ray's, in what its processes are started with."""


class Command:
    """A running command whose descendants can be told from all other processes."""

    def __init__(self, *arguments: str, scratch: Path, **environment: str) -> None:
        self.mark = secrets.token_hex(8)
        scratch.mkdir(parents=True)
        self.scratch = scratch
        self.process = subprocess.Popen(
            [str(BIN / "gramfuse"), *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "GRAMFUSE_TEST_MARK": self.mark, "TMPDIR": str(scratch), **environment},
        )

    def descendants(self) -> list[psutil.Process]:
        return [p for p in psutil.process_iter() if self._ours(p) and p.pid != self.process.pid]

    def _ours(self, process: psutil.Process) -> bool:
        try:
            return process.status() != psutil.STATUS_ZOMBIE and process.environ().get("GRAMFUSE_TEST_MARK") == self.mark
        except (psutil.Error, OSError):
            return False

    def finish(self) -> tuple[int, str, str]:
        out, err = self.process.communicate(timeout=250)
        return self.process.returncode, out, err


@pytest.fixture
def command() -> Iterator[Callable[..., Command]]:
    # Ray's sockets need a short path, which pytest's own directories are not.
    with tempfile.TemporaryDirectory(prefix="t-") as directory:
        started = []

        def start(*arguments: str, below: str = "", **environment: str) -> Command:
            scratch = Path(directory) / str(len(started)) / below
            started.append(Command(*arguments, scratch=scratch, **environment))
            return started[-1]

        yield start
        for running in started:
            running.process.kill()
            running.process.communicate()


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGHUP])
def test_an_interrupted_simulation_leaves_nothing(
    stop: signal.Signals, tmp_path: Path, pico_project: Callable[..., Any], command: Callable[..., Command]
) -> None:
    project = pico_project(silos=2)
    out = tmp_path / "run"
    running = command(
        "simulate", str(project.directory), "--set", "training.epochs=100000", "--out", str(out), "--json"
    )
    assert running.process.stderr is not None
    for line in running.process.stderr:
        if "fine-tune" in line:
            break
    assert running.descendants()
    running.process.send_signal(stop)
    code, stdout, _ = running.finish()
    assert code == 130
    assert json.loads(stdout)["error"]["type"] == "Interrupted"
    assert running.descendants() == []
    assert not out.exists()
    assert not out.with_name("run.partial").exists()
    assert list(running.scratch.iterdir()) == []


def test_a_killed_command_takes_its_simulation_with_it(
    tmp_path: Path, pico_project: Callable[..., Any], command: Callable[..., Command]
) -> None:
    project = pico_project(silos=2)
    running = command(
        "simulate", str(project.directory), "--set", "training.epochs=100000", "--out", str(tmp_path / "run")
    )
    assert running.process.stderr is not None
    for line in running.process.stderr:
        if "fine-tune" in line:
            break
    assert running.descendants()
    running.process.kill()
    running.process.wait()
    deadline = time.monotonic() + 60
    while running.descendants():
        assert time.monotonic() < deadline, [process.cmdline() for process in running.descendants()]
        time.sleep(0.5)


def test_training_that_diverges_names_silo_and_tensor_and_fails(
    tmp_path: Path, pico_project: Callable[..., Any], command: Callable[..., Command]
) -> None:
    project = pico_project(silos=2)
    out = tmp_path / "run"
    running = command(
        "simulate", str(project.directory), "--set", "training.learning-rate=1e20", "--out", str(out), "--json"
    )
    code, stdout, stderr = running.finish()
    error = json.loads(stdout)["error"]
    assert code == 13 == error["exit_code"]
    assert error["type"] == "RefusalError"
    assert "silo-" in error["message"]
    assert "NaN" not in error["message"], "what the coordinator reads"
    own = [line for line in stderr.splitlines() if line.startswith("  silo silo-") and "FailureError" in line]
    assert 1 <= len(own) <= 2
    assert all(("tensor 'gram:" in line or "tensor 'delta:" in line) and "NaN" in line for line in own)
    failed = tmp_path / "run.failed"
    assert error["report"] == str(failed / "report.html")
    assert stderr.count(str(failed / "report.html")) == 1
    assert list(tmp_path.glob("run*")) == [failed]
    logs = {path.name: path.read_text() for path in failed.glob("*.log")}
    assert 2 <= len(logs) <= 3
    for name, text in logs.items():
        assert str(failed / name) in error["message"]
        assert (failed / name).stat().st_mode & 0o777 == 0o600
        assert name == "flower.log" or "phase train: FailureError: " in text
    for foreign in ("Traceback", "pid=", "DEBUG", "flwr"):
        assert foreign not in stderr
    assert "flwr" in logs["flower.log"]
    named = {"plan.toml", "report.html", "report.json", "transcript.jsonl"}
    assert {path.name for path in failed.iterdir()} == named | logs.keys()
    report = json.loads((failed / "report.json").read_text())
    assert report["failure"] == {
        "error": "RefusalError",
        "message": error["message"].partition("\nThe log of silo")[0],
        "phase": "train",
        "round": 1,
        "exit_code": 13,
        "resumable": False,
    }
    assert {silo["state"] for silo in report["silos"]} <= {"lost", "joined"}
    assert running.descendants() == []
    assert list(running.scratch.iterdir()) == []


def test_a_simulation_stays_on_this_machine_and_temporary_files_may_have_long_paths(
    tmp_path: Path, pico_project: Callable[..., Any], command: Callable[..., Command]
) -> None:
    project = pico_project(silos=2)
    arguments = ("simulate", str(project.directory), "--out", str(tmp_path / "run"))
    running = command(*arguments, below="x" * 90, RAY_ADDRESS="127.0.0.1:1")  # whatever cluster is named
    assert running.process.stderr is not None
    for line in running.process.stderr:
        if "fine-tune" in line:
            break
    places = {Path(place) for p in running.descendants() for place in RAYS.findall(" ".join(p.cmdline()))}
    assert places
    assert all(place.stat().st_mode & 0o777 == 0o700 for place in places)
    code, _, stderr = running.finish()
    assert code == 0, stderr
    assert (tmp_path / "run" / "report.json").exists()
    assert list(running.scratch.iterdir()) == []
    assert not [place for place in places if place.exists()]


def test_if_no_place_has_a_path_that_is_short_enough_for_ray_one_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = tmp_path / ("x" * 90)
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    assert simulate.socket_directory() == "/tmp"
    monkeypatch.setattr(simulate, "SHORT", ("/nowhere", str(long)))
    with pytest.raises(FederationError, match="TMPDIR") as caught:
        simulate.socket_directory()
    assert str(long) in str(caught.value)


def test_a_simulation_whose_ray_cannot_start_ends_and_says_why(
    tmp_path: Path, pico_project: Callable[..., Any], command: Callable[..., Command]
) -> None:
    project = pico_project(silos=2)
    (tmp_path / "changed").mkdir()
    (tmp_path / "changed" / "sitecustomize.py").write_text(
        """
import sys
if "gramfuse_simulation.engine" in sys.orig_argv:
    import ray
    def init(*_, **__):
        raise OSError("no room for sockets")
    ray.init = init
"""
    )
    path = os.pathsep.join(filter(None, (str(tmp_path / "changed"), os.environ.get("PYTHONPATH"))))
    out = str(tmp_path / "run")
    running = command("simulate", str(project.directory), "--out", out, "--json", PYTHONPATH=path)
    code, stdout, stderr = running.finish()
    error = json.loads(stdout)["error"]
    assert (code, error["type"]) == (16, "FederationError")
    assert "Flower's simulation failed: OSError: no room for sockets" in error["message"]
    log = tmp_path / "run.failed" / "flower.log"
    assert f"Flower's log is {log}" in error["message"]
    assert "Traceback" in log.read_text()
    assert "Traceback" not in stderr
    assert list(tmp_path.glob("run*")) == [log.parent]
    assert running.descendants() == []


@pytest.mark.parametrize("started", [False, True])
def test_ray_that_never_starts_ends_the_simulation_and_ray_that_did_does_not(tmp_path: Path, started: bool) -> None:
    outcome = tmp_path / "outcome.json"
    script = f"""
import sys, time, types
from pathlib import Path
sys.modules["ray"] = types.SimpleNamespace(is_initialized=lambda: {started})
from gramfuse_simulation import engine
engine.RAY_SECONDS = 0.2
engine._end_without_ray(Path({str(outcome)!r}))
time.sleep(2)
"""
    ended = subprocess.run([sys.executable, "-c", script], timeout=60)
    assert ended.returncode == (0 if started else 16)
    assert outcome.exists() != started
    assert started or "Ray did not start" in json.loads(outcome.read_text())["message"]
