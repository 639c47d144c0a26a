"""Flower without Ray: a grid in this process, which loses and changes what it is told to."""

from __future__ import annotations

import itertools
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
from flwr.app import Context, Error, Message, RecordDict
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, no_object_id_recompute
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.task_identity import TaskIdentity

from gramfuse_server.run import delivery

Node = Callable[[Message, Context], Message]
"""What answers at a node: a ClientApp is one."""

FIRST_NODE = 101


@dataclass(frozen=True)
class Visit:
    """One message on its way to one node.

    Args:
        node: the node's name.
        phase: the last part of the message's type, such as `train` or `upload`.
        number: how many messages of this phase the node was sent so far, from 1.
    """

    node: str
    phase: str
    number: int


Fault = Callable[[Visit, Callable[[], "RecordDict | Error"]], "RecordDict | Error | None"]
"""Takes a visit and a function that has the node answer; returns what the coordinator gets instead of the answer.

None is nothing, ever.
"""


class InProcessGrid(Grid):
    """Flower's grid, in one process. Every message goes through Flower's own serialisation, both ways.

    Args:
        nodes: by name, in the order in which the grid lists them.
        fault: see `Fault`; by default every node is reached and answers once.
        lag: with it, the messages under way arrive and are answered in an order that it draws.
        configs: node configurations by name.
        keys: public keys by name, as a SuperLink that authenticates nodes has them, PEM.
        away: names of nodes that are not connected now; the test may change it.
        starts: how often a node was started anew; the test may change it.
        untaken: how many of the next messages to a node are not taken, by (node, phase); the test may change it.

    Attributes:
        sent: (node, phase) of every message that was sent, in order.
        most_under_way: by phase, the most nodes that ever had a message of that phase under way.
    """

    def __init__(
        self,
        nodes: Mapping[str, Node],
        *,
        fault: Fault = lambda visit, deliver: deliver(),
        lag: random.Random | None = None,
        configs: Mapping[str, dict[str, Any]] | None = None,
        keys: Mapping[str, bytes] | None = None,
    ) -> None:
        self.keys = keys or {}
        self.away: set[str] = set()
        self.starts: Counter[str] = Counter()
        self.untaken: Counter[tuple[str, str]] = Counter()
        self.fault = fault
        self.lag = lag
        self.nodes = {FIRST_NODE + n: (name, node) for n, (name, node) in enumerate(nodes.items())}
        self.contexts = {
            number: Context(1, number, (configs or {}).get(name, {}), RecordDict(), {})
            for number, (name, _) in self.nodes.items()
        }
        self.sent: list[tuple[str, str]] = []
        self.most_under_way: Counter[str] = Counter()
        self._ids = (f"message-{n}" for n in itertools.count())
        self._under_way: dict[str, tuple[Visit, Message]] = {}

    def number(self, name: str) -> int:
        """Return Flower's node id of a node."""
        return next(number for number, (other, _) in self.nodes.items() if other == name)

    def set_run(self, run: Any) -> None:
        raise NotImplementedError

    @property
    def run(self) -> Any:
        raise NotImplementedError

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        return [number for number, (name, _) in self.nodes.items() if name not in self.away]

    def get_nodes(self) -> Iterable[NodeInfo]:
        return [
            NodeInfo(
                node_id=number, public_key=self.keys.get(name, b""), last_activated_at=f"start {self.starts[name]}"
            )
            for number, (name, _) in self.nodes.items()
            if name not in self.away
        ]

    def push_messages(self, messages: Iterable[Message]) -> Sequence[str]:
        ids = []
        for message in messages:
            message_id = next(self._ids)
            name, _ = self.nodes[message.metadata.dst_node_id]
            phase = message.metadata.message_type.rpartition(".")[2]
            self.sent.append((name, phase))
            if self.untaken[name, phase]:
                self.untaken[name, phase] -= 1
                ids.append("")  # so a SuperLink answers
                continue
            visit = Visit(name, phase, self.sent.count((name, phase)))
            self._under_way[message_id] = visit, _carried(message, message_id)
            under_way = defaultdict(set)
            for other, _ in self._under_way.values():
                under_way[other.phase].add(other.node)
            self.most_under_way |= Counter({phase: len(names) for phase, names in under_way.items()})
            ids.append(message_id)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        answers = (
            self._answer(message_id)
            for message_id in message_ids
            if message_id in self._under_way and (self.lag is None or self.lag.random() < 0.5)
        )
        return [answer for answer in answers if answer is not None]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        waiting = list(self.push_messages(messages))
        if self.lag is not None:
            self.lag.shuffle(waiting)
        return [answer for answer in map(self._answer, waiting) if answer is not None]

    def _answer(self, message_id: str) -> Message | None:
        visit, message = self._under_way.pop(message_id)
        number = message.metadata.dst_node_id
        _, node = self.nodes[number]

        def deliver() -> RecordDict | Error:
            reply = node(message, self.contexts[number])
            return reply.error if reply.has_error() else reply.content

        try:
            answer = self.fault(visit, deliver)
        except Exception as error:  # noqa: BLE001  # Flower turns whatever a ClientApp raises into this
            answer = Error(2, f"{type(error)}:<'{error}'>")
        if answer is None:
            return None
        return _carried(Message(answer, reply_to=message), next(self._ids))


def _carried(message: Message, message_id: str) -> Message:
    """Return a message as it is after it was taken apart and put together again on its way."""
    message.metadata.__dict__["_message_id"] = message_id
    with no_object_id_recompute():
        contents = {name: part.deflate() for name, part in get_all_nested_objects(message).items()}
        carried = inflate_object_from_contents(message.object_id, contents)
    carried.metadata.__dict__["_message_id"] = message_id
    return carried


@pytest.fixture(scope="module", autouse=True)
def _task_identity() -> Iterator[None]:
    """What Flower sets in the process of a ServerApp; without it no message can be made."""
    with pytest.MonkeyPatch.context() as patch:
        for key in ("_run_id", "_node_id", "_task_id"):
            patch.setattr(TaskIdentity, key, 1)
        yield


@pytest.fixture
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """The coordinator looks for answers again at once."""
    monkeypatch.setattr(delivery.time, "sleep", lambda _: None)


@pytest.fixture(scope="session")
def in_process_grid() -> type[InProcessGrid]:
    """Return the class: `in_process_grid({"silo-a": client_app, …}, fault=…)`."""
    return InProcessGrid
