"""A kind of task that another package adds, by the registries only: in a plan, a run, its report and its page."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gramfuse_cli.show.results import show_report
from gramfuse_client.dry_run import of_inputs
from gramfuse_client.dry_run.findings import Findings
from gramfuse_client.guard.disclosure import disclose
from gramfuse_client.silo_file import write_identity
from gramfuse_client.tasks.classification import ClassificationAtSilo
from gramfuse_client.tasks.registry import AT_SILO
from gramfuse_client.tasks.registry import register as register_at_silo
from gramfuse_client.training.fisher import choose_variant
from gramfuse_model.loading.auto_classes import FORMS, head_settings
from gramfuse_protocol.contract.plan import Plan
from gramfuse_protocol.contract.task import Task
from gramfuse_protocol.errors import ModelError, PlanError
from gramfuse_protocol.held_out.metrics import metrics
from gramfuse_protocol.held_out.sums import figures, is_sum
from gramfuse_protocol.secure_sum.keys import Identity
from gramfuse_protocol.tasks.classification import Classification, confusion
from gramfuse_protocol.tasks.registry import TASK_KINDS, Measure, register
from gramfuse_protocol.tasks.rows import RowGroup, Vector, sum_rows
from gramfuse_protocol.tasks.scores import Sums, examples_in, share
from gramfuse_server.report.schema import Report
from tests.answers import sure
from tests.projects import Simulated
from tests.reports import read_back

NEARLY = "how many examples are at most one grade off, and how many more"
NEAR = "share of examples at most one label off"


class Ordinal(Classification):
    """Classification whose labels have an order; its rows begin with whether a prediction is near."""

    name = "ordinal"
    primary = "within-one"
    measures = Classification.measures | {"within-one": Measure(NEAR)}
    summed = "how many held-out examples of each grade got which grade"
    options = frozenset()
    unit = ("grade", "grades")
    first_label = 2 + 2 + 11

    def metrics(self, task: Task, sums: Sums) -> dict[str, float]:
        near = sum(float(np.trace(confusion(sums), offset)) for offset in (-1, 0, 1))
        return super().metrics(task, sums) | {"within-one": share(near, examples_in(sums))}

    def groups(self, task: Task) -> tuple[RowGroup, ...]:
        outcome, calibration, labels = super().groups(task)
        near = RowGroup("near", 2, math.sqrt(2), 1 / 4, NEARLY)
        return near, outcome._replace(share=3 / 20), calibration, labels

    def rows(self, task: Task, *facts: Any) -> Vector:
        near = np.abs(facts[0].truth - facts[0].predicted) <= 1
        return np.concatenate([sum_rows(np.stack([near, ~near], axis=1).astype(float)), super().rows(task, *facts)])

    def figures(self, task: Task, vector: Vector) -> dict[str, float]:
        return super().figures(task, vector[2:]) | {"within-one": share(vector[0], vector[0] + vector[1])}

    def label_figures(self, task: Task, vector: Vector) -> dict[str, dict[str, float]]:
        return super().label_figures(task, vector[2:])


class OrdinalAtSilo(ClassificationAtSilo):
    name = "ordinal"
    fisher = ("empirical",)


pytestmark = pytest.mark.usefixtures("no_waiting")


@pytest.fixture
def ordinal() -> Iterator[None]:
    """The kind, registered as another package would."""
    register(Ordinal)
    register_at_silo(OrdinalAtSilo)
    FORMS["ordinal"] = FORMS["classification"]._replace(classes=())
    yield
    for registry in (TASK_KINDS, AT_SILO, FORMS):
        del registry["ordinal"]  # type: ignore[attr-defined]


@pytest.fixture
def run(
    pico_project: Callable[..., Any], in_process_grid: Any, tmp_path: Path
) -> Callable[..., tuple[Plan, Report, Path]]:
    """Return a function that runs a project whose task is ordinal, and returns its plan, report and run directory."""

    def go(compare: str = "", **about: Any) -> tuple[Plan, Report, Path]:
        project = pico_project(**about)
        project.replace(project.plan, 'task = "classification"', 'task = "ordinal"')
        here = Simulated(project.directory, tmp_path)
        plan, layout, silos = here.plan, here.layout, here.silos
        for name in plan.names:
            write_identity(silos[name].state / "identity.pem", Identity(hashlib.sha256(name.encode()).digest()))
        wanted = {"compare": compare, "opened": False}
        report = here.run(in_process_grid, simulated=here.laboratory(**wanted), study=here.study(**wanted))
        told = str(disclose(plan.names[0], plan, layout).departures)
        assert NEARLY in told if plan.summed else Ordinal.summed in told
        found = Findings()
        of_inputs.check_data(found, silos[plan.names[0]], plan, None, offline=True)
        assert [finding.state for finding in found] == ["ok"]
        return plan, report, tmp_path / "run"

    return go


PLAN = '[plan]\nname = "p"\n[model]\nbase = "b"\ntask = "ordinal"\nlabels = ["1", "2", "3"]\n[[silo]]\nname = "a"\n'
PLAN += "[privacy]\nsecure-aggregation = false\n"


def test_a_kind_that_nothing_registered_is_refused_with_those_that_are() -> None:
    with pytest.raises(PlanError, match=r"'ordinal'.*causal-lm, classification, .*token-classification"):
        Plan.parse(PLAN)


@pytest.mark.usefixtures("ordinal")
def test_a_kind_of_which_a_side_knows_nothing_is_refused_there(monkeypatch: pytest.MonkeyPatch) -> None:
    task = Plan.parse(PLAN).task_of("a")
    with pytest.raises(ValueError, match="ordinal"):
        register(Ordinal)
    with pytest.raises(PlanError, match="no pairs"):
        Plan.parse(PLAN.replace("labels =", "pair = true\nlabels ="))
    with monkeypatch.context() as without:
        without.delitem(AT_SILO, "ordinal")
        without.delitem(FORMS, "ordinal")
        with pytest.raises(PlanError, match=r"'ordinal'.*gramfuse_client\.tasks"):
            choose_variant(task, None)
        with pytest.raises(ModelError, match=r"'ordinal'.*FORMS"):
            head_settings(task)


@pytest.mark.usefixtures("ordinal")
def test_rows_without_noise_give_the_exact_metrics() -> None:
    task = Plan.parse(PLAN).task_of("a")
    truth, predicted = np.random.default_rng(1).integers(0, 3, (2, 50))
    sums, vector = (
        TASK_KINDS["ordinal"].sums(task, sure(truth, predicted)),
        TASK_KINDS["ordinal"].rows(task, sure(truth, predicted)),
    )
    assert is_sum(task, vector)
    assert metrics(task, sums)["within-one"] == (np.abs(truth - predicted) <= 1).mean()
    assert figures(task, vector) == pytest.approx(metrics(task, sums))


@pytest.mark.usefixtures("ordinal")
def test_an_open_run_is_measured_compared_and_shown_in_its_own_words(
    run: Callable[..., tuple[Plan, Report, Path]], capsys: pytest.CaptureFixture[str]
) -> None:
    plan, report, directory = run("fisher:8,ensemble", silos=2, examples=30)
    assert read_back(directory) == report.document()
    assert report.tasks == {"": "ordinal"}
    assert all("within-one" in model.metrics for model in report.models)
    assert report.models[-2].name == "fisher (empirical, per tensor, 8 examples)"
    show_report(report, directory, False)
    assert "within-one" in capsys.readouterr().out
    page = (directory / "report.html").read_text(encoding="utf-8")
    assert NEAR in page
    assert "Within-one on 40 held-out examples" in page
    assert f"ordinal with {len(plan.model.labels)} grades" in page
    saved = json.loads((directory / "model" / "config.json").read_text(encoding="utf-8"))
    assert saved["architectures"] == ["BertForSequenceClassification"]


@pytest.mark.usefixtures("ordinal")
def test_a_secure_run_tells_the_new_metric_with_its_interval(
    run: Callable[..., tuple[Plan, Report, Path]],
) -> None:
    _, report, directory = run(silos=4, secure=True)
    assert read_back(directory) == report.document()
    (merged,) = (model for model in report.models if model.kind == "regmean")
    assert merged.exact is not None
    low, high = merged.intervals["within-one"]
    assert 0 <= low <= merged.metrics["within-one"] <= high <= 1
    assert low <= merged.exact.metrics["within-one"] <= high
    assert NEAR in (directory / "report.html").read_text(encoding="utf-8")
