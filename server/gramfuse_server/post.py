"""Carries requests to silos and their replies back, a bounded number at a time."""

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from flwr.app import Message as FlowerMessage
from flwr.app import RecordDict
from flwr.serverapp import Grid

from gramfuse_protocol.errors import FederationError
from gramfuse_protocol.messages import REPLIES, Message, message_type
from gramfuse_protocol.wire import Frame, pack, unpack
from gramfuse_server.records import from_record, to_record

M = TypeVar("M", bound=Message)

AWAY = 5
LOST = (3, AWAY, 8)
"""Flower's error codes for a reply that got lost, a node that is away, and a ClientApp that was killed."""

ATTEMPTS = 3
REMINDER_SECONDS = 60.0
LONG = 7 * 24 * 3600.0
"""Seconds for which Flower keeps a message: fine-tuning may take days."""


@dataclass
class _Sent(Generic[M]):
    """A request that is under way, and those of the same silo that are still to be sent."""

    silo: str
    remaining: Iterator[M]
    request: M
    attempt: int = 1
    since: float = field(default_factory=time.monotonic)
    reminded: float = 0.0

    def again(self) -> _Sent[M]:
        return _Sent(self.silo, self.remaining, self.request, self.attempt + 1)


class Post:
    """One coordinator's post.

    Args:
        grid: Flower's grid.
        record: takes one transcript entry for every message.

    Attributes:
        received: bytes that came from each silo, by phase.
        sent: bytes that went to each silo, by phase.
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
        patience: float | None = None,
        waiting_for: Callable[[str, str, float], None] = lambda silo, phase, seconds: None,
    ) -> Iterator[tuple[str, M, Message | FederationError]]:
        """Send every silo its requests, one after the other, and yield (silo, request, reply) as replies come.

        A silo's requests follow each other before the next silo's begin, where `in_flight` is the narrower.
        A reply that Flower lost is asked for again; silos answer the same request with the same reply. A silo that
        does not answer, or whose answer cannot be read, is given up: the error comes instead of its reply, and
        its other requests are not sent.

        Args:
            nodes: Flower's node id of each silo.
            in_flight: most requests under way at a time, ≥ 1.
            patience: seconds after which a silo that answered nothing is given up; None leaves it to Flower, which
                gives up nodes that are away, and workers that were killed.
            waiting_for: is told, every REMINDER_SECONDS, of a silo that has not answered yet: its name, the phase, and
                for how many seconds.
        """
        waiting = deque((silo, iter(requests[silo])) for silo in requests)
        active: dict[str, _Sent[M]] = {}
        pause = 0.02
        while waiting or active:
            while waiting and len(active) < in_flight:
                silo, remaining = waiting.popleft()
                request = next(remaining, None)
                if request is not None:
                    sent = _Sent(silo, remaining, request)
                    active[self._send(silo, nodes[silo], request)] = sent
            progress = False
            for message_id in list(active):
                for answer in self.grid.pull_messages([message_id]):
                    sent = active.pop(message_id)
                    progress = True
                    if answer.has_error() and self._worth_another_try(answer, nodes[sent.silo], sent.attempt):
                        active[self._send(sent.silo, nodes[sent.silo], sent.request)] = sent.again()
                        continue
                    reply = self._receive(sent, answer)
                    if not isinstance(reply, FederationError):
                        waiting.appendleft((sent.silo, sent.remaining))
                    yield sent.silo, sent.request, reply
                if message_id not in active:
                    continue
                sent = active[message_id]
                waited = time.monotonic() - sent.since
                if waited > sent.reminded + REMINDER_SECONDS:
                    sent.reminded = waited
                    waiting_for(sent.silo, sent.request.phase, waited)
                if patience is not None and waited > patience:
                    del active[message_id]
                    progress = True
                    yield (
                        sent.silo,
                        sent.request,
                        FederationError(
                            f"silo {sent.silo!r} gave no answer in phase {sent.request.phase!r} within {patience:.0f} s"
                        ),
                    )
            # Each look costs a request to the SuperLink, so look less often while nothing comes.
            pause = 0.02 if progress else min(1.0, pause * 1.5)
            if active and not progress:
                time.sleep(pause)

    def rename(self, label: str, silo: str) -> None:
        """Count what a node sent and received so far as a silo's, now that it said which one it is."""
        for traffic in (self.received, self.sent):
            traffic[silo] = traffic.pop(label)

    def _send(self, silo: str, node: int, request: Message) -> str:
        if self._packed is None or self._packed[0] is not request:
            frame = pack(request)
            self._packed = request, frame, to_record(frame)
        _, frame, content = self._packed
        message = FlowerMessage(content=content, dst_node_id=node, message_type=message_type(request.phase), ttl=LONG)
        self.sent[silo][request.phase] += frame.nbytes
        self._note("to", silo, request.phase, frame)
        (message_id,) = self.grid.push_messages([message])
        return str(message_id)

    def _worth_another_try(self, answer: FlowerMessage, node: int, attempt: int) -> bool:
        lost = answer.error.code in LOST and attempt < ATTEMPTS
        return lost and (answer.error.code != AWAY or node in self.grid.get_node_ids())

    def _receive(self, sent: _Sent[M], answer: FlowerMessage) -> Message | FederationError:
        silo = sent.silo
        if answer.has_error():
            return FederationError(
                f"silo {silo!r} gave no answer in phase {sent.request.phase!r} after {sent.attempt} "
                f"{'try' if sent.attempt == 1 else 'tries'}: Flower error {answer.error.code}, {answer.error.reason}"
            )
        try:
            frame = from_record(answer.content)
            reply = unpack(frame, REPLIES)
        except FederationError as error:
            return FederationError(f"silo {silo!r}: {error}")
        self.received[silo][reply.phase] += frame.nbytes
        self._note("from", silo, reply.phase, frame)
        return reply

    def _note(self, direction: str, silo: str, phase: str, frame: Frame) -> None:
        self.record({direction: silo, "phase": phase, "bytes": frame.nbytes, "sha256": frame.digest})
