"""`gramfuse simulate --compare` without Ray: what is measured, and that it is what its name says."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import T5Config, T5ForConditionalGeneration

from gramfuse_cli.show.results import show_report
from gramfuse_client.data.batches import Encoded, batches
from gramfuse_client.data.examples import Examples, load
from gramfuse_client.training.finetune import finetune
from gramfuse_model.digests import weights_digest
from gramfuse_model.loading.base_model import load_base
from gramfuse_protocol.contract.layout import delta_block
from gramfuse_protocol.contract.plan_sections import Privacy
from gramfuse_protocol.errors import PlanError
from gramfuse_protocol.held_out.metrics import metrics
from gramfuse_server.merging.methods.arithmetic import weighted_mean
from gramfuse_server.merging.methods.registry import METHODS, MethodModel, Options, Silos, method
from gramfuse_server.report.page.page import page
from gramfuse_server.report.schema import Report
from gramfuse_server.run.evaluation import to_measured
from gramfuse_simulation.all_silos import AllSilos
from gramfuse_simulation.fedavg import federated_average
from gramfuse_simulation.terms import check_terms, parse_terms
from tests.projects import Simulated, write_project
from tests.reports import read_back

ANIMALS, WEATHER, FILLERS = ["cat", "dog", "horse", "sheep"], ["rain", "snow", "wind", "sun"], ["the", "a", "of"]


pytestmark = pytest.mark.usefixtures("no_waiting")


@dataclass(frozen=True, repr=False)
class Compared:
    """A run that was compared, and a laboratory of its silos."""

    report: dict[str, Any]
    out: Path
    events: list[dict[str, Any]]
    laboratory: AllSilos

    def of(self, kind: str) -> dict[str, Any]:
        (model,) = (model for model in self.report["models"] if model["kind"] == kind)
        return model


@pytest.fixture
def compare(in_process_grid: Any, tmp_path: Path) -> Callable[[Path, str], Compared]:
    """Return a function that runs the project of a directory and compares the merge with these terms."""

    def run(directory: Path, terms: str) -> Compared:
        here = Simulated(directory, tmp_path)
        wanted = {"compare": terms, "opened": False}
        events: list[dict[str, Any]] = []
        report = here.run(
            in_process_grid,
            simulated=here.laboratory(**wanted),
            study=here.study(**wanted),
            observer=events.append,
        ).document()
        compared = Compared(report, here.out, events, here.laboratory(**wanted)(1, here.plan.names))
        check_exchange(compared)
        return compared

    return run


def check_exchange(run: Compared) -> None:
    """The laboratory gives what the silos gave in the exchange, and leaves the base model as it was."""
    laboratory = run.laboratory
    simple = weighted_mean(*laboratory.parents())
    assert to_measured(laboratory.plan, "simple", "simple", laboratory.measure(simple)).document() == run.of("simple")
    for model in run.report["models"]:
        if model["kind"] in ("silo", "body"):
            sums = laboratory.measure(laboratory.deltas(model["name"]))
            assert to_measured(laboratory.plan, model["name"], model["kind"], sums).document() == model
    for bench in laboratory.benches.values():
        loaded = load_base(laboratory.plan, bench.silo.directory, silo=bench.silo.name)
        assert weights_digest(bench.base.model, loaded.shared) == weights_digest(loaded.model, loaded.shared)


def open_project(
    directory: Path, plan: str, silos: Mapping[str, tuple[str, list[Any], list[Any]]], epochs: int = 2
) -> Path:
    """Write an open project: of each silo, what its section of the plan says, and what its data are."""
    settings = f"[training]\nepochs = {epochs}\nlearning-rate = 1e-2\nbatch-size = 8\n"
    privacy = '[privacy]\nsecure-aggregation = false\nmetrics = "silo"\n'
    return write_project(directory, f'[plan]\nname = "p"\n{plan}\n{settings}{privacy}', silos)


def rows(label: Callable[[list[str]], Any], count: int, seed: int, *, split: bool = False) -> list[dict[str, Any]]:
    """Texts, and what is to be said of their words."""
    rng = random.Random(seed)
    drawn = [
        [rng.choice(rng.choice([ANIMALS, WEATHER, FILLERS])) for _ in range(rng.randint(3, 8))] for _ in range(count)
    ]
    return [{"text": words if split else " ".join(words), "label": label(words)} for words in drawn]


def test_classifiers_compared_with_everything(
    pico_project: Callable[..., Any], compare: Callable[..., Compared], capsys: pytest.CaptureFixture[str]
) -> None:
    project = pico_project(silos=2, examples=60)
    project.replace(project.plan, "epochs = 2", "epochs = 6")
    terms = "fisher,fisher:soft:model:9,ensemble,joint,best,fedavg:2,task-arithmetic,ties:0.5,transport"
    run = compare(project.directory, terms)
    assert read_back(run.out) == run.report
    others = run.report["models"][4:]
    assert [model["name"] for model in others] == [
        "fisher (hard, per tensor)",
        "fisher (soft, per model, 9 examples)",
        "ensemble",
        "joint",
        f"best ({run.of('best')['silo']})",
        "fedavg (2 rounds)",
        "task arithmetic (scale 0.3)",
        "ties (density 0.5)",
        "transport",
    ]
    assert all(model["metrics"]["examples"] == 40 and set(model["silos"]) == {"silo-a", "silo-b"} for model in others)
    assert all(model["seconds"] >= 0 for model in others)
    study = [(event["state"], event.get("name")) for event in run.events if event["phase"] == "study"]
    assert study[:3] == [("start", None), ("try", "fisher"), ("measured", "fisher (hard, per tensor)")]
    show_report(Report.read(run.report), run.out, False)
    shown = " ".join(capsys.readouterr().out.split())
    assert "task arithmetic (scale 0.3)" in shown
    assert f"fedavg (2 rounds): {run.of('fedavg')['note']}" in shown

    alone = {model["name"]: model["metrics"] for model in run.report["models"] if model["kind"] == "silo"}
    best = run.of("best")
    assert best["metrics"] == pytest.approx(alone[best["silo"]], rel=1e-6)
    assert best["metrics"]["accuracy"] == max(found["accuracy"] for found in alone.values())
    assert run.of("transport")["pairs"] == 2
    check_averaging(run, project)
    check_ensemble(run, project)
    check_joint(run, project)


def test_a_method_of_another_package_is_measured_and_shown_by_its_label(
    pico_project: Callable[..., Any],
    compare: Callable[..., Compared],
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(ValueError, match=r"'toy'.*best, .*ensemble, .*simple, .*transport"):
        parse_terms("toy")
    try:

        @method(
            name="toy",
            label="toy median",
            words="the median of the silos' parameters",
            needs=("models",),
            options=Options("[:TIMES]", "once", lambda values: {"times": float((*values, 1)[0])}),
        )
        def toy(silos: Silos, times: float) -> MethodModel:
            differences, _ = silos.parents()
            merged = {name: times * np.median([d[name] for d in differences], axis=0) for name in differences[0]}
            return MethodModel(merged, (f"times {times:g}",), {"note": "as robust as it gets"})

        run = compare(pico_project(silos=3, examples=30).directory, "toy:0.5")
        secure = run.laboratory.plan.model_copy(update={"privacy": Privacy()})
        with pytest.raises(PlanError, match=r"toy: .*--open"):
            check_terms(parse_terms("toy"), secure)
        model = run.of("toy")
        assert model["name"] == "toy median (times 0.5)"
        assert read_back(run.out) == run.report
        report = Report.read(run.report)
        show_report(report, run.out, False)
        shown = " ".join(capsys.readouterr().out.split())
        assert "toy median (times 0.5)" in shown
        told = page(report, run.laboratory.plan)
        assert told == (run.out / "report.html").read_text(encoding="utf-8")
        assert "toy median (times 0.5)" in told
        assert "median of the silos&#39; parameters" in told
        with pytest.raises(ValueError, match="toy"):
            method(name="toy", label="", words="")(toy)
    finally:
        METHODS.pop("toy", None)


def check_averaging(run: Compared, project: Any) -> None:
    """Each round of FedAvg as a plain loop: the mean of what silos make of the base model, and of that mean."""
    rounds: list[Mapping[str, np.ndarray]] = []
    sent = federated_average(run.laboratory, 2, lambda number, deltas: rounds.append(deltas))
    for name, delta in weighted_mean(*run.laboratory.parents()).items():
        np.testing.assert_allclose(rounds[0][name], delta, rtol=0, atol=1e-6, err_msg=name)
    plan, cpu = run.laboratory.plan, torch.device("cpu")
    start = run.laboratory.start()
    mean: Mapping[str, np.ndarray] = dict(start)
    for number in (1, 2):
        models = []
        for bench in run.laboratory.benches.values():
            base = load_base(plan, project.directory)
            parameters = dict(base.model.named_parameters())
            for name, values in mean.items():
                parameters[name].data = torch.from_numpy(values.copy())
            train = load(bench.silo, bench.task)[0]
            finetune(base.model, Encoded(train, base.tokenizer, bench.task), plan.training.in_round(number), cpu)
            models.append(parameters)
        mean = {name: np.mean([model[name].detach().numpy() for model in models], axis=0) for name in mean}
        for name, delta in rounds[number - 1].items():
            np.testing.assert_allclose(delta, mean[name] - start[name], rtol=0, atol=1e-6, err_msg=f"{name}, {number}")
        mean = {name: start[name] + delta.astype(np.float32) for name, delta in rounds[number - 1].items()}
    model_bytes = sum(4 * int(np.prod(tensor.shape)) for tensor in run.laboratory.layout.tensors)
    assert sent == {"silo-a": 2 * model_bytes, "silo-b": 2 * model_bytes}
    fedavg = run.of("fedavg")
    assert fedavg["bytes"] == sent
    assert fedavg["rounds"][0] == pytest.approx(run.of("simple")["metrics"], rel=1e-5)
    assert fedavg["rounds"][1] == fedavg["metrics"]


def check_ensemble(run: Compared, project: Any) -> None:
    """A plain loop over models and examples."""
    right = total = 0
    bases = [load_base(run.laboratory.plan, project.directory) for _ in project.names]
    for base, name in zip(bases, project.names, strict=True):
        with torch.no_grad():
            for key, parameter in base.model.named_parameters():
                if parameter.requires_grad:
                    parameter += torch.from_numpy(run.laboratory.contributions[name].block(delta_block(key)))
    for bench in run.laboratory.benches.values():
        for text, label in zip(bench.examples[1].inputs, bench.examples[1].labels, strict=True):
            encoded = bases[0].tokenizer(text, return_tensors="pt")
            with torch.no_grad():
                logits = sum(base.model(**encoded).logits[0] for base in bases) / len(bases)
            right, total = right + (int(logits.argmax()) == label), total + 1
    assert run.of("ensemble")["metrics"]["accuracy"] == right / total


def check_joint(run: Compared, project: Any) -> None:
    """A base model that is fine-tuned on all examples."""
    plan = run.laboratory.plan
    base = load_base(plan, project.directory)
    silos = [load(bench.silo, bench.task) for bench in run.laboratory.benches.values()]
    task = plan.task_of("silo-a")
    train, held_out = (
        Examples([x for part in parts for x in part.inputs], None, [x for part in parts for x in part.labels])
        for parts in zip(*silos, strict=True)
    )
    finetune(base.model, Encoded(train, base.tokenizer, task), plan.training, torch.device("cpu"))
    predicted = []
    with torch.no_grad():
        for batch in batches(Encoded(held_out, base.tokenizer, task), 1, torch.device("cpu")):
            predicted.append(int(base.model(**batch).logits.argmax()))
    right = sum(p == label for p, label in zip(predicted, held_out.labels, strict=True))
    assert run.of("joint")["metrics"]["accuracy"] == right / len(predicted)


def test_models_that_generate_text(tmp_path: Path, pico_tokenizer: Any, compare: Callable[..., Compared]) -> None:
    torch.manual_seed(3)
    size = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2, "vocab_size": len(pico_tokenizer)}
    tokens = {"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 3}
    T5ForConditionalGeneration(T5Config(**size, **tokens, dropout_rate=0.0)).save_pretrained(tmp_path / "t5")
    pico_tokenizer.save_pretrained(tmp_path / "t5")
    task = f'[model]\nbase = "{tmp_path / "t5"}"\ntask = "sequence-to-sequence"\nmax-length = 16\ntarget-length = 8'
    data = {name: ("", rows(lambda w: w[0], 24, n), rows(lambda w: w[0], 10, 10 + n)) for n, name in enumerate("ab")}
    project = open_project(tmp_path / "project", task, data, epochs=20)
    run = compare(project, "fisher:16,ensemble,joint,fedavg:1,transport")
    assert run.report["models"][4]["name"] == "fisher (empirical, per tensor, 16 examples)"
    assert run.of("transport")["pairs"] == 2
    assert run.of("fedavg")["metrics"] == pytest.approx(run.of("simple")["metrics"], rel=1e-5)

    # Votes and mean logits, one example at a time. The pad token that is taken out of texts is no vote.
    laboratory = run.laboratory
    exact, nll, target_tokens = 0, 0.0, 0
    for bench in laboratory.benches.values():
        for batch in batches(bench.parts["held-out"], 1, bench.device):
            texts, logits = [], []
            for name in laboratory.benches:
                with bench.model(laboratory.deltas(name)) as model, torch.no_grad():
                    generated = model.generate(input_ids=batch["input_ids"], max_new_tokens=8, do_sample=False)
                    texts.append(bench.base.tokenizer.decode(generated[0], skip_special_tokens=True))
                    logits.append(model(**batch).logits[0])
            winner = max(texts, key=texts.count)
            exact += winner == bench.base.tokenizer.decode(batch["labels"][0], skip_special_tokens=True)
            log_p = (sum(logits) / 2).log_softmax(dim=-1)
            nll -= float(log_p[torch.arange(len(log_p)), batch["labels"][0]].sum())
            target_tokens += len(log_p)
    found = run.of("ensemble")["metrics"]
    assert found["exact-match"] == exact / 20
    assert found["perplexity"] == pytest.approx(np.exp(nll / target_tokens), rel=1e-5)


def test_silos_that_annotate_different_labels(
    tmp_path: Path, pico_bert: Path, compare: Callable[..., Compared]
) -> None:
    labels = {"a": ["animals", "weather"], "b": ["weather", "fillers"], "c": ["animals", "weather", "fillers"]}
    kinds = {"animals": ANIMALS, "weather": WEATHER, "fillers": FILLERS}
    task = f'[model]\nbase = "{pico_bert}"\ntask = "multi-label"\nlabels = {json.dumps(list(kinds))}\nmax-length = 16'
    data = {}
    for n, (name, own) in enumerate(labels.items()):

        def label(words: list[str], own: list[str] = own) -> list[str]:
            return [kind for kind in own if set(words) & set(kinds[kind])]

        data[name] = (f"labels = {json.dumps(own)}", rows(label, 24, n), rows(label, 10, 10 + n))
    run = compare(open_project(tmp_path / "project", task, data), "fisher,fisher:soft,ensemble,ties,best")
    assert run.of("ties")["metrics"]["examples"] == 30
    differences, weights = run.laboratory.parents()
    (head,) = (tensor.name for tensor in run.laboratory.layout.tensors if tensor.parted and len(tensor.shape) == 2)
    holders = np.array([[kind in own for kind in kinds] for own in labels.values()])
    for delta, weight, own in zip(differences, weights, holders, strict=True):
        assert weight[head].ravel().tolist() == own.tolist()
        assert np.array_equal(np.abs(delta[head]).sum(axis=1) > 0, own)


def test_different_tasks_with_heads_of_their_own(
    tmp_path: Path, pico_bert: Path, compare: Callable[..., Compared]
) -> None:
    tasks = (
        '[[task]]\nname = "tags"\ntask = "token-classification"\nlabels = ["O", "B-X", "I-X"]\nmax-length = 16\n'
        '[[task]]\nname = "count"\ntask = "regression"\nmax-length = 16\n'
    )
    data = {}
    for n, (name, task) in enumerate({"a": "tags", "b": "count", "c": "count"}.items()):

        def label(words: list[str], task: str = task) -> Any:
            tags = ["B-X" if word in ANIMALS else "O" for word in words]
            return tags if task == "tags" else tags.count("B-X") / 4

        split = task == "tags"
        data[name] = (f'task = "{task}"', rows(label, 24, n, split=split), rows(label, 10, 10 + n, split=split))
    plan = f'[model]\nbase = "{pico_bert}"\nhead = "own"\n{tasks}'
    run = compare(open_project(tmp_path / "project", plan, data), "fisher:12,task-arithmetic:0.5,best")
    assert run.of("fisher")["name"] == "fisher (hard, empirical, per tensor, 12 examples)"
    assert set(run.of("task-arithmetic")["tasks"]) == {"tags", "count"}
    bodies = {model["name"]: model["metrics"] for model in run.report["models"] if model["kind"] == "body"}
    best = run.of("best")
    assert best["metrics"] == pytest.approx(bodies[best["silo"]], rel=1e-6)
    assert best["metrics"]["mean-score"] == max(found["mean-score"] for found in bodies.values())
    for name, bench in run.laboratory.benches.items():
        # A body that did not move, with the head that the silo trained.
        assert bench.head
        found = metrics(bench.task, run.laboratory.measure({})[name])
        assert found != best["silos"][name]
