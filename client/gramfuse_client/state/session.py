"""What a silo keeps of one session of the secure sum: its secrets, and what it answered.

One file holds all of it and is replaced as a whole before the reply that depends on it leaves, so a silo that is
killed at any moment either answered nothing or gives the same answer again. Files are 0600 in a directory 0700.
What is wiped is deleted; neither CPython nor a file system promises that no copy of it is left.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from gramfuse_protocol.errors import RefusalError, SecurityError
from gramfuse_protocol.files import make_private_directory, write_private
from gramfuse_protocol.messages.phases import REPLIES, Message
from gramfuse_protocol.messages.wire import pack
from gramfuse_protocol.secure_sum.member import Member
from gramfuse_protocol.secure_sum.statements import Sum


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, hide_input_in_errors=True)


class Answer(_Frozen):
    """A request, by its digest, and the reply that it got, as JSON."""

    request: str
    reply: str = ""


class Record(_Frozen):
    """All that is kept.

    Args:
        member: state of the secure sum; None before the keys are made and after the last sum is open.
        answers: by phase and sum.
        round: of the plan, that the session belongs to.
        data: digest of the data that the masked statistics were measured on; empty before they are masked.
        rows: what the rows of the masked statistics are kept by.
        start: digest of the model that they start from; empty before keys are made, and in the first round.
        ended: why nothing leaves in this session any more, or None.
    """

    member: Member | None = None
    answers: Mapping[str, Answer] = {}
    round: int = 1
    data: str = ""
    rows: str = ""
    start: str = ""
    ended: str | None = None

    def released(self, name: Sum) -> bool:
        """Whether this silo released what opens a sum."""
        return answer_key("unmask", name) in self.answers


class Session:
    """One session on a silo's disk.

    Args:
        directory: its own, under the plan's state.
        number: of the round that it must belong to.
    """

    def __init__(self, directory: Path, number: int = 1) -> None:
        self.directory = directory
        self.round = number

    @property
    def exists(self) -> bool:
        """Whether this silo joined the session."""
        return self._file.exists()

    @property
    def begun(self) -> bool:
        """Whether anything was answered in the session, so that it may hold secrets; also if it cannot be read."""
        try:
            return self.exists and bool(self._read().answers)
        except ValueError:
            return True

    def begin(self) -> None:
        """Begin the session, unless it is under way already.

        Raises:
            RefusalError: if it is over.
        """
        if self.exists:
            self.read()
            return
        make_private_directory(self.directory)
        self.write(Record(round=self.round))

    def read(self) -> Record:
        """Return what is kept.

        Raises:
            RefusalError: if the session is over, or was never joined.
            SecurityError: if it is a session of another round.
            ValueError: if the file is damaged, or another version's.
        """
        record = self._read()
        if record.ended is not None:
            raise RefusalError(
                f"{self.directory}: this session is over: {record.ended}", reason="the session is over at this silo"
            )
        if record.round != self.round:
            raise SecurityError(f"a message of round {self.round} came in a session of round {record.round}")
        return record

    def write(self, record: Record) -> None:
        """Replace what is kept, as a whole, and have it on the disk before returning."""
        write_private(self._file, record.model_dump_json().encode(), durable=True)

    def end(self, why: str) -> None:
        """Wipe secrets and masked vectors; nothing leaves in this session any more."""
        for pattern in ("*.masked*", "*.partial"):  # a write that was interrupted may have left secrets
            for path in self.directory.glob(pattern):
                path.unlink(missing_ok=True)
        if self.exists and not self._over():
            self.write(Record(ended=why))

    def _over(self) -> bool:
        try:
            return self._read().ended is not None
        except ValueError:  # what cannot be read may still hold secrets
            return False

    def masked(self, name: Sum) -> Path:
        """Where the masked vector of a sum is kept."""
        return self.directory / f"{name}.masked"

    @property
    def _file(self) -> Path:
        return self.directory / "session.json"

    def _read(self) -> Record:
        try:
            return Record.model_validate_json(self._file.read_bytes())
        except FileNotFoundError:
            raise RefusalError(
                f"{self.directory}: a message came for a session that this silo did not join", reason="not joined"
            ) from None


def answer_key(phase: str, name: Sum) -> str:
    """Return under what the answer of a phase that comes once for each sum is kept."""
    return f"{phase}:{name}"


def answered(record: Record, key: str, request: Message) -> Message | None:
    """Return the reply that this request got before, or None if nothing with this key was asked yet.

    Raises:
        SecurityError: if another request with this key was answered.
    """
    answer = record.answers.get(key)
    if answer is None:
        return None
    if answer.request != pack(request).digest:
        raise SecurityError(f"a second, different request of phase {request.phase!r} came")
    return REPLIES[request.phase].model_validate_json(answer.reply)


def with_answer(record: Record, key: str, request: Message, reply: Message, **changes: Any) -> Record:
    """Return the record with a reply noted, and other changes."""
    answer = Answer(request=pack(request).digest, reply=reply.model_dump_json())
    return record.model_copy(update={"answers": {**record.answers, key: answer}, **changes})
