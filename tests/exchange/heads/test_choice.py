"""Which heads `plan lock` chooses to fit, which plans are refused, and the plain average as a merge of its own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import BertForSequenceClassification

from gramfuse_model.project import Project
from gramfuse_protocol.errors import ModelError, PlanError
from tests.conftest import LABELS, WORDS, save_model
from tests.exchange.rounds.runs import Models, Site
from tests.projects import bert_config


def chosen(project: Any, *settings: str) -> str | None:
    """The head of a plan that does not say which, once it is locked."""
    text = project.plan.read_text()
    project.plan.write_text(text.replace('head = "same"\n', ""))
    return Project.read(project.directory, settings).locked()[0].model.head


def test_a_new_head_is_fitted_unless_the_plan_says_otherwise(pico_project: Callable[..., Any]) -> None:
    assert chosen(pico_project(silos=2)) == "fitted"
    project = pico_project(silos=2)
    assert Project.read(project.directory).locked()[0].model.head == "same"


def test_a_new_head_for_words_is_fitted_too(pico_project: Callable[..., Any]) -> None:
    project = pico_project(silos=2)
    project.replace(project.plan, '"classification"', '"token-classification"')
    project.replace(project.plan, '["animals", "weather", "kitchen"]', '["O", "B-X", "I-X"]')
    assert chosen(project) == "fitted"


def test_the_head_that_a_base_brings_is_kept(pico_project: Callable[..., Any], tmp_path: Path) -> None:
    torch.manual_seed(3)
    labels = {"id2label": dict(enumerate(LABELS)), "label2id": {label: n for n, label in enumerate(LABELS)}}
    config = bert_config(4 + len(WORDS), num_labels=3, **labels)
    base = save_model(BertForSequenceClassification(config), tmp_path / "tuned")
    assert chosen(pico_project(silos=2, base=base)) == "same"


@pytest.mark.parametrize("task", ["regression", "multi-label"])
def test_other_tasks_start_from_one_random_head(pico_project: Callable[..., Any], task: str) -> None:
    project = pico_project(silos=2)
    project.replace(project.plan, '"classification"', f'"{task}"')
    if task == "regression":
        project.replace(project.plan, 'labels = ["animals", "weather", "kitchen"]\n', "")
    assert chosen(project) == "same"


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        (("training.epochs=0", "model.head=same"), "training.epochs"),
        (("training.epochs=0", "merge.refit=true"), "merge.refit"),
        (("training.epochs=0", "merge.rounds=2"), "merge.rounds"),
        (("model.head=own", "merge.refit=true"), "own heads"),
    ],
)
def test_plans_that_contradict_themselves_are_refused(
    pico_project: Callable[..., Any], settings: tuple[str, ...], named: str
) -> None:
    with pytest.raises(PlanError, match=named):
        Project.read(pico_project(silos=2).directory, settings)


def test_a_frozen_head_is_not_fitted(pico_project: Callable[..., Any]) -> None:
    project = pico_project(silos=2)
    settings = ("model.head=fitted", 'training.freeze=["*embeddings*", "classifier.*"]')
    with pytest.raises(ModelError, match=r"classifier\.weight.*model\.head"):
        Project.read(project.directory, settings).locked()


@pytest.mark.parametrize("secure", [False, True], ids=["open", "secure"])
def test_the_plain_average_is_a_merge_without_gram_matrices(site: Callable[..., Site], secure: bool) -> None:
    here, models = site('merge.method="average"', secure=secure), Models()

    report = here.run(change=models, simulated=here.laboratory)
    assert not here.layout.groups
    trained = sum(tensor.entries for tensor in (block.block for block in here.layout.deltas))
    assert here.layout.sum_entries == trained + 2
    assert report["merged"] == "simple"
    assert [model["kind"] for model in report["models"]] == ["silo"] * 3 + ["simple"]
    alone = [here.laboratory(2, here.plan.names).deltas(name) for name in here.plan.names]
    for tensor in here.layout.tensors:
        mean = np.mean([deltas[tensor.name] for deltas in alone], axis=0)
        found = models.sent[2, "simple"].get(f"delta:{tensor.name}", np.zeros(tensor.shape))
        assert np.allclose(found, mean, atol=1e-6), tensor.name


def test_secure_heads_equal_open_heads(site: Callable[..., Site], tmp_path: Path) -> None:
    weights = []
    for secure in (False, True):
        here = site("training.epochs=0", secure=secure)
        here.out = tmp_path / f"out-{secure}"
        here.state = tmp_path / f"state-{secure}"
        here.run()
        weights.append(here.weights)
    for name in ("classifier.weight", "classifier.bias"):
        size = np.abs(weights[0][name]).max()
        assert np.abs(weights[0][name] - weights[1][name]).max() < 1e-6 * size, name
