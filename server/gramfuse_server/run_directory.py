"""The run directory: everything that a run leaves behind.

While a run is under way its directory is called `<name>.partial`; it gets its name when it is complete. Of a run that
failed there is a report, in `<name>.failed`. All of them are their owner's only, from their first moment: directories
0700, files 0600, the merged model's too.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from gramfuse_protocol.errors import ContributionError, GramfuseError, RunDirectoryError, SecurityError, disk_is_full
from gramfuse_protocol.files import write_private

CHECKPOINT = "checkpoint.json"
LOCK = "lock"
SUMS = "SHA256SUMS"
PLAN = "plan.toml"
TRANSCRIPT = "transcript.jsonl"
REPORT = "report.json"
PAGE = "report.html"
REMAINS = {PLAN, TRANSCRIPT, REPORT, PAGE}
"""All that stays of a run that failed, beside logs."""
LOGS = ".log"
"""How names of logs end: those of silos that failed in a simulation."""
START = "start"
"""How the name of a model that a round starts from begins."""
RESUMABLE = "train"
"""The phase whose result makes a run worth resuming."""


Account = Callable[[GramfuseError, bool], Mapping[str, str]]
"""Returns what is to stay of a run that failed, as texts by file name, the one that people read first.

It is given the error, and whether the run can be resumed.
"""


class RunDirectory:
    """A run directory in the making.

    Leaving it with an exception removes it, unless the silos had trained: then it stays under its partial name, to be
    resumed. Errors that a resumed run would meet again remove it all the same. After a GramfuseError, what `account`
    returns is left with the transcript, and the error says where; if that cannot be written, the error comes out alone.

    Args:
        path: its final name; must not exist.
        needed: bytes that the run will write at most.
        resume: go on with what an interrupted run left under the partial name.
        resumable: whether anybody could go on with what is kept; if not, nothing is.

    Attributes:
        account: set by whoever knows what the run was.
        done: results of the phases that are over, as JSON values by `of_round(phase, round)`; empty but for a
            resumed run.

    Raises:
        RunDirectoryError: if it exists, cannot be made or resumed, another run is writing there, or the disk has not
            enough room.
    """

    def __init__(self, path: Path, needed: int, *, resume: bool = False, resumable: bool = True) -> None:
        self.path = path
        self.partial = partial_of(path)
        self.needed = needed
        self.resume = resume
        self.resumable = resumable
        self.account: Account | None = None
        self.done: dict[str, Any] = {}
        self._locked = ExitStack()

    def __enter__(self) -> RunDirectory:
        if self.resume:
            read_checkpoint(self.path)
            self._lock()
            self.done = read_checkpoint(self.path)  # what was kept until nobody wrote there any more
            return self
        check_free(self.path)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(self.path.parent).free
        except OSError as error:
            raise RunDirectoryError(f"{self.path}: cannot be made: {error}") from None
        if free < self.needed:
            raise RunDirectoryError(
                f"{self.path.parent}: the run needs up to {_size(self.needed)} and the disk has {_size(free)} free; "
                "make room, or choose another --out"
            )
        try:
            with self.writing():
                self.partial.mkdir(mode=0o700)
        except RunDirectoryError:
            check_free(self.path)  # a run that was started at the same time was faster
            raise
        self._lock()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        with self._locked:
            if error is None:
                return
            again = isinstance(error, ContributionError | SecurityError)
            kept = self.resumable and RESUMABLE in self.done and not again
            if isinstance(error, GramfuseError) and self.account is not None:
                with suppress(Exception):  # whatever goes wrong now, the error that ended the run must come out
                    error.report = self._leave(self.account(error, kept), kept=kept)
            if not kept:
                shutil.rmtree(self.partial, ignore_errors=True)

    def _leave(self, texts: Mapping[str, str], *, kept: bool) -> Path:
        """Write what stays of a failed run, in the place of what stayed of an earlier one; return what to read."""
        if not kept:  # first of all, so that there is room for the report on a disk that is full
            for path in self.partial.iterdir():
                if path.is_dir():
                    shutil.rmtree(path)
                elif path.name not in (TRANSCRIPT, LOCK):
                    path.unlink()
        failed, transcript = failed_of(self.path), self.partial / TRANSCRIPT
        forget(failed)
        failed.mkdir(mode=0o700)
        try:
            for name, text in texts.items():
                (failed / name).write_text(text, encoding="utf-8")
            if transcript.exists():
                (shutil.copyfile if kept else os.replace)(transcript, failed / TRANSCRIPT)
            _close(failed)
        except BaseException:
            shutil.rmtree(failed, ignore_errors=True)
            raise
        return failed / next(iter(texts))

    def _lock(self) -> None:
        """Keep other runs out, until this one is over or its process ends."""
        with self.writing():
            if not self._locked.enter_context(locked(self.partial)):
                check_free(self.path)

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Turn what the disk says no to into RunDirectoryError."""
        try:
            yield
        except Exception as error:
            full = disk_is_full(error)
            if not full and not isinstance(error, OSError):
                raise
            raise RunDirectoryError(
                f"{self.partial}: {'no space left on the disk; make room' if full else error}"
            ) from error

    def write(self, name: str, text: str) -> None:
        """Write a text file of the run."""
        with self.writing():
            (self.partial / name).write_text(text, encoding="utf-8")

    def keep(self, phase: str, result: Any) -> None:
        """Keep the result of a phase, a JSON value, so that a resumed run need not repeat it."""
        self.done[phase] = result
        with self.writing():
            write_private(self.partial / CHECKPOINT, checkpoint_text(self.done).encode(), durable=True)

    def record(self, entry: dict[str, Any]) -> None:
        """Append one line to the transcript: what crossed the coordinator's door, and when."""
        line = json.dumps({"time": round(time.time(), 3), **entry})
        with self.writing(), (self.partial / TRANSCRIPT).open("a", encoding="utf-8") as transcript:
            transcript.write(line + "\n")

    def finish(self) -> Path:
        """Write SHA256SUMS over all files, remove what only a resumed run needs, and give the directory its name.

        What an earlier run of that name left when it failed goes too.
        """
        with self.writing():
            spools = list(self.partial.glob("spool*"))
            starts = list(self.partial.glob(f"{START}*"))
            away = {self.partial / name for name in (CHECKPOINT, LOCK, SUMS)}.union(starts)
            away = away.union(*(spool.rglob("*") for spool in spools))
            files = sorted(path for path in self.partial.rglob("*") if path.is_file() and path not in away)
            sums = [f"{_sha256(path)}  {path.relative_to(self.partial).as_posix()}\n" for path in files]
            (self.partial / SUMS).write_text("".join(sums), encoding="utf-8")
            for name in (CHECKPOINT, LOCK):
                (self.partial / name).unlink(missing_ok=True)
            for spool in spools:
                shutil.rmtree(spool)
            for start in starts:
                start.unlink()
            _close(self.partial)
            os.replace(self.partial, self.path)
        forget(failed_of(self.path))
        return self.path


def rewrite(directory: Path, name: str, text: str) -> None:
    """Write a text file of a run directory that is complete, and its line of SHA256SUMS, if it has such a file.

    Raises:
        RunDirectoryError: if that cannot be done.
    """
    texts = {name: text}
    try:
        if (directory / SUMS).exists():
            sums = read_sums(directory) | {name: hashlib.sha256(text.encode()).hexdigest()}
            texts[SUMS] = "".join(f"{sums[each]}  {each}\n" for each in sorted(sums, key=Path))
        for each, content in texts.items():
            write_private(directory / each, content.encode())
    except OSError as error:
        raise RunDirectoryError(f"{directory}: cannot be written: {error}") from None


def read_sums(directory: Path) -> dict[str, str]:
    """Return the digest of each file that SHA256SUMS of a run directory lists.

    Raises:
        RunDirectoryError: if it cannot be read.
    """
    file = directory / SUMS
    try:
        return {name: digest for digest, name in (line.split("  ", 1) for line in file.read_text("utf-8").splitlines())}
    except (OSError, ValueError) as error:
        raise RunDirectoryError(f"{file}: cannot be read: {error}") from None


def check_unchanged(directory: Path, name: str) -> None:
    """Raise RunDirectoryError if a file is not what SHA256SUMS of its run directory says, where there is one."""
    listed = read_sums(directory).get(name) if (directory / SUMS).exists() else None
    if listed is not None and listed != _sha256(directory / name):
        raise RunDirectoryError(
            f"{directory / name}: was changed since the run wrote it: its SHA-256 is not that in {SUMS}; take the "
            "directory from where it was copied"
        )


def of_round(name: str, number: int) -> str:
    """Return what a phase's result, or a file of it, is called in a round: as in a run of one, but for later rounds."""
    return name if number == 1 else f"{name}-{number}"


def partial_of(path: Path) -> Path:
    """Return what a run directory is called while its run is under way."""
    return path.with_name(path.name + ".partial")


def failed_of(path: Path) -> Path:
    """Return where the report of a run is that failed."""
    return path.with_name(path.name + ".failed")


def checkpoint_text(done: Mapping[str, Any]) -> str:
    """Return what a checkpoint holds: the digest of a JSON document, and the document."""
    text = json.dumps(done)
    return f"{hashlib.sha256(text.encode()).hexdigest()}\n{text}"


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Return what an interrupted run had done.

    Raises:
        RunDirectoryError: if there is nothing to go on with, or it is not as it was left.
    """
    file = partial_of(path) / CHECKPOINT
    try:
        sha256, _, text = file.read_text(encoding="utf-8").partition("\n")
        if sha256 != hashlib.sha256(text.encode()).hexdigest():
            raise ValueError(f"it was damaged; remove {partial_of(path)} and start the run anew")
        done: dict[str, Any] = json.loads(text)
    except FileNotFoundError:
        raise RunDirectoryError(
            f"{path}: nothing to resume; expected {file}, which a run leaves that was interrupted after the silos had "
            "trained"
        ) from None
    except (OSError, ValueError) as error:
        raise RunDirectoryError(f"{file}: cannot be read: {error}") from None
    return done


def check_free(path: Path) -> None:
    """Raise RunDirectoryError if a run directory, finished or under way, has this name already."""
    for taken in (path, partial_of(path)):
        if taken.exists():
            raise RunDirectoryError(f"{taken} exists already; {_way_out(taken)}")


@contextmanager
def locked(partial: Path) -> Iterator[bool]:
    """Keep runs out of a run directory in the making; yields False if one is writing there."""
    with (partial / LOCK).open("ab") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


def discard(path: Path, seconds: float = 0.0) -> None:
    """Remove what an interrupted run left, unless another one is writing there.

    Args:
        path: the run directory that it was to make.
        seconds: how long to wait for its own process to end.
    """
    deadline = time.monotonic() + seconds
    partial = partial_of(path)
    while partial.is_dir():
        with suppress(OSError), locked(partial) as ours:
            if ours:
                shutil.rmtree(partial, ignore_errors=True)
        if time.monotonic() >= deadline:
            return
        time.sleep(0.1)


def _close(directory: Path) -> None:
    """Make all of a directory its owner's only; nobody else got in there while it was made."""
    for path in directory.rglob("*"):
        path.chmod(0o700 if path.is_dir() else 0o600)


def forget(failed: Path) -> None:
    """Remove what stayed of a failed run, unless somebody else's files are there."""
    with suppress(OSError):
        if all(path.name in REMAINS or path.suffix == LOGS for path in failed.iterdir()):
            shutil.rmtree(failed)


def _way_out(taken: Path) -> str:
    if (taken / LOCK).exists():
        with suppress(OSError), locked(taken) as ours:
            if not ours:
                return "a run is writing there; wait until it is over, or choose another --out"
    return "choose another --out, or " + (
        "resume it with --resume, or remove it" if (taken / CHECKPOINT).exists() else "remove it"
    )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"
