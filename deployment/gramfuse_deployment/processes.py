"""How processes are started here, and how they end with everything that they started."""

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
"""Where Flower's commands are installed, beside this Python."""

MARK = "GRAMFUSE_PROCESS_MARK"
GRACE_SECONDS = 10.0

CHUNK_BYTES = 5 * 2**20
"""Flower sends an array in chunks of this size, each as one request."""

FLOWER_OFF = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE": str(CHUNK_BYTES),
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "TOKENIZERS_PARALLELISM": "false",
}
"""Flower and Ray: no telemetry, no update check, nothing installed at run time, and chunks that the proxy lets pass."""

GIVE_BACK = {"MALLOC_ARENA_MAX": "2", "MALLOC_MMAP_THRESHOLD_": "262144", "MALLOC_TRIM_THRESHOLD_": "262144"}
"""glibc: the memory of a large message goes back to the system once the message is gone."""


@contextmanager
def contained(
    command: Sequence[str], log: Path, environment: Mapping[str, str | None]
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a command with its output in `log`; on leaving, kill it and all its descendants, however they detached.

    Descendants are found by a mark in their environment, which detaching and re-parenting do not take away.

    Args:
        environment: what is added to ours, and by None what is taken away.
    """
    mark = secrets.token_hex(8)
    ours = {**os.environ, **FLOWER_OFF, **environment, MARK: mark}
    with log.open("ab") as output:
        process = subprocess.Popen(  # noqa: S603  # the command is ours
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C reaches us, and we end the rest in order
            env={name: value for name, value in ours.items() if value is not None},
        )
    try:
        yield process
    finally:
        kill_marked(mark)
        process.wait()


def end(leaders: Sequence[psutil.Process], mark: str) -> None:
    """End processes in the reverse order of their start, then kill whatever they started that is still there.

    All of them together have GRACE_SECONDS to end by themselves.

    Args:
        leaders: each the first process of a session of its own.
        mark: in the environment of all of them; what they started inherits it.
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
    """Kill what is left of a session's process group.

    The mark alone does not find all of it: a process that hides its environment, as Flower's SuperExec does, can be
    read by root only.
    """
    with suppress(ProcessLookupError, PermissionError):  # macOS says the latter of a group of zombies
        os.killpg(leader, signal.SIGKILL)


def kill_marked(mark: str) -> None:
    """Kill every process with this mark in its environment."""
    while found := marked(mark):
        for process in found:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        psutil.wait_procs(found, timeout=5)


def marked(mark: str) -> list[psutil.Process]:
    """Return the processes that run with this mark in their environment, as far as we may read it."""
    return [process for process in psutil.process_iter() if _has_mark(process, mark)]


def _has_mark(process: psutil.Process, mark: str) -> bool:
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE and process.environ().get(MARK) == mark)
    except (psutil.Error, OSError):
        return False
