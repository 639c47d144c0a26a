"""Leads the silos through the phases of a run: asks, checks who answers, and keeps count of who is still there."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from flwr.serverapp import Grid

from gramfuse_protocol.contract.layout import Layout
from gramfuse_protocol.contract.node_key import canonical
from gramfuse_protocol.contract.plan import Plan
from gramfuse_protocol.errors import FederationError, GramfuseError
from gramfuse_protocol.messages.phases import FinishReply, FinishRequest, JoinReply, JoinRequest, Message, expect
from gramfuse_server.run.delivery import Pending, Post
from gramfuse_server.run.patience import Patience
from gramfuse_server.run_directory import RunDirectory, of_round

FINISH = Patience(answer=60.0)
"""How long to wait for silos to say that they wiped what they kept; the result is there by then."""

Q = TypeVar("Q", bound=Message)
R = TypeVar("R", bound=Message)

Observer = Callable[[dict[str, Any]], None]
"""Takes events: `{"phase", "state": "start" | "wait" | "silo" | "lost" | "try" | "measured" | "end", …}`."""


class Conductor:
    """The coordinator's side of one session, which is one round of a run.

    Args:
        grid: Flower's grid.
        plan: locked.
        run: the run directory, entered; what a resumed run had done is not done again.
        number: of the round, from 1 on.
        patience: how long it waits for silos.

    Attributes:
        only: silos that must all take part, and no others, where there are such: with secure aggregation, in a round
            after the first, those that were in the sum before. Much of what a silo adds is the same in each round, so
            the difference of sums over other silos would tell it.
        needed: fewest silos whose statistics are to be merged.
        nodes: Flower's node id of each silo that is still there, in roster order.
        joined: node ids of all silos that joined.
        came: how far silos came that did not stay away: "connected" or "joined".
        lost: why a silo is not there any more.
        at: the phase that was begun last.
        seconds: duration of each phase, also of one that failed.
    """

    def __init__(
        self,
        grid: Grid,
        plan: Plan,
        run: RunDirectory,
        observer: Observer,
        *,
        number: int = 1,
        patience: Patience = Patience(),  # noqa: B008 - frozen
    ) -> None:
        self.grid = grid
        self.plan = plan
        self.run = run
        self.observer = observer
        self.round = number
        self.only = tuple(self.earlier("masked") or ())
        self.needed = len(self.only) or plan.minimum_survivors
        self.patience = patience
        self.post = Post(grid, run.record)
        self.nodes: dict[str, int] = {}
        self.joined: Mapping[str, int] = {}
        self.came: dict[str, str] = {}
        self.lost: dict[str, GramfuseError] = {}
        self.at = "start"
        self.seconds: dict[str, float] = {}
        self.nonce: str = self.done("session") or secrets.token_hex(16)
        self.about: dict[str, Any] = {"plan": plan.digest, "session": self.nonce, "round": number}

    def join(self, layout: Layout) -> None:
        """Find out which node is which silo, and have each check the plan.

        Raises:
            RefusalError, FederationError: if fewer silos join than the plan asks for; the message names the others.
        """
        # A resumed run has no use for silos that had not trained. Those that were lost before are not waited for.
        useful = tuple(self.done("train") or self.only or self.plan.names)
        expected = tuple(name for name in useful if name not in self.lost_before)
        nodes = self._connected(expected, useful)
        if self.round > 1:
            self.keep("session", self.nonce)  # a model was merged by now, so the run is worth going on with
        request = JoinRequest(**self.about, plan_text=self.plan.to_toml(), layout=layout.to_json())
        errors: list[GramfuseError] = []
        refused: dict[str, GramfuseError] = {}
        said: dict[str, str] = {}  # which silo a node says that it is
        disputed: set[str] = set()

        def check(label: str, _: JoinRequest, reply: Message) -> None:
            name = getattr(reply, "silo", label)
            if self.patience.authenticated and name != label:
                raise FederationError(f"the connection of silo {label!r} answered as silo {name!r}")
            if name not in self.plan.names:
                raise FederationError(f"{label} says that it is silo {name!r}, which the roster does not name")
            said[label] = name
            where = "" if self.patience.authenticated else f" ({label})"
            expect(JoinReply, request, reply, f"silo {name!r}{where}")
            if name in self.nodes or name in disputed:
                disputed.add(name)
                raise FederationError(
                    f"two nodes say that they are silo {name!r}; stop one of them, or give each its own silo file"
                )

        requests = {label: [request] for label in nodes}
        exchange = self.post.exchange(
            nodes,
            requests,
            len(nodes),
            check=check,
            patience=self.patience,
            waiting_for=self._tell_waiting,
        )
        for label, _, reply in exchange:
            name = said.get(label, label)
            if isinstance(reply, GramfuseError):
                errors.append(reply)
                refused[name] = reply
                if name in disputed:  # of two nodes that say the same, neither is believed
                    self.nodes.pop(name, None)
                self.came[name] = "connected"
                self._tell_lost("join", name, reply)
                continue
            self.nodes[name] = nodes[label]
            self.came[name] = "joined"
            self.post.rename(label, name)
            self.tell("join", "silo", silo=name)
        self.nodes = {name: self.nodes[name] for name in useful if name in self.nodes}
        self.joined = self.nodes
        missing = [name for name in expected if name not in self.nodes]
        absent = FederationError(
            f"silos {', '.join(missing)} of the roster did not join; {len(nodes)} nodes were connected"
        )
        self.lost |= {name: refused.get(name, absent) for name in missing}
        # Those that were lost after their masked vectors came are in the sum all the same.
        if len(self.nodes) < (self.plan.minimum_survivors if self.done("masked") else self.needed):
            raise _together(errors) if errors else absent

    def keep_only(self, silos: Sequence[str]) -> None:
        """Ask no other silos from here on."""
        self.nodes = {name: node for name, node in self.nodes.items() if name in silos}

    def decide(self, key: str, value: Any) -> Any:
        """Keep a decision, a JSON value, before it is acted on; a resumed run gets the one that was made before."""
        if self.done(key) is None:
            self.keep(key, value)
        return self.done(key)

    def done(self, phase: str) -> Any:
        """Return what was kept of a phase of this round, or None."""
        return self.run.done.get(of_round(phase, self.round))

    def keep(self, phase: str, result: Any) -> None:
        """Keep the result of a phase of this round, a JSON value."""
        self.run.keep(of_round(phase, self.round), result)

    def earlier(self, phase: str) -> Any:
        """Return what was last kept of a phase in an earlier round, or None."""
        kept = (self.run.done.get(of_round(phase, number)) for number in range(self.round - 1, 0, -1))
        return next((result for result in kept if result is not None), None)

    def place(self, name: str) -> Path:
        """Return where this round keeps something in the run directory."""
        return self.run.partial / of_round(name, self.round)

    @property
    def lost_before(self) -> dict[str, str]:
        """Why silos were lost in the round before, or in this one before it was resumed; they may come back."""
        return (self.earlier("lost") or {}) | (self.done("lost") or {})

    def ask(
        self,
        kind: type[R],
        requests: Mapping[str, Sequence[Q]],
        *,
        in_flight: int | None = None,
        needed: int,
        long_work: bool = False,
        check: Callable[[str, Q, R], None] = lambda silo, request, reply: None,
    ) -> Iterator[tuple[str, Q, R]]:
        """Ask silos and yield (silo, request, reply), each reply checked to be that silo's and of its kind.

        Args:
            in_flight: most requests under way; by default one for each silo.
            needed: fewest silos that must be left.
            long_work: whether the work itself may take any time, so that no patience is long enough.
            check: raises if a reply is not what it must be; its silo is given up then.

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

        def checked(silo: str, request: Q, message: Message) -> None:
            reply = expect(kind, request, message, f"silo {silo!r}")
            said = getattr(reply, "silo", silo)
            if said != silo:
                raise FederationError(f"the node of silo {silo!r} answered as {said!r}")
            check(silo, request, reply)

        exchange = self.post.exchange(
            self.nodes,
            remaining,
            in_flight or len(requests),
            check=checked,
            patience=self.patience.for_long_work() if long_work else self.patience,
            waiting_for=self._tell_waiting,
        )
        for silo, request, message in exchange:
            if isinstance(message, GramfuseError):
                given_up.add(silo)
                self.lose(request.phase, silo, message)
                if len(requests) - len(given_up) < needed:
                    raise _together(list(self.lost.values())) from None
                continue
            assert isinstance(message, kind)  # noqa: S101 - `checked` saw to it
            yield silo, request, message
        self.nodes = {name: node for name, node in self.nodes.items() if name not in self.lost}

    def lose(self, phase: str, silo: str, error: GramfuseError) -> None:
        """Note why a silo is not there any more, and tell the observer."""
        self.lost[silo] = error
        self._tell_lost(phase, silo, error)

    def finish(self, silos: Iterable[str]) -> None:
        """Have silos that joined wipe what they keep of the session. The result does not depend on it."""
        post = Post(self.grid, lambda entry: None)  # the transcript is complete by now
        request = FinishRequest(**self.about)
        asked = {silo: [request] for silo in silos}
        with self.phase("finish"):
            exchange = post.exchange(self.joined, asked, len(asked), patience=FINISH)
            for silo, _, reply in exchange:
                if isinstance(reply, FinishReply):
                    self.tell("finish", "silo", silo=silo)

    def step(self, phase: str, work: Callable[[], Any]) -> Any:
        """Return the result of a phase, a JSON value: as it was kept by an interrupted run, or by doing the work."""
        if self.done(phase) is None:
            with self.phase(phase):
                result = work()
            self.keep("session", self.nonce)
            if self.lost:
                self.keep("lost", (self.done("lost") or {}) | {n: str(error) for n, error in self.lost.items()})
            self.keep(phase, result)
        return self.done(phase)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Announce a phase and measure how long it takes."""
        self.at = name
        self.tell(name, "start")
        began = time.monotonic()
        try:
            yield
        finally:
            self.seconds[name] = time.monotonic() - began
        self.tell(name, "end", seconds=round(self.seconds[name], 3))

    def tell(self, phase: str, state: str, **more: Any) -> None:
        """Give an event to the observer; in a run of several rounds it says which."""
        rounds = self.plan.merge.rounds
        which = {"round": self.round, "rounds": rounds} if rounds > 1 else {}
        self.observer({"phase": phase, "state": state, **which, **more})

    def _tell_lost(self, phase: str, silo: str, error: GramfuseError) -> None:
        self.tell(phase, "lost", silo=silo, reason=str(error))

    def _tell_waiting(self, pending: Pending) -> None:
        self.tell(pending.phase, "waiting", silo=pending.silo, seconds=round(pending.seconds), away=pending.away)

    def _connected(self, expected: Sequence[str], useful: Sequence[str]) -> dict[str, int]:
        """Return the nodes that are connected, once all expected silos are there or the wait is over.

        Args:
            useful: those that are expected, and others that are taken if they are there.

        Returns:
            Node ids; by the silo whose key the node has if nodes are authenticated, else by a label.
        """
        deadline = time.monotonic() + self.patience.wait
        needed, told = len(expected), -1
        while len(self._nodes(expected)) < needed:
            nodes = self._nodes(useful)
            if len(nodes) != told:
                told = len(nodes)
                self.tell("join", "wait", connected=told, needed=needed)
            if time.monotonic() > deadline:
                if len(nodes) >= self.plan.minimum_survivors:
                    break
                if self.patience.authenticated:
                    self.came |= dict.fromkeys(nodes, "connected")
                raise FederationError(
                    f"{len(nodes)} of {needed} silos connected within {self.patience.wait:.0f} s; start the others "
                    "with: gramfuse silo start"
                )
            time.sleep(0.2)
        return self._nodes(useful)

    def _nodes(self, expected: Sequence[str]) -> dict[str, int]:
        if not self.patience.authenticated:
            return {f"node {node}": node for node in self.grid.get_node_ids()}
        silos = {entry.node_key: entry.name for entry in self.plan.silo}
        nodes = (node for node in self.grid.get_nodes() if node.public_key)
        known = {silos.get(_line_of(node.public_key)): node.node_id for node in nodes}
        return {name: known[name] for name in expected if name in known}


def _line_of(key: bytes) -> str | None:
    """Return a node's key as the roster writes it, or None if it is of a kind that no silo has."""
    try:
        return canonical(key)
    except ValueError:
        return None


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
