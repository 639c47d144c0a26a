"""The same plan and seeds give the same merged weights in simulation, between real processes, and in a plain loop."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from safetensors.numpy import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from gramfuse_client.data.batches import Encoded, batches
from gramfuse_client.data.examples import load
from gramfuse_client.exchange.local_model import train
from gramfuse_client.silo_file import Silo
from gramfuse_client.training.evaluate import evaluate
from gramfuse_model.derive_layout import plan_layout
from gramfuse_model.loading.base_model import load_base
from gramfuse_protocol.contract.plan import Plan
from gramfuse_protocol.held_out.metrics import metrics
from gramfuse_server.merging.accumulator import Accumulator
from loopback import BIN, CONNECTION, deployment


def gramfuse(*arguments: str, home: Path | None = None) -> dict[str, Any]:
    """Run the command as a user does and return its JSON."""
    environment = {**os.environ, **({"FLWR_HOME": str(home)} if home else {})}
    done = subprocess.run(
        [str(BIN / "gramfuse"), *arguments, "--json"], capture_output=True, text=True, env=environment, timeout=600
    )
    assert done.returncode == 0, done.stderr + done.stdout
    return json.loads(done.stdout)


def plain_loop(directory: Path) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """The whole method without Flower, messages or files: merged parameters and joint metrics."""
    plan = Plan.read(directory / "plan.toml")
    base = load_base(plan, directory)
    layout = plan_layout(plan, base)
    silos = [Silo.read(directory / "silos" / f"{name}.toml") for name in plan.names]
    accumulator = Accumulator(layout, alpha=plan.merge.alpha, weighting=plan.merge.weighting)
    for silo in silos:
        examples, _ = load(silo, plan.task_of(silo.name))
        accumulator.fold(train(silo, plan, layout, load_base(plan, directory), examples), silo.name)
    parameters = dict(base.model.named_parameters())
    with torch.no_grad():
        for name, delta in accumulator.merge().deltas.items():
            parameters[name].copy_(torch.from_numpy(parameters[name].numpy().astype(np.float64) + delta))
    sums = 0.0
    for silo in silos:
        task = plan.task_of(silo.name)
        _, held_out = load(silo, task)
        encoded = Encoded(held_out, base.tokenizer, task)
        cpu = torch.device("cpu")
        sums = sums + evaluate(base.model, batches(encoded, 64, cpu), task, base.tokenizer)
    return {name: p.detach().numpy() for name, p in parameters.items()}, metrics(task, sums)


@pytest.mark.timeout(900)
def test_simulation_deployment_and_plain_loop_agree(tmp_path: Path, pico_project: Callable[..., Any]) -> None:
    project = pico_project(silos=4)
    digest = gramfuse("plan", "lock", str(project.directory))["plan_digest"]
    for name in project.names:
        project.replace(project.silo(name), "approved = []", f'approved = ["{digest}"]')

    simulated = gramfuse("simulate", str(project.directory), "--out", str(tmp_path / "simulated"))
    with deployment(tmp_path / "deployment", [project.silo(name) for name in project.names]) as home:
        deployed = gramfuse("run", str(project.directory), CONNECTION, "--out", str(tmp_path / "deployed"), home=home)
    expected, joint = plain_loop(project.directory)

    weights = [load_file(tmp_path / way / "model" / "model.safetensors") for way in ("simulated", "deployed")]
    assert weights[0].keys() == weights[1].keys()
    for name in weights[0]:
        assert np.array_equal(weights[0][name], weights[1][name]), name
    moved = 0
    base = load_base(Plan.read(project.plan), project.directory).model.state_dict()
    for name, parameter in expected.items():
        distance = np.linalg.norm((weights[0][name] - parameter).astype(np.float64))
        assert distance <= 1e-6 * np.linalg.norm(parameter.astype(np.float64)), name
        moved += not np.array_equal(weights[0][name], base[name].numpy())
    assert moved > 10

    # The same metrics come from both, from the plain loop, and from the model as anyone would load it.
    by_kind = [{m["kind"]: m["metrics"] for m in report["models"]} for report in (simulated, deployed)]
    assert by_kind[0]["regmean"] == by_kind[1]["regmean"] == pytest.approx(joint)
    assert by_kind[0]["simple"] == by_kind[1]["simple"]
    assert [m["kind"] for m in simulated["models"]] == ["silo"] * 4 + ["simple", "regmean"]
    assert [m["kind"] for m in deployed["models"]] == ["simple", "regmean"]
    assert load_and_score(tmp_path / "deployed" / "model", project) == pytest.approx(joint["accuracy"])

    # The run directory is complete and says what left each silo.
    for report, way in ((simulated, "simulated"), (deployed, "deployed")):
        run = tmp_path / way
        assert report["run"] == str(run)
        assert {path.name for path in run.iterdir()} == {
            "SHA256SUMS", "layout.json", "model", "plan.toml", "report.html", "report.json", "transcript.jsonl",
        }  # fmt: skip
        assert subprocess.run(["sha256sum", "--quiet", "-c", "SHA256SUMS"], cwd=run).returncode == 0
        assert Plan.read(run / "plan.toml").digest == digest == report["plan_digest"]
        assert set(report["bytes"]) == set(project.names)
        assert all(set(phases) == {"join", "train", "upload", "evaluate"} for phases in report["bytes"].values())
        laboratory = {"exact"} if way == "simulated" else set()
        assert set(report["seconds"]) == {"join", "train", "upload", "merge", "evaluate", "write"} | laboratory
    ours = psutil.Process().children(recursive=True)
    assert not [p for p in ours if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


def load_and_score(model_directory: Path, project: Any) -> float:
    """Accuracy of a model directory on all held-out examples, with transformers alone."""
    model = AutoModelForSequenceClassification.from_pretrained(model_directory).eval()
    tokenizer = AutoTokenizer.from_pretrained(model_directory)
    hits = []
    for name in project.names:
        for line in (project.directory / "data" / name / "held-out.jsonl").read_text().splitlines():
            row = json.loads(line)
            inputs = tokenizer(row["text"], return_tensors="pt", truncation=True, max_length=16)
            with torch.no_grad():
                predicted = model(**inputs).logits.argmax(-1).item()
            hits.append(model.config.id2label[predicted] == row["label"])
    return float(np.mean(hits))
