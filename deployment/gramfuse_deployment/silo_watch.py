"""Reports what a silo's node does."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import ValidationError

from gramfuse_client.dry_run.of_coordinator import obstacle
from gramfuse_deployment.supervisor import say
from gramfuse_deployment.tail import Growing

if TYPE_CHECKING:
    from gramfuse_client.silo_file import Silo

PROBE_SECONDS = 30.0

FORGET_SECONDS = 90.0
"""A SuperLink takes up to 60 s to notice that a node died, and refuses the same node until then."""

SENT_SECONDS = 60.0
"""With --once: how long to wait for the last reply to reach the coordinator, once it is in the ledger."""

STALLED_SECONDS = 90.0
"""Flower notices within 60 s that a worker died, but only if it had already fetched its request."""

WORKER_SECONDS = 5.0
"""How often to check for a worker."""

_COMPLAINT = re.compile(r"\d{4}-\d\d-\d\d \S+ (?:WARNING|ERROR) (.*)")
"""A warning or error that gramfuse_client logs in a worker, for the silo's operator."""

_RUN = re.compile(r"\[RUN (\d+)")
"""A SuperNode logs this before it logs that it receives or sends a message of the run."""

_DROPPED = ("Failed to receive", "Ignoring message")
"""A SuperNode logs these for a request that it will not answer."""


class Watch:
    """Reports what a node does, from its logs, its ledger, its progress, and probes of the coordinator's port.

    Args:
        address: `host:port` of the coordinator.
        directory: holds the logs.
        tls: whether the coordinator uses TLS.
    """

    def __init__(self, silo: Silo, address: str, directory: Path, *, tls: bool) -> None:
        self.silo = silo
        self.address = address
        self.tls = tls
        self.node_log = Growing(directory / "supernode.log")
        self.worker_log = Growing(directory / "superexec.log")  # includes the output of the SuperExec's workers
        self.ledger = Growing(silo.ledger)
        self.replies = self.refusals = self.bytes = 0
        self._state: Literal["connecting", "connected", "lost"] = "connecting"
        self._last_connected = time.monotonic()  # when the coordinator may last have seen this node as connected
        self._probed = -PROBE_SECONDS
        self._obstacle = ""
        self._progress = dict(self._progress_in_tenths())
        self._finished: float | None = None
        self._sent = False
        self._failing = False
        self._run = ""  # the run that the SuperNode's log last named
        self._pending: float | None = None  # when an unanswered request came in, or last had a live worker
        self._pending_run = ""
        self._checked = 0.0

    @property
    def over(self) -> bool:
        """Whether an exchange is finished, and its last reply was sent or had SENT_SECONDS to be."""
        return self._finished is not None and (self._sent or time.monotonic() > self._finished + SENT_SECONDS)

    def look(self) -> None:
        """Print what is new."""
        for plan, progress in self._progress_in_tenths():
            if progress != self._progress.get(plan):
                self._progress[plan] = progress
                say(f"{progress[0]}: {10 * progress[1]} %")
        for line in self.ledger.lines():
            self._report_ledger_line(line)
        for line in self.worker_log.lines():
            self._report_worker_line(line)
        for line in self.node_log.lines():
            self._report_node_line(line)
        if self._state != "connected" and time.monotonic() > self._probed + PROBE_SECONDS:
            self._probe_coordinator()

    def request_stalled(self, has_worker: Callable[[], bool]) -> bool:
        """Return whether a request waits here without a worker; true only once for each request.

        Args:
            has_worker: whether there is a live worker.
        """
        now = time.monotonic()
        if self._pending is not None and now > self._checked + WORKER_SECONDS:
            self._checked = now
            if has_worker():
                self._pending = now
        if self._pending is None or now <= self._pending + STALLED_SECONDS:
            return False
        self._pending = None
        return True

    def advice(self, output: str) -> str:
        """Return why the SuperNode ended, and what to do."""
        self._pending = None
        if self._state != "connecting":
            self._last_connected = time.monotonic()
        self._state = "connecting"
        if "[code: 2001]" in output:
            return "the coordinator requires a node key; leave out --insecure-loopback"
        if "[code: 2004]" not in output:
            self._probed, self._obstacle = time.monotonic(), obstacle(self.silo, tls=self.tls)
            return self._obstacle
        if time.monotonic() < self._last_connected + FORGET_SECONDS:
            return (
                "this is normal for a minute after a crash, until the coordinator notices it, and until the "
                "coordinator registers the plan's silos (gramfuse server register, or the first run)"
            )
        return (
            "the coordinator does not know this node key, or has revoked it: it registers the keys of a plan's roster "
            "with gramfuse server register, or when it first runs the plan. Give it the output of: gramfuse silo "
            f"keygen {self.silo.path}"
        )

    def _probe_coordinator(self) -> None:
        self._probed = time.monotonic()
        problem = obstacle(self.silo, tls=self.tls)
        if problem and problem != self._obstacle:
            say(problem)
        self._obstacle = problem

    def _report_node_line(self, line: str) -> None:
        if "SuperNode ID: " in line:
            self._state = "connected"
            say(f"connected to {self.address}")
        elif "Connection attempt failed" in line and self._state == "connected":
            self._state = "lost"
            say(f"lost the connection to {self.address}; retrying until it is back")
        elif "Connection successful" in line and self._state == "lost":
            self._state = "connected"
            say(f"connected to {self.address} again")
        elif match := _RUN.search(line):
            self._run = match[1]
        elif "Receiving: " in line:
            self._pending, self._pending_run = time.monotonic(), self._run
        elif ("Sending: " in line and self._run == self._pending_run) or any(words in line for words in _DROPPED):
            self._pending = None
        elif "Sent successfully" in line and self._finished is not None:
            self._sent = True

    def _report_worker_line(self, line: str) -> None:
        if match := _COMPLAINT.match(line):
            say(match[1])
        elif line.startswith("Traceback "):
            self._failing = True
        elif self._failing and not line.startswith(" "):
            self._failing = False
            say(f"a worker failed: {line}; the rest is in {self.worker_log.path}")

    def _report_ledger_line(self, text: str) -> None:
        from gramfuse_client.guard.ledger_lines import Line

        try:
            entry = Line.model_validate_json(text).entry
        except ValidationError:
            say(f"{self.ledger.path}: cannot read a line; check the ledger with: gramfuse silo ledger verify")
            return
        self.bytes += entry.bytes
        if entry.kind == "reply":
            self.replies += 1
            say(f"sent {entry.phase}: {entry.bytes:,} bytes, {entry.form}")
            if entry.phase == "finish":
                self._finished = time.monotonic()
        else:
            self.refusals += 1
            say(f"refused {entry.phase}: {entry.note}")

    def _progress_in_tenths(self) -> Iterator[tuple[str, tuple[str, int]]]:
        """Yield (plan digest, (phase, tenths done)) for each plan."""
        from gramfuse_client.state.state import read_progress

        for path in self.silo.state.glob("*/progress.json"):
            progress = read_progress(self.silo.state, path.parent.name)
            if progress is not None:
                yield path.parent.name, (progress["phase"], 10 * progress["done"] // progress["total"])
