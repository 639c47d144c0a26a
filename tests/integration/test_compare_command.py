"""`gramfuse simulate --compare` at the command line, with Flower's own engine."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

from click.testing import CliRunner

from gramfuse_cli.main import cli
from gramfuse_protocol.errors import PlanError
from loopback import BIN


def test_a_secure_project_is_compared_in_open_mode_only(tmp_path: Path, pico_project: Callable[..., Any]) -> None:
    project = pico_project(silos=4, examples=12, secure=True)
    simulate = ["simulate", str(project.directory), "--out", str(tmp_path / "run"), "--compare", "simple,best,fedavg:1"]
    refused = CliRunner().invoke(cli, simulate)
    assert isinstance(refused.exception, PlanError)
    assert str(refused.exception).startswith("--compare best,fedavg:1: needs each silo's own model or data")
    assert "--open" in str(refused.exception)
    assert not (tmp_path / "run").exists()

    done = subprocess.run(
        [BIN / "gramfuse", *simulate, "--open", "--json"], capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["mode"] == "open"
    assert [model["kind"] for model in report["models"]] == [*["silo"] * 4, "simple", "regmean", "best", "fedavg"]
    assert report["models"][-1]["metrics"] == report["models"][4]["metrics"]
    for shown in ("  best         …", "  fedavg, round 1 of 1 measured", "  fedavg (1 round) measured"):
        assert shown in done.stderr
    assert "open-uploads = false" in project.silo("silo-a").read_text()
