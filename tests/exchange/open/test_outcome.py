"""What comes out of an honest open exchange."""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification

import gramfuse_client.exchange.local_model
from gramfuse_model.project import Project
from gramfuse_protocol.contract.layout import Layout
from gramfuse_protocol.contract.plan import Plan
from gramfuse_protocol.messages.phases import TrainReply, UploadReply
from gramfuse_server.app import coordinate
from gramfuse_server.report.page.page import page
from gramfuse_server.report.schema import Report
from tests.conftest import write_jsonl
from tests.exchange.open.runs import (
    SILOS,
    Arrays,
    Honest,
    Recorder,
    assert_identical,
    assert_merged,
    exchange,
    logits_of,
    rows_of,
    simulated,
    weights_of,
)
from tests.reports import read_back


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
            write_jsonl(project.directory / "data" / name / f"{part}.jsonl", rows)
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
        project.plan,
        'task = "classification"\nhead = "same"\nlabels = ["animals", "weather", "kitchen"]',
        'task = "regression"',
    )
    held_out = []
    for n, name in enumerate(project.names):
        rng = random.Random(n)
        for part, count in (("train", 40), ("held-out", 20)):
            rows = []
            for _ in range(count):
                words = rng.randint(0, 4)
                rows.append({"text": text(rng, rng.choice(["cat", "rain"]), words), "label": words / 2 + n / 4})
            write_jsonl(project.directory / "data" / name / f"{part}.jsonl", rows)
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
    assert (report["unmeasured"] is not None) == (metrics == "none")
    if metrics == "none":
        assert report["models"] == []
        assert "evaluate" not in {phase for _, phase in grid.sent}
    else:
        assert [m["metrics"] for m in report["models"]] == [m["metrics"] for m in honest.report["models"][3:]]
    assert not any("silos" in model for model in report["models"])
    assert not any("silos" in event for event in events)
    assert_identical(weights_of(place / "run"), honest.weights)
