"""Stores one session of the secure sum at a silo: its secrets and its answers.

One file holds everything, and is replaced atomically before a reply that depends on it leaves. So a silo that is killed
at any moment has either answered nothing, or gives the same answer again. Files have mode 0600, in a directory with
mode 0700. To wipe is to delete; neither CPython nor a file system guarantees that no copy remains.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gramfuse_protocol.errors import RefusalError, SecurityError
from gramfuse_protocol.files import make_private_directory, write_private
from gramfuse_protocol.frozen import Frozen
from gramfuse_protocol.messages.phases import REPLIES, Message
from gramfuse_protocol.messages.wire import pack
from gramfuse_protocol.secure_sum.member import Member
from gramfuse_protocol.secure_sum.statements import Sum


class Answer(Frozen):
    """A request's digest, and its reply as JSON."""

    request: str
    reply: str = ""


class Record(Frozen):
    """The stored state of a session.

    Args:
        member: state of the secure sum; None before the keys are made, and after the last sum is unmasked.
        answers: answers by phase and sum.
        round: the plan's round that the session belongs to.
        data: digest of the data behind the masked statistics; empty before masking.
        rows: digest of the rows behind the masked statistics.
        start: digest of the model that the statistics start from; empty before the keys are made, and in the first
            round.
        ended: why the session ended and nothing leaves in it any more, or None.
    """

    member: Member | None = None
    answers: Mapping[str, Answer] = {}
    round: int = 1
    data: str = ""
    rows: str = ""
    start: str = ""
    ended: str | None = None

    def released(self, name: Sum) -> bool:
        """Return whether this silo released its shares to unmask a sum."""
        return answer_key("unmask", name) in self.answers


class Session:
    """One session on a silo's disk.

    Args:
        directory: the session's own directory, under the plan's state.
        number: the round that it must belong to.
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
        """Whether the session has answers, so that it may hold secrets; true also if it cannot be read."""
        try:
            return self.exists and bool(self._read().answers)
        except ValueError:
            return True

    def begin(self) -> None:
        """Begin the session, unless it has begun already.

        Raises:
            RefusalError: if it is over.
        """
        if self.exists:
            self.read()
            return
        make_private_directory(self.directory)
        self.write(Record(round=self.round))

    def read(self) -> Record:
        """Return the record.

        Raises:
            RefusalError: if the session is over, or was never joined.
            SecurityError: if it belongs to another round.
            ValueError: if the file is damaged, or from another version.
        """
        record = self._read()
        if record.ended is not None:
            raise RefusalError(
                f"{self.directory}: this session is over: {record.ended}", reason="the session is over at this silo"
            )
        if record.round != self.round:
            raise SecurityError(f"a message of exchange {self.round} came in a session of exchange {record.round}")
        return record

    def write(self, record: Record) -> None:
        """Replace the record atomically, and sync it to disk before returning."""
        write_private(self._file, record.model_dump_json().encode(), durable=True)

    def end(self, why: str) -> None:
        """End the session: wipe secrets and masked vectors, so that nothing leaves in it any more."""
        for pattern in ("*.masked*", "*.partial"):  # an interrupted write may have left secrets
            for path in self.directory.glob(pattern):
                path.unlink(missing_ok=True)
        if self.exists and not self._over():
            self.write(Record(ended=why))

    def _over(self) -> bool:
        try:
            return self._read().ended is not None
        except ValueError:  # a damaged file may still hold secrets
            return False

    def masked(self, name: Sum) -> Path:
        """Return the path of a sum's masked vector."""
        return self.directory / f"{name}.masked"

    @property
    def _file(self) -> Path:
        return self.directory / "session.json"

    def _read(self) -> Record:
        try:
            return Record.model_validate_json(self._file.read_bytes())
        except FileNotFoundError:
            raise RefusalError(
                f"{self.directory}: the coordinator sent a message for a session that this silo did not join",
                reason="not joined",
            ) from None


def answer_key(phase: str, name: Sum) -> str:
    """Return the key in `Record.answers` for a phase that occurs once per sum."""
    return f"{phase}:{name}"


def answered(record: Record, key: str, request: Message) -> Message | None:
    """Return the earlier reply to this request, or None if no request with this key was answered.

    Raises:
        SecurityError: if a different request with this key was answered.
    """
    answer = record.answers.get(key)
    if answer is None:
        return None
    if answer.request != pack(request).digest:
        raise SecurityError(f"the coordinator sent a second, different request of phase {request.phase!r}")
    return REPLIES[request.phase].model_validate_json(answer.reply)


def with_answer(record: Record, key: str, request: Message, reply: Message, **changes: Any) -> Record:
    """Return the record with a reply added, and other fields changed."""
    answer = Answer(request=pack(request).digest, reply=reply.model_dump_json())
    return record.model_copy(update={"answers": {**record.answers, key: answer}, **changes})
