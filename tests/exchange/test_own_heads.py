"""Heads that silos keep, start anew, or annotate in part: what is merged, and what stays where it was trained."""

from __future__ import annotations

import json
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file

from gramfuse_cli.show.results import show_report
from gramfuse_client.data.batches import Encoded, batches
from gramfuse_client.data.examples import load
from gramfuse_client.guard.disclosure import disclose
from gramfuse_client.silo_file import Silo
from gramfuse_client.training.evaluate import evaluate
from gramfuse_model.heads import head_parameters
from gramfuse_model.loading.auto_classes import FORMS
from gramfuse_model.loading.base_model import load_base, own_head
from gramfuse_protocol.contract.plan import Plan
from gramfuse_protocol.held_out.metrics import metrics
from gramfuse_server.report.schema import Report
from tests.projects import Simulated, write_project

CPU = torch.device("cpu")
ANIMALS, WEATHER = ["cat", "dog", "horse", "sheep"], ["rain", "snow", "wind", "sun"]
KITCHEN = ["pan", "pot", "knife", "spoon"]
FILLERS = ["the", "a", "of", "and"]

TASKS = """
[[task]]
name = "topic"
task = "classification"
labels = ["animals", "weather"]
max-length = 16

[[task]]
name = "entities"
task = "token-classification"
labels = ["O", "B-animal", "I-animal"]
max-length = 16

[[task]]
name = "count"
task = "regression"
max-length = 16
"""
RANKED = {"topic": "accuracy", "entities": "entity-f1", "count": "pearson"}
SILOS = {"north": "topic", "south": "topic", "east": "entities", "west": "count"}


def rows(task: str, count: int, seed: int) -> list[dict[str, Any]]:
    """Texts of which one can tell the topic, which words are animals, and how many there are."""
    rng = random.Random(seed)
    found = []
    for _ in range(count):
        words = [rng.choice(rng.choice([ANIMALS, WEATHER, FILLERS])) for _ in range(rng.randint(3, 8))]
        animals = sum(word in ANIMALS for word in words)
        match task:
            case "topic":
                label: Any = "animals" if animals > sum(word in WEATHER for word in words) else "weather"
            case "entities":
                label = ["B-animal" if word in ANIMALS else "O" for word in words]
            case _:
                label = animals / 4
        found.append({"text": words if task == "entities" else " ".join(words), "label": label})
    return found


@pytest.fixture
def project(tmp_path: Path, pico_bert: Path) -> Path:
    """A project with three tasks at four silos."""
    silos = {
        name: (f'task = "{task}"', rows(task, 60, number), rows(task, 20, 100 + number))
        for number, (name, task) in enumerate(SILOS.items())
    }
    return write_project(
        tmp_path / "project",
        f'[plan]\nname = "tasks"\n[model]\nbase = "{pico_bert}"\nhead = "own"\n{TASKS}\n'
        "[training]\nepochs = 2\nlearning-rate = 1e-2\nbatch-size = 8\n"
        '[privacy]\nsecure-aggregation = false\nmetrics = "silo"\n',
        silos,
    )


def run(directory: Path, place: Path, grid: Any, *settings: str) -> SimpleNamespace:
    """Run a whole exchange in this process, as a simulation does."""
    here = Simulated(directory, place, *settings)
    report = here.run(grid, simulated=here.laboratory(), own_heads=here.finish).document()
    return SimpleNamespace(plan=here.plan, layout=here.layout, silos=here.silos, report=report, out=here.out)


def measured(model: Path, silo: Silo, plan: Plan) -> dict[str, float]:
    """Return the metrics of a finished model as anybody would load it."""
    task = plan.task_of(silo.name)
    loaded = getattr(transformers, FORMS[task.task].auto).from_pretrained(model)
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    _, held_out = load(silo, task)
    found = evaluate(loaded, batches(Encoded(held_out, tokenizer, task), 64, CPU, by_length=True), task, tokenizer)
    return metrics(task, found)


def test_different_tasks_share_a_body_and_keep_their_heads(
    project: Path,
    tmp_path: Path,
    in_process_grid: Any,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    done = run(project, tmp_path, in_process_grid)
    plan, models = done.plan, {model["name"]: model for model in done.report["models"]}
    assert [model["kind"] for model in done.report["models"]] == [*["body"] * 4, "alone", "simple", "regmean"]

    merged = {tensor.name for tensor in done.layout.tensors}
    for name in SILOS:
        kept = load_file(done.silos[name].state / plan.digest / "head.safetensors")
        assert kept, "each silo keeps what it trained and does not share"
        assert not merged & kept.keys()
        heads = head_parameters(load_base(plan, project, silo=name).model)
        assert heads <= kept.keys()

        # The finished model is the same at the silo and in the simulation's run directory, and is what was measured.
        own = done.silos[name].state / plan.digest / "model"
        assert own.stat().st_mode & 0o777 == 0o700
        assert {path.stat().st_mode & 0o777 for path in own.iterdir()} == {0o600}
        for place in (own, done.out / "models" / name):
            assert measured(place, done.silos[name], plan) == pytest.approx(models["regmean"]["silos"][name], rel=1e-5)
        assert models["alone"]["silos"][name] == models[name]["silos"][name]

    sums = (done.out / "SHA256SUMS").read_text()
    assert all(f"models/{name}/model.safetensors" in sums for name in SILOS)

    regmean = models["regmean"]
    assert regmean["metrics"]["examples"] == 80
    assert set(regmean["tasks"]) == {"topic", "entities", "count"}
    assert regmean["tasks"]["entities"] == regmean["silos"]["east"]
    assert regmean["tasks"]["topic"]["examples"] == 40
    scores = [regmean["tasks"][name][metric] for name, metric in RANKED.items()]
    assert regmean["metrics"]["mean-score"] == pytest.approx(sum(scores) / 3)
    for model in models.values():
        assert set(model["labels"]) == {"topic", "entities"}, "numbers have none"
        assert sum(label["examples"] for label in model["labels"]["topic"].values()) == 40
        assert model["labels"]["entities"]["animal"]["f1"] == model["tasks"]["entities"]["entity-f1"]

    body, about = transformers.AutoModel.from_pretrained(done.out / "model", output_loading_info=True)
    assert not about["missing_keys"]
    assert not about["unexpected_keys"]
    start = transformers.AutoModel.from_pretrained(plan.model.base)
    pairs = zip(body.named_parameters(), start.parameters(), strict=True)
    moved = {f"bert.{name}" for (name, a), b in pairs if not torch.equal(a, b)}
    assert {name for name in merged if not name.endswith("key.bias")} <= moved <= merged, "those may have no gradient"

    monkeypatch.setenv("COLUMNS", "200")
    show_report(Report.read(done.report), done.out, False)
    shown = capsys.readouterr().out
    for words in ("topic: accuracy", "entities: entity-f1", "count: pearson", "mean-score", "each silo's own model"):
        assert words in shown
    assert f'AutoModel.from_pretrained("{done.out}/model")' in shown.replace("\n", "")


def test_a_silo_gets_its_finished_model_even_if_no_metrics_leave(
    project: Path, tmp_path: Path, in_process_grid: Any
) -> None:
    done = run(project, tmp_path, in_process_grid, "privacy.metrics=none")
    assert done.report["models"] == []
    assert "metrics" in done.report["unmeasured"]
    for name, silo in done.silos.items():
        own = load_file(silo.state / done.plan.digest / "model" / "model.safetensors")
        expected = load_file(done.out / "models" / name / "model.safetensors")
        assert own.keys() == expected.keys()
        assert all(np.array_equal(own[tensor], expected[tensor]) for tensor in own)
        entries = [json.loads(line)["entry"] for line in silo.ledger.read_text().splitlines()]
        (evaluated,) = (entry for entry in entries if entry["phase"] == "evaluate")
        (header,) = evaluated["items"]
        promised = {departure.phase: departure.bytes for departure in disclose(name, done.plan, done.layout).departures}
        assert (header["name"], header["bytes"]) == ("header", promised["evaluate"])


def test_a_silos_first_head_is_its_own_and_the_same_every_time(project: Path) -> None:
    text = (project / "plan.toml").read_text().replace(TASKS, "").replace('task = "', '# task = "')
    only = 'head = "different"\ntask = "classification"\nlabels = ["animals", "weather"]\n'
    (project / "plan.toml").write_text(text.replace('head = "own"\n', only).replace('metrics = "silo"', ""))
    plan = Plan.read(project / "plan.toml")
    shared = dict(load_base(plan, project).model.named_parameters())
    first = {name: own_head(plan, project, name) for name in SILOS}
    for name, head in first.items():
        assert head.keys() == head_parameters(load_base(plan, project, silo=name).model)
        assert all(torch.equal(value, own_head(plan, project, name)[key]) for key, value in head.items())
        for other in (shared, *(first[n] for n in SILOS if n != name)):
            assert not torch.equal(head["classifier.weight"], other["classifier.weight"])
    reseeded = plan.override(["training.seed=2"])
    assert not torch.equal(
        own_head(reseeded, project, "north")["classifier.weight"], first["north"]["classifier.weight"]
    )


def test_a_silo_learns_and_counts_only_the_labels_that_it_annotates(
    tmp_path: Path, pico_bert: Path, in_process_grid: Any
) -> None:
    """Each silo is blind to one label; the merged model knows all, so it is better than every silo's own."""
    words = dict(zip("abc", (ANIMALS, WEATHER, KITCHEN), strict=True))
    own = {"north": "ab", "east": "bc", "south": "ca"}

    def annotated(labels: str, count: int, seed: int) -> list[dict[str, Any]]:
        rng = random.Random(seed)
        found = []
        for _ in range(count):
            applying = [label for label in "abc" if rng.random() < 0.25]
            text = [rng.choice(words[label]) for label in applying] + rng.choices(FILLERS, k=3)
            found.append({"text": " ".join(text), "label": [label for label in applying if label in labels]})
        return found

    silos = {
        name: (f"labels = {json.dumps(list(ls))}", annotated(ls, 240, number), annotated(ls, 40, 100 + number))
        for number, (name, ls) in enumerate(own.items())
    }
    directory = write_project(
        tmp_path / "project",
        f'[plan]\nname = "masked"\n[model]\nbase = "{pico_bert}"\ntask = "multi-label"\nlabels = ["a", "b", "c"]\n'
        "max-length = 16\nthreshold = 0.2\n[training]\nepochs = 15\nlearning-rate = 3e-3\nbatch-size = 8\n"
        '[privacy]\nsecure-aggregation = false\nmetrics = "silo"\n',
        silos,
    )
    done = run(directory, tmp_path, in_process_grid)
    models = {model["name"]: model for model in done.report["models"]}
    assert [model["kind"] for model in done.report["models"]] == ["silo", "silo", "silo", "simple", "regmean"]
    for name in own:
        assert models["regmean"]["metrics"]["macro-f1"] > models[name]["metrics"]["macro-f1"] + 0.02
    assert models["regmean"]["metrics"]["examples"] == 120
