"""Starts processes, and ends them together with everything that they started."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

BIN = Path(sys.executable).parent
"""Directory of Flower's commands: they are installed beside this Python."""

MARK = "GRAMFUSE_PROCESS_MARK"
GRACE_SECONDS = 10.0

CHUNK_BYTES = 5 * 2**20
"""Flower sends an array in chunks of this size, one request each."""

FLOWER_ENVIRONMENT = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE": str(CHUNK_BYTES),
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "TOKENIZERS_PARALLELISM": "false",
}
"""For Flower and Ray: no telemetry, no update check, no installation at run time, and chunks that the proxy accepts."""

MALLOC_SETTINGS = {"MALLOC_ARENA_MAX": "2", "MALLOC_MMAP_THRESHOLD_": "262144", "MALLOC_TRIM_THRESHOLD_": "262144"}
"""For glibc: return the memory of a large message to the system as soon as it is freed."""


@contextmanager
def contained(
    command: Sequence[str], log: Path, environment: Mapping[str, str | None]
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a command with its output in `log`; on exit, kill it and all its descendants, even detached ones.

    Descendants are found by a mark in their environment, which survives detaching and re-parenting.

    Args:
        environment: variables to add to ours; None removes one.
    """
    mark = secrets.token_hex(8)
    variables = {**os.environ, **FLOWER_ENVIRONMENT, **environment, MARK: mark}
    with log.open("ab") as output:
        process = subprocess.Popen(  # noqa: S603  # the command is ours
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # so that only we get Ctrl-C, and end the rest in order
            env={name: value for name, value in variables.items() if value is not None},
        )
    try:
        yield process
    finally:
        kill_marked(mark)
        process.wait()


def end(leaders: Sequence[psutil.Process], mark: str) -> None:
    """Terminate processes in reverse start order, then kill all their remaining descendants.

    All processes together have GRACE_SECONDS to end by themselves.

    Args:
        leaders: session leaders.
        mark: the mark in their environment, which their descendants inherit.
    """
    deadline = time.monotonic() + GRACE_SECONDS
    for process in reversed(leaders):
        with suppress(psutil.Error):
            process.terminate()
            process.wait(max(0.0, deadline - time.monotonic()))
    for process in leaders:
        kill_session(process.pid)
    kill_marked(mark)


def kill_session(leader: int) -> None:
    """Kill what remains of a session leader's process group.

    The mark alone does not find every process: only root can read the environment of one that hides it, as Flower's
    SuperExec does.
    """
    with suppress(ProcessLookupError, PermissionError):  # macOS raises the latter for a group of zombies
        os.killpg(leader, signal.SIGKILL)


def kill_marked(mark: str) -> None:
    """Kill every process with this mark in its environment."""
    while processes := marked(mark):
        for process in processes:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        psutil.wait_procs(processes, timeout=5)


def marked(mark: str) -> list[psutil.Process]:
    """Return the running processes with this mark in their environment, among those whose environment we can read."""
    return [process for process in psutil.process_iter() if _has_mark(process, mark)]


def _has_mark(process: psutil.Process, mark: str) -> bool:
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE and process.environ().get(MARK) == mark)
    except (psutil.Error, OSError):
        return False
