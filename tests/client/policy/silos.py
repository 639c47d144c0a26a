"""Plans and silos that take them, and what a refusal must not quote."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gramfuse_client.exchange.participant import Participant
from gramfuse_client.silo_file import Data, Limits, Silo, SiloFile
from gramfuse_protocol.contract.layout import Layout
from gramfuse_protocol.contract.plan import Plan
from gramfuse_protocol.contract.plan_sections import Pins
from gramfuse_protocol.errors import error_types
from gramfuse_protocol.messages.phases import (
    EvaluateRequest,
    JoinRequest,
    Message,
    Refusal,
    TrainRequest,
    UploadRequest,
)

SESSION = "0123456789abcdef" * 2
OTHER_SESSION = "fedcba9876543210" * 2

PLAN = Plan.parse(
    f"""
    [plan]
    name = "pico"
    [model]
    base = "pico"
    sha256 = "{"1" * 64}"
    config = "{"3" * 64}"
    processor = "{"4" * 64}"
    task = "classification"
    head = "same"
    labels = ["animals", "weather"]
    [merge]
    layout = "{"2" * 64}"
    [privacy]
    secure-aggregation = false
    metrics = "sum"
    [[silo]]
    name = "silo-a"
    """
)

WITH_SILO_METRICS = PLAN.override(['privacy.metrics="silo"']).pinned(Pins("1" * 64, "3" * 64, "4" * 64), "2" * 64)
UNLOCKED = PLAN.override(["merge.alpha=1.0"])
PATH = Path("private") / "silo-a.toml"


def willing(**changes: Any) -> Silo:
    """Return a silo that takes PLAN, but for what is changed; keys of [limits] go there."""
    limits = {key: changes.pop(key) for key in list(changes) if key in Limits.model_fields}
    file = {"name": "silo-a", "approved": (PLAN.digest, WITH_SILO_METRICS.digest, UNLOCKED.digest), **changes}
    data = Data(train="train.jsonl", held_out="held-out.jsonl")
    return Silo(PATH, SiloFile(data=data, limits=Limits(**{"open_uploads": True, "metrics": "sum", **limits}), **file))


def quotes_nothing(reason: str, secrets: list[str]) -> None:
    """Assert that a reason, which crosses to the coordinator, holds none of the silo's own."""
    assert reason
    for secret in secrets:
        assert secret not in reason


@dataclass(frozen=True)
class Site:
    """A silo with pico data and a pico model that has approved a locked plan."""

    path: Path
    plan: Plan
    layout: Layout

    @property
    def silo(self) -> Silo:
        """The silo file as it is now."""
        return Silo.read(self.path)

    @property
    def statistics(self) -> Path:
        return self.silo.state / self.plan.digest / "statistics.safetensors"

    def answer(self, request: Message) -> Message:
        """Answer in a new process, as it were: nothing is remembered but what is on disk."""
        return Participant(self.silo).answer(request)

    def edit(self, old: str, new: str) -> None:
        text = self.path.read_text()
        assert old in text
        self.path.write_text(text.replace(old, new, 1))

    def join(self, **changes: Any) -> JoinRequest:
        return JoinRequest(
            **{
                "plan": self.plan.digest,
                "session": SESSION,
                "plan_text": self.plan.to_toml(),
                "layout": self.layout.to_json(),
                **changes,
            }
        )

    def train(self, session: str = SESSION) -> TrainRequest:
        return TrainRequest(plan=self.plan.digest, session=session)

    def upload(self, piece: int = 0, piece_bytes: int = 2**20) -> UploadRequest:
        return UploadRequest(plan=self.plan.digest, session=SESSION, piece=piece, piece_bytes=piece_bytes)

    def evaluate(self) -> EvaluateRequest:
        arrays = {piece.name: np.zeros(piece.block.shape, np.float32) for piece in self.layout.deltas}
        return EvaluateRequest(plan=self.plan.digest, session=SESSION, candidate="regmean", arrays=arrays)


def no_trace(site: Site) -> bool:
    """Whether a silo keeps nothing of what it was asked, but for the lock under which it answers."""
    state = site.silo.state
    return not state.exists() or [path.name for path in state.rglob("*")] == ["lock"]


def refused(site: Site, request: Message, kind: type[Exception]) -> Refusal:
    """Return the refusal that a request must get, after a look at what it gives away."""
    reply = site.answer(request)
    assert isinstance(reply, Refusal)
    assert (reply.error, reply.plan, reply.session) == (kind.__name__, request.plan, request.session)
    assert reply.exit_code == error_types()[kind.__name__].exit_code
    assert not reply.arrays
    quotes_nothing(reply.reason, [str(site.path.parent), "/", "cat", "dog", ".jsonl"])
    return reply
