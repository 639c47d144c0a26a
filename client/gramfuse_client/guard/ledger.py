"""The egress ledger: what left a silo, one line for each message, written before the message is sent.

A line means that the message was about to leave. After a crash or a full disk, the last line's message may not have
left; what has no line never did. Each line names the digest of the line before it, so damage is found and located.
`ledger.head`, beside the ledger, names the last line, so that lines cut off at the end are missed.

All of this finds accidents and careless hands. Who can write the silo's files can write the whole ledger anew, and
`ledger.head` with it. Only a digest that was noted elsewhere, where they cannot write, holds against that: see
`Ledger.verify`.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Annotated, Literal

from pydantic import BeforeValidator, ConfigDict, Field, PlainSerializer, ValidationError, ValidationInfo

from gramfuse_protocol.bounds import HEADER_CHARACTERS, check_size
from gramfuse_protocol.canonical import canonical_json
from gramfuse_protocol.errors import LedgerError
from gramfuse_protocol.files import make_private_directory, sync, write_private
from gramfuse_protocol.text import Legible, one_line

BLOCK_BYTES = 65536
NO_LINE = "0" * 64
REASON = "this silo cannot write its ledger, so nothing leaves"

log = logging.getLogger(__name__)


def _from_text(value: object, info: ValidationInfo) -> object:
    return int(value) if info.mode == "json" and isinstance(value, str) and value.isascii() else value


Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Count = Annotated[int, Field(ge=0, lt=2**53)]
# Flower's run ids have 64 bits, more than canonical JSON has for a number, so they are written as text.
RunId = Annotated[int, Field(ge=0, lt=2**64), BeforeValidator(_from_text), PlainSerializer(str, when_used="json")]


class _Frozen(Legible):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, hide_input_in_errors=True)


class Item(_Frozen):
    """One array or value that left.

    Args:
        dtype: numpy's name; "json" or "text" for what is no array, which has the shape ().
        bytes: how many.
        sha256: digest of those bytes.
    """

    name: str
    dtype: str
    shape: tuple[Count, ...]
    bytes: Count
    sha256: Sha256


class Entry(_Frozen):
    """What is recorded about one message, or, of kind "clear", about what the silo's owner cleared.

    Args:
        plan: digest of the plan; empty if it is not known.
        session: nonce of the session; empty if it is not known.
        round: of the plan; 0 if it is not known.
        run: Flower's run id; 0 if it is not known.
        phase: of the request that the message answers.
        form: in a word, how the content can be read: "open", "masked", "sealed" and the like.
        note: a refusal's reason, or the like.
        items: all that the message carries.
    """

    plan: Annotated[str, Field(pattern=r"^([0-9a-f]{64})?$")] = ""
    session: Annotated[str, Field(pattern=r"^([0-9a-f]{32})?$")] = ""
    round: Annotated[int, Field(ge=0, lt=2**53)] = 0
    run: RunId = 0
    phase: str
    kind: Literal["reply", "refusal", "error", "clear"]
    form: Annotated[str, Field(max_length=40)]
    note: Annotated[str, Field(max_length=2000)] = ""
    items: tuple[Item, ...] = ()

    @property
    def bytes(self) -> int:
        """How many bytes all items have together."""
        return sum(item.bytes for item in self.items)


class Line(_Frozen):
    """One line of the ledger.

    Args:
        number: 1 for the first.
        time: UTC, as 2026-01-31T12:00:00Z. Clocks may be set back, so times may go down.
        silo: the name of the silo whose ledger it is.
        previous: digest of the line before it; zeros for the first.
    """

    number: Annotated[int, Field(ge=1, lt=2**53)]
    time: Annotated[str, Field(pattern=r"^[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}Z$")]
    silo: str
    previous: Sha256
    entry: Entry

    def serialised(self) -> bytes:
        """Return the line as it stands in the file, with its newline."""
        return canonical_json(self.model_dump(mode="json")) + b"\n"

    @property
    def digest(self) -> str:
        """SHA-256 of the line without its newline."""
        return _digest(self.serialised())


@dataclass(frozen=True)
class Head:
    """Where a ledger ends.

    Args:
        number: of the last line; 0 if there is none.
        digest: of the last line; zeros if there is none. Noted elsewhere, it holds all lines up to it.
        bytes: of all items of all lines.
        first: time of the first line, or empty.
        last: time of the last line, or empty.
    """

    number: int = 0
    digest: str = NO_LINE
    bytes: int = 0
    first: str = ""
    last: str = ""

    def after(self, line: Line) -> Head:
        """Return where the ledger ends with one more line."""
        bytes_ = self.bytes + line.entry.bytes
        return Head(line.number, line.digest, bytes_, self.first or line.time, line.time)


class _Mark(_Frozen):
    """A line by number and digest: what `ledger.head` holds, and what the next line has to follow."""

    number: Count = 0
    digest: Sha256 = NO_LINE


@dataclass(frozen=True)
class _Read:
    """A line that was read, and where it stands."""

    position: int
    line: Line
    digest: str

    @property
    def mark(self) -> _Mark:
        return _Mark(number=self.line.number, digest=self.digest)

    def follows(self, mark: _Mark) -> bool:
        return self.line.number == mark.number + 1 and self.line.previous == mark.digest


class Ledger:
    """A silo's ledger on its disk.

    Args:
        path: the file; its lock and its head lie beside it, with the suffixes .lock and .head.
        silo: whose it is.
    """

    def __init__(self, path: Path, silo: str) -> None:
        self.path = path
        self.silo = silo

    def append(self, entry: Entry, now: datetime | None = None) -> Line:
        """Write a line and have it on the disk before returning. The message may leave after that, not before.

        Args:
            now: the present by default.

        Raises:
            LedgerError: if it cannot be written, or if the ledger's end is not as it was left. Nothing may leave then.
        """
        time = (now or datetime.now(UTC)).astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        try:
            make_private_directory(self.path.parent)
            with self._locked(), self._opened() as file:
                return self._append(file, entry, time)
        except OSError as error:
            raise LedgerError(
                f"{self.path}: cannot be written: {error}; make room on the disk, or let this user write there, and "
                "start again; until then nothing leaves this silo",
                reason=REASON,
            ) from error

    def lines(self) -> Iterator[Line]:
        """Yield all lines, each after the line that follows it, or `ledger.head`, bore it out.

        Without `ledger.head` beside it, as for a copy, lines cut off at the end are not noticed.

        Raises:
            LedgerError: naming file, line and damage, at the first that is found.
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
        """Go through all lines and return where they end.

        Args:
            head: digest of a line, noted earlier and elsewhere; some line must still have it.

        Raises:
            LedgerError: naming file, line and damage.
        """
        found, known = Head(), head is None or head == NO_LINE
        for line in self.lines():
            found = found.after(line)
            known = known or found.digest == head
        if not known:
            raise LedgerError(
                f"{self.path}: no line has the digest {head}: lines up to it were changed or removed, or the digest is "
                "of another ledger"
            )
        return found

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
                    f"{self.path}: others than its owner have rights on it (mode {mode:o}); run: chmod 600 {self.path}",
                    reason=REASON,
                )
            yield file

    def _append(self, file: int, entry: Entry, time: str) -> Line:
        size = os.fstat(file).st_size
        raw, end = _last_line(file, size)
        last = self._last(raw)
        head = self._check_last(last)
        if end < size:
            log.warning("%s: cut off an incomplete line at the end; its message never left", self.path)
            os.ftruncate(file, end)
        mark = last.mark if last else _Mark()
        if not last:
            sync(self.path.parent)
        elif head != mark:  # with the head two lines behind, the next crash would look like damage
            if head is None and mark.number > 1:
                log.warning("%s: was missing, so lines cut off before now are not noticed", self._head_path)
            os.fsync(file)  # the head must never name a line that is not on the disk yet
            self._write_head(mark)
        line = Line(number=mark.number + 1, time=time, silo=self.silo, previous=mark.digest, entry=entry)
        _write(file, line.serialised(), end)
        self._write_head(_Mark(number=line.number, digest=line.digest))
        return line

    def _last(self, raw: bytes) -> _Read | None:
        if not raw:
            return None
        try:
            line = _parse(raw, self.silo)
        except ValueError as problem:
            raise self._unusable(f"the last line {problem}") from None
        return _Read(line.number, line, _digest(raw))

    def _check_last(self, last: _Read | None) -> _Mark | None:
        """Return what the head names, or raise LedgerError if the last line does not go with it."""
        try:
            head = self._head()
            self._check_end(last, head)
        except LedgerError as error:
            raise LedgerError(f"{error}; {_KEEP}; until then nothing leaves this silo", reason=REASON) from None
        return head

    def _unusable(self, problem: str) -> LedgerError:
        return LedgerError(f"{self.path}: {problem}; {_KEEP}; until then nothing leaves this silo", reason=REASON)

    def _head(self) -> _Mark | None:
        try:
            return _Mark.model_validate_json(self._head_path.read_bytes()[:1024])
        except FileNotFoundError:
            return None
        except ValidationError:
            raise LedgerError(f"{self._head_path}: is damaged") from None

    def _write_head(self, mark: _Mark) -> None:
        write_private(self._head_path, canonical_json(mark.model_dump()) + b"\n", durable=True)

    def _damage(self, position: int, problem: str) -> LedgerError:
        return LedgerError(f"{self.path}:{position}: {problem}")

    def _snapshot(self) -> tuple[IO[bytes] | None, int, _Mark | None]:
        """Return the file, how much of it to read, and the head: as they are between two lines being written."""
        with suppress(FileNotFoundError), _closing(os.open(self._lock_path, os.O_RDONLY)) as lock:
            fcntl.flock(lock, fcntl.LOCK_SH)
            return self._unlocked_snapshot()
        return self._unlocked_snapshot()

    def _unlocked_snapshot(self) -> tuple[IO[bytes] | None, int, _Mark | None]:
        head = self._head()
        try:
            file = self.path.open("rb")
        except FileNotFoundError:
            return None, 0, head
        return file, os.fstat(file.fileno()).st_size, head

    def _verified(self, raws: Iterator[bytes], head: _Mark | None) -> Iterator[Line]:
        before, last = _Mark(), None  # last: read, but nothing bore it out yet; before: the line in front of it
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
                    f"line {position} is incomplete: the silo stopped while it wrote it, so its message never left; "
                    "the line is cut off before the next one is written",
                )
            try:
                found = _Read(position, _parse(raw, self.silo), _digest(raw))
            except ValueError as problem:
                raise self._damage(position, f"line {position} {problem}") from None
            raw = next(raws, b"")
            if not found.follows(last.mark if last else before):
                raise self._damage(*_diagnosis(before, last, found, self._peek(raw, position + 1), head))
            if last:
                yield last.line
                before = last.mark
            last = found
        self._check_end(last, head)
        if last:
            yield last.line

    def _peek(self, raw: bytes, position: int) -> _Read | None:
        try:
            return _Read(position, _parse(raw, self.silo), _digest(raw))
        except ValueError:
            return None

    def _check_end(self, last: _Read | None, head: _Mark | None) -> None:
        """Raise LedgerError unless the head names the last line, or, as after a crash, the one before it."""
        mark, position = (last.mark, last.position) if last else (_Mark(), 0)
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
        raise self._damage(position, f"{named}, and lines up to {mark.number} are there: one of the two was replaced")


_KEEP = (
    "move the ledger and its .head away, keep both, and find out why; a new ledger then begins with the next message"
)


def _diagnosis(
    before: _Mark, last: _Read | None, found: _Read, following: _Read | None, head: _Mark | None
) -> tuple[int, str]:
    """Return where damage is and what it looks like, for a line that does not follow the last one.

    Args:
        before: the line before the last.
        following: the line after it, or None if there is none that can be read.
        head: of the ledger.
    """
    here, number, mark = found.position, found.line.number, last.mark if last else before
    if following:
        borne_out = following.follows(found.mark)
    else:
        borne_out = head is not None and (found.mark == head or found.follows(head))
    if last and found.digest == last.digest:
        return here, f"line {here} was inserted: it repeats line {here - 1}"
    if following and following.follows(mark):
        if found.follows(following.mark):
            return here, f"lines {here} and {here + 1} were reordered: line {here} has number {number}"
        return here, f"line {here} was inserted: line {here + 1} is the one that follows line {here - 1}"
    if last and found.follows(before):
        if borne_out and head != before:
            return here - 1, f"line {here - 1} was inserted: line {here} is the one that follows line {here - 2}"
        return here, f"line {here - 1} or {here} was inserted: both have the number {number}"
    if found.line.previous == mark.digest:
        return here, f"line {here} was changed: it has number {number}"
    if number == mark.number + 1:
        if last and borne_out:
            return here - 1, f"line {here - 1} was changed: line {here} has another digest of it"
        if last and following is None and head is None:
            return here, f"line {here - 1} or {here} was changed: line {here} has another digest of line {here - 1}"
        return here, f"line {here} was changed: it has another digest of the line before it"
    if number <= mark.number:
        return here, f"lines were reordered or inserted: number {number} comes after number {mark.number}"
    if following and following.line.number < number:
        return here, f"lines were reordered: number {number} comes before number {following.line.number}"
    missing = f"line {here} is" if number == here + 1 else f"lines {here} to {number - 1} are"
    return here, f"{missing} missing " + (f"after line {here - 1}" if last else f"before line {number}")


def _parse(raw: bytes, silo: str) -> Line:
    """Return a line, or raise ValueError with what is wrong with it."""
    try:
        check_size(raw, HEADER_CHARACTERS)
        line = Line.model_validate_json(raw[:-1])
    except ValidationError as error:
        problem = error.errors(include_url=False, include_input=False)[0]
        if problem["type"] == "json_invalid":
            raise ValueError("is not JSON") from None
        key = ".".join(str(part) for part in problem["loc"]) or "it"
        raise ValueError(one_line(f"is not a line of a ledger: {key}: {problem['msg']}", 1000)) from None
    if line.serialised() != raw:
        raise ValueError("was changed: it is not in canonical form")
    if line.silo != silo:
        raise ValueError(f"is of the silo {line.silo!r}, and this is the ledger of {silo!r}")
    return line


def _digest(raw: bytes) -> str:
    return hashlib.sha256(raw.removesuffix(b"\n")).hexdigest()


def _last_line(file: int, size: int) -> tuple[bytes, int]:
    """Return the last complete line, empty if there is none, and where it ends. Reads little more than that line."""
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
    """Append a line as a whole, on the disk before this returns, or leave the file `end` bytes long, as it was."""
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
    """Yield the lines of the first `size` bytes; the last, and one that is longer than any, lack their newlines."""
    while size > 0 and (raw := file.readline(min(size, HEADER_CHARACTERS))):
        size -= len(raw)
        yield raw


@contextmanager
def _closing(descriptor: int) -> Iterator[int]:
    try:
        yield descriptor
    finally:
        os.close(descriptor)
