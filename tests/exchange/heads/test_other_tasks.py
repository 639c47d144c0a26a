"""Heads in closed form of a regression and of several labels, through whole exchanges."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from gramfuse_client.data.alike import alike
from gramfuse_client.data.batches import Encoded, batches
from gramfuse_client.data.examples import Examples, load
from gramfuse_client.measuring.head_sums import collect_head_sums
from gramfuse_client.tasks.registry import at_silo
from gramfuse_model.derive_layout import plan_layout
from gramfuse_model.loading.base_model import load_base
from gramfuse_model.parameters import set_values
from gramfuse_model.probing.batch import IGNORED
from gramfuse_protocol.errors import ModelError
from gramfuse_protocol.statistics.head_sums import HeadSums
from gramfuse_server.merging.closed_form_head import fit_head
from gramfuse_server.merging.head_accumulator import START_SCALE
from gramfuse_server.merging.head_solvers import SEEN
from gramfuse_server.merging.label_heads import fit_labels
from gramfuse_server.merging.ridge_head import fit_ridge
from tests.conftest import LABELS, TOPICS, write_jsonl
from tests.exchange.rounds.runs import QUICK, Models, Site, assert_close

Relabel = Callable[[str, str, str], Any]
"""(silo, text, label) → the label of another task."""

BOTH = pytest.mark.parametrize("secure", [False, True], ids=["open", "secure"])


@pytest.fixture
def make(pico_project: Any, loud_bert: Any, in_process_grid: Any, tmp_path: Any) -> Callable[..., Site]:
    """Return a function that makes a site of another task than classification, with a fitted head."""

    def make(relabel: Relabel, *settings: str, masked: dict[str, list[str]] | None = None, **more: Any) -> Site:
        secure = more.get("secure", False)
        project = pico_project(base=loud_bert, examples=40, **more)
        for name in project.names:
            for path in (project.train(name), project.train(name).with_name("held-out.jsonl")):
                rows = [json.loads(line) for line in path.read_text().splitlines()]
                write_jsonl(path, [{**row, "label": relabel(name, row["text"], row["label"])} for row in rows])
            if secure:
                project.replace(project.silo(name), "open-uploads = false", "open-uploads = true\nexact-metrics = true")
        if masked:
            project.replace(project.plan, "[privacy]\n", f"[privacy]\nminimum-survivors = {len(project.names)}\n")
        for name, labels in (masked or {}).items():
            project.replace(project.plan, f'name = "{name}"\n', f'name = "{name}"\nlabels = {json.dumps(labels)}\n')
        chosen = ('model.head="fitted"', "training.learning-rate=1e-3", *QUICK, *settings)
        return Site(project, in_process_grid, tmp_path / "place", 1, *chosen)

    return make


def encoded_of(examples: Examples, base: Any, task: Any) -> Encoded:
    """What may be in the sums of a head."""
    kept = examples.take(at_silo(task).common(examples, task, 2, alike(examples, task)))
    return Encoded(kept, base.tokenizer, task).hide_rare(2)


def sums_by_hand(here: Site, weights: dict[str, np.ndarray] | None = None) -> HeadSums:
    """The sums over all silos' examples, for the base or other weights."""
    parts = []
    for name in here.plan.names:
        base, task = load_base(here.plan, here.project.directory), here.plan.task_of(name)
        if weights is not None:
            set_values(base.model, weights)
        examples = load(here.silo(name), task)[0]
        encoded = encoded_of(examples, base, task)
        parts.append(collect_head_sums(base.model, batches(encoded, 8, torch.device("cpu")), task))
    return sum(parts[1:], parts[0])


def base_of(here: Site) -> dict[str, np.ndarray]:
    model = load_base(here.plan, here.project.directory).model
    return {name: value.numpy() for name, value in model.state_dict().items()}


def target(_: str, text: str, label: str) -> float:
    """A number that the text says something about, within one scale of the centre."""
    return 50.0 + 10 * LABELS.index(label) + len(text.split())


EXACT = 'privacy.metrics-epsilon="none"'
REGRESSION = ('model.task="regression"', "model.labels=[]", "model.centre=60", "model.scale=40", EXACT)


@BOTH
def test_a_regression_starts_from_the_ridge_and_ends_with_that_of_the_merged_body(
    make: Callable[..., Site], secure: bool
) -> None:
    here, models = make(target, "merge.refit=true", *REGRESSION, silos=3, secure=secure), Models()

    report = here.run(change=models)
    base, head = base_of(here), fit_ridge(sums_by_hand(here))
    start = {name: base[name] + models.starts[0][f"delta:{name}"] for name in ("classifier.weight", "classifier.bias")}
    assert_close(start, {"classifier.weight": head.weight, "classifier.bias": head.bias}, 1e-5)

    merged = {name[6:]: base[name[6:]] + delta for name, delta in models.sent[2, "regmean"].items()}
    refitted = fit_ridge(sums_by_hand(here, merged))
    expected = {"classifier.weight": 40 * refitted.weight, "classifier.bias": 40 * refitted.bias + 60}
    assert_close({name: here.weights[name] for name in expected}, expected, 1e-4)  # on the targets' own scale
    assert report["merged"] == "refitted"
    assert {check["verdict"] for one in report["rounds"] for check in one["checks"]} == {"ok"}


@BOTH
def test_without_training_a_regression_is_the_ridge_on_the_base(make: Callable[..., Site], secure: bool) -> None:
    here = make(target, "training.epochs=0", *REGRESSION, silos=3, secure=secure)
    report = here.run()
    head = fit_ridge(sums_by_hand(here))
    expected = {"classifier.weight": 40 * head.weight, "classifier.bias": 40 * head.bias + 60}
    assert_close({name: here.weights[name] for name in expected}, expected, 1e-5)
    (fitted,) = report["models"]
    assert fitted["metrics"]["pearson"] > 0.3


def applying(_: str, text: str, __: str) -> list[str]:
    """The topics of which a text has a word."""
    return [label for label, words in TOPICS.items() if set(text.split()) & set(words.split()[::2])]


SEVERAL = ('model.task="multi-label"', EXACT)


@BOTH
def test_several_labels_start_from_how_often_they_occur_and_end_with_a_discriminant_each(
    make: Callable[..., Site], secure: bool
) -> None:
    here, models = make(applying, "merge.refit=true", *SEVERAL, silos=3, secure=secure), Models()

    report = here.run(change=models)
    base, head = base_of(here), fit_labels(sums_by_hand(here), start=START_SCALE)
    start = {name: base[name] + models.starts[0][f"delta:{name}"] for name in ("classifier.weight", "classifier.bias")}
    assert_close(start, {"classifier.weight": head.weight, "classifier.bias": head.bias}, 1e-5)
    merged = {name[6:]: base[name[6:]] + delta for name, delta in models.sent[2, "regmean"].items()}
    refitted = fit_labels(sums_by_hand(here, merged), start=None)
    expected = {"classifier.weight": refitted.weight, "classifier.bias": refitted.bias}
    assert_close({name: here.weights[name] for name in expected}, expected, 1e-4)
    assert report["merged"] == "refitted"
    assert {check["verdict"] for one in report["rounds"] for check in one["checks"]} == {"ok"}


@BOTH
def test_labels_are_fitted_to_the_silos_that_annotate_them(make: Callable[..., Site], secure: bool) -> None:
    some = {f"silo-{letter}": LABELS[:2] for letter in "def"}

    def known(silo: str, text: str, label: str) -> list[str]:
        return [name for name in applying(silo, text, label) if name in some.get(silo, LABELS)]

    here = make(known, "training.epochs=0", *SEVERAL, masked=some, silos=6, secure=secure)
    assert [part.outputs for part in here.layout.parts] == [(0, 1), (2,)]
    here.run()
    sums = sums_by_hand(here)
    head = fit_labels(sums, start=None)
    assert sums.counts[5] < sums.counts[3] == sums.examples
    expected = {"classifier.weight": head.weight, "classifier.bias": head.bias}
    assert_close({name: here.weights[name] for name in expected}, expected, 1e-5)


TAGS = ["O", "B-A", "I-A", "B-W", "I-W"]
WORDS = ('model.task="token-classification"', f"model.labels={json.dumps(TAGS)}", EXACT)


def tags(silo: str, text: str, _: str) -> list[str]:
    """A tag for each word; one silo alone has a word that continues an entity."""
    known = {word: f"B-{topic[0].upper()}" for topic in ("animals", "weather") for word in TOPICS[topic].split()}
    found = [known.get(word, "O") for word in text.split()]
    if silo == "silo-b" and text.startswith("cow"):
        found[0] = "I-A"
    return found


@BOTH
def test_tags_are_fitted_to_words_and_rare_ones_stay_out(make: Callable[..., Site], secure: bool) -> None:
    here, models = make(tags, "merge.refit=true", *WORDS, silos=3, secure=secure), Models()
    report = here.run(change=models)
    sums = sums_by_hand(here)
    assert sums.counts[1] > 2
    assert sums.counts[[2, 4]].tolist() == [0, 0]  # "cow" is one word, however often it occurs
    base, head = base_of(here), fit_head(sums, prior=False).scaled(START_SCALE)
    assert head.absent == (2, 4)
    start = {name: base[name] + models.starts[0][f"delta:{name}"] for name in ("classifier.weight", "classifier.bias")}
    assert_close(start, {"classifier.weight": head.weight, "classifier.bias": head.bias}, 1e-5)
    merged = {name[6:]: base[name[6:]] + delta for name, delta in models.sent[2, "regmean"].items()}
    refitted = fit_head(sums_by_hand(here, merged), prior=True).calibrated.scaled(SEEN)
    expected = {"classifier.weight": refitted.weight, "classifier.bias": refitted.bias}
    assert_close({name: here.weights[name] for name in expected}, expected, 1e-4)
    assert report["examples"] in (0, 120)  # never the number of words
    assert {check["verdict"] for one in report["rounds"] for check in one["checks"]} == {"ok"}


def test_a_tag_of_which_all_words_but_one_were_cut_off_stays_out(make: Callable[..., Site]) -> None:
    here = make(tags, "training.epochs=0", *WORDS, silos=3)
    base, task = load_base(here.plan, here.project.directory), here.plan.task_of("silo-a")
    texts, labels = ["cow dog", "the " * 40 + "dog"], [(2, 0), (0,) * 40 + (2,)]
    examples = Examples([tuple(text.split()) for text in texts], None, labels)
    rows = Encoded(examples, base.tokenizer, task).hide_rare(2).rows
    assert rows is not None
    assert {tag for row in rows for tag in row["labels"]} == {0, IGNORED}


def test_a_body_trained_from_heads_of_masked_labels_is_merged(make: Callable[..., Site]) -> None:
    some = {"silo-c": LABELS[:2]}
    here = make(lambda silo, *rest: applying(silo, *rest)[:1], *SEVERAL, masked=some, silos=3)
    for path in (here.project.train("silo-c"), here.project.train("silo-c").with_name("held-out.jsonl")):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        write_jsonl(path, [{**row, "label": [one for one in row["label"] if one in LABELS[:2]]} for row in rows])
    report = here.run()
    assert [one["work"] for one in report["rounds"]] == ["fit", "train"]
    assert report["merged"] == "regmean"


def test_a_layer_of_another_number_of_outputs_is_not_fitted(make: Callable[..., Site]) -> None:
    here = make(target, "training.epochs=0", *REGRESSION, silos=3)
    base = load_base(here.plan, here.project.directory)
    base.model.classifier = torch.nn.Linear(16, 2)
    with pytest.raises(ModelError, match="1 outputs"):
        plan_layout(here.plan.unlocked(), base)
