"""The `gramfuse` command of this Python environment."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any


def gramfuse() -> str:
    """Return its path."""
    return str(Path(sys.executable).with_name("gramfuse"))


def simulate(project: Path, *options: str) -> dict[str, Any]:
    """Run `gramfuse simulate` with the output directory `run` in the project, and return its report."""
    command = [gramfuse(), "simulate", str(project), "--out", str(project / "run"), "--json", *options]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} exited with {done.returncode}: {done.stdout}")
    report: dict[str, Any] = json.loads(done.stdout)
    return report
