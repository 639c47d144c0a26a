"""Says what a silo's node does."""

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
"""A SuperLink takes up to 60 s to notice that a node is gone; until then it refuses the same node."""

SENT_SECONDS = 60.0
"""With --once: how long the last answer may take from the ledger to the coordinator, at most."""

FORSAKEN_SECONDS = 90.0
"""Flower notices within 60 s that a worker is gone which had its request, and never that one is gone which had not."""

WORKER_SECONDS = 5.0
"""How often to look whether there is a worker."""

_COMPLAINT = re.compile(r"\d{4}-\d\d-\d\d \S+ (?:WARNING|ERROR) (.*)")
"""What gramfuse_client logs for the silo's operator, in a worker."""

_RUN = re.compile(r"\[RUN (\d+)")
"""A SuperNode logs it before it logs that it receives or sends a message of the run."""

_DROPPED = ("Failed to receive", "Ignoring message")
"""What a SuperNode logs of a request that it will not answer."""


class Watch:
    """Says what a node does: from its logs, its ledger, its progress, and a look at the coordinator's port.

    Args:
        address: the coordinator's.
        directory: where the logs are.
        tls: whether the coordinator is reached by it.
    """

    def __init__(self, silo: Silo, address: str, directory: Path, *, tls: bool) -> None:
        self.silo = silo
        self.address = address
        self.tls = tls
        self.node_log = Growing(directory / "supernode.log")
        self.worker_log = Growing(directory / "superexec.log")  # a SuperExec's output is that of its workers too
        self.ledger = Growing(silo.ledger)
        self.replies = self.refusals = self.bytes = 0
        self._state: Literal["connecting", "connected", "lost"] = "connecting"
        self._known = time.monotonic()  # when the coordinator may last have taken this node for connected
        self._asked = -PROBE_SECONDS
        self._obstacle = ""
        self._progress = dict(self._tenths())
        self._finished: float | None = None
        self._sent = False
        self._failing = False
        self._run = ""  # that the SuperNode's log is about
        self._held: float | None = None  # when a request that is not answered yet came, or was last seen worked on
        self._held_of = ""  # the request's run
        self._looked = 0.0

    @property
    def over(self) -> bool:
        """Whether an exchange is finished, and the last answer had its time to leave."""
        return self._finished is not None and (self._sent or time.monotonic() > self._finished + SENT_SECONDS)

    def look(self) -> None:
        """Say what is new."""
        for plan, progress in self._tenths():
            if progress != self._progress.get(plan):
                self._progress[plan] = progress
                say(f"{progress[0]}: {10 * progress[1]} %")
        for line in self.ledger.lines():
            self._left(line)
        for line in self.worker_log.lines():
            self._worked(line)
        for line in self.node_log.lines():
            self._happened(line)
        if self._state != "connected" and time.monotonic() > self._asked + PROBE_SECONDS:
            self._look_for_obstacles()

    def forsaken(self, works: Callable[[], bool]) -> bool:
        """Return whether a request is here that nothing works on; of each request it is said once.

        Args:
            works: whether there is a worker.
        """
        now = time.monotonic()
        if self._held is not None and now > self._looked + WORKER_SECONDS:
            self._looked = now
            if works():
                self._held = now
        if self._held is None or now <= self._held + FORSAKEN_SECONDS:
            return False
        self._held = None
        return True

    def advice(self, output: str) -> str:
        """Return what it means that the SuperNode ended, and what to do."""
        self._held = None
        if self._state != "connecting":
            self._known = time.monotonic()
        self._state = "connecting"
        if "[code: 2001]" in output:
            return "the coordinator asks for a node key; leave out --insecure-loopback"
        if "[code: 2004]" not in output:
            self._asked, self._obstacle = time.monotonic(), obstacle(self.silo, tls=self.tls)
            return self._obstacle
        if time.monotonic() < self._known + FORGET_SECONDS:
            return (
                "that is normal for a minute after a crash, until the coordinator has noticed it, and until the "
                "coordinator registers the plan's silos (gramfuse server register, or the first run)"
            )
        return (
            "the coordinator does not know this node key, or revoked it: it takes the keys of a plan's roster by "
            "gramfuse server register, or when it first runs that plan. Give it the output of: gramfuse silo keygen "
            f"{self.silo.path}"
        )

    def _look_for_obstacles(self) -> None:
        self._asked = time.monotonic()
        found = obstacle(self.silo, tls=self.tls)
        if found and found != self._obstacle:
            say(found)
        self._obstacle = found

    def _happened(self, line: str) -> None:
        if "SuperNode ID: " in line:
            self._state = "connected"
            say(f"connected to {self.address}")
        elif "Connection attempt failed" in line and self._state == "connected":
            self._state = "lost"
            say(f"the connection to {self.address} is lost; it is tried again without end")
        elif "Connection successful" in line and self._state == "lost":
            self._state = "connected"
            say(f"connected to {self.address} again")
        elif found := _RUN.search(line):
            self._run = found[1]
        elif "Receiving: " in line:
            self._held, self._held_of = time.monotonic(), self._run
        elif ("Sending: " in line and self._run == self._held_of) or any(words in line for words in _DROPPED):
            self._held = None
        elif "Sent successfully" in line and self._finished is not None:
            self._sent = True

    def _worked(self, line: str) -> None:
        if said := _COMPLAINT.match(line):
            say(said[1])
        elif line.startswith("Traceback "):
            self._failing = True
        elif self._failing and not line.startswith(" "):
            self._failing = False
            say(f"a worker failed: {line}; the rest is in {self.worker_log.path}")

    def _left(self, text: str) -> None:
        from gramfuse_client.guard.ledger_lines import Line

        try:
            entry = Line.model_validate_json(text).entry
        except ValidationError:
            say(f"{self.ledger.path}: a line cannot be read; look at it with: gramfuse silo ledger verify")
            return
        self.bytes += entry.bytes
        if entry.kind == "reply":
            self.replies += 1
            say(f"{entry.phase}: {entry.bytes:,} bytes left ({entry.form})")
            if entry.phase == "finish":
                self._finished = time.monotonic()
        else:
            self.refusals += 1
            say(f"{entry.phase}: refused: {entry.note}")

    def _tenths(self) -> Iterator[tuple[str, tuple[str, int]]]:
        """Yield what the silo does for each plan, and how many tenths of it are done."""
        from gramfuse_client.state.state import read_progress

        for path in self.silo.state.glob("*/progress.json"):
            progress = read_progress(self.silo.state, path.parent.name)
            if progress is not None:
                yield path.parent.name, (progress["phase"], 10 * progress["done"] // progress["total"])
