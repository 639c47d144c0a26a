"""A pico project of a plan with rounds, its runs without Ray, and the merged model by the formulas."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.app import Context, Error, Message, RecordDict
from safetensors.numpy import load_file

from gramfuse_client.app import SiloApp
from gramfuse_client.data.batches import Encoded, batches
from gramfuse_client.data.examples import load
from gramfuse_client.measuring.collect import collect_statistics
from gramfuse_client.silo_file import Silo
from gramfuse_client.training.finetune import finetune
from gramfuse_model.loading.base_model import load_base
from gramfuse_model.parameters import trainable
from gramfuse_model.project import Project
from gramfuse_protocol.messages.flower_records import from_record, to_record
from gramfuse_protocol.messages.phases import REPLIES, REQUESTS, EvaluateRequest, TrainRequest
from gramfuse_protocol.messages.wire import pack, unpack
from gramfuse_server.app import coordinate
from gramfuse_server.merging.accumulator import Accumulator
from gramfuse_simulation.all_silos import AllSilos
from gramfuse_simulation.engine import laboratory_of, simulated_silo

Arrays = Mapping[str, np.ndarray]
Answer = Callable[[], RecordDict]

QUICK = ("training.epochs=1", 'training.freeze=["*embeddings*", "*key.bias"]')
"""Keys' biases change nothing, so their gradients are rounding errors, of which AdamW makes whole steps."""


class Stopped(BaseException):
    """The coordinator was killed."""


class Site:
    """A pico project of a plan with rounds, and its runs without Ray."""

    def __init__(self, project: Any, grid: Any, place: Path, rounds: int, *settings: str) -> None:
        self.project = project
        self.make_grid = grid
        self.state = place / "state"
        self.out = place / "run"
        self.plan, self.layout = Project.read(project.directory, (f"merge.rounds={rounds}", *settings)).locked()
        self.grid: Any = None
        self.starts: list[tuple[str, str]] = []
        self.replies: list[tuple[str, Any]] = []
        self.events: list[dict[str, Any]] = []

    def silo(self, name: str) -> Silo:
        silo = simulated_silo(str(self.project.silo(name)), str(self.state), self.plan.digest)
        return Silo(silo.path, silo.file.model_copy(update={"identity": str(self.project.identity(name))}))

    def run(
        self,
        *,
        fault: Callable[[Any, Answer], RecordDict | Error] = lambda visit, deliver: deliver(),
        change: Callable[[str, Any], Any] = lambda name, request: request,
        watch: Callable[[dict[str, Any]], None] = lambda event: None,
        **more: Any,
    ) -> dict[str, Any]:
        """Run, or resume; `fault` is the grid's, `change` makes another of a request on its way to a silo."""

        def node(name: str) -> Callable[[Message, Context], Message]:
            app = SiloApp(lambda _: self.silo(name))

            def answer(message: Message, context: Context) -> Message:
                request = change(name, unpack(from_record(message.content), REQUESTS))
                if isinstance(request, TrainRequest) and request.round > 1:
                    self.starts.append((name, pack(request).digest))
                message.content = to_record(pack(request))
                return app(message, context)

            return answer

        def recorded(visit: Any, deliver: Answer) -> RecordDict | Error:
            content = fault(visit, deliver)
            if not isinstance(content, Error):
                self.replies.append((visit.node, unpack(from_record(content), REPLIES)))
            return content

        def observe(event: dict[str, Any]) -> None:
            self.events.append(event)
            watch(event)

        self.grid = self.make_grid({name: node(name) for name in self.plan.names}, fault=recorded)
        return coordinate(
            self.grid, self.plan, self.layout, self.project.directory, self.out, observer=observe, **more
        ).document()

    def laboratory(self, number: int, survivors: tuple[str, ...]) -> AllSilos:
        files = [str(self.project.silo(name)) for name in self.plan.names]
        spec = {"silos": files, "state": str(self.state), "directory": str(self.project.directory), "tune": None}
        return laboratory_of(spec, self.plan, self.layout, number, survivors)

    @property
    def weights(self) -> Arrays:
        return load_file(self.out / "model" / "model.safetensors")


def by_hand(site: Site, survivors: tuple[tuple[str, ...], ...]) -> Arrays:
    """The merged model: one exchange after the other, each from the weights of the one before it."""
    plan = site.plan
    first = {key: value.numpy() for key, value in load_base(plan, site.project.directory).model.state_dict().items()}
    moved: dict[str, np.ndarray] = {}
    for number, silos in enumerate(survivors, 1):
        start = {key: value.astype(np.float32) for key, value in moved.items()}
        accumulator = Accumulator(site.layout, alpha=plan.merge.alpha, weighting=plan.merge.weighting)
        for name in silos:
            silo, task = site.silo(name), plan.task_of(name)
            base = load_base(plan, site.project.directory, silo=name)
            weights = {key: torch.from_numpy(value + start.get(key, 0)) for key, value in first.items()}
            base.model.load_state_dict(weights)
            before, (examples, _) = trainable(base.model), load(silo, task)
            encoded = Encoded(examples, base.tokenizer, task)
            settings = plan.training.model_copy(update={"seed": plan.training.seed + number - 1})
            finetune(base.model, encoded, settings, torch.device("cpu"))
            given = batches(encoded, plan.training.batch_size, torch.device("cpu"), seed=plan.training.seed)
            statistics = collect_statistics(
                base.model, given, site.layout, base=before, examples=len(examples), limit=plan.merge.tokens
            )
            accumulator.fold(statistics, name, silo=name)
        moved = {key: start.get(key, 0) + delta for key, delta in accumulator.merge().deltas.items()}
    return {key: (value + moved.get(key, 0)).astype(value.dtype) for key, value in first.items()}


class Models:
    """Keeps the models that a run sends, as differences from the base; give it to `Site.run` as its change.

    Attributes:
        starts: those that silos train from in the second session.
        sent: those that silos receive to measure or to go on from, by session and candidate.
    """

    def __init__(self) -> None:
        self.starts: list[dict[str, np.ndarray]] = []
        self.sent: dict[tuple[int, str], dict[str, np.ndarray]] = {}

    def __call__(self, _: str, request: Any) -> Any:
        if isinstance(request, TrainRequest) and request.round == 2:
            self.starts.append(dict(request.arrays))
        if isinstance(request, EvaluateRequest):
            self.sent[request.round, request.candidate] = dict(request.arrays)
        return request


def assert_close(found: Arrays, expected: Arrays, tolerance: float) -> None:
    assert found.keys() == expected.keys()
    off = np.sqrt(sum(np.sum((found[name] - expected[name]) ** 2.0) for name in expected))
    assert off / np.sqrt(sum(np.sum(expected[name] ** 2.0) for name in expected)) <= tolerance


@dataclass(frozen=True, repr=False)
class Done:
    """Two rounds in the open, with nothing lost and nothing changed.

    Args:
        sent: by round, the models that were sent to be measured, by name, and the one to go on from, as `start`.
    """

    site: Site
    report: dict[str, Any]
    trainings: Counter[str]
    sent: dict[tuple[int, str], Arrays]
