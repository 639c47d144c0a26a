"""A coordinator in the test's hand, which asks silos whatever the test likes."""

from __future__ import annotations

import json
import shutil
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gramfuse_client.exchange.participant import Participant
from gramfuse_protocol.contract.plan import Plan
from gramfuse_protocol.messages.phases import (
    REPLIES,
    REQUESTS,
    EvaluateRequest,
    JoinRequest,
    KeysRequest,
    MaskedRequest,
    Refusal,
    SharesRequest,
    SurvivorsRequest,
    TrainRequest,
    UnmaskRequest,
    UploadRequest,
)
from gramfuse_protocol.messages.wire import pack, unpack
from gramfuse_protocol.secure_sum.keys import Identity
from gramfuse_protocol.secure_sum.statements import advert_statement
from tests.exchange.secure.runs import Arrays, Site

STEPS = (
    "join", "train", "keys", "shares", "masked", "survivors", "unmask",
    "evaluate", "masked-metrics", "survivors-metrics", "unmask-metrics",
)  # fmt: skip

STRANGER = "silo-z"


class Coordinator:
    """A coordinator in the test's hand: what an honest one asks, and what it was answered."""

    def __init__(self, site: Site, plan: Plan, place: Path, nonce: str = "5e" * 16) -> None:
        self.site = site
        self.plan = plan
        self.place = place
        self.about: dict[str, Any] = {"plan": plan.digest, "session": nonce}
        self.names = plan.names
        self.models = {"simple": self._model(0.0), "regmean": self._model(0.01)}
        self.requests: dict[str, dict[str, list[Any]]] = defaultdict(dict)
        self.replies: dict[str, dict[str, list[Any]]] = defaultdict(dict)
        self.secrets: set[str] = set()

    def ask(self, silo: str, request: Any, place: Path | None = None) -> Any:
        """What a silo answers, each way over the wire; its state is under a place."""
        file = self.site.silo(silo, self.plan, place or self.place)
        return unpack(pack(Participant(file).answer(unpack(pack(request), REQUESTS))), REPLIES)

    def do(self, step: str, names: Sequence[str] | None = None) -> None:
        """Ask silos what an honest coordinator asks in a step, each twice; all must say yes, and the same."""
        for silo in names or self.names:
            self.requests[step][silo] = self.honest(step, silo)
            self.replies[step][silo] = [self.ask(silo, request) for request in self.requests[step][silo]]
            for request, reply in zip(self.requests[step][silo], self.replies[step][silo], strict=True):
                assert not isinstance(reply, Refusal), reply
                assert pack(self.ask(silo, request)).digest == pack(reply).digest

    def honest(self, step: str, silo: str) -> list[Any]:
        phase, _, metrics = step.partition("-")
        name: Any = "metrics" if metrics else "statistics"
        match phase:
            case "join":
                return [JoinRequest(**self.about, plan_text=self.plan.to_toml(), layout=self.site.layout.to_json())]
            case "train":
                return [TrainRequest(**self.about)]
            case "keys":
                return [KeysRequest(**self.about, cohort=self.names)]
            case "shares":
                return [SharesRequest(**self.about, adverts=self.adverts)]
            case "masked":
                more: dict[str, Any] = {"candidates": tuple(self.models)} if metrics else {"sealed": self.sealed(silo)}
                return [MaskedRequest(**self.about, sum_of=name, piece=0, piece_bytes=2**20, **more)]
            case "survivors":
                return [SurvivorsRequest(**self.about, sum_of=name, survivors=self.names)]
            case "unmask":
                signatures = {s: r[0].signature for s, r in self.replies[step.replace("unmask", "survivors")].items()}
                return [UnmaskRequest(**self.about, sum_of=name, signatures=signatures)]
            case _:
                return [EvaluateRequest(**self.about, candidate=c, arrays=model) for c, model in self.models.items()]

    @property
    def adverts(self) -> tuple[Any, ...]:
        return tuple(self.replies["keys"][name][0].advert for name in self.names)

    def sealed(self, silo: str) -> dict[str, str]:
        return {peer: self.replies["shares"][peer][0].sealed[silo] for peer in self.names if peer != silo}

    def advert(self, of: str, signer: str | None = None, **changes: Any) -> tuple[Any, ...]:
        """The adverts, one of them changed and, if a signer is named, signed again."""
        changed = []
        for advert in self.adverts:
            if advert.silo == of:
                advert = advert.model_copy(update=changes)
                if signer is not None:
                    identity = Identity.parse(self.site.project.identity(signer).read_text(), signer)
                    signature = identity.sign(advert_statement(self.plan.digest, self.about["session"], advert.fields))
                    advert = advert.model_copy(update={"signature": signature.hex()})
            changed.append(advert)
        return tuple(changed)

    def _model(self, value: float) -> Arrays:
        return {s.name: np.full(s.block.shape, value, np.float32) for s in self.site.layout.deltas}


def at(script: Coordinator, step: str, place: Path, *silos: str) -> None:
    """Put silos where they were before a step of the script."""
    for silo in silos:
        shutil.copytree(script.place / step / "state" / silo, place / "state" / silo)


def session_of(script: Coordinator, place: Path, silo: str) -> Path:
    return place / "state" / silo / script.plan.digest / "sessions" / str(script.about["session"])


def exchanged(mapping: Mapping[str, str], one: str, other: str) -> dict[str, str]:
    return {**mapping, one: mapping[other], other: mapping[one]}


def flipped(text: str) -> str:
    return text[:-1] + ("0" if text[-1] != "0" else "1")


def assert_over(script: Coordinator, place: Path, silo: str) -> None:
    """Nothing leaves the silo in this session any more, and its secrets are gone."""
    everything = [request for step in STEPS for request in script.requests[step][silo]]
    everything.append(UploadRequest(**script.about, piece=0, piece_bytes=2**20))
    for request in everything:
        reply = script.ask(silo, request, place)
        assert isinstance(reply, Refusal), request.phase
        assert not reply.arrays
        assert (reply.error, "session is over" in reply.reason) == ("RefusalError", True), request.phase
    (file,) = session_of(script, place, silo).iterdir()
    record = json.loads(file.read_text())
    assert (record["member"], record["answers"]) == (None, {})
    assert not [secret for secret in script.secrets if secret in file.read_text()]
