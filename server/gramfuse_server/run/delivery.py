"""Sends requests to silos and collects their replies, a bounded number at a time."""

from __future__ import annotations

import logging
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from flwr.app import Message as FlowerMessage
from flwr.app import RecordDict
from flwr.serverapp import Grid

from gramfuse_protocol.errors import FederationError, GramfuseError
from gramfuse_protocol.messages.flower_records import from_record, to_record
from gramfuse_protocol.messages.phases import REPLIES, Message, message_type
from gramfuse_protocol.messages.wire import Frame, pack, unpack
from gramfuse_protocol.text import QUOTE_LIMIT, one_line
from gramfuse_server.run.patience import (
    ATTEMPTS,
    FIRST_PAUSE,
    LONGEST_PAUSE,
    LOOK_SECONDS,
    REMINDER_SECONDS,
    Patience,
)

M = TypeVar("M", bound=Message)

CheckReply = Callable[[str, M, Message], None]
"""Takes a silo, a request and its reply, and raises if the reply is invalid."""

log = logging.getLogger(__name__)

LOST = (3, 5, 8)
"""Flower's error codes for a lost reply, an unavailable node, and a killed ClientApp."""

LONG = 7 * 24 * 3600.0
"""Seconds for which Flower keeps a message: fine-tuning can take days."""


@dataclass(frozen=True)
class Pending:
    """A silo that has not answered yet.

    Args:
        seconds: how long it has been pending.
        away: whether its node is disconnected.
    """

    silo: str
    phase: str
    seconds: float
    away: bool


@dataclass(eq=False)
class _Sent(Generic[M]):
    """A request in flight or waiting for its node, and the silo's requests after it.

    Args:
        ids: Flower's ids of the messages that carried it; any may be answered. Empty: Flower did not accept it.
        activated: when the node was started, if known.
    """

    silo: str
    remaining: Iterator[M]
    request: M
    attempt: int = 1
    ids: list[str] = field(default_factory=list)
    activated: str | None = None
    since: float = field(default_factory=time.monotonic)
    reminded: float = 0.0

    def retry(self) -> _Sent[M]:
        """Return the next attempt, not sent yet."""
        return _Sent(self.silo, self.remaining, self.request, self.attempt + 1)

    def failed(self, why: str) -> FederationError:
        """Return the error for a request that failed on every attempt."""
        return FederationError(
            f"silo {self.silo!r} did not answer in phase {self.request.phase!r} after {self.attempt} "
            f"{'try' if self.attempt == 1 else 'tries'}: {why}"
        )

    def timed_out(
        self, patience: Patience, waiting_for: Callable[[Pending], None], *, away: bool
    ) -> FederationError | None:
        """Return the error if the silo has timed out, else None; sends due reminders."""
        phase, waited = self.request.phase, time.monotonic() - self.since
        limit = patience.allowed(away=away)
        if limit is not None and waited > limit:
            if away:
                return FederationError(
                    f"silo {self.silo!r} disconnected in phase {phase!r} and was not back within {limit:.0f} s"
                )
            return FederationError(f"silo {self.silo!r} did not answer in phase {phase!r} within {limit:.0f} s")
        if waited > max(REMINDER_SECONDS, 2 * self.reminded):
            self.reminded = waited
            waiting_for(Pending(self.silo, phase, waited, away))
        return None


class Post:
    """Sends a coordinator's requests through Flower, collects the replies, and counts the traffic.

    Args:
        grid: Flower's grid.
        record: takes one transcript entry for every message.

    Attributes:
        received: bytes received from each silo, by phase.
        sent: bytes sent to each silo, by phase.
    """

    def __init__(self, grid: Grid, record: Callable[[dict[str, Any]], None]) -> None:
        self.grid = grid
        self.record = record
        self.received: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
        self.sent: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
        self._packed: tuple[Message, Frame, RecordDict] | None = None

    def exchange(
        self,
        nodes: Mapping[str, int],
        requests: Mapping[str, Iterable[M]],
        in_flight: int,
        *,
        check: CheckReply[M] = lambda silo, request, reply: None,
        patience: Patience = Patience(),  # noqa: B008 - frozen
        waiting_for: Callable[[Pending], None] = lambda pending: None,
    ) -> Iterator[tuple[str, M, Message | GramfuseError]]:
        """Send every silo its requests in sequence, and yield (silo, request, reply) as replies arrive.

        If `in_flight` is less than the number of silos, a silo's requests are all served before the next silo's.
        A request whose reply Flower lost is sent again once the silo's node is connected; silos answer the same request
        with the same reply. Requests to a restarted node are sent again too: Flower reports a request as lost only
        while the node is away, not once it is back. A silo that times out, or whose reply is unreadable or fails the
        check, is given up: the error is yielded instead of its reply, and its remaining requests are not sent.

        Args:
            nodes: Flower's node id of each silo.
            in_flight: most concurrent requests, ≥ 1.
            check: validates a reply; any exception from it gives up the silo.
            patience: when a silo that does not answer is given up.
            waiting_for: called for a silo that has not answered after REMINDER_SECONDS, twice that, and so on.
        """
        transfer = _Transfer(self, nodes, requests, in_flight, check, patience, waiting_for)
        pause = FIRST_PAUSE
        while transfer:
            transfer.progress = False
            yield from transfer.step()
            # Each step sends requests to the SuperLink, so poll less often while nothing arrives.
            pause = FIRST_PAUSE if transfer.progress else min(LONGEST_PAUSE, pause * 1.5)
            if transfer and not transfer.progress:
                time.sleep(pause)

    def rename(self, label: str, silo: str) -> None:
        """Attribute the traffic of a node so far to a silo, once the node has identified itself."""
        for traffic in (self.received, self.sent):
            traffic[silo] = traffic.pop(label)

    def send(self, sent: _Sent[M], nodes: Mapping[str, int], activated: Mapping[int, str]) -> None:
        """Send a request, or send it again."""
        request, node = sent.request, nodes[sent.silo]
        if self._packed is None or self._packed[0] is not request:
            frame = pack(request)
            self._packed = request, frame, to_record(frame)
        _, frame, content = self._packed
        message = FlowerMessage(content=content, dst_node_id=node, message_type=message_type(request.phase), ttl=LONG)
        self.sent[sent.silo][request.phase] += frame.nbytes
        self._record("to", sent.silo, request.phase, frame)
        sent.ids += [str(message_id) for message_id in self.grid.push_messages([message]) if message_id]
        sent.activated = activated.get(node)

    def pull(self, sent: _Sent[M]) -> FlowerMessage | Exception | None:
        """Return an answer, the exception that Flower raised while decoding it, or None if there is none yet.

        A lost message is returned as an answer only if no other copy of the request can still be answered.
        """
        for message_id in list(sent.ids):
            try:
                answers = list(self.grid.pull_messages([message_id]))
            except Exception as error:  # noqa: BLE001  # Flower decodes untrusted bytes here
                self.activated()  # raises if the cause is that the SuperLink does not answer
                return error
            for answer in answers:
                sent.ids.remove(message_id)
                if not (sent.ids and _is_lost(answer)):
                    return answer
        return None

    def activated(self) -> dict[int, str]:
        """Return the start time of each connected node, as Flower writes it, by node id."""
        return {node.node_id: node.last_activated_at for node in self.grid.get_nodes()}

    def receive(
        self, sent: _Sent[M], answer: FlowerMessage | Exception, check: CheckReply[M]
    ) -> Message | GramfuseError:
        """Return the reply in an answer, or the error if it is not a valid one.

        This is the only place that decodes and checks what a silo sent. Nothing in the `try` touches the disk or the
        network, so the silo is to blame for anything raised there.
        """
        silo, phase = sent.silo, sent.request.phase
        reply: Message | None = None
        result: Message | GramfuseError
        try:
            if isinstance(answer, Exception):
                raise answer
            if answer.has_error():
                return sent.failed(f"Flower error {answer.error.code}, {one_line(answer.error.reason, QUOTE_LIMIT)}")
            frame = from_record(answer.content)
            result = reply = unpack(frame, REPLIES)
            check(silo, sent.request, reply)
        except Exception as error:
            if not isinstance(error, GramfuseError):
                log.exception("silo %s, phase %s: its answer cannot be decoded or checked", silo, phase)
                error = FederationError(f"a message cannot be read: {type(error).__name__}")
            result = error if reply else FederationError(f"silo {silo!r}: {one_line(str(error), QUOTE_LIMIT)}")
        if reply is not None:
            self.received[silo][reply.phase] += frame.nbytes
            self._record("from", silo, reply.phase, frame)
        return result

    def _record(self, direction: str, silo: str, phase: str, frame: Frame) -> None:
        self.record({direction: silo, "phase": phase, "bytes": frame.nbytes, "sha256": frame.digest})


class _Transfer(Generic[M]):
    """The requests of one `Post.exchange`: queued, in flight, or lost and to be sent again.

    Args:
        post, nodes, requests, in_flight, check, patience, waiting_for: as in `Post.exchange`.

    Attributes:
        progress: whether the last step sent or received anything.
    """

    def __init__(
        self,
        post: Post,
        nodes: Mapping[str, int],
        requests: Mapping[str, Iterable[M]],
        in_flight: int,
        check: CheckReply[M],
        patience: Patience,
        waiting_for: Callable[[Pending], None],
    ) -> None:
        self.post = post
        self.nodes = nodes
        self.in_flight = in_flight
        self.check = check
        self.patience = patience
        self.waiting_for = waiting_for
        self.progress = False
        self._waiting = deque((silo, iter(requests[silo])) for silo in requests)
        self._active: list[_Sent[M]] = []
        self._lost: list[_Sent[M]] = []
        self._refresh_nodes()

    def __bool__(self) -> bool:
        return bool(self._waiting or self._active or self._lost)

    def step(self) -> Iterator[tuple[str, M, Message | GramfuseError]]:
        """Send requests up to the limit, and yield (silo, request, reply) of the finished ones."""
        while self._waiting and len(self._active) < self.in_flight:
            silo, remaining = self._waiting.popleft()
            request = next(remaining, None)
            if request is not None:
                self._send(_Sent(silo, remaining, request))
        yield from self._retry_rejected()
        yield from self._collect_answers()
        yield from self._resend_after_restart()
        yield from self._resend_lost()

    def _retry_rejected(self) -> Iterator[tuple[str, M, GramfuseError]]:
        """Retry requests that Flower did not accept, for example because the node was revoked."""
        for sent in [sent for sent in self._active if not sent.ids]:
            self._active.remove(sent)
            self.progress = True
            if sent.attempt < ATTEMPTS:
                self._lost.append(sent.retry())
            else:
                yield sent.silo, sent.request, sent.failed("Flower did not accept the request; see its log")

    def _collect_answers(self) -> Iterator[tuple[str, M, Message | GramfuseError]]:
        for sent in list(self._active):
            answer = self.post.pull(sent)
            if answer is not None:
                self._active.remove(sent)
                self.progress = True
                if _is_lost(answer) and sent.attempt < ATTEMPTS:
                    self._lost.append(sent.retry())
                    continue
                reply = self.post.receive(sent, answer, self.check)
                if not isinstance(reply, GramfuseError):
                    self._waiting.appendleft((sent.silo, sent.remaining))
                yield sent.silo, sent.request, reply
            elif error := sent.timed_out(self.patience, self.waiting_for, away=False):
                self._active.remove(sent)
                yield sent.silo, sent.request, error

    def _resend_after_restart(self) -> Iterator[tuple[str, M, GramfuseError]]:
        """Resend requests to nodes that were restarted since."""
        if not self._active or time.monotonic() <= self._refreshed + LOOK_SECONDS:
            return
        self._refresh_nodes()
        for sent in list(self._active):
            if self._activated.get(self.nodes[sent.silo], sent.activated) == sent.activated:
                continue
            self._active.remove(sent)
            if sent.attempt < ATTEMPTS:
                sent.attempt += 1
                self._send(sent)
            else:
                yield sent.silo, sent.request, sent.failed("its node was restarted each time")

    def _resend_lost(self) -> Iterator[tuple[str, M, GramfuseError]]:
        """Resend lost requests once their nodes are back, and give up nodes that stay away too long."""
        if self._lost:
            self._activated = self.post.activated()
        for sent in list(self._lost):
            if self.nodes[sent.silo] in self._activated:
                sent.since, sent.reminded = time.monotonic(), 0.0
                self._send(sent)
            elif error := sent.timed_out(self.patience, self.waiting_for, away=True):
                yield sent.silo, sent.request, error
            else:
                continue
            self._lost.remove(sent)
            self.progress = True

    def _send(self, sent: _Sent[M]) -> None:
        self.post.send(sent, self.nodes, self._activated)
        self._active.append(sent)

    def _refresh_nodes(self) -> None:
        self._activated, self._refreshed = self.post.activated(), time.monotonic()


def _is_lost(answer: FlowerMessage | Exception) -> bool:
    """Whether an answer is Flower's error for a lost message."""
    return not isinstance(answer, Exception) and answer.has_error() and answer.error.code in LOST
