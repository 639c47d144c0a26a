"""`gramfuse simulate` as a process: Ctrl-C, and failures that only show while it runs."""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from loopback import BIN


class Command:
    """A running command whose descendants can be told from all other processes."""

    def __init__(self, *arguments: str, scratch: Path) -> None:
        self.mark = secrets.token_hex(8)
        scratch.mkdir()
        self.scratch = scratch
        self.process = subprocess.Popen(
            [str(BIN / "gramfuse"), *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "GRAMFUSE_TEST_MARK": self.mark, "TMPDIR": str(scratch)},
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

        def start(*arguments: str) -> Command:
            started.append(Command(*arguments, scratch=Path(directory) / str(len(started))))
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
    assert stderr.splitlines().count(f"report of the failed run: {failed / 'report.html'}") == 1
    assert list(tmp_path.glob("run*")) == [failed]
    assert {path.name for path in failed.iterdir()} == {"plan.toml", "report.html", "report.json", "transcript.jsonl"}
    report = json.loads((failed / "report.json").read_text())
    assert report["failure"] == {
        "error": "RefusalError",
        "message": error["message"],
        "phase": "train",
        "round": 1,
        "exit_code": 13,
        "resumable": False,
    }
    assert {silo["state"] for silo in report["silos"]} <= {"lost", "joined"}
    assert running.descendants() == []
    assert list(running.scratch.iterdir()) == []
