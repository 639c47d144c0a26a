"""What a silo keeps on its disk between messages: the plan it joined, its statistics, how far it is.

Every message may reach a new process, so everything that must last is here. Files are written under a temporary
name and renamed; directories are 0700 and files 0600, since fine-tuned weights remember their data.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict
from safetensors import safe_open
from safetensors.numpy import save_file

from gramfuse_client.private import make_private_directory, write_private
from gramfuse_client.session import Session
from gramfuse_protocol.errors import FederationError
from gramfuse_protocol.layout import Layout, Slice
from gramfuse_protocol.plan import Plan
from gramfuse_protocol.statistics import Statistics
from gramfuse_protocol.transcript import Sum

PROGRESS_SECONDS = 0.5

log = logging.getLogger(__name__)


class Contributed(BaseModel):
    """What this silo gave under a plan: in which sessions, in sums over whom, and of which data."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    sessions: tuple[str, ...] = ()
    survivors: Mapping[Sum, tuple[str, ...]] = {}
    data: str


@dataclass(frozen=True)
class Kept:
    """Statistics on disk: a `gramfuse_protocol.statistics.Contribution`."""

    path: Path
    examples: int
    tokens: Mapping[str, int]

    def block(self, name: str) -> NDArray[np.float32]:
        """Read one block."""
        with safe_open(self.path, "numpy") as file:
            block: NDArray[np.float32] = file.get_tensor(name)
        return block


class State:
    """The state of one silo under one plan."""

    def __init__(self, root: Path, plan_digest: str) -> None:
        self.directory = root / plan_digest
        self._reported = 0.0

    def join(self, plan_text: str, layout: Layout) -> None:
        """Keep the plan and the layout."""
        make_private_directory(self.directory)
        self._write("plan.toml", plan_text.encode())
        self._write("layout.json", layout.to_json().encode())

    def joined(self) -> tuple[Plan, Layout]:
        """Return the plan and the layout that were joined.

        Raises:
            FederationError: if this silo did not join under this plan.
        """
        if not (self.directory / "layout.json").exists():
            raise FederationError("a message came for a plan that this silo did not join", reason="not joined")
        return Plan.read(self.directory / "plan.toml"), Layout.read(self.directory / "layout.json")

    def save(self, statistics: Statistics, data_digest: str) -> None:
        """Keep statistics, and which data they came from."""
        about = {"examples": statistics.examples, "tokens": dict(statistics.tokens), "data": data_digest}
        path = self._statistics
        temporary = path.with_suffix(".partial")
        try:
            save_file(dict(statistics.blocks), temporary, metadata={"about": json.dumps(about)})
            temporary.chmod(0o600)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        os.replace(temporary, path)

    def counts(self, data_digest: str) -> tuple[int, Mapping[str, int]] | None:
        """Return (examples, tokens by group) of kept statistics, or None if there are none of these data."""
        if not self.trained:
            return None
        about = self._about()
        return (about["examples"], about["tokens"]) if about["data"] == data_digest else None

    @property
    def trained(self) -> bool:
        """Whether there are statistics."""
        return self._statistics.exists()

    def contribution(self) -> Kept:
        """Return the kept statistics, to be read block by block.

        Raises:
            FederationError: if there are none.
        """
        about = self._about()
        return Kept(self._statistics, about["examples"], about["tokens"])

    def data_digest(self) -> str:
        """Return which data the kept statistics came from; raises as `contribution`."""
        return str(self._about()["data"])

    def session(self, nonce: str) -> Session:
        """Return a session under this plan."""
        return Session(self.directory / "sessions" / nonce)

    def join_session(self, nonce: str) -> None:
        """Begin a session, or go on with it; all others under this plan are over, and their secrets wiped."""
        session = self.session(nonce)
        for other in session.directory.parent.glob("*"):
            if other.name != nonce:
                Session(other).end("another session began")
        session.begin()

    def contributed(self) -> Contributed | None:
        """Return what was contributed to under this plan, if anything."""
        try:
            return Contributed.model_validate_json((self.directory / "contributed.json").read_bytes())
        except FileNotFoundError:
            return None

    def contribute(self, contributed: Contributed) -> None:
        """Keep what was contributed to."""
        self._write("contributed.json", contributed.model_dump_json().encode(), durable=True)

    def contribute_openly(self, session: str) -> None:
        """Note that the kept statistics leave in the clear in this session."""
        contributed = self.contributed() or Contributed(data=self.data_digest())
        if session not in contributed.sessions:
            self.contribute(contributed.model_copy(update={"sessions": (*contributed.sessions, session)}))

    def slices(self, slices: tuple[Slice, ...]) -> dict[str, NDArray[np.float32]]:
        """Read slices of the kept statistics.

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
        """Note how far a phase is, for whoever watches this silo: on disk twice a second, in the log every tenth."""
        if done * 10 // total != (done - 1) * 10 // total:
            log.info("%s: %d of %d", phase, done, total)
        now = time.monotonic()
        if now - self._reported >= PROGRESS_SECONDS or done == total:
            self._reported = now
            self._write("progress.json", json.dumps({"phase": phase, "done": done, "total": total}).encode())

    @property
    def _statistics(self) -> Path:
        return self.directory / "statistics.safetensors"

    def _about(self) -> dict[str, Any]:
        if not self.trained:
            raise FederationError("statistics were asked for before training", reason="not trained")
        with safe_open(self._statistics, "numpy") as file:
            about: dict[str, Any] = json.loads(file.metadata()["about"])
        return about

    def _write(self, name: str, content: bytes, *, durable: bool = False) -> None:
        write_private(self.directory / name, content, durable=durable)


def read_progress(root: Path, plan_digest: str) -> dict[str, Any] | None:
    """Return the last note of a silo's progress (phase, done, total), or None."""
    try:
        progress: dict[str, Any] = json.loads((root / plan_digest / "progress.json").read_bytes())
    except (OSError, ValueError):
        return None
    return progress
