"""The planned exchange without Ray: what comes out, and what the coordinator makes of silos that fail or lie."""

from __future__ import annotations

import copy
import hashlib
import json
import random
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_ssh_public_key
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, Message, RecordDict
from safetensors.numpy import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import gramfuse_client.exchange.local_model
from gramfuse_client.app import SiloApp
from gramfuse_client.silo_file import Silo
from gramfuse_model.loading.base_model import Base, load_base
from gramfuse_model.project import Project
from gramfuse_protocol.contract.layout import PIECE_BYTES as ONE_PIECE
from gramfuse_protocol.contract.layout import Layout
from gramfuse_protocol.contract.node_key import generate
from gramfuse_protocol.contract.plan import Plan
from gramfuse_protocol.errors import (
    ContributionError,
    FederationError,
    GramfuseError,
    RefusalError,
)
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
from gramfuse_server.app import coordinate
from gramfuse_server.report.page.page import page
from gramfuse_server.report.schema import Report
from gramfuse_server.run import delivery
from gramfuse_server.run.exchange import Exchange
from gramfuse_server.run.patience import Patience
from gramfuse_server.run.secure_sums import UPLOADS
from gramfuse_server.run_directory import RunDirectory, read_checkpoint
from gramfuse_simulation.engine import laboratory_of, simulated_silo
from tests.server.test_report import read_back

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


@pytest.fixture(scope="module")
def _kept() -> list[Honest]:
    return []


@pytest.fixture
def honest(
    _kept: list[Honest], pico_project: Any, in_process_grid: Any, tmp_path_factory: pytest.TempPathFactory
) -> Honest:
    """The honest exchange; it is made once."""
    if not _kept:
        project = pico_project(silos=3, name="honest")
        plan, layout = Project.read(project.directory).locked()
        place = tmp_path_factory.mktemp("honest")
        recorder = Recorder()
        grid = in_process_grid(simulated(project, plan, place / "state"), fault=recorder)
        simulated_all = laboratory(project, plan, layout, place / "state")
        report = coordinate(grid, plan, layout, project.directory, place / "run", simulated=simulated_all).document()
        sums = {name: recorder.sums(name) for name in SILOS}
        base = load_base(plan, project.directory)
        _kept.append(Honest(project, plan, layout, place / "run", report, grid.sent, recorder.statistics(), sums, base))
    return _kept[0]


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    """Where runs of this test go."""
    directory = tmp_path / "runs"
    directory.mkdir()
    return directory


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


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """The coordinator looks for answers again at once."""
    monkeypatch.setattr(delivery.time, "sleep", lambda _: None)


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


# What comes out of an honest exchange


def test_the_model_that_is_written_is_bit_for_bit_the_one_that_silos_measured(
    honest: Honest, pico_project: Any, in_process_grid: Any, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[Arrays] = []
    count = gramfuse_client.exchange.local_model.evaluate

    def evaluate(model: torch.nn.Module, *rest: Any) -> Any:
        measured.append({name: tensor.cpu().numpy().copy() for name, tensor in model.state_dict().items()})
        return count(model, *rest)

    monkeypatch.setattr(gramfuse_client.exchange.local_model, "evaluate", evaluate)
    grid = in_process_grid(simulated(honest.project, honest.plan, place / "state"))
    coordinate(grid, honest.plan, honest.layout, honest.project.directory, place / "run")
    assert_identical(weights_of(place / "run"), measured[-1])


def test_a_run_leaves_a_model_that_loads_and_a_complete_report(honest: Honest) -> None:
    out, report = honest.out, honest.report
    assert {path.name for path in out.iterdir()} == {
        "SHA256SUMS", "layout.json", "model", "plan.toml", "report.html", "report.json", "transcript.jsonl",
    }  # fmt: skip
    assert read_back(out) == report
    assert (out / "report.html").read_text(encoding="utf-8") == page(Report.read(report), honest.plan)
    assert report["plan_digest"] == honest.plan.digest == Plan.read(out / "plan.toml").digest
    assert report["layout_digest"] == honest.layout.digest == Layout.read(out / "layout.json").digest
    assert report["silos"] == [{"name": name, "examples": 24} for name in SILOS]
    assert [step["group"] for step in report["solve"]] == [group.name for group in honest.layout.groups]
    assert [step["outcome"] for step in report["solve"]] == ["clean"] * len(honest.layout.groups)
    assert [(m["name"], m["kind"]) for m in report["models"]] == [
        *((name, "silo") for name in SILOS), ("simple", "simple"), ("regmean", "regmean"),
    ]  # fmt: skip
    for model in report["models"]:
        assert set(model["silos"]) == set(SILOS)
        assert model["metrics"]["examples"] == sum(m["examples"] for m in model["silos"].values()) == 60
        hits = sum(m["accuracy"] * m["examples"] for m in model["silos"].values())
        assert model["metrics"]["accuracy"] == pytest.approx(hits / 60)
    for traffic in (report["bytes"], report["bytes_to_silos"]):
        assert set(traffic) == set(SILOS)
        assert all(set(phases) == {"join", "train", "upload", "evaluate"} for phases in traffic.values())
    for phases in report["bytes"].values():
        assert 0 < phases["upload"] - honest.layout.contribution_bytes < 10_000

    sums = dict(reversed(line.split("  ")) for line in (out / "SHA256SUMS").read_text().splitlines())
    files = {p.relative_to(out).as_posix(): p for p in out.rglob("*") if p.is_file() and p.name != "SHA256SUMS"}
    assert sums == {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in files.items()}
    transcript = [json.loads(line) for line in (out / "transcript.jsonl").read_text().splitlines()]
    told = [phase for _, phase in honest.sent if phase != "finish"]  # which comes when the transcript is complete
    assert len([entry for entry in transcript if "to" in entry]) == len(told)
    assert len([entry for entry in transcript if "from" in entry]) == len(told)

    model = AutoModelForSequenceClassification.from_pretrained(out / "model").eval()
    held_out = [row for name in SILOS for row in rows_of(honest.project.directory / "data" / name / "held-out.jsonl")]
    guessed = [model.config.id2label[logits.argmax().item()] for logits in logits_of(out, held_out)]
    right = [label == row["label"] for row, label in zip(held_out, guessed, strict=True)]
    assert report["models"][-1]["metrics"]["accuracy"] == pytest.approx(np.mean(right))
    (labels,) = report["models"][-1]["labels"].values()
    true = Counter(row["label"] for row in held_out)
    assert {label: of["examples"] for label, of in labels.items()} == {name: true[name] for name in labels}
    assert labels.keys() == true.keys() | set(guessed)


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


def test_the_weights_are_what_the_formulas_make_of_the_contributions(honest: Honest) -> None:
    recorder = Recorder()
    about: dict[str, Any] = {"plan": honest.plan.digest, "session": "0" * 32}
    for name, s in honest.statistics.items():
        recorder.replies += [
            (name, TrainReply(**about, silo=name, examples=s.examples, tokens=dict(s.tokens))),
            (name, UploadReply(**about, silo=name, piece=0, arrays=s.blocks)),
        ]
    assert_merged(honest.out, honest.plan, honest.layout, honest.project.directory, recorder, [1, 1, 1])


def test_weights_by_examples_count_each_silo_by_its_examples(
    pico_project: Any, in_process_grid: Any, place: Path
) -> None:
    project = pico_project(silos=2)
    project.replace(project.plan, "alpha = 0.9", 'alpha = 0.9\nweighting = "examples"')
    lines = project.train("silo-b").read_text().splitlines()
    project.train("silo-b").write_text("\n".join(lines[:16]) + "\n")
    plan, layout = Project.read(project.directory).locked()
    recorder = Recorder()
    grid = in_process_grid(simulated(project, plan, place / "state"), fault=recorder)
    report = coordinate(grid, plan, layout, project.directory, place / "run").document()
    assert [silo["examples"] for silo in report["silos"]] == [24, 16]
    assert_merged(place / "run", plan, layout, project.directory, recorder, [24, 16])


TOPICS = {"cat": "dog horse sheep goat", "rain": "snow wind sun storm", "pan": "pot knife spoon oven"}
FILLERS = ["the", "a", "of", "and", "with", "near", "my", "your", "old", "new"]


def text(rng: random.Random, topic: str, words: int = 2) -> str:
    chosen = [*rng.sample(TOPICS[topic].split(), words), *rng.choices(FILLERS, k=rng.randint(1, 3))]
    rng.shuffle(chosen)
    return " ".join(chosen)


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_text_pairs_run_from_end_to_end(pico_project: Any, in_process_grid: Any, place: Path) -> None:
    project = pico_project(silos=2)
    project.replace(project.plan, '["animals", "weather", "kitchen"]', '["same", "other"]\npair = true')
    held_out = []
    for n, name in enumerate(project.names):
        rng = random.Random(n)
        project.replace(project.silo(name), "[data]", '[data]\ntext-pair = "second"')
        for part, count in (("train", 40), ("held-out", 20)):
            rows = []
            for i in range(count):
                first = rng.choice(list(TOPICS))
                second = first if i % 2 else rng.choice([topic for topic in TOPICS if topic != first])
                pair = {"text": text(rng, first), "second": text(rng, second)}
                rows.append({**pair, "label": "same" if first == second else "other"})
            write_rows(project.directory / "data" / name / f"{part}.jsonl", rows)
            held_out += rows if part == "held-out" else []
    plan, layout = Project.read(project.directory).locked()
    recorder = Recorder()
    grid = in_process_grid(simulated(project, plan, place / "state"), fault=recorder)
    report = coordinate(grid, plan, layout, project.directory, place / "run").document()
    assert_merged(place / "run", plan, layout, project.directory, recorder, [1, 1])
    right = [
        ("same", "other")[logits.argmax().item()] == row["label"]
        for row, logits in zip(held_out, logits_of(place / "run", held_out), strict=True)
    ]
    assert report["models"][-1]["metrics"]["accuracy"] == pytest.approx(np.mean(right))
    assert report["models"][-1]["metrics"]["examples"] == 40


def test_regression_runs_from_end_to_end(pico_project: Any, in_process_grid: Any, place: Path) -> None:
    project = pico_project(silos=2)
    project.replace(
        project.plan, 'task = "classification"\nlabels = ["animals", "weather", "kitchen"]', 'task = "regression"'
    )
    held_out = []
    for n, name in enumerate(project.names):
        rng = random.Random(n)
        for part, count in (("train", 40), ("held-out", 20)):
            rows = []
            for _ in range(count):
                words = rng.randint(0, 4)
                rows.append({"text": text(rng, rng.choice(["cat", "rain"]), words), "label": words / 2 + n / 4})
            write_rows(project.directory / "data" / name / f"{part}.jsonl", rows)
            held_out += rows if part == "held-out" else []
    plan, layout = Project.read(project.directory).locked()
    recorder = Recorder()
    grid = in_process_grid(simulated(project, plan, place / "state"), fault=recorder)
    report = coordinate(grid, plan, layout, project.directory, place / "run").document()
    assert_merged(place / "run", plan, layout, project.directory, recorder, [1, 1])
    said = np.array([logits.item() for logits in logits_of(place / "run", held_out)])
    truth = np.array([row["label"] for row in held_out])
    assert report["models"][-1]["metrics"] == pytest.approx(
        {
            "examples": 40,
            "pearson": np.corrcoef(said, truth)[0, 1],
            "rmse": np.sqrt(np.mean((said - truth) ** 2)),
            "mae": np.mean(np.abs(said - truth)),
        },
        abs=1e-3,  # a correlation of nearly equal predictions magnifies the rounding of the logits
    )


@pytest.mark.parametrize("metrics", ["none", "sum"])
def test_no_more_metrics_come_than_the_plan_says(
    honest: Honest, in_process_grid: Any, place: Path, metrics: str
) -> None:
    events: list[dict[str, Any]] = []
    plan = honest.plan.override([f"privacy.metrics={metrics}"]).pinned(honest.plan.pins, honest.layout.digest)
    grid = in_process_grid(honest.scripted())
    report = exchange(grid, honest, place / "run", plan=plan, observer=events.append)
    assert report["unmeasured"] == ("the plan lets no metrics leave" if metrics == "none" else None)
    if metrics == "none":
        assert report["models"] == []
        assert "evaluate" not in {phase for _, phase in grid.sent}
    else:
        assert [m["metrics"] for m in report["models"]] == [m["metrics"] for m in honest.report["models"][3:]]
    assert not any("silos" in model for model in report["models"])
    assert not any("silos" in event for event in events)
    assert_identical(weights_of(place / "run"), honest.weights)


# Pieces, order, and what gets lost


def test_many_pieces_give_the_weights_of_one(honest: Honest, in_process_grid: Any, place: Path) -> None:
    grid = in_process_grid(simulated(honest.project, honest.plan, place / "state"))
    report = exchange(grid, honest, place / "run")
    pieces = -(-honest.layout.contribution_bytes // PIECE_BYTES)
    assert pieces > 10
    assert grid.sent.count(("silo-b", "upload")) == pieces
    assert_identical(weights_of(place / "run"), honest.weights)
    assert report["models"][-1] == honest.report["models"][-1]
    assert not (place / "run" / "spool").exists()


@pytest.mark.parametrize("seed", range(3))
def test_the_order_of_nodes_and_answers_changes_nothing(
    honest: Honest, in_process_grid: Any, place: Path, seed: int
) -> None:
    rng = random.Random(seed)
    nodes = list(honest.scripted().items())
    rng.shuffle(nodes)
    grid = in_process_grid(dict(nodes), lag=rng)
    report = exchange(grid, honest, place / "run", 8000)
    assert_identical(weights_of(place / "run"), honest.weights)
    assert report["models"] == honest.report["models"][-2:]
    assert report["silos"] == honest.report["silos"]


@pytest.mark.parametrize("seed", range(3))
def test_sums_are_made_in_the_order_of_the_roster(honest: Honest, in_process_grid: Any, place: Path, seed: int) -> None:
    """1e30 + 1 − 1e30 is 0 in that order alone."""
    rng = random.Random(seed)
    nodes = list(honest.scripted().items())
    for name, delta in zip(SILOS, (1e30, 1, -1e30), strict=True):
        silo = dict(nodes)[name]
        biases = {t.name: np.full(t.shape, delta, np.float32) for t in honest.layout.tensors if t.merge == "mean"}
        blocks = {**silo.statistics.blocks, **{f"delta:{bias}": array for bias, array in biases.items()}}
        silo.statistics = Statistics(24, silo.statistics.tokens, blocks)
    rng.shuffle(nodes)
    exchange(in_process_grid(dict(nodes), lag=rng), honest, place / "run")
    merged, base = weights_of(place / "run"), honest.base.model.state_dict()
    for name in biases:
        np.testing.assert_array_equal(merged[name], base[name].numpy(), err_msg=name)


@pytest.mark.parametrize("code", LOST)
def test_what_is_lost_is_asked_again_and_nobody_trains_twice(
    honest: Honest, in_process_grid: Any, place: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    trainings = []
    finetune = gramfuse_client.exchange.local_model.finetune

    def counted(*arguments: Any, **more: Any) -> None:
        trainings.append(arguments)
        finetune(*arguments, **more)

    monkeypatch.setattr(gramfuse_client.exchange.local_model, "finetune", counted)
    lost = []

    def fault(visit: Any, deliver: Callable[[], RecordDict]) -> RecordDict | Error:
        if visit.number == 1 and visit.node == "silo-a":  # the request does not arrive
            lost.append(visit.phase)
            return Error(code, "lost on the way there")
        if visit.number <= 2 and visit.node == "silo-b":  # the silo does its work, and the reply does not arrive
            deliver()
            lost.append(visit.phase)
            return Error(code, "lost on the way back")
        return deliver()

    grid = in_process_grid(simulated(honest.project, honest.plan, place / "state"), fault=fault)
    report = coordinate(grid, honest.plan, honest.layout, honest.project.directory, place / "run").document()
    assert sorted(lost) == sorted(["join", "train", "upload", "evaluate", "finish"] * 3)
    assert grid.sent.count(("silo-b", "train")) == grid.sent.count(("silo-b", "upload")) == 3
    assert len(trainings) == 3
    assert_identical(weights_of(place / "run"), honest.weights)
    assert report["models"] == honest.report["models"][-2:]


@pytest.mark.timeout(60)
@pytest.mark.parametrize("code", LOST)
@pytest.mark.parametrize("phase", ["join", "train", "upload", "evaluate"])
def test_three_losses_in_a_row_end_the_run(
    honest: Honest, in_process_grid: Any, place: Path, phase: str, code: int
) -> None:
    def fault(visit: Any, deliver: Callable[[], RecordDict]) -> RecordDict | Error:
        if (visit.node, visit.phase) == ("silo-b", phase):
            return Error(code, "it is gone")
        return deliver()

    grid = in_process_grid(honest.scripted(), fault=fault)
    message = (unmeasured if phase == "evaluate" else failure_of(FederationError))(grid, honest, place)
    assert grid.sent.count(("silo-b", phase)) == delivery.ATTEMPTS == 3
    for part in (repr(phase), f"error {code}", "it is gone"):
        assert part in message
    # Before it has joined, a silo is known by its node alone.
    assert ("silo 'silo-b'" if phase != "join" else f"node {grid.number('silo-b')}") in message


def test_a_request_that_flower_does_not_take_is_sent_again(
    honest: Honest, in_process_grid: Any, place: Path, tmp_path: Path
) -> None:
    grid = in_process_grid(honest.scripted())
    grid.untaken.update({("silo-a", "train"): 2, ("silo-b", "upload"): 1, ("silo-c", "join"): 2})
    exchange(grid, honest, place / "run")
    assert_identical(weights_of(place / "run"), honest.weights)

    grid = in_process_grid(honest.scripted())
    grid.untaken["silo-b", "train"] = delivery.ATTEMPTS
    message = failure(FederationError, grid, honest, tmp_path)
    assert "silo 'silo-b' gave no answer in phase 'train' after 3 tries: Flower does not take the request" in message


def test_a_run_that_lost_a_silo_after_training_goes_on_where_it_stopped(
    honest: Honest, in_process_grid: Any, place: Path
) -> None:
    def fault(visit: Any, deliver: Callable[[], RecordDict]) -> RecordDict | Error:
        return Error(5, "it is gone") if (visit.node, visit.phase) == ("silo-c", "upload") else deliver()

    silos = honest.scripted()
    with pytest.raises(FederationError, match="silo-c"):
        exchange(in_process_grid(silos, fault=fault), honest, place / "run")
    grid = in_process_grid(silos)
    report = exchange(grid, honest, place / "run", resume=True)
    assert not [sent for sent in grid.sent if sent[1] == "train"]
    assert {silo for silo, phase in grid.sent if phase == "upload"} == {"silo-c"}
    assert_identical(weights_of(place / "run"), honest.weights)
    assert report["models"] == honest.report["models"][-2:]
    assert [path.name for path in place.iterdir()] == ["run"]


def test_a_silo_whose_app_raises_is_not_asked_again(honest: Honest, in_process_grid: Any, place: Path) -> None:
    def fault(visit: Any, deliver: Callable[[], RecordDict]) -> RecordDict:
        if (visit.node, visit.phase) == ("silo-b", "train"):
            raise ValueError("boom")
        return deliver()

    grid = in_process_grid(honest.scripted(), fault=fault)
    message = failure(FederationError, grid, honest, place)
    assert "silo 'silo-b'" in message
    assert "'train'" in message
    assert grid.sent.count(("silo-b", "train")) == 1


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


# Each silo once: silos whose contributions are unit vectors

FIVE = tuple(f"silo-{letter}" for letter in "abcde")


@pytest.mark.parametrize("seed", range(4))
def test_every_silo_counts_exactly_once_whatever_gets_lost(
    pico_project: Any, in_process_grid: Any, place: Path, seed: int
) -> None:
    """Silo i differs from the base in the i-th element of every bias and the i-th row of every weight, by 1, and
    weighs 2^i in every Gram matrix. So each element of the result tells how often its silo was counted, and that
    the others were.
    """
    project = pico_project(silos=5)
    project.replace(project.plan, "alpha = 0.9", "alpha = 1.0")
    project.replace(project.plan, '"*" = "full"', '"*" = "diagonal"')
    plan, layout = Project.read(project.directory).locked()
    rng = random.Random(seed)

    def unit(i: int) -> Statistics:
        blocks = {f"gram:{g.name}": np.full(g.d_in, 2.0**i, np.float32) for g in layout.groups}
        for tensor in layout.tensors:
            delta = np.zeros(tensor.shape, np.float32)
            if tensor.merge == "regmean":
                delta[:, i] = 1  # the weights of an nn.Linear are stored (d_out, d_in)
            else:
                delta[i % tensor.shape[0]] += 1
            blocks[f"delta:{tensor.name}"] = delta
        return Statistics(10 + i, dict.fromkeys((g.name for g in layout.groups), 5), blocks)

    def fault(visit: Any, deliver: Callable[[], RecordDict]) -> RecordDict | Error:
        # At most every second message of a silo is lost, so that no request is lost three times.
        if visit.number % 2 == 0 or rng.random() < 0.5:
            return deliver()
        if rng.random() < 0.5:
            deliver()
        return Error(rng.choice(LOST), "lost")

    nodes = [(name, Scripted(name, layout, unit(i))) for i, name in enumerate(FIVE)]
    rng.shuffle(nodes)
    grid = in_process_grid(dict(nodes), fault=fault, lag=rng)
    honest = Honest(project, plan, layout, place / "run", {}, [], {}, {}, load_base(plan, project.directory))
    report = exchange(grid, honest, place / "run", 3000)
    assert len(grid.sent) > len(layout.pieces(3000)) * 5 + 5 * 4
    assert grid.most_under_way["upload"] == UPLOADS == 2
    assert {step["outcome"] for step in report["solve"]} == {"clean"}

    base = honest.base.model.state_dict()
    merged = weights_of(place / "run")
    share = 2.0 ** np.arange(5) / 31
    for tensor in layout.tensors:
        delta = merged[tensor.name] - base[tensor.name].numpy()
        expected = np.zeros(tensor.shape)
        if tensor.merge == "regmean":
            expected[:, :5] = share
        else:
            np.add.at(expected, np.arange(5) % tensor.shape[0], 1 / 5)
        np.testing.assert_allclose(delta, expected, rtol=1e-5, atol=1e-6, err_msg=tensor.name)


# Refusals


def test_a_silo_with_another_base_model_is_named_and_the_run_ends(
    honest: Honest, pico_project: Any, pico_gpt2: Path, in_process_grid: Any, place: Path
) -> None:
    project = pico_project(silos=3)
    project.replace(project.silo("silo-b"), 'device = "cpu"', f'device = "cpu"\nbase = "{pico_gpt2}"')
    grid = in_process_grid(simulated(project, honest.plan, project.directory / "state"))
    message = failure(RefusalError, grid, honest, place)
    assert "silo 'silo-b'" in message
    assert "silo-a" not in message
    assert "ModelError" in message
    assert str(pico_gpt2) not in message  # what a silo keeps where is not the coordinator's to know
    assert {phase for _, phase in grid.sent} == {"join"}


def test_a_silo_that_has_not_approved_the_plan_is_named_and_the_run_ends(
    honest: Honest, pico_project: Any, in_process_grid: Any, place: Path
) -> None:
    project = pico_project(silos=3)
    silos = simulated(project, honest.plan, project.directory / "state")
    silos["silo-c"] = SiloApp(lambda _: Silo.read(project.silo("silo-c")))
    grid = in_process_grid(silos)
    message = failure(RefusalError, grid, honest, place)
    assert "silo-c" in message
    assert "approved" in message
    assert str(project.directory) not in message
    assert {phase for _, phase in grid.sent} == {"join"}


@dataclass(frozen=True)
class Keyed:
    """A plan that names node keys, and those keys as a SuperLink has them."""

    plan: Plan
    public: dict[str, bytes]

    @staticmethod
    def of(honest: Honest) -> Keyed:
        lines = {name: generate()[1] for name in (*SILOS, "stranger")}
        roster = tuple(entry.model_copy(update={"node_key": lines[entry.name]}) for entry in honest.plan.silo)
        pem = Encoding.PEM, PublicFormat.SubjectPublicKeyInfo
        public = {name: load_ssh_public_key(line.encode()).public_bytes(*pem) for name, line in lines.items()}
        return Keyed(honest.plan.model_copy(update={"silo": roster}), public)


def test_a_node_is_the_silo_whose_key_it_has(honest: Honest, in_process_grid: Any, place: Path) -> None:
    keyed = Keyed.of(honest)
    stranger = Scripted("stranger", honest.layout, honest.statistics["silo-a"])
    grid = in_process_grid({"stranger": stranger, **honest.scripted()}, keys=keyed.public)
    exchange(grid, honest, place / "run", plan=keyed.plan, patience=Patience(authenticated=True))
    assert_identical(weights_of(place / "run"), honest.weights)
    assert "stranger" not in {node for node, _ in grid.sent}  # another plan's silo is not even asked


@pytest.mark.parametrize("phase", ["join", "train", "upload"])
def test_a_message_from_one_silos_connection_in_anothers_name_is_refused(
    honest: Honest, in_process_grid: Any, place: Path, phase: str
) -> None:
    def fault(visit: Any, deliver: Callable[[], RecordDict]) -> RecordDict:
        content = deliver()
        if (visit.node, visit.phase) != ("silo-b", phase):
            return content
        reply = unpack(from_record(content), REPLIES)
        return to_record(pack(reply.model_copy(update={"silo": "silo-c"})))

    keyed = Keyed.of(honest)
    grid = in_process_grid(honest.scripted(), keys=keyed.public, fault=fault)
    with pytest.raises(FederationError, match=r"silo 'silo-b' answered as .*'silo-c'"):
        exchange(grid, honest, place / "run", plan=keyed.plan, patience=Patience(authenticated=True))


@pytest.mark.parametrize("back", [True, False])
def test_a_silo_that_went_away_is_waited_for(
    honest: Honest, in_process_grid: Any, place: Path, back: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(delivery, "REMINDER_SECONDS", 0.1)
    events: list[dict[str, Any]] = []

    def fault(visit: Any, deliver: Callable[[], RecordDict]) -> RecordDict | Error:
        if (visit.node, visit.phase, visit.number) == ("silo-b", "upload", 1):
            grid.away.add("silo-b")
            return Error(5, "Node Unavailable")
        return deliver()

    def observe(event: dict[str, Any]) -> None:
        events.append(event)
        if back and event["state"] == "waiting":
            grid.away.clear()

    keyed = Keyed.of(honest)
    grid = in_process_grid(honest.scripted(), keys=keyed.public, fault=fault)
    settings: dict[str, Any] = {"plan": keyed.plan, "patience": Patience(grace=30 if back else 0.5, authenticated=True)}
    if back:
        exchange(grid, honest, place / "run", observer=observe, **settings)
        assert_identical(weights_of(place / "run"), honest.weights)
    else:
        with pytest.raises(FederationError, match=r"'silo-b' went away in phase 'upload' and was not back"):
            exchange(grid, honest, place / "run", observer=observe, **settings)
    waited = [event for event in events if event["state"] == "waiting"]
    assert {(event["silo"], event["phase"], event["away"]) for event in waited} == {("silo-b", "upload", True)}


@pytest.mark.parametrize("tries", [2, 4])
def test_a_node_that_was_started_anew_is_asked_again(
    honest: Honest, in_process_grid: Any, place: Path, tries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Flower drops what a node had fetched when it ended, and tells only whoever asks before it is back.
    monkeypatch.setattr(delivery, "LOOK_SECONDS", 0.05)

    def fault(visit: Any, deliver: Callable[[], RecordDict]) -> RecordDict | None:
        if (visit.node, visit.phase) != ("silo-b", "upload") or visit.number >= tries:
            return deliver()
        grid.starts["silo-b"] += 1
        return None

    grid = in_process_grid(honest.scripted(), fault=fault)
    if tries <= 3:
        exchange(grid, honest, place / "run")
        assert_identical(weights_of(place / "run"), honest.weights)
        assert grid.sent.count(("silo-b", "upload")) == grid.sent.count(("silo-a", "upload")) + tries - 1
    else:
        with pytest.raises(FederationError, match=r"'silo-b' gave no answer .*'upload' after 3 tries: its node was"):
            exchange(grid, honest, place / "run")


def test_nodes_without_keys_are_not_silos_where_nodes_are_authenticated(
    honest: Honest, in_process_grid: Any, place: Path
) -> None:
    grid = in_process_grid(honest.scripted())
    with pytest.raises(FederationError, match="0 of 3 silos connected"):
        exchange(
            grid,
            honest,
            place / "run",
            plan=Keyed.of(honest).plan,
            patience=Patience(wait=0.1, authenticated=True),
        )
    assert not grid.sent


def test_the_report_of_a_run_that_failed_says_how_far_each_silo_came(
    honest: Honest, in_process_grid: Any, place: Path
) -> None:
    keyed = Keyed.of(honest)

    def states(plan: Plan, fault: Any = None, minimum: int = 3, **more: Any) -> tuple[dict[str, str], dict[str, str]]:
        grid = in_process_grid(honest.scripted(), keys=keyed.public, fault=fault)
        grid.away |= {"silo-b"} if "patience" in more else set()
        privacy = plan.privacy.model_copy(update={"minimum_survivors": minimum})
        with pytest.raises(GramfuseError) as caught:
            exchange(grid, honest, place / "run", plan=plan.model_copy(update={"privacy": privacy}), **more)
        report = left(place, caught.value)
        assert report["name"] == honest.report["name"]
        assert report["base"] == honest.report["base"]
        return {s["name"]: s["state"] for s in report["silos"]}, {s["name"]: s["reason"] for s in report["lost"]}

    def refuses(visit: Any, deliver: Callable[[], RecordDict]) -> RecordDict | Error:
        reply = unpack(from_record(deliver()), REPLIES)
        if (visit.node, visit.phase) == ("silo-c", "join"):
            said = {"error": "RefusalError", "exit_code": 13, "reason": "the operator said no"}
            return to_record(pack(Refusal(plan=reply.plan, session=reply.session, silo="silo-c", **said)))
        return Error(5, "it is gone") if (visit.node, visit.phase) == ("silo-a", "upload") else to_record(pack(reply))

    found, lost = states(keyed.plan, patience=Patience(wait=0.1, authenticated=True))
    assert found == {"silo-a": "connected", "silo-b": "absent", "silo-c": "connected"}
    assert lost == {}
    found, lost = states(honest.plan, refuses)
    assert found == {"silo-a": "joined", "silo-b": "joined", "silo-c": "lost"}
    assert "the operator said no" in lost["silo-c"]
    found, lost = states(honest.plan, refuses, minimum=2)
    assert found == {"silo-a": "lost", "silo-b": "trained", "silo-c": "lost"}
    assert lost.keys() == {"silo-a", "silo-c"}
    assert "it is gone" in lost["silo-a"]


def test_nodes_beyond_the_roster_that_refuse_do_not_stop_the_others(
    honest: Honest, in_process_grid: Any, place: Path
) -> None:
    def fault(visit: Any, deliver: Callable[[], RecordDict]) -> RecordDict:
        content = deliver()
        if visit.node != "stranger":
            return content
        return to_record(pack(refused(unpack(from_record(content), REPLIES), "stranger")))

    stranger = Scripted("stranger", honest.layout, honest.statistics["silo-a"])
    grid = in_process_grid({"stranger": stranger, **honest.scripted()}, fault=fault)
    report = exchange(grid, honest, place / "run")
    assert_identical(weights_of(place / "run"), honest.weights)
    assert [sent for sent in grid.sent if sent[0] == "stranger"] == [("stranger", "join")]
    assert set(report["bytes"]) == set(report["bytes_to_silos"]) == set(SILOS)


# Lies


def lying(phase: str, change: Callable[[Any], Any], silo: str = "silo-b", *, once: bool = False) -> Fault:
    """A fault: what `silo` sends in `phase` is changed as a message, or, if that is not one any more, as a record."""

    def fault(visit: Any, deliver: Callable[[], RecordDict]) -> RecordDict:
        content = deliver()
        if (visit.node, visit.phase) != (silo, phase) or (once and visit.number > 1):
            return content
        changed = change(unpack(from_record(content), REPLIES))
        return changed if isinstance(changed, RecordDict) else to_record(pack(changed))

    return fault


def with_array(change: Callable[[np.ndarray], np.ndarray | None], pick: str = "delta:") -> Callable[[Any], Any]:
    """Change the first array whose name starts so; None takes it away."""

    def apply(reply: Any) -> Any:
        arrays = dict(reply.arrays)
        name = next(name for name in arrays if name.startswith(pick))
        changed = change(arrays.pop(name).copy())
        return reply.model_copy(update={"arrays": arrays if changed is None else {**arrays, name: changed}})

    return apply


def value_at(value: float) -> Callable[[np.ndarray], np.ndarray]:
    def apply(array: np.ndarray) -> np.ndarray:
        array.reshape(-1)[-1] = value
        return array

    return apply


def another(**update: Any) -> Callable[[Any], Any]:
    return lambda reply: reply.model_copy(update=update)


def extra(reply: Any) -> Any:
    return reply.model_copy(update={"arrays": {**reply.arrays, "delta:a.back.door": np.zeros(3, np.float32)}})


CONTRIBUTIONS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "NaN in a weight": (with_array(value_at(np.nan)), "delta:"),
    "Inf in a weight": (with_array(value_at(np.inf)), "delta:"),
    "-Inf in a weight": (with_array(value_at(-np.inf)), "delta:"),
    "NaN in a Gram matrix": (with_array(value_at(np.nan), "gram:"), "gram:"),
    "a weight of another shape": (with_array(lambda a: a[:-1]), "delta:"),
    "a weight stored flat": (with_array(lambda a: a.reshape(-1)), "delta:"),
    "a Gram matrix of one more feature": (with_array(lambda a: np.append(a, a[:1]), "gram:"), "gram:"),
    "an empty Gram matrix": (with_array(lambda a: a[:0], "gram:"), "gram:"),
    "a missing weight": (with_array(lambda _: None), "delta:"),
    "a missing Gram matrix": (with_array(lambda _: None, "gram:"), "gram:"),
    "no array at all": (another(arrays={}), "gram:"),
    "an unknown tensor": (extra, "delta:a.back.door"),
    "a weight in float64": (with_array(lambda a: a.astype(np.float64)), "delta:"),
}


@pytest.mark.parametrize("lie", CONTRIBUTIONS)
def test_a_contribution_that_does_not_fit_names_silo_and_tensor(
    honest: Honest, in_process_grid: Any, place: Path, lie: str
) -> None:
    change, tensor = CONTRIBUTIONS[lie]
    names = [block.name for block in honest.layout.blocks if block.name.startswith(tensor)]
    grid = in_process_grid(honest.scripted(), fault=lying("upload", change))
    # An array of a dtype that the phase never has is refused with the message that it came in.
    message = failure(FederationError if "float64" in lie else ContributionError, grid, honest, place)
    assert "silo 'silo-b'" in message
    assert repr(names[0] if names else tensor) in message
    assert grid.sent.count(("silo-b", "upload")) == 1
    assert not [phase for _, phase in grid.sent if phase == "evaluate"]


def test_a_lie_in_a_later_piece_is_found_and_names_the_slice(honest: Honest, in_process_grid: Any, place: Path) -> None:
    pieces = honest.layout.pieces(PIECE_BYTES)
    number = next(n for n, piece in enumerate(pieces) if n > 2 and piece[0].name != piece[0].block.name)

    def change(reply: Any) -> Any:
        return with_array(value_at(np.nan), "")(reply) if reply.piece == number else reply

    grid = in_process_grid(honest.scripted(), fault=lying("upload", change))
    message = failure(ContributionError, grid, honest, place, PIECE_BYTES)
    assert "silo 'silo-b'" in message
    assert repr(pieces[number][0].name) in message


@pytest.mark.parametrize("metrics", ["none", "sum"])
def test_a_merge_that_float32_cannot_hold_ends_the_run_and_names_the_tensor(
    honest: Honest, in_process_grid: Any, place: Path, metrics: str
) -> None:
    """Every value that one silo sends is finite, and still the closed form goes beyond what the model can hold."""
    rng = np.random.default_rng(0)
    silos = honest.scripted()
    true = silos["silo-b"].statistics
    blocks = {
        name: rng.choice([-3.3e38, 3.3e38], block.shape).astype(np.float32)
        if name.startswith("delta:")
        else block * np.float32(1000)
        for name, block in true.blocks.items()
    }
    silos["silo-b"].statistics = Statistics(true.examples, true.tokens, blocks)
    plan = honest.plan.override([f"privacy.metrics={metrics}"]).pinned(honest.plan.pins, honest.layout.digest)
    with pytest.raises(ContributionError) as caught:
        exchange(in_process_grid(silos), honest, place / "run", plan=plan)
    assert any(repr(tensor.name) in str(caught.value) for tensor in honest.layout.tensors)
    report = left(place, caught.value)
    assert report["failure"].items() >= {"phase": "merge", "round": 1, "resumable": False}.items()
    assert {silo["state"] for silo in report["silos"]} == {"trained"}
    assert not list(place.iterdir())


def test_a_piece_that_was_not_asked_for_is_refused(honest: Honest, in_process_grid: Any, place: Path) -> None:
    kept: list[Any] = []

    def change(reply: Any) -> Any:
        kept.append(reply)
        return kept[max(0, len(kept) - 2)]  # each piece but the first is the one before it again

    grid = in_process_grid(honest.scripted(), fault=lying("upload", change))
    message = failure(FederationError, grid, honest, place, PIECE_BYTES)
    assert "silo 'silo-b'" in message
    assert "piece 0" in message
    assert "piece 1" in message


def group_counts(change: Callable[[dict[str, int]], None]) -> Callable[[Any], Any]:
    def apply(reply: Any) -> Any:
        tokens = dict(reply.tokens)
        change(tokens)
        return reply.model_copy(update={"tokens": tokens})

    return apply


COUNTS: dict[str, tuple[Callable[[Any], Any], type[GramfuseError]]] = {
    "an unknown group": (group_counts(lambda t: t.update({"back.door": 1})), ContributionError),
    "a missing group": (group_counts(lambda t: t.pop(next(iter(t))) and None), ContributionError),
    "a negative count": (group_counts(lambda t: t.update({next(iter(t)): -1})), FederationError),
    "no examples": (another(examples=0), FederationError),
    "a negative number of examples": (another(examples=-3), FederationError),
}


@pytest.mark.parametrize("lie", COUNTS)
def test_counts_that_do_not_fit_name_the_silo(honest: Honest, in_process_grid: Any, place: Path, lie: str) -> None:
    change, kind = COUNTS[lie]
    grid = in_process_grid(honest.scripted(), fault=lying("train", change))
    assert "silo 'silo-b'" in failure(kind, grid, honest, place)
    assert not [phase for _, phase in grid.sent if phase == "upload"]


METRICS: dict[str, Callable[[Any], Any]] = {
    "another shape": with_array(lambda a: a[:2], "sums"),
    "one more dimension": with_array(lambda a: a[None], "sums"),
    "float32": with_array(lambda a: a.astype(np.float32), "sums"),
    "NaN": with_array(value_at(np.nan), "sums"),
    "Inf": with_array(value_at(np.inf), "sums"),
    "counts below zero": with_array(value_at(-1000), "sums"),
    "as many below zero as the others have": with_array(lambda a: value_at(-40)(a * 0), "sums"),
    "none": another(arrays={}),
    "of another model": another(candidate="silo-a"),
}


@pytest.mark.parametrize("lie", METRICS)
def test_metrics_that_do_not_fit_name_the_silo(honest: Honest, in_process_grid: Any, place: Path, lie: str) -> None:
    grid = in_process_grid(honest.scripted(), fault=lying("evaluate", METRICS[lie]))
    assert "silo 'silo-b'" in unmeasured(grid, honest, place)


IDENTITIES: dict[str, Callable[[Any], Any]] = {
    "another session": another(session="f" * 32),
    "another plan": another(plan="f" * 64),
    "another silo of the roster": another(silo="silo-a"),
    "a silo that the roster does not name": another(silo="silo-z"),
}


@pytest.mark.parametrize("phase", ["train", "upload", "evaluate"])
@pytest.mark.parametrize("lie", IDENTITIES)
def test_an_answer_that_belongs_elsewhere_names_the_silo(
    honest: Honest, in_process_grid: Any, place: Path, lie: str, phase: str
) -> None:
    grid = in_process_grid(honest.scripted(), fault=lying(phase, IDENTITIES[lie]))
    end = unmeasured if phase == "evaluate" else failure_of(FederationError)
    assert "silo 'silo-b'" in end(grid, honest, place)
    assert grid.sent.count(("silo-b", phase)) == 1


@pytest.mark.parametrize("lie", ["another session", "another plan"])
def test_an_answer_to_join_that_belongs_elsewhere_names_the_node(
    honest: Honest, in_process_grid: Any, place: Path, lie: str
) -> None:
    grid = in_process_grid(honest.scripted(), fault=lying("join", IDENTITIES[lie]))
    assert f"node {grid.number('silo-b')}" in failure(FederationError, grid, honest, place)


def as_phase(phase: str) -> Callable[[Any], Any]:
    """The same silo's answer to something else."""

    def apply(reply: Any) -> Any:
        about = {"plan": reply.plan, "session": reply.session, "silo": reply.silo}
        if phase == "join":
            return JoinReply(**about)
        return UploadReply(**about, piece=0, arrays={})

    return apply


@pytest.mark.parametrize(
    ("asked", "answered"), [("train", "join"), ("train", "upload"), ("upload", "join"), ("evaluate", "upload")]
)
def test_an_answer_of_another_phase_names_the_silo(
    honest: Honest, in_process_grid: Any, place: Path, asked: str, answered: str
) -> None:
    grid = in_process_grid(honest.scripted(), fault=lying(asked, as_phase(answered)))
    message = (unmeasured if asked == "evaluate" else failure_of(FederationError))(grid, honest, place)
    for part in ("silo 'silo-b'", repr(asked), repr(answered)):
        assert part in message


def test_two_nodes_cannot_be_one_silo(honest: Honest, in_process_grid: Any, place: Path) -> None:
    grid = in_process_grid(honest.scripted(), fault=lying("join", another(silo="silo-a")))
    message = failure(FederationError, grid, honest, place)
    assert "silo-a" in message
    assert "two nodes" in message
    assert {phase for _, phase in grid.sent} == {"join"}


def test_a_node_cannot_take_a_name_that_the_roster_does_not_have(
    honest: Honest, in_process_grid: Any, place: Path
) -> None:
    grid = in_process_grid(honest.scripted(), fault=lying("join", another(silo="silo-z")))
    message = failure(FederationError, grid, honest, place)
    assert "silo-z" in message
    assert f"node {grid.number('silo-b')}" in message
    assert {phase for _, phase in grid.sent} == {"join"}


def refused(reply: Any, silo: str) -> Refusal:
    return Refusal(
        plan=reply.plan, session=reply.session, silo=silo, error="DataError", exit_code=11, reason="the data is bad"
    )


@pytest.mark.parametrize("phase", ["train", "upload", "evaluate"])
def test_a_refusal_ends_the_run_or_the_measuring_with_the_silos_name_and_reason(
    honest: Honest, in_process_grid: Any, place: Path, phase: str
) -> None:
    grid = in_process_grid(honest.scripted(), fault=lying(phase, lambda reply: refused(reply, "silo-b")))
    message = (unmeasured if phase == "evaluate" else failure_of(RefusalError))(grid, honest, place)
    for part in ("silo 'silo-b'", repr(phase), "the data is bad", "DataError"):
        assert part in message
    assert grid.sent.count(("silo-b", phase)) == 1


@pytest.mark.parametrize("phase", ["train", "upload", "evaluate"])
def test_a_silo_cannot_refuse_in_anothers_name(honest: Honest, in_process_grid: Any, place: Path, phase: str) -> None:
    grid = in_process_grid(honest.scripted(), fault=lying(phase, lambda reply: refused(reply, "silo-a")))
    end = unmeasured if phase == "evaluate" else failure_of(RefusalError)
    assert "silo 'silo-b'" in end(grid, honest, place)


# What cannot be read


def header(change: Callable[[str], Any]) -> Callable[[Any], Any]:
    """A reply whose header is changed as text, or is not text at all."""

    def apply(reply: Any) -> RecordDict:
        record = to_record(pack(reply))
        record["header"] = ConfigRecord({"json": change(str(record.config_records["header"]["json"]))})
        return record

    return apply


def document(change: Callable[[dict[str, Any]], Any]) -> Callable[[Any], Any]:
    """A reply whose header is changed as a JSON document."""

    def edited(text: str) -> str:
        value = json.loads(text)
        change(value)
        return json.dumps(value)

    return header(edited)


def without(record_name: str) -> Callable[[Any], Any]:
    def apply(reply: Any) -> RecordDict:
        record = to_record(pack(reply))
        del record[record_name]
        return record

    return apply


def arrays(change: Callable[[list[Array]], list[Array]]) -> Callable[[Any], Any]:
    """A reply whose buffers are changed."""

    def apply(reply: Any) -> RecordDict:
        record = to_record(pack(reply))
        buffers = change(list(record.array_records["arrays"].values()))
        record["arrays"] = ArrayRecord({f"{n:06}": array for n, array in enumerate(buffers)})
        return record

    return apply


def raw(dtype: str, shape: str, data: bytes) -> Array:
    """An array as NumPy stores it, with a header that need not be true."""
    description = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}".encode().ljust(117) + b"\n"
    return Array("uint8", (3,), "numpy.ndarray", b"\x93NUMPY\x01\x00v\x00" + description + data)


UNREADABLE: dict[str, Callable[[Any], Any]] = {
    "a header that is not JSON": header(lambda _: "not JSON"),
    "an empty header": header(lambda _: ""),
    "a header that is a list": header(lambda _: "[]"),
    "a header of another type": header(lambda _: 7),
    "a header that is nested too deeply": header(lambda _: "[" * 100_000),
    "no header": without("header"),
    "no arrays": without("arrays"),
    "an empty record": lambda _: RecordDict(),
    "an unknown phase": document(lambda d: d.update(phase="conquer")),
    "a request": document(lambda d: d.update(phase="upload", body={**d["body"], "piece_bytes": 3})),
    "another version of the protocol": document(lambda d: d["body"].update(protocol=2)),
    "a field too many": document(lambda d: d["body"].update(more=1)),
    "a field too few": document(lambda d: d["body"].pop("session")),
    "a name that is a path": document(lambda d: d["body"].update(silo="../../etc")),
    "an array that is longer than what came": document(lambda d: d["arrays"].append(["more", "float32", [10**6]])),
    "an array with an absurd shape": document(lambda d: d["arrays"].append(["more", "float32", [0, 2**80]])),
    "an array of a negative size": document(lambda d: d["arrays"].append(["more", "float32", [-1]])),
    "an array of objects": document(lambda d: d["arrays"].append(["more", "object", [0]])),
    "more bytes than arrays": arrays(lambda buffers: [*buffers, Array(np.zeros(3, np.uint8))]),
    "bytes that are not an array": arrays(lambda _: [Array("uint8", (3,), "numpy.ndarray", b"no")]),
    "a pickle": arrays(lambda _: [raw("|O", "(1,)", b"\x80\x04N.")]),
    "a damaged archive": arrays(lambda _: [Array("uint8", (3,), "numpy.ndarray", b"PK\x03\x04 no archive")]),
    "an array that says it is huge": arrays(lambda _: [raw("|u1", f"({2**46},)", b"abc")]),
    "an array that ends too early": arrays(lambda _: [raw("|u1", "(100,)", b"abc")]),
    "buffers of floating-point numbers": arrays(lambda b: [Array(buffer.numpy().astype(np.float32)) for buffer in b]),
    "buffers of wide integers": arrays(lambda b: [Array(buffer.numpy().astype(np.int64)) for buffer in b]),
    "buffers of two dimensions": arrays(lambda b: [Array(buffer.numpy().reshape(-1, 2)) for buffer in b]),
    "a buffer without dimensions": arrays(lambda _: [Array(np.array(7, np.uint8))]),
}


@pytest.mark.timeout(10)
@pytest.mark.parametrize("lie", UNREADABLE)
def test_what_cannot_be_read_names_the_silo(honest: Honest, in_process_grid: Any, place: Path, lie: str) -> None:
    grid = in_process_grid(honest.scripted(), fault=lying("upload", UNREADABLE[lie]))
    assert "silo 'silo-b'" in failure(FederationError, grid, honest, place)


def test_what_cannot_be_read_at_join_names_the_node(honest: Honest, in_process_grid: Any, place: Path) -> None:
    grid = in_process_grid(honest.scripted(), fault=lying("join", header(lambda _: "not JSON")))
    assert f"node {grid.number('silo-b')}" in failure(FederationError, grid, honest, place)
