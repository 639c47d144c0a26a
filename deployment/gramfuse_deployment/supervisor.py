"""Keeps the processes of a deployment running: starts them in order, restarts them, and ends them when it ends.

However the supervisor ends, its processes end too: it ends them itself on exit, and if it is killed, its watchdog does
(`gramfuse_deployment.watchdog`).
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
from gramfuse_deployment.processes import FLOWER_ENVIRONMENT, MARK, end, kill_marked, kill_session
from gramfuse_protocol.errors import FederationError, PlanError
from gramfuse_protocol.files import open_private
from gramfuse_protocol.text import QUOTE_LIMIT, one_line

START_SECONDS = 120.0
POLL_SECONDS = 0.2
FIRST_WAIT, LONGEST_WAIT = 1.0, 60.0
STEADY_SECONDS = 120.0
"""After running this long, a process that ends is restarted after FIRST_WAIT again."""
LOG_BYTES = 10 * 2**20
TAIL_BYTES = 65536
LOG_LINES = 15


def say(line: str) -> None:
    """Print one line for the operator on standard error, with the time."""
    terminal.say(f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {line}", err=True)


@dataclass(frozen=True)
class Service:
    """A process to keep running.

    Args:
        log: file that the output is appended to; its directory is the process's working directory.
        ready: polled until it returns true, before the next service starts. Without it, the next service starts at
            once, and if this process ends early, it is restarted without an error.
        advice: maps the process's last output to an explanation of why it ended and what to do; empty if unknown.
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
    """Offset in the log at which this process's output begins."""
    since: float = field(default_factory=time.monotonic)
    wait: float = FIRST_WAIT
    restart_at: float | None = None
    """When to restart it; None while it runs."""
    last_ending: str = ""
    """The message printed when it last ended."""

    def last_output(self) -> str:
        """Return the last output, without colours; empty if the log was removed."""
        with suppress(FileNotFoundError), self.service.log.open("rb") as log:
            log.seek(max(self.output, os.fstat(log.fileno()).st_size - TAIL_BYTES))
            return terminal.uncoloured(log.read().decode("utf-8", "replace"))
        return ""

    def rotate_log(self) -> None:
        """Rotate a log of more than LOG_BYTES; a SuperLink logs every request."""
        log = self.service.log
        if log.exists() and log.stat().st_size > LOG_BYTES:
            shutil.copyfile(log, log.with_suffix(".log.old"))
            os.truncate(log, 0)  # the process has it open for appending
            self.output = 0

    def ending(self) -> str:
        """Return how the process ended, and the reason if its output gives one."""
        code = self.process.returncode
        if code < 0:
            return f"was killed by signal {-code}" + (" (by someone, or out of memory)" if code == -9 else "")
        return ": ".join(filter(None, [f"ended with status {code}", one_line(reason(self.last_output()), QUOTE_LIMIT)]))


class Supervisor:
    """Starts services and keeps them running; made by `supervised`.

    Args:
        mark: environment mark of all processes that it starts.
        watchdog: file descriptor of the pipe to the watchdog.
    """

    def __init__(self, mark: str, watchdog: int) -> None:
        self.mark = mark
        self._watchdog = watchdog
        self._all: list[_Running] = []

    def start(self, service: Service) -> None:
        """Start a service and wait until it is ready.

        Raises:
            FederationError: if it ends, or is not ready after START_SECONDS; quotes the last lines of its log.
        """
        running = self._launch(service)
        self._all.append(running)
        deadline = time.monotonic() + START_SECONDS
        while service.ready and not service.ready():
            ended = running.process.poll() is not None
            if ended or time.monotonic() > deadline:
                problem = running.ending() if ended else f"is not ready after {START_SECONDS:.0f} s"
                lines = "\n".join(running.last_output().splitlines()[-LOG_LINES:])
                raise FederationError(f"{service.name} {problem}; the last lines of {service.log}:\n{lines}")
            time.sleep(0.1)

    def poll(self) -> None:
        """Restart services that have ended. Call this a few times a second."""
        for running in self._all:
            now = time.monotonic()
            running.rotate_log()
            if running.restart_at is None:
                if running.process.poll() is not None:
                    self._schedule_restart(running, now)
            elif now >= running.restart_at:
                self._restart(running, now)

    def has_worker(self, name: str) -> bool:
        """Return whether a service has a live worker: a grandchild, forked by a process that the service started."""
        with suppress(psutil.Error):
            started = psutil.Process(self._named(name).process.pid).children()
            return any(worker.status() != psutil.STATUS_ZOMBIE for process in started for worker in process.children())
        return False

    def restart(self, name: str) -> None:
        """Terminate a service; `poll` starts it again."""
        self._named(name).process.terminate()

    @contextmanager
    def polling(self) -> Iterator[None]:
        """Poll in a background thread."""
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
        """End all services, in reverse start order."""
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
                    env={**os.environ, **FLOWER_ENVIRONMENT, **service.environment, MARK: self.mark},
                    start_new_session=True,  # so that only we get Ctrl-C, and end the rest in order
                    umask=0o077,
                )
            except OSError as error:
                raise FederationError(f"{service.name}: {service.command[0]} cannot be started: {error}") from None
        with suppress(OSError):
            os.write(self._watchdog, b"%d\n" % process.pid)
        return _Running(service, process, begin)

    def _restart(self, running: _Running, now: float) -> None:
        try:
            new = self._launch(running.service)
        except FederationError as error:  # perhaps its program is being replaced
            say(str(error))
            running.restart_at = now + LONGEST_WAIT
        else:
            running.process, running.output, running.since, running.restart_at = new.process, new.output, now, None

    def _schedule_restart(self, running: _Running, now: float) -> None:
        kill_session(running.process.pid)
        if now - running.since >= STEADY_SECONDS:
            running.wait = FIRST_WAIT
        running.restart_at = now + running.wait
        ending = "; ".join(filter(None, [running.ending(), running.service.advice(running.last_output())]))
        last, running.last_ending = running.last_ending, ending
        shown = "ended as before" if ending == last else ending
        say(f"{running.service.name} {shown}; restarting in {running.wait:.0f} s")
        running.wait = min(2 * running.wait, LONGEST_WAIT)


def reason(output: str) -> str:
    """Return the reason for a process's end from its output, as one line: Flower's exit code, or the last two lines."""
    lines = [line.strip() for line in output.splitlines()]
    for number, line in enumerate(lines):
        if "Exit Code: " in line:
            until = lines.index("", number) if "" in lines[number:] else len(lines)
            return " ".join([line[line.index("Exit Code: ") :], *lines[number + 1 : until]])
    return " ".join([line for line in lines if line][-2:])


def mark_of(directory: Path) -> str:
    """Return the environment mark of all processes that the supervisor of a directory starts."""
    return hashlib.sha256(os.fsencode(directory.resolve())).hexdigest()[:16]


@contextmanager
def supervised(directory: Path, ended: Callable[[], None] = lambda: None) -> Iterator[Supervisor]:
    """Make the only supervisor of a directory; end all its processes on exit.

    First, end any processes that an earlier supervisor left behind because it and its watchdog were killed.

    Args:
        directory: made with mode 0700 if it does not exist.
        ended: called once all processes have ended, while the directory is still locked.

    Raises:
        PlanError: if another supervisor uses the directory, or it cannot be made.
    """
    mark = mark_of(directory)
    with ExitStack() as stack:
        try:
            for path in reversed([directory, *directory.parents]):
                path.mkdir(mode=0o700, exist_ok=True)
            directory.chmod(0o700)
            lock = stack.enter_context(os.fdopen(open_private(directory / "lock", os.O_APPEND), "ab"))
        except OSError as error:
            raise PlanError(f"{directory}: cannot be used: {error}") from None
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise PlanError(
                f"{directory}: is in use: the same command is already running, or was just killed and its processes "
                "are still ending. End it first, or use another directory"
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
                pass_fds=(lock.fileno(),),  # the directory stays locked until the watchdog has finished
            )
        )
        assert watchdog.stdin is not None  # noqa: S101
        supervisor = Supervisor(mark, watchdog.stdin.fileno())
        stack.callback(ended)
        stack.callback(supervisor.stop)
        yield supervisor
