"""Heads in closed form beside the merge: `--compare probe,refit` against a plain loop over all silos' examples."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gramfuse_client.data.alike import alike
from gramfuse_client.data.batches import batches
from gramfuse_client.tasks.registry import at_silo
from gramfuse_protocol.contract.plan import Plan
from gramfuse_protocol.errors import PlanError
from gramfuse_protocol.statistics.head_sums import HeadSums
from gramfuse_server.merging.closed_form_head import fit_head
from gramfuse_server.merging.methods.arithmetic import weighted_mean
from gramfuse_server.merging.ridge_head import fit_ridge
from gramfuse_simulation.all_silos import AllSilos, Bench
from gramfuse_simulation.terms import check_terms, parse_terms
from tests.conftest import write_jsonl
from tests.projects import Simulated

CPU = torch.device("cpu")


@pytest.fixture
def run(pico_project: Callable[..., Any], tmp_path: Any, in_process_grid: Any) -> tuple[dict[str, Any], AllSilos]:
    """A run of three silos with all closed-form heads beside the merge: its report, and its silos."""
    project = pico_project(silos=3, examples=40)
    here = Simulated(project.directory, tmp_path)
    wanted = {"compare": "probe,probe:mean,refit,refit:simple", "opened": False}
    report = here.run(in_process_grid, study=here.study(**wanted)).document()
    return report, here.laboratory(**wanted)(1, here.plan.names)


def features(silos: AllSilos, deltas: Any, part: int, pooling: str) -> tuple[np.ndarray, np.ndarray]:
    """All silos' features and labels, one by one: the input of BERT's classifier, or the mean over tokens."""
    found, labels = [], []
    for bench in silos.benches.values():
        with bench.model(deltas) as model, torch.no_grad():
            examples = bench.examples[part]
            if part == 0:  # labels that are rare at the silo are left out
                examples = examples.take(
                    at_silo(bench.task).common(examples, bench.task, 2, alike(examples, bench.task))
                )
            for batch in batches(bench.encoded(examples), 1, CPU):
                inputs = {name: value for name, value in batch.items() if name != "labels"}
                outputs = model.eval().bert(**inputs)
                x = outputs.pooler_output if pooling == "head" else outputs.last_hidden_state.mean(dim=1)
                found.append(x[0].double().numpy())
                labels.append(int(batch["labels"][0]))
    return np.array(found), np.array(labels)


def accuracy(silos: AllSilos, deltas: Any, pooling: str = "head") -> float:
    x, y = features(silos, deltas, 0, pooling)
    head = fit_head(HeadSums.of(x, np.eye(len(silos.plan.task_of("silo-a").labels))[y]), prior=True)
    x, y = features(silos, deltas, 1, pooling)
    return float(((x @ head.weight.T + head.bias).argmax(axis=1) == y).mean())


def test_heads_in_closed_form_are_fitted_to_all_silos_examples(run: tuple[dict[str, Any], AllSilos]) -> None:
    report, silos = run
    merged = {tensor.name: np.zeros(tensor.shape) for tensor in silos.layout.tensors}
    found = {model["name"]: model["metrics"]["accuracy"] for model in report["models"]}
    assert found["head only"] == accuracy(silos, merged)
    assert found["head only (mean-pooled)"] == accuracy(silos, merged, "mean")
    assert found["head fitted again (simple average)"] == accuracy(silos, weighted_mean(*silos.parents()))
    assert "head fitted again" in found
    notes = [model["note"] for model in report["models"] if model["kind"] in ("probe", "refit")]
    assert len(notes) == 4
    assert all("shrinkage" in note for note in notes)


def test_joint_training_starts_as_silos_do_or_cold(
    pico_project: Callable[..., Any],
    loud_bert: Path,
    tmp_path: Path,
    in_process_grid: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    started: list[set[str]] = []
    finetune = Bench.finetune

    def watched(self: Bench, deltas: Any, *arguments: Any, **named: Any) -> Any:
        started.append(set(deltas))
        return finetune(self, deltas, *arguments, **named)

    monkeypatch.setattr(Bench, "finetune", watched)
    settings = 'model.head="fitted"', "training.learning-rate=1e-3", "training.epochs=1"
    here = Simulated(pico_project(silos=2, base=loud_bert).directory, tmp_path, *settings)
    study = here.study(compare="joint,joint:cold,probe", opened=False)
    report = here.run(in_process_grid, study=study, simulated=here.laboratory(compare="", opened=False)).document()
    assert started == [{"classifier.weight", "classifier.bias"}, set()]
    names = [model["name"] for model in report["models"]]
    assert names == ["silo-a", "silo-b", "simple", "regmean", "joint", "joint (cold)", "head only"]


def test_a_regression_has_a_head_in_closed_form_too(
    pico_project: Callable[..., Any], tmp_path: Any, in_process_grid: Any
) -> None:
    project = pico_project(silos=3, examples=40)
    for path in project.directory.glob("data/*/*.jsonl"):
        found = [json.loads(line)["text"] for line in path.read_text().splitlines()]
        write_jsonl(path, [{"text": text, "label": 1.0 + len(text.split())} for text in found])
    numbers = ('model.task="regression"', "model.labels=[]", "model.centre=5", "model.scale=2")
    here = Simulated(project.directory, tmp_path, *numbers)
    wanted = {"compare": "probe,refit", "opened": False}
    report = here.run(in_process_grid, study=here.study(**wanted)).document()
    silos = here.laboratory(**wanted)(1, here.plan.names)
    merged = {tensor.name: np.zeros(tensor.shape) for tensor in silos.layout.tensors}
    x, _ = features(silos, merged, 0, "head")
    truth = [
        np.array([label for bench in silos.benches.values() for label in bench.examples[n].labels]) for n in (0, 1)
    ]
    head = fit_ridge(HeadSums.of(x, (truth[0][:, None] - 5) / 2))
    x, _ = features(silos, merged, 1, "head")
    measured = {model["name"]: model["metrics"] for model in report["models"]}
    expected = float(np.sqrt(np.mean((5 + 2 * (x @ head.weight[0] + head.bias[0]) - truth[1]) ** 2)))
    assert measured["head only"]["rmse"] == pytest.approx(expected, rel=1e-5)
    assert "head fitted again" in measured


def test_a_task_without_a_closed_form_is_refused(pico_project: Callable[..., Any]) -> None:
    project = pico_project(silos=3)
    plan = Plan.read(project.plan).override(
        ["privacy.secure-aggregation=false", "model.task=causal-lm", "model.labels=[]"]
    )
    for term in ("probe", "refit"):
        with pytest.raises(PlanError, match=term):
            check_terms(parse_terms(term), plan)
    for text in ("probe:first", "refit:fisher", "probe:mean:mean"):
        with pytest.raises(ValueError, match=r"is head or mean|is regmean or simple"):
            parse_terms(text)
