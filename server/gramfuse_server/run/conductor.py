"""Leads the silos through the phases of a run: sends requests, checks who answered, and tracks which silos are left."""

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
from gramfuse_protocol.contract.stages import subject
from gramfuse_protocol.errors import FederationError, GramfuseError
from gramfuse_protocol.messages.phases import FinishReply, FinishRequest, JoinReply, JoinRequest, Message, expect
from gramfuse_server.run.delivery import Pending, Post
from gramfuse_server.run.patience import FINISH, Patience
from gramfuse_server.run_directory import RunDirectory, of_round

Q = TypeVar("Q", bound=Message)
R = TypeVar("R", bound=Message)

Observer = Callable[[dict[str, Any]], None]
"""Takes events: `{"phase", "state": "start" | "wait" | "silo" | "lost" | "try" | "measured" | "end", …}`."""


class Conductor:
    """The coordinator's side of one session, which is one stage of a run.

    Args:
        grid: Flower's grid.
        plan: locked.
        run: the run directory, entered; completed phases of a resumed run are not repeated.
        number: of the session, from 1.
        patience: how long to wait for silos.

    Attributes:
        stage: what is done in it.
        only: the exact set of silos for this session; empty for any. With secure aggregation, sums of one subject
            (`gramfuse_protocol.contract.stages.subject`) must be over the same silos: a silo's vectors in different
            rounds are much alike, so the difference of sums over different sets would reveal a single silo's.
        among: the silos that can take part, in roster order: with secure aggregation, those of the session before.
        needed: fewest silos whose statistics are to be merged.
        nodes: Flower's node id of each remaining silo, in roster order.
        joined: node ids of all silos that joined.
        progress: how far each silo got: "connected" or "joined"; silos that never connected are missing.
        lost: why each lost silo was lost.
        current_phase: name of the phase that started last.
        seconds: duration of each phase, including a failed one.
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
        self.stage = plan.stage(number)
        self.among = tuple(self.earlier("masked") or plan.names)
        self.only = self._survivors_of_subject()
        self.needed = len(self.only) or plan.minimum_survivors
        self.patience = patience
        self.post = Post(grid, run.record)
        self.nodes: dict[str, int] = {}
        self.joined: Mapping[str, int] = {}
        self.progress: dict[str, str] = {}
        self.lost: dict[str, GramfuseError] = {}
        self.current_phase = "start"
        self.seconds: dict[str, float] = {}
        self.nonce: str = self.done("session") or secrets.token_hex(16)
        self.about: dict[str, Any] = {"plan": plan.digest, "session": self.nonce, "round": number}

    def join(self, layout: Layout) -> None:
        """Map nodes to silos, and have each silo check the plan.

        Raises:
            RefusalError, FederationError: if fewer silos join than the plan requires; the message names the missing.
        """
        # A resumed run cannot use silos that had not trained, and does not wait for silos that were lost before.
        useful = tuple(self.done("train") or self.only or self.among)
        expected = tuple(name for name in useful if name not in self.lost_before)
        nodes = self._connected(expected, useful)
        if self.round > 1:
            self.keep("session", self.nonce)  # an earlier session is over, so the run is worth resuming
        request = JoinRequest(**self.about, plan_text=self.plan.to_toml(), layout=layout.to_json())
        errors: list[GramfuseError] = []
        refused: dict[str, GramfuseError] = {}
        claimed: dict[str, str] = {}  # the silo that each node claims to be
        disputed: set[str] = set()

        def check(label: str, _: JoinRequest, reply: Message) -> None:
            name = getattr(reply, "silo", label)
            if self.patience.authenticated and name != label:
                raise FederationError(f"the connection of silo {label!r} answered as silo {name!r}")
            if name not in self.plan.names:
                raise FederationError(f"{label} claims to be silo {name!r}, which is not in the roster")
            claimed[label] = name
            where = "" if self.patience.authenticated else f" ({label})"
            expect(JoinReply, request, reply, f"silo {name!r}{where}")
            if name in self.nodes or name in disputed:
                disputed.add(name)
                raise FederationError(
                    f"two nodes claim to be silo {name!r}; stop one of them, or give each its own silo file"
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
            name = claimed.get(label, label)
            if isinstance(reply, GramfuseError):
                errors.append(reply)
                refused[name] = reply
                if name in disputed:  # trust neither of two nodes with the same claim
                    self.nodes.pop(name, None)
                self.progress[name] = "connected"
                self._tell_lost("join", name, reply)
                continue
            self.nodes[name] = nodes[label]
            self.progress[name] = "joined"
            self.post.rename(label, name)
            self.tell("join", "silo", silo=name)
        self.nodes = {name: self.nodes[name] for name in useful if name in self.nodes}
        self.joined = self.nodes
        missing = [name for name in expected if name not in self.nodes]
        absent = FederationError(
            f"silos {', '.join(missing)} of the roster did not join; {len(nodes)} nodes were connected"
        )
        self.lost |= {name: refused.get(name, absent) for name in missing}
        # Silos that were lost after they sent their masked vectors are still in the sum.
        if len(self.nodes) < (self.plan.minimum_survivors if self.done("masked") else self.needed):
            raise _combined(errors) if errors else absent

    def keep_only(self, silos: Sequence[str]) -> None:
        """Drop all other silos from here on."""
        self.nodes = {name: node for name, node in self.nodes.items() if name in silos}

    def decide(self, key: str, value: Any) -> Any:
        """Save and return a decision, a JSON value, before acting on it; a resumed run gets the earlier decision."""
        if self.done(key) is None:
            self.keep(key, value)
        return self.done(key)

    def done(self, phase: str) -> Any:
        """Return the saved result of a phase of this session, or None."""
        return self.run.done.get(of_round(phase, self.round))

    def keep(self, phase: str, result: Any) -> None:
        """Save the result of a phase of this session, a JSON value."""
        self.run.keep(of_round(phase, self.round), result)

    def _survivors_of_subject(self) -> tuple[str, ...]:
        """Return the silos of the earlier sums that must be those of this one's; empty without such sums."""
        same = subject(self.plan, self.stage, "statistics")
        for number in range(self.round - 1, 0, -1):
            survivors = self.run.done.get(of_round("masked", number))
            if survivors is not None and subject(self.plan, self.plan.stage(number), "statistics") == same:
                return tuple(survivors)
        return ()

    def earlier(self, phase: str) -> Any:
        """Return the latest saved result of a phase in an earlier session, or None."""
        results = (self.run.done.get(of_round(phase, number)) for number in range(self.round - 1, 0, -1))
        return next((result for result in results if result is not None), None)

    def place(self, name: str) -> Path:
        """Return the path of this session's file or folder of a name in the run directory."""
        return self.run.partial / of_round(name, self.round)

    @property
    def lost_before(self) -> dict[str, str]:
        """Why silos were lost in the previous session, or in this one before it was resumed; they may come back."""
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
        """Send requests to silos and yield (silo, request, reply); checks each reply's silo and kind.

        Args:
            in_flight: most concurrent requests; by default one for each silo.
            needed: fewest silos that must remain.
            long_work: whether the work can take arbitrarily long, so that connected silos never time out.
            check: raises if a reply is invalid; its silo is then given up.

        Raises:
            GramfuseError: once too few silos are left; it says why the others were lost.
        """
        given_up: set[str] = set()
        if len(requests) < needed:
            raise FederationError(
                f"{len(requests)} silos are left, but the plan requires {needed}; lost: "
                + "; ".join(f"{name}: {error}" for name, error in self.lost.items())
            )
        remaining = {silo: _until_given_up(given_up, silo, theirs) for silo, theirs in requests.items()}

        def checked(silo: str, request: Q, message: Message) -> None:
            reply = expect(kind, request, message, f"silo {silo!r}")
            claimed = getattr(reply, "silo", silo)
            if claimed != silo:
                raise FederationError(f"the node of silo {silo!r} answered as {claimed!r}")
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
                    raise _combined(list(self.lost.values())) from None
                continue
            assert isinstance(message, kind)  # noqa: S101 - `checked` made sure
            yield silo, request, message
        self.nodes = {name: node for name, node in self.nodes.items() if name not in self.lost}

    def lose(self, phase: str, silo: str, error: GramfuseError) -> None:
        """Record why a silo was lost, and tell the observer."""
        self.lost[silo] = error
        self._tell_lost(phase, silo, error)

    def finish(self, silos: Iterable[str]) -> None:
        """Have silos that joined wipe their session state. The result does not depend on it."""
        post = Post(self.grid, lambda entry: None)  # the transcript is already complete
        request = FinishRequest(**self.about)
        asked = {silo: [request] for silo in silos}
        with self.phase("finish"):
            exchange = post.exchange(self.joined, asked, len(asked), patience=FINISH)
            for silo, _, reply in exchange:
                if isinstance(reply, FinishReply):
                    self.tell("finish", "silo", silo=silo)

    def step(self, phase: str, work: Callable[[], Any]) -> Any:
        """Return the result of a phase, a JSON value: the saved one if there is one, else do the work and save it."""
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
        """Announce a phase and time it."""
        self.current_phase = name
        self.tell(name, "start")
        began = time.monotonic()
        try:
            yield
        finally:
            self.seconds[name] = time.monotonic() - began
        self.tell(name, "end", seconds=round(self.seconds[name], 3))

    def tell(self, phase: str, state: str, **more: Any) -> None:
        """Send an event to the observer; in a run of several sessions, it says in which this is."""
        stage, sessions = self.stage, len(self.plan.stages)
        position: dict[str, Any] = {"session": self.round, "sessions": sessions} if sessions > 1 else {}
        position |= {"work": stage.work} if sessions > 1 else {}
        position |= {"round": stage.round, "rounds": self.plan.merge.rounds} if self.plan.merge.rounds > 1 else {}
        self.observer({"phase": phase, "state": state, **position, **more})

    def _tell_lost(self, phase: str, silo: str, error: GramfuseError) -> None:
        self.tell(phase, "lost", silo=silo, reason=str(error))

    def _tell_waiting(self, pending: Pending) -> None:
        self.tell(pending.phase, "waiting", silo=pending.silo, seconds=round(pending.seconds), away=pending.away)

    def _connected(self, expected: Sequence[str], useful: Sequence[str]) -> dict[str, int]:
        """Return the connected nodes, once all expected silos are there or the wait is over.

        Args:
            useful: the expected silos, and others to include if they are connected.

        Returns:
            Node ids, by silo if nodes are authenticated by key, else by a label.
        """
        deadline = time.monotonic() + self.patience.wait
        needed, reported = len(expected), -1
        while len(self._nodes(expected)) < needed:
            nodes = self._nodes(useful)
            if len(nodes) != reported:
                reported = len(nodes)
                self.tell("join", "wait", connected=reported, needed=needed)
            if time.monotonic() > deadline:
                if len(nodes) >= self.plan.minimum_survivors:
                    break
                if self.patience.authenticated:
                    self.progress |= dict.fromkeys(nodes, "connected")
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
        by_silo = {silos.get(_roster_key(node.public_key)): node.node_id for node in nodes}
        return {name: by_silo[name] for name in expected if name in by_silo}


def _roster_key(key: bytes) -> str | None:
    """Return a node's key in the form of the roster, or None if it is not a key of a silo's type."""
    try:
        return canonical(key)
    except ValueError:
        return None


def _until_given_up(given_up: set[str], silo: str, requests: Iterable[Q]) -> Iterator[Q]:
    """Yield a silo's requests until it is given up."""
    for request in requests:
        if silo in given_up:
            return
        yield request


def _combined(errors: Sequence[GramfuseError]) -> GramfuseError:
    """Return one error with the messages of all."""
    if len(errors) == 1:
        return errors[0]
    kinds = {type(error) for error in errors}
    kind = kinds.pop() if len(kinds) == 1 else FederationError
    return kind("\n".join(map(str, errors)))
