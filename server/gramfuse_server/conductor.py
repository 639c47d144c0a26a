"""Leads the silos through the phases of a run: asks, checks who answers, and keeps count of who is still there."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from flwr.serverapp import Grid

from gramfuse_protocol.errors import FederationError, GramfuseError, RefusalError
from gramfuse_protocol.layout import Layout
from gramfuse_protocol.messages import JoinReply, JoinRequest, Message, Refusal, expect
from gramfuse_protocol.plan import Plan
from gramfuse_server.post import Post
from gramfuse_server.run import RunDirectory

WAIT_SECONDS = 600.0
"""How long to wait for all silos to be connected."""

STALL_SECONDS = 900.0
"""How long a silo may take for one answer where it has only to compute a little or to send one piece."""

Q = TypeVar("Q", bound=Message)
R = TypeVar("R", bound=Message)

Observer = Callable[[dict[str, Any]], None]
"""Takes events: `{"phase", "state": "start" | "wait" | "silo" | "lost" | "measured" | "end", …}`."""


class Conductor:
    """The coordinator's side of one session.

    Args:
        grid: Flower's grid.
        plan: locked.
        run: the run directory, entered; what a resumed run had done is not done again.
        wait: seconds to wait for all silos; then it goes on with those that are there, if the plan allows it.

    Attributes:
        nodes: Flower's node id of each silo that is still there, in roster order.
        lost: why a silo is not there any more.
        seconds: duration of each phase.
    """

    def __init__(self, grid: Grid, plan: Plan, run: RunDirectory, observer: Observer, wait: float) -> None:
        self.grid = grid
        self.plan = plan
        self.run = run
        self.observer = observer
        self.wait = wait
        self.post = Post(grid, run.record)
        self.nodes: dict[str, int] = {}
        self.lost: dict[str, GramfuseError] = {}
        self.seconds: dict[str, float] = {}
        self.nonce: str = run.done.get("session") or secrets.token_hex(16)
        self.about: dict[str, Any] = {"plan": plan.digest, "session": self.nonce}

    def join(self, layout: Layout) -> None:
        """Find out which node is which silo, and have each check the plan.

        Raises:
            RefusalError, FederationError: if fewer silos join than the plan asks for; the message names the others.
        """
        # A resumed run has no use for silos that had not trained, and does not wait for those that were lost since.
        useful = tuple(self.run.done.get("train", self.plan.names))
        expected = tuple(name for name in useful if name not in self.run.done.get("lost", {}))
        nodes = {f"node {node}": node for node in self._connected(len(expected))}
        request = JoinRequest(**self.about, plan_text=self.plan.to_toml(), layout=layout.to_json())
        errors: list[GramfuseError] = []
        refused: dict[str, GramfuseError] = {}
        for label, _, reply in self.post.exchange(nodes, {label: [request] for label in nodes}, len(nodes)):
            try:
                if isinstance(reply, FederationError):
                    raise reply
                source = f"silo {reply.silo!r} ({label})" if isinstance(reply, Refusal) else label
                joined = expect(JoinReply, request, reply, source).silo
            except (RefusalError, FederationError) as error:
                errors.append(error)
                said = reply.silo if isinstance(reply, Refusal) else label
                refused[said] = error
                self._tell_lost("join", said, error)
                continue
            if joined in self.nodes:
                raise FederationError(
                    f"two nodes say that they are silo {joined!r}; stop one of them, or give each its own silo file"
                )
            if joined not in self.plan.names:
                raise FederationError(f"{label} says that it is silo {joined!r}, which the roster does not name")
            self.nodes[joined] = nodes[label]
            self.post.rename(label, joined)
            self.tell("join", "silo", silo=joined)
        self.nodes = {name: self.nodes[name] for name in useful if name in self.nodes}
        missing = [name for name in expected if name not in self.nodes]
        absent = FederationError(
            f"silos {', '.join(missing)} of the roster did not join; {len(nodes)} nodes were connected"
        )
        self.lost |= {name: refused.get(name, absent) for name in missing}
        if len(self.nodes) < self.plan.minimum_survivors:
            raise _together(errors) if errors else absent

    def keep_only(self, silos: Sequence[str]) -> None:
        """Ask no other silos from here on."""
        self.nodes = {name: node for name, node in self.nodes.items() if name in silos}

    def decide(self, key: str, value: Any) -> Any:
        """Keep a decision, a JSON value, before it is acted on; a resumed run gets the one that was made before."""
        if key not in self.run.done:
            self.run.keep(key, value)
        return self.run.done[key]

    def ask(
        self,
        kind: type[R],
        requests: Mapping[str, Sequence[Q]],
        *,
        in_flight: int | None = None,
        needed: int,
        stall: float | None = STALL_SECONDS,
        check: Callable[[str, Q, R], None] = lambda silo, request, reply: None,
    ) -> Iterator[tuple[str, Q, R]]:
        """Ask silos and yield (silo, request, reply), each reply checked to be that silo's and of its kind.

        Args:
            in_flight: most requests under way; by default one for each silo.
            needed: fewest silos that must be left.
            check: raises GramfuseError if a reply is not what it must be; its silo is given up then.

        Raises:
            GramfuseError: once too few silos are left; it says what became of the others.
        """
        given_up: set[str] = set()
        if len(requests) < needed:
            raise FederationError(
                f"{len(requests)} silos are left where the plan asks for {needed}; lost: "
                + "; ".join(f"{name}: {error}" for name, error in self.lost.items())
            )
        remaining = {silo: _until(given_up, silo, of) for silo, of in requests.items()}
        for silo, request, message in self.post.exchange(self.nodes, remaining, in_flight or len(requests), stall):
            try:
                if isinstance(message, FederationError):
                    raise message
                reply = expect(kind, request, message, f"silo {silo!r}")
                said = getattr(reply, "silo", silo)
                if said != silo:
                    raise FederationError(f"the node of silo {silo!r} answered as {said!r}")
                check(silo, request, reply)
            except GramfuseError as error:
                given_up.add(silo)
                self.lost[silo] = error
                self._tell_lost(request.phase, silo, error)
                if len(requests) - len(given_up) < needed:
                    raise _together(list(self.lost.values())) from None
                continue
            yield silo, request, reply
        self.nodes = {name: node for name, node in self.nodes.items() if name not in self.lost}

    def step(self, phase: str, work: Callable[[], Any]) -> Any:
        """Return the result of a phase, a JSON value: as it was kept by an interrupted run, or by doing the work."""
        if phase not in self.run.done:
            with self.phase(phase):
                result = work()
            self.run.keep("session", self.nonce)
            if self.lost:
                self.run.keep("lost", self.run.done.get("lost", {}) | {n: str(error) for n, error in self.lost.items()})
            self.run.keep(phase, result)
        return self.run.done[phase]

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Announce a phase and measure how long it takes."""
        self.tell(name, "start")
        began = time.monotonic()
        yield
        self.seconds[name] = time.monotonic() - began
        self.tell(name, "end", seconds=round(self.seconds[name], 3))

    def tell(self, phase: str, state: str, **more: Any) -> None:
        """Give an event to the observer."""
        self.observer({"phase": phase, "state": state, **more})

    def _tell_lost(self, phase: str, silo: str, error: GramfuseError) -> None:
        self.tell(phase, "lost", silo=silo, reason=str(error))

    def _connected(self, needed: int) -> list[int]:
        """Return the nodes that are connected, once they are as many as needed or the wait is over."""
        deadline = time.monotonic() + self.wait
        told = -1
        while len(nodes := list(self.grid.get_node_ids())) < needed:
            if len(nodes) != told:
                told = len(nodes)
                self.tell("join", "wait", connected=told, needed=needed)
            if time.monotonic() > deadline:
                if len(nodes) >= self.plan.minimum_survivors:
                    break
                raise FederationError(
                    f"{len(nodes)} of {needed} silos connected within {self.wait:.0f} s; start the SuperNodes of "
                    "the others"
                )
            time.sleep(0.2)
        return nodes


def _until(given_up: set[str], silo: str, requests: Iterable[Q]) -> Iterator[Q]:
    """Yield a silo's requests until it is given up."""
    for request in requests:
        if silo in given_up:
            return
        yield request


def _together(errors: Sequence[GramfuseError]) -> GramfuseError:
    """Return one error that says what all of them say."""
    if len(errors) == 1:
        return errors[0]
    kinds = {type(error) for error in errors}
    kind = kinds.pop() if len(kinds) == 1 else FederationError
    return kind("\n".join(map(str, errors)))
