"""`gramfuse tune` without Ray: what is chosen, what is written, and that nothing is chosen by what is reported."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from gramfuse_client.data.examples import load, load_validation
from gramfuse_client.silo_file import Silo
from gramfuse_client.state.state import State
from gramfuse_model.loading.base_model import load_base
from gramfuse_protocol.contract.layout import Layout
from gramfuse_protocol.contract.plan import Plan
from gramfuse_server.merging.accumulator import Accumulator
from gramfuse_simulation import all_silos as laboratory_module
from gramfuse_simulation.tuning import Wanted
from tests.projects import Simulated
from tests.reports import read_back

WANTED = Wanted(alphas=(0.0, 0.5, 0.9, 1.0), weights=True, order="greedy", influence=True)


@dataclass(frozen=True, repr=False)
class Tuned:
    """A tuned exchange of silos that were trained for it."""

    project: Any
    plan: Plan
    layout: Layout
    out: Path
    report: dict[str, Any]
    seen: dict[str, set[str]]

    def merge(self, alpha: float, weights: dict[str, float]) -> dict[str, np.ndarray]:
        """The differences of a merge of these silos, as an exchange makes it."""
        accumulator = Accumulator(self.layout, alpha=alpha)
        for name, weight in weights.items():
            contribution = State(self.out.parent / "state" / name, self.plan.digest).contribution()
            accumulator.fold(contribution, name, silo=name, share=weight)
        return dict(accumulator.merge().deltas)


@pytest.fixture
def tuned(
    pico_project: Callable[..., Any], in_process_grid: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Tuned]:
    """Return a function that tunes a project, and notes which texts the laboratory looked at, by part."""

    def tune(wanted: Wanted = WANTED, change: Callable[[Any], None] = lambda project: None) -> Tuned:
        project = pico_project(silos=3)
        change(project)
        here = Simulated(project.directory, tmp_path, tuned=True)
        seen: dict[str, set[str]] = {"validation": set(), "held-out": set()}
        evaluate = laboratory_module.Bench.evaluate

        def noted(bench: Any, model: Any, part: str) -> Any:
            seen[part] |= {str(row["input_ids"]) for row in bench.parts[part].rows}
            return evaluate(bench, model, part)  # type: ignore[arg-type]

        monkeypatch.setattr(laboratory_module.Bench, "evaluate", noted)
        asked = {"tune": asdict(wanted), "compare": "ties", "opened": False}
        report = here.run(in_process_grid, simulated=here.laboratory(**asked), study=here.study(**asked)).document()
        return Tuned(project, here.plan, here.layout, here.out, report, seen)

    return tune


def test_what_is_written_is_the_merge_that_was_best_by_validation(tuned: Callable[..., Tuned]) -> None:
    run = tuned()
    tuning = run.report["tuning"]
    assert read_back(run.out) == run.report
    assert [entry["alpha"] for entry in tuning["alpha"]] == [0.0, 0.5, 0.9, 1.0]
    chosen = tuning["chosen"]
    assert chosen["score"] == max(entry["score"] for entry in tuning["alpha"] + tuning["weights"])
    assert tuning["metric"] == "accuracy"
    assert chosen["metrics"]["accuracy"] == chosen["score"]
    assert chosen["metrics"]["examples"] == sum(tuning["examples"].values())

    weights = load_file(run.out / "model" / "model.safetensors")
    base = {name: p.detach().numpy() for name, p in load_base(run.plan, run.project.directory).model.named_parameters()}
    for name, delta in run.merge(chosen["alpha"], chosen["weights"]).items():
        measured = base[name].astype(np.float64) + delta.astype(np.float32)  # differences as silos are sent them
        assert np.array_equal(weights[name], measured.astype(np.float32)), name

    # The simple average in the report is that of the plan, and the merge that the plan asked for is there to compare.
    kinds = [model["kind"] for model in run.report["models"]]
    changed = (chosen["alpha"], chosen["weights"]) != (0.9, dict.fromkeys(run.plan.names, 1.0))
    assert kinds == ["silo"] * 3 + ["simple", "regmean"] + ["untuned"] * changed + ["ties"]

    assert [len(step["silos"]) for step in tuning["order"]] == [1, 2, 3]
    assert tuning["order"][-1]["score"] == chosen["score"]
    assert [entry["silo"] for entry in tuning["influence"]] == list(run.plan.names)
    for entry in tuning["influence"]:
        assert entry["difference"] == entry["without"] - chosen["score"]
        assert set(entry["reported"]) == {name for name in chosen["metrics"] if name != "examples"}


def test_nothing_that_is_reported_was_chosen_by(tuned: Callable[..., Tuned]) -> None:
    run = tuned(Wanted(alphas=(0.1, 0.9)))
    assert run.seen["validation"]
    assert not run.seen["validation"] & run.seen["held-out"]
    # What the silos themselves measured for the report is the other half as well.
    reported = run.report["tuning"]["reported"]["examples"]
    for model in run.report["models"]:
        assert model["metrics"]["examples"] == sum(reported.values()) == 30
    for name in run.plan.names:
        silo = Silo.read(run.project.silo(name))
        everything, validation = load(silo, run.plan.task_of(name))[1], load_validation(silo, run.plan.task_of(name))
        assert len(everything) - reported[name] >= len(validation) == run.report["tuning"]["examples"][name]


def test_a_source_of_its_own_leaves_all_held_out_examples_for_the_report(tuned: Callable[..., Tuned]) -> None:
    def name_a_source(project: Any) -> None:
        rows = [{"text": f"the cat and the dog near my big horse {'old ' * n}", "label": "animals"} for n in range(7)]
        for name in project.names:
            path = project.directory / "data" / name / "validation.jsonl"
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
            held_out = f'held-out = "../data/{name}/held-out.jsonl"'
            project.replace(project.silo(name), held_out, f'{held_out}\nvalidation = "../data/{name}/validation.jsonl"')

    run = tuned(Wanted(alphas=(0.9,)), name_a_source)
    assert run.report["tuning"]["examples"] == dict.fromkeys(run.plan.names, 7)
    assert run.report["tuning"]["reported"]["examples"] == dict.fromkeys(run.plan.names, 20)
    assert run.report["models"][0]["metrics"]["examples"] == 60
