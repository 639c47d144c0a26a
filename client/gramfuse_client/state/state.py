"""A silo's state on disk between messages: the joined plan, its statistics, and its progress.

A directory named by the plan's digest holds the plan, its sessions and the record of contributions. Statistics and
their start model are stored per round, after the first round in a subdirectory `round-<n>`. Every message can reach a
new process, so everything that must persist is here. Files are written under a temporary name and renamed. Directories
have mode 0700 and files 0600, because fine-tuned weights can reveal their data.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import save_file

from gramfuse_client.state.attempts import Attempts
from gramfuse_client.state.measurements import Measurements
from gramfuse_client.state.session import Session
from gramfuse_protocol.contract.form import Slice
from gramfuse_protocol.contract.layout import Layout, delta_block
from gramfuse_protocol.contract.plan import Plan
from gramfuse_protocol.contract.stages import Subject
from gramfuse_protocol.errors import FederationError
from gramfuse_protocol.files import make_private_directory, replacing, write_private
from gramfuse_protocol.frozen import Frozen
from gramfuse_protocol.statistics.contribution import Statistics

PROGRESS_SECONDS = 0.5
HEAD = "head.safetensors"

log = logging.getLogger(__name__)


class Contributed(Frozen):
    """A silo's record of its contributions under a plan.

    Args:
        sessions: nonces of sessions, by round.
        starts: digest of the model that a round started from, by round; empty for the first.
        survivors: the silos in the sums of each subject, the same in all sessions.
        data: digest of the training data, the same in all rounds. Much of a contribution does not change between rounds
            (counts, and the Gram matrix after frozen layers), so two sums over different silos or data would reveal
            what one of them holds and the other does not.
    """

    sessions: Mapping[int, tuple[str, ...]] = {}
    starts: Mapping[int, str] = {}
    survivors: Mapping[Subject, tuple[str, ...]] = {}
    data: str

    def including(self, number: int, session: str, start: str) -> Contributed:
        """Return this record with a session of round `number` added."""
        sessions = tuple(dict.fromkeys((*self.sessions.get(number, ()), session)))
        changes = {"sessions": {**self.sessions, number: sessions}, "starts": {**self.starts, number: start}}
        return self.model_copy(update=changes)


class MeasuredOn(NamedTuple):
    """The data and model behind statistics.

    Args:
        data: digest of the training data.
        start: digest of the model that training started from; empty in the first round, which starts from the base.
        rows: digest of the training data's rows (`gramfuse_client.guard.releases.Releases.keep_rows`).
    """

    data: str
    start: str
    rows: str = ""


@dataclass(frozen=True)
class StoredStatistics:
    """Statistics on disk: a `gramfuse_protocol.statistics.contribution.Contribution`.

    Args:
        path: the safetensors file.
        start: a model whose differences from the base are added to those of the statistics, or None.
    """

    path: Path
    examples: int
    tokens: Mapping[str, int]
    start: Path | None = None

    def block(self, name: str) -> NDArray[Any]:
        """Read one block."""
        block = _read_tensor(self.path, name)
        if self.start is None or not name.startswith(delta_block("")):
            return block
        with safe_open(self.start, "numpy") as file:
            if name not in file.keys():  # noqa: SIM118  # not a mapping
                return block  # the start model's tensor is the base's
        return (_read_tensor(self.start, name).astype(np.float64) + block).astype(np.float32)


class State:
    """The state of one silo in one round of a plan.

    Args:
        root: the silo's state directory.
        number: the round, counted from 1.
    """

    def __init__(self, root: Path, plan_digest: str, number: int = 1) -> None:
        self.directory = root / plan_digest
        self.round = number
        self._round_directory = self.directory if number == 1 else self.directory / f"round-{number}"
        self._reported = 0.0

    def join(self, plan_text: str, layout: Layout) -> None:
        """Store the plan and the layout."""
        make_private_directory(self.directory)
        self._write("plan.toml", plan_text.encode())
        self._write("layout.json", layout.to_json().encode())

    def joined(self) -> tuple[Plan, Layout]:
        """Return the joined plan and its layout.

        Raises:
            FederationError: if this silo did not join under this plan.
        """
        if not (self.directory / "layout.json").exists():
            raise FederationError(
                "the coordinator sent a message for a plan that this silo did not join", reason="not joined"
            )
        return Plan.read(self.directory / "plan.toml"), Layout.read(self.directory / "layout.json")

    @property
    def attempts(self) -> Attempts:
        """The attempts at work on this silo's data under the plan."""
        return Attempts(self.directory / "attempts.json")

    @property
    def measurements(self) -> Measurements:
        """The measurements under the plan."""
        return Measurements(self.directory / "measured.json")

    def save(self, statistics: Statistics, origin: MeasuredOn, start: Mapping[str, NDArray[np.float32]]) -> None:
        """Store statistics, their origin, and the model that training started from.

        Args:
            start: differences from the base by block name; empty in the first session.
        """
        make_private_directory(self._round_directory)
        if origin.start:
            _save_tensors(self._start, start, {})
        about = {"examples": statistics.examples, "tokens": dict(statistics.tokens), **origin._asdict()}
        _save_tensors(self._statistics, statistics.blocks, {"about": json.dumps(about)})

    def save_head(self, parameters: Mapping[str, NDArray[np.float32]]) -> None:
        """Store this silo's own head, which it does not share."""
        make_private_directory(self._round_directory)
        _save_tensors(self._round_directory / HEAD, parameters, {})

    def head(self, *, before: bool = False) -> dict[str, NDArray[np.float32]]:
        """Return this silo's own head, from this round or the previous one, by parameter name.

        Args:
            before: read the previous round's head.

        Raises:
            FederationError: if the silo did not train in that round.
        """
        state = State(self.directory.parent, self.directory.name, self.round - 1) if before else self
        path = state._round_directory / HEAD
        if not path.exists():
            raise FederationError("this silo's own head was needed before training", reason="not trained")
        with safe_open(path, "numpy") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a mapping

    @property
    def model(self) -> Path:
        """Directory of this silo's finished model, under a plan in which silos keep their heads."""
        return self.directory / "model"

    @property
    def trained(self) -> bool:
        """Whether there are statistics."""
        return self._statistics.exists()

    def check_trained(self) -> None:
        """Raise FederationError if there are no statistics."""
        self._about()

    def contribution(self, *, from_base: bool = False) -> StoredStatistics:
        """Return the stored statistics, to read block by block.

        Args:
            from_base: return differences from the base, instead of from the model that the round started from.

        Raises:
            FederationError: if there are none.
        """
        about = self._about()
        start = self._start if from_base and about["start"] else None
        return StoredStatistics(self._statistics, about["examples"], about["tokens"], start)

    def start(self) -> dict[str, NDArray[np.float32]]:
        """Return the model that this session's work started from, as differences from the base by block name.

        Tensors that equal the base's are missing; all are if it is the base.
        """
        if not self._start.exists():
            return {}
        with safe_open(self._start, "numpy") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a mapping

    def origin(self) -> MeasuredOn:
        """Return the data and model behind the stored statistics; raise what `contribution` raises."""
        about = self._about()
        return MeasuredOn(about["data"], about["start"], about["rows"])

    def session(self, nonce: str) -> Session:
        """Return a session of this round."""
        return Session(self.directory / "sessions" / nonce, self.round)

    def join_session(self, nonce: str) -> None:
        """Begin or continue a session; end all others under this plan, and wipe their secrets."""
        session = self.session(nonce)
        for other in session.directory.parent.glob("*"):
            if other.name != nonce:
                self.session(other.name).end("another session began")
        session.begin()

    def contributed(self) -> Contributed | None:
        """Return the record of contributions under this plan, or None."""
        try:
            return Contributed.model_validate_json((self.directory / "contributed.json").read_bytes())
        except FileNotFoundError:
            return None

    def contribute(self, contributed: Contributed) -> None:
        """Store the record of contributions."""
        self._write("contributed.json", contributed.model_dump_json().encode(), durable=True)

    def contribute_openly(self, session: str) -> None:
        """Record that the stored statistics leave in the clear in this session."""
        data, start, _ = self.origin()
        contributed = self.contributed() or Contributed(data=data)
        if session not in contributed.sessions.get(self.round, ()):
            self.contribute(contributed.including(self.round, session, start))

    def slices(self, slices: tuple[Slice, ...]) -> dict[str, NDArray[np.float32]]:
        """Read slices of the stored statistics.

        Raises:
            FederationError: if there are none.
        """
        contribution = self.contribution()
        arrays = {}
        for piece in slices:
            block = contribution.block(piece.block.name)
            whole = piece.name == piece.block.name
            arrays[piece.name] = block if whole else block.reshape(-1)[piece.start : piece.stop]
        return arrays

    def progress(self, phase: str, done: int, total: int) -> None:
        """Record a phase's progress: on disk at most twice a second, in the log at every tenth."""
        if done * 10 // total != (done - 1) * 10 // total:
            log.info("%s: %d of %d", phase, done, total)
        now = time.monotonic()
        if now - self._reported >= PROGRESS_SECONDS or done == total:
            self._reported = now
            self._write("progress.json", json.dumps({"phase": phase, "done": done, "total": total}).encode())

    @property
    def _statistics(self) -> Path:
        return self._round_directory / "statistics.safetensors"

    @property
    def _start(self) -> Path:
        return self._round_directory / "start.safetensors"

    def _about(self) -> dict[str, Any]:
        if not self.trained:
            raise FederationError("the coordinator asked for statistics before training", reason="not trained")
        with safe_open(self._statistics, "numpy") as file:
            about: dict[str, Any] = json.loads(file.metadata()["about"])
        return about

    def _write(self, name: str, content: bytes, *, durable: bool = False) -> None:
        write_private(self.directory / name, content, durable=durable)


def _read_tensor(path: Path, name: str) -> NDArray[np.float32]:
    with safe_open(path, "numpy") as file:
        tensor: NDArray[np.float32] = file.get_tensor(name)
    return tensor


def _save_tensors(path: Path, tensors: Mapping[str, NDArray[np.float32]], metadata: dict[str, str]) -> None:
    with replacing(path, private=True) as temporary:
        save_file(dict(tensors), temporary, metadata=metadata)


def read_progress(root: Path, plan_digest: str) -> dict[str, Any] | None:
    """Return a silo's latest progress (phase, done, total), or None."""
    try:
        progress: dict[str, Any] = json.loads((root / plan_digest / "progress.json").read_bytes())
    except (OSError, ValueError):
        return None
    return progress
