"""Exchanges in which silos train adapters: what leaves, what is merged, and what is written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Error
from peft import PeftModel
from safetensors.numpy import load_file
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, AutoTokenizer

from gramfuse_client.exchange import local_model
from gramfuse_client.exchange.local_model import Workbench
from gramfuse_client.state.state import State
from gramfuse_model.adapters.attach import adapters_of, frozen_matrices
from gramfuse_model.loading.base_model import load_base
from gramfuse_protocol.errors import ModelError, PlanError, RefusalError
from tests.commands import gramfuse
from tests.exchange.rounds.runs import Site

RANK = 4

ADAPTERS = (
    f"training.lora.rank={RANK}",
    'training.lora.output="both"',
    "training.learning-rate=1e-2",
    "training.epochs=1",
    "training.freeze=[]",
)


@pytest.fixture
def site(pico_project: Any, in_process_grid: Any, tmp_path: Path) -> Callable[..., Site]:
    """Return a function that makes a site whose silos train adapters."""

    def make(*settings: str, silos: int = 2, rounds: int = 1, secure: bool = False, name: str = "adapters") -> Site:
        project = pico_project(silos=silos, examples=16, name=name, secure=secure)
        for silo in project.names if secure else ():
            project.replace(project.silo(silo), "open-uploads = false", "open-uploads = true\nexact-metrics = true")
        return Site(project, in_process_grid, tmp_path / name / "place", rounds, *ADAPTERS, *settings)

    return make


def adapter_of(here: Site) -> dict[str, np.ndarray]:
    return load_file(here.out / "adapter" / "adapter_model.safetensors")


def test_only_b_and_the_head_leave_and_b_is_merged_in_closed_form(site: Callable[..., Site]) -> None:
    here = site()

    here.run()
    uploads = {reply.silo: dict(reply.arrays) for _, reply in here.replies if reply.phase == "upload"}
    assert len(uploads) == 2
    trained = {tensor.name for tensor in here.layout.tensors}
    assert all(".lora_B." in name or name.startswith("classifier.") for name in trained)
    assert all({tensor.name for tensor in here.layout.tensors} == trained for arrays in uploads.values())
    without_context = [tensor.name for tensor in here.layout.tensors if tensor.context_free]
    assert [name for name in without_context if ".layer.0.attention.self." in name] == without_context != []
    assert not {weight.weight for group in here.layout.groups for weight in group.weights} & set(without_context)
    adapter, closed = adapter_of(here), 0
    for group in here.layout.groups:
        if not group.name.endswith("lora_B.default"):
            continue
        closed += 1
        assert group.d_in == RANK
        (weight,) = group.weights
        grams = []
        for arrays in uploads.values():
            gram = np.zeros((RANK, RANK))
            gram[np.triu_indices(RANK)] = arrays[f"gram:{group.name}"]
            gram = gram + np.triu(gram, 1).T
            grams.append(here.plan.merge.alpha * gram + (1 - here.plan.merge.alpha) * np.diag(np.diag(gram)))
        trained_b = [arrays[f"delta:{weight.weight}"].astype(np.float64) for arrays in uploads.values()]
        products = sum(gram @ b.T for gram, b in zip(grams, trained_b, strict=True))
        expected = np.linalg.solve(sum(grams), products).T
        found = adapter[f"base_model.model.{weight.weight.replace('.default', '')}"]
        assert np.abs(found - expected).max() <= 1e-6 * np.abs(expected).max()
    assert closed


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # of PEFT's own use of transformers
def test_peft_loads_the_adapter_onto_its_base_as_the_merged_model(site: Callable[..., Site]) -> None:
    here = site("training.lora.rslora=true", 'training.lora.init="orthogonal"', rounds=2)

    here.run()
    adapter, model = here.out / "adapter", here.out / "model"
    config = AutoConfig.from_pretrained(adapter)
    base = AutoModelForSequenceClassification.from_pretrained(here.plan.model.base, config=config)
    loaded = PeftModel.from_pretrained(base, adapter).eval()
    merged = AutoModelForSequenceClassification.from_pretrained(model).eval()
    inputs = AutoTokenizer.from_pretrained(adapter)(["the door is open", "no"], return_tensors="pt", padding=True)
    untouched = AutoModelForSequenceClassification.from_pretrained(here.plan.model.base, config=config).eval()
    with torch.no_grad():
        expected = merged(**inputs).logits
        for other in (loaded, loaded.merge_and_unload()):
            assert torch.allclose(other(**inputs).logits, expected, atol=1e-5)
        assert not torch.allclose(untouched(**inputs).logits, expected, atol=1e-2)
    assert loaded.peft_config["default"].use_rslora
    page = (here.out / "report.html").read_text(encoding="utf-8")
    assert f"rank {RANK}" in page
    assert "PeftModel.from_pretrained" in page
    assert "PeftModel.from_pretrained" in (adapter / "README.md").read_text(encoding="utf-8")
    assert merged.config.id2label == base.config.id2label


def test_a_secure_run_merges_the_same_adapter_as_an_open_one(site: Callable[..., Site]) -> None:
    adapters = []
    for secure in (False, True):
        here = site(silos=3, secure=secure, name="secure" if secure else "open")
        here.run()
        adapters.append(adapter_of(here))
    one, other = adapters
    assert one.keys() == other.keys()
    for name, expected in one.items():
        assert np.abs(other[name] - expected).max() <= 1e-6 * max(1.0, np.abs(expected).max()), name


def test_every_silo_has_the_same_frozen_matrices(site: Callable[..., Site]) -> None:
    here = site()
    first, second = (load_base(here.plan, here.project.directory).model for _ in range(2))
    for (name, a), (other, b) in zip(frozen_matrices(first).items(), frozen_matrices(second).items(), strict=True):
        assert name == other
        assert torch.equal(a, b)
        assert torch.equal(a, a.bfloat16().float())
    matrices = list(frozen_matrices(first).values())
    assert not torch.equal(matrices[0][:, :8], matrices[1][:, :8])


@pytest.mark.parametrize("fault", ["frozen", "lost"])
def test_a_silo_whose_training_spoils_adapters_sends_nothing(
    site: Callable[..., Site], monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    here, finetune = site(), local_model.finetune

    def spoil(model: Any, *arguments: Any, **more: Any) -> None:
        finetune(model, *arguments, **more)
        with torch.no_grad():
            for _, layer in adapters_of(model):
                if fault == "frozen":
                    layer.lora_A["default"].weight[0, 0] += 1
                else:
                    layer.lora_B["default"].weight.zero_()

    monkeypatch.setattr(local_model, "finetune", spoil)
    with pytest.raises(RefusalError):
        here.run()
    assert not [reply for _, reply in here.replies if reply.phase == "upload"]


def test_a_plan_pins_the_frozen_matrices(site: Callable[..., Site]) -> None:
    here = site()
    lora = here.plan.training.lora.model_copy(update={"init": "gaussian"})
    other = here.plan.model_copy(update={"training": here.plan.training.model_copy(update={"lora": lora})})
    with pytest.raises(ModelError, match=r"model\.adapters"):
        load_base(other, here.project.directory)


def test_files_of_silos_give_the_adapter_of_a_run_bit_for_bit(site: Callable[..., Site], tmp_path: Path) -> None:
    here = site()

    here.run()
    project = here.project
    document = here.plan.to_toml()
    project.plan.write_text(document, encoding="utf-8")
    (project.directory / "layout.json").write_text(here.layout.to_json(), encoding="utf-8")
    files = []
    for name in project.names:
        project.replace(project.silo(name), "approved = []", f'approved = ["{here.plan.digest}"]')
        files.append(tmp_path / f"{name}.safetensors")
        gramfuse("measure", "--plan", project.directory, "--silo", name, "-o", files[-1])
    gramfuse("merge", *files, "-o", tmp_path / "merged", "--base", here.plan.model.base)
    for run, file in (("adapter", "adapter_model"), ("model", "model")):
        place = tmp_path / "merged" / ("adapter" if run == "adapter" else "")
        one, other = ((where / f"{file}.safetensors").read_bytes() for where in (here.out / run, place))
        assert one == other, run


def test_a_silo_can_keep_the_base_in_half_of_the_memory(site: Callable[..., Site]) -> None:
    here = site()
    for name in here.project.names:
        here.project.replace(
            here.project.silo(name), "[data]", '[memory]\nbase = "bfloat16"\ncheckpointing = true\n[data]'
        )
    report = here.run()
    assert report["merged"] == "regmean"
    exact = site(name="exact")
    exact.run()
    half, whole = adapter_of(here), adapter_of(exact)
    for name, values in whole.items():
        assert half[name].dtype == np.float32
        if ".lora_A." in name:
            assert np.array_equal(half[name], values), name
    both = [np.concatenate([one[name].ravel() for name in whole if ".lora_A." not in name]) for one in (half, whole)]
    assert 0 < np.linalg.norm(both[0] - both[1]) < 0.5 * np.linalg.norm(both[1])


def test_a_silo_that_trains_the_whole_base_cannot_halve_it(site: Callable[..., Site]) -> None:
    here = site()
    plan = here.plan.override(["training.freeze=[]"])
    whole = plan.model_copy(update={"training": plan.training.model_copy(update={"lora": None})})
    here.project.replace(here.project.silo("silo-a"), "[data]", '[memory]\nbase = "bfloat16"\n[data]')
    with pytest.raises(PlanError, match=r"memory\.base"):
        Workbench(here.silo("silo-a"), whole).check_layout(here.layout)


@pytest.mark.parametrize("phase", ["masked", "unmask"])
def test_a_silo_that_is_lost_leaves_the_adapter_of_the_sum(site: Callable[..., Site], phase: str) -> None:
    def away(at: str) -> Any:
        return lambda visit, deliver: Error(5, "away") if (visit.node, visit.phase) == ("silo-d", at) else deliver()

    here = site(silos=4, secure=True)
    report = here.run(fault=away(phase))
    in_sum = phase == "unmask"
    assert len(report["rounds"][0]["survivors"]) == (4 if in_sum else 3)
    known = site("privacy.minimum-survivors=3", silos=4, name="open")
    known.run(fault=away("none" if in_sum else "train"))
    expected = adapter_of(known)
    for name, values in adapter_of(here).items():
        assert np.abs(values - expected[name]).max() <= 1e-6 * max(1.0, np.abs(expected[name]).max()), name


def test_silos_that_keep_their_heads_get_merged_models_with_them(site: Callable[..., Site]) -> None:
    here = site('model.head="own"', 'training.lora.output="merged"')
    report = here.run()
    assert report["head"] == "own"
    assert not (here.out / "adapter").exists()
    body = AutoModel.from_pretrained(here.out / "model").state_dict()
    heads = []
    for name in here.project.names:
        kept = AutoModelForSequenceClassification.from_pretrained(State(here.silo(name).state, here.plan.digest).model)
        own = kept.bert.state_dict()
        assert all(torch.allclose(own[key], values, atol=1e-6) for key, values in body.items() if "pooler" not in key)
        heads.append(kept.classifier.weight)
    assert not torch.equal(*heads)
