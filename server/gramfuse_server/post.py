"""Carries requests to silos and their replies back, a bounded number at a time."""

from __future__ import annotations

import hashlib
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

from flwr.app import Message as FlowerMessage
from flwr.app import RecordDict
from flwr.serverapp import Grid

from gramfuse_protocol.errors import FederationError
from gramfuse_protocol.messages import REPLIES, Message
from gramfuse_protocol.wire import Frame, pack, unpack
from gramfuse_server.records import from_record, to_record

FLOWER_TYPES = {"join": "query.join", "train": "train", "upload": "query.upload", "evaluate": "evaluate"}

M = TypeVar("M", bound=Message)

LOST = (3, 5, 8)
"""Flower's error codes for a reply that got lost, a node that is away, and a ClientApp that was killed."""

ATTEMPTS = 3
LONG = 7 * 24 * 3600.0
"""Seconds for which Flower keeps a message: fine-tuning may take days."""


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
        self, nodes: Mapping[str, int], requests: Mapping[str, Iterable[M]], in_flight: int
    ) -> Iterator[tuple[str, M, Message]]:
        """Send every silo its requests, one after the other, and yield (silo, request, reply) as replies come.

        A silo's requests follow each other before the next silo's begin, where `in_flight` is the narrower.
        A reply that Flower lost is asked for again; silos answer the same request with the same reply.

        Args:
            nodes: Flower's node id of each silo.
            in_flight: most requests under way at a time, ≥ 1.

        Raises:
            FederationError: if a silo does not answer after ATTEMPTS tries, or cannot be read.
        """
        waiting = deque((silo, iter(requests[silo])) for silo in requests)
        active: dict[str, tuple[str, Iterator[M], M, int]] = {}
        pause = 0.02
        while waiting or active:
            while waiting and len(active) < in_flight:
                silo, remaining = waiting.popleft()
                request = next(remaining, None)
                if request is not None:
                    active[self._send(silo, nodes[silo], request)] = (silo, remaining, request, 1)
            progress = False
            for message_id in list(active):
                for answer in self.grid.pull_messages([message_id]):
                    silo, remaining, request, attempt = active.pop(message_id)
                    progress = True
                    if answer.has_error():
                        if answer.error.code not in LOST or attempt == ATTEMPTS:
                            raise FederationError(
                                f"silo {silo!r} gave no answer in phase {request.phase!r} after {attempt} "
                                f"{'try' if attempt == 1 else 'tries'}: Flower error {answer.error.code}, "
                                f"{answer.error.reason}"
                            )
                        active[self._send(silo, nodes[silo], request)] = (silo, remaining, request, attempt + 1)
                        continue
                    reply = self._receive(silo, answer)
                    waiting.appendleft((silo, remaining))
                    yield silo, request, reply
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
        message = FlowerMessage(content=content, dst_node_id=node, message_type=FLOWER_TYPES[request.phase], ttl=LONG)
        self.sent[silo][request.phase] += frame.nbytes
        self._note("to", silo, request.phase, frame)
        (message_id,) = self.grid.push_messages([message])
        return str(message_id)

    def _receive(self, silo: str, answer: FlowerMessage) -> Message:
        try:
            frame = from_record(answer.content)
            reply = unpack(frame, REPLIES)
        except FederationError as error:
            raise FederationError(f"silo {silo!r}: {error}") from None
        self.received[silo][reply.phase] += frame.nbytes
        self._note("from", silo, reply.phase, frame)
        return reply

    def _note(self, direction: str, silo: str, phase: str, frame: Frame) -> None:
        digest = hashlib.sha256(frame.header.encode())
        for buffer in frame.buffers:
            digest.update(buffer.data)
        self.record({direction: silo, "phase": phase, "bytes": frame.nbytes, "sha256": digest.hexdigest()})
