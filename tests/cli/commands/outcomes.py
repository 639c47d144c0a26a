"""What a command left, and how its failures are checked."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

GRAMFUSE = str(Path(sys.executable).with_name("gramfuse"))


@dataclass(frozen=True)
class Outcome:
    """What a command left: its exit code and what it printed."""

    code: int
    stdout: str
    stderr: str

    @property
    def object(self) -> dict[str, Any]:
        """The one JSON object that standard output must be, whole."""
        value = json.loads(self.stdout)
        assert isinstance(value, dict)
        return value


def process(command: list[str], *arguments: str | Path) -> Outcome:
    """Run a command as a process of its own."""
    done = subprocess.run(
        [*command, *map(str, arguments)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    return Outcome(done.returncode, done.stdout, done.stderr)


def tree(directory: Path) -> dict[str, bytes | None]:
    """Everything below a directory: the bytes of each file, None for a directory."""
    return {
        str(path.relative_to(directory)): path.read_bytes() if path.is_file() else None
        for path in sorted(directory.rglob("*"))
    }


def check_failure(outcome: Outcome, kind: str, code: int, quoted: list[str]) -> None:
    """Check a failure under --json: the code, the only object on standard output, and the text for people."""
    assert outcome.code == code, outcome.stderr
    assert outcome.object.keys() == {"error"}
    error = outcome.object["error"]
    assert error.keys() == {"type", "message", "exit_code"}
    assert (error["type"], error["exit_code"]) == (kind, code)
    for words in quoted:
        assert words in error["message"]
        assert words in outcome.stderr
    assert "Traceback" not in outcome.stderr
