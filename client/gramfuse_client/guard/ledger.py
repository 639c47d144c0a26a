"""The egress ledger: a record of what left a silo, one line per message, written before the message is sent.

A line means that the message was about to leave. After a crash or a full disk, the last line's message may not have
left, but a message without a line never did. The lines form a hash chain: each contains the digest of the previous one,
so damage is detected and located. `ledger.head`, beside the ledger, names the last line, so that a truncated end is
detected.

This detects accidents and careless edits. Someone who can write the silo's files can rewrite the whole ledger and
`ledger.head`. Only a digest noted in a place that they cannot write protects against that: see `Ledger.verify`.
"""

from __future__ import annotations

import fcntl
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import IO

from pydantic import ValidationError

from gramfuse_client.guard.ledger_lines import NO_LINE, Entry, Head, Line, Mark, ReadLine, digest, parse
from gramfuse_protocol.bounds import HEADER_CHARACTERS
from gramfuse_protocol.canonical import canonical_json
from gramfuse_protocol.errors import LedgerError
from gramfuse_protocol.files import make_private_directory, sync, write_private

BLOCK_BYTES = 65536
REASON = "this silo cannot write its ledger, so nothing leaves"

log = logging.getLogger(__name__)


class Ledger:
    """A silo's ledger on its disk.

    Args:
        path: the file; its lock and its head are beside it, with the suffixes .lock and .head.
        silo: name of the silo.
    """

    def __init__(self, path: Path, silo: str) -> None:
        self.path = path
        self.silo = silo

    def append(self, entry: Entry, now: datetime | None = None) -> Line:
        """Append a line, and sync it to disk before returning. Only then may the message leave.

        Args:
            now: by default the present.

        Raises:
            LedgerError: if the line cannot be written, or the ledger's end was changed. Then nothing may leave.
        """
        time = (now or datetime.now(UTC)).astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        try:
            make_private_directory(self.path.parent)
            with self._locked(), self._opened() as file:
                return self._append(file, entry, time)
        except OSError as error:
            raise LedgerError(
                f"{self.path}: cannot be written: {error}; free disk space, or let this user write there, and start "
                "again; until then nothing leaves this silo",
                reason=REASON,
            ) from error

    def lines(self) -> Iterator[Line]:
        """Yield all lines, each once it is verified by the next line or by `ledger.head`.

        Without `ledger.head`, as for a copy, a truncated end is not detected.

        Raises:
            LedgerError: naming file, line and damage, at the first damage.
        """
        try:
            file, size, head = self._snapshot()
            if file is None:
                self._check_end(None, head)
                return
            with file:
                yield from self._verified(_cut(file, size), head)
        except OSError as error:
            raise LedgerError(f"{self.path}: cannot be read: {error}") from error

    def verify(self, head: str | None = None) -> Head:
        """Verify all lines, and return where they end.

        Args:
            head: digest of a line, noted earlier in another place; some line must still have it.

        Raises:
            LedgerError: naming file, line and damage.
        """
        end, head_found = Head(), head is None or head == NO_LINE
        for line in self.lines():
            end = end.after(line)
            head_found = head_found or end.digest == head
        if not head_found:
            raise LedgerError(
                f"{self.path}: no line has the digest {head}: lines up to it were changed or removed, or the digest "
                "belongs to another ledger"
            )
        return end

    @property
    def _head_path(self) -> Path:
        return self.path.with_suffix(".head")

    @property
    def _lock_path(self) -> Path:
        return self.path.with_suffix(".lock")

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with _closing(os.open(self._lock_path, os.O_RDWR | os.O_CREAT, 0o600)) as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    @contextmanager
    def _opened(self) -> Iterator[int]:
        with _closing(os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600)) as file:
            mode = os.fstat(file).st_mode & 0o777
            if mode & 0o077:
                raise LedgerError(
                    f"{self.path}: users other than its owner can access it (mode {mode:o}); run: "
                    f"chmod 600 {self.path}",
                    reason=REASON,
                )
            yield file

    def _append(self, file: int, entry: Entry, time: str) -> Line:
        size = os.fstat(file).st_size
        raw, end = _last_line(file, size)
        last = self._last(raw)
        head = self._check_last(last)
        if end < size:
            log.warning("%s: removed an incomplete line at the end; its message never left", self.path)
            os.ftruncate(file, end)
        mark = last.mark if last else Mark()
        if not last:
            sync(self.path.parent)
        elif head != mark:  # if the head stayed two lines behind, the next crash would look like damage
            if head is None and mark.number > 1:
                log.warning("%s: was missing, so lines cut off before now go unnoticed", self._head_path)
            os.fsync(file)  # the head must never name a line that is not on disk yet
            self._write_head(mark)
        line = Line(number=mark.number + 1, time=time, silo=self.silo, previous=mark.digest, entry=entry)
        _write(file, line.serialised(), end)
        self._write_head(Mark(number=line.number, digest=line.digest))
        return line

    def _last(self, raw: bytes) -> ReadLine | None:
        if not raw:
            return None
        try:
            line = parse(raw, self.silo)
        except ValueError as problem:
            raise self._unusable(f"the last line {problem}") from None
        return ReadLine(line.number, line, digest(raw))

    def _check_last(self, last: ReadLine | None) -> Mark | None:
        """Return the head, or raise LedgerError if it does not match the last line."""
        try:
            head = self._head()
            self._check_end(last, head)
        except LedgerError as error:
            raise LedgerError(f"{error}; {_KEEP}; until then nothing leaves this silo", reason=REASON) from None
        return head

    def _unusable(self, problem: str) -> LedgerError:
        return LedgerError(f"{self.path}: {problem}; {_KEEP}; until then nothing leaves this silo", reason=REASON)

    def _head(self) -> Mark | None:
        try:
            return Mark.model_validate_json(self._head_path.read_bytes()[:1024])
        except FileNotFoundError:
            return None
        except ValidationError:
            raise LedgerError(f"{self._head_path}: is damaged") from None

    def _write_head(self, mark: Mark) -> None:
        write_private(self._head_path, canonical_json(mark.model_dump()) + b"\n", durable=True)

    def _damage(self, position: int, problem: str) -> LedgerError:
        return LedgerError(f"{self.path}:{position}: {problem}")

    def _snapshot(self) -> tuple[IO[bytes] | None, int, Mark | None]:
        """Return the file, its size and the head, consistent with each other: no line is being written."""
        with suppress(FileNotFoundError), _closing(os.open(self._lock_path, os.O_RDONLY)) as lock:
            fcntl.flock(lock, fcntl.LOCK_SH)
            return self._unlocked_snapshot()
        return self._unlocked_snapshot()

    def _unlocked_snapshot(self) -> tuple[IO[bytes] | None, int, Mark | None]:
        head = self._head()
        try:
            file = self.path.open("rb")
        except FileNotFoundError:
            return None, 0, head
        return file, os.fstat(file.fileno()).st_size, head

    def _verified(self, raws: Iterator[bytes], head: Mark | None) -> Iterator[Line]:
        last: ReadLine | None = None  # read, but not verified yet
        raw, position = next(raws, b""), 0
        while raw:
            position += 1
            if not raw.endswith(b"\n"):
                if head is not None and head.number >= position:
                    raise self._damage(position, f"line {position} was cut short")
                self._check_end(last, head)
                if last:
                    yield last.line
                raise self._damage(
                    position,
                    f"line {position} is incomplete: the silo stopped while writing it, so its message never left; it "
                    "is removed before the next line is written",
                )
            try:
                line = ReadLine(position, parse(raw, self.silo), digest(raw))
            except ValueError as problem:
                raise self._damage(position, f"line {position} {problem}") from None
            raw = next(raws, b"")
            self._check_follows(line, last.mark if last else Mark())
            if last:
                yield last.line
            last = line
        self._check_end(last, head)
        if last:
            yield last.line

    def _check_follows(self, line: ReadLine, mark: Mark) -> None:
        """Raise LedgerError unless a line continues the hash chain after the line `mark`."""
        position, number = line.position, line.line.number
        if number != mark.number + 1:
            raise self._damage(
                position,
                f"line {position} has number {number} instead of {mark.number + 1}: lines were removed, added or moved",
            )
        if not line.follows(mark):
            raise self._damage(
                position, f"line {position} does not follow line {position - 1}: one of the two was changed"
            )

    def _check_end(self, last: ReadLine | None, head: Mark | None) -> None:
        """Raise LedgerError unless the head names the last line or, after a crash, the one before it."""
        mark, position = (last.mark, last.position) if last else (Mark(), 0)
        if head is None or head == mark or (last and last.follows(head)):
            return
        named = f"{self._head_path.name} names line {head.number}"
        if head.number > mark.number:
            missing = head.number - mark.number
            lines = "the last line is" if missing == 1 else f"the last {missing} lines are"
            raise self._damage(position, f"{lines} missing: the file ends with line {mark.number}, {named}")
        if head.number == mark.number:
            raise self._damage(position, f"the last line, {position}, was changed: {named} with another digest")
        if head.number == mark.number - 1:
            raise self._damage(position, f"line {position - 1} or {position} was changed: {named} with another digest")
        raise self._damage(position, f"{named}, but there are lines up to {mark.number}: one of the two was replaced")


_KEEP = "move the ledger and its .head away, keep both, and find out why; the next message then begins a new ledger"


def _last_line(file: int, size: int) -> tuple[bytes, int]:
    """Return the last complete line, or b"", and its end offset. Reads little more than that line."""
    span = BLOCK_BYTES
    while True:
        start = max(0, size - span)
        data = os.pread(file, size - start, start)
        end = data.rfind(b"\n") + 1
        begin = data.rfind(b"\n", 0, end - 1) + 1 if end else 0
        if begin or not start:
            return data[begin:end], start + end
        span *= 2


def _write(file: int, content: bytes, end: int) -> None:
    """Append a line and sync it to disk; on any error, truncate the file to `end` bytes, its earlier size."""
    try:
        rest = memoryview(content)
        while rest:
            rest = rest[os.write(file, rest) :]
        os.fsync(file)
    except BaseException:
        with suppress(OSError):
            os.ftruncate(file, end)
            os.fsync(file)
        raise


def _cut(file: IO[bytes], size: int) -> Iterator[bytes]:
    """Yield the lines of the first `size` bytes; an incomplete or overlong line is yielded without a newline."""
    while size > 0 and (raw := file.readline(min(size, HEADER_CHARACTERS))):
        size -= len(raw)
        yield raw


@contextmanager
def _closing(descriptor: int) -> Iterator[int]:
    try:
        yield descriptor
    finally:
        os.close(descriptor)
