"""Keeps the processes of a deployment running: starts them in order, starts again what ends, and ends all with itself.

Whatever ends the supervisor, its processes end: on the way out it ends them itself, and if it was killed and has no
way out, its watchdog does (`gramfuse_deployment.watchdog`).
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from gramfuse_deployment import terminal
from gramfuse_deployment.processes import FLOWER_OFF, MARK, end, kill_marked, kill_session
from gramfuse_protocol.errors import FederationError, PlanError
from gramfuse_protocol.files import open_private
from gramfuse_protocol.text import QUOTE_LIMIT, one_line

START_SECONDS = 120.0
POLL_SECONDS = 0.2
FIRST_WAIT, LONGEST_WAIT = 1.0, 60.0
STEADY_SECONDS = 120.0
"""A process that ran this long is started again at once when it ends."""
LOG_BYTES = 10 * 2**20
TAIL_BYTES = 65536
LOG_LINES = 15


def say(line: str) -> None:
    """Tell the operator something: one line with the time, on standard error."""
    terminal.say(f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {line}", err=True)


@dataclass(frozen=True)
class Service:
    """A process that is to run all the time.

    Args:
        log: gets its output, added to what is there; its parent is where the process works.
        ready: asked until it is true before the next service starts. Without it the next one starts at once, and if
            this one ends meanwhile that is no error: it is started again.
        advice: from what it wrote last, what its end means and what to do; empty if nothing can be said.
    """

    name: str
    command: Sequence[str]
    log: Path
    environment: Mapping[str, str]
    ready: Callable[[], bool] | None = None
    advice: Callable[[str], str] = lambda output: ""


@dataclass
class _Running:
    service: Service
    process: subprocess.Popen[bytes]
    output: int
    """Where its own output begins in the log."""
    since: float = field(default_factory=time.monotonic)
    wait: float = FIRST_WAIT
    again: float | None = None
    """When it is to be started again; None while it runs."""
    told: str = ""
    """What was said of its end the last time."""

    def written(self) -> str:
        """Return what it wrote last, without colours; nothing if its log was taken away."""
        with suppress(FileNotFoundError), self.service.log.open("rb") as log:
            log.seek(max(self.output, os.fstat(log.fileno()).st_size - TAIL_BYTES))
            return terminal.uncoloured(log.read().decode("utf-8", "replace"))
        return ""

    def shorten(self) -> None:
        """Begin its log anew once it is long, and keep the old one; a SuperLink writes a line for each request."""
        log = self.service.log
        if log.exists() and log.stat().st_size > LOG_BYTES:
            shutil.copyfile(log, log.with_suffix(".log.old"))
            os.truncate(log, 0)  # the process adds to the end, wherever that is
            self.output = 0

    def ending(self) -> str:
        """Return how it ended, and why as far as it said."""
        code = self.process.returncode
        if code < 0:
            return f"was ended by signal {-code}" + (" (somebody's, or for want of memory)" if code == -9 else "")
        return ": ".join(filter(None, [f"ended with status {code}", one_line(reason(self.written()), QUOTE_LIMIT)]))


class Supervisor:
    """Starts services and keeps them running; made by `supervised`.

    Args:
        watchdog: where the watchdog reads.
    """

    def __init__(self, mark: str, watchdog: int) -> None:
        self.mark = mark
        self._watchdog = watchdog
        self._all: list[_Running] = []

    def start(self, service: Service) -> None:
        """Start a service and wait until it is ready.

        Raises:
            FederationError: if it ends, or is not ready after START_SECONDS; with the last lines of its log.
        """
        running = self._launch(service)
        self._all.append(running)
        deadline = time.monotonic() + START_SECONDS
        while service.ready and not service.ready():
            ended = running.process.poll() is not None
            if ended or time.monotonic() > deadline:
                what = running.ending() if ended else f"is not ready after {START_SECONDS:.0f} s"
                lines = "\n".join(running.written().splitlines()[-LOG_LINES:])
                raise FederationError(f"{service.name} {what}; the last lines of {service.log}:\n{lines}")
            time.sleep(0.1)

    def poll(self) -> None:
        """Start again what has ended; to be called a few times a second."""
        for running in self._all:
            now = time.monotonic()
            running.shorten()
            if running.again is None:
                if running.process.poll() is not None:
                    self._ended(running, now)
            elif now >= running.again:
                self._start_again(running, now)

    def works(self, name: str) -> bool:
        """Return whether a worker of a service runs: what a process that the service started has forked."""
        with suppress(psutil.Error):
            started = psutil.Process(self._named(name).process.pid).children()
            return any(worker.status() != psutil.STATUS_ZOMBIE for process in started for worker in process.children())
        return False

    def restart(self, name: str) -> None:
        """Have a service end; `poll` starts it again."""
        self._named(name).process.terminate()

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Keep the services running while something else is done here."""
        over = threading.Event()

        def keep() -> None:
            while not over.wait(POLL_SECONDS):
                self.poll()

        thread = threading.Thread(target=keep, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    def stop(self) -> None:
        """End all services, in the reverse order of their start."""
        leaders = []
        for running in self._all:
            if running.process.poll() is None:
                with suppress(psutil.NoSuchProcess):
                    leaders.append(psutil.Process(running.process.pid))
        end(leaders, self.mark)
        for running in self._all:
            running.process.wait()

    def _named(self, name: str) -> _Running:
        return next(running for running in self._all if running.service.name == name)

    def _launch(self, service: Service) -> _Running:
        with os.fdopen(open_private(service.log, os.O_APPEND), "ab") as output:
            begin = os.fstat(output.fileno()).st_size
            try:
                process = subprocess.Popen(  # noqa: S603  # the command is ours
                    service.command,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    cwd=service.log.parent,
                    env={**os.environ, **FLOWER_OFF, **service.environment, MARK: self.mark},
                    start_new_session=True,  # Ctrl-C reaches us, and we end the rest in order
                    umask=0o077,
                )
            except OSError as error:
                raise FederationError(f"{service.name}: {service.command[0]} cannot be started: {error}") from None
        with suppress(OSError):
            os.write(self._watchdog, b"%d\n" % process.pid)
        return _Running(service, process, begin)

    def _start_again(self, running: _Running, now: float) -> None:
        try:
            again = self._launch(running.service)
        except FederationError as error:  # its program is being replaced, perhaps
            say(str(error))
            running.again = now + LONGEST_WAIT
        else:
            running.process, running.output, running.since, running.again = again.process, again.output, now, None

    def _ended(self, running: _Running, now: float) -> None:
        kill_session(running.process.pid)
        if now - running.since >= STEADY_SECONDS:
            running.wait = FIRST_WAIT
        running.again = now + running.wait
        what = "; ".join(filter(None, [running.ending(), running.service.advice(running.written())]))
        told, running.told = running.told, what
        say(f"{running.service.name} {'ended as before' if what == told else what}; again in {running.wait:.0f} s")
        running.wait = min(2 * running.wait, LONGEST_WAIT)


def reason(output: str) -> str:
    """Return, as one line, what a process said of its own end: from Flower's exit code on, else its last words."""
    lines = [line.strip() for line in output.splitlines()]
    for number, line in enumerate(lines):
        if "Exit Code: " in line:
            until = lines.index("", number) if "" in lines[number:] else len(lines)
            return " ".join([line[line.index("Exit Code: ") :], *lines[number + 1 : until]])
    return " ".join([line for line in lines if line][-2:])


def mark_of(directory: Path) -> str:
    """Return the mark of all processes that the supervisor of a directory starts."""
    return hashlib.sha256(os.fsencode(directory.resolve())).hexdigest()[:16]


@contextmanager
def supervised(directory: Path, ended: Callable[[], None] = lambda: None) -> Iterator[Supervisor]:
    """Make the one supervisor of a directory; on leaving, all that it started is ended.

    What an earlier one left behind, if that one and its watchdog were killed, is ended first.

    Args:
        directory: made if it is not there, for its owner only.
        ended: called when all of it has ended, and nobody else has the directory yet.

    Raises:
        PlanError: if another one has the directory, or it cannot be made.
    """
    mark = mark_of(directory)
    with ExitStack() as stack:
        try:
            for made in reversed([directory, *directory.parents]):
                made.mkdir(mode=0o700, exist_ok=True)
            directory.chmod(0o700)
            lock = stack.enter_context(os.fdopen(open_private(directory / "lock", os.O_APPEND), "ab"))
        except OSError as error:
            raise PlanError(f"{directory}: cannot be used: {error}") from None
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise PlanError(
                f"{directory}: is in use: the same command runs already, or was killed a moment ago and its processes "
                "are still ending. End it first, or give this one a directory of its own"
            ) from None
        kill_marked(mark)
        watchdog = stack.enter_context(
            subprocess.Popen(  # noqa: S603  # the command is ours
                [sys.executable, "-P", "-m", "gramfuse_deployment.watchdog", mark],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                cwd="/",
                start_new_session=True,
                pass_fds=(lock.fileno(),),  # the directory is free again once the watchdog is through
            )
        )
        assert watchdog.stdin is not None  # noqa: S101
        supervisor = Supervisor(mark, watchdog.stdin.fileno())
        stack.callback(ended)
        stack.callback(supervisor.stop)
        yield supervisor
