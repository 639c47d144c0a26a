"""An open exchange of three silos: real ones, scripted ones, and what is expected of a run."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Context, Error, Message, RecordDict
from safetensors.numpy import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from gramfuse_client.app import SiloApp
from gramfuse_model.loading.base_model import Base, load_base
from gramfuse_protocol.contract.form import PIECE_BYTES as ONE_PIECE
from gramfuse_protocol.contract.layout import Layout
from gramfuse_protocol.contract.plan import Plan
from gramfuse_protocol.errors import FederationError, GramfuseError, RefusalError
from gramfuse_protocol.messages.flower_records import from_record, to_record
from gramfuse_protocol.messages.phases import (
    REPLIES,
    REQUESTS,
    EvaluateReply,
    JoinReply,
    Refusal,
    TrainReply,
    UploadReply,
)
from gramfuse_protocol.messages.wire import pack, unpack
from gramfuse_protocol.statistics.contribution import Statistics
from gramfuse_server.run.exchange import Exchange
from gramfuse_server.run_directory import RunDirectory, read_checkpoint
from gramfuse_simulation.engine import laboratory_of, simulated_silo
from tests.reports import read_back

SILOS = ("silo-a", "silo-b", "silo-c")
PIECE_BYTES = 1000
LOST = (3, 5, 8)
Arrays = dict[str, np.ndarray]
Fault = Callable[[Any, Callable[[], RecordDict]], "RecordDict | Error"]


def simulated(project: Any, plan: Plan, state: Path) -> dict[str, Any]:
    """The ClientApp of every silo of a project, as `gramfuse simulate` has them."""
    apps = {}
    for name in project.names:
        silo = simulated_silo(str(project.silo(name)), str(state), plan.digest)
        apps[name] = SiloApp(lambda _, silo=silo: silo)
    return apps


def laboratory(project: Any, plan: Plan, layout: Layout, state: Path) -> Callable[[int, tuple[str, ...]], Any]:
    """What `gramfuse simulate` gives to have every silo's own model measured."""
    silos = [str(project.silo(name)) for name in plan.names]
    spec = {"silos": silos, "state": str(state), "directory": str(project.directory), "tune": None}
    return partial(laboratory_of, spec, plan, layout)


@dataclass(repr=False)
class Scripted:
    """A silo that answers as an honest one does, from statistics and metrics that it is given.

    Args:
        sums: metrics by the name of the model; ones where there are none.
    """

    name: str
    layout: Layout
    statistics: Statistics
    sums: Mapping[str, np.ndarray] = field(default_factory=dict)
    default: np.ndarray = field(default_factory=lambda: np.ones((3, 3)))

    def __call__(self, message: Message, _: Context) -> Message:
        request = unpack(from_record(message.content), REQUESTS)
        about: dict[str, Any] = {"plan": request.plan, "session": request.session, "silo": self.name}
        reply: Any
        match request.phase:
            case "join":
                reply = JoinReply(**about)
            case "train":
                reply = TrainReply(**about, examples=self.statistics.examples, tokens=dict(self.statistics.tokens))
            case "upload":
                slices = self.layout.pieces(request.piece_bytes)[request.piece]
                arrays = {
                    s.name: self.statistics.blocks[s.block.name]
                    if s.name == s.block.name
                    else self.statistics.blocks[s.block.name].reshape(-1)[s.start : s.stop]
                    for s in slices
                }
                reply = UploadReply(**about, piece=request.piece, arrays=arrays)
            case _:
                sums = self.sums.get(request.candidate, self.default)
                reply = EvaluateReply(**about, candidate=request.candidate, arrays={"sums": sums})
        return Message(to_record(pack(reply)), reply_to=message)


class Recorder:
    """Lets everything through and remembers what each silo sent."""

    def __init__(self) -> None:
        self.replies: list[tuple[str, Any]] = []

    def __call__(self, visit: Any, deliver: Callable[[], RecordDict]) -> RecordDict:
        content = deliver()
        self.replies.append((visit.node, unpack(from_record(content), REPLIES)))
        return content

    def statistics(self) -> dict[str, Statistics]:
        """The contribution of each silo, if it came in one piece."""
        trained = {silo: reply for silo, reply in self.replies if isinstance(reply, TrainReply)}
        return {
            silo: Statistics(trained[silo].examples, trained[silo].tokens, reply.arrays)
            for silo, reply in self.replies
            if isinstance(reply, UploadReply)
        }

    def sums(self, silo: str) -> Arrays:
        """A silo's metrics by the name of the model."""
        return {
            reply.candidate: reply.arrays["sums"]
            for name, reply in self.replies
            if name == silo and isinstance(reply, EvaluateReply)
        }


@dataclass(frozen=True, repr=False)
class Honest:
    """A whole exchange of three real silos, with nothing lost and nothing changed."""

    project: Any
    plan: Plan
    layout: Layout
    out: Path
    report: dict[str, Any]
    sent: list[tuple[str, str]]
    statistics: dict[str, Statistics]
    sums: dict[str, Arrays]
    base: Base

    @property
    def weights(self) -> Arrays:
        return load_file(self.out / "model" / "model.safetensors")

    def scripted(self) -> dict[str, Scripted]:
        return {n: Scripted(n, self.layout, self.statistics[n], self.sums[n]) for n in SILOS}


def exchange(
    grid: Any,
    honest: Honest,
    out: Path,
    piece_bytes: int = PIECE_BYTES,
    plan: Plan | None = None,
    resume: bool = False,
    **more: Any,
) -> dict[str, Any]:
    """As `coordinate`, with a base model that is loaded already and other pieces."""
    with RunDirectory(out, 0, resume=resume) as run:
        base = copy.deepcopy(honest.base)
        report = (
            Exchange(grid, plan or honest.plan, honest.layout, base, run, piece_bytes=piece_bytes, **more)
            .start()
            .document()
        )
        run.finish()
    return report


def weights_of(out: Path) -> Arrays:
    return load_file(out / "model" / "model.safetensors")


def assert_identical(one: Arrays, other: Arrays) -> None:
    assert one.keys() == other.keys()
    for name in one:
        assert one[name].dtype == other[name].dtype, name
        assert one[name].tobytes() == other[name].tobytes(), name


def by_hand(layout: Layout, silos: Sequence[Statistics], weights: Sequence[float], alpha: float) -> Arrays:
    """The merged differences by the formulas alone, with dense matrices; for layouts whose Gram matrices are full."""
    total = sum(weights)
    deltas = {
        t.name: sum(c * s.block(f"delta:{t.name}").astype(np.float64) for c, s in zip(weights, silos, strict=True))
        / total
        for t in layout.tensors
    }
    for group in layout.groups:
        rows, columns = np.triu_indices(group.d_in)
        s = np.zeros((group.d_in, group.d_in))
        t: dict[str, Any] = dict.fromkeys((w.weight for w in group.weights), 0.0)
        for c, silo in zip(weights, silos, strict=True):
            gram = np.zeros_like(s)
            gram[rows, columns] = gram[columns, rows] = silo.block(f"gram:{group.name}")
            gram = alpha * gram + (1 - alpha) * np.diag(np.diag(gram))
            s += c * gram
            for w in group.weights:
                delta = silo.block(f"delta:{w.weight}").astype(np.float64)
                t[w.weight] = t[w.weight] + c * gram @ (delta.T if w.transposed else delta)
        for w in group.weights:
            solved = np.linalg.solve(s, t[w.weight])
            deltas[w.weight] = solved.T if w.transposed else solved
    return deltas


def assert_merged(
    out: Path, plan: Plan, layout: Layout, directory: Path, recorder: Recorder, weights: Sequence[float]
) -> None:
    """The model in `out` is what the formulas make of the recorded contributions, and the base where nothing moved."""
    contributions = recorder.statistics()
    expected = by_hand(layout, [contributions[name] for name in plan.names], weights, plan.merge.alpha)
    base = load_base(plan, directory).model.state_dict()
    merged = weights_of(out)
    assert merged.keys() == base.keys()
    for name, tensor in base.items():
        if name in expected:
            np.testing.assert_allclose(merged[name] - tensor.numpy(), expected[name], rtol=1e-4, atol=1e-6)
            assert not np.array_equal(merged[name], tensor.numpy()), name
        else:
            np.testing.assert_array_equal(merged[name], tensor.numpy(), err_msg=name)


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def logits_of(out: Path, rows: Sequence[Mapping[str, Any]]) -> list[torch.Tensor]:
    """What the model of a run says to texts or pairs of texts, with transformers alone."""
    model = AutoModelForSequenceClassification.from_pretrained(out / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(out / "model")
    with torch.no_grad():
        return [
            model(
                **tokenizer(row["text"], row.get("second"), return_tensors="pt", truncation=True, max_length=16)
            ).logits[0]
            for row in rows
        ]


def failure(kind: type[GramfuseError], grid: Any, honest: Honest, place: Path, piece_bytes: int = ONE_PIECE) -> str:
    """Run an exchange that must end in exactly this error; return its message.

    Nothing may be left of the run but its report, unless Flower or a silo failed it after the silos had trained: then
    it can be resumed.
    """
    before = sorted(place.rglob("*"))
    with pytest.raises(kind) as caught:
        exchange(grid, honest, place / "run", piece_bytes)
    assert type(caught.value) is kind
    resumable = kind in (FederationError, RefusalError) and "upload" in {phase for _, phase in grid.sent}
    failed = left(place, caught.value)["failure"]
    assert (failed["phase"], failed["round"], failed["resumable"]) == (grid.sent[-1][1], 1, resumable)
    if resumable:
        assert set(read_checkpoint(place / "run")) == {"session", "train"}
        shutil.rmtree(place / "run.partial")
    assert sorted(place.rglob("*")) == before
    return str(caught.value)


def left(place: Path, error: GramfuseError) -> dict[str, Any]:
    """Take away the report that a failed run left, of which it must be all; return it."""
    failed = place / "run.failed"
    assert error.report == failed / "report.html"
    crossed = {"transcript.jsonl"}  # if anything did
    assert {path.name for path in failed.iterdir()} - crossed == {"plan.toml", "report.html", "report.json"}
    report = read_back(failed)
    about = {"error": type(error).__name__, "message": str(error), "exit_code": error.exit_code}
    assert report["failure"].items() >= about.items()
    assert report["plan_digest"] == Plan.read(failed / "plan.toml").digest
    shutil.rmtree(failed)
    return report


def failure_of(kind: type[GramfuseError]) -> Callable[[Any, Honest, Path], str]:
    return lambda grid, honest, place: failure(kind, grid, honest, place)


def unmeasured(grid: Any, honest: Honest, place: Path) -> str:
    """Run an exchange that ends with the model and without metrics; return why."""
    events: list[dict[str, Any]] = []
    report = exchange(grid, honest, place / "run", ONE_PIECE, observer=events.append)
    assert_identical(weights_of(place / "run"), honest.weights)
    assert read_back(place / "run") == report
    assert report["models"] == []
    assert report["silos"] == honest.report["silos"]
    why = str(report["unmeasured"])
    assert report["lost"] == [{"name": "silo-b", "reason": why}]
    assert [e for e in events if e["state"] == "lost"] == [
        {"phase": "evaluate", "state": "lost", "silo": "silo-b", "reason": why}
    ]
    return why


def refused(reply: Any, silo: str) -> Refusal:
    return Refusal(
        plan=reply.plan, session=reply.session, silo=silo, error="DataError", exit_code=11, reason="the data is bad"
    )
