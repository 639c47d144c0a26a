"""What a silo was asked that had it touch its data, and what came of it.

A silo's data must not speak through its refusals: whoever may ask again and again, and hears what went wrong, reads
the data question by question. So each attempt is on the disk before the data are touched, and it has two outcomes. A
failure is final for its round, across restarts and sessions, until the silo's owner clears it with `gramfuse silo
clear`. A crash is no failure: the same request goes on where it was, and another one does not take its place.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from gramfuse_protocol.contract.plan_sections import Sha256
from gramfuse_protocol.errors import FailureError, SecurityError, disk_is_full
from gramfuse_protocol.files import write_private
from gramfuse_protocol.messages.phases import Message
from gramfuse_protocol.secure_sum.statements import Nonce

log = logging.getLogger(__name__)


class Attempt(BaseModel):
    """One attempt.

    Args:
        round: of the plan.
        session: in which the request came.
        work: what was asked: a phase, and what else tells its requests apart.
        content: digest of what was sent.
        outcome: "begun" until it is known; after a crash it stays so.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    round: int
    session: Nonce
    work: str
    content: Sha256
    outcome: Literal["begun", "done", "failed"]


_ATTEMPTS = TypeAdapter(tuple[Attempt, ...])


class Attempts:
    """All attempts under one plan.

    Args:
        path: where they are kept.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> tuple[Attempt, ...]:
        """Return all attempts, the oldest first.

        Raises:
            ValueError: if the file is damaged.
        """
        try:
            return _ATTEMPTS.validate_json(self.path.read_bytes())
        except FileNotFoundError:
            return ()

    def check(self, request: Message) -> None:
        """Raise FailureError if an attempt of the request's round failed, or if the record cannot be read."""
        try:
            failed = [attempt for attempt in self.read() if attempt.round == request.round and _failed(attempt)]
        except (OSError, ValueError) as error:
            raise FailureError(f"{self.path}: cannot be read: {_problem(error)}", phase=request.phase) from None
        if failed:
            raise FailureError(
                f"{self.path}: {failed[0].work} failed in round {request.round} before, and a failure is final; look "
                "into this silo's log, remove the cause, and clear it with: gramfuse silo clear",
                phase=request.phase,
            )

    def failed(self, request: Message) -> bool:
        """Whether an attempt of the request's round failed, or the record cannot be read."""
        try:
            self.check(request)
        except FailureError:
            return True
        return False

    @contextmanager
    def attempt(self, request: Message, work: str, content: str, *, anew: bool = False) -> Iterator[None]:
        """Note an attempt, have it done in the `with` block, and note what came of it.

        Args:
            work: what is asked; with the round, what an attempt is known by.
            content: digest of what was sent.
            anew: whether another session may bring other contents, as it does where contents are the session's own.

        Raises:
            SecurityError: if other contents came for the same work before.
            FailureError: if the block raises, whatever it raises, or if an attempt of this round failed before.
        """
        self.check(request)
        attempts = [
            attempt
            for attempt in self.read()
            if (attempt.round, attempt.work) == (request.round, work)
            and not (anew and attempt.session != request.session)
        ]
        if any(attempt.content != content for attempt in attempts):
            raise SecurityError(
                f"a second, different request for {work} came in round {request.round}; one was attempted before"
            )
        known = attempts[0] if attempts else None
        begun = known or Attempt(
            round=request.round, session=request.session, work=work, content=content, outcome="begun"
        )
        if known is None:
            self._write((*self.read(), begun))
        try:
            yield
        except Exception as error:
            if _ran_out(error):  # as a crash: the same request may be tried again
                log.exception("%s: this machine ran out of memory or disk", work)
                raise FailureError(f"{work}: {_problem(error)}", phase=request.phase) from error
            self._end(begun, "failed")
            if isinstance(error, FailureError):
                raise
            log.exception("%s failed", work)
            raise FailureError(f"{work}: {_problem(error)}", phase=request.phase) from error
        if begun.outcome != "done":
            self._end(begun, "done")

    def clear(self, number: int | None = None) -> int:
        """Forget the attempts that failed, and return how many there were.

        Args:
            number: of the round; by default all rounds. A record that cannot be read is forgotten as a whole.
        """
        try:
            attempts = self.read()
        except ValueError:
            self.path.unlink()
            return 1
        left = tuple(a for a in attempts if not (_failed(a) and number in (None, a.round)))
        if left != attempts:
            self._write(left)
        return len(attempts) - len(left)

    def _end(self, begun: Attempt, outcome: Literal["done", "failed"]) -> None:
        ended = begun.model_copy(update={"outcome": outcome})
        self._write(tuple(ended if attempt == begun else attempt for attempt in self.read()))

    def _write(self, attempts: tuple[Attempt, ...]) -> None:
        content = json.dumps([attempt.model_dump() for attempt in attempts])
        write_private(self.path, content.encode(), durable=True)


def _failed(attempt: Attempt) -> bool:
    return attempt.outcome == "failed"


def _ran_out(error: Exception) -> bool:
    """Whether memory or disk ran out; torch has an error of its own for a GPU's memory."""
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or disk_is_full(error)


def _problem(error: BaseException) -> str:
    """Say what went wrong; what pydantic says quotes what it read, so of that only the kind."""
    return "damaged" if isinstance(error, ValidationError) else f"{type(error).__name__}: {error}"
