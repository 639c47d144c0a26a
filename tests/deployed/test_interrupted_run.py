"""Ctrl-C on `gramfuse run`: the run is stopped at the SuperLink too, and nothing half-written stays."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from loopback import BIN, CONNECTION, deployment


@pytest.mark.timeout(500)
def test_an_interrupted_run_is_stopped_at_the_superlink(tmp_path: Path, pico_project: Callable[..., Any]) -> None:
    project = pico_project(silos=2)
    project.replace(project.plan, "epochs = 2", "epochs = 100000")
    locked = subprocess.run(
        [str(BIN / "gramfuse"), "plan", "lock", str(project.directory), "--json"], stdout=subprocess.PIPE, check=True
    )
    digest = json.loads(locked.stdout)["plan_digest"]
    for name in project.names:
        project.replace(project.silo(name), "approved = []", f'approved = ["{digest}"]')
    out = tmp_path / "run"
    with deployment(tmp_path / "deployment", [project.silo(name) for name in project.names]) as home:
        environment = {**os.environ, "FLWR_HOME": str(home)}
        running = subprocess.Popen(
            [str(BIN / "gramfuse"), "run", str(project.directory), CONNECTION, "--out", str(out), "--json"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        try:
            assert running.stderr is not None
            for line in running.stderr:
                if "fine-tune" in line:
                    break
            assert out.with_name("run.partial").is_dir()
            running.send_signal(signal.SIGINT)
            stdout, _ = running.communicate(timeout=200)
        finally:
            running.kill()
        assert running.returncode == 130
        assert json.loads(stdout)["error"]["type"] == "Interrupted"
        listed = subprocess.run(
            [str(BIN / "flwr"), "list", CONNECTION, "--format", "json"],
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            check=True,
        )
        runs = json.loads(listed.stdout[listed.stdout.index("{") :])["runs"]
        assert [run["status"] for run in runs] == ["finished:stopped"]
        time.sleep(3)  # long enough for a ServerApp that was not stopped to write its transcript again
        assert list(tmp_path.glob("run*")) == []
