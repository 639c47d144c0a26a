"""Mixture models through whole runs: fine-tuned, measured, merged and written, open and under masks."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from transformers import MixtralConfig, MixtralModel

from gramfuse_cli.commands.plan_show import _preview
from gramfuse_cli.commands.plan_show import _privacy as privacy_of
from gramfuse_client.data.examples import load
from gramfuse_client.measuring.checkpoint import measure, open_checkpoint
from gramfuse_model.heads import head_parameters
from gramfuse_model.project import Project
from gramfuse_protocol.errors import ModelError
from gramfuse_protocol.statistics.file import write_statistics
from gramfuse_server.merging.files import Settings, merge_files
from gramfuse_simulation.engine import simulated_silo
from tests.conftest import PicoProject
from tests.projects import Simulated
from tests.reports import read_back

ROUTER = (1.0, -1.0, 2.0, -2.0, 0.0)
"""Multiples of one direction: a router that chooses two never chooses the last."""

TENSORS = [f"model.layers.{layer}.mlp.experts.{name}" for layer in (0, 1) for name in ("gate_up_proj", "down_proj")]


@pytest.fixture
def pico_mixtral(tmp_path: Path, pico_tokenizer: Any) -> Path:
    torch.manual_seed(15)
    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 5, "num_experts_per_tok": 2}
    config = MixtralConfig(vocab_size=len(pico_tokenizer), initializer_range=0.2, pad_token_id=0, **sizes)
    model = MixtralModel(config)
    with torch.no_grad():
        for layer in model.layers:
            layer.mlp.gate.weight.copy_(torch.tensor(ROUTER).unsqueeze(1) * layer.mlp.gate.weight[:1])
    model.save_pretrained(tmp_path / "mixtral")
    pico_tokenizer.save_pretrained(tmp_path / "mixtral")
    return tmp_path / "mixtral"


def project(make: Callable[..., PicoProject], base: Path, *, secure: bool) -> PicoProject:
    made = make(silos=4, base=base, secure=secure)
    made.replace(made.plan, 'freeze = ["*embeddings*"]', 'freeze = ["embeddings", "*mlp.gate.weight"]')
    if secure:
        made.replace(made.plan, "alpha = 0.9", 'alpha = 0.9\nexperts = "full"')
        for name in made.names:
            made.replace(made.silo(name), "open-uploads", 'experts = "full"\nopen-uploads')
    return made


def test_what_a_secure_plan_says_of_experts_has_an_effect_and_names_what_silos_must_allow(
    pico_project: Callable[..., PicoProject], pico_mixtral: Path
) -> None:
    made = project(pico_project, pico_mixtral, secure=True)
    made.replace(made.plan, '"*" = "full"', '"*" = "full", "*.experts.*" = "block:8"')
    plan, layout = Project.read(made.directory).locked()
    assert {group.structure for group in layout.groups if group.experts} == {"block:8"}
    said = " ".join(privacy_of(plan))
    assert all(words in said for words in ('merge.experts = "full"', "refuses", "limits.experts"))
    made.replace(made.plan, 'experts = "full"', "")
    assert "limits.experts" not in " ".join(privacy_of(Project.read(made.directory).plan))
    with pytest.raises(ModelError, match=r"'\*\.experts\.\*'.*'model\.layers\.0\.mlp\.experts\..*merge\.experts"):
        Project.read(made.directory).locked()


@pytest.mark.parametrize("secure", [False, True], ids=["open", "secure"])
def test_a_run_merges_experts_and_names_those_that_no_silo_used(
    tmp_path: Path,
    pico_project: Callable[..., PicoProject],
    pico_mixtral: Path,
    in_process_grid: Any,
    secure: bool,
) -> None:
    made = project(pico_project, pico_mixtral, secure=secure)
    read = Project.read(made.directory)
    here = Simulated(made.directory, tmp_path)
    plan, layout = here.plan, here.layout
    shown = {group["name"]: group["experts"] for group in _preview(read, plan, layout)["groups"]}
    assert {name for name, experts in shown.items() if experts} == set(TENSORS)
    assert set(shown.values()) == {None, 5}
    for name in made.names if secure else ():
        here.silos[name].state.mkdir(parents=True)
        shutil.copy(made.identity(name), here.silos[name].state / "identity.pem")
    report = here.run(in_process_grid, simulated=here.laboratory())
    assert read_back(tmp_path / "run") == report.document()
    steps = {step.group: step for step in report.solve}
    for name in TENSORS:
        assert (steps[name].outcome, steps[name].unused) == ("unused", (4,))
    assert all(check.verdict != "bad" for check in report.checks)
    card = (tmp_path / "run" / "model" / "README.md").read_text()
    page = (tmp_path / "run" / "report.html").read_text()
    for name in TENSORS:
        assert f"`{name}`: expert 4" in card
        assert name in page
    assert "routed to expert 4" in page
    written = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "run" / "model")
    start = transformers.AutoModel.from_pretrained(pico_mixtral)
    moved = dict(written.model.named_parameters())["layers.0.mlp.experts.down_proj"].detach()
    assert (moved - dict(start.named_parameters())["layers.0.mlp.experts.down_proj"]).abs().max() > 1e-4


def test_a_model_that_is_measured_twice_and_merged_comes_back_and_its_card_names_unused_experts(
    tmp_path: Path, pico_project: Callable[..., PicoProject], pico_mixtral: Path
) -> None:
    made = project(pico_project, pico_mixtral, secure=False)
    plan, _ = Project.read(made.directory).locked()
    task = plan.task_of(made.names[0])
    torch.manual_seed(16)
    tuned = transformers.AutoModelForSequenceClassification.from_pretrained(pico_mixtral, num_labels=3)
    tuned.config.id2label = dict(enumerate(task.labels))
    tuned.config.label2id = {label: n for n, label in enumerate(task.labels)}
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "embed" not in name and "mlp.gate" not in name:
                parameter += 0.02 * torch.randn(parameter.shape)
    tuned.save_pretrained(tmp_path / "tuned")
    transformers.AutoTokenizer.from_pretrained(pico_mixtral).save_pretrained(tmp_path / "tuned")
    files = []
    for number, name in enumerate(made.names[:2]):
        examples = load(simulated_silo(str(made.silo(name)), str(tmp_path / "state"), plan.digest), task)[0]
        checkpoint = open_checkpoint(str(tmp_path / "tuned"), str(pico_mixtral), task, tmp_path)
        statistics = measure(
            checkpoint,
            examples,
            limit=10**6,
            batch_size=4 + number,
            device=torch.device("cpu"),
            progress=lambda done, total: None,
        )
        files.append(tmp_path / f"{name}.safetensors")
        write_statistics(
            files[-1],
            statistics,
            name=name,
            base=checkpoint.base.origin(str(pico_mixtral)),
            task=task,
            layout=checkpoint.layout,
            head=head_parameters(checkpoint.base.model),
        )
    report = merge_files(files, tmp_path / "merged", Settings(base=str(pico_mixtral)), tmp_path)
    merged = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    own = dict(tuned.named_parameters())
    for name, parameter in merged.named_parameters():
        np.testing.assert_allclose(parameter.detach(), own[name].detach(), rtol=0, atol=1e-6)
    named = {step.group: step.unused for step in report.solve if step.unused}
    assert named == dict.fromkeys(TENSORS, (4,))
    saved = read_back(tmp_path / "merged")
    assert saved == report.document()
    assert [step["unused"] for step in saved["solve"] if step["unused"]] == [[4]] * 4
    assert f"`{TENSORS[0]}`: expert 4" in (tmp_path / "merged" / "README.md").read_text()
