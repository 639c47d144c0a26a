"""What transformers is told of a task, and what a model card says of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import transformers

from gramfuse_model.digests import weights_digest
from gramfuse_model.heads import head_parameters
from gramfuse_model.loading.auto_classes import BODY, FORMS, head_settings, merged_form
from gramfuse_model.loading.base_model import load_base
from gramfuse_protocol.contract.plan import Plan
from gramfuse_protocol.contract.task import MaskedTask, Task
from gramfuse_protocol.errors import PlanError
from gramfuse_server.report.merged_model import card

NER = 'task = "token-classification"\nlabels = ["O", "B-X", "I-X"]'
TOPIC = 'task = "classification"\nlabels = ["a", "b"]'


def plan(model: str, base: Path | str = "pico", tasks: str = "", silos: str = "") -> Plan:
    """Return a plan of two silos in open mode."""
    silos = silos or '[[silo]]\nname = "north"\n[[silo]]\nname = "south"\n'
    return Plan.parse(
        f'[plan]\nname = "x"\n[model]\nbase = "{base}"\n{model}\n{tasks}\n'
        f'[privacy]\nsecure-aggregation = false\nmetrics = "silo"\n{silos}'
    )


def two_tasks(base: Path | str = "pico") -> Plan:
    return plan(
        'head = "own"',
        base,
        f'[[task]]\nname = "topic"\n{TOPIC}\n[[task]]\nname = "ner"\n{NER}\n',
        '[[silo]]\nname = "north"\ntask = "topic"\n[[silo]]\nname = "south"\ntask = "ner"\n',
    )


@pytest.mark.parametrize("kind", FORMS)
def test_every_kind_names_classes_that_transformers_has(kind: str) -> None:
    form = FORMS[kind]  # type: ignore[index]
    assert hasattr(getattr(transformers, form.auto), "from_pretrained")
    assert hasattr(getattr(transformers, form.processor), "from_pretrained")


def test_a_head_has_an_output_for_each_label_and_one_for_a_number() -> None:
    found = head_settings(Task(task="token-classification", labels=("O", "B-X", "I-X")))
    assert found["num_labels"] == 3
    assert found["id2label"] == {0: "O", 1: "B-X", 2: "I-X"}
    assert head_settings(Task(task="regression")) == {"num_labels": 1, "problem_type": "regression"}
    assert head_settings(Task(task="causal-lm")) == {}


def test_a_card_says_what_the_model_is_for_and_how_to_load_it() -> None:
    ner = card(plan(NER), ["north"], None)
    assert "pipeline_tag: token-classification" in ner
    assert "from transformers import AutoModelForTokenClassification, AutoTokenizer" in ner
    images = card(plan('task = "image-classification"\nlabels = ["a", "b"]'), ["north"], None)
    assert "from transformers import AutoModelForImageClassification, AutoImageProcessor" in images
    assert 'processor = AutoImageProcessor.from_pretrained("' in images
    body = card(two_tasks(), ["north", "south"], None)
    assert merged_form(two_tasks()) == BODY
    assert "pipeline_tag: feature-extraction" in body
    assert "all silos share" in body


def test_a_silos_task_says_which_labels_it_annotates() -> None:
    silos = '[[silo]]\nname = "north"\nlabels = ["c", "a"]\n[[silo]]\nname = "south"\n'
    masked = plan('task = "multi-label"\nlabels = ["a", "b", "c"]', silos=silos)
    north, south = masked.task_of("north"), masked.task_of("south")
    assert isinstance(north, MaskedTask)
    assert (north.annotated, north.masked) == ((0, 2), True)
    assert (south.annotated, south.masked) == ((0, 1, 2), False)
    assert not masked.tasks[""].masked


def test_a_silo_that_is_not_in_the_roster_has_a_task_only_if_all_have_one() -> None:
    assert plan(NER).task_of("elsewhere").task == "token-classification"
    with pytest.raises(PlanError, match="no \\[\\[silo\\]\\] 'elsewhere'"):
        two_tasks().task_of("elsewhere")


def test_bodies_are_one_and_heads_are_their_tasks(pico_bert: Path) -> None:
    both = two_tasks(pico_bert)
    north, south = (load_base(both, pico_bert, silo=silo) for silo in both.names)
    assert north.pins == south.pins == load_base(both, pico_bert).pins
    assert north.shared == south.shared
    assert not north.shared & (head_parameters(north.model) | head_parameters(south.model))
    assert not any("pooler" in name for name in north.shared), "the tagger's body has none"
    assert any("word_embeddings" in name for name in north.shared)
    assert weights_digest(north.model) != weights_digest(south.model)
    assert (north.model.config.num_labels, south.model.config.num_labels) == (2, 3)
    alone = load_base(plan(TOPIC, pico_bert), pico_bert)
    assert alone.shared == frozenset(alone.model.state_dict())
    assert alone.pins.sha256 == weights_digest(alone.model)
