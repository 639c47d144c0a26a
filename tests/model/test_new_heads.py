"""Heads of a base: which are new, and what new ones take."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertForSequenceClassification

from gramfuse_model.loading.base_model import load_base
from gramfuse_model.loading.zero_head import load_zero_headed, plan_for
from gramfuse_protocol.contract.task import Task
from gramfuse_protocol.errors import ModelError
from tests.conftest import WORDS, save_model
from tests.projects import bert_config

TASK = Task(task="classification", labels=("animals", "weather", "kitchen"))


@pytest.fixture
def based(tmp_path: Path) -> Any:
    """Return a function that saves a base whose head is for some labels, and returns its place and that head."""

    def make(*labels: str) -> tuple[Path, torch.Tensor]:
        torch.manual_seed(3)
        names = {"id2label": dict(enumerate(labels)), "label2id": {label: n for n, label in enumerate(labels)}}
        model = BertForSequenceClassification(bert_config(4 + len(WORDS), num_labels=len(labels), **names))
        return save_model(model, tmp_path / "base"), model.classifier.weight.detach().clone()

    return make


@pytest.mark.parametrize(
    ("labels", "kept"),
    [
        (("animals", "Weather", "kitchen"), True),
        (("LABEL_0", "LABEL_1", "LABEL_2"), True),
        (("joy", "anger", "fear"), False),
        (("animals", "weather", "garden"), False),
        (("animals", "weather"), False),
    ],
)
def test_a_head_for_other_labels_is_a_new_one(based: Any, labels: tuple[str, ...], kept: bool) -> None:
    place, head = based(*labels)
    base = load_base(plan_for("silo", str(place), TASK), Path())
    found = base.model.state_dict()["classifier.weight"]
    assert bool(found.shape == head.shape and torch.equal(found, head)) == kept
    assert ("classifier.weight" in base.fresh) == (not kept)
    again = load_base(plan_for("silo", str(place), TASK), Path()).model.state_dict()["classifier.weight"]
    assert torch.equal(found, again)


def test_labels_in_another_order_than_those_of_the_head_are_refused(based: Any) -> None:
    place, _ = based("weather", "animals", "kitchen")
    with pytest.raises(ModelError, match=r"another order.*\['weather', 'animals', 'kitchen'\]"):
        load_base(plan_for("silo", str(place), TASK), Path())
    load_zero_headed(plan_for("silo", str(place), TASK), Path())  # the base of a model that others fine-tuned
