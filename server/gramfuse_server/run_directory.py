"""The run directory: everything that a run leaves behind.

A run in progress writes to `<name>.partial`, which is renamed to `<name>` on completion. A failed run leaves its
report in `<name>.failed`. Only the owner can read any of them, from their creation: directories are 0700, files 0600,
including the merged model.
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
"""Files that a failed run leaves behind, beside logs."""
LOGS = ".log"
"""Suffix of logs: those of silos that failed in a simulation."""
START = "start"
"""Prefix of the files of models that later rounds start from."""
RESUMABLE = "train"
"""A run can be resumed once this phase is complete."""


Account = Callable[[GramfuseError, bool], Mapping[str, str]]
"""Returns the files that a failed run leaves, as texts by file name; the first is the one for people to read.

Takes the error and whether the run can be resumed.
"""


class RunDirectory:
    """A run directory in the making, as a context manager.

    Leaving it with an exception removes the partial directory, unless the silos had trained: then it stays, so that the
    run can be resumed. Errors that a resumed run would hit again remove it anyway. After a GramfuseError, the texts
    from `account` are written beside the transcript and `error.report` is set to the first; if writing them fails, the
    original error is raised without a report.

    Args:
        path: its final path; must not exist.
        needed: most bytes that the run will write.
        resume: resume the interrupted run under the partial name.
        resumable: whether to keep a failed run for resuming.

    Attributes:
        account: returns the files for a failed run; set by the caller.
        done: results of completed phases, as JSON values by `of_round(phase, round)`; empty at first unless the run
            is resumed.

    Raises:
        RunDirectoryError: if it exists, cannot be created or resumed, another run is writing there, or the disk is too
            full.
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
            self.done = read_checkpoint(self.path)  # again, now that no other run can write there
            return self
        check_free(self.path)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(self.path.parent).free
        except OSError as error:
            raise RunDirectoryError(f"{self.path}: cannot be created: {error}") from None
        if free < self.needed:
            raise RunDirectoryError(
                f"{self.path.parent}: the run needs up to {_size(self.needed)} and the disk has {_size(free)} free; "
                "make room, or choose another --out"
            )
        try:
            with self.writing():
                self.partial.mkdir(mode=0o700)
        except RunDirectoryError:
            check_free(self.path)  # another run created it in the meantime
            raise
        self._lock()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        with self._locked:
            if error is None:
                return
            recurs = isinstance(error, ContributionError | SecurityError)
            kept = self.resumable and RESUMABLE in self.done and not recurs
            if isinstance(error, GramfuseError) and self.account is not None:
                with suppress(Exception):  # the error that ended the run must not be masked
                    error.report = self._write_remains(self.account(error, kept), kept=kept)
            if not kept:
                shutil.rmtree(self.partial, ignore_errors=True)

    def _write_remains(self, texts: Mapping[str, str], *, kept: bool) -> Path:
        """Write the files of a failed run, replacing those of an earlier one; return the path of the first."""
        if not kept:  # first, to make room for the report on a full disk
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
            _make_private(failed)
        except BaseException:
            shutil.rmtree(failed, ignore_errors=True)
            raise
        return failed / next(iter(texts))

    def _lock(self) -> None:
        """Lock out other runs until this one or its process ends."""
        with self.writing():
            if not self._locked.enter_context(locked(self.partial)):
                check_free(self.path)

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Turn disk errors into RunDirectoryError."""
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
        """Save the result of a phase, a JSON value, so that a resumed run does not repeat it."""
        self.done[phase] = result
        with self.writing():
            write_private(self.partial / CHECKPOINT, checkpoint_text(self.done).encode(), durable=True)

    def record(self, entry: dict[str, Any]) -> None:
        """Append one line to the transcript: a message that the coordinator sent or received, with the time."""
        line = json.dumps({"time": round(time.time(), 3), **entry})
        with self.writing(), (self.partial / TRANSCRIPT).open("a", encoding="utf-8") as transcript:
            transcript.write(line + "\n")

    def finish(self) -> Path:
        """Write SHA256SUMS over all files, remove what only a resumed run needs, and rename the directory.

        Also removes the report of an earlier failed run of that name.
        """
        with self.writing():
            spools = list(self.partial.glob("spool*"))
            starts = list(self.partial.glob(f"{START}*"))
            excluded = {self.partial / name for name in (CHECKPOINT, LOCK, SUMS)}.union(starts)
            excluded = excluded.union(*(spool.rglob("*") for spool in spools))
            files = sorted(path for path in self.partial.rglob("*") if path.is_file() and path not in excluded)
            sums = [f"{_sha256(path)}  {path.relative_to(self.partial).as_posix()}\n" for path in files]
            (self.partial / SUMS).write_text("".join(sums), encoding="utf-8")
            for name in (CHECKPOINT, LOCK):
                (self.partial / name).unlink(missing_ok=True)
            for spool in spools:
                shutil.rmtree(spool)
            for start in starts:
                start.unlink()
            _make_private(self.partial)
            os.replace(self.partial, self.path)
        forget(failed_of(self.path))
        return self.path


def rewrite(directory: Path, name: str, text: str) -> None:
    """Rewrite a text file of a complete run directory, and its line in SHA256SUMS if that exists.

    Raises:
        RunDirectoryError: if writing fails.
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
    """Return the digests in a run directory's SHA256SUMS, by file name.

    Raises:
        RunDirectoryError: if it cannot be read.
    """
    file = directory / SUMS
    try:
        return {name: digest for digest, name in (line.split("  ", 1) for line in file.read_text("utf-8").splitlines())}
    except (OSError, ValueError) as error:
        raise RunDirectoryError(f"{file}: cannot be read: {error}") from None


def check_unchanged(directory: Path, name: str) -> None:
    """Raise RunDirectoryError if a file does not match SHA256SUMS of its run directory, where that exists."""
    listed = read_sums(directory).get(name) if (directory / SUMS).exists() else None
    if listed is not None and listed != _sha256(directory / name):
        raise RunDirectoryError(
            f"{directory / name}: was changed since the run wrote it: its SHA-256 differs from {SUMS}; copy the "
            "directory again from its source"
        )


def of_round(name: str, number: int) -> str:
    """Return the name of a phase or file in a round: unchanged in the first, with the round appended in later ones."""
    return name if number == 1 else f"{name}-{number}"


def partial_of(path: Path) -> Path:
    """Return the path of a run directory while its run is in progress."""
    return path.with_name(path.name + ".partial")


def failed_of(path: Path) -> Path:
    """Return the directory for the report of a failed run."""
    return path.with_name(path.name + ".failed")


def checkpoint_text(done: Mapping[str, Any]) -> str:
    """Return the text of a checkpoint: the SHA-256 of a JSON document, a newline, and the document."""
    text = json.dumps(done)
    return f"{hashlib.sha256(text.encode()).hexdigest()}\n{text}"


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Return the completed phases of an interrupted run.

    Raises:
        RunDirectoryError: if there is no checkpoint, or it is damaged.
    """
    file = partial_of(path) / CHECKPOINT
    try:
        sha256, _, text = file.read_text(encoding="utf-8").partition("\n")
        if sha256 != hashlib.sha256(text.encode()).hexdigest():
            raise ValueError(f"it was damaged; remove {partial_of(path)} and start a new run")
        done: dict[str, Any] = json.loads(text)
    except FileNotFoundError:
        raise RunDirectoryError(
            f"{path}: nothing to resume; expected {file}, which a run leaves if it is interrupted after the silos "
            "trained"
        ) from None
    except (OSError, ValueError) as error:
        raise RunDirectoryError(f"{file}: cannot be read: {error}") from None
    return done


def check_free(path: Path) -> None:
    """Raise RunDirectoryError if a run directory, complete or partial, already has this name."""
    for taken in (path, partial_of(path)):
        if taken.exists():
            raise RunDirectoryError(f"{taken} exists already; {_remedy(taken)}")


@contextmanager
def locked(partial: Path) -> Iterator[bool]:
    """Lock a partial run directory; yields False if a run holds the lock."""
    with (partial / LOCK).open("ab") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


def discard(path: Path, seconds: float = 0.0) -> None:
    """Remove the partial directory of an interrupted run, unless another run is writing there.

    Args:
        path: the final path of the run directory.
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


def _make_private(directory: Path) -> None:
    """Make all files of a directory private to the owner."""
    for path in directory.rglob("*"):
        path.chmod(0o700 if path.is_dir() else 0o600)


def forget(failed: Path) -> None:
    """Remove the directory of a failed run, unless it contains other files."""
    with suppress(OSError):
        if all(path.name in REMAINS or path.suffix == LOGS for path in failed.iterdir()):
            shutil.rmtree(failed)


def _remedy(taken: Path) -> str:
    if (taken / LOCK).exists():
        with suppress(OSError), locked(taken) as ours:
            if not ours:
                return "a run is writing there; wait until it ends, or choose another --out"
    return "choose another --out, or " + (
        "resume it with --resume, or remove it" if (taken / CHECKPOINT).exists() else "remove it"
    )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"
