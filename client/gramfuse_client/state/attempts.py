"""Records the requests for which a silo touches its data, and their outcomes.

A silo's refusals must not leak its data: someone who could ask again and again, and learn what went wrong, could read
the data question by question. So each attempt is written to disk before the data are touched. A failure is final for
its round, across restarts and sessions, until the silo's owner clears it with `gramfuse silo clear`. A crash is not a
failure: the same request can be repeated, but a different one cannot replace it.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from pydantic import TypeAdapter, ValidationError

from gramfuse_protocol.contract.plan_sections import Sha256
from gramfuse_protocol.errors import FailureError, SecurityError, disk_is_full
from gramfuse_protocol.files import write_private
from gramfuse_protocol.frozen import Frozen
from gramfuse_protocol.messages.phases import Message
from gramfuse_protocol.secure_sum.statements import Nonce

log = logging.getLogger(__name__)


class Attempt(Frozen):
    """One attempt.

    Args:
        round: the plan's round.
        session: nonce of the request's session.
        work: the work requested: a phase, and whatever else distinguishes its requests.
        content: digest of the request's content.
        outcome: "begun" until the outcome is known; it stays so after a crash.
    """

    round: int
    session: Nonce
    work: str
    content: Sha256
    outcome: Literal["begun", "done", "failed"]


_ATTEMPTS = TypeAdapter(tuple[Attempt, ...])


class Attempts:
    """All attempts under one plan.

    Args:
        path: the file.
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
        """Raise FailureError if an attempt in the request's round failed, or the record cannot be read."""
        try:
            failed = [attempt for attempt in self.read() if attempt.round == request.round and _failed(attempt)]
        except (OSError, ValueError) as error:
            raise FailureError(f"{self.path}: cannot be read: {_problem(error)}", phase=request.phase) from None
        if failed:
            raise FailureError(
                f"{self.path}: {failed[0].work} failed earlier in exchange {request.round}, and a failure is final; "
                "look into this silo's log, remove the cause, and clear it with: gramfuse silo clear",
                phase=request.phase,
            )

    def failed(self, request: Message) -> bool:
        """Return whether an attempt in the request's round failed, or the record cannot be read."""
        try:
            self.check(request)
        except FailureError:
            return True
        return False

    @contextmanager
    def attempt(self, request: Message, work: str, content: str, *, anew: bool = False) -> Iterator[None]:
        """Record an attempt, run the `with` block, and record its outcome.

        Args:
            work: the work requested; with the round, it identifies the attempt.
            content: digest of the request's content.
            anew: allow other content in another session, for content that is specific to a session.

        Raises:
            SecurityError: if other content was sent for the same work before.
            FailureError: if the block raises any exception, or an attempt in this round failed before.
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
                f"the coordinator sent a second, different request for {work} in exchange {request.round}, after one "
                "was attempted"
            )
        earlier = attempts[0] if attempts else None
        begun = earlier or Attempt(
            round=request.round, session=request.session, work=work, content=content, outcome="begun"
        )
        if earlier is None:
            self._write((*self.read(), begun))
        try:
            yield
        except Exception as error:
            if _ran_out(error):  # like a crash: the same request can be tried again
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
        """Forget failed attempts, and return how many there were. A record that cannot be read is deleted.

        Args:
            number: the round; by default all rounds.
        """
        try:
            attempts = self.read()
        except ValueError:
            self.path.unlink()
            return 1
        remaining = tuple(a for a in attempts if not (_failed(a) and number in (None, a.round)))
        if remaining != attempts:
            self._write(remaining)
        return len(attempts) - len(remaining)

    def _end(self, begun: Attempt, outcome: Literal["done", "failed"]) -> None:
        ended = begun.model_copy(update={"outcome": outcome})
        self._write(tuple(ended if attempt == begun else attempt for attempt in self.read()))

    def _write(self, attempts: tuple[Attempt, ...]) -> None:
        content = json.dumps([attempt.model_dump() for attempt in attempts])
        write_private(self.path, content.encode(), durable=True)


def _failed(attempt: Attempt) -> bool:
    return attempt.outcome == "failed"


def _ran_out(error: Exception) -> bool:
    """Return whether memory or disk ran out; torch has its own error for GPU memory."""
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or disk_is_full(error)


def _problem(error: BaseException) -> str:
    """Describe an error; not in pydantic's words, because they quote the input."""
    return "damaged" if isinstance(error, ValidationError) else f"{type(error).__name__}: {error}"
