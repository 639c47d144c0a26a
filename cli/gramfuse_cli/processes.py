"""Starts a process and, when it is over, ends everything that it started."""

from __future__ import annotations

import os
import secrets
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil

MARK = "GRAMFUSE_PROCESS_MARK"

FLOWER_OFF = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "TOKENIZERS_PARALLELISM": "false",
}
"""Flower and Ray: no telemetry, no update check, nothing installed at run time."""


@contextmanager
def contained(command: Sequence[str], log: Path, environment: Mapping[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    """Run a command with its output in `log`; on leaving, kill it and all its descendants, however they detached.

    Descendants are found by a mark in their environment, which detaching and re-parenting do not take away.
    """
    mark = secrets.token_hex(8)
    with log.open("ab") as output:
        process = subprocess.Popen(  # noqa: S603  # the command is ours
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C reaches us, and we end the rest in order
            env={**os.environ, **FLOWER_OFF, **environment, MARK: mark},
        )
    try:
        yield process
    finally:
        _kill_marked(mark)
        process.wait()


def _kill_marked(mark: str) -> None:
    while marked := [process for process in psutil.process_iter() if _has_mark(process, mark)]:
        for process in marked:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        psutil.wait_procs(marked, timeout=5)


def _has_mark(process: psutil.Process, mark: str) -> bool:
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE and process.environ().get(MARK) == mark)
    except (psutil.Error, OSError):
        return False
