"""Carries requests to silos and their replies back, a bounded number at a time."""

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
from gramfuse_server.run.patience import Patience

M = TypeVar("M", bound=Message)

CheckReply = Callable[[str, M, Message], None]
"""Takes a silo, a request and its reply, and raises if the reply is not what it must be."""

log = logging.getLogger(__name__)

LOST = (3, 5, 8)
"""Flower's error codes for a reply that got lost, a node that is away, and a ClientApp that was killed."""

ATTEMPTS = 3
LOOK_SECONDS = 5.0
"""How often to look whether a node that is waited for was started anew."""

REMINDER_SECONDS = 60.0

LONG = 7 * 24 * 3600.0
"""Seconds for which Flower keeps a message: fine-tuning may take days."""


@dataclass(frozen=True)
class Pending:
    """A silo that has not answered yet.

    Args:
        seconds: for how long.
        away: whether its node is not connected.
    """

    silo: str
    phase: str
    seconds: float
    away: bool


@dataclass(eq=False)
class _Sent(Generic[M]):
    """A request that is under way, or waits for its node, and those of the same silo that are still to be sent.

    Args:
        ids: Flower's ids of the messages that it went out in; any may be answered. None: Flower did not take it.
        activated: when the node was started, as far as it is known.
    """

    silo: str
    remaining: Iterator[M]
    request: M
    attempt: int = 1
    ids: list[str] = field(default_factory=list)
    activated: str | None = None
    since: float = field(default_factory=time.monotonic)
    reminded: float = 0.0

    def again(self) -> _Sent[M]:
        """Return it as one that waits to be sent once more."""
        return _Sent(self.silo, self.remaining, self.request, self.attempt + 1)

    def no_answer(self, why: str) -> FederationError:
        """Return that all tries were for nothing."""
        return FederationError(
            f"silo {self.silo!r} gave no answer in phase {self.request.phase!r} after {self.attempt} "
            f"{'try' if self.attempt == 1 else 'tries'}: {why}"
        )

    def given_up(
        self, patience: Patience, waiting_for: Callable[[Pending], None], *, away: bool
    ) -> FederationError | None:
        """Return why the silo is given up, or None as long as it is not."""
        phase, waited = self.request.phase, time.monotonic() - self.since
        after = patience.allowed(away=away)
        if after is not None and waited > after:
            if away:
                return FederationError(
                    f"silo {self.silo!r} went away in phase {phase!r} and was not back within {after:.0f} s"
                )
            return FederationError(f"silo {self.silo!r} gave no answer in phase {phase!r} within {after:.0f} s")
        if waited > max(REMINDER_SECONDS, 2 * self.reminded):
            self.reminded = waited
            waiting_for(Pending(self.silo, phase, waited, away))
        return None


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
        *,
        check: CheckReply[M] = lambda silo, request, reply: None,
        patience: Patience = Patience(),  # noqa: B008 - frozen
        waiting_for: Callable[[Pending], None] = lambda pending: None,
    ) -> Iterator[tuple[str, M, Message | GramfuseError]]:
        """Send every silo its requests, one after the other, and yield (silo, request, reply) as replies come.

        A silo's requests follow each other before the next silo's begin, where `in_flight` is the narrower.
        A reply that Flower lost is asked for again, once the silo's node is connected; silos answer the same request
        with the same reply. So is a reply of a node that was started anew: Flower says that a request is lost only to
        whoever asks while the node is away, and not once it is back. A silo that does not answer, or whose answer
        cannot be read or does not pass the check, is given up: the error comes instead of its reply, and its other
        requests are not sent.

        Args:
            nodes: Flower's node id of each silo.
            in_flight: most requests under way at a time, ≥ 1.
            check: whatever it raises is the silo's loss, whether it was raised on purpose or not.
            patience: when a silo that does not answer is given up.
            waiting_for: is told of a silo that has not answered yet, after REMINDER_SECONDS, twice that, and so on.
        """
        under_way = _UnderWay(self, nodes, requests, in_flight, check, patience, waiting_for)
        pause = 0.02
        while under_way:
            under_way.progress = False
            yield from under_way.step()
            # Each look costs a request to the SuperLink, so look less often while nothing comes.
            pause = 0.02 if under_way.progress else min(1.0, pause * 1.5)
            if under_way and not under_way.progress:
                time.sleep(pause)

    def rename(self, label: str, silo: str) -> None:
        """Count what a node sent and received so far as a silo's, now that it said which one it is."""
        for traffic in (self.received, self.sent):
            traffic[silo] = traffic.pop(label)

    def send(self, sent: _Sent[M], nodes: Mapping[str, int], activated: Mapping[int, str]) -> None:
        """Send a request, or send it once more."""
        request, node = sent.request, nodes[sent.silo]
        if self._packed is None or self._packed[0] is not request:
            frame = pack(request)
            self._packed = request, frame, to_record(frame)
        _, frame, content = self._packed
        message = FlowerMessage(content=content, dst_node_id=node, message_type=message_type(request.phase), ttl=LONG)
        self.sent[sent.silo][request.phase] += frame.nbytes
        self._note("to", sent.silo, request.phase, frame)
        sent.ids += [str(found) for found in self.grid.push_messages([message]) if found]
        sent.activated = activated.get(node)

    def pull(self, sent: _Sent[M]) -> FlowerMessage | Exception | None:
        """Return an answer, or why Flower could not put it together.

        That a message was lost is an answer only if no other can be answered.
        """
        for message_id in list(sent.ids):
            try:
                answers = list(self.grid.pull_messages([message_id]))
            except Exception as error:  # noqa: BLE001  # Flower takes apart here what the silo's node sent
                self.activated()  # if it is the SuperLink that does not answer, this says so
                return error
            for answer in answers:
                sent.ids.remove(message_id)
                if not (sent.ids and _is_lost(answer)):
                    return answer
        return None

    def activated(self) -> dict[int, str]:
        """Return the nodes that are connected, and when each was started, in Flower's words."""
        return {node.node_id: node.last_activated_at for node in self.grid.get_nodes()}

    def receive(
        self, sent: _Sent[M], answer: FlowerMessage | Exception, check: CheckReply[M]
    ) -> Message | GramfuseError:
        """Return the reply that an answer is, or why it is none.

        Here, and nowhere else, what a silo sent is decoded, read and checked; nothing in the `try` touches the disk or
        the network, so whatever is raised there is due to the silo.
        """
        silo, phase = sent.silo, sent.request.phase
        reply: Message | None = None
        found: Message | GramfuseError
        try:
            if isinstance(answer, Exception):
                raise answer
            if answer.has_error():
                return sent.no_answer(f"Flower error {answer.error.code}, {one_line(answer.error.reason, QUOTE_LIMIT)}")
            frame = from_record(answer.content)
            found = reply = unpack(frame, REPLIES)
            check(silo, sent.request, reply)
        except Exception as error:
            if not isinstance(error, GramfuseError):
                log.exception("silo %s, phase %s: its answer broke what reads it", silo, phase)
                error = FederationError(f"a message cannot be read: {type(error).__name__}")
            found = error if reply else FederationError(f"silo {silo!r}: {one_line(str(error), QUOTE_LIMIT)}")
        if reply is not None:
            self.received[silo][reply.phase] += frame.nbytes
            self._note("from", silo, reply.phase, frame)
        return found

    def _note(self, direction: str, silo: str, phase: str, frame: Frame) -> None:
        self.record({direction: silo, "phase": phase, "bytes": frame.nbytes, "sha256": frame.digest})


class _UnderWay(Generic[M]):
    """The requests of one `Post.exchange`: those that wait for their turn, are under way, or got lost.

    Args:
        post, nodes, requests, in_flight, check, patience, waiting_for: as `Post.exchange` has them.

    Attributes:
        progress: whether anything happened in the last step.
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
        self._look()

    def __bool__(self) -> bool:
        return bool(self._waiting or self._active or self._lost)

    def step(self) -> Iterator[tuple[str, M, Message | GramfuseError]]:
        """Send what may be sent, and yield (silo, request, reply) of what is over."""
        while self._waiting and len(self._active) < self.in_flight:
            silo, remaining = self._waiting.popleft()
            request = next(remaining, None)
            if request is not None:
                self._send(_Sent(silo, remaining, request))
        yield from self._not_taken()
        yield from self._answered()
        yield from self._started_anew()
        yield from self._back_or_given_up()

    def _not_taken(self) -> Iterator[tuple[str, M, GramfuseError]]:
        """See to requests that Flower did not take: of a node that was revoked, say."""
        for sent in [sent for sent in self._active if not sent.ids]:
            self._active.remove(sent)
            self.progress = True
            if sent.attempt < ATTEMPTS:
                self._lost.append(sent.again())
            else:
                yield sent.silo, sent.request, sent.no_answer("Flower does not take the request; its log has why")

    def _answered(self) -> Iterator[tuple[str, M, Message | GramfuseError]]:
        for sent in list(self._active):
            answer = self.post.pull(sent)
            if answer is not None:
                self._active.remove(sent)
                self.progress = True
                if _is_lost(answer) and sent.attempt < ATTEMPTS:
                    self._lost.append(sent.again())
                    continue
                reply = self.post.receive(sent, answer, self.check)
                if not isinstance(reply, GramfuseError):
                    self._waiting.appendleft((sent.silo, sent.remaining))
                yield sent.silo, sent.request, reply
            elif given_up := sent.given_up(self.patience, self.waiting_for, away=False):
                self._active.remove(sent)
                yield sent.silo, sent.request, given_up

    def _started_anew(self) -> Iterator[tuple[str, M, GramfuseError]]:
        """Ask nodes again that were started anew since they were asked."""
        if not self._active or time.monotonic() <= self._looked + LOOK_SECONDS:
            return
        self._look()
        for sent in list(self._active):
            if self._activated.get(self.nodes[sent.silo], sent.activated) == sent.activated:
                continue
            self._active.remove(sent)
            if sent.attempt < ATTEMPTS:
                sent.attempt += 1
                self._send(sent)
            else:
                yield sent.silo, sent.request, sent.no_answer("its node was started anew each time")

    def _back_or_given_up(self) -> Iterator[tuple[str, M, GramfuseError]]:
        """Ask again whose request or reply got lost, once their nodes are back."""
        if self._lost:
            self._activated = self.post.activated()
        for sent in list(self._lost):
            if self.nodes[sent.silo] in self._activated:
                sent.since, sent.reminded = time.monotonic(), 0.0
                self._send(sent)
            elif given_up := sent.given_up(self.patience, self.waiting_for, away=True):
                yield sent.silo, sent.request, given_up
            else:
                continue
            self._lost.remove(sent)
            self.progress = True

    def _send(self, sent: _Sent[M]) -> None:
        self.post.send(sent, self.nodes, self._activated)
        self._active.append(sent)

    def _look(self) -> None:
        self._activated, self._looked = self.post.activated(), time.monotonic()


def _is_lost(answer: FlowerMessage | Exception) -> bool:
    """Whether an answer is Flower's word that there will be none."""
    return not isinstance(answer, Exception) and answer.has_error() and answer.error.code in LOST
